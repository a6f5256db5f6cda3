#define _GNU_SOURCE
#include "slirp_guest.h"

#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net_packet.h"

const uint8_t OUTSIDE6[16] = { 0x20, 1, [15] = 1 }, HOST6[16] = { 0xfe, 0xc0, [15] = 2 };

/* An IPv4 header at frame + 14, and what is behind it has its checksum. */
uint32_t seal(uint8_t *frame, uint32_t protocol, uint32_t from, uint32_t to, uint32_t payload)
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

uint32_t tcp_frame(uint8_t *frame, uint32_t from, uint32_t from_port, uint32_t to, uint32_t to_port,
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

uint32_t put_udp(uint8_t *frame, uint32_t from, uint32_t from_port, uint32_t to, uint32_t to_port)
{
    net_store16(frame + 34, from_port);
    net_store16(frame + 36, to_port);
    net_store16(frame + 38, 8);
    return seal(frame, 17, from, to, 8);
}

/* A header without payload but its own, and no checksum: the guard asks for none. */
uint32_t frame6(uint8_t *frame, uint32_t protocol, const uint8_t *to, uint32_t port, uint32_t flags)
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

#ifdef AIOKVM_HAVE_SLIRP

struct aiokvm_net_slirp_config config(void)
{
    static const char *search[] = { "example", "example.org", NULL };
    return (struct aiokvm_net_slirp_config){
        .network = 0x0a000200, .netmask = 0xffffff00, .host = HOST, .dhcp_start = GUEST, .nameserver = NAMESERVER,
        .prefix6 = { 0xfe, 0xc0 }, .prefix6_length = 64, .host6 = { 0xfe, 0xc0, [15] = 2 },
        .nameserver6 = { 0xfe, 0xc0, [15] = 3 }, .mtu = 1500, .max_connections = 64, .hostname = "guest",
        .domain = "example", .search = search,
    };
}

struct nat nat_with(const struct aiokvm_net_slirp_config *config, uint32_t offloads)
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

struct nat nat_new(void)
{
    struct aiokvm_net_slirp_config plain = config();
    return nat_with(&plain, 0);
}

struct aiokvm_net_stats stats(struct aiokvm_net_end *end)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(end, &stats);
    return stats;
}

void say(struct nat *nat, const uint8_t *frame, uint32_t size)
{
    CHECK_EQ(fake_end_send(nat->guest, NULL, frame, size), NET_TAKEN);
}

/* Waits for a frame, which stays until the next call. */
const struct fake_frame *hear(struct nat *nat)
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

void heard(struct nat *nat)
{
    struct fake_end *guest = nat->guest;
    free(guest->frames[0].data);
    memmove(guest->frames, guest->frames + 1, --guest->kept * sizeof(*guest->frames));
}

/* So that libslirp knows where the guest is. */
void greet(struct nat *nat)
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
const struct fake_frame *hear_tcp(struct nat *nat, uint32_t port)
{
    for (;;) {
        const struct fake_frame *frame = hear(nat);
        if (net_load16(frame->data + 12) == 0x0800 && frame->data[23] == 6 && net_load16(frame->data + 36) == port)
            return frame;
        heard(nat);
    }
}

static char directory[64];
char path[80];

void make_path(void)
{
    strcpy(directory, "/tmp/test_net_slirp.XXXXXX");
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/service", directory);
}

void remove_path(void)
{
    unlink(path);
    rmdir(directory);
}

/* A connection of the guest's: gives the sequence number of the other side that comes next. */
uint32_t open_connection(struct nat *nat, uint32_t port, uint32_t to, uint32_t to_port)
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

void limit_descriptors(rlim_t limit)
{
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    limits.rlim_cur = limit;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limits), 0);
}

/* libslirp forgets to free the path of a service that is removed. */
__attribute__((weak)) void __lsan_disable(void);
__attribute__((weak)) void __lsan_enable(void);

int add_service_to_be_removed(struct nat *nat, uint32_t max)
{
    if (__lsan_disable)
        __lsan_disable();
    int service = aiokvm_net_slirp_add_service(nat->slirp, SERVICE, 80, path, max);
    if (__lsan_enable)
        __lsan_enable();
    return service;
}

/* Without the guest's last word of a handshake; see open_connection. */
uint32_t begin_connection(struct nat *nat, uint32_t port, uint32_t seq)
{
    uint8_t frame[100];
    say(nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, seq, 0, SYN, NULL, 0));
    const struct fake_frame *answer = hear_tcp(nat, port);
    CHECK_EQ(answer->data[47], SYN | ACK);
    uint32_t next = net_load32(answer->data + 38) + 1;
    heard(nat);
    return next;
}

/* How many libslirp has in this state. */
uint32_t connections(struct nat *nat, const char *state)
{
    char *text = slirp_connection_info(((struct slirp_end *)nat->slirp)->slirp);
    uint32_t count = 0;
    for (const char *at = text; (at = strstr(at, state)); at++)
        count++;
    free(text);
    return count;
}

static int connect_by(int type, int port)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, type, 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

int connect_to(int port)
{
    return connect_by(SOCK_STREAM, port);
}

int connect_udp(int port)
{
    return connect_by(SOCK_DGRAM, port);
}

/* The guest takes a connection to its port 80. */
uint32_t take_connection(struct nat *nat, uint32_t *port)
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

void check_forward(struct nat *nat, int fd)
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

#endif
