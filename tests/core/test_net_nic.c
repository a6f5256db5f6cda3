/* The adapter against a driver in memory: what it transmits, and its life. What it receives: test_net_nic_rx.c. */
#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "nic_driver.h"

/* ---- transmission ---- */

TEST(what_the_driver_sends_reaches_the_peer_in_one_batch)
{
    const uint64_t layouts[] = { 0, EVENT, PACKED, PACKED | EVENT, IN_ORDER | EVENT };
    for (size_t layout = 0; layout < LENGTH(layouts); layout++) {
        struct nic_rig rig;
        nic_rig_open(&rig, layouts[layout], 64, 1);
        for (uint32_t round = 0; round < 10; round++) {
            for (uint32_t i = 0; i < 20; i++)
                CHECK(nic_driver_send(&rig.nic, 0, i, NULL, NIC_FRAME, 60 + i * 77) >= 0);
            CHECK(!driver_enable_interrupt(&rig.nic.queues[1].driver));
            nic_driver_kick(&rig.nic, 1, round == 0);
            nic_driver_interrupts(&rig.nic);
            fake_end_serve(rig.net);
            CHECK_EQ(rig.peer->received, 20);
            for (uint32_t i = 0; i < 20; i++) {
                CHECK_EQ(rig.peer->frames[i].size, 60 + i * 77);
                CHECK(!memcmp(rig.peer->frames[i].data, NIC_FRAME, 60 + i * 77));
            }
            CHECK_EQ(nic_driver_interrupts(&rig.nic), 1);
            CHECK_EQ(nic_rig_taken(&rig, 1), 20);
            fake_end_clear(rig.peer);
        }
        CHECK_EQ(nic_rig_stats(&rig).interrupts, 10);
        CHECK_EQ(nic_rig_stats(&rig).sent_frames, 200);
        nic_rig_close(&rig);
    }
}

TEST(a_header_over_several_descriptors_is_read)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 64, 1);
    uint64_t gpa = nic_driver_gpa(0);
    memset(nic_driver_at(&rig.nic, 0), 0, 12);
    memcpy(nic_driver_at(&rig.nic, 0) + 12, NIC_FRAME, 300);
    struct driver_buffer buffers[] = { { gpa, 5, false }, { gpa + 5, 1, false }, { gpa + 6, 20, false },
                                       { gpa + 26, 286, false } };
    CHECK(driver_add(&rig.nic.queues[1].driver, buffers, LENGTH(buffers), 0) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 1);
    CHECK(!memcmp(rig.peer->frames[0].data, NIC_FRAME, 300));
    nic_rig_close(&rig);
}

TEST(chains_that_are_no_frames_are_dropped_and_completed)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_CSUM | F_HOST_TSO4, 64, 1);
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
        CHECK(nic_driver_send(&rig.nic, 0, 1 + i, &headers[i], NIC_FRAME, 1000) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 0);
    CHECK_EQ(nic_rig_stats(&rig).dropped_invalid, LENGTH(sizes) + 3 + LENGTH(headers));
    CHECK_EQ(nic_rig_taken(&rig, 1), LENGTH(sizes) + 3 + LENGTH(headers));
    nic_rig_close(&rig);
}

TEST(offload_that_was_not_negotiated_is_not_sent)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 64, 1);
    /* Without CSUM the flags mean nothing, and there is no segmentation without them. */
    struct virtio_net_hdr_v1 csum = { .flags = 3, .csum_start = 34, .csum_offset = 16 };
    struct virtio_net_hdr_v1 gso = csum;
    gso.gso_type = 1;
    gso.gso_size = 500;
    nic_driver_send(&rig.nic, 0, 0, &csum, NIC_FRAME, 1000);
    nic_driver_send(&rig.nic, 0, 1, &gso, NIC_FRAME, 1000);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 1);
    CHECK_EQ(rig.peer->frames[0].hdr.flags, 0);
    CHECK_EQ(nic_rig_stats(&rig).dropped_invalid, 1);
    nic_rig_close(&rig);
    nic_rig_open(&rig, F_CSUM | F_HOST_TSO4, 64, 1);
    csum.flags = 0xff;
    nic_driver_send(&rig.nic, 0, 0, &csum, NIC_FRAME, 1000);
    nic_driver_send(&rig.nic, 0, 1, &gso, NIC_FRAME, 1000);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 2);
    CHECK_EQ(rig.peer->frames[0].hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
    CHECK_EQ(rig.peer->frames[1].hdr.gso_size, 500);
    nic_rig_close(&rig);
}

TEST(what_the_peer_does_not_take_waits_in_its_queue)
{
    struct nic_rig rig;
    nic_rig_open(&rig, EVENT, 64, 1);
    rig.peer->blocks = true;
    for (uint32_t i = 0; i < 10; i++)
        nic_driver_send(&rig.nic, 0, i, NULL, NIC_FRAME, 100 + i);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 0);
    CHECK_EQ(nic_rig_taken(&rig, 1), 0);
    /* Kicks do not have it tried again. */
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 0);
    fake_end_unblock(rig.peer);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 10);
    for (uint32_t i = 0; i < 10; i++)
        CHECK_EQ(rig.peer->frames[i].size, 100 + i);
    CHECK_EQ(nic_rig_taken(&rig, 1), 10);
    /* A frame that waits when its queue is taken away is gone; the peer does not miss it. */
    rig.peer->blocks = true;
    nic_driver_send(&rig.nic, 0, 0, NULL, NIC_FRAME, 100);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    nic_driver_detach(&rig.nic);
    CHECK_EQ(nic_rig_stats(&rig).dropped_down, 1);
    fake_end_unblock(rig.peer);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 10);
    nic_rig_close(&rig);
}

TEST(one_serve_sends_a_quantum_and_no_more)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 256, 1);
    for (uint32_t i = 0; i < 96; i++)
        CHECK(nic_driver_send(&rig.nic, 0, i % 96, NULL, NIC_FRAME, 60) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    CHECK_EQ(aiokvm_net_serve(rig.net, 0), 1);
    uint32_t before = rig.peer->received;
    CHECK(net_enter(rig.net));
    rig.net->until_ns = UINT64_MAX;
    CHECK(rig.nic.end->type->serve(rig.nic.end));
    net_leave(rig.net);
    CHECK_EQ(rig.peer->received, before + NET_QUANTUM);
    CHECK_EQ(nic_rig_taken(&rig, 1), before + NET_QUANTUM);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 96);
    nic_rig_close(&rig);
}

TEST(a_serve_ends_when_the_time_is_over)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 256, 1);
    for (uint32_t i = 0; i < 64; i++)
        CHECK(nic_driver_send(&rig.nic, 0, i, NULL, NIC_FRAME, 60) >= 0);
    nic_driver_kick(&rig.nic, 1, true);
    CHECK_EQ(aiokvm_net_serve(rig.net, 0), 1);
    CHECK(rig.peer->received > 0 && rig.peer->received < 64);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 64);
    nic_rig_close(&rig);
}

TEST(a_ring_that_is_wrong_breaks_the_adapter_and_is_told_once)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 64, 1);
    struct driver *driver = &rig.nic.queues[1].driver;
    *(uint16_t *)(rig.nic.ram + driver->driver + 2) = 300;
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    nic_rig_check_broken(&rig, AIOKVM_VRING_EINDEX, 1);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(rig.net, &news), 0);
    /* Nothing is received any more either. */
    nic_driver_give(&rig.nic, 0, 0, 2000, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 100), NET_TAKEN);
    CHECK_EQ(nic_rig_taken(&rig, 0), 0);
    CHECK_EQ(nic_rig_stats(&rig).dropped_full, 1);
    nic_rig_close(&rig);
}

/* ---- its life ---- */

TEST(an_adapter_moves_to_another_plane_with_all_that_waits)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG | EVENT, 64, 2);
    nic_driver_give(&rig.nic, 0, 0, 1000, 1);
    CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 1500), NET_BLOCKED);
    rig.peer->blocks = true;
    nic_driver_send(&rig.nic, 0, 10, NULL, NIC_FRAME, 700);
    nic_driver_send(&rig.nic, 0, 11, NULL, NIC_FRAME, 701);
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
    CHECK_EQ(nic_rig_taken(&rig, 1), 2);
    nic_driver_give(&rig.nic, 0, 1, 1000, 1);
    CHECK_EQ(fake_end_send(peer, NULL, NIC_FRAME, 1500), NET_TAKEN);
    CHECK_EQ(nic_rig_taken(&rig, 0), 2);
    nic_driver_send(&rig.nic, 0, 12, NULL, NIC_FRAME, 702);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(other);
    CHECK_EQ(peer->received, 3);
    aiokvm_net_free(other);
    nic_rig_close(&rig);
}

TEST(queues_are_taken_away_and_given_again)
{
    struct nic_rig rig;
    nic_rig_open(&rig, F_MRG, 16, 1);
    for (uint32_t round = 0; round < 100; round++) {
        for (uint32_t i = 0; i < 3; i++)
            nic_driver_give(&rig.nic, 0, i, 1000, 1);
        CHECK_EQ(fake_end_send(rig.peer, NULL, NIC_FRAME, 5000), NET_BLOCKED);
        rig.peer->blocks = true;
        nic_driver_send(&rig.nic, 0, 12, NULL, NIC_FRAME, 702);
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
    nic_rig_close(&rig);
}

TEST(a_child_of_fork_leaves_the_parents_adapter_alone)
{
    struct nic_rig rig;
    nic_rig_open(&rig, 0, 64, 1);
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
    nic_driver_send(&rig.nic, 0, 0, NULL, NIC_FRAME, 60);
    nic_driver_kick(&rig.nic, 1, true);
    fake_end_serve(rig.net);
    CHECK_EQ(rig.peer->received, 1);
    nic_rig_close(&rig);
}
