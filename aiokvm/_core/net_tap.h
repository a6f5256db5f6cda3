/* TAP devices of the kernel, macvtap included: what is sent to them is in the host's network. */
#ifndef AIOKVM_NET_TAP_H
#define AIOKVM_NET_TAP_H

#include "net.h"

enum { AIOKVM_NET_TAP_QUEUES = 16 };

/* An end over the queues of one device: descriptors which TUNSETIFF has been done on, with IFF_TAP and IFF_NO_PI.
 * They stay the caller's, must be open for as long as the end is, and are made non-blocking. Headers (IFF_VNET_HDR)
 * are used if they have them, offloads if `offload` says so, too. When the device is gone there is
 * AIOKVM_NET_NEWS_CLOSED. May take as long as the kernel has other interfaces to look after: not for an event loop.
 *
 * NULL: *error is an errno. ENOTTY, EBADFD: one is no TAP. EPROTOTYPE: it gives packets of IP. */
struct aiokvm_net_end *aiokvm_net_tap_new(struct aiokvm_net *net, const int *fds, uint32_t count, int offload,
                                          int *error);
/* AIOKVM_NET_OFFLOAD_*: what the device takes. */
uint32_t aiokvm_net_tap_offloads(const struct aiokvm_net_end *end);

#endif
