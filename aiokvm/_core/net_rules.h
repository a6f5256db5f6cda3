/* What a frame says that rules are held against, and the rule that decides. */
#ifndef AIOKVM_NET_RULES_H
#define AIOKVM_NET_RULES_H

#include "net_filter.h"
#include "net_packet.h"

/* What rules are held against. */
struct net_facts {
    struct net_packet packet;
    bool egress;
    bool is_ip;
    bool is_bad;  /* a transport header that is not whole, as in an attack by fragments: RFC 1858 */
    bool has_ports, has_icmp_type;
    bool has_flow; /* it may belong to one by its own header */
    bool begins;   /* it may be the first of one: an echo's reply is not */
    bool replies;  /* it may be an answer: an echo request is not */
    bool is_error;  /* an ICMP error, which quotes a packet of another flow */
    uint16_t src_port, dst_port;
    uint8_t icmp_type;
};

void net_facts_set(struct net_facts *facts, const struct net_frame *frame, bool egress);
/* Of the packet that an ICMP error is about: it went the other way. False: it cannot be seen. */
bool net_facts_quoted(struct net_facts *quoted, const struct net_facts *facts, uint32_t frame_size);
/* The rule that decides, if none of these one that allows. What a rule cannot know of a frame is to the disadvantage of
 * the frame. */
const struct aiokvm_net_rule *net_rules_decide(const struct aiokvm_net_rule *rules, uint32_t count,
                                               const struct net_facts *facts);

#endif
