/* net_filter.c and net_packet.c under libFuzzer: the input is frames in both directions, answers and other rules.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_end.c net_gather.c net_rules.c budget.c clock.c pace.c ratelimit.c
 */
#include "net_filter.h"
#include "net_fuzz.h"

/* Any bytes are a rule, but that counts of bits are those of the address. */
static void make_rules(struct input *input, struct aiokvm_net_rule rules[4])
{
    for (int i = 0; i < 4; i++) {
        uint8_t *at = (uint8_t *)&rules[i];
        uint32_t kind = take(input, 1);
        memset(&rules[i], 0, sizeof(rules[i]));
        for (size_t j = 0; kind & 8 && j < sizeof(rules[i]); j++)
            at[j] = (uint8_t)take(input, 1);
        rules[i].has = (uint16_t)take(input, 2);
        rules[i].verdict = kind % 3;
        rules[i].directions = kind >> 4 & 3;
        rules[i].address_size = kind & 64 ? 16 : 4;
        rules[i].src_bits = (uint8_t)(rules[i].src_bits % (rules[i].address_size * 8 + 1));
        rules[i].dst_bits = (uint8_t)(rules[i].dst_bits % (rules[i].address_size * 8 + 1));
    }
}

/* In memory of exactly its size, with a beginning that is more often IP than not. */
static void send_frame(struct input *input, struct aiokvm_net_end *from)
{
    static const uint16_t TYPES[] = { 0x800, 0x86dd, 0x8100, 0x806 };
    uint32_t kind = take(input, 1), size = AIOKVM_NET_MIN_FRAME + take(input, 1);
    uint8_t *head = malloc(size);
    REQUIRE(head);
    for (uint32_t i = 12; i < size; i++)
        head[i] = (uint8_t)take(input, 1);
    memset(head, 0, 12);
    if (kind & 1) {
        head[12] = (uint8_t)(TYPES[kind >> 1 & 3] >> 8);
        head[13] = (uint8_t)TYPES[kind >> 1 & 3];
    }
    if (kind & 8 && size > 14)
        head[14] = kind & 2 ? 0x60 : 0x45;
    struct iovec iov[3] = { [1] = { head, size < NET_HEAD ? size : NET_HEAD } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = size };
    if (size > NET_HEAD) {
        iov[2] = (struct iovec){ head + NET_HEAD, size - NET_HEAD };
        frame.count = 2;
    }
    REQUIRE(net_enter(from->net));
    net_send(from, &frame);
    net_leave(from->net);
    free(head);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    struct aiokvm_net_rule rules[4];
    int error;
    static struct aiokvm_net *net;
    if (!net)
        net = aiokvm_net_new(NULL, &error);
    struct aiokvm_net_end *ends[] = { &peer_new(net, 31)->end, &peer_new(net, 31)->end };
    REQUIRE(!aiokvm_net_link(ends[0], ends[1]));
    make_rules(&input, rules);
    struct aiokvm_net_filter *filter = aiokvm_net_filter_new(ends[0], rules, 4, &error);
    aiokvm_net_set_policy(ends[0], filter, NULL, NULL, NULL);
    while (input.left) {
        struct aiokvm_net_flow flow;
        uint8_t frame[64];
        switch (take(&input, 1) % 8) {
        case 0:
            while (aiokvm_net_filter_take(filter, &flow, frame, sizeof(frame)) == 1)
                REQUIRE(!aiokvm_net_filter_decide(filter, flow.id, take(&input, 1) & 1));
            break;
        case 1:
            make_rules(&input, rules);
            REQUIRE(!aiokvm_net_filter_replace(filter, rules, 4));
            break;
        case 2:
            aiokvm_net_filter_forget(filter, take(&input, 2));
            break;
        default:
            send_frame(&input, ends[take(&input, 1) & 1]);
        }
    }
    for (int i = 0; i < 2; i++)
        aiokvm_net_end_free(ends[i]);
    aiokvm_net_filter_free(filter);
    return 0;
}
