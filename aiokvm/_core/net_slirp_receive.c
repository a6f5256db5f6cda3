/* Frames of the guest's to libslirp: whether each may pass, and whether there is room for what it opens. */
#include "net_slirp_priv.h"

#ifdef AIOKVM_HAVE_SLIRP

#include "clock.h"
#include "net_packet.h"

/* Without a need to do so earlier, libslirp's clock is set so often. */
static const uint64_t TICK_NS = 100000000;

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

enum net_result slirp_receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct slirp_end *self = (struct slirp_end *)end;
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
        slirp_deliver_held(self);
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
    slirp_enter(self);
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
    slirp_leave(self);
    if (self->is_connected)
        slirp_accept(self);
    return NET_TAKEN;
}

#endif
