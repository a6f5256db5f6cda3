/* What the two halves of the adapter have in common. */
#ifndef AIOKVM_NET_NIC_PRIV_H
#define AIOKVM_NET_NIC_PRIV_H

#include "net_nic.h"
#include "net_priv.h"

enum { NIC_HDR_SIZE = sizeof(struct virtio_net_hdr_v1), NIC_FLOWS = 1024 };
/* Of a descriptor, for net_spend: it is checked, and what it points to is looked for in the caches. */
enum { NIC_COST_PIECE = 64 };

struct nic_queue {
    struct net_watch kick;
    struct aiokvm_vring *vring;
    struct aiokvm_notifier notifier;
    uint32_t index, size;
    bool is_dirty; /* chains were pushed, and not published since */
    bool is_polled; /* the driver does not notify, but is looked after when frames have gathered */

    /* Of a queue that transmits: the frame that is on its way, or has to wait. */
    bool is_pending; /* there may be chains */
    bool is_blocked;
    struct aiokvm_chain *chain;
    struct net_frame frame;
    uint8_t head[NET_HEAD];

    /* Of a queue that receives: chains that were popped, and are not used yet. */
    bool is_starved; /* the driver notifies when there are buffers */
    uint32_t first, count;

    union {
        struct iovec iov[AIOKVM_VRING_MAX_SIZE + 2];
        struct aiokvm_chain *stash[AIOKVM_VRING_MAX_SIZE];
    };
};

/* What moves from one adapter to another. */
struct nic_state {
    struct nic_queue *queues[2 * AIOKVM_NET_NIC_PAIRS];
    uint32_t pairs;
    uint32_t offloads;  /* AIOKVM_NET_OFFLOAD_*: what the driver may send */
    uint32_t mtu;       /* what the driver was told, 0: nothing */
    uint32_t next_pair; /* whose turn it is to transmit */
    bool is_mergeable;
    bool is_broken; /* nothing is done until the driver resets the device */
    struct aiokvm_net_nic_filter filter;
    /* The pair by which a flow was sent last, and one more; 0: not known. By the flow's hash. */
    uint8_t flows[NIC_FLOWS];
};

struct nic {
    struct aiokvm_net_end end;
    struct nic_state state;
};

/* ---- net_nic.c ---- */

void nic_break(struct nic *nic, const struct nic_queue *queue, int error);

/* The driver's next buffers are looked for when frames have gathered, if they do: it need not notify. */
bool nic_polls(struct nic *nic, struct nic_queue *queue);

/* ---- net_nic_rx.c ---- */

enum net_result nic_receive(struct aiokvm_net_end *end, struct net_frame *frame);
/* Automatic receive steering: what belongs to this frame's flow is to come by this pair. */
void nic_steer(struct nic *nic, const struct net_frame *frame, uint32_t pair);

#endif
