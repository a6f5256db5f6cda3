/* The nameserver of a guest's network: its questions are the program's to answer, which knows all nameservers of the
 * host. libslirp knows the first of each version of IP, and not whether it is there. What is asked by TCP goes to a
 * service of the program's, at the broadcast address, where libslirp takes one. */
#include "net_slirp_priv.h"

#ifdef AIOKVM_HAVE_SLIRP

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net_packet.h"

enum {
    ETH_SIZE = 14, IP_SIZE = 20, IP6_SIZE = 40, UDP_SIZE = 8, FRAGMENT_SIZE = 8, PORT_DNS = 53,
    PROTOCOL_TCP = 6, PROTOCOL_UDP = 17, PROTOCOL_FRAGMENT = 44, MORE = 0x2000,
    MAX_QUERIES = 64, /* that are not answered yet */
    /* What the program takes for one, at most: it asks one nameserver more each second, for five. */
    QUERY_DESCRIPTORS = 5,
};

struct slirp_query {
    struct slirp_query *next;
    uint32_t id;
    bool is_taken;
    uint32_t headers; /* the length of those of the guest's frame */
    uint8_t head[ETH_SIZE + IP6_SIZE + UDP_SIZE];
    uint32_t size;
    uint8_t data[];
};

static uint32_t broadcast(const struct slirp_guard *guard)
{
    return guard->network | ~guard->netmask;
}

bool slirp_dns_take(struct slirp_end *self, const uint8_t *frame, size_t size)
{
    struct slirp_flow flow;
    uint32_t at = slirp_flow_of(&flow, frame, size, false);
    const struct slirp_guard *guard = &self->guard;
    if (!self->has_dns || !at || flow.is_tcp || net_load16(frame + at + 2) != PORT_DNS)
        return false;
    if (at == ETH_SIZE + IP_SIZE ? net_load32(frame + 30) != guard->nameserver
                                 : memcmp(frame + 38, guard->nameserver6, 16) || !guard->prefix6_length)
        return false;
    uint32_t count = 0, length = net_load16(frame + at + 4);
    struct slirp_query **last = &self->queries;
    for (; *last; last = &(*last)->next)
        count++;
    if (length < UDP_SIZE || length > AIOKVM_NET_SLIRP_MAX_QUERY + UDP_SIZE || at + length > size) {
        self->end.stats.dropped_invalid++;
        return true;
    }
    struct slirp_query *query = NULL;
    if (count < MAX_QUERIES && aiokvm_share_fits(&self->descriptors, QUERY_DESCRIPTORS) &&
        aiokvm_share_fits(&self->bytes, sizeof(*query) + length - UDP_SIZE))
        query = malloc(sizeof(*query) + length - UDP_SIZE);
    if (!query) {
        self->end.stats.dropped_full++;
        return true;
    }
    *query = (struct slirp_query){ .id = ++self->next_query, .headers = at + UDP_SIZE, .size = length - UDP_SIZE };
    memcpy(query->head, frame, query->headers);
    memcpy(query->data, frame + query->headers, query->size);
    *last = query;
    aiokvm_share_add(&self->descriptors, QUERY_DESCRIPTORS);
    aiokvm_share_add(&self->bytes, sizeof(*query) + query->size);
    net_tell(&self->end, AIOKVM_NET_NEWS_READABLE, 0, 0);
    return true;
}

void slirp_dns_free(struct slirp_end *self)
{
    while (self->queries) {
        struct slirp_query *query = self->queries;
        self->queries = query->next;
        free(query);
    }
}

static void move(uint8_t *address, uint32_t to, uint8_t *ip, uint8_t *tcp)
{
    for (uint32_t i = 0; i < 4; i += 2) {
        uint32_t value = i ? to & 0xffff : to >> 16;
        uint8_t old[2] = { address[i], address[i + 1] };
        slirp_replace16(old, value, tcp + 16);
        slirp_replace16(address + i, value, ip + 10);
    }
}

static bool is_tcp(const struct slirp_end *self, const uint8_t *frame, size_t size)
{
    return self->has_dns && size >= ETH_SIZE + IP_SIZE + 20 && net_load16(frame + 12) == 0x0800 && frame[14] == 0x45 &&
           frame[23] == PROTOCOL_TCP;
}

void slirp_dns_to_service(struct slirp_end *self, uint8_t *frame, size_t size)
{
    if (!is_tcp(self, frame, size) || net_load32(frame + 30) != self->guard.nameserver ||
        net_load16(frame + 36) != PORT_DNS)
        return;
    for (const struct slirp_service *service = self->services; service; service = service->next)
        if (service->address == broadcast(&self->guard) && service->port == PORT_DNS)
            move(frame + 30, service->address, frame + 14, frame + 34);
}

void slirp_dns_from_service(struct slirp_end *self, uint8_t *frame, size_t size)
{
    if (is_tcp(self, frame, size) && net_load32(frame + 26) == broadcast(&self->guard) &&
        net_load16(frame + 34) == PORT_DNS)
        move(frame + 26, self->guard.nameserver, frame + 14, frame + 34);
}

/* ---- datagrams that are larger than a frame ---- */

static void seal_ip(uint8_t *ip, uint32_t length, uint32_t fragment)
{
    net_store16(ip + 2, length);
    net_store16(ip + 6, fragment);
    net_store16(ip + 10, 0);
    net_store16(ip + 10, ~slirp_sum(ip, IP_SIZE, 0));
}

void slirp_deliver_datagram(struct slirp_end *self, uint8_t *frame, size_t size)
{
    bool is_ip6 = net_load16(frame + 12) == 0x86dd;
    uint32_t headers = ETH_SIZE + (is_ip6 ? IP6_SIZE : IP_SIZE), extra = is_ip6 ? FRAGMENT_SIZE : 0;
    uint32_t payload = (uint32_t)size - headers, most = (self->mtu - (headers - ETH_SIZE) - extra) & ~7u;
    if (size <= ETH_SIZE + self->mtu) {
        slirp_deliver(self, frame, size);
        return;
    }
    uint8_t *piece = self->piece;
    memcpy(piece, frame, headers);
    if (is_ip6) {
        piece[20] = PROTOCOL_FRAGMENT;
        memset(piece + headers, 0, FRAGMENT_SIZE);
        piece[headers] = frame[20];
        net_store32(piece + headers + 4, ++self->next_fragment);
    } else {
        net_store16(piece + 18, ++self->next_fragment);
    }
    for (uint32_t at = 0; at < payload; at += most) {
        uint32_t length = payload - at < most ? payload - at : most;
        bool more = at + length < payload;
        if (is_ip6) {
            net_store16(piece + 18, length + FRAGMENT_SIZE);
            net_store16(piece + headers + 2, at | more);
        } else {
            seal_ip(piece + ETH_SIZE, IP_SIZE + length, at / 8 | (more ? MORE : 0));
        }
        memcpy(piece + headers + extra, frame + headers + at, length);
        slirp_deliver(self, piece, headers + extra + length);
    }
}

/* ---- for the program ---- */

static void answer(struct slirp_end *self, const struct slirp_query *query, const void *data, uint32_t size)
{
    uint8_t *frame = self->input, *ip = frame + ETH_SIZE, *udp = frame + query->headers - UDP_SIZE;
    bool is_ip = query->headers == ETH_SIZE + IP_SIZE + UDP_SIZE;
    uint32_t length = is_ip ? 4 : 16, at = query->headers - UDP_SIZE;
    const uint8_t *from = query->head + at - 2 * length;
    memcpy(frame, query->head + 6, 6);
    memcpy(frame + 6, query->head, 6);
    memset(ip, 0, at - ETH_SIZE);
    net_store16(frame + 12, is_ip ? 0x0800 : 0x86dd);
    ip[0] = is_ip ? 0x45 : 0x60;
    ip[is_ip ? 8 : 7] = 64;
    ip[is_ip ? 9 : 6] = PROTOCOL_UDP;
    memcpy(frame + at - 2 * length, from + length, length);
    memcpy(frame + at - length, from, length);
    if (is_ip)
        seal_ip(ip, IP_SIZE + UDP_SIZE + size, 0);
    else
        net_store16(ip + 4, UDP_SIZE + size);
    memcpy(udp, query->head + at + 2, 2);
    memcpy(udp + 2, query->head + at, 2);
    net_store16(udp + 4, UDP_SIZE + size);
    net_store16(udp + 6, 0);
    memcpy(udp + UDP_SIZE, data, size);
    uint8_t pseudo[4] = { 0, PROTOCOL_UDP };
    net_store16(pseudo + 2, UDP_SIZE + size);
    uint32_t sum = slirp_sum(pseudo, 4, slirp_sum(frame + at - 2 * length, 2 * length, 0));
    sum = ~slirp_sum(udp, UDP_SIZE + size, sum) & 0xffff;
    net_store16(udp + 6, sum ? sum : 0xffff);
    net_dirty(&self->end);
    slirp_deliver_datagram(self, frame, query->headers + size);
}

int aiokvm_net_slirp_take_query(struct aiokvm_net_end *end, uint32_t *id, void *data)
{
    struct slirp_end *self = (struct slirp_end *)end;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    struct slirp_query *query = self->queries;
    while (query && query->is_taken)
        query = query->next;
    int size = -EAGAIN;
    if (query) {
        query->is_taken = true;
        *id = query->id;
        size = (int)query->size;
        memcpy(data, query->data, query->size);
    }
    net_leave(end->net);
    return size;
}

int aiokvm_net_slirp_answer(struct aiokvm_net_end *end, uint32_t id, const void *data, uint32_t size)
{
    struct slirp_end *self = (struct slirp_end *)end;
    bool is_long = size > AIOKVM_NET_SLIRP_MAX_ANSWER;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    int result = -ENOENT;
    for (struct slirp_query **at = &self->queries; *at; at = &(*at)->next) {
        struct slirp_query *query = *at;
        if (query->id != id)
            continue;
        *at = query->next;
        aiokvm_share_give(&self->descriptors, QUERY_DESCRIPTORS);
        aiokvm_share_give(&self->bytes, sizeof(*query) + query->size);
        end->stats.dropped_invalid += is_long;
        end->stats.dropped_unresolved += !size;
        if (size && !is_long)
            answer(self, query, data, size);
        free(query);
        result = is_long ? -EMSGSIZE : 0;
        break;
    }
    net_leave(end->net);
    return result;
}

#endif
