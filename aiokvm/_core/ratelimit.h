#ifndef AIOKVM_RATELIMIT_H
#define AIOKVM_RATELIMIT_H

#include <stdint.h>

/* Two token buckets, of bytes and of operations, that any threads may share. */
struct aiokvm_ratelimit;

/* Rates are per second, 0 is no limit; bursts are what an idle bucket lets through at once. NULL: no memory. */
struct aiokvm_ratelimit *aiokvm_ratelimit_new(uint64_t bytes_per_second, uint64_t burst_bytes,
                                              uint64_t operations_per_second, uint64_t burst_operations);
void aiokvm_ratelimit_free(struct aiokvm_ratelimit *limit);

/* Takes tokens for so many operations that have so many bytes together (at most 2^34) at now_ns, and returns 0; or
 * takes none and returns how many ns to wait before asking again. They may be more than the burst: the bucket then
 * is in debt, and whoever comes next waits for it. */
uint64_t aiokvm_ratelimit_take(struct aiokvm_ratelimit *limit, uint64_t now_ns, uint64_t bytes,
                               uint64_t operations);

#endif
