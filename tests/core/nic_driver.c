#include "nic_driver.h"

#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

void nic_driver_open(struct nic_driver *nic, struct aiokvm_net *net, uint64_t features, uint32_t size, uint32_t pairs)
{
    memset(nic, 0, sizeof(*nic));
    nic->ram = mmap(NULL, NIC_RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(nic->ram != MAP_FAILED);
    nic->features = features;
    nic->size = size;
    nic->irq = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    int error = 0;
    nic->end = aiokvm_net_nic_new(net, &error);
    CHECK(nic->end);
    CHECK_EQ(aiokvm_net_nic_set_features(nic->end, features, 0), 0);
    struct aiokvm_ram ram = { 0, NIC_RAM, nic->ram };
    struct aiokvm_notifier notifier = { nic->irq, &nic->status };
    for (uint32_t i = 0; i < 2 * pairs; i++) {
        struct nic_driver_queue *queue = &nic->queues[i];
        queue->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        queue->vring = aiokvm_vring_new(&ram, 1, size);
        CHECK(queue->vring);
        driver_open(&queue->driver, nic->ram, size, features, i * (NIC_RINGS / (2 * NIC_MAX_PAIRS)));
        const struct driver *driver = &queue->driver;
        CHECK_EQ(aiokvm_vring_start(queue->vring, size, driver->desc, driver->driver, driver->device, features), 0);
        CHECK_EQ(aiokvm_net_nic_set_queue(nic->end, i, queue->vring, size, queue->kick, &notifier), 0);
    }
    CHECK_EQ(aiokvm_net_nic_set_pairs(nic->end, pairs), 0);
}

void nic_driver_detach(struct nic_driver *nic)
{
    for (uint32_t i = 0; i < LENGTH(nic->queues); i++)
        CHECK_EQ(aiokvm_net_nic_set_queue(nic->end, i, NULL, 0, -1, NULL), 0);
}

void nic_driver_close(struct nic_driver *nic)
{
    for (uint32_t i = 0; i < LENGTH(nic->queues); i++)
        if (nic->queues[i].vring) {
            aiokvm_vring_free(nic->queues[i].vring);
            close(nic->queues[i].kick);
        }
    close(nic->irq);
    munmap(nic->ram, NIC_RAM);
}

uint64_t nic_driver_gpa(uint32_t slot)
{
    return NIC_RINGS + (uint64_t)slot * NIC_SLOT;
}

uint8_t *nic_driver_at(struct nic_driver *nic, uint32_t slot)
{
    return nic->ram + nic_driver_gpa(slot);
}

int nic_driver_give(struct nic_driver *nic, uint32_t pair, uint32_t slot, uint32_t size, uint32_t pieces)
{
    struct driver_buffer buffers[64];
    CHECK(pieces <= LENGTH(buffers));
    uint64_t gpa = nic_driver_gpa(slot);
    for (uint32_t i = 0; i < pieces; i++) {
        uint32_t length = i + 1 < pieces ? size / pieces : size - size / pieces * (pieces - 1);
        buffers[i] = (struct driver_buffer){ gpa, length, true };
        gpa += length;
    }
    return driver_add(&nic->queues[2 * pair].driver, buffers, pieces, 0);
}

int nic_driver_send(struct nic_driver *nic, uint32_t pair, uint32_t slot, const struct virtio_net_hdr_v1 *hdr,
                    const void *data, uint32_t size)
{
    uint8_t *at = nic_driver_at(nic, slot);
    memset(at, 0, NIC_HDR_SIZE);
    if (hdr)
        memcpy(at, hdr, NIC_HDR_SIZE);
    memcpy(at + NIC_HDR_SIZE, data, size);
    uint64_t gpa = nic_driver_gpa(slot);
    struct driver_buffer buffers[] = { { gpa, NIC_HDR_SIZE, false }, { gpa + NIC_HDR_SIZE, size, false } };
    return driver_add(&nic->queues[2 * pair + 1].driver, buffers, 2, 0);
}

bool nic_driver_kick(struct nic_driver *nic, uint32_t queue, bool always)
{
    bool wanted = driver_notifies(&nic->queues[queue].driver);
    if (!wanted && !always)
        return false;
    CHECK_EQ(write(nic->queues[queue].kick, &(uint64_t){ 1 }, 8), 8);
    return wanted;
}

uint64_t nic_driver_interrupts(struct nic_driver *nic)
{
    uint64_t count = 0;
    return read(nic->irq, &count, 8) == 8 ? count : 0;
}

/* ---- with an end that records as its peer ---- */

static uint8_t frame_data[70000];
const uint8_t *const NIC_FRAME = frame_data;

__attribute__((constructor)) static void make_data(void)
{
    for (size_t i = 0; i < sizeof(frame_data); i++)
        frame_data[i] = (uint8_t)(i * 7 + i / 251);
    memcpy(frame_data, "\x52\x54\x00\x00\x00\x01\x52\x54\x00\x00\x00\x02\x08\x00\x45\x00", 16);
    frame_data[34 + 12] = 0x50;
}

void nic_rig_open(struct nic_rig *rig, uint64_t features, uint32_t size, uint32_t pairs)
{
    int error = 0;
    rig->net = aiokvm_net_new(NULL, &error);
    CHECK(rig->net);
    nic_driver_open(&rig->nic, rig->net, features, size, pairs);
    rig->peer = fake_end_new(rig->net, 31);
    CHECK_EQ(aiokvm_net_link(rig->nic.end, &rig->peer->end), 0);
    fake_end_serve(rig->net);
}

void nic_rig_close(struct nic_rig *rig)
{
    aiokvm_net_free(rig->net);
    nic_driver_close(&rig->nic);
}

struct aiokvm_net_stats nic_rig_stats(struct nic_rig *rig)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(rig->nic.end, &stats);
    return stats;
}

uint32_t nic_rig_taken(struct nic_rig *rig, uint32_t queue)
{
    uint32_t id, written, count = 0;
    while (driver_take(&rig->nic.queues[queue].driver, &id, &written))
        count++;
    return count;
}

void nic_rig_check_broken(struct nic_rig *rig, int error, uint32_t queue)
{
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(rig->net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(rig->nic.end));
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_BROKEN);
    CHECK_EQ(news.error, error);
    CHECK_EQ(news.detail, queue);
    CHECK_EQ(aiokvm_net_take(rig->net, &news), 0);
}
