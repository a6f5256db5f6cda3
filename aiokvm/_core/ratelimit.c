#include "ratelimit.h"

#include <pthread.h>
#include <stdlib.h>

#define SECOND_NS UINT64_C(1000000000)

/* Kept as a time: paid_ns is when all that was taken is paid for. The tokens there are at now_ns are what the
 * rate has given since then, at most a burst. */
struct bucket {
    uint64_t rate; /* per second; 0: no limit */
    uint64_t burst_ns;
    uint64_t paid_ns;
};

struct aiokvm_ratelimit {
    pthread_mutex_t lock; /* of the buckets */
    struct bucket bytes, operations;
};

static uint64_t cost_ns(const struct bucket *bucket, uint64_t tokens)
{
    return (uint64_t)((unsigned __int128)tokens * SECOND_NS / bucket->rate);
}

static void init(struct bucket *bucket, uint64_t rate, uint64_t burst)
{
    bucket->rate = rate;
    bucket->burst_ns = rate ? cost_ns(bucket, burst) : 0;
}

/* How long until there is a token; 0: now. */
static uint64_t wait_ns(struct bucket *bucket, uint64_t now_ns)
{
    if (!bucket->rate)
        return 0;
    uint64_t full_ns = now_ns > bucket->burst_ns ? now_ns - bucket->burst_ns : 0;
    if (bucket->paid_ns < full_ns)
        bucket->paid_ns = full_ns;
    return bucket->paid_ns > now_ns ? bucket->paid_ns - now_ns : 0;
}

static void take(struct bucket *bucket, uint64_t tokens)
{
    if (bucket->rate)
        bucket->paid_ns += cost_ns(bucket, tokens);
}

struct aiokvm_ratelimit *aiokvm_ratelimit_new(uint64_t bytes_per_second, uint64_t burst_bytes,
                                              uint64_t operations_per_second, uint64_t burst_operations)
{
    struct aiokvm_ratelimit *limit = calloc(1, sizeof(*limit));
    if (!limit)
        return NULL;
    pthread_mutex_init(&limit->lock, NULL);
    init(&limit->bytes, bytes_per_second, burst_bytes);
    init(&limit->operations, operations_per_second, burst_operations);
    return limit;
}

void aiokvm_ratelimit_free(struct aiokvm_ratelimit *limit)
{
    pthread_mutex_destroy(&limit->lock);
    free(limit);
}

uint64_t aiokvm_ratelimit_take(struct aiokvm_ratelimit *limit, uint64_t now_ns, uint64_t bytes,
                               uint64_t operations)
{
    pthread_mutex_lock(&limit->lock);
    uint64_t wait = wait_ns(&limit->bytes, now_ns);
    uint64_t other = wait_ns(&limit->operations, now_ns);
    if (wait < other)
        wait = other;
    if (!wait) {
        take(&limit->bytes, bytes);
        take(&limit->operations, operations);
    }
    pthread_mutex_unlock(&limit->lock);
    return wait;
}
