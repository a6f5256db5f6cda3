/* Two adapters that are linked, their drivers on threads of their own, and the plane on its thread. */
#include <pthread.h>
#include <string.h>

#include "check.h"
#include "nic_driver.h"
#include "vring.h"

enum { FRAMES = 20000, SIZE = 64, SLOTS = 40, RX_SLOTS = 40 };

struct side {
    struct nic_driver nic;
    struct side *other;
    uint32_t received, sent, wrong;
    _Atomic uint32_t finished;
};

static void send_some(struct side *side)
{
    struct driver *driver = &side->nic.queues[1].driver;
    uint32_t id, written;
    while (driver_take(driver, &id, &written))
        continue;
    for (uint32_t i = 0; i < 8 && side->sent < FRAMES && driver->free >= 2; i++) {
        uint8_t data[1500] = { 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x12, 0x34 };
        uint32_t size = 64 + side->sent % 1400;
        memcpy(data + 14, &side->sent, 4);
        /* As many slots as there are chains: none is in use. */
        if (nic_driver_send(&side->nic, 0, side->sent % SLOTS, NULL, data, size) < 0)
            break;
        side->sent++;
    }
    nic_driver_kick(&side->nic, 1, false);
}

static void receive_some(struct side *side)
{
    struct driver *driver = &side->nic.queues[0].driver;
    uint32_t id, written;
    while (driver_take(driver, &id, &written)) {
        uint32_t slot = SLOTS + side->received % RX_SLOTS, number;
        memcpy(&number, nic_driver_at(&side->nic, slot) + 12 + 14, 4);
        side->wrong += number != side->received || written != 12 + 64 + number % 1400;
        side->received++;
        nic_driver_give(&side->nic, 0, slot, 2000, 1);
    }
    nic_driver_kick(&side->nic, 0, false);
}

static void *run_driver(void *argument)
{
    struct side *side = argument;
    for (uint32_t i = 0; i < RX_SLOTS; i++)
        nic_driver_give(&side->nic, 0, SLOTS + i, 2000, 1);
    nic_driver_kick(&side->nic, 0, false);
    while (side->received < FRAMES || side->sent < FRAMES) {
        send_some(side);
        receive_some(side);
        sched_yield();
    }
    atomic_store(&side->finished, 1);
    return NULL;
}

static void run(uint64_t features)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new("nic-stress", &error);
    CHECK(net);
    struct side sides[2] = { { .other = &sides[1] }, { .other = &sides[0] } };
    for (int i = 0; i < 2; i++)
        nic_driver_open(&sides[i].nic, net, features, SIZE, 1);
    CHECK_EQ(aiokvm_net_link(sides[0].nic.end, sides[1].nic.end), 0);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, run_driver, &sides[i]), 0);
    /* What the program does meanwhile. */
    struct aiokvm_net_nic_filter filter = { 0 };
    while (!atomic_load(&sides[0].finished) || !atomic_load(&sides[1].finished)) {
        struct aiokvm_net_stats stats;
        aiokvm_net_end_stats(sides[0].nic.end, &stats);
        CHECK_EQ(aiokvm_net_nic_set_filter(sides[1].nic.end, &filter), 0);
        sched_yield();
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        CHECK_EQ(sides[i].wrong, 0);
        nic_driver_detach(&sides[i].nic);
    }
    aiokvm_net_free(net);
    for (int i = 0; i < 2; i++)
        nic_driver_close(&sides[i].nic);
}

TEST(frames_cross_between_two_guests_in_order)
{
    run(AIOKVM_VIRTIO_F_EVENT_IDX | 1 << 15);
}

TEST(so_they_do_with_packed_rings)
{
    run(AIOKVM_VIRTIO_F_EVENT_IDX | AIOKVM_VIRTIO_F_RING_PACKED);
}

TEST(and_without_an_event_index)
{
    run(1 << 15);
}
