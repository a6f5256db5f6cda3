/* net_stream.c under libFuzzer: the input is what the other side of the socket writes and reads, what the peer of the
 * link sends and takes, and connections that come and go.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_end.c net_gather.c net_rules.c net_stream.c budget.c clock.c pace.c ratelimit.c
 * Runs: 15000
 */
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_fuzz.h"
#include "net_stream.h"

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *end;
    struct peer *peer;
    int near, far;
    uint32_t left;   /* of the frame that is being read from the far end */
    uint32_t filled; /* of its length */
    uint8_t length[4];
};

static void connect_again(struct world *world)
{
    int pair[2];
    if (world->far >= 0)
        close(world->far);
    world->far = -1;
    serve(world->net, 1000);
    REQUIRE(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    if (aiokvm_net_stream_attach(world->end, pair[0])) {
        /* It has not seen yet that the one before is gone: what came from there is not taken. */
        close(pair[0]);
        close(pair[1]);
        return;
    }
    if (world->near >= 0)
        close(world->near);
    world->near = pair[0];
    world->far = pair[1];
    world->left = world->filled = 0;
}

/* What is written are frames, whole and behind their lengths. */
static void read_far(struct world *world)
{
    static uint8_t data[1 << 17];
    ssize_t size = recv(world->far, data, sizeof(data), MSG_DONTWAIT);
    for (ssize_t at = 0; at < size;) {
        if (world->left) {
            uint32_t part = (uint32_t)(size - at) < world->left ? (uint32_t)(size - at) : world->left;
            world->left -= part;
            at += part;
            continue;
        }
        world->length[world->filled++] = data[at++];
        if (world->filled == sizeof(world->length)) {
            uint32_t length;
            memcpy(&length, world->length, sizeof(length));
            world->left = ntohl(length);
            world->filled = 0;
            REQUIRE(world->left >= AIOKVM_NET_MIN_FRAME && world->left <= AIOKVM_NET_MAX_FRAME);
        }
    }
}

static void write_far(struct world *world, struct input *input)
{
    static uint8_t data[70000];
    uint32_t size = 0, kind = take(input, 1);
    if (kind & 1) {
        uint32_t length = kind & 2 ? take(input, 4) : take(input, 2) % 3000, prefix = htonl(length);
        memcpy(data, &prefix, sizeof(prefix));
        size = 4 + (length < sizeof(data) - 4 ? length : 100);
    }
    uint32_t given = take(input, 1);
    for (uint32_t i = 0; i < given; i++)
        data[(kind & 1 ? 4 : 0) + i] = (uint8_t)take(input, 1);
    if (!(kind & 1))
        size = given;
    if (kind & 4)
        size /= 2;
    ssize_t result = send(world->far, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)result;
}

static void step(struct world *world, struct input *input)
{
    uint32_t what = take(input, 1);
    switch (what & 7) {
    case 0:
    case 1:
        write_far(world, input);
        break;
    case 2:
        peer_send(world->peer, input, NULL, 0);
        break;
    case 3:
        read_far(world);
        break;
    case 4:
        peer_block(world->peer, what & 8);
        break;
    case 5:
        if (!(what & 0x18))
            connect_again(world);
        break;
    case 6:
        if (what & 8) {
            aiokvm_net_unlink(world->end);
            REQUIRE(!aiokvm_net_link(world->end, &world->peer->end));
        }
        break;
    default:
        serve(world->net, 1 + (what >> 3));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    struct world world = { .near = -1, .far = -1 };
    int error;
    world.net = aiokvm_net_new(NULL, &error);
    REQUIRE(world.net);
    world.end = aiokvm_net_stream_new(world.net, &error);
    world.peer = peer_new(world.net, take(&input, 1) & 31);
    REQUIRE(world.end && !aiokvm_net_link(world.end, &world.peer->end));
    connect_again(&world);
    while (input.left)
        step(&world, &input);
    peer_block(world.peer, false);
    serve(world.net, 1000);
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(world.end, &stats);
    REQUIRE(stats.sent_frames <= world.peer->received);
    aiokvm_net_free(world.net);
    close(world.near);
    if (world.far >= 0)
        close(world.far);
    return 0;
}
