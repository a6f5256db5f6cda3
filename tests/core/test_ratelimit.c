/* ratelimit.c: token buckets. */
#include "check.h"
#include "ratelimit.h"

static const uint64_t second = 1000000000;

TEST(no_limit_lets_all_through)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 0, 0);
    for (int i = 0; i < 1000; i++)
        CHECK_EQ(aiokvm_ratelimit_take(limit, 5, UINT64_C(1) << 33, 1), 0);
    aiokvm_ratelimit_free(limit);
}

TEST(operations_come_at_their_rate)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 10, 0);
    uint64_t now = second;
    for (int i = 0; i < 5; i++, now += second / 10) {
        CHECK_EQ(aiokvm_ratelimit_take(limit, now, 4096, 1), 0);
        CHECK_EQ(aiokvm_ratelimit_take(limit, now, 4096, 1), second / 10);
    }
    aiokvm_ratelimit_free(limit);
}

TEST(an_idle_bucket_lets_a_burst_through_and_no_more)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 10, 4);
    for (uint64_t now = 100 * second; now < 200 * second; now += 50 * second) {
        int count = 0;
        while (!aiokvm_ratelimit_take(limit, now, 0, 1))
            count++;
        CHECK_EQ(count, 5); /* the burst, and the one that is due */
    }
    aiokvm_ratelimit_free(limit);
}

TEST(a_request_larger_than_the_burst_passes_and_is_paid_for)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(1000, 100, 0, 0);
    CHECK_EQ(aiokvm_ratelimit_take(limit, 10 * second, 2100, 1), 0);
    CHECK_EQ(aiokvm_ratelimit_take(limit, 10 * second, 1, 1), 2 * second);
    CHECK_EQ(aiokvm_ratelimit_take(limit, 12 * second, 1, 1), 0);
    aiokvm_ratelimit_free(limit);
}

TEST(what_waits_takes_nothing_from_either_bucket)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(1000, 0, 1, 0);
    CHECK_EQ(aiokvm_ratelimit_take(limit, 10 * second, 1, 1), 0);
    for (int i = 0; i < 100; i++)
        CHECK_EQ(aiokvm_ratelimit_take(limit, 10 * second, 1000, 1), second);
    CHECK_EQ(aiokvm_ratelimit_take(limit, 11 * second, 1000, 1), 0);
    aiokvm_ratelimit_free(limit);
}

TEST(large_numbers_do_not_wrap)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(1, UINT64_C(1) << 34, 0, 0);
    CHECK_EQ(aiokvm_ratelimit_take(limit, 1, UINT64_C(1) << 34, 1), 0);
    CHECK(aiokvm_ratelimit_take(limit, 1, 1, 1) > 1000 * second);
    aiokvm_ratelimit_free(limit);
}
