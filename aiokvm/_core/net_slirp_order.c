/* How many segments of a guest's TCP libslirp keeps because what is before them is missing. It bounds their bytes, not
 * their number, and each takes memory as a whole frame does: of single bytes with gaps a connection could have tens of
 * MiB. It says what is missing at once, each time: that is counted here, by connection. */
#include "net_slirp_priv.h"

#include <string.h>

#include "net_packet.h"

enum {
    ETH_SIZE = 14, IP_SIZE = 20, IP6_SIZE = 40, TCP_SIZE = 20, TCP_RST = 0x04, TCP_ACK = 0x10,
    /* A window has 45 segments of the usual size. */
    MOST_KEPT = 256,
};

/* Where TCP's header is, 0 if it is none; `rest` are the bytes from there on. */
static uint32_t find_tcp(const uint8_t *frame, size_t size, uint32_t *rest)
{
    const uint8_t *ip = frame + ETH_SIZE;
    uint32_t at;
    if (size >= ETH_SIZE + IP_SIZE + TCP_SIZE && net_load16(frame + 12) == 0x0800 && ip[0] == 0x45 && ip[9] == 6) {
        at = ETH_SIZE + IP_SIZE;
        *rest = net_load16(ip + 2) - IP_SIZE;
    } else if (size >= ETH_SIZE + IP6_SIZE + TCP_SIZE && net_load16(frame + 12) == 0x86dd && ip[6] == 6) {
        at = ETH_SIZE + IP6_SIZE;
        *rest = net_load16(ip + 4);
    } else {
        return 0;
    }
    return at + *rest <= size && *rest >= (uint32_t)(frame[at + 12] >> 4) * 4 ? at : 0;
}

static struct slirp_gaps *bucket_of(struct slirp_order *order, const struct slirp_flow *flow)
{
    uint64_t hash = slirp_hash(order->seed, flow, sizeof(*flow));
    return &order->gaps[hash % SLIRP_BUCKETS * SLIRP_WAYS];
}

static struct slirp_gaps *look(struct slirp_order *order, const struct slirp_flow *flow)
{
    struct slirp_gaps *bucket = bucket_of(order, flow);
    for (uint32_t i = 0; i < SLIRP_WAYS; i++)
        if (bucket[i].kept && !memcmp(&bucket[i].flow, flow, sizeof(*flow)))
            return &bucket[i];
    return NULL;
}

uint32_t slirp_make_reset(uint8_t *frame, uint32_t at, uint32_t seq, uint8_t flags)
{
    uint8_t *ip = frame + ETH_SIZE, *tcp = frame + at;
    bool is_ip = at == ETH_SIZE + IP_SIZE;
    net_store16(ip + (is_ip ? 2 : 4), is_ip ? IP_SIZE + TCP_SIZE : TCP_SIZE);
    if (is_ip) {
        net_store16(ip + 10, 0);
        net_store16(ip + 10, ~slirp_sum(ip, IP_SIZE, 0));
    }
    net_store16(tcp + 4, seq >> 16);
    net_store16(tcp + 6, seq);
    tcp[12] = TCP_SIZE / 4 << 4;
    tcp[13] = flags;
    memset(tcp + 16, 0, 4);
    uint8_t pseudo[4] = { 0, 6, 0, TCP_SIZE };
    uint32_t addresses = is_ip ? slirp_sum(ip + 12, 8, 0) : slirp_sum(ip + 8, 32, 0);
    net_store16(tcp + 16, ~slirp_sum(tcp, TCP_SIZE, slirp_sum(pseudo, sizeof(pseudo), addresses)));
    return at + TCP_SIZE;
}

void slirp_order_begin(struct slirp_order *order, const uint8_t *frame, size_t size)
{
    uint32_t rest, at = find_tcp(frame, size, &rest);
    order->is_watching = order->is_missing = false;
    if (!at || rest == (uint32_t)(frame[at + 12] >> 4) * 4)
        return;
    order->is_watching = true;
    order->end = net_load32(frame + at + 4) + rest - (uint32_t)(frame[at + 12] >> 4) * 4;
    slirp_flow_of(&order->flow, frame, size, false);
}

void slirp_order_heard(struct slirp_order *order, const uint8_t *frame, size_t size)
{
    uint32_t rest, at;
    if ((!order->is_watching && !order->count) || !(at = find_tcp(frame, size, &rest)) || !(frame[at + 13] & TCP_ACK))
        return;
    struct slirp_flow flow;
    uint32_t next = net_load32(frame + at + 8);
    slirp_flow_of(&flow, frame, size, true);
    if (order->is_watching && !memcmp(&flow, &order->flow, sizeof(flow))) {
        order->is_missing = (int32_t)(next - order->end) < 0;
        order->next = next;
    }
    struct slirp_gaps *gaps = order->count ? look(order, &flow) : NULL;
    if (gaps && (int32_t)(next - gaps->end) >= 0) {
        gaps->kept = 0;
        order->count--;
    }
}

uint32_t slirp_order_end(struct slirp_order *order, uint8_t *frame, size_t size)
{
    bool is_missing = order->is_watching && order->is_missing;
    order->is_watching = false;
    if (!is_missing)
        return 0;
    struct slirp_gaps *gaps = look(order, &order->flow), *bucket = bucket_of(order, &order->flow);
    for (uint32_t i = 0; i < SLIRP_WAYS && !gaps; i++)
        if (!bucket[i].kept) {
            gaps = &bucket[i];
            *gaps = (struct slirp_gaps){ .flow = order->flow, .end = order->end };
            order->count++;
        }
    if (gaps && (int32_t)(order->end - gaps->end) > 0)
        gaps->end = order->end;
    if (gaps && ++gaps->kept <= MOST_KEPT)
        return 0;
    if (gaps) {
        gaps->kept = 0;
        order->count--;
    }
    /* A reset in the name of the guest, at the place where it is believed: libslirp gives all of it up. */
    uint32_t rest;
    return slirp_make_reset(frame, find_tcp(frame, size, &rest), order->next, TCP_RST);
}
