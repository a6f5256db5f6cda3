/* A plane: who is ready, who has news, descriptors, timers, and the thread if there is one. */
#define _GNU_SOURCE
#include "net_priv.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "pace.h"

enum { STACK_SIZE = 256 << 10, EVENTS = 64 };
/* How long the thread serves at a time, and how long what any other call has to send or write may take. */
static const uint64_t THREAD_BUDGET_NS = 500000, CALL_BUDGET_NS = 500000;

static void ring(int eventfd)
{
    /* A counter that is full has woken whoever reads it. */
    ssize_t result = write(eventfd, &(uint64_t){ 1 }, sizeof(uint64_t));
    (void)result;
}

static void drain(int fd)
{
    uint64_t value;
    ssize_t result = read(fd, &value, sizeof(value));
    (void)result;
}

/* ---- what ends say ---- */

void net_ready(struct aiokvm_net_end *end)
{
    if (end->is_ready)
        return;
    end->is_ready = true;
    end->next_ready = NULL;
    *end->net->ready_tail = end;
    end->net->ready_tail = &end->next_ready;
}

void net_dirty(struct aiokvm_net_end *end)
{
    if (end->is_dirty)
        return;
    end->is_dirty = true;
    end->next_dirty = end->net->dirty;
    end->net->dirty = end;
}

void net_later(struct aiokvm_net_end *end)
{
    if (end->is_later)
        return;
    end->is_later = true;
    end->next_later = end->net->later;
    end->net->later = end;
}

void net_tell(struct aiokvm_net_end *end, uint32_t news, int32_t error, uint32_t detail)
{
    struct aiokvm_net *net = end->net;
    if (!end->error && error) {
        end->error = error;
        end->detail = detail;
    }
    end->news |= news;
    if (end->is_told)
        return;
    end->is_told = true;
    end->next_told = NULL;
    if (!net->told)
        ring(net->news_fd);
    *net->told_tail = end;
    net->told_tail = &end->next_told;
}

/* What it sends may be sent again. */
static void resume(struct aiokvm_net_end *end)
{
    end->waits = false;
    if (end->type->resume)
        end->type->resume(end);
    else
        net_ready(end);
}

void net_resume(struct aiokvm_net_end *end)
{
    struct aiokvm_net_end *peer = end->peer;
    if (peer && peer->waits && !peer->throttled_ns)
        resume(peer);
}

void net_yield(struct aiokvm_net_end *end)
{
    end->yields = true;
    net_ready(end);
}

/* ---- time ---- */

static void begin_time(struct aiokvm_net *net, uint64_t until_ns)
{
    net->until_ns = until_ns;
    net->spent = 0;
    net->is_over = false;
}

void net_look_at_clock(struct aiokvm_net *net)
{
    uint64_t now_ns = aiokvm_now_ns();
    net->spent = 0;
    if (!net->until_ns)
        net->until_ns = now_ns + CALL_BUDGET_NS;
    /* Who waits for a thread, the loop that is, waits for no longer than it has to. */
    net->is_over = now_ns >= net->until_ns || (net->has_thread && atomic_load(&net->wanted));
}

static void set_timer(struct aiokvm_net *net, uint64_t deadline_ns)
{
    if (!deadline_ns || (net->timer_ns && net->timer_ns <= deadline_ns))
        return;
    net->timer_ns = deadline_ns;
    struct itimerspec when = {
        .it_value = { .tv_sec = (time_t)(deadline_ns / 1000000000), .tv_nsec = (long)(deadline_ns % 1000000000) },
    };
    timerfd_settime(net->timer, TFD_TIMER_ABSTIME, &when, NULL);
}

void net_at(struct aiokvm_net_end *end, uint64_t deadline_ns)
{
    end->deadline_ns = deadline_ns;
    set_timer(end->net, deadline_ns);
}

void net_throttle(struct aiokvm_net_end *end, uint64_t deadline_ns)
{
    end->throttled_ns = deadline_ns;
    set_timer(end->net, deadline_ns);
}

static void on_timer(struct aiokvm_net *net)
{
    drain(net->timer);
    net->timer_ns = 0;
    uint64_t now_ns = aiokvm_now_ns(), next_ns = UINT64_MAX;
    for (struct aiokvm_net_end *end = net->ends; end; end = end->next) {
        if (end->throttled_ns && end->throttled_ns <= now_ns) {
            end->throttled_ns = 0;
            resume(end);
        }
        if (end->deadline_ns && end->deadline_ns <= now_ns) {
            end->deadline_ns = 0;
            net_ready(end);
        }
        if (end->throttled_ns && end->throttled_ns < next_ns)
            next_ns = end->throttled_ns;
        if (end->deadline_ns && end->deadline_ns < next_ns)
            next_ns = end->deadline_ns;
    }
    if (next_ns != UINT64_MAX)
        set_timer(net, next_ns);
}

/* ---- descriptors ---- */

int net_watch(struct net_watch *watch, struct aiokvm_net_end *end, int fd, uint32_t events)
{
    watch->end = end;
    watch->fd = fd;
    watch->events = 0;
    watch->wanted = events;
    watch->is_silent = false;
    struct epoll_event event = { .events = events | EPOLLET, .data.ptr = watch };
    if (epoll_ctl(end->net->epoll, EPOLL_CTL_ADD, fd, &event) == 0)
        return 0;
    watch->fd = -1;
    return -errno;
}

static void ask(struct net_watch *watch, bool is_silent)
{
    uint32_t events = watch->wanted & ~(is_silent ? (uint32_t)EPOLLIN : 0);
    struct epoll_event event = { .events = events | EPOLLET, .data.ptr = watch };
    if (epoll_ctl(watch->end->net->epoll, EPOLL_CTL_MOD, watch->fd, &event) == 0)
        watch->is_silent = is_silent;
}

void net_watch_done(struct net_watch *watch, uint32_t events)
{
    watch->events &= ~events;
    if (watch->is_silent && events & EPOLLIN)
        ask(watch, false);
}

void net_unwatch(struct net_watch *watch)
{
    /* A child of fork shares the epoll instance, which is the parent's to change. */
    if (watch->fd >= 0 && watch->end->net->pid == getpid())
        epoll_ctl(watch->end->net->epoll, EPOLL_CTL_DEL, watch->fd, NULL);
    watch->fd = -1;
    watch->events = 0;
}

static void look(struct aiokvm_net *net)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(net->epoll, events, EVENTS, 0);
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr == &net->control) {
            drain(net->control);
            net->rung = false;
        } else if (events[i].data.ptr == &net->timer) {
            on_timer(net);
        } else {
            struct net_watch *watch = events[i].data.ptr;
            watch->events |= events[i].events;
            /* Each frame behind the one that is held would be an edge, and a wake in vain. */
            if (watch->is_source && watch->end->waits && events[i].events & EPOLLIN && !watch->is_silent)
                ask(watch, true);
            net_ready(watch->end);
        }
    }
}

/* ---- serving ---- */

void net_flush(struct aiokvm_net *net)
{
    struct aiokvm_net_end *end;
    while ((end = net->dirty)) {
        net->dirty = end->next_dirty;
        end->is_dirty = false;
        end->type->flush(end);
    }
}

static struct aiokvm_net_end *take_ready(struct aiokvm_net *net)
{
    struct aiokvm_net_end *end = net->ready;
    if (!end)
        return NULL;
    net->ready = end->next_ready;
    if (!net->ready)
        net->ready_tail = &net->ready;
    end->is_ready = false;
    return end;
}

/* Frames have gathered. */
static void serve_later(struct aiokvm_net *net)
{
    struct aiokvm_net_end *end;
    while ((end = net->later)) {
        net->later = end->next_later;
        end->is_later = false;
        net_ready(end);
    }
}

/* Each that is ready has its turn, round and round. True: some still are. */
static bool turn(struct aiokvm_net *net, uint64_t budget_ns)
{
    begin_time(net, aiokvm_now_ns() + budget_ns);
    serve_later(net);
    for (look(net); net->ready; look(net))
        for (struct aiokvm_net_end *end; (end = take_ready(net));) {
            if (end->yields) {
                end->yields = false;
                resume(end);
            }
            if (end->type->serve(end))
                net_ready(end);
            net_flush(net);
            net_look_at_clock(net);
            if (net->is_over)
                return net->ready;
        }
    return false;
}

bool net_enter(struct aiokvm_net *net)
{
    if (net->pid != getpid())
        return false;
    atomic_fetch_add(&net->wanted, 1);
    pthread_mutex_lock(&net->lock);
    atomic_fetch_sub(&net->wanted, 1);
    begin_time(net, 0);
    return true;
}

void net_leave(struct aiokvm_net *net)
{
    net_flush(net);
    if (net->ready && !net->rung) {
        net->rung = true;
        ring(net->control);
    }
    pthread_mutex_unlock(&net->lock);
}

/* All was served: the next frames may gather, or not any more. True: there is more to do. */
static bool gather(struct aiokvm_net *net, uint64_t begun_ns, uint64_t budget_ns)
{
    struct net_gather *gather = &net->gather;
    bool was_on = gather->is_on;
    uint64_t now_ns = aiokvm_now_ns();
    const struct net_turn done = { .batch = net->batch, .work = net->work, .took_ns = now_ns - begun_ns };
    net_gather_next(gather, now_ns, &done);
    net->batch = 0;
    net->work = 0;
    net->wake++;
    if (gather->is_on)
        set_timer(net, now_ns + gather->period_ns);
    if (gather->is_on != was_on) {
        struct epoll_event event = { .events = gather->is_on ? 0 : EPOLLIN };
        epoll_ctl(net->door, EPOLL_CTL_MOD, net->epoll, &event);
    }
    /* Whoever was not told is served once more, and will be. */
    return was_on && !gather->is_on && turn(net, budget_ns);
}

int aiokvm_net_serve(struct aiokvm_net *net, uint64_t budget_ns)
{
    if (!net_enter(net))
        return -EOWNERDEAD;
    uint64_t begun_ns = aiokvm_now_ns();
    bool more = turn(net, budget_ns);
    if (!more && !net->has_thread)
        more = gather(net, begun_ns, budget_ns);
    /* The caller comes again by itself: no ringing. */
    pthread_mutex_unlock(&net->lock);
    return more;
}

/* Others want the lock. Yielding lets those of this thread's class run, sleeping all. */
static void give_way(struct aiokvm_net *net)
{
    for (int tries = 0; atomic_load(&net->wanted); tries++)
        if (tries < 16)
            sched_yield();
        else
            nanosleep(&(struct timespec){ .tv_nsec = 20000 }, NULL);
}

static void *net_main(void *argument)
{
    struct aiokvm_net *net = argument;
    struct aiokvm_pace pace = { 0 };
    pthread_setname_np(pthread_self(), net->name);
    atomic_store(&net->tid, (uint32_t)syscall(SYS_gettid));
    syscall(SYS_futex, &net->tid, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    pthread_mutex_lock(&net->lock);
    while (!atomic_load(&net->ending)) {
        bool more = turn(net, THREAD_BUDGET_NS);
        if (!more) {
            aiokvm_pace(&pace, net->batch);
            net->batch = 0;
            net->wake++;
        }
        pthread_mutex_unlock(&net->lock);
        /* The turn may have read what was to wake it for its end. */
        if (more)
            give_way(net);
        else if (!atomic_load(&net->ending))
            poll(&(struct pollfd){ .fd = net->epoll, .events = POLLIN }, 1, -1);
        pthread_mutex_lock(&net->lock);
    }
    pthread_mutex_unlock(&net->lock);
    return NULL;
}

/* ---- a plane ---- */

static int start_thread(struct aiokvm_net *net)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    /* The thread inherits the mask: the host program's signals are for the host program's threads. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&net->thread, &attributes, net_main, net);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    if (error)
        return error;
    net->has_thread = true;
    while (!atomic_load(&net->tid))
        syscall(SYS_futex, &net->tid, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    return 0;
}

static int add(int epoll, int fd, void *data)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = data };
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

/* What the loop watches: while frames gather it hears of the timer, not of what they come by. */
static int open_door(struct aiokvm_net *net)
{
    net->door = epoll_create1(EPOLL_CLOEXEC);
    int error = net->door < 0 ? errno : add(net->door, net->epoll, NULL);
    return error ? error : add(net->door, net->timer, NULL);
}

static int open_descriptors(struct aiokvm_net *net)
{
    net->epoll = epoll_create1(EPOLL_CLOEXEC);
    net->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    net->control = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    net->news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (net->epoll < 0 || net->timer < 0 || net->control < 0 || net->news_fd < 0)
        return errno;
    int error = add(net->epoll, net->control, &net->control);
    return error ? error : add(net->epoll, net->timer, &net->timer);
}

struct aiokvm_net *aiokvm_net_new(const char *name, int *error)
{
    struct aiokvm_net *net = calloc(1, sizeof(*net));
    if (!net) {
        *error = ENOMEM;
        return NULL;
    }
    net->epoll = net->timer = net->control = net->news_fd = net->door = -1;
    net->pid = getpid();
    net->ready_tail = &net->ready;
    net->told_tail = &net->told;
    pthread_mutex_init(&net->lock, NULL);
    if (name)
        strncpy(net->name, name, sizeof(net->name) - 1);
    *error = open_descriptors(net);
    if (!*error)
        *error = name ? start_thread(net) : open_door(net);
    if (*error) {
        aiokvm_net_free(net);
        return NULL;
    }
    return net;
}

void aiokvm_net_free(struct aiokvm_net *net)
{
    if (net->has_thread && net->pid == getpid()) {
        atomic_store(&net->ending, true);
        ring(net->control);
        pthread_join(net->thread, NULL);
    }
    while (net->ends)
        aiokvm_net_end_free(net->ends);
    net_offload_free(net->offload);
    int descriptors[] = { net->door, net->epoll, net->timer, net->control, net->news_fd };
    for (size_t i = 0; i < sizeof(descriptors) / sizeof(*descriptors); i++)
        if (descriptors[i] >= 0)
            close(descriptors[i]);
    pthread_mutex_destroy(&net->lock);
    free(net);
}

int aiokvm_net_fd(const struct aiokvm_net *net)
{
    return net->door;
}

int aiokvm_net_tid(const struct aiokvm_net *net)
{
    return net->has_thread && net->pid == getpid() ? (int)atomic_load(&net->tid) : 0;
}

int aiokvm_net_news_fd(const struct aiokvm_net *net)
{
    return net->news_fd;
}

int aiokvm_net_take(struct aiokvm_net *net, struct aiokvm_net_news *news)
{
    if (!net_enter(net))
        return -EOWNERDEAD;
    struct aiokvm_net_end *end = net->told;
    if (end) {
        net->told = end->next_told;
        if (!net->told)
            net->told_tail = &net->told;
        end->is_told = false;
        *news = (struct aiokvm_net_news){
            .end = end->id, .news = end->news, .error = end->error, .detail = end->detail,
        };
        end->news = end->detail = 0;
        end->error = 0;
    } else {
        drain(net->news_fd);
    }
    net_leave(net);
    return end != NULL;
}
