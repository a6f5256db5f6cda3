/* Frames that wait for their receiver, in the plane's own memory. */
#include "net_priv.h"

#include <stdlib.h>
#include <string.h>

struct net_queued {
    struct net_queued *next;
    struct virtio_net_hdr_v1 hdr;
    uint32_t size, hops, queue;
    struct net_progress progress;
    uint8_t data[];
};

_Static_assert(NET_ROOM_STEP >= AIOKVM_NET_MAX_FRAME + sizeof(struct net_queued), "one always has room");

/* ---- memory for them ---- */

void net_room_init(struct net_room *room, struct aiokvm_share *share)
{
    *room = (struct net_room){ .share = share, .taken = NET_ROOM_STEP };
    aiokvm_share_add(share, NET_ROOM_STEP);
}

bool net_room_take(struct net_room *room, uint64_t bytes)
{
    uint64_t used = room->used + bytes;
    if (used > room->taken) {
        uint64_t more = (used - room->taken + NET_ROOM_STEP - 1) / NET_ROOM_STEP * NET_ROOM_STEP;
        if (!aiokvm_share_take(room->share, more))
            return false;
        room->taken += more;
    }
    room->used = used;
    return true;
}

void net_room_give(struct net_room *room, uint64_t bytes)
{
    room->used -= bytes;
    /* A step is kept back, for the next frame. */
    uint64_t less = (room->taken - room->used) / NET_ROOM_STEP;
    if (less < 2)
        return;
    less = (less - 1) * NET_ROOM_STEP;
    room->taken -= less;
    aiokvm_share_give(room->share, less);
}

/* ---- the queue ---- */

void net_queue_init(struct net_queue *queue, uint32_t max_frames, uint64_t max_bytes, struct aiokvm_share *share)
{
    *queue = (struct net_queue){ .max_frames = max_frames, .max_bytes = max_bytes };
    queue->last = &queue->first;
    net_room_init(&queue->room, share);
}

static void remove_first(struct net_queue *queue)
{
    struct net_queued *queued = queue->first;
    queue->first = queued->next;
    if (!queue->first)
        queue->last = &queue->first;
    queue->frames--;
    queue->bytes -= queued->size;
    net_room_give(&queue->room, sizeof(*queued) + queued->size);
    free(queued);
}

void net_queue_clear(struct net_queue *queue)
{
    while (queue->first)
        remove_first(queue);
}

void net_queue_clear_some(struct net_queue *queue, struct aiokvm_net *net)
{
    for (; queue->first && !net->is_over; remove_first(queue))
        net_spend(net, NET_COST_FRAME);
}

bool net_queue_put(struct net_queue *queue, const struct net_frame *frame)
{
    if (queue->frames >= queue->max_frames || queue->bytes + frame->size > queue->max_bytes)
        return false;
    size_t memory = sizeof(struct net_queued) + frame->size;
    if (!net_room_take(&queue->room, memory))
        return false;
    struct net_queued *queued = malloc(memory);
    if (!queued) {
        net_room_give(&queue->room, memory);
        return false;
    }
    *queued = (struct net_queued){ .hdr = frame->hdr, .size = frame->size, .hops = frame->hops,
                                   .queue = frame->queue, .progress = frame->progress };
    net_frame_copy(frame, queued->data);
    *queue->last = queued;
    queue->last = &queued->next;
    queue->frames++;
    queue->bytes += queued->size;
    return true;
}

enum net_result net_queue_send(struct net_queue *queue, struct aiokvm_net_end *from, uint32_t most)
{
    for (struct net_queued *queued; most && (queued = queue->first); most = from->net->is_over ? 0 : most - 1) {
        /* [0] is the receiver's. */
        struct iovec iov[3] = { [1] = { queued->data, queued->size } };
        struct net_frame frame = {
            .hdr = queued->hdr, .iov = iov + 1, .count = 1, .size = queued->size,
            .hops = queued->hops, .queue = queued->queue, .progress = queued->progress,
        };
        if (net_send(from, &frame) == NET_BLOCKED) {
            queued->progress = frame.progress;
            return NET_BLOCKED;
        }
        remove_first(queue);
    }
    return NET_TAKEN;
}
