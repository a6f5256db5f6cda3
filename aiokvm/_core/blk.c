/* A disk's I/O thread, and what the event loop tells it. */
#define _GNU_SOURCE
#include "blk_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/virtio_mmio.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"

/* ---- the thread ---- */

static void ring(int eventfd)
{
    /* A counter that is full has woken whoever reads it. */
    ssize_t result = write(eventfd, &(uint64_t){ 1 }, sizeof(uint64_t));
    (void)result;
}

void blk_tell(struct aiokvm_blk *blk, const struct aiokvm_blk_event *event)
{
    pthread_mutex_lock(&blk->lock);
    /* The last place is for a queue that is broken: that must not get lost among a thousand failures. */
    uint32_t room = BLK_EVENTS - (blk->event_head - blk->event_tail);
    if (room > (event->kind == AIOKVM_BLK_BROKEN ? 0 : AIOKVM_BLK_QUEUES)) {
        struct aiokvm_blk_event *slot = &blk->events[blk->event_head++ % BLK_EVENTS];
        *slot = *event;
    } else {
        blk->missed++;
    }
    pthread_mutex_unlock(&blk->lock);
    ring(blk->news);
}

/* All that was wanted is so. */
static void set_obeyed(struct aiokvm_blk *blk, uint32_t want)
{
    atomic_store(&blk->obeyed, want);
    ring(blk->news);
}

static struct blk_request *get(struct blk_queue *queue)
{
    struct blk_request *request = queue->free;
    if (request)
        queue->free = request->next;
    else if (!(request = malloc(sizeof(*request))))
        return NULL;
    memset(request, 0, offsetof(struct blk_request, ranges));
    request->queue = queue;
    return request;
}

void blk_release(struct blk_request *request)
{
    request->next = request->queue->free;
    request->queue->free = request;
}

void aiokvm_blk_done(struct aiokvm_blk *blk, struct blk_op *op)
{
    blk->in_flight--;
    blk_count(&blk->stats.in_flight, (uint64_t)-1);
    blk_request_done((struct blk_request *)op);
}

/* Pops and starts what there is, at most as much as the queue is long: what ends at once makes room for more, and a
 * driver that is fast enough must not keep the thread from what the loop wants, nor from the other queues. */
static uint32_t drain_queue(struct blk_queue *queue, bool *more)
{
    struct aiokvm_blk *blk = queue->blk;
    struct blk_request *request = NULL;
    uint32_t popped = 0, most = aiokvm_vring_size(queue->vring);
    aiokvm_vring_disable_notify(queue->vring);
    do {
        /* What has to wait for the rate limit waits in the queue. */
        while (popped < most && !queue->broken && !blk->throttled.first) {
            if (!request && !(request = get(queue)))
                return popped; /* no memory: the next completion or notification tries again */
            int result = aiokvm_vring_pop(queue->vring, &request->chain);
            if (result < 0) {
                queue->broken = true;
                blk_tell(blk, &(struct aiokvm_blk_event){ .kind = AIOKVM_BLK_BROKEN, .queue = queue->index,
                                                          .error = result });
            }
            if (result <= 0)
                break;
            blk_request_take(queue, request);
            request = NULL;
            popped++;
        }
    } while (popped < most && !queue->broken && !blk->throttled.first && aiokvm_vring_enable_notify(queue->vring));
    if (request)
        blk_release(request);
    *more |= popped == most;
    return popped;
}

/* An interrupt costs a vCPU more than its handler does. Of large requests, which end one after the other, the driver is
 * told several at a time, as long as twice as many keep the storage busy: it has time to make more. */
uint64_t blk_hold_ns(struct blk_ended *ended, uint64_t in_flight)
{
    if (!ended->count || ended->some_small || in_flight < 2 * (uint64_t)ended->count)
        return 0;
    uint64_t now_ns = aiokvm_now_ns();
    if (!ended->since_ns)
        ended->since_ns = now_ns;
    uint64_t held_ns = now_ns - ended->since_ns;
    return held_ns < BLK_HOLD_NS ? BLK_HOLD_NS - held_ns : 0;
}

static void publish(struct aiokvm_blk *blk)
{
    bool interrupt = false;
    blk->ended = (struct blk_ended){ 0 };
    for (uint32_t i = 0; i < AIOKVM_BLK_QUEUES; i++) {
        struct blk_queue *queue = &blk->queues[i];
        if (!queue->dirty)
            continue;
        queue->dirty = false;
        blk_count(&blk->stats.batches, 1);
        interrupt |= aiokvm_vring_publish(queue->vring) == 1;
    }
    if (interrupt) {
        blk_count(&blk->stats.interrupts, 1);
        aiokvm_notify(&blk->notifier, VIRTIO_MMIO_INT_VRING);
    }
}

static void begin_run(struct aiokvm_blk *blk)
{
    for (uint32_t i = 0; i < AIOKVM_BLK_QUEUES; i++) {
        struct blk_queue *queue = &blk->queues[i];
        if (queue->vring && queue->watched != queue->kick &&
            blk->engine->type->watch(blk->engine, queue->kick) == 0)
            queue->watched = queue->kick;
    }
    blk->running = true;
}

/* Does what the loop wants; false when the thread is to end. */
static bool obey(struct aiokvm_blk *blk)
{
    uint32_t want = atomic_load(&blk->want), what = want & BLK_WANT_MASK;
    if (want == atomic_load(&blk->obeyed))
        return true;
    if (what == BLK_WANT_RUNNING) {
        begin_run(blk);
    } else if (blk->running) {
        blk->stopping = true;
        blk->stop_queue = what == BLK_WANT_EXIT ? -1 : atomic_load(&blk->want_stopped);
        blk_request_drop(blk);
        if (blk->in_flight)
            return true;
        publish(blk);
        blk->running = blk->stopping = false;
    }
    if (what == BLK_WANT_EXIT)
        return false;
    set_obeyed(blk, want);
    return true;
}

static int64_t throttle_wait(const struct aiokvm_blk *blk)
{
    if (!blk->throttled.first || !blk->running)
        return -1;
    uint64_t now_ns = aiokvm_now_ns();
    return blk->throttle_ns > now_ns ? (int64_t)(blk->throttle_ns - now_ns) : 0;
}

static void *blk_main(void *argument)
{
    struct aiokvm_blk *blk = argument;
    pthread_setname_np(pthread_self(), blk->name);
    int error = blk->engine->type->begin(blk->engine);
    if (!error)
        error = blk->engine->type->watch(blk->engine, blk->control);
    atomic_store(&blk->begin_error, -error);
    atomic_store(&blk->tid, (uint32_t)syscall(SYS_gettid));
    syscall(SYS_futex, &blk->tid, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    while (!error && obey(blk)) {
        bool more = false;
        uint64_t hold_ns = 0;
        if (blk->running && !blk->stopping) {
            if (atomic_exchange(&blk->retry, 0))
                blk_request_retry(blk);
            blk_request_throttle(blk);
            uint32_t popped = 0;
            for (uint32_t i = 0; i < AIOKVM_BLK_QUEUES; i++)
                if (blk->queues[i].vring && !blk->queues[i].broken)
                    popped += drain_queue(&blk->queues[i], &more);
            aiokvm_pace(&blk->pace, popped);
            hold_ns = blk_hold_ns(&blk->ended, blk->in_flight);
            if (!hold_ns)
                publish(blk);
        }
        int64_t wait_ns = more ? 0 : throttle_wait(blk);
        if (hold_ns && (wait_ns < 0 || hold_ns < (uint64_t)wait_ns))
            wait_ns = (int64_t)hold_ns;
        blk->engine->type->wait(blk->engine, wait_ns);
    }
    set_obeyed(blk, atomic_load(&blk->want));
    return NULL;
}

/* ---- the loop ---- */

static bool is_ours(const struct aiokvm_blk *blk)
{
    return blk->pid == getpid();
}

static int choose_engine(struct aiokvm_blk *blk)
{
    int error = 0;
    if (blk->config.engine != AIOKVM_BLK_THREADS) {
        blk->engine = blk_uring_new(blk, &error);
        blk->refused = error;
        blk->engine_kind = AIOKVM_BLK_IO_URING;
    }
    if (!blk->engine && blk->config.engine != AIOKVM_BLK_IO_URING) {
        blk->engine = blk_pool_new(blk, &error);
        blk->engine_kind = AIOKVM_BLK_THREADS;
    }
    return blk->engine ? 0 : error;
}

static int start_thread(struct aiokvm_blk *blk)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, BLK_STACK_SIZE);
    /* The thread inherits the mask: the host program's signals are for the host program's threads. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&blk->thread, &attributes, blk_main, blk);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    if (error)
        return error;
    blk->joinable = true;
    /* Microseconds: a ring is enabled, or threads are made. */
    while (!atomic_load(&blk->tid))
        syscall(SYS_futex, &blk->tid, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    error = atomic_load(&blk->begin_error);
    if (error) {
        pthread_join(blk->thread, NULL);
        blk->joinable = false;
    }
    return error;
}

struct aiokvm_blk *aiokvm_blk_new(const struct aiokvm_blk_config *config, int *error)
{
    struct aiokvm_blk *blk = calloc(1, sizeof(*blk));
    if (!blk) {
        *error = ENOMEM;
        return NULL;
    }
    blk->config = *config;
    strncpy(blk->name, config->name, sizeof(blk->name) - 1);
    memcpy(blk->id, config->id, strnlen(config->id, sizeof(blk->id)));
    blk->config.name = blk->config.id = NULL;
    blk->pid = getpid();
    blk->notifier.irqfd = -1;
    aiokvm_share_open(&blk->bounces, aiokvm_budget_of_process(AIOKVM_BUDGET_BOUNCE_BYTES));
    pthread_mutex_init(&blk->lock, NULL);
    atomic_store(&blk->capacity_sectors, config->capacity_sectors);
    atomic_store(&blk->writeback, 1);
    for (uint32_t i = 0; i < AIOKVM_BLK_QUEUES; i++)
        blk->queues[i] = (struct blk_queue){ .blk = blk, .index = i, .kick = -1, .watched = -1 };
    blk->control = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    blk->news = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    *error = blk->control < 0 || blk->news < 0 ? EMFILE : choose_engine(blk);
    if (!*error)
        *error = start_thread(blk);
    if (*error) {
        aiokvm_blk_free(blk);
        return NULL;
    }
    return blk;
}

static void disown(struct aiokvm_notifier *notifier)
{
    if (notifier->irqfd >= 0)
        close(notifier->irqfd);
    notifier->irqfd = -1;
}

void aiokvm_blk_free(struct aiokvm_blk *blk)
{
    /* A child of fork has copies of the memory, and shares the descriptors' ends with nobody. */
    if (blk->engine && is_ours(blk))
        blk->engine->type->free(blk->engine);
    for (uint32_t i = 0; i < AIOKVM_BLK_QUEUES; i++) {
        struct blk_request *request;
        while ((request = blk->queues[i].free)) {
            blk->queues[i].free = request->next;
            free(request);
        }
    }
    aiokvm_share_close(&blk->bounces);
    disown(&blk->notifier);
    if (blk->control >= 0)
        close(blk->control);
    if (blk->news >= 0)
        close(blk->news);
    pthread_mutex_destroy(&blk->lock);
    free(blk);
}

uint32_t aiokvm_blk_engine(const struct aiokvm_blk *blk, int *refused)
{
    *refused = blk->refused;
    return blk->engine_kind;
}

int aiokvm_blk_fd(const struct aiokvm_blk *blk)
{
    return blk->news;
}

uint32_t aiokvm_blk_state(const struct aiokvm_blk *blk)
{
    uint32_t obeyed = atomic_load(&blk->obeyed);
    return obeyed == atomic_load(&blk->want) ? obeyed & BLK_WANT_MASK : AIOKVM_BLK_CHANGING;
}

int aiokvm_blk_tid(const struct aiokvm_blk *blk)
{
    return blk->joinable && is_ours(blk) ? (int)atomic_load(&blk->tid) : 0;
}

int aiokvm_blk_take(struct aiokvm_blk *blk, struct aiokvm_blk_event *event)
{
    pthread_mutex_lock(&blk->lock);
    bool found = blk->event_head != blk->event_tail, more = found || blk->missed;
    if (found) {
        *event = blk->events[blk->event_tail++ % BLK_EVENTS];
    } else if (more) {
        *event = (struct aiokvm_blk_event){ .kind = AIOKVM_BLK_MISSED, .missed = blk->missed };
        blk->missed = 0;
    }
    pthread_mutex_unlock(&blk->lock);
    return more;
}

void aiokvm_blk_stats(const struct aiokvm_blk *blk, struct aiokvm_blk_stats *stats)
{
#define COPY(field) stats->field = atomic_load_explicit(&blk->stats.field, memory_order_relaxed)
    COPY(reads);
    COPY(writes);
    COPY(flushes);
    COPY(discards);
    COPY(read_bytes);
    COPY(written_bytes);
    COPY(errors);
    COPY(throttled);
    COPY(batches);
    COPY(interrupts);
    COPY(in_flight);
    COPY(copied_bytes);
#undef COPY
}

/* 0 if what only an idle disk lets happen may happen. */
static int check_idle(const struct aiokvm_blk *blk)
{
    if (!is_ours(blk))
        return -EOWNERDEAD;
    return aiokvm_blk_state(blk) == AIOKVM_BLK_IDLE ? 0 : -EBUSY;
}

int aiokvm_blk_set_queue(struct aiokvm_blk *blk, uint32_t index, struct aiokvm_vring *vring, int kick)
{
    int error = index < AIOKVM_BLK_QUEUES ? check_idle(blk) : -EINVAL;
    if (error)
        return error;
    struct blk_queue *queue = &blk->queues[index];
    queue->vring = vring;
    queue->broken = false;
    if (vring)
        queue->kick = kick;
    return 0;
}

int aiokvm_blk_set_features(struct aiokvm_blk *blk, uint64_t features)
{
    int error = check_idle(blk);
    if (!error)
        blk->features = features;
    return error;
}

static int want(struct aiokvm_blk *blk, uint32_t what)
{
    if (!is_ours(blk))
        return -EOWNERDEAD;
    uint32_t old = atomic_load(&blk->want);
    if ((old & BLK_WANT_MASK) == BLK_WANT_EXIT)
        return what == BLK_WANT_EXIT ? 0 : -ESHUTDOWN;
    /* Counted: what was wanted and taken back at once is not mistaken for what is wanted now. */
    atomic_store(&blk->want, (old & ~BLK_WANT_MASK) + BLK_WANT_MASK + 1 + what);
    ring(blk->control);
    return 0;
}

int aiokvm_blk_run(struct aiokvm_blk *blk, const struct aiokvm_notifier *notifier)
{
    int error = check_idle(blk);
    if (error)
        return error;
    int irqfd = notifier->irqfd < 0 ? -1 : fcntl(notifier->irqfd, F_DUPFD_CLOEXEC, 0);
    if (notifier->irqfd >= 0 && irqfd < 0)
        return -errno;
    disown(&blk->notifier);
    blk->notifier = (struct aiokvm_notifier){ irqfd, notifier->status };
    return want(blk, BLK_WANT_RUNNING);
}

int aiokvm_blk_stop(struct aiokvm_blk *blk, int32_t queue)
{
    /* All, if all were to be stopped before it has come to that. */
    if (queue < 0 || (atomic_load(&blk->want) & BLK_WANT_MASK) == BLK_WANT_RUNNING)
        atomic_store(&blk->want_stopped, queue);
    return want(blk, BLK_WANT_IDLE);
}

int aiokvm_blk_exit(struct aiokvm_blk *blk)
{
    return want(blk, BLK_WANT_EXIT);
}

int aiokvm_blk_join(struct aiokvm_blk *blk)
{
    if (!is_ours(blk))
        return -EOWNERDEAD;
    if (!blk->joinable)
        return 0;
    if (aiokvm_blk_state(blk) != AIOKVM_BLK_EXITED)
        return -EBUSY;
    pthread_join(blk->thread, NULL);
    blk->joinable = false;
    return 0;
}

int aiokvm_blk_retry(struct aiokvm_blk *blk)
{
    if (!is_ours(blk))
        return -EOWNERDEAD;
    atomic_store(&blk->retry, 1);
    ring(blk->control);
    return 0;
}

void aiokvm_blk_set_capacity(struct aiokvm_blk *blk, uint64_t sectors)
{
    atomic_store_explicit(&blk->capacity_sectors, sectors, memory_order_relaxed);
}

void aiokvm_blk_set_writeback(struct aiokvm_blk *blk, int writeback)
{
    atomic_store_explicit(&blk->writeback, writeback != 0, memory_order_relaxed);
}

int aiokvm_fallocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    return fallocate(fd, mode, (off_t)offset, (off_t)length) < 0 ? -errno : 0;
}
