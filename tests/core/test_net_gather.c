/* When the loop is woken for each frame, and when frames gather. */
#include <poll.h>

#include "check.h"
#include "nic_driver.h"

enum { MS = 1000000 };

/* ---- what decides ---- */

static void wakes(struct net_gather *gather, uint64_t *now_ns, uint32_t count, uint64_t apart_ns, uint32_t batch)
{
    for (; count; count--) {
        *now_ns += apart_ns;
        const struct net_turn turn = { .batch = batch, .work = (uint64_t)batch << 10, .took_ns = MS / 8 };
        net_gather_next(gather, *now_ns, &turn);
    }
}

TEST(wakes_that_are_close_together_may_be_a_flow)
{
    struct net_gather gather = { 0 };
    uint64_t now_ns = 1;
    wakes(&gather, &now_ns, 1000, 5 * MS, 1);
    CHECK(!gather.is_on);
    wakes(&gather, &now_ns, 1000, MS / 10, 0);
    CHECK(!gather.is_on);
    wakes(&gather, &now_ns, 16, MS / 10, 1);
    CHECK(gather.is_on);
    gather = (struct net_gather){ 0 };
    /* Who waits for a CPU may find many. */
    wakes(&gather, &now_ns, 1000, 2 * MS, 3);
    CHECK(!gather.is_on);
    wakes(&gather, &now_ns, 16, 2 * MS, 4);
    CHECK(gather.is_on);
}

TEST(a_flow_gathers_for_as_long_as_it_lasts)
{
    struct net_gather gather = { 0 };
    uint64_t now_ns = 1;
    wakes(&gather, &now_ns, 17, MS / 10, 1);
    uint32_t first = gather.period_ns;
    wakes(&gather, &now_ns, 100, MS, 4);
    CHECK(gather.is_on && gather.period_ns > first);
    /* Eight times as long as a turn takes is enough. */
    CHECK_EQ(gather.period_ns, MS);
    wakes(&gather, &now_ns, 100, MS, 250);
    CHECK(gather.is_on && gather.period_ns < first);
    /* Its sender may wait for a CPU meanwhile. */
    wakes(&gather, &now_ns, 3, MS, 0);
    CHECK(gather.is_on);
    wakes(&gather, &now_ns, 1, MS, 0);
    CHECK(!gather.is_on);
}

TEST(who_waits_for_each_answer_is_soon_left_alone)
{
    struct net_gather gather = { 0 };
    uint64_t now_ns = 1;
    uint32_t gathered = 0;
    for (uint32_t i = 0; i < 10000; i++) {
        wakes(&gather, &now_ns, 1, MS / 10, 1 + i % 2);
        gathered += gather.is_on;
    }
    CHECK(gathered > 0 && gathered < 150);
}

/* ---- what follows ---- */

static void wait_and_serve(struct nic_rig *rig)
{
    struct pollfd door = { .fd = aiokvm_net_fd(rig->net), .events = POLLIN };
    CHECK_EQ(poll(&door, 1, PATIENCE_S * 1000), 1);
    fake_end_serve(rig->net);
}

static void send_until_gathering(struct nic_rig *rig)
{
    uint64_t deadline_ns = now_ns() + PATIENCE_S * UINT64_C(1000000000);
    while (!rig->net->gather.is_on && now_ns() < deadline_ns) {
        for (uint32_t i = 0; i < 2; i++)
            CHECK(nic_driver_send(&rig->nic, 0, i, NULL, NIC_FRAME, 60) >= 0);
        nic_driver_kick(&rig->nic, 1, true);
        fake_end_serve(rig->net);
        CHECK_EQ(nic_rig_taken(rig, 1), 2);
        fake_end_clear(rig->peer);
    }
    CHECK(rig->net->gather.is_on);
}

static void wait_until_not_gathering(struct nic_rig *rig)
{
    for (int i = 0; i < 1000 && rig->net->gather.is_on; i++)
        wait_and_serve(rig);
    CHECK(!rig->net->gather.is_on);
}

TEST(a_driver_need_not_notify_while_frames_gather)
{
    const uint64_t layouts[] = { 0, EVENT, PACKED, PACKED | EVENT };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct nic_rig rig;
        nic_rig_open(&rig, layouts[layout], 64, 1);
        send_until_gathering(&rig);
        /* The first notification is that of before. */
        CHECK(nic_driver_send(&rig.nic, 0, 0, NULL, NIC_FRAME, 60) >= 0);
        nic_driver_kick(&rig.nic, 1, false);
        wait_and_serve(&rig);
        CHECK_EQ(rig.peer->received, 1);
        CHECK(rig.net->gather.is_on);
        CHECK(nic_driver_send(&rig.nic, 0, 1, NULL, NIC_FRAME, 60) >= 0);
        CHECK(!nic_driver_kick(&rig.nic, 1, false));
        wait_and_serve(&rig);
        CHECK_EQ(rig.peer->received, 2);
        wait_until_not_gathering(&rig);
        CHECK(nic_driver_send(&rig.nic, 0, 2, NULL, NIC_FRAME, 60) >= 0);
        CHECK(nic_driver_kick(&rig.nic, 1, false));
        wait_and_serve(&rig);
        CHECK_EQ(rig.peer->received, 3);
        nic_rig_close(&rig);
    }
}

TEST(who_waits_for_buffers_goes_on_though_nobody_notifies)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 64, 1);
    send_until_gathering(&rig);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 60), NET_BLOCKED);
    CHECK(nic_driver_give(&rig.nic, 0, 40, 2048, 1) >= 0);
    CHECK(!nic_driver_kick(&rig.nic, 0, false));
    wait_and_serve(&rig);
    CHECK(rig.peer->resumed);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 60), NET_TAKEN);
    /* Without buffers when it is over: the driver is to notify. */
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 60), NET_BLOCKED);
    wait_until_not_gathering(&rig);
    rig.peer->resumed = false;
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 60), NET_BLOCKED);
    CHECK(nic_driver_give(&rig.nic, 0, 41, 2048, 1) >= 0);
    CHECK(nic_driver_kick(&rig.nic, 0, false));
    wait_and_serve(&rig);
    CHECK(rig.peer->resumed);
    nic_rig_close(&rig);
}

TEST(an_end_goes_while_it_is_to_be_served_later)
{
    struct nic_rig rig;
    nic_rig_open(&rig, EVENT, 64, 1);
    send_until_gathering(&rig);
    CHECK(nic_driver_send(&rig.nic, 0, 0, NULL, NIC_FRAME, 60) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    wait_and_serve(&rig);
    CHECK(rig.net->later == rig.nic.end || !rig.net->gather.is_on);
    nic_driver_detach(&rig.nic);
    aiokvm_net_end_free(rig.nic.end);
    CHECK(!rig.net->later);
    fake_end_serve(rig.net);
    aiokvm_net_free(rig.net);
    nic_driver_close(&rig.nic);
}
