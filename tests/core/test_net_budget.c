/* How long one call of aiokvm_net_serve takes, whatever a guest or a peer does: CPU time of this thread, which would be
 * the loop's. That no call is as long as is never allowed all tests see to (holdups.h); here none is longer than is
 * wanted, though under sanitizers all is several times slower. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "holdups.h"
#include "net_capture.h"
#include "net_datagram.h"
#include "net_filter.h"
#include "net_port.h"
#include "net_stream.h"
#include "net_switch.h"
#include "net_tap.h"
#include "nic_driver.h"

enum { BUDGET_NS = 500000 };
enum { BATCH = 64, HEADERS = 54 };

/* One call may be unlucky: a hypervisor's own work counts as the thread's, and so do the first touches of memory. */
static void serve(struct aiokvm_net *net, uint32_t calls)
{
    uint32_t long_calls = 0;
    while (calls--) {
        uint64_t before_ns = cpu_ns();
        aiokvm_net_serve(net, BUDGET_NS);
        long_calls += cpu_ns() - before_ns >= HOLDUPS_WANTED_NS;
    }
    CHECK(long_calls <= 1);
}

static struct aiokvm_net *guest_open(struct nic_driver *nic, uint32_t pairs)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    CHECK(net);
    nic_driver_open(nic, net, F_CSUM | F_HOST_TSO4 | AIOKVM_VIRTIO_F_INDIRECT_DESC, 256, pairs);
    return net;
}

static void guest_close(struct nic_driver *nic, struct aiokvm_net *net)
{
    aiokvm_net_free(net);
    nic_driver_close(nic);
}

/* A TCP segment to everybody with so much payload, to be cut into pieces of gso_size. */
static uint32_t make(uint8_t *data, struct virtio_net_hdr_v1 *hdr, uint32_t payload, uint32_t gso_size)
{
    uint32_t size = HEADERS + payload;
    memset(data, 0, size);
    memcpy(data, "\xff\xff\xff\xff\xff\xff\x52\x54\x00\x00\x00\x02\x08\x00\x45\x00", 16);
    data[16] = (uint8_t)((size - 14) >> 8);
    data[17] = (uint8_t)(size - 14);
    data[22] = 64;
    data[23] = IPPROTO_TCP;
    memcpy(data + 26, "\x0a\x00\x02\x0f\x01\x02\x03\x04", 8);
    memcpy(data + 34 + 12, "\x50\x10", 2);
    *hdr = (struct virtio_net_hdr_v1){ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16 };
    if (gso_size) {
        hdr->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
        hdr->hdr_len = HEADERS;
        hdr->gso_size = (uint16_t)gso_size;
    }
    return size;
}

/* As many frames as a queue has, on all queues at once, again and again. */
static void attack(struct nic_driver *nic, struct aiokvm_net *net, uint32_t pairs, uint32_t payload, uint32_t gso_size)
{
    static uint8_t data[AIOKVM_NET_MAX_FRAME];
    struct virtio_net_hdr_v1 hdr;
    uint32_t size = make(data, &hdr, payload, gso_size);
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t pair = 0; pair < pairs; pair++) {
            uint32_t id, written;
            while (driver_take(&nic->queues[2 * pair + 1].driver, &id, &written))
                continue;
            for (uint32_t i = 0; i < BATCH; i++)
                if (nic_driver_send(nic, pair, i, &hdr, data, size) < 0)
                    break;
            nic_driver_kick(nic, 2 * pair + 1, true);
        }
        serve(net, 30);
    }
}

static struct aiokvm_net_switch *switch_open(struct aiokvm_net *net, struct nic_driver *nic, uint32_t ports,
                                             uint32_t offloads)
{
    int error = 0;
    struct aiokvm_net_switch_config config = { .ageing_ns = UINT64_C(300000000000) };
    struct aiokvm_net_switch_port_config port = { 0 };
    struct aiokvm_net_switch *sw = aiokvm_net_switch_new(net, &config, &error);
    CHECK(sw);
    struct aiokvm_net_end *end = aiokvm_net_switch_port_new(sw, &port, &error);
    CHECK(end);
    CHECK_EQ(aiokvm_net_link(nic->end, end), 0);
    for (uint32_t i = 0; i < ports; i++) {
        struct aiokvm_net_port_config reader = { .depth = 256, .bytes = 1 << 20, .offloads = offloads, .drop = 1 };
        struct aiokvm_net_end *peer = aiokvm_net_port_new(net, &reader, &error);
        end = aiokvm_net_switch_port_new(sw, &port, &error);
        CHECK(peer && end);
        CHECK_EQ(aiokvm_net_link(peer, end), 0);
    }
    return sw;
}

TEST(frames_to_all_ports_of_a_switch)
{
    for (uint32_t whole = 0; whole < 2; whole++)
        for (uint32_t pairs = 1; pairs <= NIC_MAX_PAIRS; pairs *= 4) {
            struct nic_driver nic;
            struct aiokvm_net *net = guest_open(&nic, pairs);
            struct aiokvm_net_switch *sw = switch_open(net, &nic, 200, whole ? 31 : 0);
            attack(&nic, net, pairs, whole ? 65000 : 128, whole ? 1000 : 1);
            aiokvm_net_switch_free(sw);
            guest_close(&nic, net);
        }
}

static void *swallow(void *argument)
{
    static uint8_t data[1 << 17];
    int fd = *(int *)argument;
    while (recv(fd, data, sizeof(data), 0) > 0)
        continue;
    return NULL;
}

/* All sizes of pieces to an end that takes whole frames only. */
static void cut_for(struct aiokvm_net_end *(*make_end)(struct aiokvm_net *net, int *fds))
{
    static const struct { uint32_t payload, gso_size; } SIZES[] = { { 128, 1 }, { 60000, 1 }, { 60000, 1448 } };
    for (size_t i = 0; i < LENGTH(SIZES); i++) {
        struct nic_driver nic;
        struct aiokvm_net *net = guest_open(&nic, 1);
        int fds[2];
        struct aiokvm_net_end *end = make_end(net, fds);
        CHECK(end);
        CHECK_EQ(aiokvm_net_link(nic.end, end), 0);
        pthread_t thread;
        CHECK_EQ(pthread_create(&thread, NULL, swallow, &fds[1]), 0);
        attack(&nic, net, 1, SIZES[i].payload, SIZES[i].gso_size);
        guest_close(&nic, net);
        shutdown(fds[1], SHUT_RDWR);
        pthread_join(thread, NULL);
        close(fds[0]);
        close(fds[1]);
    }
}

static struct aiokvm_net_end *stream_end(struct aiokvm_net *net, int *fds)
{
    int error = 0;
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    struct aiokvm_net_end *end = aiokvm_net_stream_new(net, &error);
    CHECK(end);
    CHECK_EQ(aiokvm_net_stream_attach(end, fds[0]), 0);
    return end;
}

static struct aiokvm_net_end *seqpacket_end(struct aiokvm_net *net, int *fds)
{
    int error = 0;
    CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds), 0);
    return aiokvm_net_datagram_new(net, fds[0], NULL, 0, &error);
}

static struct aiokvm_net_end *udp_end(struct aiokvm_net *net, int *fds)
{
    int error = 0;
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t size = sizeof(at);
    fds[0] = socket(AF_INET, SOCK_DGRAM, 0);
    fds[1] = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK_EQ(bind(fds[1], (struct sockaddr *)&at, size), 0);
    CHECK_EQ(getsockname(fds[1], (struct sockaddr *)&at, &size), 0);
    return aiokvm_net_datagram_new(net, fds[0], &at, size, &error);
}

TEST(frames_that_are_cut_for_a_stream)
{
    cut_for(stream_end);
}

TEST(frames_that_are_cut_for_a_seqpacket_socket)
{
    cut_for(seqpacket_end);
}

TEST(frames_that_are_cut_for_udp)
{
    cut_for(udp_end);
}

TEST(frames_that_are_cut_for_a_tap)
{
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC), error = 0;
    struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI };
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0)
        SKIP("no TAP may be made here");
    int control = socket(AF_INET, SOCK_DGRAM, 0);
    request.ifr_flags = IFF_UP;
    CHECK_EQ(ioctl(control, SIOCSIFFLAGS, &request), 0);
    close(control);
    struct nic_driver nic;
    struct aiokvm_net *net = guest_open(&nic, 1);
    struct aiokvm_net_end *end = aiokvm_net_tap_new(net, &fd, 1, 1, &error);
    CHECK(end);
    CHECK_EQ(aiokvm_net_link(nic.end, end), 0);
    attack(&nic, net, 1, 128, 1);
    attack(&nic, net, 1, 60000, 1);
    guest_close(&nic, net);
    close(fd);
}

/* What every frame has to pass costs as much as a copy. */
TEST(frames_that_are_filtered_and_recorded_twice)
{
    struct nic_driver nic;
    struct aiokvm_net *net = guest_open(&nic, 4);
    int error = 0;
    struct aiokvm_net_port_config config = { .depth = 1024, .bytes = 8 << 20, .offloads = 31, .drop = 1 };
    struct aiokvm_net_end *port = aiokvm_net_port_new(net, &config, &error);
    static struct aiokvm_net_rule rules[AIOKVM_NET_MAX_RULES];
    for (uint32_t i = 0; i < LENGTH(rules); i++)
        rules[i] = (struct aiokvm_net_rule){
            .verdict = AIOKVM_NET_DENY, .directions = 3, .has = AIOKVM_NET_HAS_ETHERTYPE, .ethertype = 0x1234,
        };
    rules[LENGTH(rules) - 1] = (struct aiokvm_net_rule){ .verdict = AIOKVM_NET_ALLOW, .directions = 3 };
    struct aiokvm_net_filter *filter = aiokvm_net_filter_new(nic.end, rules, LENGTH(rules), &error);
    struct aiokvm_net_recording *recording = aiokvm_net_recording_new(1 << 18, 4 << 20, 0, &error);
    struct aiokvm_net_capture *captures[2];
    for (uint32_t i = 0; i < 2; i++)
        captures[i] = aiokvm_net_capture_new(recording, i, &error);
    CHECK(port && filter && captures[0] && captures[1]);
    aiokvm_net_set_policy(nic.end, filter, captures[0], NULL, NULL);
    aiokvm_net_set_policy(port, NULL, captures[1], NULL, NULL);
    CHECK_EQ(aiokvm_net_link(nic.end, port), 0);
    attack(&nic, net, 4, 65000, 1000);
    aiokvm_net_free(net);
    aiokvm_net_filter_free(filter);
    for (uint32_t i = 0; i < 2; i++)
        aiokvm_net_capture_free(captures[i]);
    aiokvm_net_recording_free(recording);
    nic_driver_close(&nic);
}

/* A peer that sends as much as it can, in pieces as small as can be, to all guests of a switch. */
TEST(a_peer_that_floods)
{
    for (uint32_t size = 1; size <= 60000; size *= 245) {
        int error = 0, fds[2];
        struct nic_driver nic;
        struct aiokvm_net *net = guest_open(&nic, 1);
        struct aiokvm_net_switch *sw = switch_open(net, &nic, 100, 0);
        struct aiokvm_net_switch_port_config config = { 0 };
        struct aiokvm_net_end *port = aiokvm_net_switch_port_new(sw, &config, &error), *end = stream_end(net, fds);
        CHECK(port);
        CHECK_EQ(aiokvm_net_link(end, port), 0);
        static uint8_t data[64004];
        uint32_t prefix = htonl(size);
        memset(data, 0xff, sizeof(data));
        memcpy(data, &prefix, 4);
        memcpy(data + 10, "\x52\x54\x00\x00\x00\x03\x08\x00", 8);
        for (uint32_t round = 0; round < 200; round++) {
            for (uint32_t i = 0; i < 1000; i++)
                if (send(fds[1], data, 4 + size, MSG_DONTWAIT) != (ssize_t)(4 + size))
                    break;
            serve(net, 1);
        }
        aiokvm_net_switch_free(sw);
        guest_close(&nic, net);
        close(fds[0]);
        close(fds[1]);
    }
}

/* A thread that has enough to do for ever still lets the loop have the plane. */
TEST(a_thread_gives_way_at_once)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new("net-budget", &error);
    struct nic_driver nic;
    nic_driver_open(&nic, net, F_CSUM | F_HOST_TSO4, 256, 1);
    struct fake_end *peer = fake_end_new(net, 0);
    CHECK_EQ(aiokvm_net_link(nic.end, &peer->end), 0);
    static uint8_t data[AIOKVM_NET_MAX_FRAME];
    struct virtio_net_hdr_v1 hdr;
    uint32_t size = make(data, &hdr, 60000, 1);
    for (uint32_t i = 0; i < BATCH; i++)
        CHECK(nic_driver_send(&nic, 0, i, &hdr, data, size) >= 0);
    nic_driver_kick(&nic, 1, true);
    struct aiokvm_net_stats stats;
    uint64_t calls = 0;
    do {
        aiokvm_net_end_stats(nic.end, &stats);
        calls++;
    } while (stats.sent_frames < 8);
    /* Each frame has 60,000 pieces: without giving way there are a few calls a frame. */
    CHECK(calls > 8 * 20);
    aiokvm_net_free(net);
    nic_driver_close(&nic);
}
