/* Frames over stream sockets: a well-behaved peer, and those that are not. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "net_fake.h"
#include "net_stream.h"

struct world {
    struct aiokvm_net *net;
    struct aiokvm_net_end *end;
    struct fake_end *fake;
    int near, far; /* the end's socket, and the peer's */
};

static void set_up_with(struct world *world, const char *thread)
{
    int error = 0, pair[2];
    world->net = aiokvm_net_new(thread, &error);
    world->end = aiokvm_net_stream_new(world->net, &error);
    CHECK_EQ(error, 0);
    world->fake = fake_end_new(world->net, 0);
    CHECK_EQ(aiokvm_net_link(world->end, &world->fake->end), 0);
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    world->near = pair[0];
    world->far = pair[1];
    CHECK_EQ(aiokvm_net_stream_attach(world->end, world->near), 0);
    CHECK_EQ(aiokvm_net_stream_attach(world->end, world->near), -EBUSY);
    fake_end_serve(world->net);
}

static void set_up(struct world *world)
{
    set_up_with(world, NULL);
}

static void tear_down(struct world *world)
{
    aiokvm_net_free(world->net);
    close(world->near);
    close(world->far);
}

static struct aiokvm_net_stats stats(const struct world *world)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(world->end, &stats);
    return stats;
}

static void put(int fd, const void *data, size_t size)
{
    CHECK_EQ(send(fd, data, size, MSG_NOSIGNAL), size);
}

static uint32_t framed(uint8_t *to, const void *data, uint32_t size)
{
    uint32_t prefix = htonl(size);
    memcpy(to, &prefix, sizeof(prefix));
    memcpy(to + sizeof(prefix), data, size);
    return size + (uint32_t)sizeof(prefix);
}

static void fill(uint8_t *data, uint32_t size, uint32_t seed)
{
    for (uint32_t i = 0; i < size; i++)
        data[i] = (uint8_t)(i * 7 + seed);
}

static struct aiokvm_net_news closed(const struct world *world)
{
    struct aiokvm_net_news news = { 0 };
    CHECK_EQ(aiokvm_net_take(world->net, &news), 1);
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_CLOSED);
    CHECK_EQ(news.end, aiokvm_net_end_id(world->end));
    struct aiokvm_net_news none;
    CHECK_EQ(aiokvm_net_take(world->net, &none), 0);
    /* Nothing is left that wakes anybody. */
    struct pollfd fd = { .fd = aiokvm_net_fd(world->net), .events = POLLIN };
    fake_end_serve(world->net);
    CHECK_EQ(poll(&fd, 1, 0), 0);
    return news;
}

TEST(frames_go_both_ways)
{
    struct world world;
    set_up(&world);
    static const uint32_t SIZES[] = { 14, 60, 1514, 9216, AIOKVM_NET_MAX_FRAME };
    static uint8_t data[AIOKVM_NET_MAX_FRAME], wire[AIOKVM_NET_MAX_FRAME + 4], got[AIOKVM_NET_MAX_FRAME + 4];
    for (size_t i = 0; i < LENGTH(SIZES); i++) {
        fill(data, SIZES[i], (uint32_t)i);
        uint32_t size = framed(wire, data, SIZES[i]);
        put(world.far, wire, size);
        fake_end_serve(world.net);
        CHECK_EQ(world.fake->received, 1);
        CHECK_EQ(world.fake->frames[0].size, SIZES[i]);
        CHECK(!memcmp(world.fake->frames[0].data, data, SIZES[i]));
        fake_end_clear(world.fake);
        CHECK_EQ(fake_end_send(world.fake, NULL, data, SIZES[i]), NET_TAKEN);
        fake_end_serve(world.net);
        CHECK_EQ(recv(world.far, got, size, MSG_WAITALL), size);
        CHECK(!memcmp(got, wire, size));
    }
    tear_down(&world);
}

TEST(pieces_of_any_size_make_frames)
{
    struct world world;
    set_up(&world);
    uint8_t data[200], wire[4 * 204];
    uint32_t size = 0, count = 0;
    for (uint32_t i = 0; i < 4; i++) {
        fill(data, 50 * (i + 1), i);
        size += framed(wire + size, data, 50 * (i + 1));
    }
    for (uint32_t step = 1; step <= size; step++) {
        for (uint32_t at = 0; at < size; at += step) {
            put(world.far, wire + at, step < size - at ? step : size - at);
            fake_end_serve(world.net);
        }
        CHECK_EQ(world.fake->received, 4);
        for (uint32_t i = 0; i < 4; i++) {
            fill(data, 50 * (i + 1), i);
            CHECK_EQ(world.fake->frames[i].size, 50 * (i + 1));
            CHECK(!memcmp(world.fake->frames[i].data, data, 50 * (i + 1)));
        }
        fake_end_clear(world.fake);
        count += 4;
    }
    CHECK_EQ(stats(&world).sent_frames, count);
    tear_down(&world);
}

TEST(a_peer_that_stalls_holds_up_and_nothing_is_lost)
{
    struct world world;
    set_up(&world);
    static uint8_t data[9000], got[9004];
    uint32_t sent = 0;
    for (;; sent++) {
        fill(data, sizeof(data), sent);
        if (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_BLOCKED)
            break;
        CHECK(sent < 1000);
    }
    fake_end_serve(world.net);
    CHECK(!world.fake->resumed);
    CHECK(sent > 0);
    uint32_t first = sent;
    for (uint32_t i = 0; i < 5 * first; i++) {
        CHECK_EQ(recv(world.far, got, sizeof(got), MSG_WAITALL), sizeof(got));
        fill(data, sizeof(data), i);
        CHECK(!memcmp(got + 4, data, sizeof(data)));
        fake_end_serve(world.net);
        while (world.fake->resumed) {
            fill(data, sizeof(data), sent);
            if (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_BLOCKED)
                world.fake->resumed = false;
            else
                sent++;
        }
    }
    CHECK(sent > 5 * first);
    tear_down(&world);
}

TEST(what_the_receiver_does_not_take_waits)
{
    struct world world;
    set_up(&world);
    uint8_t data[60], wire[64];
    world.fake->blocks = true;
    uint32_t wakes = 0;
    for (uint32_t i = 0; i < 10; i++) {
        fill(data, sizeof(data), i);
        put(world.far, wire, framed(wire, data, sizeof(data)));
        wakes += fake_end_woken(world.net);
    }
    CHECK_EQ(world.fake->received, 0);
    /* One for the first, one says that there are more. */
    CHECK_EQ(wakes, 2);
    fake_end_unblock(world.fake);
    fake_end_serve(world.net);
    CHECK_EQ(world.fake->received, 10);
    for (uint32_t i = 0; i < 10; i++)
        CHECK_EQ(world.fake->frames[i].data[0], i);
    tear_down(&world);
}

TEST(frames_that_are_too_short_are_dropped)
{
    struct world world;
    set_up(&world);
    uint8_t data[60] = { 9 }, wire[64];
    for (uint32_t size = 1; size < AIOKVM_NET_MIN_FRAME; size++)
        put(world.far, wire, framed(wire, data, size));
    put(world.far, wire, framed(wire, data, sizeof(data)));
    fake_end_serve(world.net);
    CHECK_EQ(world.fake->received, 1);
    CHECK_EQ(stats(&world).dropped_invalid, AIOKVM_NET_MIN_FRAME - 1);
    tear_down(&world);
}

TEST(lengths_that_no_frame_has_end_the_connection)
{
    static const uint32_t LENGTHS[] = { 0, AIOKVM_NET_MAX_FRAME + 1, 1 << 20, UINT32_MAX };
    for (size_t i = 0; i < LENGTH(LENGTHS); i++) {
        struct world world;
        set_up(&world);
        uint8_t data[60] = { 9 }, wire[200];
        uint32_t prefix = htonl(LENGTHS[i]), size = framed(wire, data, sizeof(data));
        memcpy(wire + size, &prefix, 4);
        put(world.far, wire, size + 4);
        fake_end_serve(world.net);
        CHECK_EQ(world.fake->received, 1);
        struct aiokvm_net_news news = closed(&world);
        CHECK_EQ(news.error, EMSGSIZE);
        CHECK_EQ(news.detail, LENGTHS[i]);
        CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
        CHECK_EQ(stats(&world).dropped_down, 1);
        tear_down(&world);
    }
}

TEST(a_peer_that_closes_is_noticed_and_may_come_back)
{
    struct world world;
    set_up(&world);
    uint8_t data[60] = { 9 }, wire[64];
    uint32_t size = framed(wire, data, sizeof(data));
    for (uint32_t cut = 0; cut <= size; cut++) {
        put(world.far, wire, cut);
        close(world.far);
        fake_end_serve(world.net);
        CHECK_EQ(closed(&world).error, cut == 0 || cut == size ? 0 : ENODATA);
        CHECK_EQ(world.fake->received, cut == size ? 1 : 0);
        close(world.near);
        int pair[2];
        CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
        world.near = pair[0];
        world.far = pair[1];
        CHECK_EQ(aiokvm_net_stream_attach(world.end, world.near), 0);
    }
    /* When it was the sender that notices. */
    close(world.far);
    CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
    CHECK_EQ(closed(&world).error, EPIPE);
    world.far = -1;
    tear_down(&world);
}

TEST(a_stalled_sender_goes_on_when_the_connection_is_lost)
{
    struct world world;
    set_up(&world);
    static uint8_t data[9000], got[9004];
    uint32_t sent = 0, arrived = 0;
    for (; fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_TAKEN; sent++)
        fake_end_serve(world.net);
    CHECK(!world.fake->resumed);
    /* Some are read, so that what waits begins in the middle of a frame, and has been moved. */
    for (; arrived < 20; arrived++) {
        CHECK_EQ(recv(world.far, got, sizeof(got), MSG_WAITALL), sizeof(got));
        fake_end_serve(world.net);
        while (fake_end_send(world.fake, NULL, data, sizeof(data)) == NET_TAKEN)
            sent++;
    }
    world.fake->resumed = false;
    while (recv(world.far, got, sizeof(got), MSG_DONTWAIT | MSG_WAITALL) == sizeof(got))
        arrived++;
    close(world.far);
    fake_end_serve(world.net);
    CHECK(world.fake->resumed);
    /* Each has arrived or is counted. */
    CHECK_EQ(stats(&world).received_frames, sent);
    CHECK_EQ(arrived + stats(&world).dropped_down, sent);
    CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
    world.far = -1;
    tear_down(&world);
}

/* Sends garbage of any kind, in pieces of any size. */
TEST(garbage_does_no_harm)
{
    uint64_t state = 42;
    for (int round = 0; round < 200; round++) {
        struct world world;
        set_up(&world);
        for (int i = 0; i < 20; i++) {
            uint8_t wire[3000];
            uint32_t size = 1 + random_below(&state, sizeof(wire) - 1);
            for (uint32_t at = 0; at < size; at++)
                wire[at] = (uint8_t)random_below(&state, 256);
            uint32_t prefix = htonl(random_below(&state, 2000));
            if (size > 4 && random_below(&state, 4))
                memcpy(wire, &prefix, 4);
            if (send(world.far, wire, size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
                break;
            world.fake->blocks = random_below(&state, 3) == 0;
            fake_end_serve(world.net);
            fake_end_unblock(world.fake);
            fake_end_serve(world.net);
            fake_end_clear(world.fake);
        }
        tear_down(&world);
    }
}

/* What a busy guest exchanges in an hour: nothing grows, nothing is lost. */
TEST(millions_of_frames_leave_nothing_behind)
{
    struct world world;
    set_up(&world);
    enum { FRAMES = 2000000, BATCH = 200 };
    static uint8_t data[60], wire[BATCH * 64], got[BATCH * 64];
    uint32_t size = 0;
    for (int i = 0; i < BATCH; i++)
        size += framed(wire + size, data, sizeof(data));
    for (int i = 0; i < FRAMES / BATCH; i++) {
        put(world.far, wire, size);
        fake_end_serve(world.net);
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
        fake_end_serve(world.net);
        CHECK_EQ(recv(world.far, got, size, MSG_WAITALL), size);
    }
    CHECK_EQ(stats(&world).sent_frames, FRAMES);
    CHECK_EQ(stats(&world).received_frames, FRAMES);
    CHECK(!memcmp(got, wire, size));
    tear_down(&world);
}

TEST(a_thread_serves_while_others_call)
{
    struct world world;
    set_up_with(&world, "net-stream");
    uint8_t data[60] = { 9 }, wire[64], got[64];
    uint32_t size = framed(wire, data, sizeof(data));
    for (uint32_t i = 0; i < 2000; i++) {
        put(world.far, wire, size);
        CHECK_EQ(fake_end_send(world.fake, NULL, data, sizeof(data)), NET_TAKEN);
        CHECK_EQ(recv(world.far, got, size, MSG_WAITALL), size);
        aiokvm_net_set_up(world.end, 1);
    }
    CHECK_SOON(stats(&world).sent_frames == 2000);
    /* Connections that come and go. */
    for (int i = 0; i < 200; i++) {
        struct aiokvm_net_news news;
        close(world.far);
        CHECK_SOON(aiokvm_net_take(world.net, &news) == 1);
        close(world.near);
        int pair[2];
        CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
        world.near = pair[0];
        world.far = pair[1];
        CHECK_EQ(aiokvm_net_stream_attach(world.end, world.near), 0);
        put(world.far, wire, size);
        CHECK_SOON(stats(&world).sent_frames == 2001 + (uint64_t)i);
    }
    tear_down(&world);
}

TEST(a_child_of_fork_leaves_the_connection_alone)
{
    struct world world;
    set_up(&world);
    uint8_t data[60] = { 9 }, wire[64];
    pid_t pid = fork();
    if (pid == 0) {
        bool right = aiokvm_net_stream_attach(world.end, world.near) == -EOWNERDEAD;
        aiokvm_net_free(world.net);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    put(world.far, wire, framed(wire, data, sizeof(data)));
    fake_end_serve(world.net);
    CHECK_EQ(world.fake->received, 1);
    tear_down(&world);
}
