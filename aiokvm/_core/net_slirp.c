/* User-mode NAT: libslirp as an end. Everything that it watches is in an epoll of its own, of which the plane watches
 * the whole; what it wants to know of each descriptor is asked for when something has happened. */
#define _GNU_SOURCE
#include "net_slirp_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#ifdef AIOKVM_HAVE_SLIRP

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "net_packet.h"

enum {
    /* Frames for a guest that takes none. TCP comes again with what is dropped. */
    WAITING_FRAMES = 1024, WAITING_BYTES = 2 << 20,
    /* Descriptors that are looked after before others have their turn: each has up to 128 KiB. */
    READY = 8,
    /* Frames for addresses of which is not known who has them. */
    HELD = 64,
};
/* How long the guest may take to say so; libslirp gives a frame up after as long. */
static const uint64_t HOLD_NS = 1000000000;
/* Without a need to do so earlier, libslirp's clock is set so often. */
static const uint64_t TICK_NS = 100000000;
/* How often connections are looked for that have been silent for too long. */
static const uint64_t REAP_NS = 1000000000;

static struct slirp_end *self_of(struct aiokvm_net_end *end)
{
    return (struct slirp_end *)end;
}

/* ---- frames to the guest ---- */

/* Frames of the guest's are taken again. */
static void let_in(struct slirp_end *self)
{
    self->is_inside = false;
    if (self->is_refused) {
        self->is_refused = false;
        net_resume(&self->end);
    }
}

static void emit(struct slirp_end *self, const struct virtio_net_hdr_v1 *hdr, const void *data, size_t size)
{
    /* [0] is the receiver's. */
    struct iovec iov[3] = { [1] = { (void *)(uintptr_t)data, size } };
    struct net_frame frame = { .hdr = *hdr, .iov = iov + 1, .count = 1, .size = (uint32_t)size };
    /* Who gets it may answer at once. That waits: what is sent may lie in `input`, in `merge` or among `held`. */
    bool was_inside = self->is_inside;
    self->is_inside = true;
    enum net_result result = self->queue.first ? NET_BLOCKED : net_send(&self->end, &frame);
    if (!was_inside)
        let_in(self);
    if (result == NET_BLOCKED && !net_queue_put(&self->queue, &frame))
        self->end.stats.dropped_full++;
}

static void emit_merged(struct slirp_end *self)
{
    if (!self->merge.size)
        return;
    struct virtio_net_hdr_v1 hdr;
    slirp_merge_finish(&self->merge, &hdr);
    uint32_t size = self->merge.size;
    self->merge.size = 0;
    emit(self, &hdr, self->merge.data, size);
}

void slirp_deliver(struct slirp_end *self, uint8_t *data, size_t size)
{
    slirp_dns_from_service(self, data, size);
    bool is_ip6 = data[12] == 0x86;
    uint32_t needs = is_ip6 ? AIOKVM_NET_OFFLOAD_TSO6 : AIOKVM_NET_OFFLOAD_TSO4;
    if (self->end.peer && self->end.peer->offloads & needs) {
        if (slirp_merge_add(&self->merge, data, size))
            return;
        emit_merged(self);
        if (slirp_merge_add(&self->merge, data, size))
            return;
    }
    emit_merged(self);
    emit(self, &(struct virtio_net_hdr_v1){ 0 }, data, size);
}

/* Who has the address is asked, the frame waits for the answer. */
static void hold(struct slirp_end *self, const uint8_t *data, size_t size)
{
    uint8_t question[SLIRP_QUESTION_SIZE];
    struct slirp_held **last = &self->held, *held = NULL;
    if (self->held_count >= HELD) {
        self->end.stats.dropped_unresolved++;
        return;
    }
    if (aiokvm_share_fits(&self->bytes, sizeof(*held) + size))
        held = malloc(sizeof(*held) + size);
    if (!held) {
        self->end.stats.dropped_full++;
        return;
    }
    aiokvm_share_add(&self->bytes, sizeof(*held) + size);
    while (*last)
        last = &(*last)->next;
    *last = held;
    *held = (struct slirp_held){ .size = (uint32_t)size };
    memcpy(held->data, data, size);
    if (!self->held_count++)
        self->held_until_ns = aiokvm_now_ns() + HOLD_NS;
    slirp_deliver(self, question, slirp_neighbours_ask(&self->guard, data, question));
}

static void free_held(struct slirp_end *self, struct slirp_held *held)
{
    aiokvm_share_give(&self->bytes, sizeof(*held) + held->size);
    free(held);
}

/* Somebody has been heard for the first time. */
static void deliver_held(struct slirp_end *self)
{
    for (struct slirp_held **at = &self->held, *held; (held = *at);) {
        if (!slirp_neighbours_fill(&self->neighbours, held->data, held->size)) {
            at = &held->next;
            continue;
        }
        slirp_deliver_datagram(self, held->data, held->size);
        *at = held->next;
        self->held_count--;
        free_held(self, held);
    }
}

static void drop_held(struct slirp_end *self)
{
    self->end.stats.dropped_unresolved += self->held_count;
    while (self->held) {
        struct slirp_held *held = self->held;
        self->held = held->next;
        free_held(self, held);
    }
    self->held_count = 0;
}

static ssize_t send_packet(const void *data, size_t size, void *opaque)
{
    struct slirp_end *self = opaque;
    uint8_t answer[SLIRP_QUESTION_SIZE];
    if (size < AIOKVM_NET_MIN_FRAME || size > AIOKVM_NET_MAX_FRAME) {
        self->end.stats.dropped_invalid++;
        return (ssize_t)size;
    }
    uint32_t answer_size = slirp_neighbours_answer(data, size, answer);
    if (answer_size) {
        /* It is in the middle of sending: this changes its table of neighbours, and nothing else. */
        slirp_input(self->slirp, answer, (int)answer_size);
        self->has_answered = true;
        return (ssize_t)size;
    }
    if (self->is_closing)
        return (ssize_t)size;
    net_dirty(&self->end);
    net_spend(self->end.net, NET_COST_CALL + (uint32_t)size);
    uint64_t now_ns = aiokvm_now_ns();
    slirp_guard_heard(&self->guard, data, size, now_ns);
    slirp_order_heard(&self->order, data, size);
    slirp_sockets_told(&self->sockets, data, size, now_ns);
    /* It has made the frame for this call, and does not look at it again. */
    uint8_t *frame = (uint8_t *)(uintptr_t)data;
    if (slirp_neighbours_fill(&self->neighbours, frame, size))
        slirp_deliver_datagram(self, frame, size);
    else
        hold(self, frame, size);
    return (ssize_t)size;
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
    return (int64_t)(aiokvm_now_ns() + (((struct slirp_end *)opaque)->is_closing ? 2 * HOLD_NS : 0));
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
    .send_packet = send_packet, .guest_error = guest_error, .clock_get_ns = clock_get_ns, .timer_free = timer_free,
    .timer_mod = timer_mod, .timer_new_opaque = timer_new, .register_poll_fd = slirp_register,
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

static void enter(struct slirp_end *self)
{
    net_dirty(&self->end);
    guard_signals(self);
    self->is_inside = true;
}

static void leave(struct slirp_end *self)
{
    /* What it asked a neighbour for it can send now. Its table holds 16: more than a few rounds are of no use. */
    for (int round = 0; round < 4 && self->has_answered; round++) {
        self->has_answered = false;
        slirp_pollfds_poll(self->slirp, 1, slirp_get_revents, self);
    }
    let_in(self);
}

void slirp_cut(struct slirp_end *self, struct slirp_socket *socket)
{
    uint8_t to_guest[SLIRP_RESET6_SIZE], to_slirp[SLIRP_RESET6_SIZE];
    struct slirp_flow flow = socket->flow;
    uint32_t to_guest_size = slirp_socket_reset(socket, true, to_guest);
    uint32_t to_slirp_size = slirp_socket_reset(socket, false, to_slirp);
    enter(self);
    self->is_reset = true;
    slirp_input(self->slirp, to_slirp, (int)to_slirp_size);
    self->is_reset = false;
    leave(self);
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
        drop_held(self);
    if (self->is_starved)
        slirp_accept(self);
    /* libslirp looks after them in an order of its own. If the time was over before it came to the last, the one that
     * is first in the epoll's, which goes round, has its turn alone. */
    struct epoll_event events[READY];
    int count = epoll_wait(self->epoll, events, self->is_late ? 1 : READY, 0);
    if (count <= 0)
        self->watch.events = 0;
    uint64_t now_ns = aiokvm_now_ns();
    enter(self);
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
    leave(self);
    reap(self, now_ns);
    return count > 0;
}

/* ---- frames from the guest ---- */

/* The service that a frame goes to. It has to be a whole one of TCP over IPv4: of any other this means nothing. */
static struct slirp_service *find_service(struct slirp_end *self)
{
    uint32_t address = net_load32(self->input + 30), port = net_load16(self->input + 36);
    struct slirp_service *service = self->services;
    while (service && (service->address != address || service->port != port))
        service = service->next;
    return service;
}

/* False: it is too much. If *reset_size is not 0, `reset` goes to libslirp before. */
static bool may_connect(struct slirp_end *self, uint32_t size, uint64_t now_ns, uint8_t *reset, uint32_t *reset_size)
{
    *reset_size = 0;
    /* One more could not be accepted either, and would take the place of that which waits for it. */
    if (self->is_starved && slirp_begun_find(&self->begun, self->input, size))
        return false;
    return !find_service(self) || !slirp_begins(self->input, size) ||
           slirp_begun_add(&self->begun, self->input, size, now_ns, reset, reset_size);
}

/* Whether there is room for what a frame of the guest's opens. A connection that is closed at one side, and silent,
 * makes room. */
static struct slirp_load measure(struct slirp_end *self, uint32_t size, uint64_t now_ns, bool is_service)
{
    struct slirp_flow flow;
    struct slirp_load load = { .is_service = is_service, .now_ns = now_ns };
    bool has_flow = slirp_flow_of(&flow, self->input, size, false);
    if (has_flow && slirp_sockets_find(&self->sockets, &flow))
        return load;
    bool has_descriptor = aiokvm_share_fits(&self->descriptors, is_service ? 2 : 1);
    if (!has_flow || !flow.is_tcp) {
        load.other_full = self->other >= self->max || !has_descriptor ||
                          !aiokvm_share_fits(&self->bytes, SLIRP_OTHER_BYTES);
        return load;
    }
    load.tcp_full = self->is_starved || self->tcp >= self->max || !has_descriptor ||
                    !aiokvm_share_fits(&self->bytes, SLIRP_TCP_BYTES);
    struct slirp_socket *idle;
    if (load.tcp_full && !self->is_starved && (idle = slirp_sockets_idle(&self->sockets, now_ns, true))) {
        slirp_cut(self, idle);
        load.tcp_full = false;
    }
    return load;
}

/* After libslirp has got it: it has made the connection, or has been told to give it up, and is told so for sure. */
static void check_begun(struct slirp_end *self, uint32_t size)
{
    struct slirp_connecting *of = slirp_begun_find(&self->begun, self->input, size);
    bool is_reset = slirp_resets(self->input, size);
    uint8_t reset[SLIRP_RESET_SIZE];
    if (!of || (!is_reset && !self->is_connected))
        return;
    size = slirp_begun_remove(&self->begun, of, self->input, reset);
    if (!self->is_connected)
        slirp_input(self->slirp, reset, (int)size);
}

static enum net_result receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct slirp_end *self = self_of(end);
    if (self->is_inside) {
        self->is_refused = true;
        return NET_BLOCKED;
    }
    if (self->is_starved)
        slirp_accept(self);
    uint64_t now_ns = aiokvm_now_ns();
    /* At first as if there was no room: what needs some is found so. */
    struct slirp_load load = { .tcp_full = true, .other_full = true, .now_ns = now_ns };
    uint32_t size = frame->size;
    net_spend(end->net, NET_COST_CALL + size);
    net_frame_copy(frame, self->input);
    load.is_service = find_service(self);
    enum slirp_verdict verdict = slirp_guard(&self->guard, &load, &frame->hdr, self->input, size);
    if (verdict == SLIRP_FRAGMENT) {
        bool is_invalid;
        size = slirp_fragments_add(&self->fragments, self->input, now_ns, &is_invalid);
        end->stats.dropped_invalid += is_invalid;
        end->stats.dropped_full += self->fragments.lost;
        self->fragments.lost = 0;
        if (!size)
            return NET_TAKEN;
        load.is_service = find_service(self);
        verdict = slirp_guard(&self->guard, &load, &(struct virtio_net_hdr_v1){ 0 }, self->input, size);
    }
    if (verdict == SLIRP_FULL) {
        load = measure(self, size, now_ns, load.is_service);
        verdict = slirp_guard(&self->guard, &load, &(struct virtio_net_hdr_v1){ 0 }, self->input, size);
    }
    switch (verdict) {
    case SLIRP_PASS:
        break;
    case SLIRP_FRAGMENT:
    case SLIRP_REFUSE:
        end->stats.dropped_filtered++;
        break;
    case SLIRP_UNSUPPORTED:
        end->stats.dropped_unsupported++;
        return NET_TAKEN;
    case SLIRP_INVALID:
        end->stats.dropped_invalid++;
        return NET_TAKEN;
    case SLIRP_DENY:
        end->stats.dropped_filtered++;
        return NET_TAKEN;
    case SLIRP_FULL:
        end->stats.dropped_full++;
        return NET_TAKEN;
    }
    if (slirp_neighbours_learn(&self->neighbours, self->input, size) && self->held)
        deliver_held(self);
    if (slirp_dns_take(self, self->input, size))
        return NET_TAKEN;
    slirp_dns_to_service(self, self->input, size);
    uint8_t reset[SLIRP_RESET_SIZE];
    uint32_t reset_size;
    if (!may_connect(self, size, now_ns, reset, &reset_size)) {
        end->stats.dropped_full++;
        return NET_TAKEN;
    }
    if (self->services && !self->is_starved)
        slirp_guard_sender(self->input, &self->sender.address, &self->sender.port);
    enter(self);
    if (now_ns - self->polled_ns >= TICK_NS) {
        /* Only the time and its timers: a new socket would be as old as the time that it knows. */
        self->polled_ns = now_ns;
        slirp_pollfds_poll(self->slirp, 1, slirp_get_revents, self);
    }
    if (reset_size)
        slirp_input(self->slirp, reset, (int)reset_size);
    self->is_connected = false; /* by a forward's path, maybe */
    slirp_order_begin(&self->order, self->input, size);
    self->input_size = size;
    self->is_receiving = true;
    self->is_reset = slirp_sockets_heard(&self->sockets, self->input, size, now_ns);
    slirp_input(self->slirp, self->input, (int)size);
    uint32_t given_up = slirp_order_end(&self->order, self->input, size);
    if (given_up) {
        end->stats.dropped_full++;
        self->is_reset = true;
        slirp_input(self->slirp, self->input, (int)given_up);
    }
    self->is_receiving = self->is_reset = false;
    check_begun(self, given_up ? given_up : size);
    leave(self);
    if (self->is_connected)
        slirp_accept(self);
    return NET_TAKEN;
}

static void flush(struct aiokvm_net_end *end)
{
    struct slirp_end *self = self_of(end);
    emit_merged(self);
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
    drop_held(self);
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

static const struct net_type TYPE = { .serve = serve, .receive = receive, .flush = flush, .free = slirp_free };

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
        leave(self);
        net_leave(net);
    }
    if (self->slirp)
        return &self->end;
    aiokvm_net_end_free(&self->end);
    return NULL;
}

#endif
