/* TAP devices of the kernel, in a network namespace of this program's own. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <net/if_arp.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "fake_kvm.h"
#include "net_fake.h"
#include "net_tap.h"

enum { ALL = AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4 | AIOKVM_NET_OFFLOAD_TSO6 | AIOKVM_NET_OFFLOAD_USO |
             AIOKVM_NET_OFFLOAD_ECN };
static const char NAME[] = "tap0";
static const char ADDRESS[] = "10.77.0.1", PEER[] = "10.77.0.2";
static const uint8_t PEER_MAC[6] = { 2, 0, 0, 0, 0, 2 };

/* What makes a TAP say EAGAIN is a slow device behind a bridge: the linker sends writev here (--wrap=writev). */
static bool is_full;
ssize_t __wrap_writev(int fd, const struct iovec *iov, int count);
ssize_t __real_writev(int fd, const struct iovec *iov, int count);

ssize_t __wrap_writev(int fd, const struct iovec *iov, int count)
{
    if (!is_full)
        return __real_writev(fd, iov, count);
    errno = EAGAIN;
    return -1;
}

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *end;
    struct fake_end *fake;
    int fds[AIOKVM_NET_TAP_QUEUES];
    uint32_t count;
    int packet; /* sees the device from the kernel's side */
    int control;
};

static const char *no_tap(void)
{
    static bool is_unshared;
    if (access("/dev/net/tun", R_OK | W_OK) < 0)
        return "no access to /dev/net/tun";
    if (!is_unshared && unshare(CLONE_NEWNET) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0)
        return "no network namespace may be made";
    is_unshared = true;
    /* Or the kernel talks by itself. */
    int fd = open("/proc/sys/net/ipv6/conf/default/disable_ipv6", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        CHECK_EQ(write(fd, "1", 1), 1);
        close(fd);
    }
    return NULL;
}

static struct ifreq named(void)
{
    struct ifreq request = { 0 };
    memcpy(request.ifr_name, NAME, sizeof(NAME));
    return request;
}

static int open_tap(short flags)
{
    struct ifreq request = named();
    request.ifr_flags = flags;
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_EQ(ioctl(fd, TUNSETIFF, &request), 0);
    return fd;
}

static void set_if_up(int control, bool up)
{
    struct ifreq request = named();
    request.ifr_flags = up ? IFF_UP : 0;
    CHECK_EQ(ioctl(control, SIOCSIFFLAGS, &request), 0);
}

static void set_address(int control, unsigned long what, const char *address)
{
    struct ifreq request = named();
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = inet_addr(address) };
    memcpy(&request.ifr_addr, &in, sizeof(in));
    CHECK_EQ(ioctl(control, what, &request), 0);
}

static void set_neighbour(int control)
{
    struct arpreq request = { .arp_flags = ATF_COM | ATF_PERM };
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = inet_addr(PEER) };
    memcpy(&request.arp_pa, &in, sizeof(in));
    request.arp_ha.sa_family = ARPHRD_ETHER;
    memcpy(request.arp_ha.sa_data, PEER_MAC, sizeof(PEER_MAC));
    memcpy(request.arp_dev, NAME, sizeof(NAME));
    CHECK_EQ(ioctl(control, SIOCSARP, &request), 0);
}

static int open_packet(int control)
{
    struct ifreq request = named();
    CHECK_EQ(ioctl(control, SIOCGIFINDEX, &request), 0);
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = request.ifr_ifindex,
    };
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    CHECK_EQ(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_EQ(setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof(one)), 0);
    return fd;
}

static void set_up(struct world *world, short flags, uint32_t queues, uint32_t offloads)
{
    int error = 0;
    *world = (struct world){ .count = queues };
    for (uint32_t i = 0; i < queues; i++)
        world->fds[i] = open_tap((short)(IFF_TAP | IFF_NO_PI | flags | (queues > 1 ? IFF_MULTI_QUEUE : 0)));
    world->net = aiokvm_net_new(NULL, &error);
    world->end = aiokvm_net_tap_new(world->net, world->fds, queues, true, &error);
    CHECK_EQ(error, 0);
    world->fake = fake_end_new(world->net, offloads);
    CHECK_EQ(aiokvm_net_link(world->end, &world->fake->end), 0);
    world->control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    set_address(world->control, SIOCSIFADDR, ADDRESS);
    set_address(world->control, SIOCSIFNETMASK, "255.255.255.0");
    set_if_up(world->control, true);
    set_neighbour(world->control);
    world->packet = open_packet(world->control);
    fake_end_serve(world->net);
    fake_end_clear(world->fake);
}

static void tear_down(struct world *world)
{
    aiokvm_net_free(world->net);
    for (uint32_t i = 0; i < world->count; i++)
        close(world->fds[i]);
    close(world->packet);
    close(world->control);
}

static struct aiokvm_net_stats stats(const struct world *world)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(world->end, &stats);
    return stats;
}

static void wait_for(int fd, short events)
{
    struct pollfd poller = { .fd = fd, .events = events };
    CHECK_EQ(poll(&poller, 1, PATIENCE_S * 1000), 1);
}

static void await(const struct world *world, uint32_t received)
{
    while (world->fake->received < received) {
        wait_for(aiokvm_net_fd(world->net), POLLIN);
        fake_end_serve(world->net);
    }
}

static void put_ethernet(uint8_t *data, uint16_t type)
{
    memset(data, 0xff, 6);
    memcpy(data + 6, PEER_MAC, 6);
    data[12] = (uint8_t)(type >> 8);
    data[13] = (uint8_t)type;
}

/* What the kernel got, of this length; other than what it was told to expect fails. */
static void check_packet(const struct world *world, const uint8_t *data, uint32_t size)
{
    static uint8_t got[1 << 17];
    wait_for(world->packet, POLLIN);
    CHECK_EQ(recv(world->packet, got, sizeof(got), 0), size);
    CHECK(!memcmp(got, data, size));
}

static void send_raw(const struct world *world, const uint8_t *data, uint32_t size)
{
    CHECK_EQ(send(world->packet, data, size, 0), size);
}

static int udp(void)
{
    struct sockaddr_in peer = { .sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = inet_addr(PEER) };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&peer, sizeof(peer)), 0);
    return fd;
}

static uint32_t sum(const uint8_t *data, size_t size, uint32_t start)
{
    for (size_t i = 0; i < size; i++)
        start += (uint32_t)data[i] << (i % 2 ? 0 : 8);
    while (start >> 16)
        start = (start & 0xffff) + (start >> 16);
    return start;
}

/* Of UDP or TCP in IPv4 without options, its field included: 0xffff if it is right. */
static uint32_t transport_sum(const uint8_t *frame, uint32_t size)
{
    uint8_t pseudo[12] = { 0 };
    memcpy(pseudo, frame + 14 + 12, 8);
    pseudo[9] = frame[14 + 9];
    pseudo[10] = (uint8_t)((size - 34) >> 8);
    pseudo[11] = (uint8_t)(size - 34);
    return sum(frame + 34, size - 34, sum(pseudo, sizeof(pseudo), 0));
}

static uint32_t put_ip(uint8_t *data, uint8_t protocol, uint32_t size)
{
    struct iphdr ip = {
        .version = 4, .ihl = 5, .ttl = 64, .protocol = protocol, .tot_len = htons((uint16_t)(size - 14)),
        .saddr = inet_addr(PEER), .daddr = inet_addr(ADDRESS),
    };
    ip.check = htons((uint16_t)~sum((uint8_t *)&ip, sizeof(ip), 0));
    put_ethernet(data, ETH_P_IP);
    memcpy(data + 14, &ip, sizeof(ip));
    return size;
}

TEST(frames_go_both_ways)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    for (int headers = 0; headers < 2; headers++) {
        struct world world;
        set_up(&world, headers ? IFF_VNET_HDR : 0, 1, 0);
        uint8_t data[1514];
        for (uint32_t i = 0; i < 100; i++) {
            memset(data, (int)i, sizeof(data));
            put_ethernet(data, 0x88b5); /* for local experiments */
            send_raw(&world, data, sizeof(data) - i);
            await(&world, 1);
            CHECK_EQ(world.fake->frames[0].size, sizeof(data) - i);
            CHECK(!memcmp(world.fake->frames[0].data, data, sizeof(data) - i));
            fake_end_clear(world.fake);
            CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data) - i), NET_TAKEN);
            check_packet(&world, data, sizeof(data) - i);
        }
        CHECK_EQ(stats(&world).dropped_invalid, 0);
        tear_down(&world);
    }
}

TEST(the_kernel_computes_checksums_that_the_peer_does_not)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    CHECK_EQ(aiokvm_net_tap_offloads(world.end) & ~AIOKVM_NET_OFFLOAD_USO, ALL & ~AIOKVM_NET_OFFLOAD_USO);
    int fd = udp();
    uint8_t data[100] = { 7 };
    CHECK_EQ(send(fd, data, sizeof(data), 0), sizeof(data));
    await(&world, 1);
    CHECK_EQ(world.fake->frames[0].hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM, 0);
    CHECK_EQ(transport_sum(world.fake->frames[0].data, world.fake->frames[0].size), 0xffff);
    fake_end_clear(world.fake);
    /* The peer may change its mind. */
    CHECK(net_enter(world.net));
    world.fake->end.offloads = ALL;
    net_ready(world.end);
    net_leave(world.net);
    fake_end_serve(world.net);
    CHECK_EQ(send(fd, data, sizeof(data), 0), sizeof(data));
    await(&world, 1);
    CHECK_EQ(world.fake->frames[0].hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
    CHECK_EQ(world.fake->frames[0].hdr.csum_start, 34);
    CHECK_EQ(world.fake->frames[0].hdr.csum_offset, 6);
    close(fd);
    tear_down(&world);
}

/* TCP would need a handshake by hand; its segments take the same path. */
TEST(big_datagrams_come_whole_or_cut)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    bool has_uso = aiokvm_net_tap_offloads(world.end) & AIOKVM_NET_OFFLOAD_USO;
    int fd = udp(), segment = 1000;
    uint8_t data[10000] = { 7 };
    CHECK_EQ(setsockopt(fd, IPPROTO_UDP, 103 /* UDP_SEGMENT */, &segment, sizeof(segment)), 0);
    CHECK_EQ(send(fd, data, sizeof(data), 0), sizeof(data));
    await(&world, 10);
    CHECK_EQ(world.fake->frames[9].size, 42 + 1000);
    fake_end_clear(world.fake);
    CHECK(net_enter(world.net));
    world.fake->end.offloads = ALL;
    net_ready(world.end);
    net_leave(world.net);
    fake_end_serve(world.net);
    CHECK_EQ(send(fd, data, sizeof(data), 0), sizeof(data));
    await(&world, has_uso ? 1 : 10);
    if (has_uso) {
        CHECK_EQ(world.fake->frames[0].size, 42 + 10000);
        CHECK_EQ(world.fake->frames[0].hdr.gso_type, VIRTIO_NET_HDR_GSO_UDP_L4);
        CHECK_EQ(world.fake->frames[0].hdr.gso_size, 1000);
        CHECK_EQ(world.fake->frames[0].hdr.hdr_len, 42);
    }
    close(fd);
    tear_down(&world);
}

TEST(offloads_go_to_the_kernel)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(99), .sin_addr.s_addr = inet_addr(ADDRESS) };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(bind(fd, (struct sockaddr *)&here, sizeof(here)), 0);
    uint8_t data[14 + 20 + 8 + 100] = { 0 }, got[200];
    struct udphdr header = { .source = htons(9), .dest = htons(99), .len = htons(108) };
    memset(data, 5, sizeof(data));
    put_ip(data, IPPROTO_UDP, sizeof(data));
    memcpy(data + 34, &header, sizeof(header));
    /* The sum of the pseudo header is there, the rest is for the kernel. */
    uint8_t pseudo[12] = { 0 };
    memcpy(pseudo, data + 26, 8);
    pseudo[9] = IPPROTO_UDP;
    pseudo[11] = 108;
    uint32_t partial = sum(pseudo, sizeof(pseudo), 0);
    data[40] = (uint8_t)(partial >> 8);
    data[41] = (uint8_t)partial;
    struct virtio_net_hdr_v1 hdr = {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 34, .csum_offset = 6, .num_buffers = 7,
    };
    CHECK_EQ(fake_end_send(world.fake, &hdr, data, sizeof(data)), NET_TAKEN);
    wait_for(fd, POLLIN);
    CHECK_EQ(recv(fd, got, sizeof(got), 0), 100);
    CHECK(!memcmp(got, data + 42, 100));
    /* A header that the kernel does not believe. */
    hdr.csum_start = 60000;
    CHECK_EQ(fake_end_send(world.fake, &hdr, data, sizeof(data)), NET_TAKEN);
    CHECK_EQ(stats(&world).dropped_invalid, 1);
    close(fd);
    tear_down(&world);
}

/* Each change would take the kernel's lock of all interfaces. */
TEST(a_peer_that_changes_its_offloads_for_ever_costs_few_ioctls)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, ALL);
    fake_end_serve(world.net);
    fake_count(TUNSETOFFLOAD);
    uint64_t begin_ns = aiokvm_now_ns();
    for (uint32_t i = 0; i < 2000; i++) {
        CHECK(net_enter(world.net));
        world.fake->end.offloads = i & 1 ? ALL : 0;
        net_ready(world.end);
        net_leave(world.net);
        fake_end_serve(world.net);
    }
    uint64_t tenths = 1 + (aiokvm_now_ns() - begin_ns) / 100000000;
    CHECK(fake_counted() <= tenths);
    /* What holds in the end is told, without anything else that happens. */
    CHECK(net_enter(world.net));
    world.fake->end.offloads = 0;
    net_ready(world.end);
    net_leave(world.net);
    fake_end_serve(world.net);
    uint32_t before = fake_counted();
    if (world.end->deadline_ns) {
        wait_for(aiokvm_net_fd(world.net), POLLIN);
        fake_end_serve(world.net);
        CHECK_EQ(fake_counted(), before + 1);
    }
    CHECK_EQ(world.end->deadline_ns, 0);
    tear_down(&world);
}

TEST(frames_of_many_pieces_reach_the_kernel)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    static uint8_t data[9000], head[NET_HEAD];
    static struct iovec from[sizeof(data)], iov[LENGTH(from) + 2];
    struct ifreq request = named();
    request.ifr_mtu = 8986;
    CHECK_EQ(ioctl(world.control, SIOCSIFMTU, &request), 0);
    static const uint32_t PIECES[] = { 1, 2, 100, 1000, IOV_MAX - 2, IOV_MAX - 1, IOV_MAX, IOV_MAX + 1, 5000 };
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 7);
    put_ethernet(data, 0x88b5);
    for (size_t i = 0; i < LENGTH(PIECES); i++) {
        struct net_frame frame = { 0 };
        for (uint32_t j = 0; j < PIECES[i]; j++)
            from[j] = (struct iovec){ data + j, 1 };
        from[PIECES[i] - 1].iov_len = sizeof(data) - PIECES[i] + 1;
        net_frame_set(&frame, iov + 1, head, from, PIECES[i], 0);
        CHECK(net_enter(world.net));
        CHECK_EQ(net_send(&world.fake->end, &frame), NET_TAKEN);
        net_leave(world.net);
        check_packet(&world, data, sizeof(data));
    }
    tear_down(&world);
}

TEST(what_the_receiver_does_not_take_waits)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    uint8_t data[60] = { 0 };
    put_ethernet(data, 0x88b5);
    uint32_t wakes = 0;
    world.fake->blocks = true;
    for (uint8_t i = 0; i < 100; i++) {
        data[20] = i;
        send_raw(&world, data, sizeof(data));
        wakes += fake_end_woken(world.net);
    }
    CHECK_EQ(world.fake->received, 0);
    /* One for the first, one says that there are more. */
    CHECK_EQ(wakes, 2);
    fake_end_unblock(world.fake);
    await(&world, 100);
    for (uint8_t i = 0; i < 100; i++)
        CHECK_EQ(world.fake->frames[i].data[20], i);
    tear_down(&world);
}

TEST(queues_are_read_and_written_in_parallel)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 4, 0);
    uint8_t data[60] = { 0 };
    put_ethernet(data, 0x88b5);
    int sockets[64];
    uint32_t queues = 0;
    for (uint32_t i = 0; i < LENGTH(sockets); i++) {
        sockets[i] = udp();
        CHECK_EQ(send(sockets[i], data, sizeof(data), 0), sizeof(data));
    }
    await(&world, LENGTH(sockets));
    for (uint32_t i = 0; i < LENGTH(sockets); i++) {
        queues |= UINT32_C(1) << world.fake->frames[i].queue;
        close(sockets[i]);
    }
    CHECK_EQ(queues, 0xf);
    for (uint32_t i = 0; i < 8; i++) {
        uint8_t head[NET_HEAD];
        struct iovec iov[3], from = { data, sizeof(data) };
        struct net_frame frame = { .queue = i };
        net_frame_set(&frame, iov + 1, head, &from, 1, 0);
        CHECK(net_enter(world.net));
        CHECK_EQ(net_send(&world.fake->end, &frame), NET_TAKEN);
        net_leave(world.net);
        check_packet(&world, data, sizeof(data));
    }
    tear_down(&world);
}

TEST(a_device_that_is_full_blocks_and_resumes)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    uint8_t data[1514] = { 0 };
    put_ethernet(data, 0x88b5);
    is_full = true;
    CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_BLOCKED);
    fake_end_serve(world.net);
    CHECK(!world.fake->resumed);
    /* Whatever wakes it says that there is room. */
    is_full = false;
    send_raw(&world, data, sizeof(data));
    await(&world, 1);
    CHECK(world.fake->resumed);
    CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
    check_packet(&world, data, sizeof(data));
    tear_down(&world);
}

TEST(a_device_that_is_down_drops)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    uint8_t data[60] = { 0 };
    put_ethernet(data, 0x88b5);
    set_if_up(world.control, false);
    for (int i = 0; i < 10; i++)
        CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
    CHECK_EQ(stats(&world).dropped_down, 10);
    set_if_up(world.control, true);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(world.net, &news), 0);
    tear_down(&world);
}

static void delete_device(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        execlp("ip", "ip", "link", "del", NAME, NULL);
        _exit(127);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
}

static void check_lost(const struct world *world)
{
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(world->net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(world->end));
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_CLOSED);
    CHECK_EQ(news.error, ENODEV);
    CHECK_EQ(aiokvm_net_take(world->net, &news), 0);
    fake_end_serve(world->net);
    struct pollfd fd = { .fd = aiokvm_net_fd(world->net), .events = POLLIN };
    CHECK_EQ(poll(&fd, 1, 0), 0);
}

TEST(a_device_that_is_deleted_is_noticed_once)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    if (access("/usr/sbin/ip", X_OK) < 0 && access("/sbin/ip", X_OK) < 0)
        SKIP("no ip (package iproute2)");
    uint8_t data[60] = { 0 };
    put_ethernet(data, 0x88b5);
    for (uint32_t queues = 1; queues <= 4; queues += 3)
        for (int sends = 0; sends < 2; sends++) {
            struct world world;
            set_up(&world, IFF_VNET_HDR, queues, 0);
            /* One is on its way to the peer. */
            world.fake->blocks = true;
            send_raw(&world, data, sizeof(data));
            fake_end_serve(world.net);
            delete_device();
            if (sends) {
                world.fake->blocks = false;
                CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
                /* That one, and the one that waited. */
                CHECK_EQ(stats(&world).dropped_down, 2);
            } else {
                wait_for(aiokvm_net_fd(world.net), POLLIN);
                fake_end_serve(world.net);
            }
            check_lost(&world);
            CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
            fake_end_unblock(world.fake);
            fake_end_serve(world.net);
            tear_down(&world);
        }
}

TEST(only_taps_will_do)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    int error = 0, pipes[2];
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    CHECK_EQ(pipe(pipes), 0);
    CHECK(!aiokvm_net_tap_new(net, pipes, 1, true, &error));
    CHECK_EQ(error, ENOTTY);
    CHECK(!aiokvm_net_tap_new(net, pipes, 0, true, &error));
    CHECK_EQ(error, EINVAL);
    CHECK(!aiokvm_net_tap_new(net, pipes, AIOKVM_NET_TAP_QUEUES + 1, true, &error));
    CHECK_EQ(error, EINVAL);
    int tun = open_tap(IFF_TUN | IFF_NO_PI);
    CHECK(!aiokvm_net_tap_new(net, &tun, 1, true, &error));
    CHECK_EQ(error, EPROTOTYPE);
    close(tun);
    int fds[2] = { open_tap(IFF_TAP | IFF_NO_PI), pipes[0] };
    CHECK(!aiokvm_net_tap_new(net, fds, 2, true, &error));
    CHECK_EQ(error, ENOTTY);
    close(fds[0]);
    close(pipes[0]);
    close(pipes[1]);
    aiokvm_net_free(net);
}

TEST(many_frames_leave_nothing_behind)
{
    const char *why = no_tap();
    if (why)
        SKIP(why);
    struct world world;
    set_up(&world, IFF_VNET_HDR, 1, 0);
    uint8_t data[60] = { 0 };
    put_ethernet(data, 0x88b5);
    enum { FRAMES = 200000, BATCH = 50 };
    for (uint32_t i = 0; i < FRAMES / BATCH; i++) {
        for (int j = 0; j < BATCH; j++)
            send_raw(&world, data, sizeof(data));
        await(&world, BATCH);
        fake_end_clear(world.fake);
        for (int j = 0; j < BATCH; j++)
            CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
        for (int j = 0; j < BATCH; j++)
            check_packet(&world, data, sizeof(data));
    }
    CHECK_EQ(stats(&world).sent_frames, FRAMES);
    tear_down(&world);
}
