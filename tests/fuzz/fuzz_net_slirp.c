/* net_slirp*.c with libslirp under libFuzzer: frames of a guest with right checksums and hostile fields, to services, to
 * who has come in by a forward, to the nameserver and anywhere. Only connections to a path and datagrams to a forwarded
 * port are real: connect and sendto are here, and the clock, which jumps.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_end.c net_gather.c net_rules.c net_slirp*.c budget.c pace.c ratelimit.c
 * Libraries: slirp
 * Runs: 6000
 */
#define _GNU_SOURCE
#include "net_fuzz.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "net_packet.h"
#include "net_slirp_priv.h"

enum { GUEST = 0x0a00020f, HOST = 0x0a000202, NAMESERVER = 0x0a000203, SERVICE = 0x0a000264 };

static uint64_t passed_ns;

uint64_t aiokvm_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + passed_ns;
}

int connect(int fd, const struct sockaddr *address, socklen_t size)
{
    if (address->sa_family == AF_UNIX)
        return (int)syscall(SYS_connect, fd, address, size);
    /* As the system's does when it does not block, or has no way: libslirp frees a packet twice for ECONNREFUSED. */
    errno = fd % 2 ? EINPROGRESS : ENETUNREACH;
    return -1;
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t to_size)
{
    if (!to)
        return syscall(SYS_sendto, fd, data, size, flags, to, to_size);
    return (ssize_t)size;
}

/* Of its last connection: where the guest is, and the headers that it has heard. */
static uint32_t seq, ack, heard_size;
static uint8_t heard[74];

static void look(struct peer *peer, const uint8_t *data, uint32_t size)
{
    (void)peer;
    bool is_ip6 = net_load16(data + 12) == 0x86dd;
    uint32_t headers = is_ip6 ? 74 : 54;
    if (size < headers || (is_ip6 ? data[20] != 6 : net_load16(data + 12) != 0x0800 || data[23] != 6))
        return;
    const uint8_t *tcp = data + headers - 20;
    ack = net_load32(tcp + 4) + size - (uint32_t)(tcp - data) - (uint32_t)(tcp[12] >> 4) * 4 + !!(tcp[13] & 3);
    seq = net_load32(tcp + 8);
    heard_size = headers;
    memcpy(heard, data, headers);
}

static void seal(uint8_t *frame, uint32_t size)
{
    bool is_ip6 = net_load16(frame + 12) == 0x86dd;
    uint8_t *ip = frame + 14, *body = ip + (is_ip6 ? 40 : 20);
    uint32_t protocol = ip[is_ip6 ? 6 : 9], length = size - (uint32_t)(body - frame);
    uint32_t at = protocol == 6 ? 16 : protocol == 17 ? 6 : 2;
    if (is_ip6) {
        net_store16(ip + 4, length);
    } else {
        net_store16(ip + 2, size - 14);
        net_store16(ip + 10, 0);
        net_store16(ip + 10, ~slirp_sum(ip, 20, 0));
    }
    uint8_t pseudo[4] = { 0, (uint8_t)protocol };
    net_store16(pseudo + 2, length);
    net_store16(body + at, 0);
    uint32_t sum = protocol == 1 ? 0 : slirp_sum(pseudo, 4, is_ip6 ? slirp_sum(ip + 8, 32, 0) : slirp_sum(ip + 12, 8, 0));
    net_store16(body + at, ~slirp_sum(body, length, sum));
}

static uint32_t make(struct input *input, uint8_t *frame)
{
    static const uint32_t TO[] = { HOST, NAMESERVER, SERVICE, 0x0a0002ff, 0x08080808, 0xffffffff, GUEST, 0x7f000001 };
    static const uint8_t PROTOCOLS[] = { 6, 17, 1, 6 };
    static const uint16_t PORTS[] = { 80, 53, 67, 547, 69, 0x3039, 7, 1 };
    uint32_t kind = take(input, 1), protocol = PROTOCOLS[kind >> 1 & 3], payload = take(input, 1);
    memset(frame, 0, 600);
    memcpy(frame, "\x52\x55\x0a\0\2\2\x52\x54\0\0\0\2\x08\0", 14);
    uint8_t *ip = frame + 14, *body = ip + (kind & 1 ? 40 : 20);
    if (kind & 1) {
        net_store16(frame + 12, 0x86dd);
        protocol = protocol == 1 ? 58 : protocol;
        ip[0] = 0x60;
        ip[6] = (uint8_t)(kind & 128 ? take(input, 1) : protocol);
        ip[7] = kind & 16 ? 255 : 64;
        memcpy(ip + 8, "\xfe\xc0", 2);
        ip[23] = 9;
        memcpy(ip + 24, kind & 32 ? "\xff\2" : "\xfe\xc0", 2);
        ip[39] = (uint8_t)take(input, 1);
    } else {
        ip[0] = 0x45;
        ip[8] = 64;
        ip[9] = (uint8_t)(kind & 128 ? take(input, 1) : protocol);
        net_store16(ip + 6, kind & 64 ? take(input, 2) & 0x203f : 0);
        net_store32(ip + 12, GUEST + (kind & 32 ? take(input, 1) : 0));
        net_store32(ip + 16, TO[take(input, 1) % 8]);
    }
    uint32_t header = protocol == 6 ? 20 + take(input, 1) % 11 * 4 : 8;
    uint32_t size = (uint32_t)(body - frame) + header + payload, choice = take(input, 1);
    net_store16(body, 0x4000 + (choice & 7));
    net_store16(body + 2, PORTS[choice >> 3 & 7]);
    if (protocol == 6) {
        net_store32(body + 4, seq + (choice & 64 ? take(input, 2) : 0));
        net_store32(body + 8, ack + (choice & 128 ? take(input, 2) : 0));
        body[12] = (uint8_t)(header / 4 << 4);
        body[13] = (uint8_t)take(input, 1);
        net_store16(body + 14, take(input, 2));
        for (uint32_t i = 20; i < header; i++)
            body[i] = (uint8_t)take(input, 1);
    } else if (protocol == 17) {
        net_store16(body + 4, choice & 64 ? take(input, 2) : header + payload);
    } else {
        body[0] = (uint8_t)take(input, 1);
    }
    for (uint32_t i = header; i < header + payload && i < header + 60 && input->left; i++)
        body[i] = (uint8_t)take(input, 1);
    if (kind & 8)
        frame[14 + take(input, 1) % 60] = (uint8_t)take(input, 1);
    seal(frame, size);
    return size;
}

static void swap(uint8_t *one, uint8_t *other, size_t size)
{
    uint8_t copy[16];
    memcpy(copy, one, size);
    memcpy(one, other, size);
    memcpy(other, copy, size);
}

/* What a guest's TCP says to what it has heard last. */
static uint32_t reply(struct input *input, uint8_t *frame)
{
    uint32_t choice = take(input, 1), size = heard_size + (choice & 128 ? take(input, 1) : 0);
    bool is_ip6 = heard_size == 74;
    memcpy(frame, heard, heard_size);
    uint8_t *tcp = frame + heard_size - 20, *ip = frame + 14;
    swap(frame, frame + 6, 6);
    swap(ip + (is_ip6 ? 8 : 12), ip + (is_ip6 ? 24 : 16), is_ip6 ? 16 : 4);
    swap(tcp, tcp + 2, 2);
    net_store32(tcp + 4, seq);
    net_store32(tcp + 8, ack);
    tcp[12] = 0x50;
    tcp[13] = (uint8_t)((tcp[13] & 18) == 2 ? 18 : 16) ^ (choice & 15);
    net_store16(tcp + 14, choice & 16 ? take(input, 2) : 0xffff);
    memset(tcp + 16, 0, 4);
    memset(frame + heard_size, 0, size - heard_size);
    seal(frame, size);
    return size;
}

static void send_frame(struct peer *peer, const uint8_t *data, uint32_t size)
{
    uint8_t private[NET_HEAD];
    struct iovec iov[3], from = { (void *)(uintptr_t)data, size };
    struct net_frame frame = { 0 };
    net_frame_set(&frame, iov + 1, private, &from, 1, 0);
    REQUIRE(net_enter(peer->end.net));
    if (net_frame_check(&frame))
        net_send(&peer->end, &frame);
    net_leave(peer->end.net);
}

/* Who comes in by a forward. */
struct outside {
    struct sockaddr_un path;
    struct sockaddr_in port;
    struct sockaddr_in6 port6; /* of the guests that talk some are reached here, and not by the path */
    int fd, udp;
};

static void come_in(struct outside *outside, uint32_t what)
{
    static uint8_t data[3000];
    int flags = SOCK_NONBLOCK | SOCK_CLOEXEC;
    if (outside->fd < 0 && outside->port6.sin6_port) {
        outside->fd = socket(AF_INET6, SOCK_STREAM | flags, 0);
        REQUIRE(outside->fd >= 0);
        /* It leaves nothing behind. */
        setsockopt(outside->fd, SOL_SOCKET, SO_LINGER, &(struct linger){ .l_onoff = 1 }, sizeof(struct linger));
        long result = syscall(SYS_connect, outside->fd, &outside->port6, sizeof(outside->port6));
        REQUIRE(!result || errno == EINPROGRESS);
    } else if (outside->fd < 0) {
        outside->fd = socket(AF_UNIX, SOCK_STREAM | flags, 0);
        REQUIRE(outside->fd >= 0);
        REQUIRE(!connect(outside->fd, (struct sockaddr *)&outside->path, sizeof(outside->path)) || errno == EAGAIN);
    } else if (what & 4) {
        REQUIRE(recv(outside->fd, data, sizeof(data), MSG_DONTWAIT) <= (ssize_t)sizeof(data));
    } else if (what & 8) {
        send(outside->fd, data, what * 10, MSG_NOSIGNAL | MSG_DONTWAIT);
    } else if (what & 16) {
        close(outside->fd);
        outside->fd = -1;
    }
    if (what & 3)
        return;
    if (outside->udp < 0) {
        outside->udp = socket(AF_INET, SOCK_DGRAM | flags, 0);
        REQUIRE(outside->udp >= 0);
        long result = syscall(SYS_connect, outside->udp, &outside->port, sizeof(outside->port));
        REQUIRE(!result);
    }
    send(outside->udp, data, what * 10, MSG_DONTWAIT);
}

/* What the program does with its side. */
static void program(struct input *input, struct aiokvm_net_end *end, int fds[4], uint32_t ids[4])
{
    static uint8_t data[AIOKVM_NET_SLIRP_MAX_QUERY], answer[3000];
    struct aiokvm_net_slirp_connection connection;
    uint32_t which = take(input, 1), slot = which & 3, id;
    uint32_t service = 1 + (slot & 1);
    if (fds[slot] < 0 && (fds[slot] = aiokvm_net_slirp_accept(end, service, &connection)) >= 0)
        ids[slot] = connection.id;
    if (fds[slot] >= 0) {
        if (which & 4)
            REQUIRE(recv(fds[slot], data, sizeof(data), MSG_DONTWAIT) <= (ssize_t)sizeof(data));
        if (which & 8)
            send(fds[slot], answer, take(input, 1) * 10, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (which & 16)
            aiokvm_net_slirp_abort(end, ids[slot]);
        if (which & 48) {
            close(fds[slot]);
            fds[slot] = -1;
        }
    }
    while (which & 64 && aiokvm_net_slirp_take_query(end, &id, data) >= 0)
        aiokvm_net_slirp_answer(end, id, answer, take(input, 1) * 10);
    while (aiokvm_net_slirp_take_broken(end, &id) == 1)
        continue;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char path[64];
    static uint8_t frame[AIOKVM_NET_MAX_FRAME];
    if (!*path)
        snprintf(path, sizeof(path), "/tmp/fuzz_net_slirp.%d", (int)getpid());
    unlink(path);
    struct input input = { data, size };
    /* Some guests talk: their side of TCP follows what they hear. */
    uint32_t first = take(&input, 1);
    bool talks = first >> 4 == 10;
    int error = 0, fds[4] = { -1, -1, -1, -1 };
    uint32_t ids[4] = { 0 };
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    REQUIRE(net);
    struct aiokvm_net_slirp_config config = {
        .network = 0x0a000200, .netmask = 0xffffff00, .host = HOST, .dhcp_start = GUEST, .nameserver = NAMESERVER,
        .prefix6 = { 0xfe, 0xc0 }, .prefix6_length = 64, .host6 = { 0xfe, 0xc0, [15] = 2 },
        .nameserver6 = { 0xfe, 0xc0, [15] = 3 }, .mtu = first & 1 ? 1500 : 9000, .max_connections = 8,
        .hostname = "guest", .host_loopback = take(&input, 1) & 1, .restricted = take(&input, 1) % 4 == 0, .has_dns = 1,
    };
    struct aiokvm_net_end *end = aiokvm_net_slirp_new(net, &config, &error);
    REQUIRE(end);
    struct peer *peer = peer_new(net, take(&input, 1) & 1 ? 31 : 0);
    peer->check = look;
    REQUIRE(aiokvm_net_link(&peer->end, end) == 0);
    REQUIRE(aiokvm_net_slirp_add_service(end, SERVICE, 80, path, 2) == 1);
    strcat(path, "d");
    unlink(path);
    REQUIRE(aiokvm_net_slirp_add_service(end, 0x0a0002ff, 53, path, 2) == 2);
    path[strlen(path) - 1] = 'f';
    unlink(path);
    REQUIRE(!aiokvm_net_slirp_add_forward(end, 0, path, 0, "10.0.2.15", 80));
    struct outside outside = { .path.sun_family = AF_UNIX, .port.sin_family = AF_INET, .fd = -1, .udp = -1 };
    int port = talks && first & 2 ? aiokvm_net_slirp_add_forward(end, 0, "::1", 0, "fec0::9", 80) : 0;
    if (port > 0)
        outside.port6 = (struct sockaddr_in6){
            .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = IN6ADDR_LOOPBACK_INIT,
        };
    strcpy(outside.path.sun_path, path);
    path[strlen(path) - 1] = 0;
    port = aiokvm_net_slirp_add_forward(end, 1, "127.0.0.1", 0, "10.0.2.15", 53);
    REQUIRE(port > 0);
    outside.port.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    outside.port.sin_port = htons((uint16_t)port);
    seq = ack = heard_size = 0;
    passed_ns = 0;
    while (input.left) {
        uint32_t what = take(&input, 1);
        send_frame(peer, frame, talks && what & 128 && heard_size ? reply(&input, frame) : make(&input, frame));
        if (what & 1)
            program(&input, end, fds, ids);
        if (what & 16)
            come_in(&outside, take(&input, 1));
        /* Up to a minute, or so that who is silent for hours has to go. */
        if (what & 32) {
            passed_ns += (uint64_t)take(&input, 1) << (what & 64 ? 34 : 28);
            REQUIRE(net_enter(net));
            net_ready(end);
            net_leave(net);
        }
        if (what & 34)
            serve(net, 3);
        peer_block(peer, what & 4 && what & 8);
    }
    aiokvm_net_free(net);
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (outside.fd >= 0)
        close(outside.fd);
    if (outside.udp >= 0)
        close(outside.udp);
    unlink(outside.path.sun_path);
    unlink(path);
    strcat(path, "d");
    unlink(path);
    path[strlen(path) - 1] = 0;
    return 0;
}
