/* The program as the peer: what it takes and what it sends. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "net_fake.h"
#include "net_port.h"

enum { BYTES = 128 << 10 };

struct bench {
    struct aiokvm_net *net;
    struct aiokvm_net_end *port;
    struct fake_end *peer;
};

static struct bench setup(uint32_t depth, uint64_t bytes, bool drop)
{
    int error = 0;
    struct bench bench = { .net = aiokvm_net_new(NULL, &error) };
    const struct aiokvm_net_port_config config = { .depth = depth, .bytes = bytes, .drop = drop };
    CHECK(bench.net);
    bench.port = aiokvm_net_port_new(bench.net, &config, &error);
    CHECK(bench.port);
    bench.peer = fake_end_new(bench.net, 0);
    CHECK_EQ(aiokvm_net_link(bench.port, &bench.peer->end), 0);
    return bench;
}

static const uint8_t *data(uint8_t seed, uint32_t size)
{
    static uint8_t bytes[AIOKVM_NET_MAX_FRAME];
    for (uint32_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(seed + i * 3);
    return bytes;
}

static enum net_result give(struct bench *bench, uint8_t seed, uint32_t size)
{
    return fake_end_send(bench->peer, NULL, data(seed, size), size);
}

/* Whether the program has been told since it asked last. */
static uint32_t news(struct bench *bench)
{
    struct aiokvm_net_news news;
    return aiokvm_net_take(bench->net, &news) ? news.news : 0;
}

static struct aiokvm_net_stats stats(struct bench *bench)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(bench->port, &stats);
    return stats;
}

TEST(what_cannot_be_is_not_made)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    const struct aiokvm_net_port_config configs[] = {
        { .depth = 0, .bytes = BYTES },
        { .depth = AIOKVM_NET_PORT_MAX_DEPTH + 1, .bytes = BYTES },
        { .depth = 1, .bytes = AIOKVM_NET_MAX_FRAME - 1 },
        { .depth = 1, .bytes = UINT64_C(1) << 40 },
    };
    for (size_t i = 0; i < LENGTH(configs); i++) {
        error = 0;
        CHECK(!aiokvm_net_port_new(net, &configs[i], &error));
        CHECK_EQ(error, EINVAL);
    }
    aiokvm_net_free(net);
}

TEST(frames_are_taken_in_batches)
{
    struct bench bench = setup(8, BYTES, false);
    struct aiokvm_net_port_batch batch;
    CHECK_EQ(aiokvm_net_port_take(bench.port, 4, &batch), 0);
    CHECK_EQ(news(&bench), 0);
    for (uint8_t i = 0; i < 6; i++)
        CHECK_EQ(give(&bench, i, 60 + i), NET_TAKEN);
    CHECK_EQ(news(&bench), AIOKVM_NET_NEWS_READABLE);
    CHECK_EQ(news(&bench), 0);
    CHECK_EQ(aiokvm_net_port_take(bench.port, 4, &batch), 4);
    CHECK_EQ(batch.special, 0);
    uint32_t begin = 0;
    for (uint8_t i = 0; i < 4; i++) {
        CHECK_EQ(batch.ends[i] - begin, 60 + i);
        CHECK(!memcmp(batch.data + begin, data(i, 60 + i), 60 + i));
        begin = batch.ends[i];
    }
    aiokvm_net_port_release(bench.port, 4);
    CHECK_EQ(aiokvm_net_port_take(bench.port, 4, &batch), 2);
    CHECK(!memcmp(batch.data, data(4, 64), 64));
    aiokvm_net_port_release(bench.port, 2);
    /* It has not asked in vain: it looks again by itself. */
    CHECK_EQ(give(&bench, 9, 60), NET_TAKEN);
    CHECK_EQ(news(&bench), 0);
    CHECK_EQ(aiokvm_net_port_take(bench.port, 4, &batch), 1);
    aiokvm_net_port_release(bench.port, 1);
    aiokvm_net_free(bench.net);
}

TEST(a_peer_waits_for_the_program)
{
    struct bench bench = setup(4, BYTES, false);
    struct aiokvm_net_port_batch batch;
    for (uint8_t i = 0; i < 4; i++)
        CHECK_EQ(give(&bench, i, 60), NET_TAKEN);
    CHECK_EQ(give(&bench, 4, 60), NET_BLOCKED);
    CHECK_EQ(aiokvm_net_port_take(bench.port, 1, &batch), 1);
    CHECK(!bench.peer->resumed);
    aiokvm_net_port_release(bench.port, 1);
    CHECK(!bench.peer->resumed);
    CHECK_EQ(aiokvm_net_port_take(bench.port, 1, &batch), 1);
    aiokvm_net_port_release(bench.port, 1);
    CHECK(bench.peer->resumed);
    CHECK_EQ(give(&bench, 4, 60), NET_TAKEN);
    CHECK_EQ(stats(&bench).dropped_full, 0);
    aiokvm_net_free(bench.net);
}

TEST(or_frames_are_dropped)
{
    struct bench bench = setup(4, BYTES, true);
    for (uint8_t i = 0; i < 10; i++)
        CHECK_EQ(give(&bench, i, 60), NET_TAKEN);
    CHECK_EQ(stats(&bench).dropped_full, 6);
    struct aiokvm_net_port_batch batch;
    CHECK_EQ(aiokvm_net_port_take(bench.port, 10, &batch), 4);
    CHECK(!memcmp(batch.data + 180, data(3, 60), 60));
    aiokvm_net_free(bench.net);
}

/* Whatever sizes come and however they are taken: all come out, in order and whole. */
TEST(a_ring_of_bytes_loses_nothing)
{
    struct bench bench = setup(50, 100000, false);
    uint64_t random = 77;
    uint32_t given = 0, taken = 0, blocked = 0;
    while (taken < 20000) {
        uint32_t size = 14 + random_below(&random, given % 7 ? 3000 : AIOKVM_NET_MAX_FRAME - 13);
        for (uint32_t i = random_below(&random, 40); i && given < 20000; i--) {
            /* What it is follows from its number. */
            uint64_t state = given + 1;
            size = 14 + random_below(&state, given % 7 ? 3000 : AIOKVM_NET_MAX_FRAME - 13);
            if (give(&bench, (uint8_t)given, size) == NET_BLOCKED) {
                blocked++;
                break;
            }
            given++;
        }
        struct aiokvm_net_port_batch batch;
        int count = aiokvm_net_port_take(bench.port, 1 + random_below(&random, 30), &batch);
        uint32_t begin = 0;
        for (int i = 0; i < count; i++) {
            uint64_t state = taken + 1;
            size = 14 + random_below(&state, taken % 7 ? 3000 : AIOKVM_NET_MAX_FRAME - 13);
            CHECK_EQ(batch.ends[i] - begin, size);
            CHECK(!memcmp(batch.data + begin, data((uint8_t)taken, size), size));
            begin = batch.ends[i];
            taken++;
        }
        aiokvm_net_port_release(bench.port, (uint32_t)count);
    }
    CHECK(blocked > 100);
    aiokvm_net_free(bench.net);
}

static uint64_t used_bytes(void)
{
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES), &state);
    return state.used;
}

static uint32_t flood(struct bench *bench, uint32_t size)
{
    uint32_t given = 0;
    while (given < 1000 && give(bench, (uint8_t)given, size) == NET_TAKEN)
        given++;
    return given;
}

static void take_all(struct bench *bench, uint32_t size)
{
    struct aiokvm_net_port_batch batch;
    for (int count; (count = aiokvm_net_port_take(bench->port, 256, &batch)); ) {
        for (int i = 0; i < count; i++)
            CHECK_EQ(batch.ends[i] - (i ? batch.ends[i - 1] : 0), size);
        aiokvm_net_port_release(bench->port, (uint32_t)count);
    }
}

TEST(a_port_that_is_flooded_leaves_what_another_needs)
{
    struct bench benches[2];
    for (int i = 0; i < 2; i++)
        benches[i] = setup(1000, 8 << 20, i);
    CHECK_EQ(used_bytes(), 4 * NET_ROOM_STEP);
    struct aiokvm_share *others = fake_share_leaving(AIOKVM_BUDGET_FRAME_BYTES, 3 << 20);
    /* A third of what there was. */
    uint32_t given = flood(&benches[0], 10000);
    CHECK(given > 90 && given < 130);
    CHECK_EQ(give(&benches[0], 0, 10000), NET_BLOCKED);
    /* What is without room is counted where it is dropped. */
    CHECK_EQ(flood(&benches[1], 10000), 1000);
    CHECK(stats(&benches[1]).dropped_full > 1000 - given && stats(&benches[1]).dropped_full < 970);
    take_all(&benches[0], 10000);
    CHECK(benches[0].peer->resumed);
    /* The ring is as large as what it has got: round and round. */
    for (int i = 0; i < 10; i++) {
        CHECK(flood(&benches[0], 10000) > 40);
        take_all(&benches[0], 10000);
    }
    aiokvm_share_free(others);
    for (int i = 0; i < 2; i++)
        aiokvm_net_free(benches[i].net);
    CHECK_EQ(used_bytes(), 0);
}

TEST(a_port_has_room_for_the_longest_frame_though_others_have_all)
{
    struct bench bench = setup(1000, 8 << 20, false);
    struct aiokvm_share *others = fake_share_leaving(AIOKVM_BUDGET_FRAME_BYTES, 0);
    const uint32_t sizes[] = { AIOKVM_NET_MAX_FRAME, AIOKVM_NET_MAX_FRAME };
    uint8_t *bytes = calloc(2, AIOKVM_NET_MAX_FRAME);
    bench.peer->blocks = true;
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(give(&bench, 0, AIOKVM_NET_MAX_FRAME), NET_TAKEN);
        CHECK_EQ(give(&bench, 0, AIOKVM_NET_MAX_FRAME), NET_BLOCKED);
        take_all(&bench, AIOKVM_NET_MAX_FRAME);
        CHECK_EQ(aiokvm_net_port_send(bench.port, bytes, sizes, NULL, 2), 1);
        fake_end_unblock(bench.peer);
        fake_end_serve(bench.net);
        CHECK(news(&bench) & AIOKVM_NET_NEWS_WRITABLE);
        bench.peer->blocks = true;
    }
    CHECK_EQ(stats(&bench).dropped_full, 0);
    free(bytes);
    aiokvm_share_free(others);
    aiokvm_net_free(bench.net);
}

TEST(a_port_that_was_flooded_gives_its_memory_back)
{
    struct bench bench = setup(1000, 8 << 20, false);
    uint64_t idle = used_bytes();
    for (int round = 0; round < 2; round++) {
        CHECK_EQ(flood(&bench, 8000), 1000);
        CHECK(used_bytes() > idle + 7900000);
        take_all(&bench, 8000);
        CHECK_SOON((fake_end_serve(bench.net), used_bytes() == idle));
    }
    aiokvm_net_free(bench.net);
}

TEST(what_waits_is_forgotten_piece_by_piece)
{
    struct bench bench = setup(65536, 64 << 20, false);
    uint64_t idle = used_bytes();
    const uint32_t size = 30000;
    for (uint32_t i = 0; i < 1000; i++)
        CHECK_EQ(give(&bench, 0, size), NET_TAKEN);
    bench.peer->blocks = true;
    for (uint32_t i = 0; i < 1000; i++)
        CHECK_EQ(aiokvm_net_port_send(bench.port, data(0, size), &size, NULL, 1), 1);
    uint32_t calls = 1;
    while (aiokvm_net_port_clear_some(bench.port) == 1)
        CHECK(++calls < 10000);
    CHECK(calls > 2);
    CHECK_EQ(used_bytes(), idle);
    fake_end_unblock(bench.peer);
    fake_end_serve(bench.net);
    CHECK_EQ(bench.peer->received, 0);
    aiokvm_net_free(bench.net);
}

TEST(headers_come_along)
{
    struct bench bench = setup(8, BYTES, false);
    bench.port->offloads = AIOKVM_NET_OFFLOAD_CSUM;
    const struct virtio_net_hdr_v1 hdr = { .flags = 1, .csum_start = 34, .csum_offset = 16 };
    const struct virtio_net_hdr_v1 valid = { .flags = 2 };
    CHECK_EQ(fake_end_send(bench.peer, &valid, data(0, 60), 60), NET_TAKEN);
    CHECK_EQ(fake_end_send(bench.peer, &hdr, data(0, 60), 60), NET_TAKEN);
    struct aiokvm_net_port_batch batch;
    CHECK_EQ(aiokvm_net_port_take(bench.port, 8, &batch), 2);
    CHECK_EQ(batch.special, 1);
    CHECK_EQ(batch.headers[0].flags, 0);
    CHECK_EQ(batch.headers[1].flags, 1);
    CHECK_EQ(batch.headers[1].csum_start, 34);
    CHECK_EQ(batch.headers[1].csum_offset, 16);
    aiokvm_net_free(bench.net);
}

TEST(what_is_sent_goes_at_once_or_waits)
{
    struct bench bench = setup(4, BYTES, false);
    const uint32_t sizes[] = { 60, 61, 62, 63, 64, 65, 66 };
    const uint8_t *bytes = data(5, 60 * 8);
    CHECK_EQ(aiokvm_net_port_send(bench.port, bytes, sizes, NULL, 3), 3);
    CHECK_EQ(bench.peer->received, 3);
    CHECK_EQ(bench.peer->frames[2].size, 62);
    CHECK(!memcmp(bench.peer->frames[2].data, data(5, 60 * 8) + 121, 62));
    bench.peer->blocks = true;
    CHECK_EQ(aiokvm_net_port_send(bench.port, bytes, sizes, NULL, 7), 4);
    CHECK_EQ(aiokvm_net_port_send(bench.port, bytes, sizes, NULL, 7), 0);
    CHECK_EQ(news(&bench), 0);
    fake_end_clear(bench.peer);
    fake_end_unblock(bench.peer);
    fake_end_serve(bench.net);
    CHECK_EQ(news(&bench), AIOKVM_NET_NEWS_WRITABLE);
    CHECK_EQ(bench.peer->received, 4);
    for (uint32_t i = 0; i < 4; i++)
        CHECK_EQ(bench.peer->frames[i].size, 60 + i);
    CHECK_EQ(aiokvm_net_port_send(bench.port, bytes, sizes, NULL, 7), 7);
    CHECK_EQ(stats(&bench).sent_frames, 14);
    aiokvm_net_free(bench.net);
}

TEST(a_peer_that_goes_does_not_leave_the_program_waiting)
{
    struct bench bench = setup(1, BYTES, false);
    const uint32_t sizes[] = { 60, 60 };
    bench.peer->blocks = true;
    CHECK_EQ(aiokvm_net_port_send(bench.port, data(0, 120), sizes, NULL, 2), 1);
    aiokvm_net_end_free(&bench.peer->end);
    fake_end_serve(bench.net);
    CHECK_EQ(news(&bench), AIOKVM_NET_NEWS_WRITABLE);
    CHECK_EQ(aiokvm_net_port_send(bench.port, data(0, 120), sizes, NULL, 2), 2);
    CHECK_EQ(stats(&bench).dropped_down, 3);
    aiokvm_net_free(bench.net);
}

TEST(frames_that_cannot_be_are_refused)
{
    struct bench bench = setup(4, BYTES, false);
    const uint32_t sizes[][2] = { { 60, 13 }, { 60, AIOKVM_NET_MAX_FRAME + 1 }, { 60, 0 }, { 60, UINT32_MAX } };
    for (size_t i = 0; i < LENGTH(sizes); i++) {
        CHECK_EQ(aiokvm_net_port_send(bench.port, data(0, 60), sizes[i], NULL, 2), 1);
        CHECK_EQ(aiokvm_net_port_send(bench.port, data(0, 60), sizes[i] + 1, NULL, 1), -EINVAL);
    }
    const struct aiokvm_net_port_header headers[] = {
        { .flags = 1, .csum_start = 60 }, { .gso_type = 1, .gso_size = 100 }, { .flags = 1, .gso_type = 9 },
    };
    for (size_t i = 0; i < LENGTH(headers); i++)
        CHECK_EQ(aiokvm_net_port_send(bench.port, data(0, 60), sizes[0], &headers[i], 1), -EINVAL);
    CHECK_EQ(bench.peer->received, 4);
    aiokvm_net_free(bench.net);
}

TEST(a_child_of_fork_has_no_port)
{
    struct bench bench = setup(4, BYTES, false);
    const uint32_t size = 60;
    CHECK_EQ(give(&bench, 0, 60), NET_TAKEN);
    pid_t pid = fork();
    if (pid == 0) {
        struct aiokvm_net_port_batch batch;
        bool right = aiokvm_net_port_take(bench.port, 1, &batch) == -EOWNERDEAD &&
                     aiokvm_net_port_send(bench.port, data(0, 60), &size, NULL, 1) == -EOWNERDEAD;
        aiokvm_net_port_release(bench.port, 1);
        aiokvm_net_end_free(bench.port);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    struct aiokvm_net_port_batch batch;
    CHECK_EQ(aiokvm_net_port_take(bench.port, 1, &batch), 1);
    aiokvm_net_free(bench.net);
}

/* A day's frames pass through the ring and the queue, and leave nothing behind. */
TEST(many_frames_do_not_make_it_grow)
{
    struct bench bench = setup(256, 1 << 20, false);
    struct aiokvm_net_port_batch batch;
    uint32_t sizes[64];
    for (int i = 0; i < 64; i++)
        sizes[i] = 60;
    const uint8_t *bytes = data(0, 64 * 60);
    struct iovec iov[2] = { [1] = { (void *)(uintptr_t)bytes, 60 } };
    for (uint32_t turn = 0; turn < 10000000 / 64; turn++) {
        CHECK(net_enter(bench.net));
        for (int i = 0; i < 64; i++) {
            struct net_frame frame = { .iov = iov + 1, .count = 1, .size = 60 };
            CHECK_EQ(net_send(&bench.peer->end, &frame), NET_TAKEN);
        }
        net_leave(bench.net);
        for (int taken = 0; taken < 64; taken += (int)batch.count) {
            CHECK(aiokvm_net_port_take(bench.port, 64, &batch) > 0);
            aiokvm_net_port_release(bench.port, batch.count);
        }
        if (turn % 64 == 0) {
            fake_end_clear(bench.peer);
            bench.peer->blocks = true;
            CHECK_EQ(aiokvm_net_port_send(bench.port, bytes, sizes, NULL, 64), 64);
            fake_end_unblock(bench.peer);
            fake_end_serve(bench.net);
            CHECK_EQ(bench.peer->received, 64);
        }
    }
    CHECK_EQ(stats(&bench).received_frames, 10000000 / 64 * 64);
    CHECK_EQ(stats(&bench).dropped_full, 0);
    aiokvm_net_free(bench.net);
}
