/* What the files of blk share: the disk, a request, and what an engine is. */
#ifndef AIOKVM_BLK_PRIV_H
#define AIOKVM_BLK_PRIV_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "blk.h"
#include "budget.h"
#include "pace.h"

/* ThreadSanitizer keeps its own on the stack. */
#ifdef __SANITIZE_THREAD__
#define BLK_STACK_SIZE (2048 * 1024)
#else
#define BLK_STACK_SIZE (128 * 1024)
#endif

/* What one operation moves at most: a request of gigabytes holds up neither a stop nor the others. */
#define BLK_PIECE_BYTES (4 << 20)
#define SECTOR_BYTES 512
/* The same where memory is copied. */
#define BLK_BOUNCE_BYTES (64 << 10)
/* A request that takes so long that the guest is not waiting for it alone. */
#define BLK_LARGE_BYTES (256 << 10)
/* For so long at most it is not told of one that has ended. */
#define BLK_HOLD_NS 4000000
#define BLK_IOV_MAX 1024 /* the kernel's UIO_MAXIOV */
#define BLK_EVENTS 64
/* EAGAIN or EINTR so often in a row is an error. */
#define BLK_TRIES 16

enum blk_op_kind { BLK_OP_READ, BLK_OP_WRITE, BLK_OP_SYNC, BLK_OP_ALLOCATE };

/* One system call, as the engine sees it. */
struct blk_op {
    struct blk_op *next; /* the pool's lists */
    uint32_t kind;
    uint32_t count; /* iovecs */
    const struct iovec *iov;
    uint64_t offset, length;
    int mode;    /* of fallocate */
    bool durable; /* RWF_DSYNC */
    int64_t result; /* bytes, 0, or a negative errno */
};

struct blk_range {
    uint64_t offset, length;
    bool unmap;
};

struct blk_queue;

/* Owned by the I/O thread; op is the engine's between submit and aiokvm_blk_done. */
struct blk_request {
    struct blk_op op; /* the first: an op is its request */
    struct blk_request *next;
    struct blk_queue *queue;
    struct aiokvm_chain *chain;
    uint8_t *status;
    uint32_t type;
    uint32_t written; /* bytes of the chain that are the device's answer */
    /* IN and OUT: what is still to move. */
    struct iovec *iov;
    uint32_t count;
    uint64_t offset, left;
    uint64_t total;
    size_t hidden; /* bytes of the last iovec that the piece in flight leaves out */
    void *bounce;     /* a buffer of its own, where direct I/O cannot take the guest's memory */
    struct iovec own; /* of that, or of zeroes */
    /* DISCARD and WRITE_ZEROES. */
    uint32_t range, range_count;
    bool by_hand;  /* zeroes are written: the file cannot do better */
    bool unsynced; /* the file has zeroed a range, which is not durable before a sync */
    uint32_t tries;
    struct blk_range ranges[AIOKVM_BLK_SEGMENTS]; /* the last: not cleared for each request */
};

struct blk_list {
    struct blk_request *first, **last;
};

struct blk_queue {
    struct aiokvm_blk *blk;
    uint32_t index;
    struct aiokvm_vring *vring;
    int kick, watched; /* descriptors */
    bool broken, dirty;
    struct blk_request *free; /* allocated as the queue gets deeper, kept */
};

/* An engine belongs to the I/O thread once it is begun. */
struct blk_engine {
    const struct blk_engine_type *type;
    struct aiokvm_blk *blk;
};

struct blk_engine_type {
    int (*begin)(struct blk_engine *engine); /* in the I/O thread; a negative errno */
    /* Wakes up from wait at every write to this eventfd (an edge: nobody reads it). A negative errno. */
    int (*watch)(struct blk_engine *engine, int fd);
    void (*submit)(struct blk_engine *engine, struct blk_op *op);
    /* Submits, waits for a completion, an edge or so many ns (< 0: no end), calls aiokvm_blk_done. */
    void (*wait)(struct blk_engine *engine, int64_t timeout_ns);
    void (*free)(struct blk_engine *engine);
};

/* NULL and *error if it cannot be had here. */
struct blk_engine *blk_uring_new(struct aiokvm_blk *blk, int *error);
struct blk_engine *blk_pool_new(struct aiokvm_blk *blk, int *error);

/* Requests that have ended and of which the driver has not been told. */
struct blk_ended {
    uint32_t count;
    bool some_small;
    uint64_t since_ns; /* 0: not looked at yet */
};

/* The states of blk.h, below a count. */
enum { BLK_WANT_IDLE, BLK_WANT_RUNNING, BLK_WANT_EXIT, BLK_WANT_MASK = 3 };

struct aiokvm_blk {
    struct aiokvm_blk_config config; /* name and id are not used: they are below */
    char name[16], id[AIOKVM_BLK_ID_BYTES];
    pid_t pid;
    pthread_t thread;
    bool joinable; /* the loop's */
    struct blk_engine *engine;
    uint32_t engine_kind;
    int refused;
    int control; /* eventfd: the loop wants something */
    int news;    /* eventfd: the thread tells something */

    _Atomic uint32_t want;  /* the loop's */
    _Atomic int32_t want_stopped; /* the loop's: which queue, or -1: all */
    _Atomic uint32_t retry; /* the loop sets, the thread clears */
    _Atomic uint32_t obeyed; /* the thread's: the last want that is so */
    _Atomic uint32_t tid;   /* the thread's */
    _Atomic int begin_error;
    _Atomic uint64_t capacity_sectors;
    _Atomic uint32_t writeback;

    pthread_mutex_t lock; /* of the events */
    struct aiokvm_blk_event events[BLK_EVENTS];
    uint32_t event_head, event_tail;
    uint64_t missed;

    /* The loop's while IDLE, the thread's else. */
    struct aiokvm_notifier notifier; /* the queues of a device share its interrupt; irqfd is a copy */
    struct blk_queue queues[AIOKVM_BLK_QUEUES];
    uint64_t features;

    /* The thread's. */
    uint64_t in_flight;
    bool running, stopping;
    struct blk_ended ended;
    struct aiokvm_pace pace;
    int32_t stop_queue; /* which one, or -1: all */
    bool sync_failed; /* the kernel tells once, and may have dropped the data: no later flush can succeed */
    bool shrunk;      /* the image has got shorter than the disk */
    struct blk_list throttled, failed;
    struct blk_list starved; /* wait for a bounce buffer: others of this disk have its share */
    struct aiokvm_share bounces; /* of AIOKVM_BUDGET_BOUNCE_BYTES */
    uint64_t throttle_ns; /* until when */
    struct {
        _Atomic uint64_t reads, writes, flushes, discards, read_bytes, written_bytes, errors, throttled;
        _Atomic uint64_t batches, interrupts, in_flight, copied_bytes;
    } stats;
};

static inline void blk_count(_Atomic uint64_t *counter, uint64_t n)
{
    /* One writer each: readers may see it late, but never torn. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/* blk.c */
void aiokvm_blk_done(struct aiokvm_blk *blk, struct blk_op *op);
void blk_tell(struct aiokvm_blk *blk, const struct aiokvm_blk_event *event);
void blk_release(struct blk_request *request);
/* For how long the driver need not be told yet; 0: now. */
uint64_t blk_hold_ns(struct blk_ended *ended, uint64_t in_flight);

/* blk_request.c */

/* Parses a chain that was popped, and starts or ends it. False: the queue is broken. */
bool blk_request_take(struct blk_queue *queue, struct blk_request *request);
/* Starts what waits for the rate limit, as far as that allows. */
void blk_request_throttle(struct aiokvm_blk *blk);
void blk_request_retry(struct aiokvm_blk *blk);
/* Ends what waits in a queue that is stopped. */
void blk_request_drop(struct aiokvm_blk *blk);

/* blk_piece.c */

/* Copies so many bytes from the front of the iovecs, or leaves them out (to is NULL). */
void blk_consume(struct blk_request *request, void *to, uint64_t bytes);
/* Copies from iovecs to a buffer or back, without using them up. */
void blk_copy(const struct iovec *iov, char *buffer, uint64_t bytes, bool to_buffer);
/* Submits its next piece. */
void blk_proceed(struct blk_request *request);
/* What a request is cut into has been done by the engine. */
void blk_request_done(struct blk_request *request);
void blk_finish(struct blk_request *request, uint8_t status);
/* A request that the driver got wrong, or that this disk does not do: no business of the host's. */
void blk_refuse(struct blk_request *request, uint8_t status);
void blk_drop(struct blk_request *request);
/* Whether it belongs to a queue that is stopped. */
bool blk_is_discarded(const struct blk_request *request);

static inline void blk_list_push(struct blk_list *list, struct blk_request *request)
{
    request->next = NULL;
    if (!list->first)
        list->last = &list->first;
    *list->last = request;
    list->last = &request->next;
}

static inline struct blk_request *blk_list_pop(struct blk_list *list)
{
    struct blk_request *request = list->first;
    if (request)
        list->first = request->next;
    return request;
}

#endif
