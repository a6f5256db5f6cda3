/* net_switch.c under libFuzzer: the input is what ports there are, and what their peers send and take. Who sent a frame
 * is the last byte of its source address: nobody hears himself, no isolated port another, no VLAN another.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_end.c net_gather.c net_rules.c net_switch.c net_switch_table.c budget.c clock.c pace.c ratelimit.c
 * Runs: 8000
 */
#include "net_fuzz.h"
#include "net_switch.h"

enum { PORTS = 6 };

struct bench {
    struct aiokvm_net *net;
    struct aiokvm_net_switch *sw;
    struct aiokvm_net_switch_port_config configs[PORTS];
    uint16_t trunks[PORTS][3];
    struct aiokvm_net_end *ports[PORTS];
    struct peer *peers[PORTS];
};

static struct bench *bench;
static uint64_t now;

static uint64_t clock_ns(void)
{
    return now;
}

static bool is_in(const struct aiokvm_net_switch_port_config *port, uint32_t vlan)
{
    if (port->vlan == vlan)
        return true;
    for (uint32_t i = 0; i < port->trunks; i++)
        if (port->trunk[i] == vlan)
            return true;
    return false;
}

static void check(struct peer *peer, const uint8_t *data, uint32_t size)
{
    REQUIRE(size >= AIOKVM_NET_MIN_FRAME);
    uint32_t sender = data[11];
    REQUIRE(sender < PORTS && sender != peer->number);
    const struct aiokvm_net_switch_port_config *from = &bench->configs[sender], *to = &bench->configs[peer->number];
    REQUIRE(!from->isolated || !to->isolated);
    bool from_open = !from->vlan && !from->trunks, to_open = !to->vlan && !to->trunks;
    REQUIRE(from_open == to_open);
    if (from_open)
        return;
    bool shared = false;
    for (uint32_t vlan = 1; vlan < 6; vlan++)
        shared |= is_in(from, vlan) && is_in(to, vlan);
    REQUIRE(shared);
    if (from->vlan && !from->trunks && to->vlan && !to->trunks)
        REQUIRE(from->vlan == to->vlan);
}

static void plug(uint32_t index)
{
    int error;
    bench->ports[index] = aiokvm_net_switch_port_new(bench->sw, &bench->configs[index], &error);
    bench->peers[index] = peer_new(bench->net, 0);
    REQUIRE(bench->ports[index]);
    bench->peers[index]->number = index;
    bench->peers[index]->check = check;
    bench->peers[index]->end.offloads = index * 7 & 31;
    REQUIRE(!aiokvm_net_link(bench->ports[index], &bench->peers[index]->end));
}

static void unplug(uint32_t index, bool peer_first)
{
    if (peer_first)
        aiokvm_net_end_free(&bench->peers[index]->end);
    aiokvm_net_end_free(bench->ports[index]);
    if (!peer_first)
        aiokvm_net_end_free(&bench->peers[index]->end);
}

/* Addresses are few, so that they are learned; tags are of VLANs that there are, more often than not. */
static void say(uint32_t index, struct input *input)
{
    uint8_t head[24] = { 0 };
    uint32_t to = take(input, 1), tag = take(input, 1), size = 14;
    memset(head, to & 0x40 ? 0xff : 0, 6);
    if (!(to & 0x40)) {
        head[0] = to & 0x80 ? 0x01 : 0x02;
        head[5] = (uint8_t)(to % 8);
    }
    memcpy(head + 6, "\x02\x00\x00\x00\x00", 5);
    if (to & 0x20)
        head[8] = (uint8_t)take(input, 1);
    head[11] = (uint8_t)index;
    if (tag & 1) {
        memcpy(head + 12, "\x81\x00", 2);
        head[14] = (uint8_t)(tag & 0xe0);
        head[15] = (uint8_t)(tag >> 1 & 7);
        size = 18;
    }
    memcpy(head + size - 2, tag & 16 ? "\x81\x00" : "\x08\x00", 2);
    peer_send(bench->peers[index], input, head, size);
}

static void step(struct input *input)
{
    uint32_t what = take(input, 1), index = (what >> 3) % PORTS;
    switch (what & 7) {
    case 0 ... 3:
        say(index, input);
        break;
    case 4:
        peer_block(bench->peers[index], what & 0x80);
        break;
    case 5:
        if (what & 0x80) {
            unplug(index, what & 0x40);
            plug(index);
        }
        break;
    case 6:
        now += take(input, 1) * UINT64_C(1000000000);
        break;
    default:
        serve(bench->net, 1 + (what >> 3));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    struct bench made = { 0 };
    int error;
    bench = &made;
    now = UINT64_C(1000000000000);
    made.net = aiokvm_net_new(NULL, &error);
    REQUIRE(made.net);
    struct aiokvm_net_switch_config config = { .ageing_ns = UINT64_C(300000000000), .now_ns = clock_ns };
    made.sw = aiokvm_net_switch_new(made.net, &config, &error);
    REQUIRE(made.sw);
    for (uint32_t i = 0; i < PORTS; i++) {
        uint32_t kind = take(&input, 1);
        made.configs[i].vlan = kind & 1 ? 1 + (kind >> 1 & 3) : 0;
        made.configs[i].isolated = kind >> 3 & 1;
        made.configs[i].trunks = kind & 16 ? 3 : 0;
        for (uint32_t j = 0; j < 3; j++)
            made.trunks[i][j] = (uint16_t)(1 + (kind >> 5) % 2 + j);
        made.configs[i].trunk = made.trunks[i];
        plug(i);
    }
    while (input.left)
        step(&input);
    for (uint32_t i = 0; i < PORTS; i++)
        peer_block(made.peers[i], false);
    serve(made.net, 200);
    aiokvm_net_switch_free(made.sw);
    aiokvm_net_free(made.net);
    return 0;
}
