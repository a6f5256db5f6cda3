/* Which frames may pass an end: rules, the flows that they have let through, and flows that the program is asked about.
 *
 * The first rule that matches decides; a frame that none matches passes. "Egress" comes from the guest, that is, from
 * the peer of the end that has the filter; "ingress" goes to it. */
#ifndef AIOKVM_NET_FILTER_H
#define AIOKVM_NET_FILTER_H

#include <stdint.h>

#include "net.h"

enum { AIOKVM_NET_DENY = 0, AIOKVM_NET_ALLOW = 1, AIOKVM_NET_ASK = 2 };
enum { AIOKVM_NET_EGRESS = 1, AIOKVM_NET_INGRESS = 2 };
enum { AIOKVM_NET_MAX_RULES = 1024 };

/* Which conditions a rule has. */
enum {
    AIOKVM_NET_HAS_SRC = 1,
    AIOKVM_NET_HAS_DST = 2,
    AIOKVM_NET_HAS_SRC_MAC = 4,
    AIOKVM_NET_HAS_DST_MAC = 8,
    AIOKVM_NET_HAS_ETHERTYPE = 16,
    AIOKVM_NET_HAS_PROTOCOL = 32,
    AIOKVM_NET_HAS_SRC_PORT = 64,
    AIOKVM_NET_HAS_DST_PORT = 128,
    AIOKVM_NET_HAS_ICMP_TYPE = 256,
    AIOKVM_NET_NO_REPLIES = 512, /* what it lets through makes no flow */
};

struct aiokvm_net_rule {
    uint16_t has;
    uint8_t verdict;
    uint8_t directions;
    uint16_t hook; /* of AIOKVM_NET_ASK: which */
    uint16_t ethertype;
    uint8_t src[16], dst[16];
    uint8_t address_size; /* 4 or 16, of src and dst */
    uint8_t src_bits, dst_bits;
    uint8_t protocol;
    uint8_t src_mac[6], dst_mac[6];
    uint16_t src_ports[2], dst_ports[2]; /* from, to */
    uint8_t icmp_types[2];
};

/* A flow that the program is asked about. */
struct aiokvm_net_flow {
    uint64_t id;
    uint16_t hook;
    uint8_t egress;
    uint8_t protocol;
    uint8_t address_size;
    uint8_t has_ports;
    uint16_t src_port, dst_port;
    uint8_t src[16], dst[16];
    uint32_t frame_size; /* of the first frame, which waits for the verdict */
};

/* For this end, which is to have it by aiokvm_net_set_policy. NULL: *error is an errno. */
struct aiokvm_net_filter *aiokvm_net_filter_new(struct aiokvm_net_end *end, const struct aiokvm_net_rule *rules,
                                                uint32_t count, int *error);
/* Other rules. Flows stay, but have to be allowed by the new rules; what is being asked is dropped. 0 or -errno. */
int aiokvm_net_filter_replace(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rules, uint32_t count);
/* The next flow to be asked about, and up to `size` bytes of its first frame. 0: there is none. */
int aiokvm_net_filter_take(struct aiokvm_net_filter *filter, struct aiokvm_net_flow *flow, uint8_t *frame,
                           uint32_t size);
/* The answer. If it is yes the frame that waits is sent on. -ENOENT: this is asked no more. */
int aiokvm_net_filter_decide(struct aiokvm_net_filter *filter, uint64_t id, int allow);
/* All that was decided for this hook is to be asked again. */
void aiokvm_net_filter_forget(struct aiokvm_net_filter *filter, uint32_t hook);
/* Of an end that has been freed or has another policy. */
void aiokvm_net_filter_free(struct aiokvm_net_filter *filter);

#endif
