/* The adapter of a guest: an end whose queues are virtqueues. virtio 1.2, section 5.1.
 *
 * Queues have the indices of the specification: 2n receives, 2n + 1 transmits; the control queue is not seen here. A
 * vring belongs to the plane from aiokvm_net_nic_set_queue until it is taken away, which is over when the call is. */
#ifndef AIOKVM_NET_NIC_H
#define AIOKVM_NET_NIC_H

#include <stdint.h>

#include "net.h"
#include "notify.h"
#include "vring.h"

#define AIOKVM_NET_NIC_PAIRS 16
#define AIOKVM_NET_NIC_MACS 64
#define AIOKVM_NET_NIC_VLAN_WORDS 128 /* a bit for each of 4,096 */

/* What breaks a queue here and not in vring.c. */
#define AIOKVM_NET_NIC_EHEADER (-1000) /* a receive buffer shorter than the header, or with a part to be read */

/* Of aiokvm_net_nic_filter.flags. */
#define AIOKVM_NET_NIC_MAC_FILTER 1 /* without it every destination is let through */
#define AIOKVM_NET_NIC_ALLUNI 2
#define AIOKVM_NET_NIC_ALLMULTI 4
#define AIOKVM_NET_NIC_VLAN_FILTER 8 /* without it every VLAN is */

/* Which frames the driver is to get (5.1.6.5.1 to 5.1.6.5.3): those to one of the addresses, and to all. */
struct aiokvm_net_nic_filter {
    uint32_t flags;
    uint32_t macs;
    uint8_t mac[AIOKVM_NET_NIC_MACS][6];
    uint32_t vlans[AIOKVM_NET_NIC_VLAN_WORDS];
};

/* NULL: *error is an errno. */
struct aiokvm_net_end *aiokvm_net_nic_new(struct aiokvm_net *net, int *error);
/* What was negotiated, before there are queues: they begin with one pair, no filter, and nothing broken. mtu is that of
 * the configuration space, for drivers that have negotiated to know it. */
int aiokvm_net_nic_set_features(struct aiokvm_net_end *end, uint64_t features, uint32_t mtu);
/* Of the features for offload of what the guest receives those that are on (5.1.6.5.6). */
int aiokvm_net_nic_set_offloads(struct aiokvm_net_end *end, uint64_t features);
/* How many pairs are in use (5.1.6.5.5). */
int aiokvm_net_nic_set_pairs(struct aiokvm_net_end *end, uint32_t pairs);
int aiokvm_net_nic_set_filter(struct aiokvm_net_end *end, const struct aiokvm_net_nic_filter *filter);
/* A queue of size entries; NULL takes it away. kick is readable, by an edge, when the driver has notified. */
int aiokvm_net_nic_set_queue(struct aiokvm_net_end *end, uint32_t index, struct aiokvm_vring *vring, uint32_t size,
                             int kick, const struct aiokvm_notifier *notifier);
/* Has `to`, a new adapter in any plane, take the place of `from`, with its queues and all that was set; `from` is as
 * new afterwards. Returns 0, or -errno: then some queues may be in neither. */
int aiokvm_net_nic_move(struct aiokvm_net_end *from, struct aiokvm_net_end *to);

#endif
