/* Services behind user-mode NAT. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

#ifdef AIOKVM_HAVE_SLIRP

TEST(a_connection_to_a_service_is_a_stream)
{
    make_path();
    struct nat nat = nat_new();
    struct aiokvm_net_slirp_connection connection;
    int service = add_service_to_be_removed(&nat, 8);
    CHECK(service > 0);
    CHECK_EQ(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8), -EADDRINUSE);
    CHECK_EQ(aiokvm_net_slirp_add_service(nat.slirp, 0x08080808, 80, "/nowhere/else", 8), -ENOENT);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_news news;
    CHECK_EQ(aiokvm_net_take(nat.net, &news), 1);
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_READABLE);
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    CHECK_EQ(connection.address, GUEST);
    CHECK_EQ(connection.port, 5000);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);

    uint8_t frame[200];
    char buffer[100];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK | PSH, "hello", 5));
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), 5);
    CHECK(!memcmp(buffer, "hello", 5));
    CHECK_EQ(write(fd, "good day", 8), 8);
    for (;;) {
        const struct fake_frame *answer = hear_tcp(&nat, 5000);
        if (answer->size >= 62 && net_load16(answer->data + 16) == 48) {
            CHECK(!memcmp(answer->data + 54, "good day", 8));
            break;
        }
        heard(&nat);
    }
    fake_end_clear(nat.guest);
    /* Its end is one for the guest. */
    close(fd);
    for (;;) {
        const struct fake_frame *answer = hear_tcp(&nat, 5000);
        bool ended = answer->data[47] & FIN;
        heard(&nat);
        if (ended)
            break;
    }
    CHECK_EQ(aiokvm_net_slirp_remove_service(nat.slirp, (uint32_t)service), 0);
    CHECK_EQ(aiokvm_net_slirp_remove_service(nat.slirp, (uint32_t)service), -ENOENT);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -ENOENT);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* libslirp has one end of it, and the program the other. */
TEST(a_connection_to_a_service_is_two_descriptors)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    struct aiokvm_budget *budget = aiokvm_budget_of_process(AIOKVM_BUDGET_DESCRIPTORS);
    struct aiokvm_budget_state state;
    for (uint32_t i = 0; i < 3; i++)
        open_connection(&nat, 5000 + i, SERVICE, 80);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 6);
    /* With one that is left there is none to be had. */
    struct aiokvm_share others;
    aiokvm_share_open(&others, budget);
    while (aiokvm_share_fits(&((struct slirp_end *)nat.slirp)->descriptors, 2))
        aiokvm_share_add(&others, 1);
    uint8_t frame[100];
    say(&nat, frame, tcp_frame(frame, GUEST, 6000, SERVICE, 80, 1000, 0, SYN, NULL, 0));
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    aiokvm_share_close(&others);
    aiokvm_net_free(nat.net);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 0);
    remove_path();
}

TEST(connections_are_ended_piece_by_piece)
{
    make_path();
    struct aiokvm_net_slirp_config many = config();
    many.max_connections = 300;
    struct nat nat = nat_with(&many, 0);
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 300) > 0);
    greet(&nat);
    for (uint32_t port = 5000; port < 5300; port++)
        open_connection(&nat, port, SERVICE, 80);
    CHECK_EQ(slirp->tcp, 300);
    uint32_t calls = 1;
    fake_end_clear(nat.guest);
    CHECK_EQ(aiokvm_net_slirp_cut_some(nat.slirp), 1);
    CHECK(slirp->tcp > 0 && slirp->tcp < 300);
    while (aiokvm_net_slirp_cut_some(nat.slirp) == 1)
        CHECK(++calls < 1000);
    CHECK_EQ(slirp->tcp, 0);
    CHECK_EQ(aiokvm_net_slirp_cut_some(nat.slirp), 0);
    /* Nobody takes it for an end. */
    CHECK(nat.guest->frames[0].data[47] & RST);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(what_is_not_connected_is_closed_piece_by_piece)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t size = sizeof(at);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQ(bind(listener, (struct sockaddr *)&at, size), 0);
    CHECK_EQ(listen(listener, 1000), 0);
    CHECK_EQ(getsockname(listener, (struct sockaddr *)&at, &size), 0);
    struct aiokvm_net_slirp_config many = config();
    many.max_connections = 300;
    many.host_loopback = 1;
    struct nat nat = nat_with(&many, 0);
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    greet(&nat);
    /* Its answers do not get there: the handshakes do not end. */
    nat.guest->blocks = true;
    uint8_t frame[100];
    for (uint32_t port = 1; port <= 300; port++) {
        say(&nat, frame, put_udp(frame, GUEST, port, HOST, 9));
        say(&nat, frame, tcp_frame(frame, GUEST, port, HOST, ntohs(at.sin_port), 1000, 0, SYN, NULL, 0));
    }
    CHECK_EQ(slirp->other, 300);
    CHECK_EQ(slirp->tcp, 300);
    uint32_t calls = 1;
    while (aiokvm_net_slirp_cut_some(nat.slirp) == 1)
        CHECK(++calls < 1000);
    CHECK(calls > 2);
    CHECK_EQ(slirp->other, 0);
    CHECK_EQ(slirp->tcp, 0);
    CHECK_EQ(slirp->descriptors.used, 0);
    CHECK_EQ(aiokvm_net_slirp_cut_some(nat.slirp), 0);
    fake_end_unblock(nat.guest);
    fake_end_serve(nat.net);
    aiokvm_net_free(nat.net);
    close(listener);
}

TEST(connections_that_nobody_accepts_are_bounded)
{
    make_path();
    struct aiokvm_net_slirp_config many = config();
    many.max_connections = 300;
    struct nat nat = nat_with(&many, 0);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    /* More than the backlog of the socket has: libslirp waits for a connection to be made. */
    for (uint32_t port = 5000; port < 5200; port++)
        open_connection(&nat, port, SERVICE, 80);
    CHECK_EQ(stats(nat.slirp).dropped_full, 190);
    struct aiokvm_net_slirp_connection connection;
    for (uint32_t port = 5000; port < 5010; port++) {
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(fd >= 0);
        CHECK_EQ(connection.port, port);
        close(fd);
    }
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    /* Waiting ones go with the end. */
    open_connection(&nat, 6000, SERVICE, 80);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(without_descriptors_a_connection_waits)
{
    make_path();
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    /* libslirp gets the last one. */
    int last = dup(0);
    close(last);
    limit_descriptors((rlim_t)last + 1);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    limit_descriptors(limits.rlim_cur);
    uint8_t frame[100];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK, "x", 1));
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(without_descriptors_who_waits_keeps_its_name)
{
    make_path();
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 10) > 0);
    greet(&nat);
    uint32_t next[2] = { begin_connection(&nat, 5000, 1000), begin_connection(&nat, 5001, 1000) };
    int last = dup(0);
    close(last);
    limit_descriptors((rlim_t)last + 1);
    uint8_t frame[100];
    struct aiokvm_net_slirp_connection connection;
    for (uint32_t i = 0; i < 2; i++)
        say(&nat, frame, tcp_frame(frame, GUEST, 5000 + i, SERVICE, 80, 1001, next[i], ACK, NULL, 0));
    /* That of others, too. */
    say(&nat, frame, put_udp(frame, GUEST, 7000, HOST, 67));
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    CHECK_EQ(aiokvm_net_slirp_accept(nat.slirp, 1, &connection), -EAGAIN);
    limit_descriptors(limits.rlim_cur);
    for (uint32_t i = 0; i < 2; i++) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5001, SERVICE, 80, 1001, next[1], ACK, NULL, 0));
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(fd >= 0);
        CHECK_EQ(connection.port, 5000 + i);
        close(fd);
    }
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(connections_to_a_service_that_are_begun_alone_are_bounded)
{
    make_path();
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    struct slirp_begun *begun = &slirp->begun;
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint8_t frame[100];
    for (uint32_t port = 1; port <= 1000; port++) {
        /* Twice, as if the answer was lost. */
        for (int i = 0; i < 2; i++)
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1000, 0, SYN, NULL, 0));
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(begun->count, SLIRP_CONNECTING);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING);
    CHECK_EQ(stats(nat.slirp).dropped_full, 2 * (1000 - SLIRP_CONNECTING));
    /* The guest gives one up, in a way that libslirp does not believe: both do all the same. */
    say(&nat, frame, tcp_frame(frame, GUEST, 7, SERVICE, 80, 0x70000000, 0, RST, NULL, 0));
    CHECK_EQ(begun->count, SLIRP_CONNECTING - 1);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING - 1);
    /* One that is made has no place there, and is a descriptor. */
    for (uint32_t port = 5000; port < 5003; port++) {
        struct aiokvm_net_slirp_connection connection;
        open_connection(&nat, port, SERVICE, 80);
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(fd >= 0);
        CHECK_EQ(connection.port, port);
        close(fd);
        CHECK_EQ(begun->count, SLIRP_CONNECTING - 1);
        CHECK_EQ(slirp->tcp, port - 4999);
    }
    /* Begun anew with another number: the old one goes. */
    begin_connection(&nat, 8, 900000);
    CHECK_EQ(begun->count, SLIRP_CONNECTING - 1);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING - 1);
    /* A while later others have their places, though libslirp's time has not come. */
    for (uint32_t i = 0; i < begun->count; i++)
        begun->connecting[i].since_ns -= UINT64_C(75000000000);
    for (uint32_t port = 2001; port <= 3000; port++) {
        say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1000, 0, SYN, NULL, 0));
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(begun->count, SLIRP_CONNECTING);
    CHECK_EQ(connections(&nat, "SYN_RCVD"), SLIRP_CONNECTING);
    CHECK_EQ(stats(nat.slirp).dropped_full, 2 * (1000 - SLIRP_CONNECTING) + 1000 - SLIRP_CONNECTING);
    for (uint32_t i = 0; i < begun->count; i++)
        CHECK((begun->connecting[i].ports >> 16) > 2000);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* A SYN to another port of the service's address, in two pieces: the last has the service's port where a whole one has
 * it. */
TEST(what_is_a_service_is_seen_in_the_whole_datagram)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint8_t whole[100], frame[100];
    uint32_t size = tcp_frame(whole, GUEST, 5000, SERVICE, 81, 1000, 80, SYN, NULL, 0);
    for (uint32_t at = 0; at <= 8; at += 8) {
        uint32_t length = at ? 12 : 8;
        memcpy(frame, whole, 34);
        memcpy(frame + 34, whole + 34 + at, length);
        net_store16(frame + 16, 20 + length);
        net_store16(frame + 20, at ? at / 8 : 0x2000);
        net_store16(frame + 24, 0);
        net_store16(frame + 24, ~slirp_sum(frame + 14, 20, 0));
        say(&nat, frame, 34 + length);
    }
    CHECK_EQ(stats(nat.slirp).dropped_filtered, 1);
    CHECK_EQ(((struct slirp_end *)nat.slirp)->tcp, 0);
    say(&nat, whole, size);
    CHECK_EQ(stats(nat.slirp).dropped_filtered, 2);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(a_restricted_guest_has_its_services_alone)
{
    make_path();
    struct aiokvm_net_slirp_config restricted = config();
    restricted.restricted = 1;
    struct nat nat = nat_with(&restricted, 0);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    struct aiokvm_net_slirp_connection connection;
    open_connection(&nat, 5000, SERVICE, 80);
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    close(fd);
    /* The service's address at the place where libslirp looks for it, in all of IPv6. */
    uint8_t frame[100], pseudo[4] = { 0, 6, 0, 20 };
    for (uint32_t at = 22; at <= 50; at += 4) {
        uint32_t size = frame6(frame, 6, OUTSIDE6, 80, SYN);
        net_store32(frame + at, SERVICE);
        net_store16(frame + 70, ~slirp_sum(frame + 54, 20, slirp_sum(pseudo, 4, slirp_sum(frame + 22, 32, 0))));
        say(&nat, frame, size);
    }
    CHECK_EQ(stats(nat.slirp).dropped_filtered, 8);
    CHECK_EQ(((struct slirp_end *)nat.slirp)->tcp, 1);
    aiokvm_net_free(nat.net);
    remove_path();
}

#endif
