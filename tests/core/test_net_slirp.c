/* User-mode NAT: a guest that is a few frames. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "net_fake.h"
#include "net_packet.h"
#include "net_slirp_priv.h"

#define GUEST 0x0a00020fu
#define HOST 0x0a000202u
#define NAMESERVER 0x0a000203u
#define SERVICE 0x0a000264u

enum { SYN = 2, RST = 4, PSH = 8, ACK = 16, URG = 32, FIN = 1 };

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

/* An IPv4 header at frame + 14, and what is behind it has its checksum. */
static uint32_t seal(uint8_t *frame, uint32_t protocol, uint32_t from, uint32_t to, uint32_t payload)
{
    static const uint8_t ETHERNET[14] = { 0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 0 };
    memcpy(frame, ETHERNET, 14);
    uint8_t *ip = frame + 14, *body = ip + 20;
    memset(ip, 0, 20);
    ip[0] = 0x45;
    net_store16(ip + 2, 20 + payload);
    ip[8] = 64;
    ip[9] = (uint8_t)protocol;
    net_store32(ip + 12, from);
    net_store32(ip + 16, to);
    net_store16(ip + 10, ~slirp_sum(ip, 20, 0));
    uint8_t pseudo[4] = { 0, (uint8_t)protocol };
    net_store16(pseudo + 2, payload);
    uint32_t at = protocol == 6 ? 16 : protocol == 17 ? 6 : 2;
    net_store16(body + at, 0);
    uint32_t sum = protocol == 1 ? 0 : slirp_sum(pseudo, 4, slirp_sum(ip + 12, 8, 0));
    net_store16(body + at, ~slirp_sum(body, payload, sum));
    return 34 + payload;
}

static uint32_t tcp_frame(uint8_t *frame, uint32_t from, uint32_t from_port, uint32_t to, uint32_t to_port,
                          uint32_t seq, uint32_t ack, uint32_t flags, const void *data, uint32_t size)
{
    uint8_t *tcp = frame + 34;
    memset(tcp, 0, 20);
    net_store16(tcp, from_port);
    net_store16(tcp + 2, to_port);
    net_store32(tcp + 4, seq);
    net_store32(tcp + 8, ack);
    tcp[12] = 0x50;
    tcp[13] = (uint8_t)flags;
    net_store16(tcp + 14, 60000);
    if (size)
        memcpy(tcp + 20, data, size);
    return seal(frame, 6, from, to, 20 + size);
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

static uint32_t put_udp(uint8_t *frame, uint32_t from, uint32_t from_port, uint32_t to, uint32_t to_port)
{
    net_store16(frame + 34, from_port);
    net_store16(frame + 36, to_port);
    net_store16(frame + 38, 8);
    return seal(frame, 17, from, to, 8);
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
    CHECK_EQ(GUARD(frame, size), SLIRP_IGNORE);
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

/* A header without payload but its own, and no checksum: the guard asks for none. */
static uint32_t frame6(uint8_t *frame, uint32_t protocol, const uint8_t *to, uint32_t port, uint32_t flags)
{
    static const uint8_t FROM[16] = { 0xfe, 0xc0, [15] = 0x56 };
    uint32_t rest = protocol == 6 ? 20 : 8;
    memset(frame, 0, 54 + rest);
    net_store16(frame + 12, 0x86dd);
    frame[14] = 0x60;
    net_store16(frame + 18, rest);
    frame[20] = (uint8_t)protocol;
    memcpy(frame + 22, FROM, 16);
    memcpy(frame + 38, to, 16);
    net_store16(frame + 54, 5000);
    net_store16(frame + 56, port);
    if (protocol == 6) {
        frame[66] = 0x50;
        frame[67] = (uint8_t)flags;
    } else {
        net_store16(frame + 58, 8);
    }
    return 54 + rest;
}

static const uint8_t OUTSIDE6[16] = { 0x20, 1, [15] = 1 }, HOST6[16] = { 0xfe, 0xc0, [15] = 2 };

TEST(restriction_is_for_ipv6_too)
{
    struct slirp_guard guard = { .host = HOST, .prefix6 = { 0xfe, 0xc0 }, .prefix6_length = 64 };
    struct virtio_net_hdr_v1 hdr = { 0 };
    uint8_t frame[100];
    memcpy(guard.host6, HOST6, 16);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, OUTSIDE6, 80, SYN)), SLIRP_PASS);
    guard.restricted = true;
    CHECK_EQ(GUARD(frame, frame6(frame, 6, OUTSIDE6, 80, SYN)), SLIRP_REFUSE);
    CHECK_EQ(frame[67], SYN | FIN);
    CHECK_EQ(GUARD(frame, frame6(frame, 6, OUTSIDE6, 80, SYN | URG)), SLIRP_REFUSE);
    CHECK_EQ(frame[67], SYN | FIN);
    guard.host_loopback = true;
    CHECK_EQ(GUARD(frame, frame6(frame, 6, HOST6, 80, SYN)), SLIRP_REFUSE);
    /* Answers to what is forwarded. */
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
    CHECK_EQ(ADD(119, 8, 8, false), 34 + 16);
    CHECK_EQ(ADD(100, 8, 8, false), 0);
    now_ns += UINT64_C(30000000000);
    CHECK_EQ(ADD(118, 8, 8, false), 0);
    slirp_fragments_clear(&fragments);
#undef ADD
}

#ifdef AIOKVM_HAVE_SLIRP

/* ---- a guest ---- */

struct nat {
    struct aiokvm_net *net;
    struct aiokvm_net_end *slirp;
    struct fake_end *guest;
};

static struct aiokvm_net_slirp_config config(void)
{
    static const char *search[] = { "example", "example.org", NULL };
    return (struct aiokvm_net_slirp_config){
        .network = 0x0a000200, .netmask = 0xffffff00, .host = HOST, .dhcp_start = GUEST, .nameserver = NAMESERVER,
        .prefix6 = { 0xfe, 0xc0 }, .prefix6_length = 64, .host6 = { 0xfe, 0xc0, [15] = 2 },
        .nameserver6 = { 0xfe, 0xc0, [15] = 3 }, .mtu = 1500, .max_connections = 64, .hostname = "guest",
        .domain = "example", .search = search,
    };
}

static struct nat nat_with(const struct aiokvm_net_slirp_config *config, uint32_t offloads)
{
    struct nat nat;
    int error = 0;
    nat.net = aiokvm_net_new(NULL, &error);
    CHECK(nat.net);
    nat.slirp = aiokvm_net_slirp_new(nat.net, config, &error);
    CHECK_EQ(error, 0);
    CHECK(nat.slirp);
    nat.guest = fake_end_new(nat.net, offloads);
    CHECK_EQ(aiokvm_net_link(nat.slirp, &nat.guest->end), 0);
    return nat;
}

static struct nat nat_new(void)
{
    struct aiokvm_net_slirp_config plain = config();
    return nat_with(&plain, 0);
}

static struct aiokvm_net_stats stats(struct aiokvm_net_end *end)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(end, &stats);
    return stats;
}

static void say(struct nat *nat, const uint8_t *frame, uint32_t size)
{
    CHECK_EQ(fake_end_send(nat->guest, NULL, frame, size), NET_TAKEN);
}

/* Waits for a frame, which stays until the next call. */
static const struct fake_frame *hear(struct nat *nat)
{
    uint64_t until_ns = now_ns() + PATIENCE_S * UINT64_C(1000000000);
    for (;;) {
        fake_end_serve(nat->net);
        if (nat->guest->kept)
            return &nat->guest->frames[0];
        CHECK(now_ns() < until_ns);
        poll(&(struct pollfd){ .fd = aiokvm_net_fd(nat->net), .events = POLLIN }, 1, 100);
    }
}

static void heard(struct nat *nat)
{
    struct fake_end *guest = nat->guest;
    free(guest->frames[0].data);
    memmove(guest->frames, guest->frames + 1, --guest->kept * sizeof(*guest->frames));
}

/* So that libslirp knows where the guest is. */
static void greet(struct nat *nat)
{
    uint8_t arp[42] = {
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1,
        0x52, 0x54, 0, 0x12, 0x34, 0x56,
    };
    net_store32(arp + 28, GUEST);
    net_store32(arp + 38, HOST);
    say(nat, arp, sizeof(arp));
    const struct fake_frame *answer = hear(nat);
    CHECK_EQ(net_load16(answer->data + 12), 0x0806);
    CHECK_EQ(net_load16(answer->data + 20), 2);
    CHECK_EQ(net_load32(answer->data + 28), HOST);
    heard(nat);
}

/* The next frame of TCP that is for this port of the guest. */
static const struct fake_frame *hear_tcp(struct nat *nat, uint32_t port)
{
    for (;;) {
        const struct fake_frame *frame = hear(nat);
        if (net_load16(frame->data + 12) == 0x0800 && frame->data[23] == 6 && net_load16(frame->data + 36) == port)
            return frame;
        heard(nat);
    }
}

TEST(a_guest_gets_its_address_by_dhcp)
{
    struct nat nat = nat_new();
    static uint8_t frame[600];
    uint8_t *dhcp = frame + 42;
    net_store16(frame + 34, 68);
    net_store16(frame + 36, 67);
    net_store16(frame + 38, 8 + 300);
    static const uint8_t START[] = { 1, 1, 6, 0, 1, 2, 3, 4 };
    memcpy(dhcp, START, sizeof(START));
    static const uint8_t MAC[] = { 0x52, 0x54, 0, 0x12, 0x34, 0x56 };
    memcpy(dhcp + 28, MAC, 6);
    static const uint8_t OPTIONS[] = { 0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255 };
    memcpy(dhcp + 236, OPTIONS, sizeof(OPTIONS));
    say(&nat, frame, seal(frame, 17, 0, 0xffffffff, 308));
    const struct fake_frame *offer = hear(&nat);
    CHECK_EQ(net_load16(offer->data + 36), 68);
    CHECK_EQ(net_load32(offer->data + 42 + 16), GUEST);
    CHECK(memmem(offer->data, offer->size, "guest", 5));
    CHECK(memmem(offer->data, offer->size, "example", 7));
    aiokvm_net_free(nat.net);
}

TEST(the_router_answers_a_ping)
{
    struct nat nat = nat_new();
    greet(&nat);
    uint8_t frame[100] = { 0 };
    frame[34] = 8;
    memcpy(frame + 42, "ping", 4);
    say(&nat, frame, seal(frame, 1, GUEST, HOST, 12));
    const struct fake_frame *answer = hear(&nat);
    CHECK_EQ(answer->data[34], 0);
    CHECK(!memcmp(answer->data + 42, "ping", 4));
    aiokvm_net_free(nat.net);
}

TEST(a_router_advertisement_answers_a_solicitation)
{
    struct nat nat = nat_new();
    uint8_t frame[62] = { 0x33, 0x33, 0, 0, 0, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x86, 0xdd, 0x60 };
    net_store16(frame + 18, 8);
    frame[20] = 58;
    frame[21] = 255;
    static const uint8_t FROM[16] = { 0xfe, 0x80, [15] = 0x56 }, TO[16] = { 0xff, 2, [15] = 2 };
    memcpy(frame + 22, FROM, 16);
    memcpy(frame + 38, TO, 16);
    frame[54] = 133;
    uint8_t pseudo[4] = { 0, 58, 0, 8 };
    net_store16(frame + 56, ~slirp_sum(frame + 54, 8, slirp_sum(pseudo, 4, slirp_sum(frame + 22, 32, 0))));
    say(&nat, frame, sizeof(frame));
    const struct fake_frame *answer = hear(&nat);
    CHECK_EQ(net_load16(answer->data + 12), 0x86dd);
    CHECK_EQ(answer->data[54], 134);
    aiokvm_net_free(nat.net);
}

/* ---- services ---- */

/* libslirp forgets to free the path of a service that is removed. */
__attribute__((weak)) void __lsan_disable(void);
__attribute__((weak)) void __lsan_enable(void);

static char directory[64], path[80];

static void make_path(void)
{
    strcpy(directory, "/tmp/test_net_slirp.XXXXXX");
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/service", directory);
}

static void remove_path(void)
{
    unlink(path);
    rmdir(directory);
}

/* A connection of the guest's: gives the sequence number of the other side that comes next. */
static uint32_t open_connection(struct nat *nat, uint32_t port, uint32_t to, uint32_t to_port)
{
    uint8_t frame[100];
    say(nat, frame, tcp_frame(frame, GUEST, port, to, to_port, 1000, 0, SYN, NULL, 0));
    const struct fake_frame *answer = hear_tcp(nat, port);
    CHECK_EQ(answer->data[47], SYN | ACK);
    CHECK_EQ(net_load32(answer->data + 42), 1001);
    uint32_t next = net_load32(answer->data + 38) + 1;
    heard(nat);
    say(nat, frame, tcp_frame(frame, GUEST, port, to, to_port, 1001, next, ACK, NULL, 0));
    return next;
}

TEST(a_connection_to_a_service_is_a_stream)
{
    make_path();
    struct nat nat = nat_new();
    struct aiokvm_net_slirp_connection connection;
    if (__lsan_disable)
        __lsan_disable();
    int service = aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8);
    if (__lsan_enable)
        __lsan_enable();
    CHECK(service > 0);
    CHECK_EQ(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8), -EADDRINUSE);
    CHECK_EQ(aiokvm_net_slirp_add_service(nat.slirp, 0x08080808, 80, "/nowhere/else", 8), -ENOENT);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(nat.net, &news), 1);
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_READABLE);
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    CHECK_EQ(connection.address, GUEST);
    CHECK_EQ(connection.port, 5000);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);

    uint8_t frame[200];
    char buffer[100];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK | PSH, "hello", 5));
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), 5);
    CHECK(!memcmp(buffer, "hello", 5));
    CHECK_EQ(write(fd, "good day", 8), 8);
    for (;;) {
        const struct fake_frame *answer = hear_tcp(&nat, 5000);
        if (answer->size >= 62 && net_load16(answer->data + 16) == 48) {
            CHECK(!memcmp(answer->data + 54, "good day", 8));
            break;
        }
        heard(&nat);
    }
    fake_end_clear(nat.guest);
    /* Its end is one for the guest. */
    close(fd);
    for (;;) {
        const struct fake_frame *answer = hear_tcp(&nat, 5000);
        bool ended = answer->data[47] & FIN;
        heard(&nat);
        if (ended)
            break;
    }
    CHECK_EQ(aiokvm_net_slirp_remove_service(nat.slirp, (uint32_t)service), 0);
    CHECK_EQ(aiokvm_net_slirp_remove_service(nat.slirp, (uint32_t)service), -ENOENT);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -ENOENT);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(connections_that_nobody_accepts_are_bounded)
{
    make_path();
    struct aiokvm_net_slirp_config many = config();
    many.max_connections = 300;
    struct nat nat = nat_with(&many, 0);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    /* More than the backlog of the socket has: libslirp waits for a connection to be made. */
    for (uint32_t port = 5000; port < 5200; port++)
        open_connection(&nat, port, SERVICE, 80);
    CHECK_EQ(stats(nat.slirp).dropped_full, 190);
    struct aiokvm_net_slirp_connection connection;
    for (uint32_t port = 5000; port < 5010; port++) {
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(fd >= 0);
        CHECK_EQ(connection.port, port);
        close(fd);
    }
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    /* Waiting ones go with the end. */
    open_connection(&nat, 6000, SERVICE, 80);
    aiokvm_net_free(nat.net);
    remove_path();
}

static void limit_descriptors(rlim_t limit)
{
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    limits.rlim_cur = limit;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limits), 0);
}

TEST(without_descriptors_a_connection_waits)
{
    make_path();
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    /* libslirp gets the last one. */
    int last = dup(0);
    close(last);
    limit_descriptors((rlim_t)last + 1);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    limit_descriptors(limits.rlim_cur);
    uint8_t frame[100];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK, "x", 1));
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* Without the guest's last word of a handshake; see open_connection. */
static uint32_t begin_connection(struct nat *nat, uint32_t port, uint32_t seq)
{
    uint8_t frame[100];
    say(nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, seq, 0, SYN, NULL, 0));
    const struct fake_frame *answer = hear_tcp(nat, port);
    CHECK_EQ(answer->data[47], SYN | ACK);
    uint32_t next = net_load32(answer->data + 38) + 1;
    heard(nat);
    return next;
}

TEST(without_descriptors_who_waits_keeps_its_name)
{
    make_path();
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    uint32_t next[2] = { begin_connection(&nat, 5000, 1000), begin_connection(&nat, 5001, 1000) };
    int last = dup(0);
    close(last);
    limit_descriptors((rlim_t)last + 1);
    uint8_t frame[100];
    struct aiokvm_net_slirp_connection connection;
    for (uint32_t i = 0; i < 2; i++)
        say(&nat, frame, tcp_frame(frame, GUEST, 5000 + i, SERVICE, 80, 1001, next[i], ACK, NULL, 0));
    /* That of others, too. */
    say(&nat, frame, put_udp(frame, GUEST, 7000, HOST, 67));
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    limit_descriptors(limits.rlim_cur);
    for (uint32_t i = 0; i < 2; i++) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5001, SERVICE, 80, 1001, next[1], ACK, NULL, 0));
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(fd >= 0);
        CHECK_EQ(connection.port, 5000 + i);
        close(fd);
    }
    aiokvm_net_free(nat.net);
    remove_path();
}

/* How many libslirp has in this state. */
static uint32_t connections(struct nat *nat, const char *state)
{
    char *text = slirp_connection_info(((struct slirp_end *)nat->slirp)->slirp);
    uint32_t count = 0;
    for (const char *at = text; (at = strstr(at, state)); at++)
        count++;
    free(text);
    return count;
}

TEST(connections_to_a_service_that_are_begun_alone_are_bounded)
{
    make_path();
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    struct slirp_begun *begun = &slirp->begun;
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint8_t frame[100];
    for (uint32_t port = 1; port <= 1000; port++) {
        /* Twice, as if the answer was lost. */
        for (int i = 0; i < 2; i++)
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1000, 0, SYN, NULL, 0));
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(begun->count, SLIRP_CONNECTING);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING);
    CHECK_EQ(stats(nat.slirp).dropped_full, 2 * (1000 - SLIRP_CONNECTING));
    /* The guest gives one up, in a way that libslirp does not believe: both do all the same. */
    say(&nat, frame, tcp_frame(frame, GUEST, 7, SERVICE, 80, 0x70000000, 0, RST, NULL, 0));
    CHECK_EQ(begun->count, SLIRP_CONNECTING - 1);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING - 1);
    /* One that is made has no place there, and is a descriptor. */
    for (uint32_t port = 5000; port < 5003; port++) {
        struct aiokvm_net_slirp_connection connection;
        open_connection(&nat, port, SERVICE, 80);
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(fd >= 0);
        CHECK_EQ(connection.port, port);
        close(fd);
        CHECK_EQ(begun->count, SLIRP_CONNECTING - 1);
        CHECK_EQ(slirp->tcp, port - 4999);
    }
    /* Begun anew with another number: the old one goes. */
    begin_connection(&nat, 8, 900000);
    CHECK_EQ(begun->count, SLIRP_CONNECTING - 1);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING - 1);
    /* A while later others have their places, though libslirp's time has not come. */
    for (uint32_t i = 0; i < begun->count; i++)
        begun->connecting[i].since_ns -= UINT64_C(75000000000);
    for (uint32_t port = 2001; port <= 3000; port++) {
        say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1000, 0, SYN, NULL, 0));
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(begun->count, SLIRP_CONNECTING);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING);
    CHECK_EQ(stats(nat.slirp).dropped_full, 2 * (1000 - SLIRP_CONNECTING) + 1000 - SLIRP_CONNECTING);
    for (uint32_t i = 0; i < begun->count; i++)
        CHECK((begun->connecting[i].ports >> 16) > 2000);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(a_restricted_guest_has_its_services_alone)
{
    make_path();
    struct aiokvm_net_slirp_config restricted = config();
    restricted.restricted = 1;
    struct nat nat = nat_with(&restricted, 0);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    struct aiokvm_net_slirp_connection connection;
    open_connection(&nat, 5000, SERVICE, 80);
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    close(fd);
    /* The service's address at the place where libslirp looks for it, in all of IPv6. */
    uint8_t frame[100], pseudo[4] = { 0, 6, 0, 20 };
    for (uint32_t at = 22; at <= 50; at += 4) {
        uint32_t size = frame6(frame, 6, OUTSIDE6, 80, SYN);
        net_store32(frame + at, SERVICE);
        net_store16(frame + 70, ~slirp_sum(frame + 54, 20, slirp_sum(pseudo, 4, slirp_sum(frame + 22, 32, 0))));
        say(&nat, frame, size);
    }
    CHECK_EQ(stats(nat.slirp).dropped_filtered, 8);
    CHECK_EQ(((struct slirp_end *)nat.slirp)->tcp, 1);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* ---- forwards ---- */

static int connect_to(int port)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

/* The guest takes a connection to its port 80. */
static uint32_t take_connection(struct nat *nat, uint32_t *port)
{
    const struct fake_frame *syn = hear_tcp(nat, 80);
    CHECK_EQ(syn->data[47], SYN);
    uint32_t next = net_load32(syn->data + 38) + 1;
    *port = net_load16(syn->data + 34);
    CHECK_EQ(net_load32(syn->data + 26), HOST);
    heard(nat);
    uint8_t frame[100];
    say(nat, frame, tcp_frame(frame, GUEST, 80, HOST, *port, 7000, next, SYN | ACK, NULL, 0));
    return next;
}

static void check_forward(struct nat *nat, int fd)
{
    uint32_t port, next = take_connection(nat, &port);
    CHECK_EQ(write(fd, "hello", 5), 5);
    for (;;) {
        const struct fake_frame *frame = hear_tcp(nat, 80);
        bool has_come = net_load16(frame->data + 16) == 45 && !memcmp(frame->data + 54, "hello", 5);
        heard(nat);
        if (has_come)
            break;
    }
    uint8_t frame[100];
    say(nat, frame, tcp_frame(frame, GUEST, 80, HOST, port, 7001, next + 5, ACK | PSH, "page", 4));
    char buffer[10];
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), 4);
    CHECK(!memcmp(buffer, "page", 4));
}

TEST(ports_are_forwarded)
{
    struct nat nat = nat_new();
    greet(&nat);
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80);
    CHECK(port > 0);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", (uint16_t)port, "", 80), -EADDRINUSE);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.x", 1, "", 80), -EINVAL);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, "::1", 1, "10.0.2.15", 80), -EINVAL);
    /* Until somebody comes there is nothing to do, but to say from time to time that there is IPv6. */
    fake_end_serve(nat.net);
    CHECK_EQ(((struct slirp_end *)nat.slirp)->poll_at_ns, 0);
    CHECK(nat.slirp->deadline_ns > now_ns() + UINT64_C(10000000000));
    int fd = connect_to(port);
    check_forward(&nat, fd);
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 0, "127.0.0.1", (uint16_t)port), 0);
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 0, "127.0.0.1", (uint16_t)port), -ENOENT);
    /* Who is connected stays so. */
    CHECK_EQ(write(fd, "more", 4), 4);
    for (;;) {
        const struct fake_frame *frame = hear_tcp(&nat, 80);
        bool has_come = net_load16(frame->data + 16) == 44 && !memcmp(frame->data + 54, "more", 4);
        heard(&nat);
        if (has_come)
            break;
    }
    close(fd);
    aiokvm_net_free(nat.net);
}

TEST(a_path_is_forwarded)
{
    make_path();
    struct nat nat = nat_new();
    greet(&nat);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, path, 0, "10.0.2.15", 80), 0);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, path, 0, "10.0.2.15", 80), -EADDRINUSE);
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    check_forward(&nat, fd);
    close(fd);
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 0, path, 0), 0);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(udp_is_forwarded)
{
    struct nat nat = nat_new();
    greet(&nat);
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "", 53);
    CHECK(port > 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK_EQ(sendto(fd, "what", 4, 0, (struct sockaddr *)&address, sizeof(address)), 4);
    const struct fake_frame *query = hear(&nat);
    CHECK_EQ(query->data[23], 17);
    CHECK_EQ(net_load16(query->data + 36), 53);
    CHECK(!memcmp(query->data + 42, "what", 4));
    uint8_t frame[100];
    net_store16(frame + 34, 53);
    memcpy(frame + 36, query->data + 34, 2);
    net_store16(frame + 38, 8 + 4);
    memcpy(frame + 42, "that", 4);
    say(&nat, frame, seal(frame, 17, GUEST, net_load32(query->data + 26), 12));
    char buffer[10];
    CHECK_EQ(recv(fd, buffer, sizeof(buffer), 0), 4);
    CHECK(!memcmp(buffer, "that", 4));
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 1, "127.0.0.1", (uint16_t)port), 0);
    close(fd);
    aiokvm_net_free(nat.net);
}

/* ---- bounds ---- */

TEST(a_guest_that_takes_nothing_is_not_sent_more)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    nat.guest->blocks = true;
    static uint8_t block[65536];
    uint32_t written = 0;
    for (ssize_t count; (count = write(fd, block, sizeof(block))) > 0;) {
        written += (uint32_t)count;
        fake_end_serve(nat.net);
        CHECK(written < 2000000);
    }
    CHECK_EQ(nat.guest->received, 0);
    /* Nothing is lost. */
    fake_end_unblock(nat.guest);
    uint8_t frame[100];
    for (uint32_t got = 0; got < written;) {
        const struct fake_frame *part = hear_tcp(&nat, 5000);
        if (net_load32(part->data + 38) == next + got)
            got += part->size - 54;
        heard(&nat);
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next + got, ACK, NULL, 0));
    }
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(a_flood_of_connections_is_bounded)
{
    struct aiokvm_net_slirp_config open = config();
    open.host_loopback = 1;
    struct nat nat = nat_with(&open, 0);
    greet(&nat);
    /* Somebody who listens and never accepts. */
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_EQ(listen(listener, 4096), 0);
    CHECK_EQ(getsockname(listener, (struct sockaddr *)&address, &length), 0);
    uint8_t frame[100];
    for (uint32_t port = 1; port < 2000; port++) {
        say(&nat, frame, tcp_frame(frame, GUEST, port, HOST, ntohs(address.sin_port), 1, 0, SYN, NULL, 0));
        net_store16(frame + 34, port);
        net_store16(frame + 36, 1);
        net_store16(frame + 38, 8);
        say(&nat, frame, seal(frame, 17, GUEST, HOST, 8));
        if (port % 10 == 0)
            fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    CHECK_EQ(slirp->tcp, 64);
    CHECK_EQ(slirp->other, 64);
    CHECK(stats(nat.slirp).dropped_full >= 2 * (1999 - 64));
    close(listener);
    aiokvm_net_free(nat.net);
}

TEST(the_loopback_of_the_host_is_not_reached)
{
    struct nat nat = nat_new();
    greet(&nat);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY) };
    socklen_t length = sizeof(address);
    CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_EQ(listen(listener, 10), 0);
    CHECK_EQ(getsockname(listener, (struct sockaddr *)&address, &length), 0);
    static const uint32_t HOSTS[] = { HOST, 0x7f000001, 0, 0x0a0002ff };
    uint8_t frame[100];
    for (uint32_t i = 0; i < LENGTH(HOSTS); i++)
        say(&nat, frame, tcp_frame(frame, GUEST, 100 + i, HOSTS[i], ntohs(address.sin_port), 1, 0, SYN, NULL, 0));
    fake_end_serve(nat.net);
    CHECK_EQ(poll(&(struct pollfd){ .fd = listener, .events = POLLIN }, 1, 100), 0);
    CHECK_EQ(stats(nat.slirp).dropped_filtered, 3);
    /* The router says so. */
    const struct fake_frame *reset = hear_tcp(&nat, 100);
    CHECK_EQ(reset->data[47], RST | ACK);
    CHECK_EQ(net_load32(reset->data + 42), 2);
    close(listener);
    aiokvm_net_free(nat.net);
}

TEST(large_frames_of_tcp_are_taken_and_given)
{
    make_path();
    struct aiokvm_net_slirp_config plain = config();
    struct nat nat = nat_with(&plain, AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    static uint8_t frame[60000], data[50000], received[60000];
    uint64_t state = 7;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)random_below(&state, 256);
    uint32_t size = tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK | PSH, data, sizeof(data));
    uint8_t pseudo[4] = { 0, 6 };
    net_store16(pseudo + 2, 20 + sizeof(data));
    net_store16(frame + 50, slirp_sum(pseudo, 4, slirp_sum(frame + 26, 8, 0)));
    struct virtio_net_hdr_v1 hdr = { .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
                                     .gso_size = 1460, .hdr_len = 54, .csum_start = 34, .csum_offset = 16 };
    CHECK_EQ(fake_end_send(nat.guest, &hdr, frame, size), NET_TAKEN);
    CHECK_EQ(read(fd, received, sizeof(received)), sizeof(data));
    CHECK(!memcmp(received, data, sizeof(data)));
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    /* The other way. */
    CHECK_EQ(write(fd, data, sizeof(data)), sizeof(data));
    uint32_t got = 0;
    bool is_large = false;
    while (got < sizeof(data)) {
        const struct fake_frame *part = hear_tcp(&nat, 5000);
        uint32_t length = part->size - 54;
        CHECK(!memcmp(part->data + 54, data + got, length));
        got += length;
        is_large |= part->hdr.gso_type == VIRTIO_NET_HDR_GSO_TCPV4;
        heard(&nat);
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 51001, next + got, ACK, NULL, 0));
    }
    CHECK(is_large);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(segments_with_gaps_are_bounded)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    uint8_t frame[100];
    char buffer[1000];
    /* Some, and then what was missing. */
    for (uint32_t i = 1; i < 200; i++) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001 + i, next, ACK, "x", 1));
        fake_end_clear(nat.guest);
    }
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    CHECK_EQ(slirp->order.count, 1);
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), -1);
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK, "x", 1));
    fake_end_serve(nat.net);
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), 200);
    CHECK_EQ(slirp->order.count, 0);
    CHECK_EQ(stats(nat.slirp).dropped_full, 0);
    /* Too many, for ever. */
    fake_end_clear(nat.guest);
    for (uint32_t i = 0; i < 300; i++) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1202 + 2 * i, next, ACK, "x", 1));
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    fake_end_serve(nat.net);
    CHECK_EQ(slirp->tcp, 0);
    CHECK(read(fd, buffer, sizeof(buffer)) <= 0);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* Segments of connections that there are, at places where they make some sense. */
TEST(random_segments_do_no_harm)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 64) > 0);
    greet(&nat);
    uint64_t state = 11;
    if (getenv("SEED"))
        state = strtoull(getenv("SEED"), NULL, 0);
    static uint8_t frame[1600], data[1460], block[30000];
    uint32_t next[8] = { 0 }, seq[8] = { 0 };
    int fds[8] = { -1, -1, -1, -1, -1, -1, -1, -1 };
    struct aiokvm_net_slirp_connection connection;
    for (int i = 0; i < 40000; i++) {
        uint32_t k = random_below(&state, 8), port = 5000 + k;
        if (fds[k] < 0 && random_below(&state, 20) == 0) {
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 999, 0, RST, NULL, 0));
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1000, 0, SYN, NULL, 0));
            for (uint32_t n = 0; n < nat.guest->kept; n++)
                if (nat.guest->frames[n].data[47] == (SYN | ACK))
                    next[k] = net_load32(nat.guest->frames[n].data + 38) + 1;
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1001, next[k], ACK, NULL, 0));
            fds[k] = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
            seq[k] = 1001;
        }
        for (uint32_t n = 0; n < nat.guest->kept; n++) {
            const uint8_t *heard = nat.guest->frames[n].data;
            uint32_t of = net_load16(heard + 36) - 5000;
            if (net_load16(heard + 12) != 0x0800 || heard[23] != 6 || of >= 8)
                continue;
            seq[of] = net_load32(heard + 42);
            if (random_below(&state, 4))
                next[of] = net_load32(heard + 38) + net_load16(heard + 16) - 40;
        }
        fake_end_clear(nat.guest);
        uint32_t flags = random_below(&state, 40) ? ACK : random_below(&state, 64);
        uint32_t at = seq[k] + (random_below(&state, 3) ? 0 : random_below(&state, 4000) - 2000);
        uint32_t ack = next[k] + (random_below(&state, 5) ? 0 : random_below(&state, 4000) - 2000);
        uint32_t size = random_below(&state, 2) ? 0 : random_below(&state, random_below(&state, 2) ? 1460 : 20);
        size = tcp_frame(frame, GUEST, port, SERVICE, 80, at, ack, flags, data, size);
        if (random_below(&state, 6) == 0) {
            net_store16(frame + 48, random_below(&state, 3000)); /* the window */
            net_store16(frame + 52, random_below(&state, 3000)); /* the urgent pointer */
            if (size > 60)
                frame[46] = (uint8_t)(0x50 + 16 * random_below(&state, 3)); /* options */
            seal(frame, 6, GUEST, SERVICE, size - 34);
        }
        say(&nat, frame, size);
        if (fds[k] >= 0 && random_below(&state, 10) == 0) {
            size_t length = random_below(&state, sizeof(block));
            ssize_t result = random_below(&state, 2) ? read(fds[k], block, sizeof(block))
                                                     : send(fds[k], block, length, MSG_NOSIGNAL);
            if (result == 0 || random_below(&state, 40) == 0) {
                close(fds[k]);
                fds[k] = -1;
            }
        }
        if (random_below(&state, 8) == 0)
            fake_end_serve(nat.net);
    }
    for (int k = 0; k < 8; k++)
        if (fds[k] >= 0)
            close(fds[k]);
    fake_end_clear(nat.guest);
    greet(&nat);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(random_frames_do_no_harm)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint64_t state = 3;
    if (getenv("SEED"))
        state = strtoull(getenv("SEED"), NULL, 0);
    static uint8_t frame[1600];
    static const uint32_t TYPES[] = { 0x0800, 0x86dd, 0x0806, 0x88f8 };
    static const uint8_t PROTOCOLS[] = { 1, 6, 17, 58, 47 };
    for (int i = 0; i < 60000; i++) {
        uint32_t size = 14 + random_below(&state, i % 10 ? 100 : 1500);
        for (uint32_t k = 0; k < size; k++)
            frame[k] = random_below(&state, 4) ? (uint8_t)random_below(&state, 256) : 0;
        uint32_t type = TYPES[random_below(&state, LENGTH(TYPES))];
        net_store16(frame + 12, type);
        if (type == 0x0800 && size > 60) {
            uint32_t protocol = PROTOCOLS[random_below(&state, LENGTH(PROTOCOLS))];
            const uint32_t hosts[] = { SERVICE, SERVICE, HOST, 0x0a000200 + (uint32_t)i % 256 };
            uint32_t to = hosts[random_below(&state, LENGTH(hosts))];
            net_store16(frame + 36, random_below(&state, 2) ? 80 : 67);
            frame[46] = 0x50 + (frame[46] & 0x2f);
            seal(frame, protocol, GUEST, to, size - 34);
            if (protocol == 17)
                net_store16(frame + 38, size - 34 - random_below(&state, 2));
            seal(frame, protocol, GUEST, to, size - 34);
            if (random_below(&state, 8) == 0) {
                net_store16(frame + 20, random_below(&state, 0x4000));
                net_store16(frame + 24, 0);
                net_store16(frame + 24, ~slirp_sum(frame + 14, 20, 0));
            }
        } else if (type == 0x86dd && size > 60) {
            frame[14] = 0x60;
            net_store16(frame + 18, size - 54);
            frame[20] = PROTOCOLS[random_below(&state, LENGTH(PROTOCOLS))];
            frame[21] = 255;
            frame[54] = (uint8_t)(128 + random_below(&state, 12));
            static const uint8_t TO[16] = { 0xfe, 0xc0, [15] = 2 };
            memcpy(frame + 38, TO, 16);
            uint8_t pseudo[4] = { 0, frame[20] };
            net_store16(pseudo + 2, size - 54);
            net_store16(frame + 56, 0);
            uint32_t sum = slirp_sum(pseudo, 4, slirp_sum(frame + 22, 32, 0));
            net_store16(frame + 56, ~slirp_sum(frame + 54, size - 54, sum));
        }
        say(&nat, frame, size);
        if (i % 16 == 0)
            fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    /* It lives. */
    greet(&nat);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(what_cannot_be_is_refused)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    struct aiokvm_net_slirp_config wrong = config();
    wrong.mtu = 100;
    CHECK(!aiokvm_net_slirp_new(net, &wrong, &error));
    CHECK_EQ(error, EINVAL);
    aiokvm_net_free(net);
}

TEST(a_child_of_fork_frees_its_copy_alone)
{
    make_path();
    struct nat nat = nat_new();
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int stream = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    pid_t pid = fork();
    if (pid == 0) {
        bool right = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80) == -EOWNERDEAD &&
                     aiokvm_net_slirp_accept(nat.slirp, 1, &connection) == -EOWNERDEAD;
        aiokvm_net_free(nat.net);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    uint8_t frame[100];
    char buffer[10];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK | PSH, "hello", 5));
    CHECK_EQ(read(stream, buffer, sizeof(buffer)), 5);
    int fd = connect_to(port);
    check_forward(&nat, fd);
    close(fd);
    close(stream);
    aiokvm_net_free(nat.net);
    remove_path();
}

#endif
