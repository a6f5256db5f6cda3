/* Frames as blocks of pcapng: what is in them, and what happens when nobody takes them. */
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "net_capture.h"
#include "net_fake.h"

enum { BLOCK = 28 + 16 }; /* without the frame */

struct fixture {
    struct aiokvm_net *net;
    struct fake_end *ends[2];
    struct aiokvm_net_recording *recording;
    struct aiokvm_net_capture *capture;
};

static struct fixture start(uint32_t snaplen, uint64_t buffer_bytes, uint64_t limit_bytes)
{
    int error = 0;
    struct fixture fixture = { .net = aiokvm_net_new(NULL, &error) };
    for (int i = 0; i < 2; i++)
        fixture.ends[i] = fake_end_new(fixture.net, 0);
    CHECK_EQ(aiokvm_net_link(&fixture.ends[0]->end, &fixture.ends[1]->end), 0);
    fixture.recording = aiokvm_net_recording_new(snaplen, buffer_bytes, limit_bytes, &error);
    fixture.capture = aiokvm_net_capture_new(fixture.recording, 5, &error);
    CHECK_EQ(error, 0);
    aiokvm_net_set_policy(&fixture.ends[1]->end, NULL, fixture.capture, NULL, NULL);
    return fixture;
}

static void stop(struct fixture *fixture)
{
    aiokvm_net_free(fixture->net);
    aiokvm_net_capture_free(fixture->capture);
    aiokvm_net_recording_free(fixture->recording);
}

static bool told(struct fixture *fixture)
{
    struct aiokvm_net_news news;
    bool is = false;
    while (aiokvm_net_take(fixture->net, &news) == 1)
        is |= news.end == aiokvm_net_end_id(&fixture->ends[1]->end) && news.news == AIOKVM_NET_NEWS_CAPTURED;
    return is;
}

static uint32_t word(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

TEST(a_frame_becomes_a_block)
{
    struct fixture fixture = start(1000, 1 << 16, 0);
    uint8_t frame[1514], *data;
    for (size_t i = 0; i < sizeof(frame); i++)
        frame[i] = (uint8_t)(i * 3);
    for (uint32_t size = 60; size < 64; size++) {
        fake_end_send(fixture.ends[size & 1], NULL, frame, size);
        uint32_t total = BLOCK + 60 + (size > 60) * 4;
        CHECK_EQ(aiokvm_net_recording_pending(fixture.recording), total);
        CHECK_EQ(aiokvm_net_recording_take(fixture.recording, &data), total);
        CHECK_EQ(word(data), 6);
        CHECK_EQ(word(data + 4), total);
        CHECK_EQ(word(data + 8), 5);
        CHECK_EQ(word(data + 20), size);
        CHECK_EQ(word(data + 24), size);
        CHECK(!memcmp(data + 28, frame, size));
        for (uint32_t i = 28 + size; i < total - 16; i++)
            CHECK_EQ(data[i], 0);
        CHECK_EQ(word(data + total - 16), 4 << 16 | 2);
        /* The second end is the one that has the capture: what it sends is inbound. */
        CHECK_EQ(word(data + total - 12), size & 1 ? 1 : 2);
        CHECK_EQ(word(data + total - 8), 0);
        CHECK_EQ(word(data + total - 4), total);
    }
    fake_end_send(fixture.ends[0], NULL, frame, sizeof(frame));
    CHECK_EQ(aiokvm_net_recording_take(fixture.recording, &data), BLOCK + 1000);
    CHECK_EQ(word(data + 20), 1000);
    CHECK_EQ(word(data + 24), sizeof(frame));
    CHECK_EQ(aiokvm_net_recording_take(fixture.recording, &data), 0);
    stop(&fixture);
}

TEST(what_finds_no_room_is_left_out)
{
    struct fixture fixture = start(65536, 10 * (BLOCK + 100), 0);
    static const uint8_t FRAME[100];
    uint64_t frames, dropped;
    uint8_t *data;
    CHECK(!told(&fixture));
    for (int i = 0; i < 15; i++) {
        fake_end_send(fixture.ends[0], NULL, FRAME, sizeof(FRAME));
        /* When the first is there, and when the buffer is half full. */
        CHECK_EQ(told(&fixture), i == 0 || i == 4);
    }
    aiokvm_net_capture_counts(fixture.capture, &frames, &dropped);
    CHECK_EQ(frames, 15);
    CHECK_EQ(dropped, 5);
    CHECK_EQ(fixture.ends[1]->received, 15);
    CHECK_EQ(aiokvm_net_recording_take(fixture.recording, &data), 10 * (BLOCK + 100));
    fake_end_send(fixture.ends[0], NULL, FRAME, sizeof(FRAME));
    CHECK(told(&fixture));
    CHECK_EQ(aiokvm_net_recording_take(fixture.recording, &data), BLOCK + 100);
    stop(&fixture);
}

TEST(a_recording_ends_at_its_limit)
{
    struct fixture fixture = start(65536, 1 << 16, 3 * (BLOCK + 100) + 50);
    static const uint8_t FRAME[100];
    uint64_t frames, dropped;
    for (int i = 0; i < 10; i++) {
        CHECK_EQ(aiokvm_net_recording_ended(fixture.recording), i > 3);
        fake_end_send(fixture.ends[0], NULL, FRAME, sizeof(FRAME));
        CHECK_EQ(told(&fixture), i == 0 || i == 3);
    }
    aiokvm_net_capture_counts(fixture.capture, &frames, &dropped);
    CHECK_EQ(frames, 3);
    CHECK_EQ(dropped, 0);
    CHECK_EQ(fixture.ends[1]->received, 10);
    stop(&fixture);
}

TEST(a_child_of_fork_has_no_recording)
{
    struct fixture fixture = start(65536, 1 << 16, 0);
    static const uint8_t FRAME[100];
    fake_end_send(fixture.ends[0], NULL, FRAME, sizeof(FRAME));
    pid_t pid = fork();
    if (pid == 0) {
        uint64_t frames, dropped;
        uint8_t *data;
        aiokvm_net_recording_end(fixture.recording);
        aiokvm_net_capture_counts(fixture.capture, &frames, &dropped);
        bool right = !aiokvm_net_recording_take(fixture.recording, &data) && !frames && !dropped &&
                     !aiokvm_net_recording_pending(fixture.recording) &&
                     aiokvm_net_recording_ended(fixture.recording);
        stop(&fixture);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    CHECK(!aiokvm_net_recording_ended(fixture.recording));
    stop(&fixture);
}

TEST(a_frame_that_waits_is_recorded_once)
{
    struct fixture fixture = start(65536, 1 << 16, 0);
    struct net_queue queue;
    uint8_t data[100] = { 0 };
    struct iovec iov[2] = { [1] = { data, sizeof(data) } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = sizeof(data) };
    net_queue_init(&queue, 1, 1000, fake_share());
    CHECK(net_enter(fixture.net));
    CHECK(net_queue_put(&queue, &frame));
    fixture.ends[1]->blocks = true;
    for (int i = 0; i < 3; i++)
        CHECK_EQ(net_queue_send(&queue, &fixture.ends[0]->end, 1), NET_BLOCKED);
    fixture.ends[1]->blocks = false;
    CHECK_EQ(net_queue_send(&queue, &fixture.ends[0]->end, 1), NET_TAKEN);
    net_leave(fixture.net);
    CHECK_EQ(aiokvm_net_recording_pending(fixture.recording), BLOCK + 100);
    stop(&fixture);
}
