/* The engine that hands operations to a pool of threads, where there is no io_uring. */
#define _GNU_SOURCE
#include "blk_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct pool {
    struct blk_engine engine;
    int epoll;
    int done_fd; /* eventfd: something is on the list of what is done */
    pthread_t *threads;
    pthread_mutex_t lock; /* of what follows */
    uint32_t count;
    pthread_cond_t work;
    struct blk_op *todo, **todo_last;
    struct blk_op *done;
    uint32_t idle, queued;
    bool end;
};

static struct pool *pool_of(struct blk_engine *engine)
{
    return (struct pool *)engine;
}

static int64_t execute(int fd, const struct blk_op *op)
{
    ssize_t result;
    switch (op->kind) {
    case BLK_OP_READ:
        result = preadv(fd, op->iov, (int)op->count, (off_t)op->offset);
        break;
    case BLK_OP_WRITE:
        result = pwritev2(fd, op->iov, (int)op->count, (off_t)op->offset, op->durable ? RWF_DSYNC : 0);
        break;
    case BLK_OP_SYNC:
        result = fdatasync(fd);
        break;
    default:
        result = fallocate(fd, op->mode, (off_t)op->offset, (off_t)op->length);
    }
    return result < 0 ? -errno : result;
}

/* Under the lock. */
static void finish(struct pool *pool, struct blk_op *op)
{
    bool first = !pool->done;
    op->next = pool->done;
    pool->done = op;
    if (first) {
        ssize_t written = write(pool->done_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
        (void)written;
    }
}

static void *worker(void *argument)
{
    struct pool *pool = argument;
    pthread_setname_np(pthread_self(), pool->engine.blk->name);
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->todo && !pool->end) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
        struct blk_op *op = pool->todo;
        if (!op)
            break;
        pool->todo = op->next;
        pool->queued--;
        pthread_mutex_unlock(&pool->lock);
        op->result = execute(pool->engine.blk->config.fd, op);
        pthread_mutex_lock(&pool->lock);
        finish(pool, op);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static int watch(struct blk_engine *engine, int fd)
{
    /* An edge at every write: the counter need not be read. */
    struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.fd = fd };
    return epoll_ctl(pool_of(engine)->epoll, EPOLL_CTL_ADD, fd, &event) < 0 && errno != EEXIST ? -errno : 0;
}

static int begin(struct blk_engine *engine)
{
    return watch(engine, pool_of(engine)->done_fd);
}

/* One more thread, if there may be; under the lock. */
static void grow(struct pool *pool)
{
    if (pool->count == pool->engine.blk->config.threads)
        return;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, BLK_STACK_SIZE);
    pool->count += pthread_create(&pool->threads[pool->count], &attributes, worker, pool) == 0;
    pthread_attr_destroy(&attributes);
}

static void submit(struct blk_engine *engine, struct blk_op *op)
{
    struct pool *pool = pool_of(engine);
    op->next = NULL;
    pthread_mutex_lock(&pool->lock);
    /* A worker that was woken and has not run yet still counts as idle: what is queued counts, too. */
    if (pool->idle <= pool->queued)
        grow(pool);
    if (pool->count) {
        if (!pool->todo)
            pool->todo_last = &pool->todo;
        *pool->todo_last = op;
        pool->todo_last = &op->next;
        pool->queued++;
    } else {
        /* The host has no thread to give: the disk is slow then, but it works. */
        op->result = execute(engine->blk->config.fd, op);
        finish(pool, op);
    }
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_signal(&pool->work);
}

static void wait_for(struct blk_engine *engine, int64_t timeout_ns)
{
    struct pool *pool = pool_of(engine);
    struct epoll_event events[8];
    int64_t timeout_ms = timeout_ns < 0 ? -1 : (timeout_ns + 999999) / 1000000;
    if (timeout_ms > 60000)
        timeout_ms = 60000;
    epoll_wait(pool->epoll, events, 8, (int)timeout_ms);
    pthread_mutex_lock(&pool->lock);
    struct blk_op *done = pool->done, *oldest = NULL;
    pool->done = NULL;
    pthread_mutex_unlock(&pool->lock);
    while (done) {
        struct blk_op *next = done->next;
        done->next = oldest;
        oldest = done;
        done = next;
    }
    while (oldest) {
        struct blk_op *next = oldest->next;
        aiokvm_blk_done(engine->blk, oldest);
        oldest = next;
    }
}

static void free_pool(struct blk_engine *engine)
{
    struct pool *pool = pool_of(engine);
    pthread_mutex_lock(&pool->lock);
    pool->end = true;
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_broadcast(&pool->work);
    for (uint32_t i = 0; i < pool->count; i++)
        pthread_join(pool->threads[i], NULL);
    if (pool->epoll >= 0)
        close(pool->epoll);
    if (pool->done_fd >= 0)
        close(pool->done_fd);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool->threads);
    free(pool);
}

static const struct blk_engine_type type = { begin, watch, submit, wait_for, free_pool };

struct blk_engine *blk_pool_new(struct aiokvm_blk *blk, int *error)
{
    struct pool *pool = calloc(1, sizeof(*pool));
    pthread_t *threads = calloc(blk->config.threads, sizeof(*threads));
    if (!pool || !threads) {
        free(pool);
        free(threads);
        *error = ENOMEM;
        return NULL;
    }
    pool->engine = (struct blk_engine){ &type, blk };
    pool->threads = threads;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pool->epoll = epoll_create1(EPOLL_CLOEXEC);
    pool->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (pool->epoll < 0 || pool->done_fd < 0) {
        *error = errno;
        free_pool(&pool->engine);
        return NULL;
    }
    *error = 0;
    return &pool->engine;
}
