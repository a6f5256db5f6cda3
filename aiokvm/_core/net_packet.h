/* What the headers of a frame say: Ethernet, VLAN tags, IPv4 or IPv6, and where the transport's begins. */
#ifndef AIOKVM_NET_PACKET_H
#define AIOKVM_NET_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct net_frame;

enum net_fragment { NET_FRAGMENT_NONE, NET_FRAGMENT_FIRST, NET_FRAGMENT_LATER };

/* Offsets are from the frame's beginning; what is behind `held` bytes is never looked at. */
struct net_packet {
    const uint8_t *head;
    uint32_t held;
    uint16_t ethertype; /* behind the tags; 0: there are too many of those */
    bool has_network;   /* an IP header that is whole: the fields below are set */
    bool has_transport; /* `protocol` and `transport` are known */
    uint8_t protocol;   /* IPPROTO_* */
    uint32_t network;
    uint32_t transport;
    uint32_t end; /* where IP says that the packet ends, or the frame does */
    uint32_t address_size;
    const uint8_t *src, *dst;
    enum net_fragment fragment;
    uint32_t fragment_id, fragment_offset; /* the offset in bytes */
};

void net_packet_parse(struct net_packet *packet, const struct net_frame *frame);
/* An IP packet at `at` with this EtherType: also the one that an ICMP error quotes. */
void net_packet_parse_ip(struct net_packet *packet, uint32_t at, uint32_t frame_size);

static inline uint16_t net_load16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline uint32_t net_load32(const uint8_t *at)
{
    return (uint32_t)net_load16(at) << 16 | net_load16(at + 2);
}

static inline void net_store16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void net_store32(uint8_t *at, uint32_t value)
{
    net_store16(at, value >> 16);
    net_store16(at + 2, value);
}

#endif
