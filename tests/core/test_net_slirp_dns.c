/* Questions to a guest's nameserver, and datagrams that are larger than a frame. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

#ifdef AIOKVM_HAVE_SLIRP

static struct nat nat_with_dns(void)
{
    struct aiokvm_net_slirp_config dns = config();
    dns.has_dns = 1;
    struct nat nat = nat_with(&dns, 0);
    greet(&nat);
    return nat;
}

static uint32_t query(uint8_t *frame, uint32_t port, const char *text)
{
    uint32_t length = (uint32_t)strlen(text);
    net_store16(frame + 34, port);
    net_store16(frame + 36, 53);
    net_store16(frame + 38, 8 + length);
    memcpy(frame + 42, text, length);
    return seal(frame, 17, GUEST, NAMESERVER, 8 + length);
}

TEST(a_question_is_the_programs_to_answer)
{
    struct nat nat = nat_with_dns();
    static uint8_t frame[5000], data[AIOKVM_NET_SLIRP_MAX_QUERY];
    uint32_t id;
    CHECK_EQ(aiokvm_net_slirp_take_query(nat.slirp, &id, data), -EAGAIN);
    say(&nat, frame, query(frame, 4000, "what"));
    CHECK_EQ(((struct slirp_end *)nat.slirp)->other, 0);
    CHECK_EQ(aiokvm_net_slirp_take_query(nat.slirp, &id, data), 4);
    CHECK(!memcmp(data, "what", 4));
    CHECK_EQ(aiokvm_net_slirp_take_query(nat.slirp, &(uint32_t){ 0 }, data), -EAGAIN);
    CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id + 1, "that", 4), -ENOENT);
    CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id, "that", 4), 0);
    CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id, "that", 4), -ENOENT);
    const struct fake_frame *answer = hear(&nat);
    CHECK_EQ(answer->size, 46);
    CHECK_EQ(net_load32(answer->data + 26), NAMESERVER);
    CHECK_EQ(net_load32(answer->data + 30), GUEST);
    CHECK_EQ(net_load16(answer->data + 36), 4000);
    CHECK(!memcmp(answer->data + 42, "that", 4));
    CHECK_EQ(slirp_sum(answer->data + 14, 20, 0), 0xffff);
    uint8_t pseudo[4] = { 0, 17, 0, 12 };
    CHECK_EQ(slirp_sum(answer->data + 34, 12, slirp_sum(pseudo, 4, slirp_sum(answer->data + 26, 8, 0))), 0xffff);
    heard(&nat);
    /* So many, and no larger than they are. */
    for (int i = 0; i < 70; i++)
        say(&nat, frame, query(frame, 4000, "more"));
    CHECK_EQ(stats(nat.slirp).dropped_full, 6);
    net_store16(frame + 34, 4000);
    net_store16(frame + 36, 53);
    net_store16(frame + 38, 4200);
    say(&nat, frame, seal(frame, 17, GUEST, NAMESERVER, 4200));
    CHECK_EQ(stats(nat.slirp).dropped_invalid, 1);
    while (aiokvm_net_slirp_take_query(nat.slirp, &id, data) >= 0)
        CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id, NULL, 0), 0);
    CHECK_EQ(nat.guest->kept, 0);
    /* Answers that are too long do not take the places of other questions. */
    static uint8_t large[AIOKVM_NET_SLIRP_MAX_ANSWER + 1];
    for (int i = 0; i < 100; i++) {
        say(&nat, frame, query(frame, 4000, "long"));
        CHECK_EQ(aiokvm_net_slirp_take_query(nat.slirp, &id, data), 4);
        CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id, large, sizeof(large)), -EMSGSIZE);
    }
    CHECK_EQ(nat.guest->kept, 0);
    CHECK_EQ(stats(nat.slirp).dropped_invalid, 101);
    aiokvm_net_free(nat.net);
}

/* The program asks nameservers by sockets. */
TEST(questions_have_a_share_of_the_descriptors)
{
    struct nat nat = nat_with_dns();
    struct aiokvm_budget *budget = aiokvm_budget_of_process(AIOKVM_BUDGET_DESCRIPTORS);
    struct aiokvm_budget_state state;
    struct aiokvm_share others;
    static uint8_t frame[100], data[AIOKVM_NET_SLIRP_MAX_QUERY];
    uint32_t id;
    for (int i = 0; i < 3; i++)
        say(&nat, frame, query(frame, 4000, "what"));
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 3 * 5);
    aiokvm_share_open(&others, budget);
    aiokvm_share_add(&others, state.total);
    say(&nat, frame, query(frame, 4000, "what"));
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    aiokvm_share_close(&others);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(aiokvm_net_slirp_take_query(nat.slirp, &id, data), 4);
        CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id, i ? "that" : NULL, i ? 4 : 0), 0);
    }
    /* The one that has no answer. */
    CHECK_EQ(stats(nat.slirp).dropped_unresolved, 1);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 5);
    aiokvm_net_free(nat.net);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 0);
}

TEST(an_answer_that_is_larger_than_a_frame_comes_in_fragments)
{
    struct nat nat = nat_with_dns();
    static uint8_t frame[AIOKVM_NET_MAX_FRAME], data[AIOKVM_NET_SLIRP_MAX_QUERY], large[5000];
    struct slirp_fragments fragments = { 0 };
    uint64_t state = 3;
    uint32_t id, size = 0;
    for (size_t i = 0; i < sizeof(large); i++)
        large[i] = (uint8_t)random_below(&state, 256);
    say(&nat, frame, query(frame, 4000, "what"));
    CHECK_EQ(aiokvm_net_slirp_take_query(nat.slirp, &id, data), 4);
    CHECK_EQ(aiokvm_net_slirp_answer(nat.slirp, id, large, sizeof(large)), 0);
    while (!size) {
        const struct fake_frame *piece = hear(&nat);
        bool is_invalid;
        CHECK(piece->size <= 1514);
        CHECK_EQ(slirp_sum(piece->data + 14, 20, 0), 0xffff);
        memcpy(frame, piece->data, piece->size);
        size = slirp_fragments_add(&fragments, frame, 1, &is_invalid);
        CHECK(!is_invalid);
        heard(&nat);
    }
    CHECK_EQ(size, 42 + sizeof(large));
    CHECK(!memcmp(frame + 42, large, sizeof(large)));
    CHECK_EQ(nat.guest->kept, 0);
    slirp_fragments_clear(&fragments);
    aiokvm_net_free(nat.net);
}

TEST(a_datagram_of_ipv6_that_is_larger_than_a_frame_comes_in_fragments)
{
    struct nat nat = nat_with_dns();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    static uint8_t frame[4000], whole[4000];
    frame6(frame, 17, HOST6, 7, 0);
    net_store16(frame + 18, sizeof(frame) - 54);
    for (size_t i = 62; i < sizeof(frame); i++)
        frame[i] = (uint8_t)(i * 7);
    CHECK(net_enter(nat.net));
    slirp_deliver_datagram(slirp, frame, sizeof(frame));
    net_leave(nat.net);
    uint32_t end = 0, id = 0;
    CHECK_EQ(nat.guest->kept, 3);
    for (uint32_t i = 0; i < nat.guest->kept; i++) {
        const struct fake_frame *piece = &nat.guest->frames[i];
        CHECK(piece->size <= 1514);
        CHECK_EQ(piece->data[20], 44);
        CHECK_EQ(piece->data[54], 17);
        CHECK_EQ(net_load16(piece->data + 18), piece->size - 54);
        uint32_t at = net_load16(piece->data + 56) & ~7u;
        CHECK_EQ(at, end);
        CHECK_EQ(net_load16(piece->data + 56) & 1, i < 2);
        CHECK(!i || net_load32(piece->data + 58) == id);
        id = net_load32(piece->data + 58);
        memcpy(whole + at, piece->data + 62, piece->size - 62);
        end = at + piece->size - 62;
    }
    CHECK_EQ(end, sizeof(frame) - 54);
    CHECK(!memcmp(whole, frame + 54, end));
    aiokvm_net_free(nat.net);
}

TEST(questions_by_tcp_go_to_a_service)
{
    make_path();
    struct nat nat = nat_with_dns();
    struct aiokvm_net_slirp_connection connection;
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, 0x0a0002ff, 53, path, 8) > 0);
    uint32_t next = open_connection(&nat, 5000, NAMESERVER, 53);
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    uint8_t frame[100];
    char buffer[10];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, NAMESERVER, 53, 1001, next, ACK | PSH, "what", 4));
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), 4);
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    CHECK_EQ(write(fd, "that", 4), 4);
    const struct fake_frame *answer = hear_tcp(&nat, 5000);
    CHECK_EQ(net_load32(answer->data + 26), NAMESERVER);
    CHECK_EQ(slirp_sum(answer->data + 14, 20, 0), 0xffff);
    uint8_t pseudo[4] = { 0, 6, 0, 24 };
    CHECK_EQ(slirp_sum(answer->data + 34, 24, slirp_sum(pseudo, 4, slirp_sum(answer->data + 26, 8, 0))), 0xffff);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

#endif
