/* net_datagram.c under libFuzzer: the input is what kind of socket it is, what the other side sends and reads, what the
 * peer of the link sends and takes, and when the other side goes.
 *
 * Sources: net.c net_capture.c net_checksum.c net_datagram.c net_filter.c net_flow.c net_link.c net_offload.c
 * Sources: net_end.c net_gather.c net_packet.c net_queue.c net_rules.c budget.c clock.c pace.c ratelimit.c
 * Runs: 5000
 */
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "net_datagram.h"
#include "net_fuzz.h"

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *end;
    struct peer *peer;
    int near, far;
    uint64_t read;
};

/* Unix sockets, for nothing else can be reached by them: connected, or named (in the abstract). */
static void open_sockets(struct world *world, uint32_t kind, struct sockaddr_un *remote, uint32_t *remote_size)
{
    int pair[2];
    *remote_size = 0;
    if (kind % 3 < 2) {
        REQUIRE(!socketpair(AF_UNIX, (kind % 3 ? SOCK_SEQPACKET : SOCK_DGRAM) | SOCK_CLOEXEC, 0, pair));
    } else {
        socklen_t size = sizeof(*remote);
        for (int i = 0; i < 2; i++) {
            pair[i] = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
            struct sockaddr_un any = { .sun_family = AF_UNIX };
            REQUIRE(!bind(pair[i], (struct sockaddr *)&any, sizeof(any.sun_family)));
        }
        REQUIRE(!getsockname(pair[0], (struct sockaddr *)remote, &size));
        REQUIRE(!connect(pair[1], (struct sockaddr *)remote, size));
        size = sizeof(*remote);
        REQUIRE(!getsockname(pair[1], (struct sockaddr *)remote, &size));
        *remote_size = size;
    }
    world->near = pair[0];
    world->far = pair[1];
}

static void send_far(struct world *world, struct input *input)
{
    static uint8_t data[70000];
    uint32_t size = take(input, 2) + (take(input, 1) & 1 ? 0 : 14), given = take(input, 1);
    for (uint32_t i = 0; i < given; i++)
        data[i] = (uint8_t)take(input, 1);
    ssize_t result = send(world->far, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)result;
}

static void read_far(struct world *world)
{
    static uint8_t data[70000];
    ssize_t size = recv(world->far, data, sizeof(data), MSG_DONTWAIT);
    if (size <= 0)
        return;
    REQUIRE(size >= AIOKVM_NET_MIN_FRAME && size <= AIOKVM_NET_MAX_FRAME);
    world->read++;
}

static void step(struct world *world, struct input *input)
{
    uint32_t what = take(input, 1);
    switch (what & 7) {
    case 0:
    case 1:
        send_far(world, input);
        break;
    case 2:
        peer_send(world->peer, input, NULL, 0);
        break;
    case 3:
        for (uint32_t i = 0; i <= what >> 3; i++)
            read_far(world);
        break;
    case 4:
        peer_block(world->peer, what & 8);
        break;
    case 5:
        if (!(what & 0xf8)) {
            close(world->far);
            world->far = -1;
        }
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
    struct world world = { 0 };
    struct sockaddr_un remote;
    uint32_t remote_size;
    int error;
    world.net = aiokvm_net_new(NULL, &error);
    REQUIRE(world.net);
    open_sockets(&world, take(&input, 1), &remote, &remote_size);
    world.end = aiokvm_net_datagram_new(world.net, world.near, remote_size ? &remote : NULL, remote_size, &error);
    world.peer = peer_new(world.net, take(&input, 1) & 31);
    REQUIRE(world.end && !aiokvm_net_link(world.end, &world.peer->end));
    while (input.left)
        step(&world, &input);
    peer_block(world.peer, false);
    serve(world.net, 200);
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(world.end, &stats);
    REQUIRE(stats.sent_frames <= world.peer->received);
    aiokvm_net_free(world.net);
    close(world.near);
    if (world.far >= 0)
        close(world.far);
    return 0;
}
