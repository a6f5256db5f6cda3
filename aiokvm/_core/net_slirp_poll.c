/* The descriptors of libslirp. It was made for poll(), and says of all of them what it wants to know whenever it is
 * asked: what has changed is told to an epoll. */
#define _GNU_SOURCE
#include "net_slirp_priv.h"

#ifdef AIOKVM_HAVE_SLIRP

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"

enum { BACKLOG = 128 }; /* libslirp asks for 1 */
/* How long nobody is let in for want of descriptors. */
static const uint64_t PAUSE_NS = 100000000;

/* NULL: no memory. */
static struct slirp_watched *watched_of(struct slirp_end *self, int fd)
{
    if ((uint32_t)fd < self->size)
        return &self->watched[fd];
    uint32_t size = 64;
    while (size <= (uint32_t)fd)
        size *= 2;
    struct slirp_watched *watched = realloc(self->watched, size * sizeof(*watched));
    if (!watched)
        return NULL;
    self->watched = watched;
    int *in_epoll = realloc(self->in_epoll, size * sizeof(*in_epoll));
    if (!in_epoll)
        return NULL;
    self->in_epoll = in_epoll;
    memset(watched + self->size, 0, (size - self->size) * sizeof(*watched));
    aiokvm_share_add(&self->bytes, (size - self->size) * (sizeof(*watched) + sizeof(*in_epoll)));
    self->size = size;
    return &self->watched[fd];
}

bool slirp_is_ours(const struct slirp_end *self)
{
    return self->end.net->pid == getpid();
}

static uint32_t bytes_of(const struct slirp_watched *watched)
{
    return watched->kind == SLIRP_TCP ? SLIRP_TCP_BYTES : SLIRP_OTHER_BYTES;
}

static void forget(struct slirp_end *self, int fd)
{
    struct slirp_watched *watched = &self->watched[fd];
    if (watched->socket) {
        if (self->sockets.unnamed == watched->socket)
            self->sockets.unnamed = NULL;
        slirp_sockets_remove(&self->sockets, watched->socket);
        free(watched->socket);
    }
    if (watched->is_counted) {
        aiokvm_share_give(&self->descriptors, 1);
        aiokvm_share_give(&self->bytes, bytes_of(watched));
    }
    /* A copy that a child has would keep it in the epoll, were it only closed. */
    if (watched->in_epoll && slirp_is_ours(self))
        epoll_ctl(self->epoll, EPOLL_CTL_DEL, fd, NULL);
    if (watched->is_counted && watched->kind == SLIRP_TCP)
        self->tcp--;
    else if (watched->is_counted)
        self->other--;
    if (watched->in_epoll)
        for (uint32_t i = 0; i < self->count; i++)
            if (self->in_epoll[i] == fd) {
                self->in_epoll[i] = self->in_epoll[--self->count];
                break;
            }
    *watched = (struct slirp_watched){ 0 };
}

static int option_of(int fd, int option)
{
    int value = -1;
    socklen_t size = sizeof(value);
    return getsockopt(fd, SOL_SOCKET, option, &value, &size) == 0 ? value : -1;
}

void slirp_register(int fd, void *opaque)
{
    struct slirp_end *self = opaque;
    struct slirp_watched *watched = fd >= 0 ? watched_of(self, fd) : NULL;
    if (!watched)
        return;
    forget(self, fd);
    /* Those that were accepted have it not. */
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    self->found = fd;
    /* Since libslirp 4.9 sockets that listen are registered, too. */
    if (option_of(fd, SO_ACCEPTCONN) == 1)
        return;
    watched->kind = option_of(fd, SO_TYPE) == SOCK_STREAM ? SLIRP_TCP : SLIRP_OTHER;
    bool is_unix = watched->kind == SLIRP_TCP && option_of(fd, SO_DOMAIN) == AF_UNIX;
    watched->is_counted = true;
    if (watched->kind == SLIRP_TCP)
        self->tcp++;
    else
        self->other++;
    aiokvm_share_add(&self->descriptors, 1);
    aiokvm_share_add(&self->bytes, bytes_of(watched));
    struct slirp_socket *socket = watched->socket = calloc(1, sizeof(*socket));
    if (socket) {
        socket->fd = fd;
        socket->heard_ns = aiokvm_now_ns();
        if (self->is_receiving)
            slirp_sockets_begin(&self->sockets, socket, self->input, self->input_size);
        else if (watched->kind == SLIRP_TCP)
            self->sockets.unnamed = socket;
    }
    if (is_unix) {
        self->is_connected = true;
        self->sender.id = ++self->next_connection;
        if (socket)
            socket->id = self->sender.id;
    }
}

void slirp_tell_broken(struct slirp_end *self, uint32_t id)
{
    if (self->is_closing || !aiokvm_share_take(&self->bytes, sizeof(struct slirp_broken)))
        return;
    struct slirp_broken *broken = malloc(sizeof(*broken));
    if (!broken) {
        aiokvm_share_give(&self->bytes, sizeof(*broken));
        return;
    }
    *broken = (struct slirp_broken){ .next = self->broken, .id = id };
    self->broken = broken;
    net_tell(&self->end, AIOKVM_NET_NEWS_READABLE, 0, 0);
}

/* libslirp closes a connection. An orderly end is a shutdown before that: without it the other side gets a reset. */
static void end_connection(struct slirp_end *self, int fd, const struct slirp_watched *watched)
{
    bool is_open = send(fd, "", 0, MSG_NOSIGNAL | MSG_DONTWAIT) == 0 || errno == EAGAIN;
    if (!is_open && !self->is_reset)
        return;
    struct linger none = { .l_onoff = 1 };
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
    if (watched->socket && watched->socket->id)
        slirp_tell_broken(self, watched->socket->id);
}

void slirp_unregister(int fd, void *opaque)
{
    struct slirp_end *self = opaque;
    if (fd < 0 || (uint32_t)fd >= self->size)
        return;
    struct slirp_watched *watched = &self->watched[fd];
    /* A child of fork shares the sockets of its parent. */
    if (watched->is_counted && watched->kind == SLIRP_TCP && slirp_is_ours(self))
        end_connection(self, fd, watched);
    forget(self, fd);
}

void slirp_close_early(struct slirp_end *self, int fd)
{
    slirp_unregister(fd, self);
    /* What libslirp closes later costs nothing. */
    dup3(self->epoll, fd, O_CLOEXEC);
}

/* What has no kind yet is a socket that listens, or that is there for a forwarded UDP port. */
static void find(struct slirp_end *self, int fd, struct slirp_watched *watched)
{
    self->found = fd;
    if (option_of(fd, SO_ACCEPTCONN) != 1) {
        watched->kind = SLIRP_OTHER;
        return;
    }
    watched->kind = option_of(fd, SO_DOMAIN) == AF_UNIX ? SLIRP_UNIX_LISTENER : SLIRP_LISTENER;
    listen(fd, BACKLOG);
}

static bool is_listener(const struct slirp_watched *watched)
{
    return watched->kind == SLIRP_LISTENER || watched->kind == SLIRP_UNIX_LISTENER;
}

/* Whether one more may come in. */
static bool may_accept(struct slirp_end *self)
{
    return aiokvm_share_fits(&self->descriptors, 1) && aiokvm_share_fits(&self->bytes, SLIRP_TCP_BYTES) &&
           slirp_has_descriptors();
}

static int add_poll(int fd, int events, void *opaque)
{
    struct slirp_end *self = opaque;
    struct slirp_watched *watched = fd >= 0 ? watched_of(self, fd) : NULL;
    if (!watched)
        return -1;
    if (watched->kind == SLIRP_UNKNOWN)
        find(self, fd, watched);
    watched->asked = self->round;
    watched->events = (uint32_t)events;
    /* Who connects waits until somebody has gone, or there are descriptors again. */
    if (is_listener(watched) && (self->tcp >= self->max || self->accept_at_ns))
        watched->events = 0;
    if (watched->is_broken && !watched->socket->is_told && !(watched->events & SLIRP_POLL_IN))
        watched->events = 0;
    /* Urgent data is taken for data. */
    uint32_t wanted = (watched->events & SLIRP_POLL_IN ? EPOLLIN : 0u) |
                      (watched->events & SLIRP_POLL_OUT ? EPOLLOUT : 0u);
    if (wanted == watched->in_epoll)
        return fd;
    if (!wanted) {
        watched->asked = self->round - 1; /* it is taken out with those that were not asked for */
        return fd;
    }
    struct epoll_event event = { .events = wanted, .data.fd = fd };
    int operation = watched->in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (epoll_ctl(self->epoll, operation, fd, &event) < 0 &&
        epoll_ctl(self->epoll, operation == EPOLL_CTL_ADD ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) < 0)
        return -1;
    if (!watched->in_epoll)
        self->in_epoll[self->count++] = fd;
    watched->in_epoll = wanted;
    return fd;
}

int slirp_get_revents(int index, void *opaque)
{
    struct slirp_end *self = opaque;
    struct slirp_watched *watched = &self->watched[index];
    uint32_t ready = watched->ready;
    watched->ready = 0;
    /* What there is no time for is still ready the next time. */
    if (!ready || self->end.net->is_over)
        return 0;
    if (is_listener(watched) && !may_accept(self)) {
        self->accept_at_ns = aiokvm_now_ns() + PAUSE_NS;
        return 0;
    }
    int events = 0;
    /* A reset is found by who reads: who writes takes it for an end. Behind an end there is nothing to read, and libslirp
     * would keep a full window shut. */
    if (ready & (EPOLLERR | EPOLLHUP) && watched->kind == SLIRP_TCP && watched->socket &&
        watched->socket->is_connected) {
        if (!watched->socket->is_told) {
            watched->is_broken = true;
            return watched->events & SLIRP_POLL_IN ? SLIRP_POLL_IN : 0;
        }
        if (watched->events & SLIRP_POLL_OUT && !watched->is_dead) {
            watched->is_dead = true;
            return 0;
        }
    }
    if (watched->events & SLIRP_POLL_IN)
        events |= (ready & EPOLLIN ? SLIRP_POLL_IN : 0) | (ready & EPOLLHUP ? SLIRP_POLL_HUP : 0) |
                  (ready & EPOLLERR ? SLIRP_POLL_ERR : 0);
    /* An error says to libslirp that there is something to be read; it aborts where there is no room for that. A socket
     * that is not to be read gets to know of the error when it is written to. */
    if (watched->events & SLIRP_POLL_OUT && ready & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        events |= SLIRP_POLL_OUT;
    return events;
}

void slirp_ask(struct slirp_end *self)
{
    uint32_t timeout_ms = UINT32_MAX;
    uint64_t now_ns = aiokvm_now_ns();
    if (self->accept_at_ns <= now_ns)
        self->accept_at_ns = 0;
    self->round++;
    slirp_pollfds_fill(self->slirp, &timeout_ms, add_poll, self);
    for (uint32_t i = 0; i < self->count;) {
        struct slirp_watched *watched = &self->watched[self->in_epoll[i]];
        if (watched->asked == self->round) {
            i++;
            continue;
        }
        epoll_ctl(self->epoll, EPOLL_CTL_DEL, self->in_epoll[i], NULL);
        watched->in_epoll = watched->events = 0;
        self->in_epoll[i] = self->in_epoll[--self->count];
    }
    /* Without connections it says a second, and half of one for sockets that listen: for nothing. */
    bool is_idle = !self->tcp && !self->other;
    uint64_t at_ns = !is_idle && timeout_ms < 1000 ? now_ns + timeout_ms * 1000000ull : 0;
    self->poll_at_ns = at_ns;
    for (struct slirp_timer *timer = self->timers; timer < self->timers + SLIRP_TIMERS; timer++)
        if (timer->used && timer->at_ns && (!at_ns || timer->at_ns < at_ns))
            at_ns = timer->at_ns;
    if (self->accept_at_ns && (!at_ns || self->accept_at_ns < at_ns))
        at_ns = self->accept_at_ns;
    /* Whoever in the process closes a descriptor next, nobody says so. */
    if (self->is_starved && (!at_ns || now_ns + PAUSE_NS < at_ns))
        at_ns = now_ns + PAUSE_NS;
    if (self->held && (!at_ns || self->held_until_ns < at_ns))
        at_ns = self->held_until_ns;
    net_at(&self->end, at_ns);
}

#endif
