/* The adapter against a driver in memory, with an end that records as its peer. */
#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "nic_driver.h"
#include "vring.h"

enum { F_CSUM = 1 << 0, F_GUEST_CSUM = 1 << 1, F_GUEST_TSO4 = 1 << 7, F_HOST_TSO4 = 1 << 11, F_MRG = 1 << 15 };
static const uint64_t EVENT = AIOKVM_VIRTIO_F_EVENT_IDX, PACKED = AIOKVM_VIRTIO_F_RING_PACKED;
static const uint64_t IN_ORDER = AIOKVM_VIRTIO_F_IN_ORDER;

static uint8_t frame_data[70000];

__attribute__((constructor)) static void make_data(void)
{
    for (size_t i = 0; i < sizeof(frame_data); i++)
        frame_data[i] = (uint8_t)(i * 7 + i / 251);
    memcpy(frame_data, "\x52\x54\x00\x00\x00\x01\x52\x54\x00\x00\x00\x02\x08\x00\x45\x00", 16);
    frame_data[34 + 12] = 0x50;
}

struct rig {
    struct aiokvm_net *net;
    struct nic_driver nic;
    struct fake_end *peer;
};

static void open_rig(struct rig *rig, uint64_t features, uint32_t size, uint32_t pairs)
{
    int error = 0;
    rig->net = aiokvm_net_new(NULL, &error);
    CHECK(rig->net);
    nic_driver_open(&rig->nic, rig->net, features, size, pairs);
    rig->peer = fake_end_new(rig->net, 31);
    CHECK_EQ(aiokvm_net_link(rig->nic.end, &rig->peer->end), 0);
    fake_end_serve(rig->net);
}

static void close_rig(struct rig *rig)
{
    aiokvm_net_free(rig->net);
    nic_driver_close(&rig->nic);
}

static struct aiokvm_net_stats stats(struct rig *rig)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(rig->nic.end, &stats);
    return stats;
}

static uint32_t taken(struct rig *rig, uint32_t queue)
{
    uint32_t id, written, count = 0;
    while (driver_take(&rig->nic.queues[queue].driver, &id, &written))
        count++;
    return count;
}

static void check_broken(struct rig *rig, int error, uint32_t queue)
{
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(rig->net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(rig->nic.end));
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_BROKEN);
    CHECK_EQ(news.error, error);
    CHECK_EQ(news.detail, queue);
    CHECK_EQ(aiokvm_net_take(rig->net, &news), 0);
}

/* ---- transmission ---- */

TEST(what_the_driver_sends_reaches_the_peer_in_one_batch)
{
    const uint64_t layouts[] = { 0, EVENT, PACKED, PACKED | EVENT, IN_ORDER | EVENT };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct rig rig;
        open_rig(&rig, layouts[layout], 64, 1);
        for (uint32_t round = 0; round < 10; round++) {
            for (uint32_t i = 0; i < 20; i++)
                CHECK(nic_driver_send(&rig.nic, 0, i, NULL, frame_data, 60 + i * 77) >= 0);
            CHECK(!driver_enable_interrupt(&rig.nic.queues[1].driver));
            nic_driver_kick(&rig.nic, 1, round == 0);
            nic_driver_interrupts(&rig.nic);
            fake_end_serve(rig.net);
            CHECK_EQ(rig.peer->received, 20);
            for (uint32_t i = 0; i < 20; i++) {
                CHECK_EQ(rig.peer->frames[i].size, 60 + i * 77);
                CHECK(!memcmp(rig.peer->frames[i].data, frame_data, 60 + i * 77));
            }
            CHECK_EQ(nic_driver_interrupts(&rig.nic), 1);
            CHECK_EQ(taken(&rig, 1), 20);
            fake_end_clear(rig.peer);
        }
        CHECK_EQ(stats(&rig).interrupts, 10);
        CHECK_EQ(stats(&rig).sent_frames, 200);
        close_rig(&rig);
    }
}

TEST(a_header_over_several_descriptors_is_read)
{
    struct rig rig;
    open_rig(&rig, 0, 64, 1);
    uint64_t gpa = nic_driver_gpa(0);
    memset(nic_driver_at(&rig.nic, 0), 0, 12);
    memcpy(nic_driver_at(&rig.nic, 0) + 12, frame_data, 300);
    struct driver_buffer buffers[] = { { gpa, 5, false }, { gpa + 5, 1, false }, { gpa + 6, 20, false },
                                       { gpa + 26, 286, false } };
    CHECK(driver_add(&rig.nic.queues[1].driver, buffers, LENGTH(buffers), 0) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 1);
    CHECK(!memcmp(rig.peer->frames[0].data, frame_data, 300));
    close_rig(&rig);
}

TEST(chains_that_are_no_frames_are_dropped_and_completed)
{
    struct rig rig;
    open_rig(&rig, F_CSUM | F_HOST_TSO4, 64, 1);
    uint64_t gpa = nic_driver_gpa(0);
    struct driver *driver = &rig.nic.queues[1].driver;
    memset(nic_driver_at(&rig.nic, 0), 0, 12);
    /* Shorter than the header, no more than it, not a frame, longer than the limit. */
    const uint32_t sizes[] = { 1, 11, 12, 25, 12 + AIOKVM_NET_MAX_FRAME + 1, 1 << 20 };
    for (size_t i = 0; i < LENGTH(sizes); i++) {
        struct driver_buffer buffer = { gpa, sizes[i], false };
        CHECK(driver_add(driver, &buffer, 1, 0) >= 0);
    }
    /* Something to write to; nothing at all. */
    struct driver_buffer both[] = { { gpa, 100, false }, { gpa + 100, 100, true } };
    CHECK(driver_add(driver, both, 2, 0) >= 0);
    CHECK(driver_add(driver, both + 1, 1, 0) >= 0);
    struct driver_buffer nothing = { gpa, 0, false };
    CHECK(driver_add(driver, &nothing, 1, 0) >= 0);
    /* Checksum or segments outside the frame. */
    const struct virtio_net_hdr_v1 headers[] = {
        { .flags = 1, .csum_start = 2000, .csum_offset = 16 },
        { .flags = 1, .csum_start = 0xffff, .csum_offset = 0xffff },
        { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 0 },
        { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 3, .gso_size = 100 },
        { .flags = 0, .gso_type = 1, .gso_size = 100 },
    };
    for (uint32_t i = 0; i < LENGTH(headers); i++)
        CHECK(nic_driver_send(&rig.nic, 0, 1 + i, &headers[i], frame_data, 1000) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 0);
    CHECK_EQ(stats(&rig).dropped_invalid, LENGTH(sizes) + 3 + LENGTH(headers));
    CHECK_EQ(taken(&rig, 1), LENGTH(sizes) + 3 + LENGTH(headers));
    close_rig(&rig);
}

TEST(offload_that_was_not_negotiated_is_not_sent)
{
    struct rig rig;
    open_rig(&rig, 0, 64, 1);
    /* Without CSUM the flags mean nothing, and there is no segmentation without them. */
    struct virtio_net_hdr_v1 csum = { .flags = 3, .csum_start = 34, .csum_offset = 16 };
    struct virtio_net_hdr_v1 gso = csum;
    gso.gso_type = 1;
    gso.gso_size = 500;
    nic_driver_send(&rig.nic, 0, 0, &csum, frame_data, 1000);
    nic_driver_send(&rig.nic, 0, 1, &gso, frame_data, 1000);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 1);
    CHECK_EQ(rig.peer->frames[0].hdr.flags, 0);
    CHECK_EQ(stats(&rig).dropped_invalid, 1);
    close_rig(&rig);
    open_rig(&rig, F_CSUM | F_HOST_TSO4, 64, 1);
    csum.flags = 0xff;
    nic_driver_send(&rig.nic, 0, 0, &csum, frame_data, 1000);
    nic_driver_send(&rig.nic, 0, 1, &gso, frame_data, 1000);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 2);
    CHECK_EQ(rig.peer->frames[0].hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
    CHECK_EQ(rig.peer->frames[1].hdr.gso_size, 500);
    close_rig(&rig);
}

TEST(what_the_peer_does_not_take_waits_in_its_queue)
{
    struct rig rig;
    open_rig(&rig, EVENT, 64, 1);
    rig.peer->blocks = true;
    for (uint32_t i = 0; i < 10; i++)
        nic_driver_send(&rig.nic, 0, i, NULL, frame_data, 100 + i);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 0);
    CHECK_EQ(taken(&rig, 1), 0);
    /* Kicks do not have it tried again. */
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 0);
    fake_end_unblock(rig.peer);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 10);
    for (uint32_t i = 0; i < 10; i++)
        CHECK_EQ(rig.peer->frames[i].size, 100 + i);
    CHECK_EQ(taken(&rig, 1), 10);
    /* A frame that waits when its queue is taken away is gone; the peer does not miss it. */
    rig.peer->blocks = true;
    nic_driver_send(&rig.nic, 0, 0, NULL, frame_data, 100);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    nic_driver_detach(&rig.nic);
    fake_end_unblock(rig.peer);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 10);
    close_rig(&rig);
}

TEST(one_serve_sends_a_quantum_and_no_more)
{
    struct rig rig;
    open_rig(&rig, 0, 256, 1);
    for (uint32_t i = 0; i < 100; i++)
        CHECK(nic_driver_send(&rig.nic, 0, i % 96, NULL, frame_data, 60) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    CHECK_EQ(aiokvm_net_serve(rig.net, 0), 1);
    CHECK_EQ(rig.peer->received, NET_QUANTUM);
    CHECK_EQ(taken(&rig, 1), NET_QUANTUM);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 100);
    close_rig(&rig);
}

TEST(a_ring_that_is_wrong_breaks_the_adapter_and_is_told_once)
{
    struct rig rig;
    open_rig(&rig, 0, 64, 1);
    struct driver *driver = &rig.nic.queues[1].driver;
    *(uint16_t *)(rig.nic.ram + driver->driver + 2) = 300;
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    check_broken(&rig, AIOKVM_VRING_EINDEX, 1);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(rig.net, &news), 0);
    /* Nothing is received any more either. */
    nic_driver_give(&rig.nic, 0, 0, 2000, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 100), NET_TAKEN);
    CHECK_EQ(taken(&rig, 0), 0);
    CHECK_EQ(stats(&rig).dropped_full, 1);
    close_rig(&rig);
}

/* ---- reception ---- */

TEST(a_frame_goes_into_one_buffer)
{
    const uint64_t layouts[] = { 0, EVENT, PACKED, F_MRG, F_MRG | PACKED | EVENT, F_MRG | IN_ORDER };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct rig rig;
        open_rig(&rig, layouts[layout], 64, 1);
        for (uint32_t i = 0; i < 5; i++)
            CHECK(nic_driver_give(&rig.nic, 0, i, 1526, 1 + i) >= 0);
        CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 1514), NET_TAKEN);
        CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 60), NET_TAKEN);
        uint32_t id, written;
        CHECK(driver_take(&rig.nic.queues[0].driver, &id, &written));
        CHECK_EQ(written, 1526);
        CHECK(driver_take(&rig.nic.queues[0].driver, &id, &written));
        CHECK_EQ(written, 72);
        struct virtio_net_hdr_v1 hdr;
        memcpy(&hdr, nic_driver_at(&rig.nic, 0), sizeof(hdr));
        CHECK_EQ(hdr.num_buffers, 1);
        CHECK_EQ(hdr.flags, 0);
        CHECK(!memcmp(nic_driver_at(&rig.nic, 0) + 12, frame_data, 1514));
        CHECK(!memcmp(nic_driver_at(&rig.nic, 1) + 12, frame_data, 60));
        close_rig(&rig);
    }
}

TEST(a_frame_is_merged_from_as_many_buffers_as_it_takes)
{
    struct rig rig;
    open_rig(&rig, F_MRG | F_GUEST_CSUM | F_GUEST_TSO4 | EVENT, 64, 1);
    struct virtio_net_hdr_v1 hdr = { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 1448,
                                     .hdr_len = 54, .num_buffers = 77 };
    const uint32_t size = 65000;
    for (uint32_t i = 0; i < 20; i++)
        CHECK(nic_driver_give(&rig.nic, 0, i, 4096, 1 + i % 3) >= 0);
    CHECK_EQ(fake_end_send(rig.peer, &hdr, frame_data, size), NET_TAKEN);
    uint8_t whole[70000];
    uint32_t id, written, count = 0, bytes = 0;
    while (driver_take(&rig.nic.queues[0].driver, &id, &written)) {
        memcpy(whole + bytes, nic_driver_at(&rig.nic, count), written);
        bytes += written;
        count++;
    }
    CHECK_EQ(count, 16);
    CHECK_EQ(bytes, size + 12);
    CHECK(!memcmp(whole + 12, frame_data, size));
    struct virtio_net_hdr_v1 seen;
    memcpy(&seen, whole, sizeof(seen));
    CHECK_EQ(seen.num_buffers, 16);
    CHECK_EQ(seen.gso_size, 1448);
    CHECK_EQ(seen.flags, 1);
    CHECK_EQ(seen.hdr_len, 54);
    close_rig(&rig);
}

TEST(without_enough_buffers_the_peer_waits_for_them)
{
    const uint64_t layouts[] = { F_MRG, F_MRG | EVENT, F_MRG | PACKED | EVENT };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct rig rig;
        open_rig(&rig, layouts[layout], 64, 1);
        CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 5000), NET_BLOCKED);
        for (uint32_t i = 0; i < 3; i++) {
            CHECK(!rig.peer->resumed);
            nic_driver_give(&rig.nic, 0, i, 2000, 1);
            CHECK(nic_driver_kick(&rig.nic, 0, false));
            fake_end_serve(rig.net);
            CHECK(rig.peer->resumed);
            rig.peer->resumed = false;
            CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 5000), i < 2 ? NET_BLOCKED : NET_TAKEN);
        }
        CHECK_EQ(taken(&rig, 0), 3);
        CHECK_EQ(stats(&rig).received_frames, 1);
        /* While there are buffers, nobody has to be told of more. */
        for (uint32_t i = 0; i < 20; i++)
            nic_driver_give(&rig.nic, 0, i, 2000, 1);
        nic_driver_kick(&rig.nic, 0, false);
        fake_end_serve(rig.net);
        for (uint32_t i = 0; i < 10; i++) {
            CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 1000), NET_TAKEN);
            CHECK_EQ(taken(&rig, 0), 1);
            nic_driver_give(&rig.nic, 0, i, 2000, 1);
            CHECK(!nic_driver_kick(&rig.nic, 0, false));
        }
        close_rig(&rig);
    }
}

TEST(buffers_that_were_too_few_are_used_for_the_next)
{
    struct rig rig;
    open_rig(&rig, F_MRG, 64, 1);
    for (uint32_t i = 0; i < 3; i++)
        nic_driver_give(&rig.nic, 0, i, 1000, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 3000), NET_BLOCKED);
    for (uint32_t i = 0; i < 3; i++)
        CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 200 + i), NET_TAKEN);
    uint32_t id, written;
    for (uint32_t i = 0; i < 3; i++) {
        CHECK(driver_take(&rig.nic.queues[0].driver, &id, &written));
        CHECK_EQ(written, 212 + i);
    }
    close_rig(&rig);
}

TEST(what_can_never_be_received_is_dropped)
{
    struct rig rig;
    /* No merging, and a buffer that is too small: it is there for the next. */
    open_rig(&rig, 0, 64, 1);
    nic_driver_give(&rig.nic, 0, 0, 500, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 1514), NET_TAKEN);
    CHECK_EQ(stats(&rig).dropped_full, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 488), NET_TAKEN);
    CHECK_EQ(taken(&rig, 0), 1);
    close_rig(&rig);
    /* All buffers that fit into the queue are less than the frame. */
    open_rig(&rig, F_MRG, 8, 1);
    for (uint32_t i = 0; i < 8; i++)
        nic_driver_give(&rig.nic, 0, i, 1526, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 60000), NET_TAKEN);
    CHECK_EQ(stats(&rig).dropped_full, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 8 * 1526 - 12), NET_TAKEN);
    CHECK_EQ(taken(&rig, 0), 8);
    /* No driver. */
    nic_driver_detach(&rig.nic);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 100), NET_TAKEN);
    CHECK_EQ(stats(&rig).dropped_full, 2);
    close_rig(&rig);
}

TEST(a_receive_buffer_that_is_too_small_or_to_be_read_breaks_the_adapter)
{
    for (int which = 0; which < 3; which++) {
        struct rig rig;
        open_rig(&rig, F_MRG, 64, 1);
        uint64_t gpa = nic_driver_gpa(0);
        struct driver_buffer buffers[] = { { gpa, which == 1 ? 2000 : 1, which == 0 }, { gpa, 2000, true } };
        if (which == 0)
            buffers[0].len = 11;
        driver_add(&rig.nic.queues[0].driver, buffers, which == 2 ? 2 : 1, 0);
        CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 100), NET_TAKEN);
        check_broken(&rig, AIOKVM_NET_NIC_EHEADER, 0);
        /* A reset makes it whole. */
        nic_driver_detach(&rig.nic);
        CHECK_EQ(aiokvm_net_nic_set_features(rig.nic.end, 0, 0), 0);
        close_rig(&rig);
    }
}

TEST(who_waits_for_buffers_is_let_go_when_the_queue_is_taken_away)
{
    struct rig rig;
    open_rig(&rig, F_MRG, 64, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 100), NET_BLOCKED);
    nic_driver_detach(&rig.nic);
    CHECK(rig.peer->resumed);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 100), NET_TAKEN);
    close_rig(&rig);
}

TEST(the_filter_lets_through_what_the_driver_asked_for)
{
    struct rig rig;
    open_rig(&rig, F_MRG, 64, 1);
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
        if (taken(&rig, 0) != CASES[i].passes)
            check_failed(__FILE__, __LINE__, "case %zu", i);
    }
    CHECK_EQ(stats(&rig).dropped_filtered, 6);
    filter.macs = AIOKVM_NET_NIC_MACS + 1;
    CHECK_EQ(aiokvm_net_nic_set_filter(rig.nic.end, &filter), -EINVAL);
    close_rig(&rig);
}

TEST(no_frame_is_longer_than_the_mtu_that_the_driver_was_told)
{
    struct rig rig;
    open_rig(&rig, 0, 64, 1);
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
        memcpy(data, frame_data, sizeof(data));
        for (int tag = 0; tag < CASES[i].tags; tag++)
            memcpy(data + 12 + 4 * tag, "\x81\x00\x00\x05\x08", 5);
        const struct virtio_net_hdr_v1 *hdr = CASES[i].segmented ? &segments : NULL;
        CHECK_EQ(fake_end_send(rig.peer, hdr, data, CASES[i].size), NET_TAKEN);
        if ((taken(&rig, 0) > 0) != CASES[i].passes)
            check_failed(__FILE__, __LINE__, "case %zu", i);
        dropped += !CASES[i].passes;
    }
    CHECK_EQ(stats(&rig).dropped_invalid, dropped);
    close_rig(&rig);
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
    struct rig rig;
    open_rig(&rig, F_MRG, 64, 4);
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
        CHECK_EQ(taken(&rig, 2 * pair), 1);
    }
    /* With one pair all goes there, whatever was. */
    CHECK_EQ(aiokvm_net_nic_set_pairs(rig.nic.end, 1), 0);
    for (uint32_t flow = 0; flow < 4; flow++) {
        uint8_t data[64];
        make_flow(data, 0x0a000002 + flow, 0x0a000001, (uint16_t)(1000 + flow), 80);
        CHECK_EQ(fake_end_send(rig.peer, NULL, data, sizeof(data)), NET_TAKEN);
    }
    CHECK_EQ(taken(&rig, 0), 4);
    CHECK_EQ(aiokvm_net_nic_set_pairs(rig.nic.end, 0), -EINVAL);
    CHECK_EQ(aiokvm_net_nic_set_pairs(rig.nic.end, AIOKVM_NET_NIC_PAIRS + 1), -EINVAL);
    close_rig(&rig);
}

TEST(headers_that_lie_do_not_mislead_the_steering)
{
    struct rig rig;
    open_rig(&rig, F_MRG, 64, 4);
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
            uint32_t got = taken(&rig, 2 * pair);
            count += got;
            for (; got; got--)
                nic_driver_give(&rig.nic, pair, 20 * pair, 2000, 1);
        }
        CHECK_EQ(count, 1);
    }
    close_rig(&rig);
}

/* ---- its life ---- */

TEST(an_adapter_moves_to_another_plane_with_all_that_waits)
{
    struct rig rig;
    open_rig(&rig, F_MRG | EVENT, 64, 2);
    nic_driver_give(&rig.nic, 0, 0, 1000, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 1500), NET_BLOCKED);
    rig.peer->blocks = true;
    nic_driver_send(&rig.nic, 0, 10, NULL, frame_data, 700);
    nic_driver_send(&rig.nic, 0, 11, NULL, frame_data, 701);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    int error = 0;
    struct aiokvm_net *other = aiokvm_net_new(NULL, &error);
    struct aiokvm_net_end *moved = aiokvm_net_nic_new(other, &error);
    struct fake_end *peer = fake_end_new(other, 0);
    CHECK_EQ(aiokvm_net_nic_move(rig.nic.end, moved), 0);
    CHECK(rig.peer->resumed);
    aiokvm_net_end_free(rig.nic.end);
    CHECK_EQ(aiokvm_net_link(moved, &peer->end), 0);
    fake_end_serve(other);
    CHECK_EQ(peer->received, 2);
    CHECK_EQ(peer->frames[1].size, 701);
    CHECK_EQ(taken(&rig, 1), 2);
    nic_driver_give(&rig.nic, 0, 1, 1000, 1);
    CHECK_EQ(fake_end_send(peer, NULL, frame_data, 1500), NET_TAKEN);
    CHECK_EQ(taken(&rig, 0), 2);
    nic_driver_send(&rig.nic, 0, 12, NULL, frame_data, 702);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(other);
    CHECK_EQ(peer->received, 3);
    aiokvm_net_free(other);
    close_rig(&rig);
}

TEST(queues_are_taken_away_and_given_again)
{
    struct rig rig;
    open_rig(&rig, F_MRG, 16, 1);
    for (uint32_t round = 0; round < 100; round++) {
        for (uint32_t i = 0; i < 3; i++)
            nic_driver_give(&rig.nic, 0, i, 1000, 1);
        CHECK_EQ(fake_end_send(rig.peer, NULL, frame_data, 5000), NET_BLOCKED);
        rig.peer->blocks = true;
        nic_driver_send(&rig.nic, 0, 12, NULL, frame_data, 702);
        nic_driver_kick(&rig.nic, 1, true);
        fake_end_serve(rig.net);
        nic_driver_detach(&rig.nic);
        rig.peer->blocks = false;
        CHECK_EQ(aiokvm_net_nic_set_features(rig.nic.end, rig.nic.features, 0), 0);
        struct aiokvm_notifier notifier = { rig.nic.irq, &rig.nic.status };
        for (uint32_t i = 0; i < 2; i++) {
            struct nic_driver_queue *queue = &rig.nic.queues[i];
            struct driver *driver = &queue->driver;
            driver_open(driver, rig.nic.ram, 16, rig.nic.features, i * (NIC_RINGS / (2 * NIC_MAX_PAIRS)));
            CHECK_EQ(aiokvm_vring_start(queue->vring, 16, driver->desc, driver->driver, driver->device,
                                        rig.nic.features), 0);
            CHECK_EQ(aiokvm_net_nic_set_queue(rig.nic.end, i, queue->vring, 16, queue->kick, &notifier), 0);
        }
    }
    CHECK_EQ(aiokvm_net_nic_set_queue(rig.nic.end, 2 * AIOKVM_NET_NIC_PAIRS, NULL, 0, -1, NULL), -EINVAL);
    close_rig(&rig);
}

TEST(a_child_of_fork_leaves_the_parents_adapter_alone)
{
    struct rig rig;
    open_rig(&rig, 0, 64, 1);
    pid_t pid = fork();
    if (pid == 0) {
        bool right = aiokvm_net_nic_set_queue(rig.nic.end, 0, NULL, 0, -1, NULL) == -EOWNERDEAD &&
                     aiokvm_net_nic_set_features(rig.nic.end, 0, 0) == -EOWNERDEAD;
        aiokvm_net_free(rig.net);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    /* Its kicks are still heard. */
    nic_driver_send(&rig.nic, 0, 0, NULL, frame_data, 60);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 1);
    close_rig(&rig);
}
