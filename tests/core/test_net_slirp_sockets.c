/* How a guest's connections end, and how many there may be. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

#ifdef AIOKVM_HAVE_SLIRP

/* Somebody of the host who listens, and the guest reaches the host's loopback. */
static struct nat nat_of_host(int *listener, uint32_t *port)
{
    struct aiokvm_net_slirp_config open = config();
    open.host_loopback = 1;
    struct nat nat = nat_with(&open, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    *listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQ(bind(*listener, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_EQ(listen(*listener, 4096), 0);
    CHECK_EQ(getsockname(*listener, (struct sockaddr *)&address, &length), 0);
    *port = ntohs(address.sin_port);
    greet(&nat);
    return nat;
}

static void reset(int fd)
{
    struct linger none = { .l_onoff = 1 };
    CHECK_EQ(setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none)), 0);
    close(fd);
}

/* What the next frame with one of these flags has of them. */
static uint32_t hear_end(struct nat *nat, uint32_t port)
{
    for (;;) {
        uint32_t flags = hear_tcp(nat, port)->data[47];
        heard(nat);
        if (flags & (FIN | RST))
            return flags & (FIN | RST);
    }
}

/* What who reads there finds: 0 for an end, else an errno. */
static int read_end(int fd)
{
    char buffer[100];
    ssize_t count;
    while ((count = recv(fd, buffer, sizeof(buffer), 0)) > 0)
        continue;
    return count ? errno : 0;
}

static struct slirp_socket *first_socket(struct nat *nat)
{
    struct slirp_sockets *sockets = &((struct slirp_end *)nat->slirp)->sockets;
    for (uint32_t i = 0; i < SLIRP_SOCKET_BUCKETS; i++)
        if (sockets->buckets[i])
            return sockets->buckets[i];
    return NULL;
}

TEST(a_reset_of_the_guest_is_one_at_the_host)
{
    int listener;
    uint32_t to;
    struct nat nat = nat_of_host(&listener, &to);
    uint8_t frame[100];
    for (uint32_t port = 5000; port < 5002; port++) {
        uint32_t next = open_connection(&nat, port, HOST, to);
        int fd = accept(listener, NULL, NULL);
        say(&nat, frame, tcp_frame(frame, GUEST, port, HOST, to, 1001, next, ACK | PSH, "half", 4));
        /* The first one ends in order. */
        uint32_t flags = port == 5000 ? FIN | ACK : RST;
        say(&nat, frame, tcp_frame(frame, GUEST, port, HOST, to, 1005, next, flags, NULL, 0));
        CHECK_EQ(read_end(fd), port == 5000 ? 0 : ECONNRESET);
        close(fd);
    }
    /* Also of one that the guest has closed before. */
    uint32_t next = open_connection(&nat, 5002, HOST, to);
    int fd = accept(listener, NULL, NULL);
    say(&nat, frame, tcp_frame(frame, GUEST, 5002, HOST, to, 1001, next, FIN | ACK, NULL, 0));
    CHECK_EQ(read_end(fd), 0);
    say(&nat, frame, tcp_frame(frame, GUEST, 5002, HOST, to, 1002, next, RST, NULL, 0));
    CHECK(send(fd, "x", 1, MSG_NOSIGNAL) < 0);
    close(fd);
    /* A guest that is gone has not said all that it had to say. */
    open_connection(&nat, 5003, HOST, to);
    fd = accept(listener, NULL, NULL);
    aiokvm_net_free(nat.net);
    CHECK_EQ(read_end(fd), ECONNRESET);
    close(fd);
    close(listener);
}

TEST(a_reset_of_the_host_is_one_at_the_guest)
{
    int listener;
    uint32_t to;
    struct nat nat = nat_of_host(&listener, &to);
    for (uint32_t port = 5000; port < 5002; port++) {
        open_connection(&nat, port, HOST, to);
        int fd = accept(listener, NULL, NULL);
        CHECK_EQ(write(fd, "page", 4), 4);
        if (port == 5000)
            close(fd);
        else
            reset(fd);
        CHECK_EQ(hear_end(&nat, port), port == 5000 ? FIN : RST);
    }
    aiokvm_net_free(nat.net);
    close(listener);
}

TEST(a_reset_is_seen_behind_what_was_sent_before)
{
    int listener;
    uint32_t to;
    struct nat nat = nat_of_host(&listener, &to);
    uint32_t next = open_connection(&nat, 5000, HOST, to);
    int fd = accept(listener, NULL, NULL);
    static uint8_t block[1 << 17], frame[60000];
    /* The guest takes nothing, and says more than the host takes. */
    int small = 4096;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    for (int i = 0; i < 20; i++) {
        send(fd, block, sizeof(block), MSG_DONTWAIT);
        fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    uint32_t seq = 1001;
    for (int i = 0; i < 200; i++, seq += 1000)
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, HOST, to, seq, next, ACK, block, 1000));
    fake_end_clear(nat.guest);
    reset(fd);
    /* Then it takes all there is. */
    for (uint32_t got = 0;;) {
        const struct fake_frame *part = hear_tcp(&nat, 5000);
        uint32_t flags = part->data[47], from = net_load32(part->data + 38) - next, size = part->size - 54;
        heard(&nat);
        CHECK(!(flags & FIN));
        if (flags & RST)
            break;
        if (from <= got && from + size > got)
            got = from + size;
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, HOST, to, seq, next + got, ACK, NULL, 0));
    }
    aiokvm_net_free(nat.net);
    close(listener);
}

TEST(a_reset_behind_an_end_reaches_a_guest_whose_window_is_full)
{
    int listener;
    uint32_t to;
    struct nat nat = nat_of_host(&listener, &to);
    uint32_t next = open_connection(&nat, 5000, HOST, to);
    int fd = accept(listener, NULL, NULL), small = 4096;
    static uint8_t block[1000], frame[2000];
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    CHECK_EQ(shutdown(fd, SHUT_WR), 0);
    CHECK_EQ(hear_end(&nat, 5000), FIN);
    next++;
    /* The guest goes on until it may say no more. */
    for (uint32_t seq = 1001, window = 1; window;) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, HOST, to, seq, next, ACK, block, sizeof(block)));
        const struct fake_frame *answer = hear_tcp(&nat, 5000);
        seq = net_load32(answer->data + 42);
        window = net_load16(answer->data + 48);
        heard(&nat);
    }
    fake_end_clear(nat.guest);
    reset(fd);
    CHECK_EQ(hear_end(&nat, 5000), RST);
    CHECK(!first_socket(&nat));
    aiokvm_net_free(nat.net);
    close(listener);
}

TEST(a_reset_goes_through_a_forward_both_ways)
{
    struct nat nat = nat_new();
    greet(&nat);
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80);
    uint8_t frame[100];
    uint32_t from;
    int fd = connect_to(port);
    check_forward(&nat, fd);
    reset(fd);
    CHECK_EQ(hear_end(&nat, 80), RST);
    fd = connect_to(port);
    uint32_t next = take_connection(&nat, &from);
    say(&nat, frame, tcp_frame(frame, GUEST, 80, HOST, from, 7001, next, RST, NULL, 0));
    CHECK_EQ(read_end(fd), ECONNRESET);
    close(fd);
    /* The guest takes none. */
    fake_end_clear(nat.guest);
    fd = connect_to(port);
    const struct fake_frame *syn = hear_tcp(&nat, 80);
    from = net_load16(syn->data + 34);
    next = net_load32(syn->data + 38) + 1;
    heard(&nat);
    say(&nat, frame, tcp_frame(frame, GUEST, 80, HOST, from, 0, next, RST | ACK, NULL, 0));
    CHECK_EQ(read_end(fd), ECONNRESET);
    close(fd);
    aiokvm_net_free(nat.net);
}

TEST(a_service_hears_of_a_reset_and_can_make_one)
{
    make_path();
    struct nat nat = nat_new();
    uint32_t broken;
    struct aiokvm_net_slirp_connection connection;
    CHECK(add_service_to_be_removed(&nat, 2) > 0);
    greet(&nat);
    uint8_t frame[100];
    for (uint32_t port = 5000; port < 5002; port++) {
        uint32_t next = open_connection(&nat, port, SERVICE, 80);
        int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        uint32_t flags = port == 5000 ? FIN | ACK : RST;
        say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1001, next, flags, NULL, 0));
        CHECK_EQ(read_end(fd), 0);
        CHECK_EQ(aiokvm_net_slirp_take_broken(nat.slirp, &broken), port != 5000);
        if (port != 5000)
            CHECK_EQ(broken, connection.id);
        close(fd);
    }
    /* The other way. */
    uint32_t next = open_connection(&nat, 5002, SERVICE, 80);
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    CHECK_EQ(write(fd, "bye", 3), 3);
    CHECK_EQ(aiokvm_net_slirp_abort(nat.slirp, connection.id), 0);
    close(fd);
    const struct fake_frame *last = hear_tcp(&nat, 5002);
    CHECK_EQ(net_load32(last->data + 38), next);
    CHECK(!memcmp(last->data + 54, "bye", 3));
    CHECK_EQ(hear_end(&nat, 5002), RST);
    CHECK_EQ(aiokvm_net_slirp_abort(nat.slirp, connection.id), -ENOENT);
    /* The guest has closed it. */
    next = open_connection(&nat, 5003, SERVICE, 80);
    fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    say(&nat, frame, tcp_frame(frame, GUEST, 5003, SERVICE, 80, 1001, next, FIN | ACK, NULL, 0));
    CHECK_EQ(aiokvm_net_slirp_abort(nat.slirp, connection.id), 0);
    close(fd);
    for (;;) {
        const struct fake_frame *end = hear_tcp(&nat, 5003);
        if (end->data[47] & RST) {
            CHECK_EQ(net_load32(end->data + 38), next);
            CHECK_EQ(net_load32(end->data + 42), 1002);
            CHECK_EQ(slirp_sum(end->data + 14, 20, 0), 0xffff);
            break;
        }
        CHECK(!(end->data[47] & FIN));
        heard(&nat);
    }
    heard(&nat);
    /* So do those for which there is no room, and those of a service that goes. */
    for (uint32_t port = 6000; port < 6003; port++)
        open_connection(&nat, port, SERVICE, 80);
    CHECK_EQ(hear_end(&nat, 6002), RST);
    CHECK_EQ(aiokvm_net_slirp_remove_service(nat.slirp, 1), 0);
    CHECK_EQ(hear_end(&nat, 6000), RST);
    CHECK_EQ(hear_end(&nat, 6001), RST);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(connections_that_are_half_closed_make_room)
{
    int listener;
    uint32_t to;
    struct nat nat = nat_of_host(&listener, &to);
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    uint8_t frame[100];
    int held[64];
    for (uint32_t i = 0; i < 64; i++) {
        uint32_t next = open_connection(&nat, 5000 + i, HOST, to);
        held[i] = accept(listener, NULL, NULL);
        say(&nat, frame, tcp_frame(frame, GUEST, 5000 + i, HOST, to, 1001, next, FIN | ACK, NULL, 0));
        fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(slirp->tcp, 64);
    /* They have a moment. */
    say(&nat, frame, tcp_frame(frame, GUEST, 6000, HOST, to, 1000, 0, SYN, NULL, 0));
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    CHECK_EQ(slirp->tcp, 64);
    for (uint32_t i = 0; i < SLIRP_SOCKET_BUCKETS; i++)
        for (struct slirp_socket *at = slirp->sockets.buckets[i]; at; at = at->next)
            at->heard_ns -= UINT64_C(2000000000);
    slirp->sockets.last->heard_ns -= 1;
    open_connection(&nat, 6000, HOST, to);
    CHECK_EQ(slirp->tcp, 64);
    /* Whoever had to go hears of it, at both sides. */
    uint32_t gone = 0;
    for (uint32_t i = 0; i < 64; i++)
        gone += send(held[i], "x", 1, MSG_NOSIGNAL) < 0;
    CHECK_EQ(gone, 1);
    /* Where there is room they have four minutes, and those that are open two hours. */
    slirp->max = 1000;
    CHECK(!slirp_sockets_idle(&slirp->sockets, now_ns() + UINT64_C(230000000000), false));
    CHECK(slirp_sockets_idle(&slirp->sockets, now_ns() + UINT64_C(240000000000), false));
    struct slirp_socket one = *first_socket(&nat);
    struct slirp_sockets sockets = { .buckets = { &one } };
    one.next = NULL;
    CHECK(!slirp_sockets_idle(&sockets, one.heard_ns - 1, true));
    one.is_half = false;
    CHECK(!slirp_sockets_idle(&sockets, now_ns() + UINT64_C(7430000000000), true));
    CHECK(slirp_sockets_idle(&sockets, now_ns() + UINT64_C(7440000000000), false));
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    for (uint32_t i = 0; i < SLIRP_SOCKET_BUCKETS; i++)
        for (struct slirp_socket *at = slirp->sockets.buckets[i]; at; at = at->next)
            at->heard_ns -= UINT64_C(240000000000);
    for (int round = 0; round < 20; round++) {
        slirp->reaped_ns = 0;
        net_ready(nat.slirp);
        fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(slirp->tcp, 1);
    for (uint32_t i = 0; i < 64; i++)
        close(held[i]);
    close(listener);
    aiokvm_net_free(nat.net);
}

TEST(ports_of_udp_that_are_there_go_on_when_there_are_no_more)
{
    struct aiokvm_net_slirp_config open = config();
    open.host_loopback = 1;
    struct nat nat = nat_with(&open, 0);
    greet(&nat);
    uint8_t frame[100];
    for (uint32_t port = 1; port <= 100; port++)
        say(&nat, frame, put_udp(frame, GUEST, port, HOST, 9));
    CHECK_EQ(((struct slirp_end *)nat.slirp)->other, 64);
    CHECK_EQ(stats(nat.slirp).dropped_full, 36);
    say(&nat, frame, put_udp(frame, GUEST, 64, HOST, 10));
    CHECK_EQ(stats(nat.slirp).dropped_full, 36);
    say(&nat, frame, put_udp(frame, GUEST, 65, HOST, 10));
    CHECK_EQ(stats(nat.slirp).dropped_full, 37);
    aiokvm_net_free(nat.net);
}

TEST(a_guest_leaves_descriptors_to_the_others)
{
    struct rlimit limits;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limits), 0);
    limit_descriptors(200);
    struct aiokvm_net_slirp_config many = config();
    many.host_loopback = 1;
    many.max_connections = 512;
    struct nat nats[3];
    uint8_t frame[100];
    for (size_t i = 0; i < LENGTH(nats); i++)
        nats[i] = nat_with(&many, 0);
    for (size_t i = 0; i < LENGTH(nats); i++) {
        struct slirp_end *slirp = (struct slirp_end *)nats[i].slirp;
        greet(&nats[i]);
        for (uint32_t port = 1; port <= 300; port++)
            say(&nats[i], frame, put_udp(frame, GUEST, port, HOST, 9));
        CHECK(slirp->other >= 10 && slirp->other < 64);
        CHECK(stats(nats[i].slirp).dropped_full > 200);
        int spare = dup(0);
        CHECK(spare >= 0);
        close(spare);
    }
    for (size_t i = 0; i < LENGTH(nats); i++)
        aiokvm_net_free(nats[i].net);
    limit_descriptors(limits.rlim_cur);
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_DESCRIPTORS), &state);
    CHECK_EQ(state.used, 0);
    CHECK_EQ(state.shares, 0);
}

#endif
