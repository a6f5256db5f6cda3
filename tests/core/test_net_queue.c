/* Frames that wait, and how much of the process's memory they may have. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "net_fake.h"

enum { STEP = NET_ROOM_STEP };

TEST(a_room_takes_its_share_by_steps_and_has_the_first_in_any_case)
{
    struct aiokvm_budget *budget = aiokvm_budget_new(10 * STEP);
    struct aiokvm_share share;
    struct net_room room;
    aiokvm_share_open(&share, budget);
    net_room_init(&room, &share);
    CHECK_EQ(share.used, STEP);
    CHECK(net_room_take(&room, STEP));
    CHECK_EQ(share.used, STEP);
    CHECK(net_room_take(&room, 1));
    CHECK_EQ(share.used, 2 * STEP);
    CHECK(net_room_take(&room, STEP));
    CHECK_EQ(share.used, 3 * STEP);
    /* A third of the whole is what one may have. */
    CHECK(!net_room_take(&room, STEP));
    CHECK_EQ(room.used, 2 * STEP + 1);
    /* A step beyond what is used is kept: frames that come and go need no lock. */
    net_room_give(&room, STEP);
    CHECK_EQ(share.used, 3 * STEP);
    CHECK(net_room_take(&room, STEP - 1));
    net_room_give(&room, STEP - 1);
    CHECK_EQ(share.used, 3 * STEP);
    net_room_give(&room, STEP + 1);
    CHECK_EQ(share.used, STEP);
    aiokvm_share_close(&share);
    aiokvm_budget_free(budget);
}

TEST(a_queue_has_room_for_the_longest_frame_though_others_have_all)
{
    struct aiokvm_budget *budget = aiokvm_budget_new(10 * STEP);
    struct aiokvm_share shares[2];
    struct net_queue queues[2];
    for (int i = 0; i < 2; i++)
        aiokvm_share_open(&shares[i], budget);
    aiokvm_share_add(&shares[0], 10 * STEP);
    net_queue_init(&queues[0], 1000, 1 << 30, &shares[0]);
    net_queue_init(&queues[1], 1000, 1 << 30, &shares[1]);
    uint8_t *data = calloc(1, AIOKVM_NET_MAX_FRAME);
    struct iovec iov[2] = { [1] = { data, AIOKVM_NET_MAX_FRAME } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = AIOKVM_NET_MAX_FRAME };
    for (int i = 0; i < 2; i++) {
        CHECK(net_queue_put(&queues[i], &frame));
        CHECK(!net_queue_put(&queues[i], &frame));
    }
    aiokvm_share_give(&shares[0], 10 * STEP);
    CHECK(net_queue_put(&queues[1], &frame));
    for (int i = 0; i < 2; i++) {
        net_queue_clear(&queues[i]);
        CHECK_EQ(shares[i].used, STEP);
        aiokvm_share_close(&shares[i]);
    }
    free(data);
    aiokvm_budget_free(budget);
}

TEST(a_queue_that_is_flooded_leaves_what_others_need)
{
    struct aiokvm_budget *budget = aiokvm_budget_new(100 * STEP);
    struct aiokvm_share shares[2];
    struct net_queue queues[2];
    static const uint8_t DATA[1000];
    struct iovec iov[2] = { [1] = { (void *)(uintptr_t)DATA, sizeof(DATA) } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = sizeof(DATA) };
    for (int i = 0; i < 2; i++) {
        aiokvm_share_open(&shares[i], budget);
        net_queue_init(&queues[i], 100000, 1 << 30, &shares[i]);
        while (net_queue_put(&queues[i], &frame))
            continue;
    }
    CHECK(shares[0].used >= 32 * STEP && shares[0].used <= 34 * STEP);
    CHECK(shares[1].used >= 20 * STEP);
    for (int i = 0; i < 2; i++) {
        net_queue_clear(&queues[i]);
        aiokvm_share_close(&shares[i]);
    }
    aiokvm_budget_free(budget);
}
