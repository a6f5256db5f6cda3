/* What the parts of the net have in common. All of this runs with the plane's lock held. */
#ifndef AIOKVM_NET_PRIV_H
#define AIOKVM_NET_PRIV_H

#include <linux/virtio_net.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "budget.h"
#include "net.h"

/* The headers of 6.2 and later have it. */
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

/* How much an end does when it is served, before others have their turn; less if the time is over, see net_spend. */
enum { NET_QUANTUM = 64 };
/* What work costs beside the bytes that it copies, in bytes, and after how much of it the clock is looked at: some 10
 * microseconds. */
enum { NET_COST_FRAME = 1 << 10, NET_COST_CALL = 1 << 14, NET_COST_LOOK = 1 << 15 };
/* Bytes of a frame that are the plane's own memory: link, network and transport header. */
enum { NET_HEAD = 256 };

struct net_offload; /* net_offload.c */

/* Of net_progress.passed: what need not be asked again when a frame that was held back is sent again. */
enum {
    NET_PASSED_FILTERS = 1,
    NET_PASSED_SENT_LIMIT = 2,
    NET_PASSED_RECEIVED_LIMIT = 4,
    NET_PASSED_CAPTURES = 8,
};

/* How far a frame has got on a link: all 0 at first, then net_send's. One that has to wait is sent again with it as it
 * was; on another link it begins anew. */
struct net_progress {
    uint32_t passed; /* NET_PASSED_* */
    uint32_t done;   /* the receiver's: pieces that were cut from it, or ports of a switch that have it */
    uint32_t link;   /* aiokvm_net_end.link of the sender */
};

/* A frame on its way. The header is checked, in the byte order of the host; num_buffers has no meaning.
 *
 * The first NET_HEAD bytes, or all, do not change while the frame is on its way; what is behind them may be guest
 * memory, which can change at any time. They are in iov[0], which holds nothing else unless it holds all. Before iov
 * there is one free entry, iov[-1], which the receiver may use for a header of its own. */
struct net_frame {
    struct virtio_net_hdr_v1 hdr;
    struct iovec *iov;
    uint32_t count;
    uint32_t size; /* in bytes, without hdr: AIOKVM_NET_MIN_FRAME to AIOKVM_NET_MAX_FRAME */
    uint32_t hops;  /* switches that it has crossed */
    uint32_t queue; /* of the sender that it came from, a hint: both directions of a flow should use one */
    struct net_progress progress;
};

enum net_result {
    NET_TAKEN,   /* or dropped, and counted; it does not matter to the sender */
    NET_BLOCKED, /* nothing was done: to be sent again when `resume` says so */
};

struct net_type {
    /* Does up to NET_QUANTUM frames' worth of what there is to do, while there is time. True: there is more. */
    bool (*serve)(struct aiokvm_net_end *end);
    /* Takes a frame from the peer; `frame` and what it points to are the caller's again afterwards. */
    enum net_result (*receive)(struct aiokvm_net_end *end, struct net_frame *frame);
    /* What was blocked may be sent again. NULL: net_ready(end). */
    void (*resume)(struct aiokvm_net_end *end);
    /* After a batch of `receive`, for an end that has called net_dirty. It makes no system call that may take long if
     * the time is over: it can be served instead. May be NULL. */
    void (*flush)(struct aiokvm_net_end *end);
    /* Gives back what the end holds, and its memory. */
    void (*free)(struct aiokvm_net_end *end);
};

/* First in every end's own struct. */
struct aiokvm_net_end {
    const struct net_type *type;
    struct aiokvm_net *net;
    struct aiokvm_net_end *peer;
    uint32_t id;
    uint32_t link;     /* tells the links of a plane apart; of the last one */
    uint32_t offloads; /* AIOKVM_NET_OFFLOAD_*: what `receive` takes */
    bool up;
    bool waits;    /* was told NET_BLOCKED and not resumed since */
    bool yields;   /* is resumed when it has its turn */
    bool is_ready; /* in the list of ready ends */
    bool is_dirty;
    bool is_later; /* in the list of those that are to be served when frames have gathered */
    bool is_told;           /* in the list of those with news */
    uint64_t deadline_ns;   /* of net_at; 0: none */
    uint64_t throttled_ns;  /* until when a rate limit holds back what it sends; 0: it does not */
    uint32_t wake, batch; /* frames that it has sent since whoever serves the plane woke up, if wake is the plane's */
    uint32_t news, detail;
    int32_t error;
    struct aiokvm_net_filter *filter;
    struct aiokvm_net_capture *capture;
    struct aiokvm_ratelimit *sent_limit, *received_limit;
    struct aiokvm_net_stats stats;
    struct aiokvm_net_end *next, *previous;             /* all of the plane */
    struct aiokvm_net_end *next_ready, *next_dirty, *next_later, *next_told;
};

/* A descriptor that belongs to an end: edge-triggered. What it was ready for stays in `events` (EPOLLIN, EPOLLOUT,
 * EPOLLHUP, EPOLLERR) until the end takes it out with net_watch_done, which it does when the descriptor has said EAGAIN. */
struct net_watch {
    struct aiokvm_net_end *end;
    int fd; /* below 0: not watched */
    uint32_t events;
    uint32_t wanted;
    bool is_source; /* the end's own, before net_watch: it is readable for frames that the end sends, and nothing else */
    bool is_silent; /* not asked for EPOLLIN, which is in `events` */
};

/* Whether a plane without a thread lets frames gather before the loop is woken: net_gather.c. All 0 at first. */
struct net_gather {
    bool is_on;
    uint32_t period_ns, longest_ns; /* how long, while it is on; and how long at most */
    uint32_t near, singles, try_after;
    uint64_t last_ns, frames_ns; /* the last turn, the last with frames */
};

struct aiokvm_net {
    pthread_mutex_t lock;
    _Atomic uint32_t wanted; /* calls that wait for the lock: the thread lets them go first */
    pthread_t thread;
    _Atomic uint32_t tid;
    bool has_thread;
    bool rung; /* `control` was written and not read since */
    uint32_t wake;  /* counts how often whoever serves it woke up */
    uint32_t batch; /* how many frames one end has sent since then, at most */
    uint64_t work;  /* what all frames since then have cost, as net_spend counts it */
    _Atomic bool ending;
    char name[16];
    pid_t pid; /* of the process whose it is: a child of fork has a copy */
    int epoll, timer, control, news_fd;
    int door; /* without a thread, what the loop watches: the epoll instance, or only the timer while frames gather */
    struct net_gather gather;
    uint64_t timer_ns; /* what the timer is set to, 0: nothing */
    /* The time of the call that holds the lock. */
    uint64_t until_ns; /* 0: the clock was not looked at yet */
    uint32_t spent;    /* since the clock was looked at */
    bool is_over;
    uint32_t next_id, next_link;
    struct aiokvm_net_end *ends;
    struct aiokvm_net_end *ready, **ready_tail;
    struct aiokvm_net_end *dirty;
    struct aiokvm_net_end *later;
    struct aiokvm_net_end *told, **told_tail;
    struct net_offload *offload; /* for cutting frames in software */
};

/* ---- net.c ---- */

/* For every call from outside. False: this is a child of fork, nothing may be done. */
bool net_enter(struct aiokvm_net *net);
/* Flushes what is dirty; what is ready will be served. */
void net_leave(struct aiokvm_net *net);
/* What was received is published. */
void net_flush(struct aiokvm_net *net);

void net_look_at_clock(struct aiokvm_net *net);

/* net_end.c: a new end of its type's own size, zeroed but for the fields above; enters by itself. NULL: *error is an errno. */
void *net_end_new(struct aiokvm_net *net, const struct net_type *type, size_t size, int *error);

/* To be served soon. */
void net_ready(struct aiokvm_net_end *end);
/* There was work of this cost, in bytes that were copied, or NET_COST_*. Whatever goes on for long tells, and stops when
 * net->is_over: so no call takes much longer than it may, whoever works in it, and a thread gives way. */
static inline void net_spend(struct aiokvm_net *net, uint32_t cost)
{
    net->spent += cost;
    if (net->spent >= NET_COST_LOOK)
        net_look_at_clock(net);
}
/* The time is over while a frame that this end sends is on its way: its receiver says NET_BLOCKED, and the end is
 * resumed when it has its next turn. */
void net_yield(struct aiokvm_net_end *end);
/* To be flushed when the batch is over. */
void net_dirty(struct aiokvm_net_end *end);
/* Instead of being told, while frames gather: to be served when they have. */
void net_later(struct aiokvm_net_end *end);
/* To be served at this time of aiokvm_now_ns, if not before; 0: no more. */
void net_at(struct aiokvm_net_end *end, uint64_t deadline_ns);
/* A rate limit holds back what this end sends until then; `resume` follows. */
void net_throttle(struct aiokvm_net_end *end, uint64_t deadline_ns);
/* Tells the program. `error` and `detail` are of the first news that has them. */
void net_tell(struct aiokvm_net_end *end, uint32_t news, int32_t error, uint32_t detail);
/* This end takes frames again: its peer, if it was blocked, sends again. */
void net_resume(struct aiokvm_net_end *end);

/* events: EPOLLIN, EPOLLOUT. Returns 0 or -errno. While an end waits for its peer, a source of frames says only once that
 * there are more. */
int net_watch(struct net_watch *watch, struct aiokvm_net_end *end, int fd, uint32_t events);
/* What it was ready for has been done. */
void net_watch_done(struct net_watch *watch, uint32_t events);
/* Does not close the descriptor. */
void net_unwatch(struct net_watch *watch);

/* ---- net_gather.c ---- */

/* What was done since everything had been served before. */
struct net_turn {
    uint32_t batch;   /* how many frames one end has sent, at most */
    uint64_t work;    /* what all frames have cost, in bytes as net_spend counts it */
    uint64_t took_ns; /* the last call */
};

/* Everything was served. */
void net_gather_next(struct net_gather *gather, uint64_t now_ns, const struct net_turn *turn);

/* ---- net_link.c ---- */

/* Sends a frame to the peer: counts, filters, records, holds back, cuts. */
enum net_result net_send(struct aiokvm_net_end *from, struct net_frame *frame);
/* Fills in frame->iov[0] with a private copy of up to NET_HEAD bytes of the data in `from` (count iovecs, of which the
 * first `skip` bytes are not the frame's), and the rest behind it. iov has room for count + 1 entries after the free
 * one. frame->size is set. */
void net_frame_set(struct net_frame *frame, struct iovec *iov, uint8_t head[NET_HEAD], const struct iovec *from,
                   uint32_t count, size_t skip);
/* Copies all of it. */
void net_frame_copy(const struct net_frame *frame, uint8_t *to);
/* Whether the header fits the frame: csum_start and csum_offset, gso_type, gso_size, hdr_len; unknown flags are taken
 * out. False: it is to be dropped. */
bool net_frame_check(struct net_frame *frame);

/* ---- net_queue.c: frames that wait, copied ---- */

/* How much of a share is taken at a time: so the budgets' lock is not for each frame. */
enum { NET_ROOM_STEP = 17 << 12 };

/* Memory for frames that wait. The first step it has in any case: one frame, however long, always has room. */
struct net_room {
    struct aiokvm_share *share;
    uint64_t used, taken; /* in bytes */
};

void net_room_init(struct net_room *room, struct aiokvm_share *share);
/* False: the share may not have more. */
bool net_room_take(struct net_room *room, uint64_t bytes);
void net_room_give(struct net_room *room, uint64_t bytes);

struct net_queue {
    struct net_queued *first, **last;
    uint32_t frames;
    uint32_t max_frames;
    uint64_t bytes;
    uint64_t max_bytes;
    struct net_room room;
};

/* What waits takes from `share`, which is of bytes. */
void net_queue_init(struct net_queue *queue, uint32_t max_frames, uint64_t max_bytes, struct aiokvm_share *share);
void net_queue_clear(struct net_queue *queue);
/* The same for as long as there is time. */
void net_queue_clear_some(struct net_queue *queue, struct aiokvm_net *net);
/* False: there is no room, in the queue or in its share, or no memory. */
bool net_queue_put(struct net_queue *queue, const struct net_frame *frame);
/* Sends what waits, at most `most` frames, while there is time. NET_BLOCKED: the peer takes no more now. */
enum net_result net_queue_send(struct net_queue *queue, struct aiokvm_net_end *from, uint32_t most);

/* ---- net_offload.c ---- */

/* What the frame needs of an end: AIOKVM_NET_OFFLOAD_*. */
uint32_t net_frame_needs(const struct net_frame *frame);
/* Whether the frame, if it has to be cut, can be: its headers are what gso_type says. */
bool net_offload_fits(const struct net_frame *frame);
/* Gives the frame to `to` in pieces that need none of what it does not take, beginning with frame->progress.done. To
 * one that takes segmentation but no checksums: whole, with the checksum of it, and gso_type and gso_size as they are.
 * NET_BLOCKED also when the time is over. */
enum net_result net_offload_send(struct aiokvm_net_end *to, struct net_frame *frame);
void net_offload_free(struct net_offload *offload);

/* ---- net_filter.c, net_capture.c ---- */

/* Whether the frame may pass; `sent` by the end that has the filter, or to be received by it. */
bool net_filter_passes(struct aiokvm_net_filter *filter, struct aiokvm_net_end *end, const struct net_frame *frame,
                       bool sent, uint64_t now_ns);
void net_capture_record(struct aiokvm_net_capture *capture, struct aiokvm_net_end *end, const struct net_frame *frame,
                        bool sent);

#endif
