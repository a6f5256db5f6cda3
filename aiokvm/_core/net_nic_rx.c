/* What a guest receives: which frames, by which queue, into which buffers. */
#include "net_nic_priv.h"

#include <string.h>

/* Chains for one frame: 64 KiB in buffers for an MTU of 1500 each are 44; a driver could have each be long to walk. */
enum { MAX_CHAINS = 128 };
enum { ETH_HEADER = 14, VLAN_TAG = 4, VLAN_ID = 0xfff };
enum { ETHERTYPE_IPV4 = 0x0800, ETHERTYPE_VLAN = 0x8100, ETHERTYPE_QINQ = 0x88a8, ETHERTYPE_IPV6 = 0x86dd };

/* Of the private part of a frame. */
static uint16_t be16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)be16(at) << 16 | be16(at + 2);
}

static uint16_t ethertype(const struct net_frame *frame, size_t *at)
{
    const uint8_t *data = frame->iov[0].iov_base;
    uint16_t type = be16(data + 12);
    *at = ETH_HEADER;
    for (int tags = 0; tags < 2 && (type == ETHERTYPE_VLAN || type == ETHERTYPE_QINQ); tags++) {
        if (*at + VLAN_TAG > frame->iov[0].iov_len)
            break;
        type = be16(data + *at + 2);
        *at += VLAN_TAG;
    }
    return type;
}

/* ---- the driver's filter ---- */

/* What was said to be the MTU is kept to (5.1.4.1), but what is to be cut may be longer. */
static bool is_too_long(const struct nic_state *state, const struct net_frame *frame)
{
    if (!state->mtu || frame->size <= ETH_HEADER + state->mtu ||
        (frame->hdr.gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN) != VIRTIO_NET_HDR_GSO_NONE)
        return false;
    size_t header;
    ethertype(frame, &header);
    return frame->size > header + state->mtu;
}

static bool has_mac(const struct aiokvm_net_nic_filter *filter, const uint8_t *mac)
{
    for (uint32_t i = 0; i < filter->macs; i++)
        if (!memcmp(filter->mac[i], mac, 6))
            return true;
    return false;
}

static bool passes(const struct aiokvm_net_nic_filter *filter, const struct net_frame *frame)
{
    static const uint8_t BROADCAST[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
    const uint8_t *data = frame->iov[0].iov_base;
    if (filter->flags & AIOKVM_NET_NIC_VLAN_FILTER && be16(data + 12) == ETHERTYPE_VLAN &&
        frame->size >= ETH_HEADER + VLAN_TAG) {
        uint32_t vlan = be16(data + ETH_HEADER) & VLAN_ID;
        if (!(filter->vlans[vlan / 32] >> vlan % 32 & 1))
            return false;
    }
    if (!(filter->flags & AIOKVM_NET_NIC_MAC_FILTER))
        return true;
    if (filter->flags & (data[0] & 1 ? AIOKVM_NET_NIC_ALLMULTI : AIOKVM_NET_NIC_ALLUNI))
        return true;
    return !memcmp(data, BROADCAST, 6) || has_mac(filter, data);
}

/* ---- the choice of a queue ---- */

static uint32_t mix(uint32_t hash)
{
    hash ^= hash >> 16;
    hash *= 0x7feb352d;
    hash ^= hash >> 15;
    hash *= 0x846ca68b;
    return hash ^ hash >> 16;
}

/* Of addresses and ports, the same for both directions; fragments of a datagram have no ports. */
static uint32_t flow_hash(const struct net_frame *frame)
{
    const uint8_t *data = frame->iov[0].iov_base;
    size_t held = frame->iov[0].iov_len, at;
    uint32_t type = ethertype(frame, &at), protocol = 0, hash = 0;
    if (type == ETHERTYPE_IPV4 && at + 20 <= held) {
        hash = be32(data + at + 12) ^ be32(data + at + 16);
        protocol = be16(data + at + 6) & 0x3fff ? 0 : data[at + 9];
        at += (size_t)(data[at] & 15) * 4;
    } else if (type == ETHERTYPE_IPV6 && at + 40 <= held) {
        for (size_t i = 8; i < 40; i += 4)
            hash ^= be32(data + at + i);
        protocol = data[at + 6];
        at += 40;
    } else {
        for (size_t i = 0; i < 6; i += 2)
            hash = hash * 31 + (uint32_t)(be16(data + i) ^ be16(data + 6 + i));
    }
    if ((protocol == 6 || protocol == 17) && at + 4 <= held)
        hash ^= (uint32_t)(be16(data + at) ^ be16(data + at + 2));
    return mix(hash + protocol);
}

void nic_steer(struct nic *nic, const struct net_frame *frame, uint32_t pair)
{
    nic->state.flows[flow_hash(frame) % NIC_FLOWS] = (uint8_t)(pair + 1);
}

static struct nic_queue *choose_queue(struct nic *nic, const struct net_frame *frame)
{
    struct nic_state *state = &nic->state;
    uint32_t pair = 0;
    if (state->pairs > 1) {
        uint32_t hash = flow_hash(frame);
        uint8_t known = state->flows[hash % NIC_FLOWS];
        pair = known && known <= state->pairs ? known - 1u : hash % state->pairs;
    }
    struct nic_queue *queue = state->queues[2 * pair];
    /* The driver need not set all of them up. */
    return queue ? queue : state->queues[0];
}

/* ---- buffers ---- */

static struct aiokvm_chain *stashed(const struct nic_queue *queue, uint32_t at)
{
    return queue->stash[(queue->first + at) % AIOKVM_VRING_MAX_SIZE];
}

/* One more chain is in the stash: 1. There is none: 0, and the driver will notify. Below 0: the queue is broken. */
static int stash_chain(struct nic *nic, struct nic_queue *queue)
{
    struct aiokvm_chain *chain;
    int result = aiokvm_vring_pop(queue->vring, &chain);
    if (!result && !nic_polls(nic, queue) && aiokvm_vring_enable_notify(queue->vring)) {
        aiokvm_vring_disable_notify(queue->vring);
        result = aiokvm_vring_pop(queue->vring, &chain);
    }
    if (result <= 0)
        return result;
    if (chain->readable || chain->writable_bytes < NIC_HDR_SIZE) {
        aiokvm_vring_drop(queue->vring, chain);
        return AIOKVM_NET_NIC_EHEADER;
    }
    queue->stash[(queue->first + queue->count++) % AIOKVM_VRING_MAX_SIZE] = chain;
    return 1;
}

/* A place in the first chains of the stash. */
struct sink {
    const struct nic_queue *queue;
    uint32_t chain, iov;
    size_t offset;
};

/* There is room. */
static void put(struct sink *sink, const void *data, size_t size)
{
    while (size) {
        const struct aiokvm_chain *chain = stashed(sink->queue, sink->chain);
        const struct iovec *iov = &chain->iov[sink->iov];
        size_t room = iov->iov_len - sink->offset, part = room < size ? room : size;
        /* Two adapters of one guest may be linked, and what they send and receive be the same memory. */
        memmove((uint8_t *)iov->iov_base + sink->offset, data, part);
        data = (const uint8_t *)data + part;
        size -= part;
        sink->offset += part;
        if (part < room)
            return;
        sink->offset = 0;
        if (++sink->iov == chain->writable) {
            sink->iov = 0;
            sink->chain++;
        }
    }
}

/* Into the first `chains` of the stash, where there is room. */
static void fill(struct nic *nic, struct nic_queue *queue, const struct net_frame *frame, uint32_t chains)
{
    struct virtio_net_hdr_v1 hdr = { 0 };
    if (nic->end.offloads & AIOKVM_NET_OFFLOAD_CSUM)
        hdr = frame->hdr;
    hdr.num_buffers = (uint16_t)chains;
    struct sink sink = { .queue = queue };
    put(&sink, &hdr, sizeof(hdr));
    for (uint32_t i = 0; i < frame->count; i++)
        put(&sink, frame->iov[i].iov_base, frame->iov[i].iov_len);
    uint64_t left = NIC_HDR_SIZE + frame->size;
    for (; chains; chains--) {
        struct aiokvm_chain *chain = stashed(queue, 0);
        uint64_t written = left < chain->writable_bytes ? left : chain->writable_bytes;
        queue->first = (queue->first + 1) % AIOKVM_VRING_MAX_SIZE;
        queue->count--;
        aiokvm_vring_push(queue->vring, chain, (uint32_t)written);
        left -= written;
    }
    queue->is_dirty = true;
    net_dirty(&nic->end);
}

static enum net_result drop(uint64_t *count)
{
    (*count)++;
    return NET_TAKEN;
}

enum net_result nic_receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct nic *nic = (struct nic *)end;
    struct nic_state *state = &nic->state;
    if (state->filter.flags && !passes(&state->filter, frame))
        return drop(&end->stats.dropped_filtered);
    if (is_too_long(state, frame))
        return drop(&end->stats.dropped_invalid);
    struct nic_queue *queue = choose_queue(nic, frame);
    /* No driver: it is as if there was no cable. */
    if (!queue || state->is_broken)
        return drop(&end->stats.dropped_full);
    uint64_t need = NIC_HDR_SIZE + frame->size, room = 0;
    uint32_t chains = 0, most = !state->is_mergeable ? 1 : queue->size < MAX_CHAINS ? queue->size : MAX_CHAINS;
    while (room < need && chains < most) {
        if (chains == queue->count) {
            int result = stash_chain(nic, queue);
            if (result < 0) {
                nic_break(nic, queue, result);
                return drop(&end->stats.dropped_full);
            }
            if (!result) {
                queue->is_starved = true;
                return NET_BLOCKED;
            }
        }
        const struct aiokvm_chain *chain = stashed(queue, chains++);
        room += chain->writable_bytes;
        net_spend(end->net, chain->writable * NIC_COST_PIECE);
    }
    /* All buffers that a driver can have given are too few: waiting for more would last for ever. */
    if (room < need)
        return drop(&end->stats.dropped_full);
    fill(nic, queue, frame, chains);
    return NET_TAKEN;
}
