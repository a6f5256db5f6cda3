/* A disk whose data moves in C: one I/O thread, which pops requests from the virtqueues itself, has them served
 * by io_uring or by a pool of threads, and completes them in batches. virtio 1.2, section 5.2.
 *
 * All functions belong to the event loop. A virtqueue is the thread's from aiokvm_blk_run until the state is
 * AIOKVM_BLK_IDLE again, and the loop's otherwise. After a fork, the child gets -EOWNERDEAD. */
#ifndef AIOKVM_BLK_H
#define AIOKVM_BLK_H

#include <stdint.h>

#include "notify.h"
#include "ratelimit.h"
#include "vring.h"

#define AIOKVM_BLK_QUEUES 16
#define AIOKVM_BLK_SEGMENTS 16              /* ranges of one DISCARD or WRITE_ZEROES */
#define AIOKVM_BLK_CLEAR_SECTORS (1u << 21) /* of one range: a larger hole makes others wait for too long */
#define AIOKVM_BLK_ID_BYTES 20

enum aiokvm_blk_engine {
    AIOKVM_BLK_AUTO, /* io_uring where the kernel has and allows it */
    AIOKVM_BLK_IO_URING,
    AIOKVM_BLK_THREADS,
};

enum aiokvm_blk_state {
    AIOKVM_BLK_IDLE,   /* no request is taken, none is in flight */
    AIOKVM_BLK_RUNNING,
    AIOKVM_BLK_EXITED, /* the thread is about to end */
    AIOKVM_BLK_CHANGING,
};

struct aiokvm_blk_config {
    int fd; /* of the image; open until aiokvm_blk_free */
    uint32_t engine;
    uint32_t threads; /* of the pool */
    uint32_t readonly;
    uint32_t discard; /* whether DISCARD and unmapping WRITE_ZEROES punch holes */
    uint32_t pause;   /* a request that fails waits for aiokvm_blk_retry, instead of failing in the guest */
    uint32_t align;   /* what O_DIRECT wants of memory, in bytes; 0 without it */
    uint64_t capacity_sectors; /* of 512 bytes */
    struct aiokvm_ratelimit *limit; /* or NULL; outlives the disk */
    const char *name;               /* of the thread */
    const char *id;                 /* what GET_ID says */
};

enum aiokvm_blk_event_kind {
    AIOKVM_BLK_FAILED, /* a request; it waits if so configured */
    AIOKVM_BLK_MISSED, /* failed requests that found no room, so many */
    AIOKVM_BLK_BROKEN, /* a queue: error is that of vring.h, or AIOKVM_BLK_EHEADER, AIOKVM_BLK_ESTATUS */
};

/* What breaks a queue here and not in vring.c. */
#define AIOKVM_BLK_EHEADER (-1000) /* a request shorter than its header */
#define AIOKVM_BLK_ESTATUS (-1001) /* no byte for the status that the device may write */

struct aiokvm_blk_event {
    uint32_t kind;
    uint32_t queue;
    int32_t error; /* FAILED: an errno */
    uint32_t type; /* VIRTIO_BLK_T_* */
    uint64_t offset, length; /* bytes of the disk */
    uint64_t missed;
};

struct aiokvm_blk_stats {
    uint64_t reads, writes, flushes, discards; /* completed, with success */
    uint64_t read_bytes, written_bytes;
    uint64_t errors;      /* completed with another status, or waiting for a retry */
    uint64_t throttled;   /* had to wait for the rate limit */
    uint64_t batches;     /* completions made visible together */
    uint64_t interrupts;
    uint64_t in_flight;
    uint64_t copied_bytes; /* as direct I/O could not take the guest's memory */
};

struct aiokvm_blk;

/* Starts the thread, idle. NULL, and *error: an errno; ENOSYS, EPERM, ENOMEM... if io_uring was forced and refused. */
struct aiokvm_blk *aiokvm_blk_new(const struct aiokvm_blk_config *config, int *error);
/* Only what aiokvm_blk_join has joined, or what another process has made. */
void aiokvm_blk_free(struct aiokvm_blk *blk);

/* The engine in use. *refused is the errno with which the kernel refused io_uring, or 0. */
uint32_t aiokvm_blk_engine(const struct aiokvm_blk *blk, int *refused);
/* Readable when there is an event or the state has changed; reading it clears it. */
int aiokvm_blk_fd(const struct aiokvm_blk *blk);
uint32_t aiokvm_blk_state(const struct aiokvm_blk *blk);
int aiokvm_blk_tid(const struct aiokvm_blk *blk);
/* 1 and an event, or 0: there is none. */
int aiokvm_blk_take(struct aiokvm_blk *blk, struct aiokvm_blk_event *event);
void aiokvm_blk_stats(const struct aiokvm_blk *blk, struct aiokvm_blk_stats *stats);

/* Queue number index, while idle: NULL takes it away. kick is readable, by an edge, when the driver has rung. */
int aiokvm_blk_set_queue(struct aiokvm_blk *blk, uint32_t index, struct aiokvm_vring *vring, int kick);
/* The features that the driver took, for what they mean to requests (DISCARD, WRITE_ZEROES); while idle. */
int aiokvm_blk_set_features(struct aiokvm_blk *blk, uint64_t features);
/* The thread notifies by a copy of the descriptor, which it may do long after the caller has closed that. */
int aiokvm_blk_run(struct aiokvm_blk *blk, const struct aiokvm_notifier *notifier);
/* Takes no more requests, waits for what the kernel has, and is IDLE. What one queue (-1: every queue) has in
 * flight is discarded, as it is taken away from the disk; the others' is completed. */
int aiokvm_blk_stop(struct aiokvm_blk *blk, int32_t queue);
/* The same, and the thread ends: EXITED. */
int aiokvm_blk_exit(struct aiokvm_blk *blk);
/* -EBUSY unless EXITED. */
int aiokvm_blk_join(struct aiokvm_blk *blk);
/* Submits again what has failed and waits. */
int aiokvm_blk_retry(struct aiokvm_blk *blk);
/* At any time: what requests that are taken from now on see. */
void aiokvm_blk_set_capacity(struct aiokvm_blk *blk, uint64_t sectors);
/* Without write-back, a write is durable before it completes. */
void aiokvm_blk_set_writeback(struct aiokvm_blk *blk, int writeback);

/* fallocate, for those on the loop: 0 or a negative errno. */
int aiokvm_fallocate(int fd, int mode, uint64_t offset, uint64_t length);

#endif
