/* What one guest behind a NAT takes of what the process has once. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "budget.h"
#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

#ifdef AIOKVM_HAVE_SLIRP

static struct aiokvm_budget_state state_of(int which)
{
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(which), &state);
    return state;
}

static uint64_t used_bytes(void)
{
    return state_of(AIOKVM_BUDGET_NET_BYTES).used;
}

/* Others have all of it. */
static struct aiokvm_share *take_all(int which)
{
    struct aiokvm_share *others = aiokvm_share_new(which);
    aiokvm_share_add(others, state_of(which).total);
    return others;
}

TEST(a_nat_and_its_program_have_one_share_of_the_descriptors)
{
    make_path();
    uint64_t shares = state_of(AIOKVM_BUDGET_DESCRIPTORS).shares;
    struct aiokvm_share *whole = aiokvm_share_new(AIOKVM_BUDGET_DESCRIPTORS);
    struct aiokvm_share *program = aiokvm_share_new_part(whole);
    struct aiokvm_net_slirp_config mine = config();
    mine.descriptors = whole;
    struct nat nat = nat_with(&mine, 0);
    CHECK_EQ(state_of(AIOKVM_BUDGET_DESCRIPTORS).shares, shares + 1);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    open_connection(&nat, 5000, SERVICE, 80);
    CHECK_EQ(whole->used, 2);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    /* It is the program's now. */
    CHECK_EQ(whole->used, 1);
    close(fd);
    /* What the program has is what the guest cannot have. */
    uint8_t frame[100];
    aiokvm_share_add(program, state_of(AIOKVM_BUDGET_DESCRIPTORS).total / 3);
    say(&nat, frame, tcp_frame(frame, GUEST, 6000, SERVICE, 80, 1000, 0, SYN, NULL, 0));
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    aiokvm_net_free(nat.net);
    aiokvm_share_free(whole);
    aiokvm_share_free(program);
    CHECK_EQ(state_of(AIOKVM_BUDGET_DESCRIPTORS).used, 0);
    CHECK_EQ(state_of(AIOKVM_BUDGET_DESCRIPTORS).shares, shares);
    remove_path();
}

TEST(a_connection_that_waits_for_a_descriptor_gets_the_next_one)
{
    make_path();
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    int last = dup(0);
    close(last);
    limit_descriptors((rlim_t)last + 1);
    open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    limit_descriptors(limits.rlim_cur);
    /* The guest says nothing meanwhile: it waits to be greeted. */
    int fd = -1;
    CHECK_SOON((fake_end_serve(nat.net), (fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection)) >= 0));
    CHECK_EQ(connection.port, 5000);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(frames_that_wait_for_the_guest_take_bytes)
{
    uint64_t before = used_bytes();
    struct nat nat = nat_new();
    CHECK(used_bytes() >= before + sizeof(struct slirp_end));
    greet(&nat);
    uint64_t idle = used_bytes();
    nat.guest->blocks = true;
    static uint8_t frame[1100];
    frame[34] = 8; /* a ping, which the NAT answers by itself */
    uint32_t size = seal(frame, 1, GUEST, HOST, 1000);
    for (int i = 0; i < 200; i++)
        say(&nat, frame, size);
    /* The first step is kept back for it in any case. */
    uint64_t waiting = used_bytes();
    CHECK(waiting >= idle + 200 * size - NET_ROOM_STEP);
    struct aiokvm_share *others = take_all(AIOKVM_BUDGET_NET_BYTES);
    uint64_t full = stats(nat.slirp).dropped_full;
    for (int i = 0; i < 100; i++)
        say(&nat, frame, size);
    CHECK(stats(nat.slirp).dropped_full > full);
    CHECK_EQ(used_bytes(), waiting + others->used);
    aiokvm_share_free(others);
    CHECK_EQ(used_bytes(), waiting);
    fake_end_unblock(nat.guest);
    fake_end_serve(nat.net);
    CHECK_EQ(used_bytes(), idle);
    nat.guest->blocks = true;
    say(&nat, frame, size);
    aiokvm_net_free(nat.net);
    CHECK_EQ(used_bytes(), before);
}

TEST(frames_for_who_is_not_known_take_bytes)
{
    uint64_t before = used_bytes();
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    int fd = connect_udp(aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "10.0.2.99", 53));
    static uint8_t data[1000];
    CHECK_EQ(write(fd, data, sizeof(data)), sizeof(data));
    CHECK_SOON((fake_end_serve(nat.net), slirp->held_count == 1));
    uint64_t held = used_bytes();
    struct aiokvm_share *others = take_all(AIOKVM_BUDGET_NET_BYTES);
    CHECK_EQ(write(fd, data, sizeof(data)), sizeof(data));
    CHECK_SOON((fake_end_serve(nat.net), stats(nat.slirp).dropped_full == 1));
    aiokvm_share_free(others);
    /* It is given up after a second. */
    CHECK_SOON((fake_end_serve(nat.net), slirp->held_count == 0));
    CHECK(used_bytes() <= held - sizeof(data));
    close(fd);
    aiokvm_net_free(nat.net);
    CHECK_EQ(used_bytes(), before);
}

TEST(fragments_questions_and_flows_take_bytes)
{
    uint64_t before = used_bytes();
    struct aiokvm_net_slirp_config with_dns = config();
    with_dns.has_dns = true;
    struct nat nat = nat_with(&with_dns, 0);
    greet(&nat);
    uint64_t idle = used_bytes();
    static uint8_t frame[1000];
    for (uint32_t id = 0; id < 3; id++) {
        memset(frame, 0, sizeof(frame));
        uint32_t size = seal(frame, 17, GUEST, HOST, 800);
        net_store16(frame + 18, id);
        net_store16(frame + 20, 0x2000);
        net_store16(frame + 24, 0);
        net_store16(frame + 24, ~slirp_sum(frame + 14, 20, 0));
        say(&nat, frame, size);
    }
    uint64_t fragments = used_bytes();
    CHECK(fragments >= idle + 3 * 65536);
    uint32_t size = put_udp(frame, GUEST, 4000, NAMESERVER, 53);
    say(&nat, frame, size);
    uint64_t questions = used_bytes();
    CHECK(questions > fragments);
    size = put_udp(frame, GUEST, 4001, HOST, 4002);
    say(&nat, frame, size);
    /* Whether it leads anywhere: it is looked at before. */
    struct aiokvm_share *others = take_all(AIOKVM_BUDGET_NET_BYTES);
    uint64_t full = stats(nat.slirp).dropped_full;
    say(&nat, frame, put_udp(frame, GUEST, 4000, NAMESERVER, 53));
    CHECK_EQ(stats(nat.slirp).dropped_full, full + 1);
    memset(frame, 0, sizeof(frame));
    size = seal(frame, 17, GUEST, HOST, 800);
    net_store16(frame + 18, 77);
    net_store16(frame + 20, 0x2000);
    net_store16(frame + 24, 0);
    net_store16(frame + 24, ~slirp_sum(frame + 14, 20, 0));
    say(&nat, frame, size);
    CHECK_EQ(stats(nat.slirp).dropped_full, full + 2);
    aiokvm_share_free(others);
    aiokvm_net_free(nat.net);
    CHECK_EQ(used_bytes(), before);
}

#endif
