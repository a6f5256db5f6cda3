/* The engine that hands operations to io_uring. */
#define _GNU_SOURCE
#include "blk_priv.h"

#include <errno.h>
#include <stdlib.h>

#ifndef AIOKVM_HAVE_LIBURING

struct blk_engine *blk_uring_new(struct aiokvm_blk *blk, int *error)
{
    (void)blk;
    *error = ENOSYS;
    return NULL;
}

#else

#include <liburing.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A batch; more are submitted in several. */
#define ENTRIES 128
#define COMPLETIONS 1024
/* The control eventfd and each queue's. */
#define WATCHED_MAX (AIOKVM_BLK_QUEUES * 2)
/* Operations that the kernel has at a time: were there no room for a completion, it would take no more of them. */
#define IN_RING_MAX (COMPLETIONS - 2 * WATCHED_MAX)

struct uring {
    struct blk_engine engine;
    struct io_uring ring;
    bool disabled; /* made so, to belong to the thread that enables it */
    int watched[WATCHED_MAX];
    uint32_t watched_count;
    uint32_t in_ring;
    struct blk_op *todo, **todo_last; /* what has to wait for others to complete */
};

static struct uring *uring_of(struct blk_engine *engine)
{
    return (struct uring *)engine;
}

static struct io_uring_sqe *get_sqe(struct uring *uring)
{
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&uring->ring)))
        io_uring_submit(&uring->ring);
    return sqe;
}

static int begin(struct blk_engine *engine)
{
    struct uring *uring = uring_of(engine);
    /* liburing 2.3 forgot to export io_uring_enable_rings. */
    if (uring->disabled &&
        syscall(SYS_io_uring_register, uring->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0)
        return -errno;
    /* The image is not registered: a ring ends after its process, and would hold the image's lock till then. */
    return 0;
}

/* user_data of what watches: odd, unlike the address of an operation. */
static void arm(struct uring *uring, uint32_t index)
{
    struct io_uring_sqe *sqe = get_sqe(uring);
    /* Multishot polling sees every write as an edge: the counter need not be read. */
    io_uring_prep_poll_multishot(sqe, uring->watched[index], POLLIN);
    io_uring_sqe_set_data64(sqe, (uint64_t)index << 1 | 1);
}

static int watch(struct blk_engine *engine, int fd)
{
    struct uring *uring = uring_of(engine);
    if (uring->watched_count == WATCHED_MAX)
        return -ENOSPC;
    uring->watched[uring->watched_count] = fd;
    arm(uring, uring->watched_count++);
    return 0;
}

static void start(struct uring *uring, struct blk_op *op)
{
    struct io_uring_sqe *sqe = get_sqe(uring);
    int fd = uring->engine.blk->config.fd;
    uring->in_ring++;
    switch (op->kind) {
    case BLK_OP_READ:
        if (op->count == 1)
            io_uring_prep_read(sqe, fd, op->iov->iov_base, (unsigned)op->iov->iov_len, op->offset);
        else
            io_uring_prep_readv(sqe, fd, op->iov, op->count, op->offset);
        break;
    case BLK_OP_WRITE:
        if (op->count == 1)
            io_uring_prep_write(sqe, fd, op->iov->iov_base, (unsigned)op->iov->iov_len, op->offset);
        else
            io_uring_prep_writev(sqe, fd, op->iov, op->count, op->offset);
        if (op->durable)
            sqe->rw_flags = RWF_DSYNC;
        break;
    case BLK_OP_SYNC:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
    default:
        io_uring_prep_fallocate(sqe, fd, op->mode, (off_t)op->offset, (off_t)op->length);
    }
    io_uring_sqe_set_data(sqe, op);
}

static void submit(struct blk_engine *engine, struct blk_op *op)
{
    struct uring *uring = uring_of(engine);
    if (!uring->todo && uring->in_ring < IN_RING_MAX) {
        start(uring, op);
        return;
    }
    if (!uring->todo)
        uring->todo_last = &uring->todo;
    op->next = NULL;
    *uring->todo_last = op;
    uring->todo_last = &op->next;
}

static void take(struct uring *uring)
{
    struct io_uring_cqe *cqe;
    unsigned count;
    do {
        unsigned head;
        count = 0;
        io_uring_for_each_cqe(&uring->ring, head, cqe) {
            count++;
            if (!(cqe->user_data & 1)) {
                struct blk_op *op = io_uring_cqe_get_data(cqe);
                uring->in_ring--;
                op->result = cqe->res;
                aiokvm_blk_done(uring->engine.blk, op);
            } else if (!(cqe->flags & IORING_CQE_F_MORE) && cqe->res >= 0) {
                arm(uring, (uint32_t)(cqe->user_data >> 1));
            }
        }
        io_uring_cq_advance(&uring->ring, count);
        while (uring->todo && uring->in_ring < IN_RING_MAX) {
            struct blk_op *op = uring->todo;
            uring->todo = op->next;
            start(uring, op);
        }
    } while (count);
}

static void wait_for(struct blk_engine *engine, int64_t timeout_ns)
{
    struct uring *uring = uring_of(engine);
    if (timeout_ns < 0) {
        io_uring_submit_and_wait(&uring->ring, 1);
    } else {
        struct __kernel_timespec timeout = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
        struct io_uring_cqe *cqe;
        io_uring_submit_and_wait_timeout(&uring->ring, &cqe, 1, &timeout, NULL);
    }
    take(uring);
}

static void free_uring(struct blk_engine *engine)
{
    struct uring *uring = uring_of(engine);
    io_uring_queue_exit(&uring->ring);
    free(uring);
}

static const struct blk_engine_type type = { begin, watch, submit, wait_for, free_uring };

static int setup(struct uring *uring, unsigned flags)
{
    struct io_uring_params params = { .flags = flags | IORING_SETUP_CQSIZE, .cq_entries = COMPLETIONS };
    int result = io_uring_queue_init_params(ENTRIES, &uring->ring, &params);
    if (result < 0)
        return result;
    /* 5.11 and 5.5: a wait with a timeout, and completions that are never lost. */
    unsigned needed = IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
    if ((params.features & needed) == needed)
        return 0;
    io_uring_queue_exit(&uring->ring);
    return -ENOSYS;
}

/* Multishot polling came with 5.13, fallocate long before: a ring that cannot do either is no use. */
static bool can_all(struct io_uring *ring)
{
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    if (!probe)
        return false;
    bool can = io_uring_opcode_supported(probe, IORING_OP_FALLOCATE) &&
        io_uring_opcode_supported(probe, IORING_OP_MKDIRAT); /* 5.15: newer than multishot polling */
    io_uring_free_probe(probe);
    return can;
}

struct blk_engine *blk_uring_new(struct aiokvm_blk *blk, int *error)
{
    struct uring *uring = calloc(1, sizeof(*uring));
    if (!uring) {
        *error = ENOMEM;
        return NULL;
    }
    uring->engine = (struct blk_engine){ &type, blk };
    /* Completions are worked on when the thread asks for them, not by interrupting it; 6.1 and later. */
    uring->disabled = true;
    int result = setup(uring, IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (result == -EINVAL) {
        uring->disabled = false;
        result = setup(uring, 0);
    }
    if (result == 0 && !can_all(&uring->ring)) {
        io_uring_queue_exit(&uring->ring);
        result = -ENOSYS;
    }
    if (result < 0) {
        free(uring);
        *error = -result;
        return NULL;
    }
    *error = 0;
    return &uring->engine;
}

#endif
