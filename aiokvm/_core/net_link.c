/* The way of a frame from one end to its peer. */
#include "net_priv.h"

#include <string.h>

#include "clock.h"
#include "ratelimit.h"

/* How many switches a frame may cross. */
enum { MAX_HOPS = 8 };

static bool passes_filters(struct aiokvm_net_end *from, struct aiokvm_net_end *to, const struct net_frame *frame)
{
    if (!from->filter && !to->filter)
        return true;
    uint64_t now_ns = aiokvm_now_ns();
    return (!from->filter || net_filter_passes(from->filter, from, frame, true, now_ns)) &&
           (!to->filter || net_filter_passes(to->filter, to, frame, false, now_ns));
}

/* Takes what the frame comes to in the end: each segment that is to be cut is a frame with headers of its own. Returns
 * how long to wait, in ns. */
static uint64_t take(struct aiokvm_ratelimit *limit, uint64_t now_ns, const struct net_frame *frame)
{
    const struct virtio_net_hdr_v1 *hdr = &frame->hdr;
    uint64_t frames = 1;
    if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE && hdr->gso_size && hdr->hdr_len < frame->size)
        frames = (frame->size - hdr->hdr_len + hdr->gso_size - 1u) / hdr->gso_size;
    return aiokvm_ratelimit_take(limit, now_ns, frame->size + (frames - 1) * hdr->hdr_len, frames);
}

/* How long to wait, in ns. */
static uint64_t passes_limits(struct aiokvm_net_end *from, struct aiokvm_net_end *to, struct net_frame *frame,
                              uint64_t now_ns)
{
    uint64_t wait_ns;
    uint32_t *passed = &frame->progress.passed;
    if (from->sent_limit && !(*passed & NET_PASSED_SENT_LIMIT)) {
        if ((wait_ns = take(from->sent_limit, now_ns, frame)))
            return wait_ns;
        *passed |= NET_PASSED_SENT_LIMIT;
    }
    if (to->received_limit && !(*passed & NET_PASSED_RECEIVED_LIMIT)) {
        if ((wait_ns = take(to->received_limit, now_ns, frame)))
            return wait_ns;
        *passed |= NET_PASSED_RECEIVED_LIMIT;
    }
    return 0;
}

static enum net_result drop(uint64_t *count)
{
    (*count)++;
    return NET_TAKEN;
}

enum net_result net_send(struct aiokvm_net_end *from, struct net_frame *frame)
{
    struct aiokvm_net_end *to = from->peer;
    if (!to || !from->up || !to->up)
        return drop(&from->stats.dropped_down);
    if (frame->hops > MAX_HOPS)
        return drop(&from->stats.dropped_invalid);
    struct net_progress *progress = &frame->progress;
    if (progress->link != from->link)
        *progress = (struct net_progress){ .link = from->link };
    net_spend(from->net, NET_COST_FRAME);
    if (!(progress->passed & NET_PASSED_FILTERS)) {
        if (!passes_filters(from, to, frame))
            return drop(&from->stats.dropped_filtered);
        progress->passed |= NET_PASSED_FILTERS;
    }
    if (from->sent_limit || to->received_limit) {
        uint64_t now_ns = aiokvm_now_ns(), wait_ns = passes_limits(from, to, frame, now_ns);
        if (wait_ns) {
            from->stats.throttled++;
            from->waits = true;
            net_throttle(from, now_ns + wait_ns);
            return NET_BLOCKED;
        }
    }
    if ((from->capture || to->capture) && !(progress->passed & NET_PASSED_CAPTURES)) {
        if (from->capture)
            net_capture_record(from->capture, from, frame, true);
        if (to->capture)
            net_capture_record(to->capture, to, frame, false);
        progress->passed |= NET_PASSED_CAPTURES;
        net_spend(from->net, frame->size);
    }
    bool whole = !(net_frame_needs(frame) & ~to->offloads);
    if (!whole && !net_offload_fits(frame))
        return drop(&from->stats.dropped_invalid);
    enum net_result result = whole ? to->type->receive(to, frame) : net_offload_send(to, frame);
    if (result == NET_BLOCKED) {
        from->waits = true;
        return result;
    }
    net_spend(from->net, frame->size);
    if (from->wake != from->net->wake) {
        from->wake = from->net->wake;
        from->batch = 0;
    }
    from->net->work += NET_COST_FRAME + frame->size;
    if (++from->batch > from->net->batch)
        from->net->batch = from->batch;
    from->stats.sent_frames++;
    from->stats.sent_bytes += frame->size;
    to->stats.received_frames++;
    to->stats.received_bytes += frame->size;
    return result;
}

void net_frame_set(struct net_frame *frame, struct iovec *iov, uint8_t head[NET_HEAD], const struct iovec *from,
                   uint32_t count, size_t skip)
{
    size_t size = 0, filled = 0;
    frame->iov = iov;
    frame->count = 1;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *base = from[i].iov_base;
        size_t length = from[i].iov_len;
        if (skip >= length) {
            skip -= length;
            continue;
        }
        base += skip;
        length -= skip;
        skip = 0;
        size += length;
        size_t private = NET_HEAD - filled < length ? NET_HEAD - filled : length;
        memcpy(head + filled, base, private);
        filled += private;
        if (length > private)
            iov[frame->count++] = (struct iovec){ base + private, length - private };
    }
    iov[0] = (struct iovec){ head, filled };
    frame->size = size > AIOKVM_NET_MAX_FRAME ? AIOKVM_NET_MAX_FRAME + 1 : (uint32_t)size;
}

void net_frame_copy(const struct net_frame *frame, uint8_t *to)
{
    for (uint32_t i = 0; i < frame->count; i++) {
        memcpy(to, frame->iov[i].iov_base, frame->iov[i].iov_len);
        to += frame->iov[i].iov_len;
    }
}

/* How much of the frame there is to be looked at, and written to in a copy: not more though iov[0] may have all of it. */
static size_t held_bytes(const struct net_frame *frame)
{
    return frame->iov[0].iov_len < NET_HEAD ? frame->iov[0].iov_len : NET_HEAD;
}

/* How long the transport header at csum_start is, 0 if that cannot be; it is in the private part. */
static size_t transport_header(const struct net_frame *frame, uint8_t gso_type)
{
    size_t start = frame->hdr.csum_start, held = held_bytes(frame);
    if (gso_type == VIRTIO_NET_HDR_GSO_UDP_L4)
        return start + 8 <= held && frame->hdr.csum_offset == 6 ? 8 : 0;
    if (start + 20 > held || frame->hdr.csum_offset != 16)
        return 0;
    size_t length = (size_t)(((const uint8_t *)frame->iov[0].iov_base)[start + 12] >> 4) * 4;
    return length >= 20 && start + length <= held ? length : 0;
}

bool net_frame_check(struct net_frame *frame)
{
    struct virtio_net_hdr_v1 *hdr = &frame->hdr;
    if (frame->size < AIOKVM_NET_MIN_FRAME || frame->size > AIOKVM_NET_MAX_FRAME)
        return false;
    hdr->flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID;
    uint8_t gso_type = hdr->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)) {
        hdr->csum_start = hdr->csum_offset = hdr->hdr_len = hdr->gso_size = 0;
        return hdr->gso_type == VIRTIO_NET_HDR_GSO_NONE;
    }
    hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    if (hdr->csum_start < AIOKVM_NET_MIN_FRAME || hdr->csum_start + hdr->csum_offset + 2u > held_bytes(frame))
        return false;
    if (gso_type == VIRTIO_NET_HDR_GSO_NONE) {
        hdr->gso_size = hdr->hdr_len = 0;
        return hdr->gso_type == VIRTIO_NET_HDR_GSO_NONE;
    }
    if (gso_type != VIRTIO_NET_HDR_GSO_TCPV4 && gso_type != VIRTIO_NET_HDR_GSO_TCPV6 &&
        gso_type != VIRTIO_NET_HDR_GSO_UDP_L4)
        return false;
    size_t length = transport_header(frame, gso_type);
    if (!length || !hdr->gso_size || hdr->csum_start + length >= frame->size)
        return false;
    hdr->hdr_len = (uint16_t)(hdr->csum_start + length);
    return true;
}
