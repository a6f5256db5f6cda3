/* Ports and paths that lead to a guest behind user-mode NAT. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "net_packet.h"
#include "slirp_guest.h"

#ifdef AIOKVM_HAVE_SLIRP

TEST(ports_are_forwarded)
{
    struct nat nat = nat_new();
    greet(&nat);
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80);
    CHECK(port > 0);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", (uint16_t)port, "", 80), -EADDRINUSE);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.x", 1, "", 80), -EINVAL);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, "::1", 1, "10.0.2.15", 80), -EINVAL);
    /* Until somebody comes there is nothing to do, but to say from time to time that there is IPv6. */
    fake_end_serve(nat.net);
    CHECK_EQ(((struct slirp_end *)nat.slirp)->poll_at_ns, 0);
    CHECK(nat.slirp->deadline_ns > now_ns() + UINT64_C(10000000000));
    int fd = connect_to(port);
    check_forward(&nat, fd);
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 0, "127.0.0.1", (uint16_t)port), 0);
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 0, "127.0.0.1", (uint16_t)port), -ENOENT);
    /* Who is connected stays so. */
    CHECK_EQ(write(fd, "more", 4), 4);
    for (;;) {
        const struct fake_frame *frame = hear_tcp(&nat, 80);
        bool has_come = net_load16(frame->data + 16) == 44 && !memcmp(frame->data + 54, "more", 4);
        heard(&nat);
        if (has_come)
            break;
    }
    close(fd);
    aiokvm_net_free(nat.net);
}

TEST(a_path_is_forwarded)
{
    make_path();
    struct nat nat = nat_new();
    greet(&nat);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, path, 0, "10.0.2.15", 80), 0);
    CHECK_EQ(aiokvm_net_slirp_add_forward(nat.slirp, 0, path, 0, "10.0.2.15", 80), -EADDRINUSE);
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    check_forward(&nat, fd);
    close(fd);
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 0, path, 0), 0);
    aiokvm_net_free(nat.net);
    remove_path();
}

/* Those of other guests are not for who comes in by a forward. */
TEST(who_comes_in_waits_for_descriptors)
{
    struct nat nat = nat_new();
    struct slirp_end *slirp = (struct slirp_end *)nat.slirp;
    greet(&nat);
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80);
    struct aiokvm_share *others = aiokvm_share_new(AIOKVM_BUDGET_DESCRIPTORS);
    struct aiokvm_budget_state state;
    aiokvm_budget_state(others->budget, &state);
    aiokvm_share_add(others, state.total);
    int fd = connect_to(port);
    fake_end_serve(nat.net);
    CHECK_EQ(slirp->tcp, 0);
    aiokvm_share_free(others);
    check_forward(&nat, fd);
    close(fd);
    aiokvm_net_free(nat.net);
}

TEST(udp_is_forwarded)
{
    struct nat nat = nat_new();
    greet(&nat);
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 1, "127.0.0.1", 0, "", 53);
    CHECK(port > 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK_EQ(sendto(fd, "what", 4, 0, (struct sockaddr *)&address, sizeof(address)), 4);
    const struct fake_frame *query = hear(&nat);
    CHECK_EQ(query->data[23], 17);
    CHECK_EQ(net_load16(query->data + 36), 53);
    CHECK(!memcmp(query->data + 42, "what", 4));
    uint8_t frame[100];
    net_store16(frame + 34, 53);
    memcpy(frame + 36, query->data + 34, 2);
    net_store16(frame + 38, 8 + 4);
    memcpy(frame + 42, "that", 4);
    say(&nat, frame, seal(frame, 17, GUEST, net_load32(query->data + 26), 12));
    char buffer[10];
    CHECK_EQ(recv(fd, buffer, sizeof(buffer), 0), 4);
    CHECK(!memcmp(buffer, "that", 4));
    CHECK_EQ(aiokvm_net_slirp_remove_forward(nat.slirp, 1, "127.0.0.1", (uint16_t)port), 0);
    close(fd);
    aiokvm_net_free(nat.net);
}

TEST(a_child_of_fork_frees_its_copy_alone)
{
    make_path();
    struct nat nat = nat_new();
    int port = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80);
    CHECK(aiokvm_net_slirp_add_service(nat.slirp, SERVICE, 80, path, 8) > 0);
    greet(&nat);
    uint32_t next = open_connection(&nat, 5000, SERVICE, 80);
    struct aiokvm_net_slirp_connection connection;
    int stream = aiokvm_net_slirp_accept(nat.slirp, 1, &connection);
    pid_t pid = fork();
    if (pid == 0) {
        bool right = aiokvm_net_slirp_add_forward(nat.slirp, 0, "127.0.0.1", 0, "", 80) == -EOWNERDEAD &&
                     aiokvm_net_slirp_accept(nat.slirp, 1, &connection) == -EOWNERDEAD;
        aiokvm_net_free(nat.net);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    uint8_t frame[100];
    char buffer[10];
    say(&nat, frame, tcp_frame(frame, GUEST, 5000, SERVICE, 80, 1001, next, ACK | PSH, "hello", 5));
    CHECK_EQ(read(stream, buffer, sizeof(buffer)), 5);
    int fd = connect_to(port);
    check_forward(&nat, fd);
    close(fd);
    close(stream);
    aiokvm_net_free(nat.net);
    remove_path();
}

#endif
