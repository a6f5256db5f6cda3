/* A learning switch: IEEE 802.1Q, sections 8.6 to 8.8, without spanning tree. Its ports are ends of its plane, each to
 * be linked to whatever is connected there.
 *
 * A port is in one of three modes. Open: what comes in is of VLAN 0 and goes out at other open ports as it is, whatever
 * tags it has. Access: it has a VLAN, and frames without a tag. Trunk: it has a set of VLANs, of which its frames
 * have tags, and may have one VLAN for those without. */
#ifndef AIOKVM_NET_SWITCH_H
#define AIOKVM_NET_SWITCH_H

#include <stdint.h>

#include "net.h"

enum {
    AIOKVM_NET_SWITCH_ADDRESSES = 8192,
    AIOKVM_NET_SWITCH_PORT_ADDRESSES = 1024, /* that a port may teach it: one guest cannot push out others' */
    AIOKVM_NET_SWITCH_PORTS = 1024,
    AIOKVM_NET_SWITCH_VLANS = 4096,
};

struct aiokvm_net_switch;

struct aiokvm_net_switch_config {
    uint64_t ageing_ns; /* after which an address that is not heard of is forgotten */
    uint64_t (*now_ns)(void); /* NULL: aiokvm_now_ns */
};

struct aiokvm_net_switch_port_config {
    uint32_t vlan;     /* of frames without a tag: 1 to 4094; 0: none */
    /* Frames do not go from one isolated port to another, and it does not take over addresses of ports that are not. */
    uint32_t isolated;
    const uint16_t *trunk; /* VLANs: 1 to 4094 */
    uint32_t trunks;       /* how many; 0: not a trunk */
};

struct aiokvm_net_switch_entry {
    uint8_t mac[6];
    uint16_t vlan;
    uint32_t port; /* aiokvm_net_end_id */
    uint64_t age_ns;
};

struct aiokvm_net_switch_stats {
    uint64_t forwarded;   /* frames whose receiver was known */
    uint64_t flooded;     /* those that went to all */
    uint64_t filtered;    /* that need not leave, or may not: back to their port, to isolated ports, link-local */
    uint64_t dropped_source; /* the source is a group, or at an isolated port a station of another */
    uint64_t dropped_vlan;   /* not of their port */
    uint64_t learned, moved, forgotten; /* addresses; forgotten: to make room */
};

/* NULL: *error is an errno. */
struct aiokvm_net_switch *aiokvm_net_switch_new(struct aiokvm_net *net, const struct aiokvm_net_switch_config *config,
                                                int *error);
/* Ports that are left forward nothing any more. The plane is still there. */
void aiokvm_net_switch_free(struct aiokvm_net_switch *sw);
/* ENOSPC: there are AIOKVM_NET_SWITCH_PORTS. EINVAL: no such VLAN. */
struct aiokvm_net_end *aiokvm_net_switch_port_new(struct aiokvm_net_switch *sw,
                                                  const struct aiokvm_net_switch_port_config *config, int *error);
/* What it has learned and not forgotten: at most so many entries; returns how many. */
int aiokvm_net_switch_table(struct aiokvm_net_switch *sw, struct aiokvm_net_switch_entry *entries, uint32_t most);
void aiokvm_net_switch_stats(struct aiokvm_net_switch *sw, struct aiokvm_net_switch_stats *stats);

#endif
