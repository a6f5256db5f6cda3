/* Planes, links, queues: tests with ends that record. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "net_fake.h"
#include "net_filter.h"
#include "ratelimit.h"

static const uint8_t FRAME[1514] = { 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45 };

static struct aiokvm_net *plane(const char *thread)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(thread, &error);
    CHECK_EQ(error, 0);
    CHECK(net);
    return net;
}

static void pair(struct aiokvm_net *net, struct fake_end *ends[2])
{
    for (int i = 0; i < 2; i++)
        ends[i] = fake_end_new(net, 0);
    CHECK_EQ(aiokvm_net_link(&ends[0]->end, &ends[1]->end), 0);
}

static struct aiokvm_net_stats stats(struct fake_end *fake)
{
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(&fake->end, &stats);
    return stats;
}

TEST(a_frame_goes_from_one_end_to_the_other)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, sizeof(FRAME)), NET_TAKEN);
    CHECK_EQ(ends[1]->received, 1);
    CHECK_EQ(ends[1]->flushed, 1);
    CHECK_EQ(ends[1]->frames[0].size, sizeof(FRAME));
    CHECK(!memcmp(ends[1]->frames[0].data, FRAME, sizeof(FRAME)));
    CHECK_EQ(stats(ends[0]).sent_bytes, sizeof(FRAME));
    CHECK_EQ(stats(ends[1]).received_frames, 1);
    aiokvm_net_free(net);
}

TEST(who_has_no_peer_or_a_link_that_is_down_is_not_heard)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2], *lonely = fake_end_new(net, 0);
    pair(net, ends);
    CHECK_EQ(fake_end_send(lonely, NULL, FRAME, 60), NET_TAKEN);
    CHECK_EQ(stats(lonely).dropped_down, 1);
    for (int i = 0; i < 2; i++) {
        aiokvm_net_set_up(&ends[i]->end, 0);
        CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, 60), NET_TAKEN);
        aiokvm_net_set_up(&ends[i]->end, 1);
    }
    CHECK_EQ(stats(ends[0]).dropped_down, 2);
    CHECK_EQ(ends[1]->received, 0);
    aiokvm_net_free(net);
}

TEST(links_are_between_two_of_one_plane)
{
    struct aiokvm_net *net = plane(NULL), *other = plane(NULL);
    struct fake_end *ends[2], *third = fake_end_new(net, 0), *stranger = fake_end_new(other, 0);
    pair(net, ends);
    CHECK_EQ(aiokvm_net_link(&third->end, &ends[0]->end), -EBUSY);
    CHECK_EQ(aiokvm_net_link(&third->end, &stranger->end), -EXDEV);
    CHECK_EQ(aiokvm_net_link(&third->end, &third->end), -EINVAL);
    aiokvm_net_end_free(&ends[1]->end);
    CHECK_EQ(aiokvm_net_link(&third->end, &ends[0]->end), 0);
    aiokvm_net_free(other);
    aiokvm_net_free(net);
}

TEST(who_was_blocked_is_resumed)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    ends[1]->blocks = true;
    CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, 60), NET_BLOCKED);
    CHECK(!ends[0]->resumed);
    fake_end_unblock(ends[1]);
    CHECK(ends[0]->resumed);
    CHECK_EQ(stats(ends[0]).sent_frames, 0);
    /* Nothing waits: nobody is told. */
    ends[0]->resumed = false;
    fake_end_unblock(ends[1]);
    CHECK(!ends[0]->resumed);
    /* A peer that goes, or whose link goes down, does not leave it waiting. */
    ends[1]->blocks = true;
    CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, 60), NET_BLOCKED);
    aiokvm_net_set_up(&ends[1]->end, 0);
    CHECK(ends[0]->resumed);
    aiokvm_net_set_up(&ends[1]->end, 1);
    CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, 60), NET_BLOCKED);
    ends[0]->resumed = false;
    aiokvm_net_end_free(&ends[1]->end);
    CHECK(ends[0]->resumed);
    aiokvm_net_free(net);
}

TEST(a_rate_limit_holds_back_and_lets_go)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 1000, 2);
    aiokvm_net_set_policy(&ends[0]->end, NULL, NULL, limit, NULL);
    int sent = 0;
    while (sent < 50) {
        if (fake_end_send(ends[0], NULL, FRAME, 60) == NET_TAKEN) {
            sent++;
            continue;
        }
        CHECK(!ends[0]->resumed);
        /* Taking frames again is not what it waits for. */
        fake_end_unblock(ends[1]);
        CHECK(!ends[0]->resumed);
        struct pollfd fd = { .fd = aiokvm_net_fd(net), .events = POLLIN };
        CHECK_EQ(poll(&fd, 1, PATIENCE_S * 1000), 1);
        fake_end_serve(net);
        ends[0]->resumed = false;
    }
    CHECK(stats(ends[0]).throttled > 0);
    CHECK_EQ(ends[1]->received, 50);
    aiokvm_net_set_policy(&ends[0]->end, NULL, NULL, NULL, NULL);
    aiokvm_ratelimit_free(limit);
    aiokvm_net_free(net);
}

/* What is to be cut is as many frames as it becomes, whoever cuts it. */
TEST(a_rate_limit_counts_the_pieces_of_a_frame)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    ends[1]->end.offloads = 31;
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 1, 1);
    aiokvm_net_set_policy(&ends[0]->end, NULL, NULL, limit, NULL);
    struct virtio_net_hdr_v1 hdr = {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4, .gso_size = 100, .hdr_len = 54,
        .csum_start = 34, .csum_offset = 16,
    };
    uint64_t before_ns = aiokvm_now_ns();
    CHECK_EQ(fake_end_send(ends[0], &hdr, FRAME, 54 + 1000), NET_TAKEN);
    CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, 60), NET_BLOCKED);
    /* One a second, of which one was there. */
    CHECK(ends[0]->end.throttled_ns >= before_ns + UINT64_C(9000000000) - UINT64_C(1000000000));
    aiokvm_net_set_policy(&ends[0]->end, NULL, NULL, NULL, NULL);
    aiokvm_ratelimit_free(limit);
    aiokvm_net_free(net);
}

TEST(a_limit_that_is_gone_holds_nothing_back)
{
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(1, 1, 0, 0);
    for (int i = 0; i < 3; i++) {
        struct aiokvm_net *net = plane(NULL);
        struct fake_end *ends[2];
        pair(net, ends);
        aiokvm_net_set_policy(&ends[1]->end, NULL, NULL, NULL, limit);
        while (fake_end_send(ends[0], NULL, FRAME, sizeof(FRAME)) == NET_TAKEN)
            continue;
        CHECK(!ends[0]->resumed);
        if (i == 0)
            aiokvm_net_unlink(&ends[0]->end);
        else if (i == 1)
            aiokvm_net_end_free(&ends[1]->end);
        else
            aiokvm_net_set_policy(&ends[1]->end, NULL, NULL, NULL, NULL);
        struct pollfd fd = { .fd = aiokvm_net_fd(net), .events = POLLIN };
        CHECK_EQ(poll(&fd, 1, PATIENCE_S * 1000), 1);
        fake_end_serve(net);
        CHECK(ends[0]->resumed);
        aiokvm_net_free(net);
    }
    aiokvm_ratelimit_free(limit);
}

TEST(a_deadline_has_its_end_served)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *soon = fake_end_new(net, 0), *late = fake_end_new(net, 0);
    CHECK(net_enter(net));
    net_at(&late->end, aiokvm_now_ns() + UINT64_C(3600) * 1000000000);
    net_at(&soon->end, aiokvm_now_ns() + 1000000);
    net_leave(net);
    while (!soon->served) {
        struct pollfd fd = { .fd = aiokvm_net_fd(net), .events = POLLIN };
        CHECK_EQ(poll(&fd, 1, PATIENCE_S * 1000), 1);
        fake_end_serve(net);
    }
    CHECK_EQ(late->served, 0);
    CHECK(net->timer_ns != 0);
    aiokvm_net_free(net);
}

TEST(news_is_taken_once_and_in_order)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    struct pollfd fd = { .fd = aiokvm_net_news_fd(net), .events = POLLIN };
    CHECK_EQ(poll(&fd, 1, 0), 0);
    CHECK(net_enter(net));
    net_tell(&ends[1]->end, AIOKVM_NET_NEWS_CLOSED, ENODEV, 7);
    net_tell(&ends[0]->end, AIOKVM_NET_NEWS_READABLE, 0, 0);
    net_tell(&ends[1]->end, AIOKVM_NET_NEWS_WRITABLE, EIO, 8);
    net_leave(net);
    CHECK_EQ(poll(&fd, 1, 0), 1);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(&ends[1]->end));
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_CLOSED | AIOKVM_NET_NEWS_WRITABLE);
    CHECK_EQ(news.error, ENODEV);
    CHECK_EQ(news.detail, 7);
    CHECK_EQ(aiokvm_net_take(net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(&ends[0]->end));
    CHECK_EQ(aiokvm_net_take(net, &news), 0);
    CHECK_EQ(poll(&fd, 1, 0), 0);
    aiokvm_net_free(net);
}

TEST(an_end_that_is_freed_is_in_no_list)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[3];
    for (int i = 0; i < 3; i++)
        ends[i] = fake_end_new(net, 0);
    CHECK(net_enter(net));
    for (int i = 0; i < 3; i++) {
        net_ready(&ends[i]->end);
        net_tell(&ends[i]->end, AIOKVM_NET_NEWS_READABLE, 0, 0);
    }
    net_leave(net);
    aiokvm_net_end_free(&ends[2]->end);
    aiokvm_net_end_free(&ends[0]->end);
    fake_end_serve(net);
    CHECK_EQ(ends[1]->served, 1);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(&ends[1]->end));
    CHECK_EQ(aiokvm_net_take(net, &news), 0);
    /* Both lists still have an end to append to. */
    CHECK(net_enter(net));
    net_ready(&ends[1]->end);
    net_tell(&ends[1]->end, AIOKVM_NET_NEWS_READABLE, 0, 0);
    net_leave(net);
    fake_end_serve(net);
    CHECK_EQ(ends[1]->served, 2);
    CHECK_EQ(aiokvm_net_take(net, &news), 1);
    aiokvm_net_free(net);
}

TEST(a_thread_serves_by_itself)
{
    struct aiokvm_net *net = plane("net-test");
    CHECK(aiokvm_net_tid(net) > 0);
    struct fake_end *ends[2];
    pair(net, ends);
    for (int i = 0; i < 10000; i++) {
        CHECK(net_enter(net));
        net_ready(&ends[1]->end);
        net_leave(net);
        CHECK_EQ(fake_end_send(ends[0], NULL, FRAME, 60), NET_TAKEN);
    }
    uint32_t served = 0;
    while (!served) {
        CHECK(net_enter(net));
        served = ends[1]->served;
        net_leave(net);
    }
    CHECK_EQ(stats(ends[1]).received_frames, 10000);
    aiokvm_net_free(net);
}

TEST(a_thread_ends_whatever_it_is_doing)
{
    for (int i = 0; i < 5000; i++) {
        struct aiokvm_net *net = plane("net-test");
        struct fake_end *end = fake_end_new(net, 0);
        CHECK(net_enter(net));
        net_ready(&end->end);
        net_leave(net);
        /* A little later each time: somewhere in its turn. */
        for (volatile int wait = 0; wait < i * 4; wait++)
            continue;
        aiokvm_net_free(net);
    }
}

TEST(frames_wait_in_a_queue_of_bounded_size)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    struct net_queue queue;
    net_queue_init(&queue, 3, 4000, fake_share());
    struct iovec iov[2] = { [1] = { (void *)(uintptr_t)FRAME, 1000 } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = 1000, .queue = 5 };
    CHECK(net_enter(net));
    for (int i = 0; i < 3; i++)
        CHECK(net_queue_put(&queue, &frame));
    CHECK(!net_queue_put(&queue, &frame));
    ends[1]->blocks = true;
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 64), NET_BLOCKED);
    CHECK_EQ(queue.frames, 3);
    ends[1]->blocks = false;
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 2), NET_TAKEN);
    CHECK_EQ(queue.frames, 1);
    frame.size = iov[1].iov_len = 1514;
    CHECK(net_queue_put(&queue, &frame));
    CHECK(!net_queue_put(&queue, &frame));
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 64), NET_TAKEN);
    CHECK_EQ(queue.bytes, 0);
    CHECK_EQ(ends[1]->received, 4);
    CHECK_EQ(ends[1]->frames[3].size, 1514);
    CHECK_EQ(ends[1]->frames[3].queue, 5);
    CHECK(net_queue_put(&queue, &frame));
    net_queue_clear(&queue);
    CHECK_EQ(queue.frames, 0);
    net_leave(net);
    aiokvm_net_free(net);
}

TEST(a_frame_that_waits_meets_the_filters_of_another_peer)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2], *other = fake_end_new(net, 0);
    pair(net, ends);
    int error = 0;
    struct aiokvm_net_rule deny = { .verdict = AIOKVM_NET_DENY, .directions = 3 };
    struct aiokvm_net_filter *filter = aiokvm_net_filter_new(&other->end, &deny, 1, &error);
    CHECK(filter);
    aiokvm_net_set_policy(&other->end, filter, NULL, NULL, NULL);
    struct net_queue queue;
    net_queue_init(&queue, 3, 4000, fake_share());
    struct iovec iov[2] = { [1] = { (void *)(uintptr_t)FRAME, 60 } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = 60 };
    ends[1]->blocks = true;
    CHECK(net_enter(net));
    CHECK_EQ(net_send(&ends[0]->end, &frame), NET_BLOCKED);
    CHECK(net_queue_put(&queue, &frame));
    net_leave(net);
    aiokvm_net_unlink(&ends[0]->end);
    CHECK_EQ(aiokvm_net_link(&ends[0]->end, &other->end), 0);
    CHECK(net_enter(net));
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 1), NET_TAKEN);
    net_leave(net);
    CHECK_EQ(other->received, 0);
    CHECK_EQ(stats(ends[0]).dropped_filtered, 1);
    aiokvm_net_free(net);
    aiokvm_net_filter_free(filter);
}

TEST(a_frame_that_has_to_wait_keeps_what_it_has_passed)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *ends[2];
    pair(net, ends);
    /* Lets two through, as a bucket may be in debt: this one, once, and another. */
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 1, 1);
    aiokvm_net_set_policy(&ends[0]->end, NULL, NULL, limit, NULL);
    struct net_queue queue;
    net_queue_init(&queue, 3, 4000, fake_share());
    struct iovec iov[2] = { [1] = { (void *)(uintptr_t)FRAME, 60 } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = 60 };
    CHECK(net_enter(net));
    ends[1]->blocks = true;
    CHECK_EQ(net_send(&ends[0]->end, &frame), NET_BLOCKED);
    CHECK(net_queue_put(&queue, &frame));
    ends[1]->blocks = false;
    CHECK_EQ(net_queue_send(&queue, &ends[0]->end, 1), NET_TAKEN);
    CHECK(aiokvm_ratelimit_take(limit, aiokvm_now_ns(), 60, 1) == 0);
    CHECK(aiokvm_ratelimit_take(limit, aiokvm_now_ns(), 60, 1) != 0);
    net_queue_clear(&queue);
    net_leave(net);
    aiokvm_net_set_policy(&ends[0]->end, NULL, NULL, NULL, NULL);
    aiokvm_ratelimit_free(limit);
    aiokvm_net_free(net);
}

TEST(headers_of_frames_are_checked)
{
    static const struct {
        struct virtio_net_hdr_v1 hdr;
        bool fits;
    } CASES[] = {
        { { .flags = 0xf8 }, true },
        { { .gso_type = VIRTIO_NET_HDR_GSO_TCPV4, .gso_size = 1000 }, false }, /* without a checksum to fill in */
        { { .flags = 1, .csum_start = 34, .csum_offset = 16 }, true },
        { { .flags = 1, .csum_start = 34, .csum_offset = 221 }, false },
        { { .flags = 1, .csum_start = 0xffff, .csum_offset = 0xffff }, false },
        { { .flags = 1, .csum_start = 0, .csum_offset = 16 }, false },
        { { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 1000 }, true },
        { { .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 0 }, false },
        { { .flags = 1, .csum_start = 34, .csum_offset = 6, .gso_type = 1, .gso_size = 1000 }, false },
        { { .flags = 1, .csum_start = 240, .csum_offset = 2, .gso_type = 1, .gso_size = 1000 }, false },
        { { .flags = 1, .csum_start = 34, .csum_offset = 6, .gso_type = 5, .gso_size = 1000 }, true },
        { { .flags = 1, .csum_start = 34, .csum_offset = 6, .gso_type = 2, .gso_size = 1000 }, false },
        { { .flags = 1, .csum_start = 34, .csum_offset = 6, .gso_type = 0x80 }, false },
    };
    uint8_t data[1514] = { 0 };
    data[34 + 12] = 0x50;
    for (size_t i = 0; i < LENGTH(CASES); i++) {
        uint8_t head[NET_HEAD];
        struct iovec iov[3], from = { data, sizeof(data) };
        struct net_frame frame = { .hdr = CASES[i].hdr };
        net_frame_set(&frame, iov + 1, head, &from, 1, 0);
        if (net_frame_check(&frame) != CASES[i].fits)
            check_failed(__FILE__, __LINE__, "case %zu", i);
    }
}

TEST(a_checksum_is_in_the_private_part_though_one_buffer_has_it_all)
{
    uint8_t data[1514] = { 0 };
    data[1000 + 12] = 0x50;
    static const struct virtio_net_hdr_v1 HEADERS[] = {
        { .flags = 1, .csum_start = 240, .csum_offset = 15 },
        { .flags = 1, .csum_start = 1000, .csum_offset = 16 },
        { .flags = 1, .csum_start = 1000, .csum_offset = 16, .gso_type = 1, .gso_size = 100 },
    };
    for (size_t i = 0; i < LENGTH(HEADERS); i++) {
        struct iovec iov[2] = { [1] = { data, sizeof(data) } };
        struct net_frame frame = { .hdr = HEADERS[i], .iov = iov + 1, .count = 1, .size = sizeof(data) };
        CHECK(!net_frame_check(&frame));
    }
}

TEST(a_frame_of_many_pieces_keeps_its_head_private)
{
    uint8_t data[600], head[NET_HEAD], copy[600];
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 7);
    /* 12 bytes of another header first, which end in the second piece. */
    struct iovec from[] = { { data, 10 }, { data + 10, 1 }, { data + 11, 89 }, { data + 100, 0 }, { data + 100, 500 } };
    struct iovec iov[LENGTH(from) + 2];
    struct net_frame frame = { 0 };
    net_frame_set(&frame, iov + 1, head, from, LENGTH(from), 12);
    CHECK_EQ(frame.size, 588);
    CHECK_EQ(frame.iov[0].iov_len, NET_HEAD);
    CHECK(frame.iov[0].iov_base == head);
    net_frame_copy(&frame, copy);
    CHECK(!memcmp(copy, data + 12, 588));
    CHECK_EQ(frame.count, 2);
}

TEST(a_child_of_fork_has_no_net)
{
    struct aiokvm_net *net = plane("net-fork");
    struct fake_end *ends[2];
    pair(net, ends);
    pid_t pid = fork();
    if (pid == 0) {
        struct aiokvm_net_news news;
        bool right = aiokvm_net_serve(net, 1000) == -EOWNERDEAD && aiokvm_net_take(net, &news) == -EOWNERDEAD &&
                     !aiokvm_net_tid(net);
        aiokvm_net_free(net);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    aiokvm_net_free(net);
}

TEST(a_child_of_fork_leaves_what_its_parent_watches_alone)
{
    struct aiokvm_net *net = plane(NULL);
    struct fake_end *fake = fake_end_new(net, 0);
    struct net_watch watch = { 0 };
    int pipes[2], status;
    CHECK_EQ(pipe(pipes), 0);
    CHECK_EQ(net_watch(&watch, &fake->end, pipes[0], EPOLLIN), 0);
    pid_t pid = fork();
    if (pid == 0) {
        net_unwatch(&watch);
        _exit(0);
    }
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(write(pipes[1], "x", 1), 1);
    fake_end_serve(net);
    CHECK_EQ(fake->served, 1);
    CHECK_EQ(watch.events, EPOLLIN);
    aiokvm_net_free(net);
    close(pipes[0]);
    close(pipes[1]);
}
