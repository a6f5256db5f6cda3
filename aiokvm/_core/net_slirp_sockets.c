/* The sockets that libslirp has for a guest's TCP connections and UDP ports, by what the guest calls them. libslirp
 * does not say when a connection ends, how, or for how long nobody has said anything: that is seen here, in what the
 * guest sends and gets. */
#include "net_slirp_priv.h"

#include <string.h>

#include "net_packet.h"

enum {
    ETH_SIZE = 14, IP_SIZE = 20, IP6_SIZE = 40, TCP_SIZE = 20, UDP_SIZE = 8, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17,
    TCP_FIN = 0x01, TCP_SYN = 0x02, TCP_RST = 0x04, TCP_ACK = 0x10,
};

/* A connection that is closed at one side, RFC 5382, section 5, and one that is not. */
static const uint64_t HALF_NS = UINT64_C(240000000000), WHOLE_NS = UINT64_C(7440000000000);
/* Who closes may say its last word before another gets the place. */
static const uint64_t LAST_WORD_NS = UINT64_C(1000000000);

uint32_t slirp_flow_of(struct slirp_flow *flow, const uint8_t *frame, size_t size, bool to_guest)
{
    const uint8_t *ip = frame + ETH_SIZE;
    uint32_t at, length, protocol;
    if (size >= ETH_SIZE + IP_SIZE + UDP_SIZE && net_load16(frame + 12) == 0x0800 && ip[0] == 0x45) {
        if (net_load16(ip + 6) & 0x1fff)
            return 0;
        at = ETH_SIZE + IP_SIZE;
        protocol = ip[9];
        length = 4;
    } else if (size >= ETH_SIZE + IP6_SIZE + UDP_SIZE && net_load16(frame + 12) == 0x86dd) {
        at = ETH_SIZE + IP6_SIZE;
        protocol = ip[6];
        length = 16;
    } else {
        return 0;
    }
    if (protocol != PROTOCOL_UDP && (protocol != PROTOCOL_TCP || size < at + TCP_SIZE))
        return 0;
    const uint8_t *from = frame + at - 2 * length, *to = from + length, *ports = frame + at;
    memset(flow, 0, sizeof(*flow));
    memcpy(flow->guest, to_guest ? to : from, length);
    memcpy(flow->guest_port, ports + (to_guest ? 2 : 0), 2);
    if (protocol == PROTOCOL_UDP)
        return at;
    /* A port of UDP has one socket, whoever it speaks to. */
    flow->is_tcp = true;
    memcpy(flow->other, to_guest ? from : to, length);
    memcpy(flow->other_port, ports + (to_guest ? 0 : 2), 2);
    return at;
}

uint64_t slirp_hash(uint64_t seed, const void *data, size_t size)
{
    for (size_t i = 0; i < size; i += 4) {
        seed = (seed ^ net_load32((const uint8_t *)data + i)) * UINT64_C(0x9e3779b97f4a7c15);
        seed ^= seed >> 29;
    }
    return seed;
}

static struct slirp_socket **bucket_of(struct slirp_sockets *sockets, const struct slirp_flow *flow)
{
    return &sockets->buckets[slirp_hash(sockets->seed, flow, sizeof(*flow)) % SLIRP_SOCKET_BUCKETS];
}

static bool is_same(const struct slirp_flow *one, const struct slirp_flow *other)
{
    return !memcmp(one, other, sizeof(*one));
}

struct slirp_socket *slirp_sockets_find(struct slirp_sockets *sockets, const struct slirp_flow *flow)
{
    if (sockets->last && is_same(&sockets->last->flow, flow))
        return sockets->last;
    struct slirp_socket *at = *bucket_of(sockets, flow);
    while (at && !is_same(&at->flow, flow))
        at = at->next;
    if (at)
        sockets->last = at;
    return at;
}

static void add(struct slirp_sockets *sockets, struct slirp_socket *socket)
{
    struct slirp_socket **bucket = bucket_of(sockets, &socket->flow);
    socket->next = *bucket;
    *bucket = socket;
    sockets->last = socket;
}

void slirp_sockets_begin(struct slirp_sockets *sockets, struct slirp_socket *socket, const uint8_t *frame,
                         size_t size)
{
    uint32_t at = slirp_flow_of(&socket->flow, frame, size, false);
    if (!at)
        return;
    /* One to a service has been made when there is a socket: this is the guest's last word of that. */
    if (socket->flow.is_tcp && (frame[at + 13] & (TCP_SYN | TCP_ACK)) == TCP_ACK) {
        socket->is_connected = true;
        socket->from_guest = net_load32(frame + at + 4);
        socket->to_guest = net_load32(frame + at + 8);
    }
    add(sockets, socket);
}

void slirp_sockets_remove(struct slirp_sockets *sockets, struct slirp_socket *socket)
{
    if (sockets->last == socket)
        sockets->last = NULL;
    for (struct slirp_socket **at = bucket_of(sockets, &socket->flow); *at; at = &(*at)->next)
        if (*at == socket) {
            *at = socket->next;
            break;
        }
}

static uint32_t data_of(const uint8_t *frame, uint32_t at)
{
    uint32_t all = at == ETH_SIZE + IP_SIZE ? net_load16(frame + 16) - IP_SIZE : net_load16(frame + 18);
    uint32_t header = (uint32_t)(frame[at + 12] >> 4) * 4;
    return all > header ? all - header : 0;
}

bool slirp_sockets_heard(struct slirp_sockets *sockets, const uint8_t *frame, size_t size, uint64_t now_ns)
{
    struct slirp_flow flow;
    uint32_t at = slirp_flow_of(&flow, frame, size, false);
    if (!at || !flow.is_tcp)
        return false;
    struct slirp_socket *socket = slirp_sockets_find(sockets, &flow);
    if (socket) {
        socket->heard_ns = now_ns;
        socket->is_half |= frame[at + 13] & TCP_FIN;
    }
    return frame[at + 13] & TCP_RST;
}

void slirp_sockets_told(struct slirp_sockets *sockets, const uint8_t *frame, size_t size, uint64_t now_ns)
{
    struct slirp_flow flow;
    uint32_t at = slirp_flow_of(&flow, frame, size, true);
    if (!at || !flow.is_tcp)
        return;
    const uint8_t *tcp = frame + at;
    uint32_t flags = tcp[13];
    struct slirp_socket *socket = sockets->unnamed;
    if (socket && (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) {
        sockets->unnamed = NULL;
        socket->flow = flow;
        add(sockets, socket);
    } else {
        socket = slirp_sockets_find(sockets, &flow);
    }
    if (!socket || flags & TCP_RST)
        return;
    uint32_t end = net_load32(tcp + 4) + data_of(frame, at) + !!(flags & TCP_SYN) + !!(flags & TCP_FIN);
    if (!socket->is_connected || (int32_t)(end - socket->to_guest) > 0)
        socket->to_guest = end;
    socket->is_connected = true;
    socket->heard_ns = now_ns;
    if (flags & TCP_ACK)
        socket->from_guest = net_load32(tcp + 8);
    if (flags & TCP_FIN)
        socket->is_half = socket->is_told = true;
}

struct slirp_socket *slirp_sockets_idle(struct slirp_sockets *sockets, uint64_t now_ns, bool is_full)
{
    struct slirp_socket *found = NULL;
    for (uint32_t i = 0; i < SLIRP_SOCKET_BUCKETS; i++)
        for (struct slirp_socket *at = sockets->buckets[i]; at; at = at->next) {
            uint64_t most_ns = !at->is_half ? WHOLE_NS : is_full ? LAST_WORD_NS : HALF_NS;
            if (at->flow.is_tcp && at->is_connected && now_ns >= at->heard_ns + most_ns &&
                (!found || at->heard_ns < found->heard_ns))
                found = at;
        }
    return found;
}

struct slirp_socket *slirp_sockets_by_id(struct slirp_sockets *sockets, uint32_t id)
{
    for (uint32_t i = 0; i < SLIRP_SOCKET_BUCKETS; i++)
        for (struct slirp_socket *at = sockets->buckets[i]; at; at = at->next)
            if (at->id == id)
                return at;
    return NULL;
}

uint32_t slirp_socket_reset(const struct slirp_socket *socket, bool to_guest, uint8_t frame[SLIRP_RESET6_SIZE])
{
    static const uint8_t NOTHING[12];
    const struct slirp_flow *flow = &socket->flow;
    bool is_ip = !memcmp(flow->guest + 4, NOTHING, sizeof(NOTHING));
    uint32_t length = is_ip ? 4 : 16, at = ETH_SIZE + (is_ip ? IP_SIZE : IP6_SIZE);
    uint8_t *ip = frame + ETH_SIZE, *tcp = frame + at;
    memset(frame, 0, SLIRP_RESET6_SIZE);
    memcpy(frame, "\x52\x55", 2);
    memcpy(frame + 6, "\x52\x55", 2);
    net_store16(frame + 12, is_ip ? 0x0800 : 0x86dd);
    ip[0] = is_ip ? 0x45 : 0x60;
    ip[is_ip ? 8 : 7] = 64;
    ip[is_ip ? 9 : 6] = PROTOCOL_TCP;
    memcpy(tcp - 2 * length, to_guest ? flow->other : flow->guest, length);
    memcpy(tcp - length, to_guest ? flow->guest : flow->other, length);
    memcpy(tcp, to_guest ? flow->other_port : flow->guest_port, 2);
    memcpy(tcp + 2, to_guest ? flow->guest_port : flow->other_port, 2);
    net_store32(tcp + 8, to_guest ? socket->from_guest : socket->to_guest);
    return slirp_make_reset(frame, at, to_guest ? socket->to_guest : socket->from_guest, TCP_RST | TCP_ACK);
}
