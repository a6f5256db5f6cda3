/* A guest behind user-mode NAT that is a few frames. */
#ifndef AIOKVM_SLIRP_GUEST_H
#define AIOKVM_SLIRP_GUEST_H

#include <sys/resource.h>

#include "net_fake.h"
#include "net_slirp_priv.h"

#define GUEST 0x0a00020fu
#define HOST 0x0a000202u
#define NAMESERVER 0x0a000203u
#define SERVICE 0x0a000264u

enum { SYN = 2, RST = 4, PSH = 8, ACK = 16, URG = 32, FIN = 1 };

extern const uint8_t OUTSIDE6[16], HOST6[16];

/* An IPv4 header at frame + 14, and what is behind it has its checksum. Gives the frame's size, as the others do. */
uint32_t seal(uint8_t *frame, uint32_t protocol, uint32_t from, uint32_t to, uint32_t payload);
uint32_t tcp_frame(uint8_t *frame, uint32_t from, uint32_t from_port, uint32_t to, uint32_t to_port, uint32_t seq,
                   uint32_t ack, uint32_t flags, const void *data, uint32_t size);
uint32_t put_udp(uint8_t *frame, uint32_t from, uint32_t from_port, uint32_t to, uint32_t to_port);
/* A header without payload but its own, and no checksum. */
uint32_t frame6(uint8_t *frame, uint32_t protocol, const uint8_t *to, uint32_t port, uint32_t flags);

#ifdef AIOKVM_HAVE_SLIRP

struct nat {
    struct aiokvm_net *net;
    struct aiokvm_net_end *slirp;
    struct fake_end *guest;
};

struct aiokvm_net_slirp_config config(void);
struct nat nat_with(const struct aiokvm_net_slirp_config *config, uint32_t offloads);
struct nat nat_new(void);
struct aiokvm_net_stats stats(struct aiokvm_net_end *end);
void say(struct nat *nat, const uint8_t *frame, uint32_t size);
/* Waits for a frame, which stays until it was `heard`. */
const struct fake_frame *hear(struct nat *nat);
void heard(struct nat *nat);
/* The next frame of TCP that is for this port of the guest. */
const struct fake_frame *hear_tcp(struct nat *nat, uint32_t port);
/* So that it is known where the guest is. */
void greet(struct nat *nat);

/* Where services are. */
extern char path[80];
void make_path(void);
void remove_path(void);
/* At SERVICE, port 80. */
int add_service_to_be_removed(struct nat *nat, uint32_t max);
/* A connection of the guest's: gives the sequence number of the other side that comes next. */
uint32_t open_connection(struct nat *nat, uint32_t port, uint32_t to, uint32_t to_port);
/* Without the guest's last word of a handshake. */
uint32_t begin_connection(struct nat *nat, uint32_t port, uint32_t seq);
/* How many libslirp has in this state. */
uint32_t connections(struct nat *nat, const char *state);

int connect_to(int port);
int connect_udp(int port);
/* The guest takes a connection to its port 80. */
uint32_t take_connection(struct nat *nat, uint32_t *port);
void check_forward(struct nat *nat, int fd);

void limit_descriptors(rlim_t limit);

#endif

#endif
