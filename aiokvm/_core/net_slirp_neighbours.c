/* Which addresses of the guest's network are whose. libslirp asks by ARP or NDP for each frame, keeps the frame for a
 * second, and looks through all that it keeps whenever it has another: with an address that nobody answers for, that
 * is work without bounds. So it is told at once that somebody has the address, and who has it is known here: from
 * every frame of the guest's, as a switch learns. */
#include "net_slirp_priv.h"

#include <string.h>

#include "net_packet.h"

enum {
    ETH_SIZE = 14, ARP_SIZE = 28, IP_SIZE = 20, IP6_SIZE = 40, NS_SIZE = 32,
    ETHERTYPE_IP = 0x0800, ETHERTYPE_ARP = 0x0806, ETHERTYPE_IP6 = 0x86dd,
    ARP_REQUEST = 1, ARP_REPLY = 2, ICMP6_NS = 135, ICMP6_NA = 136,
};

/* In the name of libslirp's router, whose adapter has its address: 52:55 and IPv4's, 52:56:0 and IPv6's end. */
static void router(const struct slirp_guard *guard, bool is_ip6, uint8_t mac[6])
{
    if (is_ip6) {
        memcpy(mac, "\x52\x56\0", 3);
        memcpy(mac + 3, guard->host6 + 13, 3);
    } else {
        memcpy(mac, "\x52\x55", 2);
        net_store32(mac + 2, guard->host);
    }
}

/* An IPv4 address as one of IPv6. */
static void map(uint8_t address[16], const uint8_t *ip)
{
    memset(address, 0, 10);
    memset(address + 10, 0xff, 2);
    memcpy(address + 12, ip, 4);
}

static struct slirp_neighbour *bucket_of(struct slirp_neighbours *neighbours, const uint8_t address[16])
{
    uint64_t hash = slirp_hash(neighbours->seed, address, 16);
    return &neighbours->known[hash % SLIRP_NEIGHBOUR_BUCKETS * SLIRP_NEIGHBOUR_WAYS];
}

/* The first of the bucket is who was heard last. True: that is news. */
static bool learn(struct slirp_neighbours *neighbours, const uint8_t address[16], const uint8_t mac[6])
{
    struct slirp_neighbour *bucket = bucket_of(neighbours, address), found = { 0 };
    uint32_t at = 0;
    while (at < SLIRP_NEIGHBOUR_WAYS - 1 && memcmp(bucket[at].address, address, 16))
        at++;
    bool is_new = memcmp(bucket[at].address, address, 16) || memcmp(bucket[at].mac, mac, 6);
    if (at == 0 && !is_new)
        return false;
    memcpy(found.address, address, 16);
    memcpy(found.mac, mac, 6);
    memmove(bucket + 1, bucket, at * sizeof(*bucket));
    *bucket = found;
    return is_new;
}

bool slirp_neighbours_learn(struct slirp_neighbours *neighbours, const uint8_t *frame, size_t size)
{
    static const uint8_t NOBODY[16];
    const uint8_t *ip = frame + ETH_SIZE, *mac = frame + 6;
    uint32_t type = net_load16(frame + 12);
    uint8_t address[16];
    if (type == ETHERTYPE_IP6 && size >= ETH_SIZE + IP6_SIZE) {
        memcpy(address, ip + 8, 16);
        if (address[0] == 0xff || !memcmp(address, NOBODY, 16))
            return false;
    } else if ((type == ETHERTYPE_IP && size >= ETH_SIZE + IP_SIZE) ||
               (type == ETHERTYPE_ARP && size >= ETH_SIZE + ARP_SIZE)) {
        const uint8_t *from = ip + (type == ETHERTYPE_IP ? 12 : 14);
        if (type == ETHERTYPE_ARP)
            mac = ip + 8;
        if (from[0] == 0 || from[0] >= 224)
            return false;
        map(address, from);
    } else {
        return false;
    }
    return !(mac[0] & 1) && learn(neighbours, address, mac);
}

bool slirp_neighbours_fill(struct slirp_neighbours *neighbours, uint8_t *frame, size_t size)
{
    const uint8_t *ip = frame + ETH_SIZE;
    uint8_t address[16];
    /* To all, or to many. */
    if (frame[0] & 1)
        return true;
    if (net_load16(frame + 12) == ETHERTYPE_IP6 && size >= ETH_SIZE + IP6_SIZE)
        memcpy(address, ip + 24, 16);
    else if (net_load16(frame + 12) == ETHERTYPE_IP && size >= ETH_SIZE + IP_SIZE)
        map(address, ip + 16);
    else
        return true;
    const struct slirp_neighbour *bucket = bucket_of(neighbours, address);
    for (uint32_t at = 0; at < SLIRP_NEIGHBOUR_WAYS; at++)
        if (!memcmp(bucket[at].address, address, 16)) {
            memcpy(frame, bucket[at].mac, 6);
            return true;
        }
    return false;
}

static uint32_t seal6(uint8_t *frame, uint32_t length)
{
    uint8_t *ip = frame + ETH_SIZE, *icmp = ip + IP6_SIZE;
    const uint8_t pseudo[4] = { 0, (uint8_t)length, 0, 58 };
    net_store16(frame + 12, ETHERTYPE_IP6);
    ip[0] = 0x60;
    net_store16(ip + 4, length);
    ip[6] = 58;
    ip[7] = 255;
    net_store16(icmp + 2, ~slirp_sum(icmp, length, slirp_sum(pseudo, 4, slirp_sum(ip + 8, 32, 0))));
    return ETH_SIZE + IP6_SIZE + length;
}

static uint32_t arp(uint8_t *frame, uint32_t operation, const uint8_t mac[6], const uint8_t from[4],
                    const uint8_t to[4])
{
    uint8_t *body = frame + ETH_SIZE;
    net_store16(frame + 12, ETHERTYPE_ARP);
    memcpy(frame + 6, mac, 6);
    memcpy(body, "\0\1\x08\0\6\4", 6);
    net_store16(body + 6, operation);
    memcpy(body + 8, mac, 6);
    memcpy(body + 14, from, 4);
    memcpy(body + 24, to, 4);
    return ETH_SIZE + ARP_SIZE;
}

uint32_t slirp_neighbours_answer(const uint8_t *frame, size_t size, uint8_t answer[SLIRP_QUESTION_SIZE])
{
    /* Nobody's: it is replaced in what goes there. */
    static const uint8_t SOMEBODY[6] = { 0x52, 0x55 };
    const uint8_t *body = frame + ETH_SIZE;
    memset(answer, 0, SLIRP_QUESTION_SIZE);
    if (size >= ETH_SIZE + ARP_SIZE && net_load16(frame + 12) == ETHERTYPE_ARP &&
        net_load16(body + 6) == ARP_REQUEST)
        return arp(answer, ARP_REPLY, SOMEBODY, body + 24, body + 14);
    if (size < ETH_SIZE + IP6_SIZE + NS_SIZE || net_load16(frame + 12) != ETHERTYPE_IP6 || body[6] != 58 ||
        body[IP6_SIZE] != ICMP6_NS)
        return 0;
    const uint8_t *target = body + IP6_SIZE + 8;
    uint8_t *ip = answer + ETH_SIZE, *icmp = ip + IP6_SIZE;
    memcpy(answer + 6, SOMEBODY, 6);
    memcpy(ip + 8, target, 16);
    memcpy(ip + 24, body + 8, 16);
    icmp[0] = ICMP6_NA;
    icmp[4] = 0x60; /* solicited, override */
    memcpy(icmp + 8, target, 16);
    memcpy(icmp + 24, "\2\1", 2);
    memcpy(icmp + 26, SOMEBODY, 6);
    return seal6(answer, NS_SIZE);
}

uint32_t slirp_neighbours_ask(const struct slirp_guard *guard, const uint8_t *frame,
                              uint8_t question[SLIRP_QUESTION_SIZE])
{
    const uint8_t *to = frame + ETH_SIZE;
    uint8_t mac[6], host[4];
    memset(question, 0, SLIRP_QUESTION_SIZE);
    if (net_load16(frame + 12) == ETHERTYPE_IP) {
        net_store32(host, guard->host);
        router(guard, false, mac);
        memset(question, 0xff, 6);
        return arp(question, ARP_REQUEST, mac, host, to + 16);
    }
    uint8_t *ip = question + ETH_SIZE, *icmp = ip + IP6_SIZE;
    to += 24;
    router(guard, true, mac);
    /* The group of all whose addresses end so, RFC 4291, section 2.7.1. */
    static const uint8_t GROUP[13] = { 0xff, 2, [11] = 1, [12] = 0xff };
    memcpy(question, "\x33\x33\xff", 3);
    memcpy(question + 3, to + 13, 3);
    memcpy(question + 6, mac, 6);
    memcpy(ip + 8, guard->host6, 16);
    memcpy(ip + 24, GROUP, sizeof(GROUP));
    memcpy(ip + 37, to + 13, 3);
    icmp[0] = ICMP6_NS;
    memcpy(icmp + 8, to, 16);
    memcpy(icmp + 24, "\1\1", 2);
    memcpy(icmp + 26, mac, 6);
    return seal6(question, NS_SIZE);
}
