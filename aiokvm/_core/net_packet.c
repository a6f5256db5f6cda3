#include "net_packet.h"

#include <linux/if_ether.h>
#include <netinet/in.h>

#include "net_priv.h"

/* 802.1Q allows one tag, 802.1ad two. */
enum { MAX_TAGS = 2 };

/* RFC 791, section 3.1. */
static void parse_ipv4(struct net_packet *packet)
{
    const uint8_t *header = packet->head + packet->network;
    uint32_t held = packet->held - packet->network, length = held >= 20 ? (header[0] & 15u) * 4 : 0;
    if (length < 20 || length > held || header[0] >> 4 != 4)
        return;
    uint32_t end = packet->network + net_load16(header + 2), bits = net_load16(header + 6);
    if (end < packet->end)
        packet->end = end;
    packet->has_network = packet->has_transport = true;
    packet->protocol = header[9];
    packet->transport = packet->network + length;
    packet->address_size = 4;
    packet->src = header + 12;
    packet->dst = header + 16;
    packet->fragment_id = net_load16(header + 4);
    packet->fragment_offset = (bits & 0x1fff) * 8;
    if (packet->fragment_offset)
        packet->fragment = NET_FRAGMENT_LATER;
    else if (bits & 0x2000)
        packet->fragment = NET_FRAGMENT_FIRST;
}

/* RFC 8200, sections 3 and 4. Extension headers are followed as far as the frame's head is held; the transport behind
 * others, and behind the fragment header of a later fragment, is unknown. */
static void parse_ipv6(struct net_packet *packet)
{
    const uint8_t *header = packet->head + packet->network;
    if (packet->held - packet->network < 40 || header[0] >> 4 != 6)
        return;
    uint32_t at = packet->network + 40, end = at + net_load16(header + 4);
    if (end < packet->end)
        packet->end = end;
    packet->has_network = true;
    packet->address_size = 16;
    packet->src = header + 8;
    packet->dst = header + 24;
    uint8_t next = header[6];
    for (;;) {
        const uint8_t *extension = packet->head + at;
        uint32_t length;
        switch (next) {
        case IPPROTO_HOPOPTS:
        case IPPROTO_ROUTING:
        case IPPROTO_DSTOPTS:
            if (at + 8 > packet->held)
                return;
            length = (extension[1] + 1u) * 8;
            break;
        case IPPROTO_FRAGMENT:
            if (at + 8 > packet->held)
                return;
            length = 8;
            packet->fragment_offset = net_load16(extension + 2) & 0xfff8;
            packet->fragment_id = net_load32(extension + 4);
            if (packet->fragment_offset)
                packet->fragment = NET_FRAGMENT_LATER;
            else if (extension[3] & 1)
                packet->fragment = NET_FRAGMENT_FIRST;
            break;
        case IPPROTO_AH: /* RFC 4302, section 2.2: in units of 4 bytes */
            if (at + 8 > packet->held)
                return;
            length = (extension[1] + 2u) * 4;
            break;
        default:
            packet->has_transport = true;
            packet->protocol = next;
            packet->transport = at;
            return;
        }
        next = extension[0];
        at += length;
        if (packet->fragment == NET_FRAGMENT_LATER) {
            /* What follows is the middle of something. */
            bool is_extension = next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
                                next == IPPROTO_FRAGMENT || next == IPPROTO_AH;
            packet->has_transport = !is_extension;
            packet->protocol = next;
            packet->transport = at;
            return;
        }
        if (at > packet->held)
            return;
    }
}

void net_packet_parse_ip(struct net_packet *packet, uint32_t at, uint32_t frame_size)
{
    packet->network = at;
    packet->end = frame_size;
    if (at > packet->held)
        return;
    if (packet->ethertype == ETH_P_IP)
        parse_ipv4(packet);
    else if (packet->ethertype == ETH_P_IPV6)
        parse_ipv6(packet);
}

void net_packet_parse(struct net_packet *packet, const struct net_frame *frame)
{
    size_t held = frame->iov[0].iov_len;
    /* As much as is private in every frame: what is decided does not depend on where a frame waits. */
    *packet = (struct net_packet){
        .head = frame->iov[0].iov_base, .held = held < NET_HEAD ? (uint32_t)held : NET_HEAD,
    };
    uint32_t at = 12;
    uint16_t type = net_load16(packet->head + at);
    for (int tags = 0; type == ETH_P_8021Q || type == ETH_P_8021AD; tags++) {
        at += 4;
        if (tags == MAX_TAGS || at + 2 > packet->held)
            return;
        type = net_load16(packet->head + at);
    }
    packet->ethertype = type;
    net_packet_parse_ip(packet, at + 2, frame->size);
}
