#include "net_rules.h"

#include <linux/if_ether.h>
#include <netinet/in.h>
#include <string.h>

#include "net_priv.h"

/* ---- looking at a frame ---- */

static bool is_icmp(const struct net_packet *packet)
{
    return packet->protocol == (packet->address_size == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* How long the transport header is at least; 0: it has no ports. */
static uint32_t port_header(uint8_t protocol)
{
    switch (protocol) {
    case IPPROTO_TCP:
        return 20;
    case IPPROTO_SCTP:
    case IPPROTO_DCCP:
        return 12;
    case IPPROTO_UDP:
    case IPPROTO_UDPLITE:
        return 8;
    default:
        return 0;
    }
}

static void look_at_icmp(struct net_facts *facts)
{
    const struct net_packet *packet = &facts->packet;
    const uint8_t *icmp = packet->head + packet->transport;
    bool is_v4 = packet->address_size == 4;
    uint8_t type = icmp[0], echo_reply = is_v4 ? 0 : 129, echo = is_v4 ? 8 : 128;
    facts->has_icmp_type = true;
    facts->icmp_type = type;
    /* RFC 792 and RFC 4443: unreachable, source quench or too big, time exceeded, parameter problem. */
    facts->is_error = is_v4 ? type == 3 || type == 4 || type == 11 || type == 12 : type >= 1 && type <= 4;
    facts->has_flow = !facts->is_error;
    facts->begins = facts->has_flow && type != echo_reply;
    facts->replies = type == echo_reply;
    /* An echo's identifier is what a port is to others. */
    if (type == echo_reply || type == echo)
        facts->src_port = facts->dst_port = net_load16(icmp + 4);
}

static void look_at_transport(struct net_facts *facts, bool is_whole)
{
    const struct net_packet *packet = &facts->packet;
    facts->is_ip = packet->ethertype == ETH_P_IP || packet->ethertype == ETH_P_IPV6;
    if (!packet->has_network || !packet->has_transport)
        return;
    if (packet->fragment == NET_FRAGMENT_LATER) {
        /* RFC 3128: it would lay itself over the flags of what has been looked at. */
        facts->is_bad = packet->protocol == IPPROTO_TCP && packet->fragment_offset < 16;
        return;
    }
    uint32_t length = is_icmp(packet) ? 8 : port_header(packet->protocol);
    if (!length) {
        facts->has_flow = facts->begins = facts->replies = true;
        return;
    }
    if (packet->transport + (is_whole ? length : 8) > packet->end) {
        facts->is_bad = true;
    } else if (packet->transport + 8 <= packet->held) {
        if (is_icmp(packet)) {
            look_at_icmp(facts);
            return;
        }
        const uint8_t *ports = packet->head + packet->transport;
        facts->has_ports = facts->has_flow = facts->begins = facts->replies = true;
        facts->src_port = net_load16(ports);
        facts->dst_port = net_load16(ports + 2);
    }
}

void net_facts_set(struct net_facts *facts, const struct net_frame *frame, bool egress)
{
    memset(facts, 0, sizeof(*facts));
    facts->egress = egress;
    net_packet_parse(&facts->packet, frame);
    look_at_transport(facts, true);
}

bool net_facts_quoted(struct net_facts *quoted, const struct net_facts *facts, uint32_t frame_size)
{
    memset(quoted, 0, sizeof(*quoted));
    quoted->egress = !facts->egress;
    quoted->packet = (struct net_packet){
        .head = facts->packet.head, .held = facts->packet.held, .ethertype = facts->packet.ethertype,
    };
    net_packet_parse_ip(&quoted->packet, facts->packet.transport + 8, frame_size);
    /* At least 8 bytes behind the header are quoted: RFC 792. */
    quoted->packet.end = frame_size;
    look_at_transport(quoted, false);
    return quoted->has_flow && !quoted->is_bad;
}

/* ---- matching ---- */

enum match { NO, YES, UNKNOWN };

static bool in_network(const uint8_t *address, const uint8_t *network, uint32_t bits)
{
    uint32_t bytes = bits / 8, rest = bits % 8;
    return !memcmp(address, network, bytes) && (!rest || !((address[bytes] ^ network[bytes]) >> (8 - rest)));
}

static bool in_range(uint32_t value, const uint16_t range[2])
{
    return value >= range[0] && value <= range[1];
}

/* What has to do with IP. */
static enum match matches_ip(const struct aiokvm_net_rule *rule, const struct net_facts *facts)
{
    const struct net_packet *packet = &facts->packet;
    if (!facts->is_ip)
        return packet->ethertype ? NO : UNKNOWN;
    if (!packet->has_network)
        return UNKNOWN;
    if (rule->has & (AIOKVM_NET_HAS_SRC | AIOKVM_NET_HAS_DST) && rule->address_size != packet->address_size)
        return NO;
    if ((rule->has & AIOKVM_NET_HAS_SRC && !in_network(packet->src, rule->src, rule->src_bits)) ||
        (rule->has & AIOKVM_NET_HAS_DST && !in_network(packet->dst, rule->dst, rule->dst_bits)))
        return NO;
    uint32_t inner = AIOKVM_NET_HAS_PROTOCOL | AIOKVM_NET_HAS_SRC_PORT | AIOKVM_NET_HAS_DST_PORT |
                     AIOKVM_NET_HAS_ICMP_TYPE;
    if (!(rule->has & inner))
        return YES;
    if (!packet->has_transport)
        return UNKNOWN;
    if (rule->has & AIOKVM_NET_HAS_PROTOCOL && rule->protocol != packet->protocol)
        return NO;
    if (rule->has & (AIOKVM_NET_HAS_SRC_PORT | AIOKVM_NET_HAS_DST_PORT)) {
        if (!port_header(packet->protocol) || packet->fragment == NET_FRAGMENT_LATER)
            return NO;
        if (!facts->has_ports)
            return UNKNOWN;
        if ((rule->has & AIOKVM_NET_HAS_SRC_PORT && !in_range(facts->src_port, rule->src_ports)) ||
            (rule->has & AIOKVM_NET_HAS_DST_PORT && !in_range(facts->dst_port, rule->dst_ports)))
            return NO;
    }
    if (rule->has & AIOKVM_NET_HAS_ICMP_TYPE) {
        if (!is_icmp(packet) || packet->fragment == NET_FRAGMENT_LATER)
            return NO;
        if (!facts->has_icmp_type)
            return UNKNOWN;
        return facts->icmp_type >= rule->icmp_types[0] && facts->icmp_type <= rule->icmp_types[1] ? YES : NO;
    }
    return YES;
}

static enum match matches(const struct aiokvm_net_rule *rule, const struct net_facts *facts)
{
    const uint8_t *head = facts->packet.head;
    if (!(rule->directions & (facts->egress ? AIOKVM_NET_EGRESS : AIOKVM_NET_INGRESS)))
        return NO;
    if ((rule->has & AIOKVM_NET_HAS_DST_MAC && memcmp(head, rule->dst_mac, ETH_ALEN)) ||
        (rule->has & AIOKVM_NET_HAS_SRC_MAC && memcmp(head + ETH_ALEN, rule->src_mac, ETH_ALEN)))
        return NO;
    if (rule->has & AIOKVM_NET_HAS_ETHERTYPE && facts->packet.ethertype != rule->ethertype)
        return facts->packet.ethertype ? NO : UNKNOWN;
    uint32_t ip = AIOKVM_NET_HAS_SRC | AIOKVM_NET_HAS_DST | AIOKVM_NET_HAS_PROTOCOL | AIOKVM_NET_HAS_SRC_PORT |
                  AIOKVM_NET_HAS_DST_PORT | AIOKVM_NET_HAS_ICMP_TYPE;
    if (rule->has & ip)
        return matches_ip(rule, facts);
    return YES;
}

static const struct aiokvm_net_rule DEFAULT = { .verdict = AIOKVM_NET_ALLOW };

const struct aiokvm_net_rule *net_rules_decide(const struct aiokvm_net_rule *rules, uint32_t count,
                                               const struct net_facts *facts)
{
    for (uint32_t i = 0; i < count; i++) {
        const struct aiokvm_net_rule *rule = &rules[i];
        enum match match = matches(rule, facts);
        if (match == NO || (match == UNKNOWN && rule->verdict == AIOKVM_NET_ALLOW))
            continue;
        /* There are no flows but in IP. */
        if (rule->verdict == AIOKVM_NET_ASK && !facts->is_ip && facts->packet.ethertype)
            continue;
        return rule;
    }
    return &DEFAULT;
}
