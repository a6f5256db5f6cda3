/* The adapter of a guest: its queues, and what it transmits. */
#include "net_nic_priv.h"

#include <errno.h>
#include <linux/virtio_mmio.h>
#include <stdlib.h>
#include <string.h>

/* The headers of 6.2 and later have them. */
enum { NET_F_GUEST_USO4 = 54, NET_F_GUEST_USO6 = 55, NET_F_HOST_USO = 56 };

static bool has(uint64_t features, unsigned bit)
{
    return features >> bit & 1;
}

void nic_break(struct nic *nic, const struct nic_queue *queue, int error)
{
    nic->state.is_broken = true;
    net_tell(&nic->end, AIOKVM_NET_NEWS_BROKEN, error, queue->index);
    /* What waits for buffers is dropped. */
    net_resume(&nic->end);
}

/* ---- transmission ---- */

static void copy_header(const struct aiokvm_chain *chain, struct virtio_net_hdr_v1 *hdr)
{
    size_t filled = 0;
    for (uint32_t i = 0; filled < sizeof(*hdr); i++) {
        size_t left = sizeof(*hdr) - filled, part = chain->iov[i].iov_len < left ? chain->iov[i].iov_len : left;
        memcpy((uint8_t *)hdr + filled, chain->iov[i].iov_base, part);
        filled += part;
    }
}

/* The frame of the queue's chain. False: it is none. */
static bool take_frame(const struct nic *nic, struct nic_queue *queue)
{
    const struct aiokvm_chain *chain = queue->chain;
    struct net_frame *frame = &queue->frame;
    if (chain->writable || chain->readable_bytes < NIC_HDR_SIZE + AIOKVM_NET_MIN_FRAME ||
        chain->readable_bytes > NIC_HDR_SIZE + AIOKVM_NET_MAX_FRAME)
        return false;
    *frame = (struct net_frame){ .queue = queue->index / 2 };
    copy_header(chain, &frame->hdr);
    /* That a checksum is right is not for a driver to say. */
    frame->hdr.flags &= nic->state.offloads & AIOKVM_NET_OFFLOAD_CSUM ? VIRTIO_NET_HDR_F_NEEDS_CSUM : 0;
    net_frame_set(frame, queue->iov + 1, queue->head, chain->iov, chain->readable, NIC_HDR_SIZE);
    return net_frame_check(frame) && !(net_frame_needs(frame) & ~nic->state.offloads);
}

static void complete(struct nic *nic, struct nic_queue *queue)
{
    aiokvm_vring_push(queue->vring, queue->chain, 0);
    queue->chain = NULL;
    queue->is_dirty = true;
    net_dirty(&nic->end);
}

bool nic_polls(struct nic *nic, struct nic_queue *queue)
{
    if (!nic->end.net->gather.is_on)
        return false;
    queue->is_polled = true;
    net_later(&nic->end);
    return true;
}

/* The next chain is the queue's, and its frame if it has one. False: there is none. */
static bool take_chain(struct nic *nic, struct nic_queue *queue)
{
    int result;
    while (!(result = aiokvm_vring_pop(queue->vring, &queue->chain)))
        if (nic_polls(nic, queue) || !aiokvm_vring_enable_notify(queue->vring)) {
            queue->is_pending = false;
            return false;
        }
    if (result < 0) {
        queue->chain = NULL;
        nic_break(nic, queue, result);
        return false;
    }
    return true;
}

/* Returns what is left of the budget, which is in frames. */
static uint32_t transmit(struct nic *nic, struct nic_queue *queue, uint32_t budget)
{
    struct aiokvm_net *net = nic->end.net;
    aiokvm_vring_disable_notify(queue->vring);
    for (; budget; budget = net->is_over ? 0 : budget - 1) {
        if (!queue->chain) {
            if (!take_chain(nic, queue))
                break;
            net_spend(net, NET_COST_FRAME + queue->chain->readable * NIC_COST_PIECE);
            if (!take_frame(nic, queue)) {
                nic->end.stats.dropped_invalid++;
                complete(nic, queue);
                continue;
            }
            if (nic->state.pairs > 1)
                nic_steer(nic, &queue->frame, queue->index / 2);
        }
        if (net_send(&nic->end, &queue->frame) == NET_BLOCKED) {
            queue->is_blocked = true;
            break;
        }
        complete(nic, queue);
    }
    return budget;
}

/* The driver has put buffers into a queue, or may have. */
static void on_kick(struct nic *nic, struct nic_queue *queue)
{
    queue->kick.events = 0;
    queue->is_polled = false;
    if (queue->index % 2) {
        queue->is_pending = true;
    } else if (queue->is_starved) {
        queue->is_starved = false;
        aiokvm_vring_disable_notify(queue->vring);
        net_resume(&nic->end);
    }
}

static bool can_transmit(const struct nic_state *state, const struct nic_queue *queue)
{
    return queue && queue->is_pending && !queue->is_blocked && !state->is_broken;
}

static bool serve(struct aiokvm_net_end *end)
{
    struct nic *nic = (struct nic *)end;
    struct nic_state *state = &nic->state;
    for (uint32_t i = 0; i < 2 * AIOKVM_NET_NIC_PAIRS; i++)
        if (state->queues[i] && (state->queues[i]->kick.events || state->queues[i]->is_polled))
            on_kick(nic, state->queues[i]);
    uint32_t budget = NET_QUANTUM, first = state->next_pair++;
    bool more = false;
    for (uint32_t i = 0; i < state->pairs; i++) {
        struct nic_queue *queue = state->queues[2 * ((first + i) % state->pairs) + 1];
        if (!can_transmit(state, queue))
            continue;
        budget = transmit(nic, queue, budget);
        more |= can_transmit(state, queue);
    }
    return more;
}

static void resume(struct aiokvm_net_end *end)
{
    struct nic *nic = (struct nic *)end;
    for (uint32_t i = 1; i < 2 * AIOKVM_NET_NIC_PAIRS; i += 2)
        if (nic->state.queues[i])
            nic->state.queues[i]->is_blocked = false;
    net_ready(end);
}

static void flush(struct aiokvm_net_end *end)
{
    struct nic *nic = (struct nic *)end;
    const struct aiokvm_notifier *notifier = NULL;
    for (uint32_t i = 0; i < 2 * AIOKVM_NET_NIC_PAIRS; i++) {
        struct nic_queue *queue = nic->state.queues[i];
        if (!queue || !queue->is_dirty)
            continue;
        queue->is_dirty = false;
        if (aiokvm_vring_publish(queue->vring) == 1)
            notifier = &queue->notifier;
    }
    /* The queues of a device share its interrupt. */
    if (notifier) {
        end->stats.interrupts++;
        aiokvm_notify(notifier, VIRTIO_MMIO_INT_VRING);
    }
}

/* ---- what the program sets ---- */

static void free_nic(struct aiokvm_net_end *end)
{
    struct nic *nic = (struct nic *)end;
    for (uint32_t i = 0; i < 2 * AIOKVM_NET_NIC_PAIRS; i++)
        if (nic->state.queues[i]) {
            net_unwatch(&nic->state.queues[i]->kick);
            free(nic->state.queues[i]);
        }
    free(nic);
}

static const struct net_type TYPE = {
    .serve = serve, .receive = nic_receive, .resume = resume, .flush = flush, .free = free_nic,
};

struct aiokvm_net_end *aiokvm_net_nic_new(struct aiokvm_net *net, int *error)
{
    struct nic *nic = net_end_new(net, &TYPE, sizeof(*nic), error);
    if (!nic)
        return NULL;
    nic->state.pairs = 1;
    return &nic->end;
}

static uint32_t guest_offloads(uint64_t features)
{
    if (!has(features, VIRTIO_NET_F_GUEST_CSUM))
        return 0;
    uint32_t offloads = AIOKVM_NET_OFFLOAD_CSUM;
    offloads |= has(features, VIRTIO_NET_F_GUEST_TSO4) ? AIOKVM_NET_OFFLOAD_TSO4 : 0;
    offloads |= has(features, VIRTIO_NET_F_GUEST_TSO6) ? AIOKVM_NET_OFFLOAD_TSO6 : 0;
    offloads |= has(features, VIRTIO_NET_F_GUEST_ECN) ? AIOKVM_NET_OFFLOAD_ECN : 0;
    /* Which of them a frame needs is not told apart. */
    if (has(features, NET_F_GUEST_USO4) && has(features, NET_F_GUEST_USO6))
        offloads |= AIOKVM_NET_OFFLOAD_USO;
    return offloads;
}

static uint32_t host_offloads(uint64_t features)
{
    if (!has(features, VIRTIO_NET_F_CSUM))
        return 0;
    uint32_t offloads = AIOKVM_NET_OFFLOAD_CSUM;
    offloads |= has(features, VIRTIO_NET_F_HOST_TSO4) ? AIOKVM_NET_OFFLOAD_TSO4 : 0;
    offloads |= has(features, VIRTIO_NET_F_HOST_TSO6) ? AIOKVM_NET_OFFLOAD_TSO6 : 0;
    offloads |= has(features, VIRTIO_NET_F_HOST_ECN) ? AIOKVM_NET_OFFLOAD_ECN : 0;
    offloads |= has(features, NET_F_HOST_USO) ? AIOKVM_NET_OFFLOAD_USO : 0;
    return offloads;
}

int aiokvm_net_nic_set_features(struct aiokvm_net_end *end, uint64_t features, uint32_t mtu)
{
    struct nic *nic = (struct nic *)end;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    struct nic_state *state = &nic->state;
    state->pairs = 1;
    state->next_pair = 0;
    state->offloads = host_offloads(features);
    state->mtu = has(features, VIRTIO_NET_F_MTU) ? mtu : 0;
    state->is_mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
    state->is_broken = false;
    memset(&state->filter, 0, sizeof(state->filter));
    memset(state->flows, 0, sizeof(state->flows));
    end->offloads = guest_offloads(features);
    net_leave(end->net);
    return 0;
}

int aiokvm_net_nic_set_offloads(struct aiokvm_net_end *end, uint64_t features)
{
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    end->offloads = guest_offloads(features);
    net_leave(end->net);
    return 0;
}

int aiokvm_net_nic_set_pairs(struct aiokvm_net_end *end, uint32_t pairs)
{
    struct nic *nic = (struct nic *)end;
    if (!pairs || pairs > AIOKVM_NET_NIC_PAIRS)
        return -EINVAL;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    nic->state.pairs = pairs;
    /* What waits for buffers of a queue that is not used any more goes by another one. */
    net_resume(end);
    net_ready(end);
    net_leave(end->net);
    return 0;
}

int aiokvm_net_nic_set_filter(struct aiokvm_net_end *end, const struct aiokvm_net_nic_filter *filter)
{
    struct nic *nic = (struct nic *)end;
    if (filter->macs > AIOKVM_NET_NIC_MACS)
        return -EINVAL;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    nic->state.filter = *filter;
    net_leave(end->net);
    return 0;
}

static struct nic_queue *queue_new(uint32_t index, struct aiokvm_vring *vring, uint32_t size,
                                   const struct aiokvm_notifier *notifier)
{
    struct nic_queue *queue = malloc(sizeof(*queue));
    if (!queue)
        return NULL;
    /* What is behind is written before it is read. */
    memset(queue, 0, offsetof(struct nic_queue, iov));
    queue->index = index;
    queue->vring = vring;
    queue->size = size < AIOKVM_VRING_MAX_SIZE ? size : AIOKVM_VRING_MAX_SIZE;
    queue->notifier = *notifier;
    queue->is_pending = index % 2;
    queue->kick.fd = -1;
    aiokvm_vring_disable_notify(vring);
    return queue;
}

/* The vring is nobody's. */
static void queue_free(struct nic *nic, struct nic_queue *queue)
{
    net_unwatch(&queue->kick);
    if (queue->chain) {
        aiokvm_vring_drop(queue->vring, queue->chain);
        nic->end.stats.dropped_down++;
    }
    for (; queue->count; queue->count--, queue->first++)
        aiokvm_vring_drop(queue->vring, queue->stash[queue->first % AIOKVM_VRING_MAX_SIZE]);
    free(queue);
    /* What waits for its buffers goes by another, or is dropped. */
    net_resume(&nic->end);
}

int aiokvm_net_nic_set_queue(struct aiokvm_net_end *end, uint32_t index, struct aiokvm_vring *vring, uint32_t size,
                             int kick, const struct aiokvm_notifier *notifier)
{
    struct nic *nic = (struct nic *)end;
    if (index >= 2 * AIOKVM_NET_NIC_PAIRS)
        return -EINVAL;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    struct nic_queue **queue = &nic->state.queues[index];
    if (*queue) {
        /* What it has completed belongs to the driver. */
        flush(end);
        queue_free(nic, *queue);
        *queue = NULL;
    }
    int error = 0;
    if (vring) {
        *queue = queue_new(index, vring, size, notifier);
        error = *queue ? net_watch(&(*queue)->kick, end, kick, EPOLLIN) : -ENOMEM;
        if (error && *queue) {
            free(*queue);
            *queue = NULL;
        }
    }
    net_ready(end);
    net_leave(end->net);
    return error;
}

static int watch_again(struct nic *nic, int kicks[2 * AIOKVM_NET_NIC_PAIRS])
{
    int error = 0;
    for (uint32_t i = 0; i < 2 * AIOKVM_NET_NIC_PAIRS && !error; i++) {
        struct nic_queue *queue = nic->state.queues[i];
        if (!queue)
            continue;
        queue->is_blocked = false;
        queue->is_pending = i % 2;
        /* Links of two planes may have the same number. */
        queue->frame.progress = (struct net_progress){ 0 };
        error = net_watch(&queue->kick, &nic->end, kicks[i], EPOLLIN);
    }
    return error;
}

int aiokvm_net_nic_move(struct aiokvm_net_end *from, struct aiokvm_net_end *to)
{
    struct nic *old = (struct nic *)from, *new = (struct nic *)to;
    int kicks[2 * AIOKVM_NET_NIC_PAIRS];
    /* One after the other: nobody ever holds the locks of two planes. */
    if (!net_enter(from->net))
        return -EOWNERDEAD;
    flush(from);
    struct nic_state state = old->state;
    uint32_t offloads = from->offloads;
    for (uint32_t i = 0; i < 2 * AIOKVM_NET_NIC_PAIRS; i++)
        if (state.queues[i]) {
            kicks[i] = state.queues[i]->kick.fd;
            net_unwatch(&state.queues[i]->kick);
        }
    memset(&old->state, 0, sizeof(old->state));
    old->state.pairs = 1;
    net_resume(from);
    net_leave(from->net);
    if (!net_enter(to->net))
        return -EOWNERDEAD;
    new->state = state;
    to->offloads = offloads;
    int error = watch_again(new, kicks);
    net_ready(to);
    net_leave(to->net);
    return error;
}
