/* What of a guest's frames gets to libslirp. It has had its share of errors with lengths, lets a guest address the
 * host's loopback, and does not bound sockets. */
#include "net_slirp_priv.h"

#include <arpa/inet.h>
#include <string.h>

#include "net_checksum.h"
#include "net_packet.h"

enum {
    ETH_SIZE = 14, IP_SIZE = 20, IP6_SIZE = 40, ARP_SIZE = 28, TCP_SIZE = 20, UDP_SIZE = 8, ICMP_SIZE = 8,
    ETHERTYPE_IP = 0x0800, ETHERTYPE_ARP = 0x0806, ETHERTYPE_IP6 = 0x86dd,
    PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17, PROTOCOL_ICMP6 = 58,
    TCP_FIN = 0x01, TCP_SYN = 0x02, TCP_ACK = 0x10, TCP_URG = 0x20,
    TCP_END = 0, TCP_NOP = 1, TCP_MSS = 2, /* options */
    MIN_MSS = 536, MIN_MSS6 = 1220,
    ICMP_ECHO = 8, ICMP6_ECHO = 128, NDP_FIRST = 133, NDP_LAST = 137,
    PORT_DNS = 53, PORT_BOOTP = 67, PORT_TFTP = 69, PORT_DHCP6 = 547,
};

/* ---- checksums, RFC 1071 ---- */

static uint32_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint32_t)sum;
}

uint32_t slirp_sum(const uint8_t *data, size_t size, uint32_t sum)
{
    struct net_sum own = { 0 };
    net_sum_add(&own, data, size);
    return fold((uint64_t)sum + ntohs(net_sum_fold(&own)));
}

void slirp_replace16(uint8_t *at, uint32_t value, uint8_t *checksum)
{
    net_store16(checksum, ~fold((~net_load16(checksum) & 0xffff) + (~net_load16(at) & 0xffff) + value));
    net_store16(at, value);
}

static void fill_checksum(const struct virtio_net_hdr_v1 *hdr, uint8_t *frame, uint32_t size)
{
    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
        return;
    uint8_t *at = frame + hdr->csum_start + hdr->csum_offset;
    /* The sum of the pseudo header stands there already. */
    uint32_t sum = ~slirp_sum(frame + hdr->csum_start, size - hdr->csum_start, 0) & 0xffff;
    net_store16(at, sum ? sum : 0xffff);
}

/* ---- the host's loopback ----
 *
 * libslirp could leave it out, and would leave out the answers to what comes from there to a forwarded UDP port. */

/* How long an answer may take; libslirp forgets what is older. */
static const uint64_t ANSWER_NS = UINT64_C(240000000000);

static uint32_t place_of(uint64_t peer)
{
    return (uint32_t)(peer * UINT64_C(0x9e3779b97f4a7c15) >> 32) % SLIRP_PEERS;
}

/* `guest`: its address, of IPv6 the end. */
static uint64_t peer(uint32_t guest, uint32_t port, uint32_t guest_port)
{
    return (uint64_t)guest << 32 | port << 16 | guest_port;
}

static bool is_inside(const struct slirp_guard *guard, uint32_t address)
{
    return address == guard->host || (guard->netmask && (address & guard->netmask) == guard->network);
}

void slirp_guard_heard(struct slirp_guard *guard, const uint8_t *frame, size_t size, uint64_t now_ns)
{
    const uint8_t *ip = frame + ETH_SIZE, *udp;
    uint64_t heard;
    if (size >= ETH_SIZE + IP_SIZE + UDP_SIZE && net_load16(frame + 12) == ETHERTYPE_IP && ip[9] == PROTOCOL_UDP &&
        is_inside(guard, net_load32(ip + 12)) && !(net_load16(ip + 6) & 0x1fff)) {
        udp = ip + IP_SIZE;
        heard = peer(net_load32(ip + 16), net_load16(udp), net_load16(udp + 2));
    } else if (size >= ETH_SIZE + IP6_SIZE + UDP_SIZE && net_load16(frame + 12) == ETHERTYPE_IP6 &&
               ip[6] == PROTOCOL_UDP && !memcmp(ip + 8, guard->host6, 16)) {
        udp = ip + IP6_SIZE;
        heard = peer(net_load32(ip + 36), net_load16(udp), net_load16(udp + 2));
    } else {
        return;
    }
    guard->peers[place_of(heard)] = heard;
    guard->heard_ns[place_of(heard)] = now_ns;
}

/* A SYN. No TCP begins with both: libslirp sends a reset. */
static enum slirp_verdict refuse(uint8_t *tcp)
{
    slirp_replace16(tcp + 12, net_load16(tcp + 12) | TCP_FIN, tcp + 16);
    return SLIRP_REFUSE;
}

static bool is_syn(const uint8_t *tcp)
{
    return (tcp[13] & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static bool is_answer(const struct slirp_guard *guard, const struct slirp_load *load, uint32_t guest,
                      const uint8_t *udp)
{
    uint64_t answered = peer(guest, net_load16(udp + 2), net_load16(udp));
    uint32_t place = place_of(answered);
    return guard->peers[place] == answered && load->now_ns - guard->heard_ns[place] < ANSWER_NS;
}

/* To an address of the guest's network that neither the router has, nor the nameserver, nor a service: the host's
 * network may have one like it, which is not what is meant. Connections from there are answered. */
static enum slirp_verdict to_nobody(const struct slirp_guard *guard, const struct slirp_load *load, uint32_t guest,
                                    uint32_t protocol, uint8_t *payload)
{
    if (protocol == PROTOCOL_TCP)
        return is_syn(payload) ? refuse(payload) : SLIRP_PASS;
    return protocol == PROTOCOL_UDP && is_answer(guard, load, guest, payload) ? SLIRP_PASS : SLIRP_DENY;
}

/* To an address that libslirp takes for the loopback's. */
static enum slirp_verdict to_loopback(const struct slirp_guard *guard, const struct slirp_load *load, uint32_t guest,
                                      uint32_t protocol, uint8_t *payload)
{
    if (guard->host_loopback)
        return SLIRP_PASS;
    if (protocol == PROTOCOL_UDP)
        return is_answer(guard, load, guest, payload) ? SLIRP_PASS : SLIRP_DENY;
    return is_syn(payload) ? refuse(payload) : SLIRP_PASS; /* of a connection from there */
}

/* ---- IP ---- */

/* No host takes less than 576 bytes, or 1280 by IPv6: RFC 9293, section 3.7.1. A guest that says so would have a
 * packet for each few bytes that come. */
static void raise_mss(uint8_t *tcp, uint32_t length, uint32_t least)
{
    for (uint32_t at = TCP_SIZE; at < length && tcp[at] != TCP_END;) {
        if (tcp[at] == TCP_NOP) {
            at++;
            continue;
        }
        if (at + 2 > length || tcp[at + 1] < 2 || at + tcp[at + 1] > length)
            return;
        if (tcp[at] == TCP_MSS && tcp[at + 1] == 4 && net_load16(tcp + at + 2) < least) {
            /* Checksums are of words, and an option may begin anywhere. */
            for (uint32_t i = 0; i < 2; i++) {
                uint32_t byte = at + 2 + i, value = i ? least & 0xff : least >> 8, word = net_load16(tcp + (byte & ~1u));
                word = byte & 1 ? (word & 0xff00) | value : (word & 0xff) | value << 8;
                slirp_replace16(tcp + (byte & ~1u), word, tcp + 16);
            }
        }
        at += tcp[at + 1];
    }
}

static enum slirp_verdict of_tcp(const struct slirp_load *load, uint8_t *tcp, uint32_t size, uint32_t least_mss)
{
    if (size < TCP_SIZE)
        return SLIRP_INVALID;
    uint32_t length = (uint32_t)(tcp[12] >> 4) * 4;
    if (length < TCP_SIZE || length > size)
        return SLIRP_INVALID;
    if (is_syn(tcp) && load->tcp_full)
        return SLIRP_FULL;
    if (tcp[13] & TCP_SYN)
        raise_mss(tcp, length, least_mss);
    /* Urgent data is data: what libslirp does with it is little tried. */
    if (tcp[13] & TCP_URG) {
        slirp_replace16(tcp + 12, net_load16(tcp + 12) & ~(uint32_t)TCP_URG, tcp + 16);
        slirp_replace16(tcp + 18, 0, tcp + 16);
    }
    return SLIRP_PASS;
}

/* Where a connection to it would be one to the host itself, or to nobody in particular. */
static bool is_denied(uint32_t address)
{
    uint32_t top = address >> 24;
    return top == 0 || top == 127 || top >= 224;
}

static enum slirp_verdict of_ip(const struct slirp_guard *guard, const struct slirp_load *load, uint8_t *ip,
                                uint32_t size, bool is_large)
{
    if (size < IP_SIZE || size > UINT16_MAX || ip[0] >> 4 != 4)
        return SLIRP_INVALID;
    /* Options are for routers. */
    if ((ip[0] & 15) != 5)
        return SLIRP_UNSUPPORTED;
    uint32_t length = net_load16(ip + 2);
    if (is_large && length != size) {
        /* Some drivers leave it to the device. */
        slirp_replace16(ip + 2, size, ip + 10);
        length = size;
    }
    if (length < IP_SIZE || length > size)
        return SLIRP_INVALID;
    uint32_t to = net_load32(ip + 16), protocol = ip[9], rest = length - IP_SIZE;
    uint8_t *payload = ip + IP_SIZE;
    /* What libslirp answers itself: to others the port is one like any, and takes a socket. */
    bool is_dhcp = protocol == PROTOCOL_UDP && rest >= UDP_SIZE && net_load16(payload + 2) == PORT_BOOTP &&
                   (to == guard->host || to == UINT32_MAX);
    if (is_denied(to) && !(to == UINT32_MAX && is_dhcp))
        return SLIRP_DENY;
    if (net_load16(ip + 6) & 0x3fff)
        return length > IP_SIZE ? SLIRP_FRAGMENT : SLIRP_INVALID;
    enum slirp_verdict verdict;
    bool is_service = protocol == PROTOCOL_TCP && load->is_service;
    bool is_nobody = is_inside(guard, to) && to != guard->host && to != guard->nameserver && !is_service;
    if (protocol == PROTOCOL_TCP) {
        verdict = of_tcp(load, payload, rest, MIN_MSS);
        if (!verdict && guard->restricted && is_syn(payload) && !is_service)
            return refuse(payload);
        if (!verdict && is_nobody)
            verdict = to_nobody(guard, load, net_load32(ip + 12), protocol, payload);
        if (!verdict && to == guard->host)
            verdict = to_loopback(guard, load, net_load32(ip + 12), protocol, payload);
        return verdict;
    }
    if (protocol == PROTOCOL_UDP) {
        if (rest < UDP_SIZE || net_load16(payload + 4) < UDP_SIZE)
            return SLIRP_INVALID;
        if (is_dhcp)
            return SLIRP_PASS;
        if (net_load16(payload + 2) == PORT_TFTP && to == guard->host)
            return SLIRP_UNSUPPORTED;
        if (guard->restricted)
            return SLIRP_DENY;
        if (is_nobody && (verdict = to_nobody(guard, load, net_load32(ip + 12), protocol, payload)))
            return verdict;
        verdict = to == guard->host ? to_loopback(guard, load, net_load32(ip + 12), protocol, payload) : SLIRP_PASS;
        return verdict || !load->other_full ? verdict : SLIRP_FULL;
    }
    if (protocol == PROTOCOL_ICMP) {
        if (rest < ICMP_SIZE)
            return SLIRP_INVALID;
        bool is_ours = to == guard->host || to == guard->nameserver;
        if (!is_ours && (is_nobody || guard->restricted))
            return SLIRP_DENY;
        return payload[0] == ICMP_ECHO && load->other_full && !is_ours ? SLIRP_FULL : SLIRP_PASS;
    }
    return SLIRP_UNSUPPORTED;
}

/* Of ::/96, which has :: and ::1, of ::ffff:0:0/96, which are IPv4 addresses, or fe80::/10. */
static bool is_denied6(const uint8_t *address)
{
    static const uint8_t ZEROES[10];
    uint32_t next = net_load16(address + 10);
    if (!memcmp(address, ZEROES, sizeof(ZEROES)) && (next == 0 || next == 0xffff))
        return true;
    return address[0] == 0xfe && (address[1] & 0xc0) == 0x80;
}

/* Whether libslirp takes it for ::1: all of the prefix, but the nameserver. */
static bool is_loopback6(const struct slirp_guard *guard, const uint8_t *address, uint32_t port)
{
    if (!guard->prefix6_length)
        return false;
    if (port == PORT_DNS && !guard->own_nameserver && !memcmp(address, guard->nameserver6, 16))
        return false;
    uint32_t bytes = guard->prefix6_length / 8, bits = guard->prefix6_length % 8;
    return !memcmp(address, guard->prefix6, bytes) &&
           (!bits || (address[bytes] ^ guard->prefix6[bytes]) >> (8 - bits) == 0);
}

static bool is_host6(const struct slirp_guard *guard, const uint8_t *address)
{
    static const uint8_t ROUTER[16] = { 0xfe, 0x80, [15] = 2 }, NAMESERVER[16] = { 0xfe, 0x80, [15] = 3 };
    return !memcmp(address, guard->host6, 16) || !memcmp(address, guard->nameserver6, 16) ||
           !memcmp(address, ROUTER, 16) || !memcmp(address, NAMESERVER, 16);
}

static enum slirp_verdict of_ip6(const struct slirp_guard *guard, const struct slirp_load *load, uint8_t *ip,
                                 uint32_t size)
{
    if (size < IP6_SIZE || ip[0] >> 4 != 6)
        return SLIRP_INVALID;
    uint32_t rest = net_load16(ip + 4), protocol = ip[6];
    const uint8_t *to = ip + 24;
    uint8_t *payload = ip + IP6_SIZE;
    if (rest > size - IP6_SIZE)
        return SLIRP_INVALID;
    if (protocol == PROTOCOL_ICMP6) {
        if (rest < ICMP_SIZE)
            return SLIRP_INVALID;
        if (payload[0] >= NDP_FIRST && payload[0] <= NDP_LAST)
            return SLIRP_PASS;
        return payload[0] == ICMP6_ECHO && is_host6(guard, to) ? SLIRP_PASS : SLIRP_UNSUPPORTED;
    }
    enum slirp_verdict verdict = SLIRP_PASS;
    if (protocol == PROTOCOL_TCP) {
        verdict = to[0] == 0xff || is_denied6(to) ? SLIRP_DENY : of_tcp(load, payload, rest, MIN_MSS6);
        /* Services have IPv4 addresses, and what was forwarded begins at the other side: nothing is let out. libslirp
         * looks for a service by bytes of the guest's own address. */
        if (!verdict && guard->restricted && is_syn(payload))
            return refuse(payload);
        if (!verdict && is_loopback6(guard, to, net_load16(payload + 2)))
            verdict = to_loopback(guard, load, net_load32(ip + 20), protocol, payload);
        return verdict;
    }
    if (protocol != PROTOCOL_UDP)
        return SLIRP_UNSUPPORTED;
    if (rest < UDP_SIZE || net_load16(payload + 4) < UDP_SIZE)
        return SLIRP_INVALID;
    uint32_t port = net_load16(payload + 2);
    /* What libslirp answers itself: to others it sends, those of ff02::1 and of the prefix to ::1. */
    static const uint8_t DHCP_SERVERS[16] = { 0xff, 2, [13] = 1, [15] = 2 };
    if (port == PORT_DHCP6 && (!memcmp(to, DHCP_SERVERS, 16) || !memcmp(to, guard->host6, 16)))
        return SLIRP_PASS;
    if (to[0] == 0xff || is_denied6(to) || guard->restricted)
        return SLIRP_DENY;
    if (port == PORT_TFTP)
        return SLIRP_UNSUPPORTED;
    if (is_loopback6(guard, to, port))
        verdict = to_loopback(guard, load, net_load32(ip + 20), protocol, payload);
    return verdict || !load->other_full ? verdict : SLIRP_FULL;
}

enum slirp_verdict slirp_guard(const struct slirp_guard *guard, const struct slirp_load *load,
                               const struct virtio_net_hdr_v1 *hdr, uint8_t *frame, uint32_t size)
{
    uint8_t *payload = frame + ETH_SIZE;
    size -= ETH_SIZE;
    switch (net_load16(frame + 12)) {
    case ETHERTYPE_ARP:
        return size >= ARP_SIZE ? SLIRP_PASS : SLIRP_INVALID;
    case ETHERTYPE_IP:
        fill_checksum(hdr, frame, size + ETH_SIZE);
        return of_ip(guard, load, payload, size, hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE);
    case ETHERTYPE_IP6:
        fill_checksum(hdr, frame, size + ETH_SIZE);
        return of_ip6(guard, load, payload, size);
    default:
        return SLIRP_UNSUPPORTED;
    }
}

void slirp_guard_sender(const uint8_t *frame, uint32_t *address, uint16_t *port)
{
    *address = net_load32(frame + ETH_SIZE + 12);
    *port = (uint16_t)net_load16(frame + ETH_SIZE + IP_SIZE);
}
