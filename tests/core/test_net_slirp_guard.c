/* What of a guest's frames gets to libslirp, fragments, sums and merging: these need no libslirp. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

/* ---- sums and merging: these need no libslirp ---- */

static uint32_t slow_sum(const uint8_t *data, size_t size)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < size; i++)
        sum += i % 2 ? data[i] : (uint32_t)data[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

TEST(a_sum_is_that_of_rfc_1071)
{
    uint8_t data[300];
    uint64_t state = 1;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)random_below(&state, 256);
    for (size_t start = 0; start < 4; start++)
        for (size_t size = 0; size < 200; size++)
            CHECK_EQ(slirp_sum(data + start, size, 0), slow_sum(data + start, size));
}

TEST(segments_that_follow_each_other_become_one_frame)
{
    static struct slirp_merge merge;
    static uint8_t frame[2000], data[1460];
    memset(data, 'x', sizeof(data));
    struct virtio_net_hdr_v1 hdr;
    uint32_t seq = 1000;
    for (int i = 0; i < 4; i++, seq += 1000)
        CHECK(slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq, 5, ACK, data, 1000)));
    /* Another flow, another acknowledgement, a gap, a SYN, more than the first. */
    CHECK(!slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 81, GUEST, 1234, seq, 5, ACK, data, 1000)));
    CHECK(!slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq, 6, ACK, data, 1000)));
    CHECK(!slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq + 1, 5, ACK, data, 1000)));
    CHECK(!slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq, 5, SYN, data, 1000)));
    CHECK(!slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq, 5, ACK, data, 1001)));
    CHECK(slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq, 5, ACK | PSH, data, 300)));
    /* A shorter one is the last. */
    CHECK(!slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1234, seq + 300, 5, ACK, data, 300)));
    CHECK_EQ(merge.size, 54 + 4300);
    slirp_merge_finish(&merge, &hdr);
    CHECK_EQ(hdr.gso_type, VIRTIO_NET_HDR_GSO_TCPV4);
    CHECK_EQ(hdr.gso_size, 1000);
    CHECK_EQ(hdr.csum_start, 34);
    CHECK_EQ(hdr.hdr_len, 54);
    CHECK_EQ(net_load16(merge.data + 16), 4340);
    CHECK_EQ(slirp_sum(merge.data + 14, 20, 0), 0xffff);
    CHECK_EQ(merge.data[47], ACK | PSH);
    /* With the checksum filled in it is right. */
    uint8_t pseudo[4] = { 0, 6 };
    net_store16(pseudo + 2, 4320);
    net_store16(merge.data + 50, ~slirp_sum(merge.data + 34, 4320, 0));
    CHECK_EQ(slirp_sum(merge.data + 34, 4320, slirp_sum(pseudo, 4, slirp_sum(merge.data + 26, 8, 0))), 0xffff);
    /* It takes no more than IP can say. */
    merge.size = 0;
    uint32_t count = 0;
    for (seq = 1; slirp_merge_add(&merge, frame, tcp_frame(frame, HOST, 80, GUEST, 1, seq, 5, ACK, data, 1460));
         seq += 1460)
        count++;
    CHECK_EQ(count, 44);
    CHECK(merge.size <= 14 + 65535);
}

#define GUARD(frame, size) slirp_guard(&guard, &(struct slirp_load){ .now_ns = 1 }, &hdr, frame, size)

TEST(the_guard_knows_lengths_and_addresses)
{
    struct slirp_guard guard = { .host = HOST, .nameserver = NAMESERVER };
    struct virtio_net_hdr_v1 hdr = { 0 };
    uint8_t frame[200] = { 0 };
    uint32_t size = tcp_frame(frame, GUEST, 1, 0x08080808, 80, 1, 1, ACK, "data", 4);
    CHECK_EQ(GUARD(frame, size), SLIRP_PASS);
    /* A frame may have padding; it may not have less than it says. */
    CHECK_EQ(GUARD(frame, size + 10), SLIRP_PASS);
    for (uint32_t less = 14; less < size; less++)
        CHECK_EQ(GUARD(frame, less), SLIRP_INVALID);
    frame[46] = 0x40; /* the length of TCP's header */
    CHECK_EQ(GUARD(frame, size), SLIRP_INVALID);
    frame[46] = 0xf0;
    CHECK_EQ(GUARD(frame, size), SLIRP_INVALID);
    static const uint32_t DENIED[] = { 0x7f000001, 0x7fffffff, 0, 1, 0xe00000fb, 0xffffffff, 0xf0000000 };
    for (size_t i = 0; i < LENGTH(DENIED); i++) {
        size = tcp_frame(frame, GUEST, 1, DENIED[i], 80, 1, 1, ACK, NULL, 0);
        CHECK_EQ(GUARD(frame, size), SLIRP_DENY);
    }
    memset(frame + 34, 0, 20);
    net_store16(frame + 36, 67);
    net_store16(frame + 38, 8);
    size = seal(frame, 17, 0, 0xffffffff, 8);
    CHECK_EQ(GUARD(frame, size), SLIRP_PASS);
    net_store16(frame + 36, 69);
    size = seal(frame, 17, GUEST, HOST, 8);
    CHECK_EQ(GUARD(frame, size), SLIRP_UNSUPPORTED);
    /* An answer to one of the loopback is none to others, nor later. */
    put_udp(frame, HOST, 4000, GUEST, 53);
    slirp_guard_heard(&guard, frame, 42, 1);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 53, HOST, 4000)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 53, HOST, 4001)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 54, HOST, 4000)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST + 1, 53, HOST, 4000)), SLIRP_DENY);
    size = put_udp(frame, GUEST, 53, HOST, 4000);
    struct slirp_load later = { .now_ns = UINT64_C(240000000001) };
    CHECK_EQ(slirp_guard(&guard, &later, &hdr, frame, size), SLIRP_DENY);
    /* IPv6: ::1, ::, ::7f00:1, ::ffff:127.0.0.1, fe80::1, ff02::fb. */
    static const uint8_t DENIED6[][16] = {
        { [15] = 1 }, { 0 }, { [12] = 127, [15] = 1 }, { [10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1 },
        { 0xfe, 0x80, [15] = 1 }, { 0xff, 2, [15] = 0xfb },
    };
    for (size_t i = 0; i < LENGTH(DENIED6); i++)
        for (int udp = 0; udp < 2; udp++) {
            memset(frame, 0, sizeof(frame));
            net_store16(frame + 12, 0x86dd);
            frame[14] = 0x60;
            net_store16(frame + 18, 20);
            frame[20] = udp ? 17 : 6;
            memcpy(frame + 38, DENIED6[i], 16);
            frame[66] = 0x50;
            net_store16(frame + 58, 20);
            CHECK_EQ(GUARD(frame, 74), SLIRP_DENY);
            CHECK_EQ(GUARD(frame, 73), SLIRP_INVALID);
            frame[38] = 0x20;
            CHECK_EQ(GUARD(frame, 74), SLIRP_PASS);
        }
}

TEST(restriction_is_for_ipv6_too)
{
    struct slirp_guard guard = { .host = HOST, .prefix6 = { 0xfe, 0xc0 }, .prefix6_length = 64 };
    struct virtio_net_hdr_v1 hdr = { 0 };
    uint8_t frame[100];
    memcpy(guard.host6, HOST6, 16);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, OUTSIDE6, 80, SYN)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, OUTSIDE6, 80, 0)), SLIRP_PASS);
    guard.restricted = true;
    CHECK_EQ(GUARD(frame, frame6(frame, 17, OUTSIDE6, 80, 0)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, HOST6, 547, 0)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, OUTSIDE6, 80, SYN)), SLIRP_REFUSE);
    CHECK_EQ(frame[67], SYN | FIN);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, OUTSIDE6, 80, SYN | URG)), SLIRP_REFUSE);
    CHECK_EQ(frame[67], SYN | FIN);
    guard.host_loopback = true;
    CHECK_EQ(GUARD(frame, frame6(frame, 6, HOST6, 80, SYN)), SLIRP_REFUSE);
    CHECK_EQ(GUARD(frame, tcp_frame(frame, GUEST, 1, 0x08080808, 80, 1, 0, SYN, NULL, 0)), SLIRP_REFUSE);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 1, 0x08080808, 80)), SLIRP_DENY);
    /* Answers to what is forwarded. */
    CHECK_EQ(GUARD(frame, tcp_frame(frame, GUEST, 1, HOST, 80, 1, 1, SYN | ACK, NULL, 0)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, HOST6, 80, SYN | ACK)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, HOST6, 80, ACK)), SLIRP_PASS);
}

TEST(a_port_of_dhcp_is_one_at_the_router_alone)
{
    struct slirp_guard guard = {
        .host = HOST, .nameserver = NAMESERVER, .prefix6 = { 0xfe, 0xc0 }, .prefix6_length = 64,
    };
    memcpy(guard.host6, HOST6, 16);
    struct virtio_net_hdr_v1 hdr = { 0 };
    struct slirp_load full = { .other_full = true, .now_ns = 1 };
    uint8_t frame[100] = { 0 };
#define FULL(size) slirp_guard(&guard, &full, &hdr, frame, size)
    CHECK_EQ(FULL(put_udp(frame, GUEST, 68, HOST, 67)), SLIRP_PASS);
    CHECK_EQ(FULL(put_udp(frame, GUEST, 68, 0xffffffff, 67)), SLIRP_PASS);
    CHECK_EQ(FULL(put_udp(frame, GUEST, 68, 0x08080808, 67)), SLIRP_FULL);
    CHECK_EQ(FULL(put_udp(frame, GUEST, 68, SERVICE, 67)), SLIRP_FULL);
    CHECK_EQ(FULL(put_udp(frame, GUEST, 68, 0x7f000001, 67)), SLIRP_DENY);
    /* All DHCP servers; all nodes, which is ::1 to libslirp; all routers. */
    static const uint8_t SERVERS[16] = { 0xff, 2, [13] = 1, [15] = 2 }, NODES[16] = { 0xff, 2, [15] = 1 },
                         ROUTERS[16] = { 0xff, 2, [15] = 2 }, NEIGHBOUR[16] = { 0xfe, 0xc0, [15] = 9 };
    CHECK_EQ(FULL(frame6(frame, 17, SERVERS, 547, 0)), SLIRP_PASS);
    CHECK_EQ(FULL(frame6(frame, 17, HOST6, 547, 0)), SLIRP_PASS);
    CHECK_EQ(FULL(frame6(frame, 17, OUTSIDE6, 547, 0)), SLIRP_FULL);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, OUTSIDE6, 547, 0)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, SERVERS, 546, 0)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, NODES, 547, 0)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, ROUTERS, 547, 0)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, frame6(frame, 17, NEIGHBOUR, 547, 0)), SLIRP_DENY);
#undef FULL
}

TEST(the_guard_fills_checksums_in_and_takes_urgency_away)
{
    struct slirp_guard guard = { .host = HOST };
    uint8_t frame[200];
    uint32_t size = tcp_frame(frame, GUEST, 1, 0x08080808, 80, 1, 1, ACK | URG, "hello", 5);
    uint32_t right = net_load16(frame + 50);
    net_store16(frame + 52, 3);
    size = seal(frame, 6, GUEST, 0x08080808, 25);
    struct virtio_net_hdr_v1 hdr = { 0 };
    CHECK_EQ(GUARD(frame, size), SLIRP_PASS);
    CHECK_EQ(frame[47], ACK);
    CHECK_EQ(net_load16(frame + 52), 0);
    CHECK_EQ(net_load16(frame + 50), (uint32_t)(right + URG));
    /* The sum of the pseudo header is there, the rest is not. */
    uint8_t pseudo[4] = { 0, 6, 0, 25 };
    net_store16(frame + 50, slirp_sum(pseudo, 4, slirp_sum(frame + 26, 8, 0)));
    hdr = (struct virtio_net_hdr_v1){ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16 };
    CHECK_EQ(GUARD(frame, size), SLIRP_PASS);
    CHECK_EQ(net_load16(frame + 50), (uint32_t)(right + URG));
}

/* A fragment with `length` bytes of `data` at `offset`. */
static uint32_t fragment(uint8_t *frame, uint32_t id, const uint8_t *data, uint32_t offset, uint32_t length, bool more)
{
    memcpy(frame + 34, data + offset, length);
    uint32_t size = seal(frame, 47, GUEST, 0x08080808, length);
    memcpy(frame + 34, data + offset, length);
    net_store16(frame + 18, id);
    net_store16(frame + 20, offset / 8 | (more ? 0x2000 : 0));
    net_store16(frame + 24, 0);
    net_store16(frame + 24, ~slirp_sum(frame + 14, 20, 0));
    return size;
}

TEST(fragments_become_a_datagram)
{
    struct slirp_fragments fragments = { 0 };
    static uint8_t data[65536], frame[AIOKVM_NET_MAX_FRAME];
    uint64_t state = 5, now_ns = 1;
    bool is_invalid;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)random_below(&state, 256);
#define ADD(id, offset, length, more) \
    (fragment(frame, id, data, offset, length, more), slirp_fragments_add(&fragments, frame, now_ns, &is_invalid))
    /* Out of order, and among each other. */
    CHECK_EQ(ADD(1, 2960, 40, false), 0);
    CHECK_EQ(ADD(2, 0, 1480, true), 0);
    CHECK_EQ(ADD(1, 0, 1480, true), 0);
    CHECK_EQ(ADD(1, 1480, 1480, true), 34 + 3000);
    CHECK(!memcmp(frame + 34, data, 3000));
    CHECK_EQ(net_load16(frame + 16), 3020);
    CHECK_EQ(net_load16(frame + 20), 0);
    CHECK_EQ(slirp_sum(frame + 14, 20, 0), 0xffff);
    CHECK_EQ(ADD(2, 1480, 1, false), 34 + 1481);
    /* As large as can be, and larger. */
    for (uint32_t at = 0; at < 65480; at += 1480)
        CHECK_EQ(ADD(3, at, at + 1480 < 65480 ? 1480 : 65480 - at, true), 0);
    CHECK_EQ(ADD(3, 65480, 35, false), 14 + 65535);
    CHECK(!memcmp(frame + 34, data, 65515));
    CHECK_EQ(ADD(3, 65480, 36, false), 0);
    CHECK(is_invalid);
    CHECK_EQ(ADD(3, 65528, 8, true), 0);
    CHECK(is_invalid);
    /* Overlaps, two ends, no multiple of 8, pieces behind the end. */
    CHECK_EQ(ADD(4, 0, 80, true), 0);
    CHECK(!is_invalid);
    CHECK_EQ(ADD(4, 72, 8, false), 0);
    CHECK(is_invalid);
    CHECK_EQ(ADD(5, 80, 8, false), 0);
    CHECK_EQ(ADD(5, 88, 8, false), 0);
    CHECK(is_invalid);
    CHECK_EQ(ADD(6, 0, 9, true), 0);
    CHECK(is_invalid);
    CHECK_EQ(ADD(7, 800, 8, true), 0);
    CHECK_EQ(ADD(7, 8, 8, false), 0);
    CHECK(!is_invalid);
    CHECK_EQ(ADD(7, 0, 8, true), 0);
    CHECK(is_invalid);
    /* There is room for some, the oldest goes; and what is half a minute old. */
    for (uint32_t id = 100; id < 120; id++, now_ns++)
        CHECK_EQ(ADD(id, 0, 8, true), 0);
    CHECK_EQ(fragments.lost, 4);
    CHECK_EQ(ADD(119, 8, 8, false), 34 + 16);
    CHECK_EQ(ADD(100, 8, 8, false), 0);
    now_ns += UINT64_C(30000000000);
    CHECK_EQ(ADD(118, 8, 8, false), 0);
    CHECK(fragments.lost > 4);
    slirp_fragments_clear(&fragments);
#undef ADD
}

TEST(nobody_is_where_nobody_is)
{
    struct slirp_guard guard = {
        .network = 0x0a000200, .netmask = 0xffffff00, .host = HOST, .nameserver = NAMESERVER,
    };
    struct virtio_net_hdr_v1 hdr = { 0 };
    uint8_t frame[100] = { 0 };
    struct slirp_load service = { .is_service = true, .now_ns = 1 };
    CHECK_EQ(GUARD(frame, tcp_frame(frame, GUEST, 1, SERVICE, 80, 1, 0, SYN, NULL, 0)), SLIRP_REFUSE);
    uint32_t size = tcp_frame(frame, GUEST, 1, SERVICE, 80, 1, 0, SYN, NULL, 0);
    CHECK_EQ(slirp_guard(&guard, &service, &hdr, frame, size), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, tcp_frame(frame, GUEST, 1, SERVICE, 80, 1, 1, SYN | ACK, NULL, 0)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, tcp_frame(frame, GUEST, 1, NAMESERVER, 53, 1, 0, SYN, NULL, 0)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, tcp_frame(frame, GUEST, 1, 0x0a000300, 53, 1, 0, SYN, NULL, 0)), SLIRP_PASS);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 1, SERVICE, 80)), SLIRP_DENY);
    /* A service is one of TCP: to anything else nobody is there. */
    CHECK_EQ(slirp_guard(&guard, &service, &hdr, frame, put_udp(frame, GUEST, 1, SERVICE, 80)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 1, 0x0a0002ff, 80)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 1, NAMESERVER, 53)), SLIRP_PASS);
    memset(frame + 34, 0, 8);
    frame[34] = 8;
    CHECK_EQ(GUARD(frame, seal(frame, 1, GUEST, SERVICE, 8)), SLIRP_DENY);
    CHECK_EQ(slirp_guard(&guard, &service, &hdr, frame, seal(frame, 1, GUEST, SERVICE, 8)), SLIRP_DENY);
    CHECK_EQ(GUARD(frame, seal(frame, 1, GUEST, HOST, 8)), SLIRP_PASS);
    /* Who has come from there by a forwarded port is answered. */
    put_udp(frame, SERVICE, 4000, GUEST, 53);
    slirp_guard_heard(&guard, frame, 42, 1);
    CHECK_EQ(GUARD(frame, put_udp(frame, GUEST, 53, SERVICE, 4000)), SLIRP_PASS);
}

/* TCP's options at this place of the header, of which the checksum is right before and after. */
static uint32_t with_mss(uint8_t *frame, uint32_t at, uint32_t mss)
{
    uint8_t options[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    options[at] = 2;
    options[at + 1] = 4;
    net_store16(options + at + 2, mss);
    uint32_t size = tcp_frame(frame, GUEST, 1, 0x08080808, 80, 1, 0, SYN, options, 8);
    frame[46] = 0x70;
    return seal(frame, 6, GUEST, 0x08080808, size - 34);
}

TEST(segments_are_as_large_as_every_host_takes_them)
{
    struct slirp_guard guard = { .host = HOST };
    struct virtio_net_hdr_v1 hdr = { 0 };
    uint8_t frame[100] = { 0 };
    for (uint32_t at = 0; at <= 4; at++)
        for (uint32_t mss = 1; mss < 1460; mss += 91) {
            uint32_t size = with_mss(frame, at, mss);
            CHECK_EQ(GUARD(frame, size), SLIRP_PASS);
            CHECK_EQ(net_load16(frame + 56 + at), mss < 536 ? 536 : mss);
            uint8_t pseudo[4] = { 0, 6, 0, 28 };
            CHECK_EQ(slirp_sum(frame + 34, 28, slirp_sum(pseudo, 4, slirp_sum(frame + 26, 8, 0))), 0xffff);
        }
    /* Options that end too early, or not at all. */
    for (uint32_t length = 0; length < 8; length++) {
        uint32_t size = with_mss(frame, 4, 1);
        frame[59] = (uint8_t)length;
        CHECK_EQ(GUARD(frame, size), SLIRP_PASS);
        CHECK_EQ(net_load16(frame + 60), length == 4 ? 536 : 1);
    }
}
