/* The flows that a filter knows, in a table of fixed size: both directions of one have one entry. */
#ifndef AIOKVM_NET_FLOW_H
#define AIOKVM_NET_FLOW_H

#include <stdbool.h>
#include <stdint.h>

/* Sets of 8: what hashes to one set, by chance or on purpose, costs 8 comparisons and evicts no other. */
enum { NET_FLOWS = 4096, NET_FLOW_WAYS = 8 };

/* The two ends in ascending order, so that a reply has the key of what it replies to. */
struct net_flow_key {
    uint8_t low[16], high[16];
    uint16_t low_port, high_port;
    uint8_t protocol;
    uint8_t address_size;
    uint8_t is_fragment; /* the ports are the halves of the packet's id */
    uint8_t low_is_guest;
};

enum net_flow_state { NET_FLOW_FREE, NET_FLOW_ALLOWED, NET_FLOW_DENIED, NET_FLOW_ASKED };

struct net_flow {
    struct net_flow_key key;
    uint64_t until_ns;
    uint64_t used_ns;
    uint32_t generation; /* of the rules that it was decided by */
    uint16_t hook;       /* that decided, NET_FLOW_NO_HOOK if rules have */
    uint8_t state;       /* enum net_flow_state */
    bool egress;         /* it was the guest who began */
};

enum { NET_FLOW_NO_HOOK = 0xffff };

struct net_flows {
    uint64_t seed;
    struct net_flow flows[NET_FLOWS];
};

/* NULL: no memory. */
struct net_flows *net_flows_new(void);
void net_flow_key_set(struct net_flow_key *key, const uint8_t *src, const uint8_t *dst, uint32_t address_size,
                      uint16_t src_port, uint16_t dst_port, bool egress);
/* NULL: it is not known. */
struct net_flow *net_flows_find(struct net_flows *flows, const struct net_flow_key *key, uint64_t now_ns);
/* The same, or a new one, for which another that was not used for longest may have gone. NULL: all that could go are
 * being asked about. */
struct net_flow *net_flows_get(struct net_flows *flows, const struct net_flow_key *key, uint64_t now_ns);
/* What was allowed is used, and lasts from now on for as long as its protocol says. */
void net_flow_use(struct net_flow *flow, uint64_t now_ns);

#endif
