/* What fuzzers of ends have in common: a peer that reads every byte that it is given. */
#ifndef AIOKVM_NET_FUZZ_H
#define AIOKVM_NET_FUZZ_H

#include "fuzz.h"
#include "net_priv.h"

struct peer {
    struct aiokvm_net_end end;
    uint32_t number;
    bool blocks;
    uint32_t blocks_every, asked; /* 0: never */
    uint64_t received, bytes;
    /* Of one frame, in an allocation of its size. May be NULL. */
    void (*check)(struct peer *peer, const uint8_t *data, uint32_t size);
};

static bool peer_serve(struct aiokvm_net_end *end)
{
    (void)end;
    return false;
}

/* A frame is as promised, and needs nothing that was not asked for, but for what is right about it. */
static enum net_result peer_receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct peer *peer = (struct peer *)end;
    if (peer->blocks || (peer->blocks_every && ++peer->asked % peer->blocks_every == 0))
        return NET_BLOCKED;
    REQUIRE(frame->size >= AIOKVM_NET_MIN_FRAME && frame->size <= AIOKVM_NET_MAX_FRAME);
    REQUIRE(!(net_frame_needs(frame) & ~end->offloads));
    REQUIRE(frame->hdr.csum_start + frame->hdr.csum_offset < NET_HEAD);
    frame->iov[-1] = (struct iovec){ 0 };
    size_t size = 0;
    for (uint32_t i = 0; i < frame->count; i++)
        size += frame->iov[i].iov_len;
    REQUIRE(size == frame->size);
    uint8_t *copy = malloc(size);
    REQUIRE(copy);
    net_frame_copy(frame, copy);
    if (peer->check)
        peer->check(peer, copy, frame->size);
    free(copy);
    if (frame->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        struct virtio_net_hdr_v1 hdr = frame->hdr;
        REQUIRE(net_frame_check(frame));
        REQUIRE(!memcmp(&hdr, &frame->hdr, sizeof(hdr)));
    }
    peer->received++;
    peer->bytes += frame->size;
    return NET_TAKEN;
}

static void peer_free(struct aiokvm_net_end *end)
{
    free(end);
}

static inline struct peer *peer_new(struct aiokvm_net *net, uint32_t offloads)
{
    static const struct net_type TYPE = { .serve = peer_serve, .receive = peer_receive, .free = peer_free };
    int error;
    struct peer *peer = net_end_new(net, &TYPE, sizeof(*peer), &error);
    REQUIRE(peer);
    peer->end.offloads = offloads;
    return peer;
}

static inline void peer_block(struct peer *peer, bool blocks)
{
    REQUIRE(net_enter(peer->end.net));
    peer->blocks = blocks;
    if (!blocks)
        net_resume(&peer->end);
    net_leave(peer->end.net);
}

/* A frame whose first bytes and header the input says; it begins with `head`, if that is not NULL. */
static inline enum net_result peer_send(struct peer *peer, struct input *input, const uint8_t *head, uint32_t known)
{
    static uint8_t data[AIOKVM_NET_MAX_FRAME + 1];
    uint8_t private[NET_HEAD];
    uint32_t size = take(input, 2) + known, given = take(input, 1);
    struct virtio_net_hdr_v1 hdr = { .flags = (uint8_t)take(input, 1), .gso_type = (uint8_t)take(input, 1) };
    hdr.csum_start = (uint16_t)take(input, 1);
    hdr.csum_offset = (uint16_t)take(input, 1);
    hdr.gso_size = (uint16_t)take(input, 2);
    if (known)
        memcpy(data, head, known);
    for (uint32_t i = known; i < known + given; i++)
        data[i] = (uint8_t)take(input, 1);
    if (size > AIOKVM_NET_MAX_FRAME)
        size = AIOKVM_NET_MAX_FRAME;
    struct iovec iov[3], from = { data, size };
    struct net_frame frame = { .hdr = hdr };
    net_frame_set(&frame, iov + 1, private, &from, 1, 0);
    REQUIRE(net_enter(peer->end.net));
    enum net_result result = net_frame_check(&frame) ? net_send(&peer->end, &frame) : NET_TAKEN;
    net_leave(peer->end.net);
    return result;
}

/* Some calls, which have no time; what is ready goes on in the next. */
static inline void serve(struct aiokvm_net *net, uint32_t calls)
{
    while (calls-- && aiokvm_net_serve(net, 0) == 1)
        continue;
}

#endif
