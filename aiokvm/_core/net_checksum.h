/* The Internet checksum: RFC 1071. */
#ifndef AIOKVM_NET_CHECKSUM_H
#define AIOKVM_NET_CHECKSUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* A sum on its way over several pieces of memory, in the byte order of the network as the host loads it. */
struct net_sum {
    uint64_t value;
    bool odd; /* so many bytes have been added */
};

void net_sum_add(struct net_sum *sum, const void *data, size_t size);
/* The same in one pass with a copy: what is summed is what was copied, whoever writes to `data` meanwhile. */
void net_sum_copy(struct net_sum *sum, uint8_t *to, const void *data, size_t size);
/* A number that stands in a 16-bit field of the network. */
void net_sum_add16(struct net_sum *sum, uint16_t number);
/* 16 bits, not inverted; to be stored as they are. */
uint16_t net_sum_fold(const struct net_sum *sum);

#endif
