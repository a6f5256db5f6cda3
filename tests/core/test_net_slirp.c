/* User-mode NAT: what a guest finds, and how much it may have. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

#ifdef AIOKVM_HAVE_SLIRP

TEST(a_guest_gets_its_address_by_dhcp)
{
    struct nat nat = nat_new();
    static uint8_t frame[600];
    uint8_t *dhcp = frame + 42;
    net_store16(frame + 34, 68);
    net_store16(frame + 36, 67);
    net_store16(frame + 38, 8 + 300);
    static const uint8_t START[] = { 1, 1, 6, 0, 1, 2, 3, 4 };
    memcpy(dhcp, START, sizeof(START));
    static const uint8_t MAC[] = { 0x52, 0x54, 0, 0x12, 0x34, 0x56 };
    memcpy(dhcp + 28, MAC, 6);
    static const uint8_t OPTIONS[] = { 0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255 };
    memcpy(dhcp + 236, OPTIONS, sizeof(OPTIONS));
    say(&nat, frame, seal(frame, 17, 0, 0xffffffff, 308));
    const struct fake_frame *offer = hear(&nat);
    CHECK_EQ(net_load16(offer->data + 36), 68);
    CHECK_EQ(net_load32(offer->data + 42 + 16), GUEST);
    CHECK(memmem(offer->data, offer->size, "guest", 5));
    CHECK(memmem(offer->data, offer->size, "example", 7));
    aiokvm_net_free(nat.net);
}

TEST(the_router_answers_a_ping)
{
    struct nat nat = nat_new();
    greet(&nat);
    uint8_t frame[100] = { 0 };
    frame[34] = 8;
    memcpy(frame + 42, "ping", 4);
    say(&nat, frame, seal(frame, 1, GUEST, HOST, 12));
    const struct fake_frame *answer = hear(&nat);
    CHECK_EQ(answer->data[34], 0);
    CHECK(!memcmp(answer->data + 42, "ping", 4));
    aiokvm_net_free(nat.net);
}

TEST(a_router_advertisement_answers_a_solicitation)
{
    struct nat nat = nat_new();
    uint8_t frame[62] = { 0x33, 0x33, 0, 0, 0, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x86, 0xdd, 0x60 };
    net_store16(frame + 18, 8);
    frame[20] = 58;
    frame[21] = 255;
    static const uint8_t FROM[16] = { 0xfe, 0x80, [15] = 0x56 }, TO[16] = { 0xff, 2, [15] = 2 };
    memcpy(frame + 22, FROM, 16);
    memcpy(frame + 38, TO, 16);
    frame[54] = 133;
    uint8_t pseudo[4] = { 0, 58, 0, 8 };
    net_store16(frame + 56, ~slirp_sum(frame + 54, 8, slirp_sum(pseudo, 4, slirp_sum(frame + 22, 32, 0))));
    say(&nat, frame, sizeof(frame));
    const struct fake_frame *answer = hear(&nat);
    CHECK_EQ(net_load16(answer->data + 12), 0x86dd);
    CHECK_EQ(answer->data[54], 134);
    aiokvm_net_free(nat.net);
}

/* ---- bounds ---- */

TEST(a_guest_that_takes_nothing_is_not_sent_more)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    nat.guest->blocks = true;
    static uint8_t block[65536];
    uint32_t written = 0;
    for (ssize_t count; (count = write(fd, block, sizeof(block))) > 0;) {
        written += (uint32_t)count;
        fake_end_serve(nat.net);
        CHECK(written < 2000000);
    }
    CHECK_EQ(nat.guest->received, 0);
    /* Nothing is lost. */
    fake_end_unblock(nat.guest);
    uint8_t frame[100];
    for (uint32_t got = 0; got < written;) {
        const struct fake_frame *part = hear_tcp(&nat, 5000);
        if (net_load32(part->data + 38) == next + got)
            got += part->size - 54;
        heard(&nat);
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next + got, ACK, NULL, 0));
    }
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* Those that always have something to read, and take all the time that there is. */
TEST(busy_connections_leave_time_for_others)
{
    enum { BUSY = 4 };
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, BUSY) > 0);
    greet(&nat);
    uint32_t next[BUSY], rounds = 0, bytes = 0;
    int streams[BUSY], fd = connect_udp(aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "", 53));
    struct aiokvm_net_slirp_connection connection;
    for (uint32_t i = 0; i < BUSY; i++) {
        next[i] = open_connection(&nat, 5000 + i, SERVICE, 80);
        streams[i] = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
        CHECK(streams[i] >= 0);
    }
    static uint8_t data[1 << 16];
    uint8_t frame[100];
    for (bool has_come = false; !has_come; rounds++) {
        CHECK(rounds < 200);
        if (rounds == 20)
            CHECK_EQ(write(fd, "x", 1), 1);
        for (uint32_t i = 0; i < BUSY; i++)
            while (send(streams[i], data, sizeof(data), MSG_DONTWAIT) > 0)
                continue;
        aiokvm_net_serve(nat.net, 1);
        /* The guest takes all of it at once. */
        while (nat.guest->kept) {
            for (uint32_t i = 0; i < nat.guest->kept; i++) {
                const uint8_t *got = nat.guest->frames[i].data;
                has_come |= got[23] == 17;
                if (got[23] != 6)
                    continue;
                bytes += net_load16(got + 16) - 40;
                next[net_load16(got + 36) - 5000] = net_load32(got + 38) + net_load16(got + 16) - 40;
            }
            fake_end_clear(nat.guest);
            for (uint32_t i = 0; i < BUSY; i++)
                say(&nat, frame, tcp_frame(frame, GUEST, 5000 + i, SERVICE, 80, 1001, next[i], ACK, NULL, 0));
        }
    }
    CHECK(rounds > 20 && bytes > 20 * 1460);
    for (uint32_t i = 0; i < BUSY; i++)
        close(streams[i]);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(a_flood_of_connections_is_bounded)
{
    struct aiokvm_net_slirp_config open = config();
    open.host_loopback = 1;
    struct nat nat = nat_with(&open, 0);
    greet(&nat);
    /* Somebody who listens and never accepts. */
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_EQ(listen(listener, 4096), 0);
    CHECK_EQ(getsockname(listener, (struct sockaddr *)&address, &length), 0);
    uint8_t frame[100];
    for (uint32_t port = 1; port < 2000; port++) {
        say(&nat, frame, tcp_frame(frame, GUEST, port, HOST, ntohs(address.sin_port), 1, 0, SYN, NULL, 0));
        net_store16(frame + 34, port);
        net_store16(frame + 36, 1);
        net_store16(frame + 38, 8);
        say(&nat, frame, seal(frame, 17, GUEST, HOST, 8));
        if (port % 10 == 0)
            fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    CHECK_EQ(slirp->tcp, 64);
    CHECK_EQ(slirp->other, 64);
    CHECK(stats(nat.slirp).dropped_full >= 2 * (1999 - 64));
    close(listener);
    aiokvm_net_free(nat.net);
}

TEST(the_loopback_of_the_host_is_not_reached)
{
    struct nat nat = nat_new();
    greet(&nat);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY) };
    socklen_t length = sizeof(address);
    CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_EQ(listen(listener, 10), 0);
    CHECK_EQ(getsockname(listener, (struct sockaddr *)&address, &length), 0);
    static const uint32_t HOSTS[] = { HOST, 0x7f000001, 0, 0x0a0002ff };
    uint8_t frame[100];
    for (uint32_t i = 0; i < LENGTH(HOSTS); i++)
        say(&nat, frame, tcp_frame(frame, GUEST, 100 + i, HOSTS[i], ntohs(address.sin_port), 1, 0, SYN, NULL, 0));
    fake_end_serve(nat.net);
    CHECK_EQ(poll(&(struct pollfd){ .fd = listener, .events = POLLIN }, 1, 100), 0);
    CHECK_EQ(stats(nat.slirp).dropped_filtered, 4);
    /* The router says so. */
    const struct fake_frame *reset = hear_tcp(&nat, 100);
    CHECK_EQ(reset->data[47], RST | ACK);
    CHECK_EQ(net_load32(reset->data + 42), 2);
    close(listener);
    aiokvm_net_free(nat.net);
}

TEST(what_it_does_not_carry_is_counted)
{
    struct nat nat = nat_new();
    greet(&nat);
    uint8_t frame[200];
    uint64_t expected = 0;
    /* A ping to the outside, of IPv6; the router's is answered. */
    uint32_t size = frame6(frame, 58, OUTSIDE6, 0, 0);
    frame[54] = 128;
    say(&nat, frame, size);
    CHECK_EQ(stats(nat.slirp).dropped_unsupported, ++expected);
    size = frame6(frame, 58, HOST6, 0, 0);
    frame[54] = 128;
    say(&nat, frame, size);
    CHECK_EQ(stats(nat.slirp).dropped_unsupported, expected);
    /* The pieces of a datagram of UDP over IPv6 that is larger than a frame. */
    for (uint32_t at = 0; at < 3; at++) {
        size = frame6(frame, 44, OUTSIDE6, 0, 0);
        frame[54] = 17;
        frame[55] = 0;
        net_store16(frame + 56, at * 1448 | (at < 2));
        say(&nat, frame, size);
        CHECK_EQ(stats(nat.slirp).dropped_unsupported, ++expected);
    }
    /* Other protocols, of both versions; and what is not IP. */
    say(&nat, frame, frame6(frame, 132, OUTSIDE6, 80, 0));
    say(&nat, frame, seal(frame, 132, GUEST, 0x08080808, 20));
    net_store16(frame + 12, 0x88cc);
    say(&nat, frame, 60);
    CHECK_EQ(stats(nat.slirp).dropped_unsupported, expected + 3);
    aiokvm_net_free(nat.net);
}

TEST(large_frames_of_tcp_are_taken_and_given)
{
    make_path();
    struct aiokvm_net_slirp_config plain = config();
    struct nat nat = nat_with(&plain, AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    CHECK(fd >= 0);
    static uint8_t frame[60000], data[50000], received[60000];
    uint64_t state = 7;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)random_below(&state, 256);
    uint32_t size = tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK | PSH, data, sizeof(data));
    uint8_t pseudo[4] = { 0, 6 };
    net_store16(pseudo + 2, 20 + sizeof(data));
    net_store16(frame + 50, slirp_sum(pseudo, 4, slirp_sum(frame + 26, 8, 0)));
    struct virtio_net_hdr_v1 hdr = { .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
                                     .gso_size = 1460, .hdr_len = 54, .csum_start = 34, .csum_offset = 16 };
    CHECK_EQ(fake_end_send(nat.guest, &hdr, frame, size), NET_TAKEN);
    CHECK_EQ(read(fd, received, sizeof(received)), sizeof(data));
    CHECK(!memcmp(received, data, sizeof(data)));
    fake_end_serve(nat.net);
    fake_end_clear(nat.guest);
    /* The other way. */
    CHECK_EQ(write(fd, data, sizeof(data)), sizeof(data));
    uint32_t got = 0;
    bool is_large = false;
    while (got < sizeof(data)) {
        const struct fake_frame *part = hear_tcp(&nat, 5000);
        uint32_t length = part->size - 54;
        CHECK(!memcmp(part->data + 54, data + got, length));
        got += length;
        is_large |= part->hdr.gso_type == VIRTIO_NET_HDR_GSO_TCPV4;
        heard(&nat);
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 51001, next + got, ACK, NULL, 0));
    }
    CHECK(is_large);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(segments_with_gaps_are_bounded)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int fd = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    uint8_t frame[100];
    char buffer[1000];
    /* Some, and then what was missing. */
    for (uint32_t i = 1; i < 200; i++) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001 + i, next, ACK, "x", 1));
        fake_end_clear(nat.guest);
    }
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    CHECK_EQ(slirp->order.count, 1);
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), -1);
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK, "x", 1));
    fake_end_serve(nat.net);
    CHECK_EQ(read(fd, buffer, sizeof(buffer)), 200);
    CHECK_EQ(slirp->order.count, 0);
    CHECK_EQ(stats(nat.slirp).dropped_full, 0);
    /* Too many, for ever. */
    fake_end_clear(nat.guest);
    for (uint32_t i = 0; i < 300; i++) {
        say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1202 + 2 * i, next, ACK, "x", 1));
        fake_end_clear(nat.guest);
    }
    CHECK_EQ(stats(nat.slirp).dropped_full, 1);
    fake_end_serve(nat.net);
    CHECK_EQ(slirp->tcp, 0);
    CHECK(read(fd, buffer, sizeof(buffer)) <= 0);
    close(fd);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* Segments of connections that there are, at places where they make some sense. */
TEST(random_segments_do_no_harm)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 64) > 0);
    greet(&nat);
    uint64_t state = 11;
    if (getenv("SEED"))
        state = strtoull(getenv("SEED"), NULL, 0);
    static uint8_t frame[1600], data[1460], block[30000];
    uint32_t next[8] = { 0 }, seq[8] = { 0 };
    int fds[8] = { -1, -1, -1, -1, -1, -1, -1, -1 };
    struct aiokvm_net_slirp_connection connection;
    for (int i = 0; i < 40000; i++) {
        uint32_t k = random_below(&state, 8), port = 5000 + k;
        if (fds[k] < 0 && random_below(&state, 20) == 0) {
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 999, 0, RST, NULL, 0));
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1000, 0, SYN, NULL, 0));
            for (uint32_t n = 0; n < nat.guest->kept; n++)
                if (nat.guest->frames[n].data[47] == (SYN | ACK))
                    next[k] = net_load32(nat.guest->frames[n].data + 38) + 1;
            say(&nat, frame, tcp_frame(frame, GUEST, port, SERVICE, 80, 1001, next[k], ACK, NULL, 0));
            fds[k] = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
            seq[k] = 1001;
        }
        for (uint32_t n = 0; n < nat.guest->kept; n++) {
            const uint8_t *heard = nat.guest->frames[n].data;
            uint32_t of = net_load16(heard + 36) - 5000;
            if (net_load16(heard + 12) != 0x0800 || heard[23] != 6 || of >= 8)
                continue;
            seq[of] = net_load32(heard + 42);
            if (random_below(&state, 4))
                next[of] = net_load32(heard + 38) + net_load16(heard + 16) - 40;
        }
        fake_end_clear(nat.guest);
        uint32_t flags = random_below(&state, 40) ? ACK : random_below(&state, 64);
        uint32_t at = seq[k] + (random_below(&state, 3) ? 0 : random_below(&state, 4000) - 2000);
        uint32_t ack = next[k] + (random_below(&state, 5) ? 0 : random_below(&state, 4000) - 2000);
        uint32_t size = random_below(&state, 2) ? 0 : random_below(&state, random_below(&state, 2) ? 1460 : 20);
        size = tcp_frame(frame, GUEST, port, SERVICE, 80, at, ack, flags, data, size);
        if (random_below(&state, 6) == 0) {
            net_store16(frame + 48, random_below(&state, 3000)); /* the window */
            net_store16(frame + 52, random_below(&state, 3000)); /* the urgent pointer */
            if (size > 60)
                frame[46] = (uint8_t)(0x50 + 16 * random_below(&state, 3)); /* options */
            seal(frame, 6, GUEST, SERVICE, size - 34);
        }
        say(&nat, frame, size);
        if (fds[k] >= 0 && random_below(&state, 10) == 0) {
            size_t length = random_below(&state, sizeof(block));
            ssize_t result = random_below(&state, 2) ? read(fds[k], block, sizeof(block))
                                                     : send(fds[k], block, length, MSG_NOSIGNAL);
            if (result == 0 || random_below(&state, 40) == 0) {
                close(fds[k]);
                fds[k] = -1;
            }
        }
        if (random_below(&state, 8) == 0)
            fake_end_serve(nat.net);
    }
    for (int k = 0; k < 8; k++)
        if (fds[k] >= 0)
            close(fds[k]);
    fake_end_clear(nat.guest);
    greet(&nat);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(random_frames_do_no_harm)
{
    make_path();
    struct nat nat = nat_new();
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint64_t state = 3;
    if (getenv("SEED"))
        state = strtoull(getenv("SEED"), NULL, 0);
    static uint8_t frame[1600];
    static const uint32_t TYPES[] = { 0x0800, 0x86dd, 0x0806, 0x88f8 };
    static const uint8_t PROTOCOLS[] = { 1, 6, 17, 58, 47 };
    for (int i = 0; i < 60000; i++) {
        uint32_t size = 14 + random_below(&state, i % 10 ? 100 : 1500);
        for (uint32_t k = 0; k < size; k++)
            frame[k] = random_below(&state, 4) ? (uint8_t)random_below(&state, 256) : 0;
        uint32_t type = TYPES[random_below(&state, LENGTH(TYPES))];
        net_store16(frame + 12, type);
        if (type == 0x0800 && size > 60) {
            uint32_t protocol = PROTOCOLS[random_below(&state, LENGTH(PROTOCOLS))];
            const uint32_t hosts[] = { SERVICE, SERVICE, HOST, 0x0a000200 + (uint32_t)i % 256 };
            uint32_t to = hosts[random_below(&state, LENGTH(hosts))];
            net_store16(frame + 36, random_below(&state, 2) ? 80 : 67);
            frame[46] = 0x50 + (frame[46] & 0x2f);
            seal(frame, protocol, GUEST, to, size - 34);
            if (protocol == 17)
                net_store16(frame + 38, size - 34 - random_below(&state, 2));
            seal(frame, protocol, GUEST, to, size - 34);
            if (random_below(&state, 8) == 0) {
                net_store16(frame + 20, random_below(&state, 0x4000));
                net_store16(frame + 24, 0);
                net_store16(frame + 24, ~slirp_sum(frame + 14, 20, 0));
            }
        } else if (type == 0x86dd && size > 60) {
            frame[14] = 0x60;
            net_store16(frame + 18, size - 54);
            frame[20] = PROTOCOLS[random_below(&state, LENGTH(PROTOCOLS))];
            frame[21] = 255;
            frame[54] = (uint8_t)(128 + random_below(&state, 12));
            static const uint8_t TO[16] = { 0xfe, 0xc0, [15] = 2 };
            memcpy(frame + 38, TO, 16);
            uint8_t pseudo[4] = { 0, frame[20] };
            net_store16(pseudo + 2, size - 54);
            net_store16(frame + 56, 0);
            uint32_t sum = slirp_sum(pseudo, 4, slirp_sum(frame + 22, 32, 0));
            net_store16(frame + 56, ~slirp_sum(frame + 54, size - 54, sum));
        }
        say(&nat, frame, size);
        if (i % 16 == 0)
            fake_end_serve(nat.net);
        fake_end_clear(nat.guest);
    }
    /* It lives. */
    greet(&nat);
    aiokvm_net_free(nat.net);
    remove_path();
}

TEST(what_cannot_be_is_refused)
{
    int error = 0;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    struct aiokvm_net_slirp_config wrong = config();
    wrong.mtu = 100;
    CHECK(!aiokvm_net_slirp_new(net, &wrong, &error));
    CHECK_EQ(error, EINVAL);
    aiokvm_net_free(net);
}

#endif
