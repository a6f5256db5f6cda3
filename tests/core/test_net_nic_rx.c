/* What the adapter receives, against a driver in memory. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "nic_driver.h"

/* ---- reception ---- */

TEST(a_frame_goes_into_one_buffer)
{
    const uint64_t layouts[] = { 0, EVENT, PACKED, F_MRG, F_MRG | PACKED | EVENT, F_MRG | IN_ORDER };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct nic_rig rig;
        nic_rig_open(&rig, layouts[layout], 64, 1);
        for (uint32_t i = 0; i < 5; i++)
            CHECK(nic_driver_give(&rig.nic, 0, i, 1526, 1 + i) >= 0);
        CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 1514), NET_TAKEN);
        CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 60), NET_TAKEN);
        uint32_t id, written;
        CHECK(driver_take(&rig.nic.queues[0].driver, &id, &written));
        CHECK_EQ(written, 1526);
        CHECK(driver_take(&rig.nic.queues[0].driver, &id, &written));
        CHECK_EQ(written, 72);
        struct virtio_net_hdr_v1 hdr;
        memcpy(&hdr, nic_driver_at(&rig.nic, 0), sizeof(hdr));
        CHECK_EQ(hdr.num_buffers, 1);
        CHECK_EQ(hdr.flags, 0);
        CHECK(!memcmp(nic_driver_at(&rig.nic, 0) + 12, NIC_FRAME, 1514));
        CHECK(!memcmp(nic_driver_at(&rig.nic, 1) + 12, NIC_FRAME, 60));
        nic_rig_close(&rig);
    }
}

TEST(a_frame_is_merged_from_as_many_buffers_as_it_takes)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG | F_GUEST_CSUM | F_GUEST_TSO4 | EVENT, 64, 1);
    struct virtio_net_hdr_v1 hdr = { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 1448,
                                     .hdr_len = 54, .num_buffers = 77 };
    const uint32_t size = 65000;
    for (uint32_t i = 0; i < 20; i++)
        CHECK(nic_driver_give(&rig.nic, 0, i, 4096, 1 + i % 3) >= 0);
    CHECK_EQ(fake_end_send(rig.peer, &hdr, NIC_FRAME, size), NET_TAKEN);
    uint8_t whole[70000];
    uint32_t id, written, count = 0, bytes = 0;
    while (driver_take(&rig.nic.queues[0].driver, &id, &written)) {
        memcpy(whole + bytes, nic_driver_at(&rig.nic, count), written);
        bytes += written;
        count++;
    }
    CHECK_EQ(count, 16);
    CHECK_EQ(bytes, size + 12);
    CHECK(!memcmp(whole + 12, NIC_FRAME, size));
    struct virtio_net_hdr_v1 seen;
    memcpy(&seen, whole, sizeof(seen));
    CHECK_EQ(seen.num_buffers, 16);
    CHECK_EQ(seen.gso_size, 1448);
    CHECK_EQ(seen.flags, 1);
    CHECK_EQ(seen.hdr_len, 54);
    nic_rig_close(&rig);
}

TEST(without_enough_buffers_the_peer_waits_for_them)
{
    const uint64_t layouts[] = { F_MRG, F_MRG | EVENT, F_MRG | PACKED | EVENT };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct nic_rig rig;
        nic_rig_open(&rig, layouts[layout], 64, 1);
        CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 5000), NET_BLOCKED);
        for (uint32_t i = 0; i < 3; i++) {
            CHECK(!rig.peer->resumed);
            nic_driver_give(&rig.nic, 0, i, 2000, 1);
            CHECK(nic_driver_kick(&rig.nic, 0, false));
            fake_end_serve(rig.net);
            CHECK(rig.peer->resumed);
            rig.peer->resumed = false;
            CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 5000), i < 2 ? NET_BLOCKED : NET_TAKEN);
        }
        CHECK_EQ(nic_rig_taken(&rig, 0), 3);
        CHECK_EQ(nic_rig_stats(&rig).received_frames, 1);
        /* While there are buffers, nobody has to be told of more. */
        for (uint32_t i = 0; i < 20; i++)
            nic_driver_give(&rig.nic, 0, i, 2000, 1);
        nic_driver_kick(&rig.nic, 0, false);
        fake_end_serve(rig.net);
        for (uint32_t i = 0; i < 10; i++) {
            CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 1000), NET_TAKEN);
            CHECK_EQ(nic_rig_taken(&rig, 0), 1);
            nic_driver_give(&rig.nic, 0, i, 2000, 1);
            CHECK(!nic_driver_kick(&rig.nic, 0, false));
        }
        nic_rig_close(&rig);
    }
}

TEST(buffers_that_were_too_few_are_used_for_the_next)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 64, 1);
    for (uint32_t i = 0; i < 3; i++)
        nic_driver_give(&rig.nic, 0, i, 1000, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 3000), NET_BLOCKED);
    for (uint32_t i = 0; i < 3; i++)
        CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 200 + i), NET_TAKEN);
    uint32_t id, written;
    for (uint32_t i = 0; i < 3; i++) {
        CHECK(driver_take(&rig.nic.queues[0].driver, &id, &written));
        CHECK_EQ(written, 212 + i);
    }
    nic_rig_close(&rig);
}

TEST(what_can_never_be_received_is_dropped)
{
    struct nic_rig rig;
    /* No merging, and a buffer that is too small: it is there for the next. */
    nic_rig_open(&rig, 0, 64, 1);
    nic_driver_give(&rig.nic, 0, 0, 500, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 1514), NET_TAKEN);
    CHECK_EQ(nic_rig_stats(&rig).dropped_full, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 488), NET_TAKEN);
    CHECK_EQ(nic_rig_taken(&rig, 0), 1);
    nic_rig_close(&rig);
    /* All buffers that fit into the queue are less than the frame. */
    nic_rig_open(&rig, F_MRG, 8, 1);
    for (uint32_t i = 0; i < 8; i++)
        nic_driver_give(&rig.nic, 0, i, 1526, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 60000), NET_TAKEN);
    CHECK_EQ(nic_rig_stats(&rig).dropped_full, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 8 * 1526 - 12), NET_TAKEN);
    CHECK_EQ(nic_rig_taken(&rig, 0), 8);
    /* No driver. */
    nic_driver_detach(&rig.nic);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 100), NET_TAKEN);
    CHECK_EQ(nic_rig_stats(&rig).dropped_full, 2);
    nic_rig_close(&rig);
}

TEST(a_receive_buffer_that_is_too_small_or_to_be_read_breaks_the_adapter)
{
    for (int which = 0; which < 3; which++) {
        struct nic_rig rig;
        nic_rig_open(&rig, F_MRG, 64, 1);
        uint64_t gpa = nic_driver_gpa(0);
        struct driver_buffer buffers[] = { { gpa, which == 1 ? 2000 : 1, which == 0 }, { gpa, 2000, true } };
        if (which == 0)
            buffers[0].len = 11;
        driver_add(&rig.nic.queues[0].driver, buffers, which == 2 ? 2 : 1, 0);
        CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 100), NET_TAKEN);
        nic_rig_check_broken(&rig, AIOKVM_NET_NIC_EHEADER, 0);
        /* A reset makes it whole. */
        nic_driver_detach(&rig.nic);
        CHECK_EQ(aiokvm_net_nic_set_features(rig.nic.end, 0, 0), 0);
        nic_rig_close(&rig);
    }
}

TEST(who_waits_for_buffers_is_let_go_when_the_queue_is_taken_away)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 64, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 100), NET_BLOCKED);
    nic_driver_detach(&rig.nic);
    CHECK(rig.peer->resumed);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 100), NET_TAKEN);
    nic_rig_close(&rig);
}

TEST(the_filter_lets_through_what_the_driver_asked_for)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 64, 1);
    for (uint32_t i = 0; i < 20; i++)
        nic_driver_give(&rig.nic, 0, i, 2000, 1);
    struct aiokvm_net_nic_filter filter = {
        .flags = AIOKVM_NET_NIC_MAC_FILTER | AIOKVM_NET_NIC_VLAN_FILTER,
        .macs = 2, .mac = { { 0x52, 0x54, 0, 0, 0, 1 }, { 1, 0, 0x5e, 0, 0, 1 } },
        .vlans = { [3] = 1u << 4 },
    };
    static const struct {
        uint8_t to[6];
        int vlan;
        uint32_t more;
        bool passes;
    } CASES[] = {
        { { 0x52, 0x54, 0, 0, 0, 1 }, -1, 0, true },
        { { 0x52, 0x54, 0, 0, 0, 2 }, -1, 0, false },
        { { 0x52, 0x54, 0, 0, 0, 2 }, -1, AIOKVM_NET_NIC_ALLMULTI, false },
        { { 0x52, 0x54, 0, 0, 0, 2 }, -1, AIOKVM_NET_NIC_ALLUNI, true },
        { { 255, 255, 255, 255, 255, 255 }, -1, 0, true },
        { { 1, 0, 0x5e, 0, 0, 1 }, -1, 0, true },
        { { 1, 0, 0x5e, 0, 0, 2 }, -1, 0, false },
        { { 1, 0, 0x5e, 0, 0, 2 }, -1, AIOKVM_NET_NIC_ALLMULTI, true },
        { { 0x52, 0x54, 0, 0, 0, 1 }, 100, 0, true },
        { { 0x52, 0x54, 0, 0, 0, 1 }, 101, 0, false },
        { { 0x52, 0x54, 0, 0, 0, 2 }, 100, 0, false },
        { { 0x52, 0x54, 0, 0, 0, 2 }, 4095, AIOKVM_NET_NIC_ALLUNI, false },
    };
    for (size_t i = 0; i < LENGTH(CASES); i++) {
        uint8_t data[64] = { 0 };
        memcpy(data, CASES[i].to, 6);
        if (CASES[i].vlan >= 0) {
            data[12] = 0x81;
            data[14] = (uint8_t)(0xe0 | CASES[i].vlan >> 8); /* a priority, too */
            data[15] = (uint8_t)CASES[i].vlan;
        }
        filter.flags = AIOKVM_NET_NIC_MAC_FILTER | AIOKVM_NET_NIC_VLAN_FILTER | CASES[i].more;
        CHECK_EQ(aiokvm_net_nic_set_filter(rig.nic.end, &filter), 0);
        CHECK_EQ(fake_end_send(rig.peer, NULL, data, sizeof(data)), NET_TAKEN);
        if (nic_rig_taken(&rig, 0) != CASES[i].passes)
            check_failed(__FILE__, __LINE__, "case %zu", i);
    }
    CHECK_EQ(nic_rig_stats(&rig).dropped_filtered, 6);
    filter.macs = AIOKVM_NET_NIC_MACS + 1;
    CHECK_EQ(aiokvm_net_nic_set_filter(rig.nic.end, &filter), -EINVAL);
    nic_rig_close(&rig);
}

TEST(no_frame_is_longer_than_the_mtu_that_the_driver_was_told)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 64, 1);
    const uint64_t features = F_MRG | F_GUEST_CSUM | F_GUEST_TSO4 | 1 << VIRTIO_NET_F_MTU;
    CHECK_EQ(aiokvm_net_nic_set_features(rig.nic.end, features, 1000), 0);
    for (uint32_t i = 0; i < 20; i++)
        nic_driver_give(&rig.nic, 0, i, 2000, 1);
    struct virtio_net_hdr_v1 segments = { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 0x81,
                                          .gso_size = 900 };
    static const struct {
        uint32_t size;
        int tags;
        bool segmented, passes;
    } CASES[] = {
        { 1014, 0, false, true }, { 1015, 0, false, false }, { 1018, 1, false, true }, { 1019, 1, false, false },
        { 1022, 2, false, true }, { 1023, 2, false, false }, { 9000, 0, true, true },
    };
    uint64_t dropped = 0;
    rig.nic.end->offloads |= AIOKVM_NET_OFFLOAD_ECN;
    for (size_t i = 0; i < LENGTH(CASES); i++) {
        uint8_t data[9000];
        memcpy(data, NIC_FRAME, sizeof(data));
        for (int tag = 0; tag < CASES[i].tags; tag++)
            memcpy(data + 12 + 4 * tag, "\x81\x00\x00\x05\x08", 5);
        const struct virtio_net_hdr_v1 *hdr = CASES[i].segmented ? &segments : NULL;
        CHECK_EQ(fake_end_send(rig.peer, hdr, data, CASES[i].size), NET_TAKEN);
        if ((nic_rig_taken(&rig, 0) > 0) != CASES[i].passes)
            check_failed(__FILE__, __LINE__, "case %zu", i);
        dropped += !CASES[i].passes;
    }
    CHECK_EQ(nic_rig_stats(&rig).dropped_invalid, dropped);
    nic_rig_close(&rig);
}

/* ---- several queues ---- */

static void make_flow(uint8_t data[64], uint32_t one, uint32_t other, uint16_t port, uint16_t other_port)
{
    memset(data, 0, 64);
    data[12] = 8;
    data[14] = 0x45;
    data[23] = 6;
    memcpy(data + 26, &one, 4);
    memcpy(data + 30, &other, 4);
    memcpy(data + 34, &port, 2);
    memcpy(data + 36, &other_port, 2);
}

TEST(a_flow_is_received_by_the_queue_that_sends_it)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 64, 4);
    for (uint32_t pair = 0; pair < 4; pair++)
        for (uint32_t i = 0; i < 20; i++)
            nic_driver_give(&rig.nic, pair, 20 * pair + i, 2000, 1);
    for (uint32_t flow = 0; flow < 16; flow++) {
        uint32_t pair = flow * 7 % 4;
        uint8_t data[64];
        make_flow(data, 0x0a000001, 0x0a000002 + flow, 80, (uint16_t)(1000 + flow));
        nic_driver_send(&rig.nic, pair, 90, NULL, data, sizeof(data));
        nic_driver_kick(&rig.nic, 2 * pair + 1, true);
        fake_end_serve(rig.net);
        CHECK_EQ(rig.peer->frames[rig.peer->kept - 1].queue, pair);
        make_flow(data, 0x0a000002 + flow, 0x0a000001, (uint16_t)(1000 + flow), 80);
        CHECK_EQ(fake_end_send(rig.peer, NULL, data, sizeof(data)), NET_TAKEN);
        CHECK_EQ(nic_rig_taken(&rig, 2 * pair), 1);
    }
    /* With one pair all goes there, whatever was. */
    CHECK_EQ(aiokvm_net_nic_set_pairs(rig.nic.end, 1), 0);
    for (uint32_t flow = 0; flow < 4; flow++) {
        uint8_t data[64];
        make_flow(data, 0x0a000002 + flow, 0x0a000001, (uint16_t)(1000 + flow), 80);
        CHECK_EQ(fake_end_send(rig.peer, NULL, data, sizeof(data)), NET_TAKEN);
    }
    CHECK_EQ(nic_rig_taken(&rig, 0), 4);
    CHECK_EQ(aiokvm_net_nic_set_pairs(rig.nic.end, 0), -EINVAL);
    CHECK_EQ(aiokvm_net_nic_set_pairs(rig.nic.end, AIOKVM_NET_NIC_PAIRS + 1), -EINVAL);
    nic_rig_close(&rig);
}

TEST(headers_that_lie_do_not_mislead_the_steering)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 64, 4);
    for (uint32_t pair = 0; pair < 4; pair++)
        for (uint32_t i = 0; i < 20; i++)
            nic_driver_give(&rig.nic, pair, 20 * pair + i, 2000, 1);
    uint64_t state = 1;
    for (uint32_t i = 0; i < 2000; i++) {
        uint8_t data[80];
        for (size_t j = 0; j < sizeof(data); j++)
            data[j] = (uint8_t)random_below(&state, 256);
        static const uint8_t TYPES[][2] = { { 8, 0 }, { 0x81, 0 }, { 0x88, 0xa8 }, { 0x86, 0xdd } };
        memcpy(data + 12, TYPES[random_below(&state, 4)], 2);
        memcpy(data + 16, TYPES[random_below(&state, 4)], 2);
        CHECK_EQ(fake_end_send(rig.peer, NULL, data, 14 + random_below(&state, 66)), NET_TAKEN);
        uint32_t count = 0;
        for (uint32_t pair = 0; pair < 4; pair++) {
            uint32_t got = nic_rig_taken(&rig, 2 * pair);
            count += got;
            for (; got; got--)
                nic_driver_give(&rig.nic, pair, 20 * pair, 2000, 1);
        }
        CHECK_EQ(count, 1);
    }
    nic_rig_close(&rig);
}
