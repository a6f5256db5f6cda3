/* Checksums and segmentation, against a model that reads the pieces byte by byte. */
#include <poll.h>
#include <string.h>

#include "check.h"
#include "net_fake.h"

enum { CSUM = AIOKVM_NET_OFFLOAD_CSUM, TSO4 = AIOKVM_NET_OFFLOAD_TSO4, TSO6 = AIOKVM_NET_OFFLOAD_TSO6,
       USO = AIOKVM_NET_OFFLOAD_USO, ECN = AIOKVM_NET_OFFLOAD_ECN, ALL = CSUM | TSO4 | TSO6 | USO | ECN };
enum { FIN = 1, PSH = 8, CWR = 0x80 };

struct sample {
    struct virtio_net_hdr_v1 hdr;
    bool ipv6, tcp;
    uint32_t network, transport, header, size;
    uint8_t data[AIOKVM_NET_MAX_FRAME];
};

static uint32_t load(const uint8_t *at, int bytes)
{
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++)
        value = value << 8 | at[i];
    return value;
}

static void store(uint8_t *at, uint32_t value, int bytes)
{
    for (int i = bytes; i-- > 0; value >>= 8)
        at[i] = (uint8_t)value;
}

/* RFC 1071, as it is written there. */
static uint32_t sum(const uint8_t *data, uint32_t size, uint32_t start)
{
    for (uint32_t i = 0; i < size; i++)
        start += i & 1 ? data[i] : (uint32_t)data[i] << 8;
    while (start >> 16)
        start = (start & 0xffff) + (start >> 16);
    return start;
}

static uint32_t pseudo(const struct sample *sample, const uint8_t *data, uint32_t size)
{
    uint32_t addresses = sample->ipv6 ? 8 : 12;
    uint32_t start = sum(data + sample->network + addresses, sample->ipv6 ? 32 : 8, 0);
    return sum(NULL, 0, start + (sample->tcp ? 6 : 17) + size - sample->transport);
}

static void make(struct sample *sample, uint64_t *random, uint32_t payload, uint32_t gso_size)
{
    uint8_t *data = sample->data;
    memset(sample, 0, sizeof(*sample));
    sample->ipv6 = random_below(random, 2);
    sample->tcp = random_below(random, 2);
    uint32_t at = 12;
    for (uint32_t tags = random_below(random, 3); tags; tags--, at += 4)
        store(data + at, tags == 2 ? 0x88a80001 : 0x81000002, 4);
    store(data + at, sample->ipv6 ? 0x86dd : 0x800, 2);
    uint8_t *network = data + (sample->network = at + 2);
    uint8_t protocol = sample->tcp ? 6 : 17;
    if (sample->ipv6) {
        uint32_t extensions = random_below(random, 3);
        network[0] = 0x60;
        network[6] = extensions ? 60 : protocol;
        network[7] = 64;
        at = sample->network + 40;
        for (; extensions; extensions--, at += 8)
            data[at] = extensions > 1 ? 60 : protocol;
        for (int i = 8; i < 40; i++)
            network[i] = (uint8_t)random_below(random, 256);
    } else {
        uint32_t words = 5 + random_below(random, 11);
        network[0] = (uint8_t)(0x40 | words);
        store(network + 4, random_below(random, 0x10000), 2);
        network[8] = 64;
        network[9] = protocol;
        for (int i = 12; i < 20; i++)
            network[i] = (uint8_t)random_below(random, 256);
        at = sample->network + words * 4;
    }
    sample->transport = at;
    uint8_t *transport = data + at;
    uint32_t length = 8;
    for (int i = 0; i < 8; i++)
        transport[i] = (uint8_t)random_below(random, 256);
    if (sample->tcp) {
        length = 20 + random_below(random, 11) * 4;
        transport[12] = (uint8_t)(length / 4 << 4);
        transport[13] = (uint8_t)random_below(random, 256);
    }
    sample->header = at + length;
    sample->size = sample->header + payload;
    for (uint32_t i = sample->header; i < sample->size; i++)
        data[i] = (uint8_t)random_below(random, 256);
    store(network + (sample->ipv6 ? 4 : 2), sample->size - sample->network - (sample->ipv6 ? 40 : 0), 2);
    if (!sample->ipv6)
        store(network + 10, 0xffff ^ sum(network, sample->transport - sample->network, 0), 2);
    if (!sample->tcp)
        store(transport + 4, sample->size - sample->transport, 2);
    sample->hdr = (struct virtio_net_hdr_v1){
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = (uint16_t)at, .csum_offset = sample->tcp ? 16 : 6,
    };
    store(transport + sample->hdr.csum_offset, pseudo(sample, data, sample->size), 2);
    if (!gso_size)
        return;
    sample->hdr.gso_size = (uint16_t)gso_size;
    sample->hdr.hdr_len = (uint16_t)sample->header;
    sample->hdr.gso_type = !sample->tcp ? VIRTIO_NET_HDR_GSO_UDP_L4 :
                           sample->ipv6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4;
    if (sample->tcp && transport[13] & CWR)
        sample->hdr.gso_type |= VIRTIO_NET_HDR_GSO_ECN;
}

/* The transport's checksum of a piece is right, or will be when somebody has filled it in. */
static void check_checksum(const struct sample *sample, const struct fake_frame *piece)
{
    const uint8_t *field = piece->data + sample->transport + sample->hdr.csum_offset;
    if (piece->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        CHECK_EQ(piece->hdr.csum_start, sample->transport);
        CHECK_EQ(load(field, 2) % 0xffff, pseudo(sample, piece->data, piece->size) % 0xffff);
        return;
    }
    CHECK(load(field, 2));
    uint32_t start = pseudo(sample, piece->data, piece->size);
    CHECK_EQ(sum(piece->data + sample->transport, piece->size - sample->transport, start), 0xffff);
}

static void check_piece(const struct sample *sample, const struct fake_frame *piece, uint32_t index, uint32_t count)
{
    const uint8_t *network = piece->data + sample->network, *transport = piece->data + sample->transport;
    const uint8_t *original = sample->data + sample->transport;
    CHECK(!memcmp(piece->data, sample->data, sample->network));
    if (sample->ipv6) {
        CHECK_EQ(load(network + 4, 2), piece->size - sample->network - 40);
        CHECK(!memcmp(network + 6, sample->data + sample->network + 6, sample->transport - sample->network - 6));
    } else {
        CHECK_EQ(load(network + 2, 2), piece->size - sample->network);
        CHECK_EQ(load(network + 4, 2), (load(sample->data + sample->network + 4, 2) + index) & 0xffff);
        CHECK_EQ(sum(network, sample->transport - sample->network, 0), 0xffff);
    }
    if (sample->tcp) {
        uint32_t flags = original[13] & (index ? 0xff & ~CWR : 0xff) & (index + 1 < count ? 0xff & ~(FIN | PSH) : 0xff);
        CHECK_EQ(transport[13], flags);
        CHECK_EQ(load(transport + 4, 4), (uint32_t)(load(original + 4, 4) + index * sample->hdr.gso_size));
    } else {
        CHECK_EQ(load(transport + 4, 2), piece->size - sample->transport);
    }
    check_checksum(sample, piece);
}

static uint32_t needs(const struct sample *sample)
{
    uint8_t gso_type = sample->hdr.gso_type & 0x7f;
    return CSUM | (gso_type == 1 ? TSO4 : gso_type == 4 ? TSO6 : gso_type == 5 ? USO : 0) |
           (sample->hdr.gso_type & 0x80 ? ECN : 0);
}

static void check_received(const struct sample *sample, const struct fake_end *receiver)
{
    uint32_t missing = needs(sample) & ~receiver->end.offloads;
    if (!(missing & ~(uint32_t)CSUM)) {
        CHECK_EQ(receiver->kept, 1);
        const struct fake_frame *whole = &receiver->frames[0];
        CHECK_EQ(whole->size, sample->size);
        CHECK_EQ(whole->hdr.gso_type, sample->hdr.gso_type);
        CHECK_EQ(whole->hdr.gso_size, sample->hdr.gso_size);
        CHECK_EQ(whole->hdr.flags, missing ? 0 : VIRTIO_NET_HDR_F_NEEDS_CSUM);
        check_checksum(sample, whole);
        CHECK(!memcmp(whole->data + sample->header, sample->data + sample->header, sample->size - sample->header));
        return;
    }
    uint32_t payload = 0, count = receiver->kept;
    CHECK_EQ(count, (sample->size - sample->header + sample->hdr.gso_size - 1) / sample->hdr.gso_size);
    for (uint32_t i = 0; i < count; i++) {
        const struct fake_frame *piece = &receiver->frames[i];
        check_piece(sample, piece, i, count);
        uint32_t part = piece->size - sample->header;
        CHECK(i + 1 < count ? part == sample->hdr.gso_size : part <= sample->hdr.gso_size);
        CHECK_EQ(piece->hdr.gso_type, VIRTIO_NET_HDR_GSO_NONE);
        CHECK_EQ(piece->hdr.flags, receiver->end.offloads & CSUM ? VIRTIO_NET_HDR_F_NEEDS_CSUM : 0);
        CHECK(!memcmp(piece->data + sample->header, sample->data + sample->header + payload, part));
        payload += part;
    }
    CHECK_EQ(payload, sample->size - sample->header);
}

static struct aiokvm_net *pair(struct fake_end *ends[2])
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    CHECK(net);
    for (int i = 0; i < 2; i++)
        ends[i] = fake_end_new(net, 0);
    CHECK_EQ(aiokvm_net_link(&ends[0]->end, &ends[1]->end), 0);
    return net;
}

/* In as many pieces of memory as there is room for, split anywhere. */
static enum net_result send(struct fake_end *from, const struct sample *sample, uint64_t *random, struct net_progress *progress)
{
    struct iovec parts[8], iov[LENGTH(parts) + 2];
    uint8_t head[NET_HEAD];
    uint32_t count = 0, at = 0;
    for (; count + 1 < LENGTH(parts); count++) {
        uint32_t part = random_below(random, sample->size - at + 1);
        parts[count] = (struct iovec){ (void *)(uintptr_t)(sample->data + at), part };
        at += part;
    }
    parts[count++] = (struct iovec){ (void *)(uintptr_t)(sample->data + at), sample->size - at };
    struct net_frame frame = { .hdr = sample->hdr, .progress = *progress };
    net_frame_set(&frame, iov + 1, head, parts, count, 0);
    CHECK(net_frame_check(&frame));
    CHECK_EQ(frame.hdr.hdr_len, sample->hdr.hdr_len);
    CHECK(net_enter(from->end.net));
    enum net_result result = net_send(&from->end, &frame);
    net_leave(from->end.net);
    *progress = frame.progress;
    CHECK(!memcmp(&frame.hdr, &sample->hdr, sizeof(frame.hdr)));
    CHECK(frame.iov == iov + 1 && frame.iov[0].iov_base == head);
    return result;
}

/* To a receiver that takes all: if the time is over, in the next turn. */
static void send_all(struct fake_end *from, const struct sample *sample, uint64_t *random)
{
    struct net_progress progress = { 0 };
    while (send(from, sample, random, &progress) == NET_BLOCKED)
        CHECK(from->end.yields);
}

static struct sample sample;

TEST(what_a_receiver_does_not_take_is_done_for_it)
{
    struct fake_end *ends[2];
    struct aiokvm_net *net = pair(ends);
    uint64_t random = 20;
    for (int i = 0; i < 4000; i++) {
        uint32_t gso_size = random_below(&random, 4) ? 1 + random_below(&random, 1600) : 0;
        uint32_t most = gso_size ? gso_size * 100 : 9000;
        make(&sample, &random, 1 + random_below(&random, most < 64000 ? most : 64000), gso_size);
        ends[1]->end.offloads = random_below(&random, ALL + 1);
        send_all(ends[0], &sample, &random);
        check_received(&sample, ends[1]);
        fake_end_clear(ends[1]);
    }
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(&ends[0]->end, &stats);
    CHECK_EQ(stats.sent_frames, 4000);
    CHECK(stats.segmented > 1000);
    aiokvm_net_free(net);
}

TEST(pieces_go_on_where_they_were_blocked)
{
    struct fake_end *ends[2];
    struct aiokvm_net *net = pair(ends);
    uint64_t random = 21;
    for (int i = 0; i < 200; i++) {
        struct net_progress progress = { 0 };
        make(&sample, &random, 20000, 1000);
        ends[1]->most = 1 + random_below(&random, 19);
        while (send(ends[0], &sample, &random, &progress) == NET_BLOCKED && progress.done < ends[1]->most)
            continue;
        CHECK_EQ(progress.done, ends[1]->most);
        ends[0]->resumed = false;
        ends[1]->most = 0;
        fake_end_unblock(ends[1]);
        CHECK(ends[0]->resumed);
        while (send(ends[0], &sample, &random, &progress) == NET_BLOCKED)
            continue;
        check_received(&sample, ends[1]);
        fake_end_clear(ends[1]);
        ends[0]->resumed = false;
    }
    aiokvm_net_free(net);
}

TEST(a_thousand_tiny_pieces_let_others_have_their_turn)
{
    struct fake_end *ends[2];
    struct aiokvm_net *net = pair(ends);
    uint64_t random = 22;
    struct net_progress progress = { 0 };
    uint32_t turns = 0;
    make(&sample, &random, 60000, 1);
    while (send(ends[0], &sample, &random, &progress) == NET_BLOCKED) {
        CHECK_EQ(ends[1]->received, progress.done);
        CHECK(progress.done > 0);
        turns++;
        struct pollfd fd = { .fd = aiokvm_net_fd(net), .events = POLLIN };
        CHECK_EQ(poll(&fd, 1, PATIENCE_S * 1000), 1);
        fake_end_serve(net);
        CHECK(ends[0]->resumed);
        ends[0]->resumed = false;
    }
    CHECK_EQ(ends[1]->received, 60000);
    CHECK(turns > 3);
    aiokvm_net_free(net);
}

TEST(a_frame_that_was_cut_in_part_is_whole_for_another_peer)
{
    struct fake_end *ends[2];
    struct aiokvm_net *net = pair(ends);
    struct fake_end *other = fake_end_new(net, 0);
    uint64_t random = 25;
    struct net_progress progress = { 0 };
    make(&sample, &random, 20000, 1000);
    ends[1]->most = 7;
    CHECK_EQ(send(ends[0], &sample, &random, &progress), NET_BLOCKED);
    CHECK_EQ(progress.done, 7);
    aiokvm_net_unlink(&ends[0]->end);
    CHECK_EQ(aiokvm_net_link(&ends[0]->end, &other->end), 0);
    while (send(ends[0], &sample, &random, &progress) == NET_BLOCKED)
        continue;
    CHECK_EQ(other->received, 20);
    check_received(&sample, other);
    aiokvm_net_free(net);
}

TEST(frames_that_wait_in_one_piece_are_left_as_they_are)
{
    struct fake_end *ends[2];
    struct aiokvm_net *net = pair(ends);
    uint64_t random = 23;
    struct net_queue queue;
    net_queue_init(&queue, 8, 1 << 20, fake_share());
    make(&sample, &random, 1000, 0);
    uint8_t head[NET_HEAD];
    struct iovec iov[3], from = { sample.data, sample.size };
    struct net_frame frame = { .hdr = sample.hdr };
    net_frame_set(&frame, iov + 1, head, &from, 1, 0);
    CHECK(net_enter(net));
    CHECK(net_queue_put(&queue, &frame));
    ends[1]->blocks = true;
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 1), NET_BLOCKED);
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 1), NET_BLOCKED);
    ends[1]->blocks = false;
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 1), NET_TAKEN);
    net_leave(net);
    check_received(&sample, ends[1]);
    aiokvm_net_free(net);
}

TEST(headers_that_lie_are_not_cut_by)
{
    struct fake_end *ends[2];
    struct aiokvm_net *net = pair(ends);
    uint64_t random = 24;
    for (uint32_t lie = 0; lie < 5; lie++) {
        do
            make(&sample, &random, 5000, 1000);
        while (sample.ipv6 || !sample.tcp);
        uint8_t *network = sample.data + sample.network;
        switch (lie) {
        case 0: network[0] ^= 1; break;           /* the length of the header */
        case 1: network[0] ^= 0x20; break;        /* the version */
        case 2: network[9] = 17; break;           /* not TCP */
        case 3: network[6] = 0x20; break;         /* a fragment */
        default: sample.hdr.gso_type = VIRTIO_NET_HDR_GSO_TCPV6; break;
        }
        send_all(ends[0], &sample, &random);
        CHECK_EQ(ends[1]->received, 0);
        struct aiokvm_net_stats stats;
        aiokvm_net_end_stats(&ends[0]->end, &stats);
        CHECK_EQ(stats.dropped_invalid, lie + 1);
        CHECK_EQ(stats.sent_frames, 0);
    }
    aiokvm_net_free(net);
}
