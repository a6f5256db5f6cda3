/* Frames of libslirp's to the guest: who has the address that they go to is found out, TCP segments are merged. */
#include "net_slirp_priv.h"

#ifdef AIOKVM_HAVE_SLIRP

#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "net_packet.h"

/* Frames for addresses of which is not known who has them. */
enum { HELD = 64 };

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
        slirp_let_in(self);
    if (result == NET_BLOCKED && !net_queue_put(&self->queue, &frame))
        self->end.stats.dropped_full++;
}

void slirp_emit_merged(struct slirp_end *self)
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
        slirp_emit_merged(self);
        if (slirp_merge_add(&self->merge, data, size))
            return;
    }
    slirp_emit_merged(self);
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
        self->held_until_ns = aiokvm_now_ns() + SLIRP_HOLD_NS;
    slirp_deliver(self, question, slirp_neighbours_ask(&self->guard, data, question));
}

static void free_held(struct slirp_end *self, struct slirp_held *held)
{
    aiokvm_share_give(&self->bytes, sizeof(*held) + held->size);
    free(held);
}

/* Somebody has been heard for the first time. */
void slirp_deliver_held(struct slirp_end *self)
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

void slirp_drop_held(struct slirp_end *self)
{
    self->end.stats.dropped_unresolved += self->held_count;
    while (self->held) {
        struct slirp_held *held = self->held;
        self->held = held->next;
        free_held(self, held);
    }
    self->held_count = 0;
}

ssize_t slirp_send_packet(const void *data, size_t size, void *opaque)
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

#endif
