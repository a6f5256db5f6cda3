/* Network address translation in user space, by libslirp: the guest's connections are sockets of this process.
 *
 * The guest finds a router, DHCP, DNS and IPv6 router advertisements. What it may reach on the host is what sockets of
 * this process may, but for the host's loopback. */
#ifndef AIOKVM_NET_SLIRP_H
#define AIOKVM_NET_SLIRP_H

#include <stdint.h>

struct aiokvm_net;
struct aiokvm_net_end;
struct aiokvm_share;

enum { AIOKVM_NET_SLIRP_MIN_MTU = 576, AIOKVM_NET_SLIRP_MAX_MTU = 65521 };
/* Of a question to the nameserver by UDP, and of its answer. */
enum { AIOKVM_NET_SLIRP_MAX_QUERY = 4096, AIOKVM_NET_SLIRP_MAX_ANSWER = 65000 };

/* IPv4 addresses are numbers: 10.0.2.0 is 0x0a000200. What pointers point to is copied. */
struct aiokvm_net_slirp_config {
    uint32_t network, netmask;
    uint32_t host;       /* the router, and if `host_loopback` the host's 127.0.0.1 */
    uint32_t dhcp_start; /* what the first guest gets */
    uint32_t nameserver;
    uint8_t prefix6[16], host6[16], nameserver6[16];
    uint32_t prefix6_length; /* 0: no IPv6 */
    const char *hostname;    /* that DHCP gives to the guest, or NULL */
    const char *domain;
    const char **search; /* ends with NULL; or NULL */
    uint32_t mtu;
    uint32_t restricted;      /* no way out, but for services and answers to what is forwarded to the guest */
    uint32_t host_loopback;   /* 127.0.0.1 of the host is at `host`, ::1 in prefix6 */
    uint32_t own_nameserver;  /* `nameserver` is asked as it is: else it stands for the host's */
    uint32_t has_dns; /* the program answers for it: aiokvm_net_slirp_take_query, and TCP by a service at port 53 of the
                       * network's broadcast address */
    uint32_t max_connections; /* of the guest at a time: TCP, and as many UDP and ICMP */
    struct aiokvm_share *descriptors; /* that this is a part of, and outlives it; NULL: it has one of its own */
};

/* A connection of the guest to a service. */
struct aiokvm_net_slirp_connection {
    uint32_t address; /* the guest's */
    uint16_t port;
    uint32_t id; /* not 0, and given to no other before 2^32 more */
};

/* Whether this build has libslirp. */
int aiokvm_net_slirp_built(void);
/* NULL: *error is an errno; ENOSYS without libslirp. */
struct aiokvm_net_end *aiokvm_net_slirp_new(struct aiokvm_net *net, const struct aiokvm_net_slirp_config *config,
                                            int *error);
/* Forwards what comes to the host's address and port, TCP or UDP, to the guest's. `host` is an IPv4 or IPv6 address or
 * the path of a socket to be, `guest` an address of the same version, or "" for what DHCP gives out first (IPv6: for
 * the guest that was heard first). Gives the port, which the system has chosen if it was 0; or -errno. */
int aiokvm_net_slirp_add_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port,
                                 const char *guest, uint16_t guest_port);
/* Connections that there are go on. -ENOENT: there is none. The file of a socket stays. */
int aiokvm_net_slirp_remove_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port);
/* The guest's TCP connections to this address, of the network, are for the program: AIOKVM_NET_NEWS_READABLE. `path`
 * is where a socket is made that nobody else may reach; the file is the caller's. `max` connections may wait for
 * aiokvm_net_slirp_accept. Gives a number of 1 or more, or -errno; -EADDRINUSE: it is taken. */
int aiokvm_net_slirp_add_service(struct aiokvm_net_end *end, uint32_t address, uint16_t port, const char *path,
                                 uint32_t max);
/* Connections that wait are closed, others go on. */
int aiokvm_net_slirp_remove_service(struct aiokvm_net_end *end, uint32_t service);
/* Its next connection: a stream socket that does not block, the caller's to close and to count. -EAGAIN: there is none;
 * -ENOENT: nor is there the service. */
int aiokvm_net_slirp_accept(struct aiokvm_net_end *end, uint32_t service,
                            struct aiokvm_net_slirp_connection *connection);
/* The guest gets a reset of the connection instead of an end, when the caller closes it: at once, without reading what
 * it has got. -ENOENT: it has ended. */
int aiokvm_net_slirp_abort(struct aiokvm_net_end *end, uint32_t connection);
/* Before the end is freed, which takes long if there are many: ends TCP connections by a reset to both sides, and closes
 * what else the guest has opened, for as long as a call may take. 1: there is more. */
int aiokvm_net_slirp_cut_some(struct aiokvm_net_end *end);
/* One that is broken: the guest has reset it, or it was given up. What reads it finds an end, as if it was an orderly
 * one. 0: there is none, 1: *connection is one. AIOKVM_NET_NEWS_READABLE tells. */
int aiokvm_net_slirp_take_broken(struct aiokvm_net_end *end, uint32_t *connection);

/* The next question of the guest to the nameserver, into `data` of AIOKVM_NET_SLIRP_MAX_QUERY bytes: its size, -EAGAIN if
 * there is none. AIOKVM_NET_NEWS_READABLE tells. At most 64 wait for their answers. */
int aiokvm_net_slirp_take_query(struct aiokvm_net_end *end, uint32_t *id, void *data);
/* The answer; of no bytes (dropped_unresolved), or of too many (-EMSGSIZE): there is none. -ENOENT: there is no such
 * question. */
int aiokvm_net_slirp_answer(struct aiokvm_net_end *end, uint32_t id, const void *data, uint32_t size);

#endif
