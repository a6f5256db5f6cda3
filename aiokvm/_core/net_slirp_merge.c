/* Segments of one TCP flow become one frame, which a guest with TSO takes at once. libslirp sends what it has for a
 * connection one after the other, in segments of the guest's MSS without options. */
#include "net_slirp_priv.h"

#include <string.h>

#include "net_packet.h"

enum {
    ETH_SIZE = 14, IP_SIZE = 20, IP6_SIZE = 40, TCP_SIZE = 20,
    TCP_PSH = 0x08, TCP_ACK = 0x10,
    /* Less is not worth it, and no flood of merged bytes: it would be copied once more. */
    MIN_PAYLOAD = 256,
    MAX_IP = 65535,
};

/* The length of the headers of a segment that can be merged, of which `payload` bytes are data; 0 if it cannot be. */
static uint32_t parse(const uint8_t *frame, size_t size, uint32_t *payload)
{
    const uint8_t *ip = frame + ETH_SIZE;
    uint32_t headers, length;
    if (size >= ETH_SIZE + IP_SIZE + TCP_SIZE && net_load16(frame + 12) == 0x0800 && ip[0] == 0x45 && ip[9] == 6 &&
        !(net_load16(ip + 6) & 0x3fff)) {
        headers = ETH_SIZE + IP_SIZE + TCP_SIZE;
        length = net_load16(ip + 2) + ETH_SIZE;
    } else if (size >= ETH_SIZE + IP6_SIZE + TCP_SIZE && net_load16(frame + 12) == 0x86dd && ip[6] == 6) {
        headers = ETH_SIZE + IP6_SIZE + TCP_SIZE;
        length = net_load16(ip + 4) + ETH_SIZE + IP6_SIZE;
    } else {
        return 0;
    }
    const uint8_t *tcp = frame + headers - TCP_SIZE;
    if (length != size || tcp[12] != 0x50 || (tcp[13] & ~TCP_PSH) != TCP_ACK || size - headers < MIN_PAYLOAD)
        return 0;
    *payload = (uint32_t)size - headers;
    return headers;
}

/* All but lengths, IP's identification, checksums, sequence number and PSH is the same. */
static bool is_next(const struct slirp_merge *merge, const uint8_t *frame, uint32_t headers, uint32_t payload)
{
    const uint8_t *ip = frame + ETH_SIZE, *tcp = frame + headers - TCP_SIZE;
    const uint8_t *our_ip = merge->data + ETH_SIZE, *our_tcp = merge->data + headers - TCP_SIZE;
    if (merge->is_last || headers != merge->headers || payload > merge->payload ||
        merge->size + payload > ETH_SIZE + MAX_IP || net_load32(tcp + 4) != merge->next)
        return false;
    if (memcmp(frame, merge->data, ETH_SIZE) || memcmp(tcp, our_tcp, 4) || memcmp(tcp + 8, our_tcp + 8, 5) ||
        memcmp(tcp + 14, our_tcp + 14, 2))
        return false;
    if (headers == ETH_SIZE + IP_SIZE + TCP_SIZE)
        return ip[1] == our_ip[1] && ip[8] == our_ip[8] && !memcmp(ip + 12, our_ip + 12, 8);
    return !memcmp(ip, our_ip, 4) && !memcmp(ip + 6, our_ip + 6, IP6_SIZE - 6);
}

bool slirp_merge_add(struct slirp_merge *merge, const uint8_t *frame, size_t size)
{
    uint32_t payload, headers = parse(frame, size, &payload);
    if (!headers)
        return false;
    const uint8_t *tcp = frame + headers - TCP_SIZE;
    if (!merge->size) {
        memcpy(merge->data, frame, size);
        merge->size = (uint32_t)size;
        merge->segments = 1;
        merge->headers = headers;
        merge->payload = payload;
        merge->next = net_load32(tcp + 4) + payload;
        merge->is_last = tcp[13] & TCP_PSH;
        return true;
    }
    if (!is_next(merge, frame, headers, payload))
        return false;
    memcpy(merge->data + merge->size, frame + headers, payload);
    merge->size += payload;
    merge->segments++;
    merge->next += payload;
    merge->is_last = payload < merge->payload || tcp[13] & TCP_PSH;
    merge->data[headers - TCP_SIZE + 13] |= tcp[13] & TCP_PSH;
    return true;
}

void slirp_merge_finish(struct slirp_merge *merge, struct virtio_net_hdr_v1 *hdr)
{
    *hdr = (struct virtio_net_hdr_v1){ 0 };
    if (merge->segments < 2)
        return;
    uint8_t *ip = merge->data + ETH_SIZE, *tcp = merge->data + merge->headers - TCP_SIZE;
    uint32_t length = merge->size - ETH_SIZE, addresses;
    if (merge->headers == ETH_SIZE + IP_SIZE + TCP_SIZE) {
        net_store16(ip + 2, length);
        net_store16(ip + 10, 0);
        net_store16(ip + 10, ~slirp_sum(ip, IP_SIZE, 0));
        addresses = slirp_sum(ip + 12, 8, 0);
        length -= IP_SIZE;
        hdr->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
    } else {
        length -= IP6_SIZE;
        net_store16(ip + 4, length);
        addresses = slirp_sum(ip + 8, 32, 0);
        hdr->gso_type = VIRTIO_NET_HDR_GSO_TCPV6;
    }
    /* Of the pseudo header: the rest is the receiver's, or the plane's. */
    uint8_t pseudo[4] = { 0, 6 };
    net_store16(pseudo + 2, length);
    net_store16(tcp + 16, slirp_sum(pseudo, sizeof(pseudo), addresses));
    hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    hdr->csum_start = (uint16_t)(merge->headers - TCP_SIZE);
    hdr->csum_offset = 16;
    hdr->hdr_len = (uint16_t)merge->headers;
    hdr->gso_size = (uint16_t)merge->payload;
}
