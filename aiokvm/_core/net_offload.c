/* Checksums and segmentation for ends that do not take frames without: what the driver of a guest, or the kernel of
 * the host, has left to the adapter. virtio 1.2, 5.1.6.2. */
#include "net_priv.h"

#include <linux/if_ether.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "net_checksum.h"
#include "net_packet.h"

/* Offsets in TCP's header, RFC 9293, section 3.1. */
enum { TCP_SEQ = 4, TCP_FLAGS = 13, TCP_FIN = 1, TCP_PSH = 8, TCP_CWR = 0x80 };
enum { UDP_LENGTH = 4 };

struct net_offload {
    uint8_t piece[AIOKVM_NET_MAX_FRAME];
};

uint32_t net_frame_needs(const struct net_frame *frame)
{
    uint32_t needs = frame->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM ? AIOKVM_NET_OFFLOAD_CSUM : 0;
    uint8_t gso_type = frame->hdr.gso_type;
    if (gso_type == VIRTIO_NET_HDR_GSO_NONE)
        return needs;
    if (gso_type & VIRTIO_NET_HDR_GSO_ECN)
        needs |= AIOKVM_NET_OFFLOAD_ECN;
    switch (gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return needs | AIOKVM_NET_OFFLOAD_TSO4;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return needs | AIOKVM_NET_OFFLOAD_TSO6;
    default:
        return needs | AIOKVM_NET_OFFLOAD_USO;
    }
}

/* A checksum of 0 says "none" in UDP (RFC 768); for all others 0xffff is the same number. */
static uint16_t finish(const struct net_sum *sum)
{
    uint16_t checksum = (uint16_t)~net_sum_fold(sum);
    return checksum ? checksum : 0xffff;
}

/* ---- only the checksum ---- */

static uint16_t frame_checksum(const struct net_frame *frame)
{
    struct net_sum sum = { 0 };
    size_t skip = frame->hdr.csum_start;
    for (uint32_t i = 0; i < frame->count; i++) {
        size_t length = frame->iov[i].iov_len, skipped = skip < length ? skip : length;
        net_sum_add(&sum, (const uint8_t *)frame->iov[i].iov_base + skipped, length - skipped);
        skip -= skipped;
    }
    return finish(&sum);
}

/* The field is filled in in a copy of the head: if the frame has to wait, it waits as it was. */
static enum net_result send_with_checksum(struct aiokvm_net_end *to, struct net_frame *frame)
{
    uint8_t head[NET_HEAD];
    struct iovec *iov = frame->iov, first = iov[0], parts[3];
    struct virtio_net_hdr_v1 hdr = frame->hdr;
    uint32_t count = frame->count;
    uint16_t checksum = frame_checksum(frame);
    net_spend(to->net, frame->size);
    size_t private = first.iov_len < NET_HEAD ? first.iov_len : NET_HEAD;
    memcpy(head, first.iov_base, private);
    memcpy(head + hdr.csum_start + hdr.csum_offset, &checksum, sizeof(checksum));
    if (first.iov_len > private) {
        /* It holds all. */
        parts[1] = (struct iovec){ head, private };
        parts[2] = (struct iovec){ (uint8_t *)first.iov_base + private, first.iov_len - private };
        frame->iov = parts + 1;
        frame->count = 2;
    } else {
        iov[0].iov_base = head;
    }
    frame->hdr.flags = 0;
    frame->hdr.csum_start = frame->hdr.csum_offset = 0;
    enum net_result result = to->type->receive(to, frame);
    frame->iov = iov;
    frame->count = count;
    frame->hdr = hdr;
    iov[0] = first;
    return result;
}

/* ---- cutting ---- */

struct cut {
    struct net_packet packet;
    uint32_t header; /* link, network and transport: what all pieces have */
    uint32_t pieces;
    bool is_tcp;
    bool partial; /* the receiver does the checksum */
};

static bool prepare(struct cut *cut, const struct net_frame *frame)
{
    const struct virtio_net_hdr_v1 *hdr = &frame->hdr;
    struct net_packet *packet = &cut->packet;
    uint8_t gso_type = hdr->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
    cut->is_tcp = gso_type != VIRTIO_NET_HDR_GSO_UDP_L4;
    cut->header = hdr->hdr_len;
    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || gso_type == VIRTIO_NET_HDR_GSO_NONE)
        return false;
    net_packet_parse(packet, frame);
    if (!packet->has_transport || packet->fragment != NET_FRAGMENT_NONE || packet->transport != hdr->csum_start ||
        packet->protocol != (cut->is_tcp ? IPPROTO_TCP : IPPROTO_UDP) || cut->header > packet->held)
        return false;
    if (cut->is_tcp && packet->ethertype != (gso_type == VIRTIO_NET_HDR_GSO_TCPV4 ? ETH_P_IP : ETH_P_IPV6))
        return false;
    cut->pieces = (frame->size - cut->header + hdr->gso_size - 1) / hdr->gso_size;
    return true;
}

bool net_offload_fits(const struct net_frame *frame)
{
    struct cut cut;
    return frame->hdr.gso_type == VIRTIO_NET_HDR_GSO_NONE || prepare(&cut, frame);
}

/* The headers of piece `index`, which has `payload` bytes. The transport's checksum is left as the sum of the
 * pseudo-header: what the sender has put there, with the length of the piece instead of the whole. */
static void write_headers(const struct cut *cut, const struct net_frame *frame, uint8_t *piece, uint32_t index,
                          uint32_t payload)
{
    const struct virtio_net_hdr_v1 *hdr = &frame->hdr;
    uint8_t *network = piece + cut->packet.network, *transport = piece + hdr->csum_start;
    uint32_t size = cut->header + payload, length = size - hdr->csum_start;
    memcpy(piece, cut->packet.head, cut->header);
    if (cut->packet.ethertype == ETH_P_IP) {
        struct net_sum sum = { 0 };
        net_store16(network + 2, size - cut->packet.network);
        net_store16(network + 4, cut->packet.fragment_id + index);
        memset(network + 10, 0, 2);
        net_sum_add(&sum, network, hdr->csum_start - cut->packet.network);
        uint16_t checksum = (uint16_t)~net_sum_fold(&sum);
        memcpy(network + 10, &checksum, sizeof(checksum));
    } else {
        net_store16(network + 4, size - cut->packet.network - 40);
    }
    if (cut->is_tcp) {
        net_store32(transport + TCP_SEQ, net_load32(transport + TCP_SEQ) + index * hdr->gso_size);
        if (index)
            transport[TCP_FLAGS] &= (uint8_t)~TCP_CWR;
        if (index + 1 < cut->pieces)
            transport[TCP_FLAGS] &= (uint8_t)~(TCP_FIN | TCP_PSH);
    } else {
        net_store16(transport + UDP_LENGTH, length);
    }
    struct net_sum sum = { 0 };
    uint32_t whole = frame->size - hdr->csum_start;
    net_sum_add(&sum, transport + hdr->csum_offset, 2);
    /* As 16 bits each, since a frame with headers may be longer than 65,535 bytes. */
    net_sum_add16(&sum, (uint16_t)~(whole & 0xffff));
    net_sum_add16(&sum, (uint16_t)~(whole >> 16));
    net_sum_add16(&sum, (uint16_t)length);
    net_sum_add16(&sum, (uint16_t)(length >> 16));
    uint16_t pseudo = net_sum_fold(&sum);
    memcpy(transport + hdr->csum_offset, &pseudo, sizeof(pseudo));
}

/* Where in a frame's memory the next byte is. */
struct cursor {
    const struct iovec *iov;
    size_t at;
};

static void move(struct cursor *cursor, uint32_t size, uint8_t *to, struct net_sum *sum)
{
    while (size) {
        size_t left = cursor->iov->iov_len - cursor->at, part = left < size ? left : size;
        const uint8_t *from = (const uint8_t *)cursor->iov->iov_base + cursor->at;
        if (sum)
            net_sum_copy(sum, to, from, part);
        else if (to)
            memcpy(to, from, part);
        if (to)
            to += part;
        size -= (uint32_t)part;
        cursor->at += part;
        if (cursor->at == cursor->iov->iov_len) {
            cursor->iov++;
            cursor->at = 0;
        }
    }
}

static enum net_result send_piece(struct aiokvm_net_end *to, const struct cut *cut, const struct net_frame *frame,
                                  struct cursor *cursor, uint32_t index)
{
    const struct virtio_net_hdr_v1 *hdr = &frame->hdr;
    uint8_t *piece = to->net->offload->piece;
    uint32_t left = frame->size - cut->header - index * hdr->gso_size;
    uint32_t payload = left < hdr->gso_size ? left : hdr->gso_size;
    write_headers(cut, frame, piece, index, payload);
    struct iovec iov[2] = { [1] = { piece, cut->header + payload } };
    struct net_frame part = {
        .iov = iov + 1, .count = 1, .size = cut->header + payload, .hops = frame->hops, .queue = frame->queue,
    };
    if (cut->partial) {
        part.hdr = (struct virtio_net_hdr_v1){
            .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = hdr->csum_start, .csum_offset = hdr->csum_offset,
        };
        move(cursor, payload, piece + cut->header, NULL);
    } else {
        struct net_sum sum = { 0 };
        net_sum_add(&sum, piece + hdr->csum_start, cut->header - hdr->csum_start);
        move(cursor, payload, piece + cut->header, &sum);
        uint16_t checksum = finish(&sum);
        memcpy(piece + hdr->csum_start + hdr->csum_offset, &checksum, sizeof(checksum));
    }
    net_spend(to->net, NET_COST_FRAME + payload);
    return to->type->receive(to, &part);
}

static enum net_result send_in_pieces(struct aiokvm_net_end *to, struct net_frame *frame)
{
    struct cut cut;
    if (!prepare(&cut, frame))
        return NET_TAKEN;
    if (!to->net->offload && !(to->net->offload = malloc(sizeof(*to->net->offload)))) {
        to->stats.dropped_full++;
        return NET_TAKEN;
    }
    cut.partial = to->offloads & AIOKVM_NET_OFFLOAD_CSUM;
    struct cursor cursor = { .iov = frame->iov };
    uint32_t *done = &frame->progress.done;
    move(&cursor, cut.header + *done * frame->hdr.gso_size, NULL, NULL);
    /* At least one at a time. */
    for (uint32_t first = *done; *done < cut.pieces; (*done)++) {
        if (to->net->is_over && *done > first) {
            net_yield(to->peer);
            return NET_BLOCKED;
        }
        if (send_piece(to, &cut, frame, &cursor, *done) == NET_BLOCKED)
            return NET_BLOCKED;
    }
    to->peer->stats.segmented++;
    return NET_TAKEN;
}

enum net_result net_offload_send(struct aiokvm_net_end *to, struct net_frame *frame)
{
    uint32_t missing = net_frame_needs(frame) & ~to->offloads;
    if (!(missing & ~(uint32_t)AIOKVM_NET_OFFLOAD_CSUM))
        return send_with_checksum(to, frame);
    return send_in_pieces(to, frame);
}

void net_offload_free(struct net_offload *offload)
{
    free(offload);
}
