/* User-mode NAT: libslirp as an end. Everything that it watches is in an epoll of its own, of which the plane watches
 * the whole; what it wants to know of each descriptor is asked for when something has happened. */
#define _GNU_SOURCE
#include "net_slirp_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#ifdef AIOKVM_HAVE_SLIRP

#include <arpa/inet.h>
#include <signal.h>
#include <sys/random.h>
#include <unistd.h>

#include "clock.h"

enum {
    /* Frames for a guest that takes none. TCP comes again with what is dropped. */
    WAITING_FRAMES = 1024, WAITING_BYTES = 2 << 20,
    /* Descriptors that are looked after before others have their turn: each has up to 128 KiB. */
    READY = 8,
};
/* How often connections are looked for that have been silent for too long. */
static const uint64_t REAP_NS = 1000000000;

static struct slirp_end *self_of(struct aiokvm_net_end *end)
{
    return (struct slirp_end *)end;
}

/* ---- what libslirp asks for ---- */

static void guest_error(const char *message, void *opaque)
{
    (void)message;
    ((struct slirp_end *)opaque)->end.stats.dropped_invalid++;
}

static int64_t clock_get_ns(void *opaque)
{
    /* At the end, what it still has is given up as too old. */
    return (int64_t)(aiokvm_now_ns() + (((struct slirp_end *)opaque)->is_closing ? 2 * SLIRP_HOLD_NS : 0));
}

static void *timer_new(SlirpTimerId id, void *timer_opaque, void *opaque)
{
    struct slirp_end *self = opaque;
    for (struct slirp_timer *timer = self->timers; timer < self->timers + SLIRP_TIMERS; timer++)
        if (!timer->used) {
            *timer = (struct slirp_timer){ .id = id, .opaque = timer_opaque, .used = true };
            return timer;
        }
    return NULL;
}

static void timer_free(void *timer, void *opaque)
{
    (void)opaque;
    if (timer)
        ((struct slirp_timer *)timer)->used = false;
}

static void timer_mod(void *timer, int64_t at_ms, void *opaque)
{
    (void)opaque;
    if (timer)
        ((struct slirp_timer *)timer)->at_ns = (uint64_t)at_ms * 1000000;
}

static void notify(void *opaque)
{
    /* It may want to hear of a socket again: that is asked for after everything that can have led here. */
    (void)opaque;
}

static const SlirpCb CALLBACKS = {
    .send_packet = slirp_send_packet, .guest_error = guest_error, .clock_get_ns = clock_get_ns,
    .timer_free = timer_free, .timer_mod = timer_mod, .timer_new_opaque = timer_new, .register_poll_fd = slirp_register,
    .unregister_poll_fd = slirp_unregister, .notify = notify,
};

/* ---- serving ---- */

/* libslirp writes to sockets as if nobody ever died of SIGPIPE. A program that has not left Python's way of ignoring it
 * alone would. */
static void guard_signals(struct slirp_end *self)
{
    sigset_t pipe, old;
    if (self->is_guarded)
        return;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    if (pthread_sigmask(SIG_BLOCK, &pipe, &old) == 0)
        self->is_guarded = !sigismember(&old, SIGPIPE);
}

static void unguard_signals(struct slirp_end *self)
{
    sigset_t pipe;
    if (!self->is_guarded)
        return;
    self->is_guarded = false;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    sigtimedwait(&pipe, NULL, &(struct timespec){ 0 });
    pthread_sigmask(SIG_UNBLOCK, &pipe, NULL);
}

void slirp_let_in(struct slirp_end *self)
{
    self->is_inside = false;
    if (self->is_refused) {
        self->is_refused = false;
        net_resume(&self->end);
    }
}

void slirp_enter(struct slirp_end *self)
{
    net_dirty(&self->end);
    guard_signals(self);
    self->is_inside = true;
}

void slirp_leave(struct slirp_end *self)
{
    /* What it asked a neighbour for it can send now. Its table holds 16: more than a few rounds are of no use. */
    for (int round = 0; round < 4 && self->has_answered; round++) {
        self->has_answered = false;
        slirp_pollfds_poll(self->slirp, 1, slirp_get_revents, self);
    }
    slirp_let_in(self);
}

void slirp_cut(struct slirp_end *self, struct slirp_socket *socket)
{
    uint8_t to_guest[SLIRP_RESET6_SIZE], to_slirp[SLIRP_RESET6_SIZE];
    struct slirp_flow flow = socket->flow;
    uint32_t to_guest_size = slirp_socket_reset(socket, true, to_guest);
    uint32_t to_slirp_size = slirp_socket_reset(socket, false, to_slirp);
    slirp_enter(self);
    self->is_reset = true;
    slirp_input(self->slirp, to_slirp, (int)to_slirp_size);
    self->is_reset = false;
    slirp_leave(self);
    /* A connection that is still being made does not end so. */
    if (!slirp_sockets_find(&self->sockets, &flow) &&
        slirp_neighbours_fill(&self->neighbours, to_guest, to_guest_size))
        slirp_deliver(self, to_guest, to_guest_size);
}

/* Connections that have been silent for too long end. */
static void reap(struct slirp_end *self, uint64_t now_ns)
{
    if (now_ns - self->reaped_ns < REAP_NS)
        return;
    self->reaped_ns = now_ns;
    struct slirp_socket *idle;
    bool is_full = self->tcp >= self->max || self->accept_at_ns;
    for (int i = 0; i < READY && (idle = slirp_sockets_idle(&self->sockets, now_ns, is_full)); i++)
        slirp_cut(self, idle);
}

static void run_timers(struct slirp_end *self, uint64_t now_ns)
{
    for (struct slirp_timer *timer = self->timers; timer < self->timers + SLIRP_TIMERS; timer++)
        if (timer->used && timer->at_ns && timer->at_ns <= now_ns) {
            timer->at_ns = 0;
            slirp_handle_timer(self->slirp, timer->id, timer->opaque);
        }
}

static bool serve(struct aiokvm_net_end *end)
{
    struct slirp_end *self = self_of(end);
    if (self->cut_watched)
        return false;
    /* A guest that takes nothing now is not sent more: the sockets are left alone. */
    if (net_queue_send(&self->queue, end, NET_QUANTUM) == NET_BLOCKED)
        return false;
    if (self->queue.first)
        return true;
    if (self->held && self->held_until_ns <= aiokvm_now_ns())
        slirp_drop_held(self);
    if (self->is_starved)
        slirp_accept(self);
    /* libslirp looks after them in an order of its own. If the time was over before it came to the last, the one that
     * is first in the epoll's, which goes round, has its turn alone. */
    struct epoll_event events[READY];
    int count = epoll_wait(self->epoll, events, self->is_late ? 1 : READY, 0);
    if (count <= 0)
        self->watch.events = 0;
    uint64_t now_ns = aiokvm_now_ns();
    slirp_enter(self);
    run_timers(self, now_ns);
    if (count > 0 || (self->poll_at_ns && self->poll_at_ns <= now_ns)) {
        for (int i = 0; i < count; i++)
            self->watched[events[i].data.fd].ready = events[i].events;
        slirp_pollfds_poll(self->slirp, 0, slirp_get_revents, self);
        self->polled_ns = now_ns;
        for (int i = 0; i < count; i++)
            self->watched[events[i].data.fd].ready = 0;
    }
    self->is_late = count > 1 && end->net->is_over;
    slirp_leave(self);
    for (int i = 0; i < count; i++) {
        const struct slirp_watched *watched = &self->watched[events[i].data.fd];
        if (watched->is_dead && watched->socket)
            slirp_cut(self, watched->socket);
    }
    reap(self, now_ns);
    return count > 0;
}

static void flush(struct aiokvm_net_end *end)
{
    struct slirp_end *self = self_of(end);
    slirp_emit_merged(self);
    slirp_ask(self);
    unguard_signals(self);
}

/* ---- the end ---- */

static void slirp_free(struct aiokvm_net_end *end)
{
    struct slirp_end *self = self_of(end);
    self->is_closing = true;
    /* It forgets to free all but the first of the frames that it keeps for a socket. */
    for (int round = 0; self->slirp && round < 64 && slirp_is_ours(self); round++)
        slirp_pollfds_poll(self->slirp, 1, slirp_get_revents, self);
    if (self->slirp)
        slirp_cleanup(self->slirp);
    slirp_drop_held(self);
    slirp_free_services(self);
    if (slirp_is_ours(self))
        net_unwatch(&self->watch);
    if (self->epoll >= 0)
        close(self->epoll);
    while (self->broken) {
        struct slirp_broken *broken = self->broken;
        self->broken = broken->next;
        free(broken);
    }
    slirp_dns_free(self);
    net_queue_clear(&self->queue);
    slirp_fragments_clear(&self->fragments);
    aiokvm_share_close(&self->descriptors);
    aiokvm_share_close(&self->bytes);
    free(self->watched);
    free(self->in_epoll);
    free(self);
}

static const struct net_type TYPE = { .serve = serve, .receive = slirp_receive, .flush = flush, .free = slirp_free };

static Slirp *make(struct slirp_end *self, const struct aiokvm_net_slirp_config *config)
{
    SlirpConfig slirp = {
        .version = 4,
        .restricted = config->restricted != 0,
        .in_enabled = true,
        .vnetwork.s_addr = htonl(config->network),
        .vnetmask.s_addr = htonl(config->netmask),
        .vhost.s_addr = htonl(config->host),
        .vdhcp_start.s_addr = htonl(config->dhcp_start),
        .vnameserver.s_addr = htonl(config->nameserver),
        .in6_enabled = config->prefix6_length != 0,
        .vprefix_len = (uint8_t)config->prefix6_length,
        .vhostname = config->hostname,
        .vdnssearch = config->search,
        .vdomainname = config->domain,
        .if_mtu = config->mtu,
        .if_mru = config->mtu,
        .disable_host_loopback = false, /* net_slirp_guard.c does that */
        .disable_dns = config->own_nameserver != 0,
    };
    memcpy(&slirp.vprefix_addr6, config->prefix6, 16);
    memcpy(&slirp.vhost6, config->host6, 16);
    memcpy(&slirp.vnameserver6, config->nameserver6, 16);
    return slirp_new(&slirp, &CALLBACKS, self);
}

int aiokvm_net_slirp_built(void)
{
    return 1;
}

struct aiokvm_net_end *aiokvm_net_slirp_new(struct aiokvm_net *net, const struct aiokvm_net_slirp_config *config,
                                            int *error)
{
    if (config->mtu < AIOKVM_NET_SLIRP_MIN_MTU || config->mtu > AIOKVM_NET_SLIRP_MAX_MTU ||
        config->prefix6_length > 126) {
        *error = EINVAL;
        return NULL;
    }
    struct slirp_end *self = net_end_new(net, &TYPE, sizeof(*self), error);
    if (!self)
        return NULL;
    /* TSO6 is not among them: libslirp takes no IPv6 packet that is larger than the MTU. */
    self->end.offloads = AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4 | AIOKVM_NET_OFFLOAD_ECN;
    self->max = config->max_connections;
    self->mtu = config->mtu;
    self->has_dns = config->has_dns && !config->own_nameserver && !config->restricted;
    self->found = -1;
    self->watch.fd = -1;
    self->guard = (struct slirp_guard){
        .network = config->network, .netmask = config->netmask, .host = config->host,
        .nameserver = config->nameserver, .prefix6_length = config->prefix6_length,
        .host_loopback = config->host_loopback, .own_nameserver = config->own_nameserver,
        .restricted = config->restricted,
    };
    memcpy(self->guard.prefix6, config->prefix6, 16);
    memcpy(self->guard.host6, config->host6, 16);
    memcpy(self->guard.nameserver6, config->nameserver6, 16);
    if (getrandom(&self->order.seed, sizeof(self->order.seed), GRND_NONBLOCK) < 0)
        self->order.seed = (uintptr_t)self;
    self->neighbours.seed = self->sockets.seed = self->order.seed;
    if (config->descriptors)
        aiokvm_share_open_part(&self->descriptors, config->descriptors);
    else
        aiokvm_share_open(&self->descriptors, aiokvm_budget_of_process(AIOKVM_BUDGET_DESCRIPTORS));
    aiokvm_share_open(&self->bytes, aiokvm_budget_of_process(AIOKVM_BUDGET_NET_BYTES));
    /* It is there whether it fits or not: the program has asked for it, not the guest. */
    aiokvm_share_add(&self->bytes, sizeof(*self));
    net_queue_init(&self->queue, WAITING_FRAMES, WAITING_BYTES, &self->bytes);
    self->fragments.share = &self->bytes;
    self->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (self->epoll < 0) {
        *error = errno;
    } else if (net_enter(net)) {
        *error = -net_watch(&self->watch, &self->end, self->epoll, EPOLLIN);
        self->is_inside = true;
        self->slirp = *error ? NULL : make(self, config);
        if (self->slirp)
            slirp_ask(self);
        else if (!*error)
            *error = EINVAL;
        slirp_leave(self);
        net_leave(net);
    }
    if (self->slirp)
        return &self->end;
    aiokvm_net_end_free(&self->end);
    return NULL;
}

#endif
