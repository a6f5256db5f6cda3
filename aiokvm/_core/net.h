/* Ethernet frames between ends: NICs of guests, TAPs, sockets, switches, user-mode NAT, the program itself.
 *
 * A plane has ends, of which any two may be linked; what one sends, the other receives. Moving frames is done by
 * aiokvm_net_serve, for a bounded time a call, or by a thread of the plane's own. A plane has one lock, which every
 * call takes: all calls may come from any thread. Ends belong to one plane; those of different planes are never linked.
 *
 * Makers of ends are in net_tap.h, net_nic.h and so on. Results below 0 are -errno; in a child of fork all of them are
 * -EOWNERDEAD, and what has no result does nothing, but what frees: that gives back the child's copies. */
#ifndef AIOKVM_NET_H
#define AIOKVM_NET_H

#include <stdint.h>

/* A frame without offload: MTU 9,216 and VLAN tags. With segmentation offload: what IP can say. The header of
 * virtio is not counted. */
enum { AIOKVM_NET_MAX_FRAME = 65550, AIOKVM_NET_MIN_FRAME = 14 };

/* What an end has for the program, see aiokvm_net_take. */
enum {
    AIOKVM_NET_NEWS_READABLE = 1, /* a port has frames */
    AIOKVM_NET_NEWS_WRITABLE = 2, /* a port takes frames again */
    AIOKVM_NET_NEWS_CLOSED = 4,   /* the other side is gone: error is an errno, 0 for an orderly end */
    AIOKVM_NET_NEWS_BROKEN = 8,   /* a queue of a NIC: error is below 0, of vring.h or net_nic.h; detail the queue */
    AIOKVM_NET_NEWS_FLOW = 16,    /* a filter asks about a flow */
    AIOKVM_NET_NEWS_CAPTURED = 32, /* a capture has bytes to be written */
};

/* Whether a frame may have what virtio_net_hdr says: bits of what an end takes. What the peer does not take is
 * done in software before it gets the frame. */
enum {
    AIOKVM_NET_OFFLOAD_CSUM = 1,
    AIOKVM_NET_OFFLOAD_TSO4 = 2,
    AIOKVM_NET_OFFLOAD_TSO6 = 4,
    AIOKVM_NET_OFFLOAD_USO = 8, /* UDP segmentation, VIRTIO_NET_HDR_GSO_UDP_L4 */
    AIOKVM_NET_OFFLOAD_ECN = 16,
};

struct aiokvm_net;
struct aiokvm_net_end;
struct aiokvm_net_capture;
struct aiokvm_net_filter;
struct aiokvm_ratelimit;

struct aiokvm_net_news {
    uint32_t end; /* aiokvm_net_end_id */
    uint32_t news;
    int32_t error;
    uint32_t detail;
};

/* Of one end. What it sends its peer receives, unless it is dropped on the way: that is counted at the sender, but
 * `full`, `invalid`: at the end that had no room, or to which it made no sense. */
struct aiokvm_net_stats {
    uint64_t sent_frames, sent_bytes;
    uint64_t received_frames, received_bytes;
    uint64_t dropped_down;     /* no peer, or a link that is down */
    uint64_t dropped_filtered; /* a filter said so */
    uint64_t dropped_full;     /* no room */
    uint64_t dropped_unresolved;  /* by a NAT: nobody has answered for an address of the guest's network, or
                                   * to a question to the nameserver */
    uint64_t dropped_unsupported; /* by a NAT: a protocol, or a kind of packet, that it does not carry */
    uint64_t dropped_invalid;  /* too short, too long, or a header that contradicts the frame */
    uint64_t throttled;        /* had to wait for the rate limit */
    uint64_t segmented;        /* frames that were cut in software */
    uint64_t interrupts;       /* a NIC's */
};

/* A plane, with a thread of this name if name is not NULL. NULL: *error is an errno. */
struct aiokvm_net *aiokvm_net_new(const char *name, int *error);
/* Ends the thread, and frees the ends that are left. */
void aiokvm_net_free(struct aiokvm_net *net);
/* Without a thread: readable when aiokvm_net_serve has something to do. */
int aiokvm_net_fd(const struct aiokvm_net *net);
/* Moves frames for about so long. 1: there is more to do now. */
int aiokvm_net_serve(struct aiokvm_net *net, uint64_t budget_ns);
/* The thread's id, 0 without one. */
int aiokvm_net_tid(const struct aiokvm_net *net);
/* An eventfd, readable when there is news. */
int aiokvm_net_news_fd(const struct aiokvm_net *net);
/* Takes the news of one end. 0: there is none; the eventfd has been read. */
int aiokvm_net_take(struct aiokvm_net *net, struct aiokvm_net_news *news);

uint32_t aiokvm_net_end_id(const struct aiokvm_net_end *end);
/* -EBUSY: one of them has a peer. -EXDEV: they belong to different planes. */
int aiokvm_net_link(struct aiokvm_net_end *one, struct aiokvm_net_end *other);
void aiokvm_net_unlink(struct aiokvm_net_end *end);
/* A link whose either end is down drops what is sent. Ends are up at first. */
void aiokvm_net_set_up(struct aiokvm_net_end *end, int up);
/* What is to happen to frames that this end sends and receives; any may be NULL, all are kept by the caller for as
 * long as the end has them. */
void aiokvm_net_set_policy(struct aiokvm_net_end *end, struct aiokvm_net_filter *filter,
                           struct aiokvm_net_capture *capture, struct aiokvm_ratelimit *sent,
                           struct aiokvm_ratelimit *received);
void aiokvm_net_end_stats(struct aiokvm_net_end *end, struct aiokvm_net_stats *stats);
/* Unlinks it first. */
void aiokvm_net_end_free(struct aiokvm_net_end *end);

#endif
