/* The adapter under libFuzzer: the input is what a driver writes into its rings and buffers, what its peer sends and
 * takes, and what the program sets meanwhile.
 *
 * Sources: net*.c vring*.c budget.c clock.c notify.c pace.c ratelimit.c
 * Runs: 100000
 *
 * The guest's RAM is an allocation of its own, and so is what the peer copies frames to: AddressSanitizer sees every
 * byte outside them. */
#include <linux/virtio_net.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "clock.h"
#include "net_fuzz.h"
#include "net_nic.h"

enum { SIZE = 8, RANGE = 0x8000, QUEUES = 4, RINGS = 0x400, DRIVER = 0x100, DEVICE = 0x200, BUFFERS = 0x1000 };

/* ---- the peer ---- */

static void send_frame(struct peer *peer, struct input *input)
{
    static uint8_t data[AIOKVM_NET_MAX_FRAME];
    uint8_t head[NET_HEAD];
    uint32_t size = take(input, 2);
    struct iovec iov[3], from = { data, size };
    for (size_t i = 0; i < 16; i++)
        data[i] = (uint8_t)take(input, 1);
    struct net_frame frame = { .hdr = { .flags = (uint8_t)take(input, 1), .gso_type = (uint8_t)take(input, 1) } };
    frame.hdr.csum_start = (uint16_t)take(input, 1);
    frame.hdr.csum_offset = (uint16_t)take(input, 1);
    frame.hdr.gso_size = (uint16_t)take(input, 2);
    net_frame_set(&frame, iov + 1, head, &from, 1, 0);
    REQUIRE(net_enter(peer->end.net));
    if (net_frame_check(&frame))
        net_send(&peer->end, &frame);
    net_leave(peer->end.net);
}

/* ---- the driver ---- */

struct guest {
    struct aiokvm_net_end *end;
    uint8_t *ram;
    uint64_t features;
    struct aiokvm_vring *vrings[QUEUES];
    int kicks[QUEUES];
    uint16_t next[QUEUES]; /* packed: what `offer` writes next, round and round */
    uint32_t status;
};

static void attach(struct guest *guest, uint32_t index)
{
    struct aiokvm_vring *vring = guest->vrings[index];
    uint64_t base = index * RINGS;
    REQUIRE(!aiokvm_net_nic_set_queue(guest->end, index, NULL, 0, -1, NULL));
    memset(guest->ram + base, 0, RINGS);
    guest->next[index] = 0;
    REQUIRE(!aiokvm_vring_start(vring, SIZE, base, base + DRIVER, base + DEVICE, guest->features));
    struct aiokvm_notifier notifier = { -1, &guest->status };
    REQUIRE(!aiokvm_net_nic_set_queue(guest->end, index, vring, SIZE, guest->kicks[index], &notifier));
}

/* Puts a slot into the available ring of a split queue. */
static void make_available(uint8_t *rings, uint32_t slot)
{
    uint16_t idx;
    memcpy(&idx, rings + DRIVER + 2, 2);
    memcpy(rings + DRIVER + 4 + idx % SIZE * 2, &(uint16_t){ (uint16_t)slot }, 2);
    idx++;
    memcpy(rings + DRIVER + 2, &idx, 2);
}

/* What a driver does that keeps to the rules: a buffer of one descriptor, of any length. */
static void offer(struct guest *guest, uint32_t index, struct input *input)
{
    uint8_t *rings = guest->ram + index * RINGS;
    bool packed = guest->features & AIOKVM_VIRTIO_F_RING_PACKED;
    uint16_t next = guest->next[index]++, slot = next % SIZE;
    uint64_t addr = BUFFERS + (uint64_t)slot * 0x800;
    uint32_t len = 12 + take(input, 1) * 8;
    uint16_t write = index % 2 ? 0 : 2, halves[] = { write, 0 };
    if (packed) {
        halves[0] = slot;
        halves[1] = write | (next / SIZE % 2 ? 0x8000 : 0x80);
    }
    memcpy(rings + slot * 16, &addr, 8);
    memcpy(rings + slot * 16 + 8, &len, 4);
    memcpy(rings + slot * 16 + 12, halves, 4);
    if (!packed)
        make_available(rings, slot);
}

/* A descriptor of either layout, more often possible than not, and its slot in the available ring. */
static void write_descriptor(struct guest *guest, uint32_t index, struct input *input)
{
    uint8_t *rings = guest->ram + index * RINGS;
    uint32_t slot = take(input, 1) % SIZE, kind = take(input, 1);
    uint64_t addr = kind & 1 ? BUFFERS + (uint64_t)slot * 0x800 : take(input, 2);
    uint32_t len = kind & 2 ? take(input, 2) : 0x800;
    uint16_t halves[] = { (uint16_t)take(input, 2), (uint16_t)take(input, 2) };
    if (kind & 4)
        halves[guest->features & AIOKVM_VIRTIO_F_RING_PACKED ? 1 : 0] = index % 2 ? 0x80 : 0x82;
    memcpy(rings + slot * 16, &addr, 8);
    memcpy(rings + slot * 16 + 8, &len, 4);
    memcpy(rings + slot * 16 + 12, halves, 4);
    if (kind & 8 && !(guest->features & AIOKVM_VIRTIO_F_RING_PACKED))
        make_available(rings, slot);
}

static void write_buffer(struct guest *guest, struct input *input)
{
    uint32_t at = take(input, 2) % (RANGE - 64), size = take(input, 1) % 64;
    for (uint32_t i = 0; i < size; i++)
        guest->ram[at + i] = (uint8_t)take(input, 1);
}

static void set_filter(struct guest *guest, struct input *input)
{
    struct aiokvm_net_nic_filter filter = { .flags = take(input, 1), .macs = take(input, 1) };
    for (uint32_t i = 0; i < 6; i++)
        filter.mac[0][i] = (uint8_t)take(input, 1);
    aiokvm_net_nic_set_filter(guest->end, &filter);
}

static void step(struct guest *guest, struct peer *peer, struct input *input)
{
    uint32_t what = take(input, 1), index = what >> 4 & (QUEUES - 1);
    struct aiokvm_net *net = guest->end->net;
    switch (what & 15) {
    case 0 ... 2:
        offer(guest, index, input);
        break;
    case 3:
    case 4:
        write_descriptor(guest, index, input);
        break;
    case 5:
    case 6:
        write_buffer(guest, input);
        break;
    case 7:
    case 8:
        REQUIRE(write(guest->kicks[index], &(uint64_t){ 1 }, 8) == 8);
        while (aiokvm_net_serve(net, 0) == 1)
            continue;
        break;
    case 9:
        send_frame(peer, input);
        break;
    case 10:
        /* As after many wakes in a row: the driver is not asked to notify. */
        REQUIRE(net_enter(net));
        net->gather.is_on = true;
        net->gather.frames_ns = aiokvm_now_ns();
        net_leave(net);
        break;
    case 11:
        REQUIRE(net_enter(net));
        peer->blocks = !peer->blocks;
        if (!peer->blocks)
            net_resume(&peer->end);
        net_leave(net);
        break;
    case 12:
        attach(guest, index);
        break;
    case 13:
        set_filter(guest, input);
        break;
    case 14:
        aiokvm_net_nic_set_pairs(guest->end, take(input, 1) % 5);
        break;
    default:
        aiokvm_net_nic_set_offloads(guest->end, take(input, 2));
        break;
    }
}

static void run(struct aiokvm_net *net, struct input *input)
{
    struct guest guest = { .ram = aligned_alloc(16, RANGE) };
    REQUIRE(guest.ram);
    memset(guest.ram, 0, RANGE);
    struct aiokvm_ram ram = { 0, RANGE, guest.ram };
    int error = 0;
    uint32_t bits = take(input, 1);
    guest.features = take(input, 2) | (uint64_t)(bits & 3) << 28 | (uint64_t)(bits >> 2 & 3) << 34;
    guest.end = aiokvm_net_nic_new(net, &error);
    struct peer *peer = peer_new(net, bits >> 4);
    REQUIRE(guest.end);
    REQUIRE(!aiokvm_net_nic_set_features(guest.end, guest.features, 0));
    for (uint32_t i = 0; i < QUEUES; i++) {
        guest.kicks[i] = eventfd(0, EFD_NONBLOCK);
        guest.vrings[i] = aiokvm_vring_new(&ram, 1, SIZE);
        REQUIRE(guest.vrings[i] && guest.kicks[i] >= 0);
        attach(&guest, i);
    }
    REQUIRE(!aiokvm_net_link(guest.end, &peer->end));
    while (input->left)
        step(&guest, peer, input);
    for (uint32_t i = 0; i < QUEUES; i++) {
        REQUIRE(!aiokvm_net_nic_set_queue(guest.end, i, NULL, 0, -1, NULL));
        /* Every chain is back: there is room for a start. */
        aiokvm_vring_stop(guest.vrings[i]);
    }
    aiokvm_net_end_free(guest.end);
    aiokvm_net_end_free(&peer->end);
    for (uint32_t i = 0; i < QUEUES; i++) {
        aiokvm_vring_free(guest.vrings[i]);
        close(guest.kicks[i]);
    }
    free(guest.ram);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    REQUIRE(net);
    struct input input = { data, size };
    run(net, &input);
    aiokvm_net_free(net);
    return 0;
}
