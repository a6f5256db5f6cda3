/* Frames over datagram sockets. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"
#include "net_datagram.h"
#include "net_fake.h"

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *end;
    struct fake_end *fake;
    int near, far; /* the end's socket, and the peer's */
};

static void set_up(struct world *world, int near, int far, const void *remote, uint32_t remote_size)
{
    int error = 0;
    world->near = near;
    world->far = far;
    world->net = aiokvm_net_new(NULL, &error);
    world->end = aiokvm_net_datagram_new(world->net, near, remote, remote_size, &error);
    CHECK_EQ(error, 0);
    world->fake = fake_end_new(world->net, 0);
    CHECK_EQ(aiokvm_net_link(world->end, &world->fake->end), 0);
    fake_end_serve(world->net);
}

static void set_up_pair(struct world *world, int type)
{
    int pair[2];
    CHECK_EQ(socketpair(AF_UNIX, type, 0, pair), 0);
    set_up(world, pair[0], pair[1], NULL, 0);
}

static void tear_down(struct world *world)
{
    aiokvm_net_free(world->net);
    close(world->near);
    if (world->far >= 0)
        close(world->far);
}

static struct aiokvm_net_stats stats(const struct world *world)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(world->end, &stats);
    return stats;
}

static void check_quiet(const struct world *world)
{
    struct pollfd fd = { .fd = aiokvm_net_fd(world->net), .events = POLLIN };
    fake_end_serve(world->net);
    CHECK_EQ(poll(&fd, 1, 0), 0);
}

static bool has_more(int fd)
{
    return poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, 0) == 1;
}

static void wait_for(int fd)
{
    CHECK_EQ(poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, PATIENCE_S * 1000), 1);
}

/* Serves until as many frames have come. */
static void await(const struct world *world, uint32_t received)
{
    while (world->fake->received < received) {
        struct pollfd fd = { .fd = aiokvm_net_fd(world->net), .events = POLLIN };
        CHECK_EQ(poll(&fd, 1, PATIENCE_S * 1000), 1);
        fake_end_serve(world->net);
    }
}

static int udp(struct sockaddr_in *address)
{
    socklen_t size = sizeof(*address);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    *address = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    CHECK_EQ(bind(fd, (struct sockaddr *)address, size), 0);
    CHECK_EQ(getsockname(fd, (struct sockaddr *)address, &size), 0);
    return fd;
}

static int named(struct sockaddr_un *address, const char *name)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    /* An abstract name: no file is left. */
    *address = (struct sockaddr_un){ .sun_family = AF_UNIX };
    snprintf(address->sun_path + 1, sizeof(address->sun_path) - 1, "aiokvm-%d-%s", (int)getpid(), name);
    CHECK_EQ(bind(fd, (struct sockaddr *)address, sizeof(*address)), 0);
    return fd;
}

static void exchange(struct world *world)
{
    uint8_t data[1514] = { 2 }, got[2000];
    for (uint32_t i = 0; i < 100; i++) {
        data[1] = (uint8_t)i;
        CHECK_EQ(send(world->far, data, sizeof(data) - i, MSG_NOSIGNAL), sizeof(data) - i);
        await(world, 1);
        CHECK_EQ(world->fake->frames[0].size, sizeof(data) - i);
        CHECK(!memcmp(world->fake->frames[0].data, data, sizeof(data) - i));
        fake_end_clear(world->fake);
        CHECK_EQ(fake_end_send(world->fake, NULL, data, sizeof(data) - i), NET_TAKEN);
        fake_end_serve(world->net);
        CHECK_EQ(recv(world->far, got, sizeof(got), 0), sizeof(data) - i);
        CHECK(!memcmp(got, data, sizeof(data) - i));
    }
}

TEST(frames_go_both_ways)
{
    static const int TYPES[] = { SOCK_DGRAM, SOCK_SEQPACKET };
    struct world world;
    for (size_t i = 0; i < LENGTH(TYPES); i++) {
        set_up_pair(&world, TYPES[i]);
        exchange(&world);
        tear_down(&world);
    }
    struct sockaddr_in near, far;
    int near_fd = udp(&near), far_fd = udp(&far);
    CHECK_EQ(connect(far_fd, (struct sockaddr *)&near, sizeof(near)), 0);
    set_up(&world, near_fd, far_fd, &far, sizeof(far));
    exchange(&world);
    tear_down(&world);
}

TEST(datagrams_that_are_no_frames_are_dropped)
{
    struct world world;
    set_up_pair(&world, SOCK_DGRAM);
    static uint8_t data[AIOKVM_NET_MAX_FRAME + 1000] = { 2 };
    static const uint32_t SIZES[] = { 0, 1, 13, AIOKVM_NET_MAX_FRAME + 1, sizeof(data) };
    int most = 1 << 20;
    CHECK_EQ(setsockopt(world.far, SOL_SOCKET, SO_SNDBUF, &most, sizeof(most)), 0);
    for (size_t i = 0; i < LENGTH(SIZES); i++) {
        CHECK_EQ(send(world.far, data, SIZES[i], 0), SIZES[i]);
        fake_end_serve(world.net);
        CHECK_EQ(stats(&world).dropped_invalid, i + 1);
    }
    CHECK_EQ(send(world.far, data, AIOKVM_NET_MAX_FRAME, 0), AIOKVM_NET_MAX_FRAME);
    await(&world, 1);
    CHECK_EQ(world.fake->frames[0].size, AIOKVM_NET_MAX_FRAME);
    check_quiet(&world);
    tear_down(&world);
}

TEST(a_peer_that_stalls_holds_up_and_nothing_is_lost)
{
    struct world world;
    set_up_pair(&world, SOCK_DGRAM);
    uint8_t data[1514] = { 2 }, got[2000];
    uint32_t sent = 0, taken = 0;
    do {
        memcpy(data, &sent, sizeof(sent));
        CHECK(sent < 10000);
    } while (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_TAKEN && ++sent);
    fake_end_serve(world.net);
    CHECK(!world.fake->resumed);
    for (uint32_t first = sent; taken < 5 * first; taken++) {
        uint32_t number;
        CHECK_EQ(recv(world.far, got, sizeof(got), 0), sizeof(data));
        memcpy(&number, got, sizeof(number));
        CHECK_EQ(number, taken);
        fake_end_serve(world.net);
        while (world.fake->resumed) {
            memcpy(data, &sent, sizeof(sent));
            if (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_BLOCKED)
                world.fake->resumed = false;
            else
                sent++;
        }
    }
    CHECK_EQ(stats(&world).dropped_full + stats(&world).dropped_down, 0);
    tear_down(&world);
}

TEST(a_named_peer_that_stalls_holds_up_too)
{
    struct world world;
    struct sockaddr_un near, far;
    int near_fd = named(&near, "near"), far_fd = named(&far, "far");
    set_up(&world, near_fd, far_fd, &far, sizeof(far));
    uint8_t data[60] = { 2 }, got[64];
    uint32_t sent = 0, taken = 0;
    while (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_TAKEN)
        CHECK(++sent < 10000);
    for (uint32_t first = sent; taken < 5 * first; taken++) {
        wait_for(far_fd);
        uint32_t number;
        CHECK_EQ(recv(far_fd, got, sizeof(got), 0), sizeof(data));
        memcpy(&number, got + 20, sizeof(number));
        CHECK(taken < first || number == taken);
        while (sent < 5 * first && (taken + 64 > sent || world.fake->resumed)) {
            memcpy(data + 20, &sent, sizeof(sent));
            if (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_TAKEN) {
                sent++;
                continue;
            }
            world.fake->resumed = false;
            break;
        }
        fake_end_serve(world.net);
        /* Only time brings more. */
        while (taken + 1 < sent && !has_more(far_fd)) {
            wait_for(aiokvm_net_fd(world.net));
            fake_end_serve(world.net);
        }
    }
    CHECK_EQ(stats(&world).dropped_full + stats(&world).dropped_down, 0);
    tear_down(&world);
}

TEST(what_the_receiver_does_not_take_waits)
{
    struct world world;
    set_up_pair(&world, SOCK_DGRAM);
    uint8_t data[60] = { 2 };
    uint32_t wakes = 0;
    world.fake->blocks = true;
    for (uint8_t i = 0; i < 10; i++) {
        data[5] = i;
        CHECK_EQ(send(world.far, data, sizeof(data), 0), sizeof(data));
        wakes += fake_end_woken(world.net);
    }
    /* One for the first, one says that there are more. */
    CHECK_EQ(wakes, 2);
    fake_end_unblock(world.fake);
    await(&world, 10);
    for (uint8_t i = 0; i < 10; i++)
        CHECK_EQ(world.fake->frames[i].data[5], i);
    tear_down(&world);
}

TEST(a_peer_that_is_not_there_is_no_error)
{
    uint8_t data[60] = { 2 };
    struct world world;
    /* UDP: its port says so. */
    struct sockaddr_in near, far;
    int near_fd = udp(&near);
    close(udp(&far));
    set_up(&world, near_fd, -1, &far, sizeof(far));
    for (int i = 0; i < 10; i++) {
        CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
        check_quiet(&world);
    }
    world.far = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(bind(world.far, (struct sockaddr *)&far, sizeof(far)), 0);
    CHECK_EQ(connect(world.far, (struct sockaddr *)&near, sizeof(near)), 0);
    exchange(&world);
    tear_down(&world);
    /* A name: it is not there yet; comes; goes; comes back. */
    struct sockaddr_un near_name, far_name;
    near_fd = named(&near_name, "near");
    close(named(&far_name, "far"));
    set_up(&world, near_fd, -1, &far_name, sizeof(far_name));
    for (uint32_t round = 0; round < 3; round++) {
        uint64_t dropped = stats(&world).dropped_down;
        CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
        CHECK_EQ(stats(&world).dropped_down, dropped + 1);
        check_quiet(&world);
        world.far = named(&far_name, "far");
        CHECK_EQ(connect(world.far, (struct sockaddr *)&near_name, sizeof(near_name)), 0);
        exchange(&world);
        close(world.far);
        world.far = -1;
        check_quiet(&world);
    }
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(world.net, &news), 0);
    tear_down(&world);
}

TEST(a_peer_of_a_pair_that_closes_is_gone)
{
    static const int TYPES[] = { SOCK_DGRAM, SOCK_SEQPACKET };
    for (size_t i = 0; i < LENGTH(TYPES); i++) {
        struct world world;
        struct aiokvm_net_news news;
        uint8_t data[60] = { 2 };
        set_up_pair(&world, TYPES[i]);
        close(world.far);
        world.far = -1;
        fake_end_serve(world.net);
        for (int j = 0; j < 3; j++)
            CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
        CHECK_EQ(aiokvm_net_take(world.net, &news), 1);
        CHECK_EQ(news.news, AIOKVM_NET_NEWS_CLOSED);
        CHECK_EQ(news.error, 0);
        CHECK_EQ(aiokvm_net_take(world.net, &news), 0);
        CHECK_EQ(stats(&world).dropped_down, 3);
        check_quiet(&world);
        tear_down(&world);
    }
}

TEST(only_datagram_sockets_will_do)
{
    int error = 0, pair[2], pipes[2];
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    CHECK(!aiokvm_net_datagram_new(net, pair[0], NULL, 0, &error));
    CHECK_EQ(error, EPROTOTYPE);
    CHECK_EQ(pipe(pipes), 0);
    CHECK(!aiokvm_net_datagram_new(net, pipes[0], NULL, 0, &error));
    CHECK_EQ(error, ENOTSOCK);
    CHECK(!aiokvm_net_datagram_new(net, -1, NULL, 0, &error));
    CHECK_EQ(error, EBADF);
    for (int i = 0; i < 2; i++) {
        close(pair[i]);
        close(pipes[i]);
    }
    aiokvm_net_free(net);
}

TEST(millions_of_frames_leave_nothing_behind)
{
    struct world world;
    set_up_pair(&world, SOCK_SEQPACKET);
    enum { FRAMES = 500000, BATCH = 50 };
    uint8_t data[60] = { 2 }, got[64];
    for (int i = 0; i < FRAMES / BATCH; i++) {
        for (int j = 0; j < BATCH; j++)
            CHECK_EQ(send(world.far, data, sizeof(data), 0), sizeof(data));
        fake_end_serve(world.net);
        CHECK_EQ(world.fake->received, BATCH);
        fake_end_clear(world.fake);
        CHECK(net_enter(world.net));
        for (int j = 0; j < BATCH; j++) {
            uint8_t head[NET_HEAD];
            struct iovec iov[3], from = { data, sizeof(data) };
            struct net_frame frame = { 0 };
            net_frame_set(&frame, iov + 1, head, &from, 1, 0);
            CHECK_EQ(net_send(&world.fake->end, &frame), NET_TAKEN);
        }
        net_leave(world.net);
        for (int j = 0; j < BATCH; j++)
            CHECK_EQ(recv(world.far, got, sizeof(got), 0), sizeof(data));
    }
    CHECK_EQ(stats(&world).sent_frames, FRAMES);
    CHECK_EQ(stats(&world).received_frames, FRAMES);
    tear_down(&world);
}
