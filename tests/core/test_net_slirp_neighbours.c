/* Addresses of a guest's network that nobody answers for. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "holdups.h"
#include "net_packet.h"
#include "slirp_guest.h"

static const uint8_t MAC[6] = { 0x52, 0x54, 0, 0x12, 0x34, 0x56 }, OTHER[6] = { 0x52, 0x54, 0, 1, 2, 3 };

TEST(who_is_heard_is_known)
{
    static struct slirp_neighbours neighbours;
    uint8_t frame[100], to[100];
    uint32_t size = put_udp(to, HOST, 1, GUEST, 2);
    CHECK(!slirp_neighbours_fill(&neighbours, to, size));
    CHECK(slirp_neighbours_learn(&neighbours, frame, put_udp(frame, GUEST, 2, HOST, 1)));
    CHECK(!slirp_neighbours_learn(&neighbours, frame, size));
    CHECK(slirp_neighbours_fill(&neighbours, to, size));
    CHECK(!memcmp(to, MAC, 6));
    /* It moves. */
    memcpy(frame + 6, OTHER, 6);
    CHECK(slirp_neighbours_learn(&neighbours, frame, size));
    CHECK(slirp_neighbours_fill(&neighbours, to, size));
    CHECK(!memcmp(to, OTHER, 6));
    /* Nobody has such an address, or such a MAC. */
    CHECK(!slirp_neighbours_learn(&neighbours, frame, put_udp(frame, 0, 2, HOST, 1)));
    CHECK(!slirp_neighbours_learn(&neighbours, frame, put_udp(frame, 0xe0000001, 2, HOST, 1)));
    put_udp(frame, GUEST + 1, 2, HOST, 1);
    frame[6] |= 1;
    CHECK(!slirp_neighbours_learn(&neighbours, frame, size));
    /* To all. */
    put_udp(to, HOST, 1, 0xffffffff, 2);
    memset(to, 0xff, 6);
    CHECK(slirp_neighbours_fill(&neighbours, to, size));
    CHECK_EQ(to[5], 0xff);
    /* IPv6. */
    size = frame6(frame, 17, HOST6, 5, 0);
    memcpy(frame + 6, MAC, 6);
    CHECK(slirp_neighbours_learn(&neighbours, frame, size));
    frame6(to, 17, frame + 22, 5, 0);
    CHECK(slirp_neighbours_fill(&neighbours, to, size));
    CHECK(!memcmp(to, MAC, 6));
    /* As many as there is room for, those that were heard last. */
    for (uint32_t i = 0; i < 10000; i++)
        slirp_neighbours_learn(&neighbours, frame, put_udp(frame, 0x0a010000 + i, 2, HOST, 1));
    CHECK(slirp_neighbours_fill(&neighbours, to, put_udp(to, HOST, 1, 0x0a010000 + 9999, 2)));
    for (size_t cut = 14; cut < 34; cut++) {
        slirp_neighbours_learn(&neighbours, frame, cut);
        slirp_neighbours_fill(&neighbours, to, cut);
    }
}

#ifdef AIOKVM_HAVE_SLIRP

static uint32_t ping(uint8_t *frame, uint32_t from)
{
    memset(frame + 34, 0, 40);
    frame[34] = 8;
    return seal(frame, 1, from, HOST, 40);
}

TEST(who_never_answers_arp_costs_no_more_than_who_does)
{
    struct nat nat = nat_new();
    uint8_t frame[100];
    /* By a frame the guest tells where it is: that is enough. */
    uint32_t size = ping(frame, GUEST);
    for (int round = 0; round < 300; round++) {
        HOLDUPS_STEP({
            for (int i = 0; i < 64; i++)
                say(&nat, frame, size);
            fake_end_serve(nat.net);
        });
        CHECK_EQ(nat.guest->received, 64);
        CHECK_EQ(nat.guest->frames[0].data[34], 0);
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(stats(nat.slirp).dropped_unresolved, 0);
    aiokvm_net_free(nat.net);
}

TEST(frames_for_nobody_are_bounded)
{
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    uint8_t frame[100];
    /* The answers are for those that are not heard any more, as there are too many. */
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "10.0.2.99", 53);
    int fd = connect_udp(port);
    for (int round = 0; round < 100; round++) {
        for (int i = 0; i < 20; i++)
            CHECK_EQ(write(fd, "x", 1), 1);
        HOLDUPS_STEP(fake_end_serve(nat.net));
    }
    CHECK_SOON((fake_end_serve(nat.net), stats(nat.slirp).dropped_unresolved + slirp->held_count >= 2000));
    CHECK(slirp->held_count <= 64);
    /* Who has the address was asked, and the answer brings what waits. */
    const struct fake_frame *question = hear(&nat);
    CHECK_EQ(net_load16(question->data + 12), 0x0806);
    CHECK_EQ(net_load32(question->data + 38), 0x0a000263);
    CHECK_EQ(write(fd, "y", 1), 1);
    fake_end_serve(nat.net);
    uint32_t waiting = slirp->held_count;
    CHECK(waiting > 0);
    fake_end_clear(nat.guest);
    say(&nat, frame, ping(frame, 0x0a000263));
    CHECK_EQ(nat.guest->received, waiting + 1);
    CHECK(!memcmp(nat.guest->frames[0].data, MAC, 6));
    CHECK_EQ(nat.guest->frames[0].data[23], 17);
    close(fd);
    aiokvm_net_free(nat.net);
}

TEST(neighbours_of_ipv6_are_asked_for)
{
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    static const uint8_t ADDRESS[16] = { 0xfe, 0xc0, [14] = 7, [15] = 0x56 };
    uint8_t frame[200], question[SLIRP_QUESTION_SIZE], answer[SLIRP_QUESTION_SIZE];
    frame6(frame, 17, ADDRESS, 5, 0);
    CHECK_EQ(slirp_neighbours_ask(&slirp->guard, frame, question), 86);
    CHECK_EQ(question[0], 0x33);
    CHECK_EQ(question[54], 135);
    CHECK(!memcmp(question + 62, ADDRESS, 16));
    uint8_t pseudo[4] = { 0, 32, 0, 58 };
    CHECK_EQ(slirp_sum(question + 54, 32, slirp_sum(pseudo, 4, slirp_sum(question + 22, 32, 0))), 0xffff);
    CHECK_EQ(slirp_neighbours_answer(question, 86, answer), 86);
    CHECK_EQ(slirp_sum(answer + 54, 32, slirp_sum(pseudo, 4, slirp_sum(answer + 22, 32, 0))), 0xffff);
    CHECK_EQ(slirp_neighbours_answer(question, 85, answer), 0);
    /* The router answers a ping of who has said nothing before. */
    frame6(frame, 58, HOST6, 0, 0);
    memcpy(frame + 6, MAC, 6);
    net_store16(frame + 18, 16);
    memset(frame + 54, 0, 16);
    frame[54] = 128;
    frame[21] = 64;
    uint8_t echo[4] = { 0, 16, 0, 58 };
    net_store16(frame + 56, ~slirp_sum(frame + 54, 16, slirp_sum(echo, 4, slirp_sum(frame + 22, 32, 0))));
    say(&nat, frame, 70);
    const struct fake_frame *reply = hear(&nat);
    CHECK_EQ(reply->data[54], 129);
    CHECK(!memcmp(reply->data, MAC, 6));
    aiokvm_net_free(nat.net);
}

/* Who answers each frame at once, each time from another adapter: as another NAT does behind a switch. */
struct hasty {
    struct aiokvm_net_end end;
    bool answers;
    uint32_t received, blocked;
};

static bool hasty_serve(struct aiokvm_net_end *end)
{
    (void)end;
    return false;
}

static enum net_result hasty_send(struct hasty *hasty, uint32_t from)
{
    uint8_t data[100];
    struct iovec iov[3] = { [1] = { data, ping(data, from) } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = (uint32_t)iov[1].iov_len };
    data[11] = (uint8_t)hasty->received;
    return net_send(&hasty->end, &frame);
}

static enum net_result hasty_receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct hasty *hasty = (struct hasty *)end;
    (void)frame;
    hasty->received++;
    if (hasty->answers && hasty->received < 100 && hasty_send(hasty, 0x0a000263) == NET_BLOCKED)
        hasty->blocked++;
    return NET_TAKEN;
}

static void hasty_free(struct aiokvm_net_end *end)
{
    free(end);
}

static const struct net_type HASTY = { .serve = hasty_serve, .receive = hasty_receive, .free = hasty_free };

TEST(who_answers_what_waited_at_once_has_to_wait)
{
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    int error, port = aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "10.0.2.99", 53);
    int fd = connect_udp(port);
    for (int i = 0; i < 5; i++)
        CHECK_EQ(write(fd, "x", 1), 1);
    CHECK_SOON((fake_end_serve(nat.net), slirp->held_count == 5));
    struct hasty *hasty = net_end_new(nat.net, &HASTY, sizeof(*hasty), &error);
    CHECK(hasty);
    aiokvm_net_unlink(nat.slirp);
    CHECK_EQ(aiokvm_net_link(nat.slirp, &hasty->end), 0);
    hasty->answers = true;
    CHECK(net_enter(nat.net));
    CHECK_EQ(hasty_send(hasty, 0x0a000263), NET_TAKEN);
    net_leave(nat.net);
    CHECK_EQ(slirp->held_count, 0);
    /* What waited, and the answer to the ping. */
    CHECK_EQ(hasty->received, 6);
    CHECK_EQ(hasty->blocked, 6);
    hasty->answers = false;
    CHECK(!hasty->end.waits);
    close(fd);
    aiokvm_net_free(nat.net);
}

/* LeakSanitizer sees to it. */
TEST(what_waits_for_a_socket_goes_with_the_end)
{
    struct nat nat = nat_new();
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "10.0.2.99", 53);
    int fd = connect_udp(port);
    static uint8_t large[60000];
    for (int i = 0; i < 20; i++) {
        CHECK_EQ(write(fd, large, sizeof(large)), sizeof(large));
        fake_end_serve(nat.net);
    }
    close(fd);
    aiokvm_net_free(nat.net);
}

#endif
