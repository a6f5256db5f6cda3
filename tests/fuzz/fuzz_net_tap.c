/* net_tap.c under libFuzzer: the input is what the device gives, headers of virtio included, what the peer of the link
 * sends and takes, and what that says of its offloads. The device is a socket that keeps messages apart; ioctl is ours.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_end.c net_gather.c net_rules.c net_tap.c budget.c clock.c pace.c ratelimit.c
 * Runs: 20000
 */
#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_fuzz.h"
#include "net_tap.h"

enum { QUEUES = 2, HEADER = sizeof(struct virtio_net_hdr_v1) };

static bool has_header;
static uint32_t refused; /* TUNSETOFFLOAD: bits that the kernel does not have */

int ioctl(int fd, unsigned long request, ...);

int ioctl(int fd, unsigned long request, ...)
{
    (void)fd;
    __builtin_va_list arguments;
    __builtin_va_start(arguments, request);
    unsigned long argument = __builtin_va_arg(arguments, unsigned long);
    __builtin_va_end(arguments);
    if (request == TUNGETIFF) {
        struct ifreq *given = (struct ifreq *)argument;
        given->ifr_flags = IFF_TAP | (has_header ? IFF_VNET_HDR : 0);
    } else if (request == TUNSETOFFLOAD && argument & refused) {
        errno = EINVAL;
        return -1;
    }
    return 0;
}

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *end;
    struct peer *peer;
    int near[QUEUES], far[QUEUES];
    uint32_t queues;
};

static void give(struct world *world, struct input *input)
{
    static uint8_t data[70000];
    uint32_t queue = take(input, 1) % world->queues, size = take(input, 2), given = take(input, 1);
    for (uint32_t i = 0; i < given; i++)
        data[i] = (uint8_t)take(input, 1);
    ssize_t result = send(world->far[queue], data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)result;
}

/* The kernel is given headers that fit, and nothing that it has not. */
static void read_device(struct world *world, uint32_t queue)
{
    static uint8_t data[70000];
    ssize_t size = recv(world->far[queue], data, sizeof(data), MSG_DONTWAIT);
    if (size <= 0)
        return;
    if (has_header) {
        struct virtio_net_hdr_v1 hdr;
        REQUIRE(size >= HEADER + AIOKVM_NET_MIN_FRAME && size <= HEADER + AIOKVM_NET_MAX_FRAME);
        memcpy(&hdr, data, sizeof(hdr));
        uint8_t head[NET_HEAD];
        struct iovec iov[3], from = { data + HEADER, (size_t)size - HEADER };
        struct net_frame frame = { .hdr = hdr };
        net_frame_set(&frame, iov + 1, head, &from, 1, 0);
        REQUIRE(net_frame_check(&frame) && !(net_frame_needs(&frame) & ~aiokvm_net_tap_offloads(world->end)));
    } else {
        REQUIRE(size >= AIOKVM_NET_MIN_FRAME && size <= AIOKVM_NET_MAX_FRAME);
    }
}

static void step(struct world *world, struct input *input)
{
    uint32_t what = take(input, 1);
    switch (what & 7) {
    case 0:
    case 1:
        give(world, input);
        break;
    case 2:
        peer_send(world->peer, input, NULL, 0);
        break;
    case 3:
        read_device(world, what >> 3 & 1 ? world->queues - 1 : 0);
        break;
    case 4:
        peer_block(world->peer, what & 8);
        break;
    case 5:
        REQUIRE(net_enter(world->net));
        world->peer->end.offloads = what >> 3;
        net_ready(world->end);
        net_leave(world->net);
        break;
    case 6:
        if (what & 8) {
            aiokvm_net_unlink(world->end);
            REQUIRE(!aiokvm_net_link(world->end, &world->peer->end));
        } else if (!(what & 0xf0)) {
            shutdown(world->far[0], SHUT_RDWR);
        }
        break;
    default:
        serve(world->net, 1 + (what >> 3));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    struct world world = { 0 };
    int error;
    uint32_t options = take(&input, 1);
    has_header = options & 1;
    refused = options & 2 ? TUN_F_CSUM : options & 4 ? TUN_F_TSO6 : 0;
    world.queues = options & 8 ? QUEUES : 1;
    world.net = aiokvm_net_new(NULL, &error);
    REQUIRE(world.net);
    for (uint32_t i = 0; i < QUEUES; i++) {
        int pair[2];
        REQUIRE(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
        world.near[i] = pair[0];
        world.far[i] = pair[1];
    }
    world.end = aiokvm_net_tap_new(world.net, world.near, world.queues, 1, &error);
    world.peer = peer_new(world.net, take(&input, 1) & 31);
    REQUIRE(world.end && !aiokvm_net_link(world.end, &world.peer->end));
    while (input.left)
        step(&world, &input);
    peer_block(world.peer, false);
    serve(world.net, 200);
    aiokvm_net_free(world.net);
    for (uint32_t i = 0; i < QUEUES; i++) {
        close(world.near[i]);
        close(world.far[i]);
    }
    return 0;
}
