/* net_port.c under libFuzzer: the input is what the peer sends and takes, and what the program takes, gives back and
 * sends, right or wrong.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_port.c
 * Sources: net_end.c net_gather.c net_queue.c net_rules.c budget.c clock.c pace.c ratelimit.c
 * Runs: 30000
 */
#include <errno.h>

#include "net_fuzz.h"
#include "net_port.h"

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *port;
    struct peer *peer;
};

/* A batch is frames one behind the other, each readable to its end. */
static void take_batch(struct world *world, struct input *input)
{
    struct aiokvm_net_port_batch batch;
    int count = aiokvm_net_port_take(world->port, take(input, 2) % 300, &batch);
    REQUIRE(count >= 0 && count <= AIOKVM_NET_PORT_BATCH && (uint32_t)count == batch.count);
    uint32_t begin = 0;
    for (int i = 0; i < count; begin = batch.ends[i++]) {
        uint32_t size = batch.ends[i] - begin;
        REQUIRE(size >= AIOKVM_NET_MIN_FRAME && size <= AIOKVM_NET_MAX_FRAME);
        uint8_t *copy = malloc(size);
        REQUIRE(copy);
        memcpy(copy, batch.data + begin, size);
        free(copy);
    }
    REQUIRE(count < 2 || begin <= AIOKVM_NET_PORT_BATCH_BYTES);
    aiokvm_net_port_release(world->port, take(input, 1) & 3 ? (uint32_t)count : take(input, 2));
}

/* The frames lie in an allocation of exactly their sizes. */
static void send_batch(struct world *world, struct input *input)
{
    uint32_t sizes[40], count = take(input, 1) % 40, all = 0;
    struct aiokvm_net_port_header headers[40];
    bool plain = take(input, 1) & 1;
    for (uint32_t i = 0; i < count; i++) {
        sizes[i] = take(input, 2) + (plain ? AIOKVM_NET_MIN_FRAME : 0);
        headers[i] = (struct aiokvm_net_port_header){
            .flags = (uint8_t)take(input, 1), .gso_type = (uint8_t)take(input, 1),
            .gso_size = (uint16_t)take(input, 2), .csum_start = (uint16_t)take(input, 1),
            .csum_offset = (uint16_t)take(input, 1),
        };
        all += sizes[i];
    }
    uint8_t *data = calloc(1, all + 1);
    REQUIRE(data);
    uint32_t given = take(input, 1);
    for (uint32_t i = 0; i < given && i < all; i++)
        data[i] = (uint8_t)take(input, 1);
    int sent = aiokvm_net_port_send(world->port, data, sizes, plain ? NULL : headers, count);
    REQUIRE(sent == -EINVAL || (sent >= 0 && (uint32_t)sent <= count));
    free(data);
}

static void step(struct world *world, struct input *input)
{
    uint32_t what = take(input, 1);
    switch (what & 7) {
    case 0:
    case 1:
        for (uint32_t i = 0; i <= what >> 4; i++)
            peer_send(world->peer, input, NULL, 0);
        break;
    case 2:
    case 3:
        take_batch(world, input);
        break;
    case 4:
        send_batch(world, input);
        break;
    case 5:
        peer_block(world->peer, what & 8);
        break;
    case 6:
        if (what & 8) {
            aiokvm_net_unlink(world->port);
            REQUIRE(!aiokvm_net_link(world->port, &world->peer->end));
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
    world.net = aiokvm_net_new(NULL, &error);
    REQUIRE(world.net);
    uint32_t options = take(&input, 1);
    struct aiokvm_net_port_config config = {
        .depth = 1 + take(&input, 1), .bytes = AIOKVM_NET_MAX_FRAME + take(&input, 2), .offloads = options & 31,
        .drop = options >> 5 & 1,
    };
    world.port = aiokvm_net_port_new(world.net, &config, &error);
    world.peer = peer_new(world.net, take(&input, 1) & 31);
    REQUIRE(world.port && !aiokvm_net_link(world.port, &world.peer->end));
    while (input.left)
        step(&world, &input);
    peer_block(world.peer, false);
    serve(world.net, 200);
    aiokvm_net_free(world.net);
    return 0;
}
