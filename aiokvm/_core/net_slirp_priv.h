/* What the parts of user-mode NAT have in common. */
#ifndef AIOKVM_NET_SLIRP_PRIV_H
#define AIOKVM_NET_SLIRP_PRIV_H

#ifdef AIOKVM_HAVE_SLIRP
#include <slirp/libslirp.h>
#endif

#include "budget.h"
#include "net_priv.h"
#include "net_slirp.h"

/* ---- net_slirp_guard.c: what of a guest's frames gets to libslirp ---- */

enum { SLIRP_PEERS = 256 };

struct slirp_guard {
    /* As in the configuration. */
    uint32_t network, netmask, host, nameserver;
    uint8_t prefix6[16], host6[16], nameserver6[16];
    uint32_t prefix6_length;
    bool host_loopback, own_nameserver, restricted;
    /* Who of the host's loopback has sent to a forwarded UDP port: guest's address, port there and here. */
    uint64_t peers[SLIRP_PEERS];
    uint64_t heard_ns[SLIRP_PEERS];
};

/* What there is already, of the guest. */
struct slirp_load {
    bool tcp_full, other_full;
    bool is_service; /* a service is where the frame goes to */
    uint64_t now_ns;
};

enum slirp_verdict {
    SLIRP_PASS,
    SLIRP_FRAGMENT, /* of IPv4, whose lengths are right */
    SLIRP_UNSUPPORTED, /* of a protocol that libslirp has nothing to say to */
    SLIRP_INVALID, /* lengths that contradict each other */
    SLIRP_DENY,    /* it leads to the host's loopback, or to many */
    SLIRP_REFUSE,  /* the same; libslirp says so to the guest */
    SLIRP_FULL,    /* there are too many connections */
};

/* Of a frame that is one private buffer; hdr as net_frame_check left it. Fills in what offloading has left out, takes
 * TCP's URG away. */
enum slirp_verdict slirp_guard(const struct slirp_guard *guard, const struct slirp_load *load,
                               const struct virtio_net_hdr_v1 *hdr, uint8_t *frame, uint32_t size);
/* Of a frame to the guest. */
void slirp_guard_heard(struct slirp_guard *guard, const uint8_t *frame, size_t size, uint64_t now_ns);
/* Who has sent a TCP segment over IPv4 that has passed. */
void slirp_guard_sender(const uint8_t *frame, uint32_t *address, uint16_t *port);
/* One 16-bit word that a checksum covers is replaced, RFC 1624. */
void slirp_replace16(uint8_t *at, uint32_t value, uint8_t *checksum);
/* The ones' complement sum of the bytes, as a number; `sum` is one to go on with. */
uint32_t slirp_sum(const uint8_t *data, size_t size, uint32_t sum);

/* ---- net_slirp_fragments.c ---- */

enum { SLIRP_DATAGRAMS = 16 }; /* that fragments of are there, at a time */

struct slirp_datagram;

struct slirp_fragments {
    struct slirp_datagram *datagrams[SLIRP_DATAGRAMS];
    struct aiokvm_share *share; /* of bytes; may be NULL */
    uint32_t lost; /* what has not become whole: there was no room for it, or no piece for too long */
};

/* `frame` is a fragment, and has room for AIOKVM_NET_MAX_FRAME bytes. The size of the frame with the whole datagram
 * that is there instead if this was the last piece, else 0. */
uint32_t slirp_fragments_add(struct slirp_fragments *fragments, uint8_t *frame, uint64_t now_ns, bool *is_invalid);
void slirp_fragments_clear(struct slirp_fragments *fragments);

/* ---- net_slirp_neighbours.c: which addresses of the guest's network are whose ---- */

enum { SLIRP_NEIGHBOUR_BUCKETS = 64, SLIRP_NEIGHBOUR_WAYS = 4, SLIRP_QUESTION_SIZE = 86 };

struct slirp_neighbour {
    uint8_t address[16], mac[6]; /* IPv4 addresses as ::ffff:0:0/96 */
};

struct slirp_neighbours {
    uint64_t seed;
    struct slirp_neighbour known[SLIRP_NEIGHBOUR_BUCKETS * SLIRP_NEIGHBOUR_WAYS];
};

/* Of a frame of the guest's. True: who has its address is news. */
bool slirp_neighbours_learn(struct slirp_neighbours *neighbours, const uint8_t *frame, size_t size);
/* Of a frame to the guest: to whom. False: who has the address is not known. */
bool slirp_neighbours_fill(struct slirp_neighbours *neighbours, uint8_t *frame, size_t size);
/* If the frame is libslirp's question who has an address: the answer that it gets, and its size. Else 0. */
uint32_t slirp_neighbours_answer(const uint8_t *frame, size_t size, uint8_t answer[SLIRP_QUESTION_SIZE]);
/* The question to all who has the address that this frame, of IP, goes to. Its size. */
uint32_t slirp_neighbours_ask(const struct slirp_guard *guard, const uint8_t *frame,
                              uint8_t question[SLIRP_QUESTION_SIZE]);

/* ---- net_slirp_order.c: segments that libslirp keeps because others are missing ---- */

enum { SLIRP_BUCKETS = 128, SLIRP_WAYS = 8 };

struct slirp_flow {
    uint8_t guest[16], other[16], guest_port[2], other_port[2]; /* IPv4 addresses are 4 bytes and zeroes */
    uint32_t is_tcp;
};

struct slirp_gaps {
    struct slirp_flow flow;
    uint32_t kept; /* segments, at most; 0: there is no such flow */
    uint32_t end;  /* of the last */
};

struct slirp_order {
    uint64_t seed;
    uint32_t count; /* of flows in gaps */
    struct slirp_gaps gaps[SLIRP_BUCKETS * SLIRP_WAYS];
    /* Of the segment that libslirp has now. */
    bool is_watching, is_missing;
    uint32_t end, next;
    struct slirp_flow flow;
};

/* Before libslirp gets a frame of the guest's. */
void slirp_order_begin(struct slirp_order *order, const uint8_t *frame, size_t size);
/* Of each frame to the guest. */
void slirp_order_heard(struct slirp_order *order, const uint8_t *frame, size_t size);
/* After it has got it. Not 0: it keeps too many, and `frame` is now one of so many bytes that makes it stop. */
uint32_t slirp_order_end(struct slirp_order *order, uint8_t *frame, size_t size);
/* `frame`, with TCP's header at `at`, becomes a reset with these flags at this place. Its size. */
uint32_t slirp_make_reset(uint8_t *frame, uint32_t at, uint32_t seq, uint8_t flags);

/* ---- net_slirp_sockets.c: what libslirp has a socket for ---- */

enum { SLIRP_SOCKET_BUCKETS = 256, SLIRP_RESET6_SIZE = 74 };

struct slirp_socket {
    struct slirp_socket *next; /* of the bucket */
    struct slirp_flow flow;
    int fd;
    uint32_t id;               /* of a connection to a service, else 0 */
    bool is_connected;         /* TCP: the guest has been told of it, or was told to take it */
    bool is_half;              /* one side has closed it */
    bool is_told;              /* the guest has been told that the other side has */
    uint32_t from_guest;       /* the sequence number that is expected of the guest, */
    uint32_t to_guest;         /* and the one after all that was sent to it */
    uint64_t heard_ns;         /* when one of them has last said something */
};

struct slirp_sockets {
    uint64_t seed;
    struct slirp_socket *buckets[SLIRP_SOCKET_BUCKETS];
    struct slirp_socket *last;    /* that was found */
    struct slirp_socket *unnamed; /* accepted: the guest is about to be told of it */
};

/* Who a frame of TCP or UDP is of; gives where the transport's header is, 0 if it is none. */
uint32_t slirp_flow_of(struct slirp_flow *flow, const uint8_t *frame, size_t size, bool to_guest);
/* Of what a guest says: with a seed that it does not know it cannot fill one bucket. `size` is a multiple of 4. */
uint64_t slirp_hash(uint64_t seed, const void *data, size_t size);
struct slirp_socket *slirp_sockets_find(struct slirp_sockets *sockets, const struct slirp_flow *flow);
struct slirp_socket *slirp_sockets_by_id(struct slirp_sockets *sockets, uint32_t id);
/* The frame of the guest's is what the socket was made for. */
void slirp_sockets_begin(struct slirp_sockets *sockets, struct slirp_socket *socket, const uint8_t *frame,
                         size_t size);
void slirp_sockets_remove(struct slirp_sockets *sockets, struct slirp_socket *socket);
/* Of a frame of the guest's: whether it is a reset. */
bool slirp_sockets_heard(struct slirp_sockets *sockets, const uint8_t *frame, size_t size, uint64_t now_ns);
/* Of a frame to it. */
void slirp_sockets_told(struct slirp_sockets *sockets, const uint8_t *frame, size_t size, uint64_t now_ns);
/* A connection that has been silent for too long: the longest of them. If places are rare, one that is closed at one
 * side has little time. */
struct slirp_socket *slirp_sockets_idle(struct slirp_sockets *sockets, uint64_t now_ns, bool is_full);
/* A reset of the connection to the guest, or in its name. Its size. */
uint32_t slirp_socket_reset(const struct slirp_socket *socket, bool to_guest, uint8_t frame[SLIRP_RESET6_SIZE]);

/* ---- net_slirp_begun.c: connections to services that libslirp has no descriptor of yet ---- */

enum { SLIRP_CONNECTING = 128, SLIRP_RESET_SIZE = 54 };

struct slirp_connecting {
    uint32_t guest, service, ports;
    uint32_t next; /* the guest's sequence number after its SYN */
    uint64_t since_ns;
};

struct slirp_begun {
    uint32_t count;
    struct slirp_connecting connecting[SLIRP_CONNECTING];
};

/* Whether a frame that has passed the guard is the first of a TCP connection over IPv4, or the last. */
bool slirp_begins(const uint8_t *frame, size_t size);
bool slirp_resets(const uint8_t *frame, size_t size);
/* The connection that the frame belongs to; NULL: it is none of these. */
struct slirp_connecting *slirp_begun_find(struct slirp_begun *begun, const uint8_t *frame, size_t size);
/* The frame begins one. False: there are too many. If *reset_size is not 0, libslirp has to have `reset` before:
 * another has lost its place. */
bool slirp_begun_add(struct slirp_begun *begun, const uint8_t *frame, size_t size, uint64_t now_ns, uint8_t *reset,
                     uint32_t *reset_size);
/* Unless libslirp has a descriptor of it, it has to have `reset`; gives the size of that. */
uint32_t slirp_begun_remove(struct slirp_begun *begun, struct slirp_connecting *of, const uint8_t *frame,
                            uint8_t *reset);

/* ---- net_slirp_merge.c: segments of one TCP flow become one frame ---- */

struct slirp_merge {
    uint32_t size;     /* of the frame in data, 0: none */
    uint32_t segments; /* that it was made of */
    uint32_t headers;  /* their length */
    uint32_t payload;  /* of all of them but the last */
    uint32_t next;     /* the sequence number that comes next */
    bool is_last;      /* nothing may follow */
    uint8_t data[AIOKVM_NET_MAX_FRAME];
};

/* Whether the frame is now in it, as the first or at the end of what there is. */
bool slirp_merge_add(struct slirp_merge *merge, const uint8_t *frame, size_t size);
/* Finishes the frame in data. */
void slirp_merge_finish(struct slirp_merge *merge, struct virtio_net_hdr_v1 *hdr);

#ifdef AIOKVM_HAVE_SLIRP

enum { SLIRP_TIMERS = 4 };

enum slirp_kind { SLIRP_UNKNOWN, SLIRP_TCP, SLIRP_OTHER, SLIRP_LISTENER, SLIRP_UNIX_LISTENER };

/* A descriptor of libslirp's, by its number. */
struct slirp_watched {
    uint32_t events; /* SLIRP_POLL_*, asked for the last time; 0: none */
    uint32_t in_epoll;
    uint32_t ready;
    uint32_t asked; /* in which round */
    uint8_t kind;
    bool is_counted; /* it is one of tcp or other, and in the shares */
    bool is_broken; /* it has an error for who reads it, for which libslirp has no room now */
    bool is_dead; /* it has one, but the guest, which has been told of its end, has more to say: it is cut */
    struct slirp_socket *socket;
};

struct slirp_timer {
    SlirpTimerId id;
    void *opaque;
    uint64_t at_ns; /* 0: not set */
    bool used;
};

struct slirp_waiting {
    struct slirp_waiting *next;
    int fd;
    struct aiokvm_net_slirp_connection connection;
};

/* A connection to a service that the guest has reset, or that libslirp has given up. */
struct slirp_broken {
    struct slirp_broken *next;
    uint32_t id;
};

struct slirp_service {
    struct slirp_service *next;
    uint32_t id, address, count, max;
    uint16_t port;
    int listener;
    struct slirp_waiting *first, **last;
};

struct slirp_held {
    struct slirp_held *next;
    uint32_t size;
    uint8_t data[];
};

struct slirp_end {
    struct aiokvm_net_end end;
    Slirp *slirp;
    struct net_watch watch;
    int epoll;
    uint64_t poll_at_ns; /* libslirp's timers, 0: none */
    uint64_t polled_ns;  /* when it has last been told the time */
    uint64_t accept_at_ns; /* nobody is let in by a forward before */
    struct slirp_timer timers[SLIRP_TIMERS];
    struct slirp_watched *watched;
    uint32_t size;  /* of watched */
    int *in_epoll;  /* descriptors; as large */
    uint32_t count; /* of in_epoll */
    uint32_t round;
    int found; /* a descriptor that was not there the last time, -1: none */
    uint32_t tcp, other, max;
    bool is_inside;  /* libslirp runs, which cannot be entered again, or a frame is on its way to the guest */
    bool is_refused; /* a frame had to wait for that */
    bool is_late;    /* the time was over before all descriptors that were ready had been looked after */
    bool is_guarded; /* until `flush` this thread has SIGPIPE blocked, and had not before */
    bool is_connected; /* it has made a connection to a service */
    bool is_starved;   /* which could not be accepted for want of descriptors */
    bool is_receiving; /* libslirp has `input` of input_size bytes now */
    bool is_reset;     /* and that is a reset */
    uint32_t input_size;
    uint32_t next_connection;
    struct slirp_broken *broken;
    struct slirp_sockets sockets;
    uint64_t reaped_ns;
    uint32_t cut_buckets; /* of sockets: how many of them aiokvm_net_slirp_cut_some has been through */
    uint32_t cut_watched; /* the same of `watched`, after that; then libslirp is not called any more but to be freed */
    struct aiokvm_share descriptors, bytes;
    struct aiokvm_net_slirp_connection sender; /* of the frame that it has, or had when it was starved */
    struct slirp_guard guard;
    struct slirp_neighbours neighbours;
    struct slirp_held *held; /* frames for somebody who is not known yet */
    uint32_t held_count;
    uint64_t held_until_ns;  /* when it is given up that there is an answer */
    bool has_answered;       /* libslirp's question: it has a frame that it can send now */
    bool is_closing;         /* nothing is sent any more */
    struct slirp_fragments fragments;
    struct slirp_order order;
    struct slirp_begun begun;
    struct net_queue queue;
    struct slirp_merge merge;
    struct slirp_service *services;
    uint32_t next_service;
    bool has_dns;
    struct slirp_query *queries; /* the oldest first */
    uint32_t next_query, next_fragment, mtu;
    uint8_t piece[AIOKVM_NET_MAX_FRAME]; /* of a datagram */
    uint8_t input[AIOKVM_NET_MAX_FRAME];
};

/* ---- net_slirp.c ---- */

/* Before libslirp is called, and after: what may follow from that is done then. */
void slirp_enter(struct slirp_end *self);
void slirp_leave(struct slirp_end *self);
/* Frames of the guest's are taken again. */
void slirp_let_in(struct slirp_end *self);
/* Ends a connection of the guest's by a reset to both sides. Not from inside of libslirp. */
void slirp_cut(struct slirp_end *self, struct slirp_socket *socket);

/* ---- net_slirp_receive.c ---- */

/* net_type's. */
enum net_result slirp_receive(struct aiokvm_net_end *end, struct net_frame *frame);

/* ---- net_slirp_deliver.c ---- */

/* How long it is waited for who has an address; libslirp gives a frame up after as long. */
#define SLIRP_HOLD_NS 1000000000ull

/* SlirpCb's; opaque is the end. */
ssize_t slirp_send_packet(const void *data, size_t size, void *opaque);
/* A frame whose receiver is filled in. */
void slirp_deliver(struct slirp_end *self, uint8_t *frame, size_t size);
/* Sends what was merged until now. */
void slirp_emit_merged(struct slirp_end *self);
/* Sends what waited for somebody who has been heard for the first time. */
void slirp_deliver_held(struct slirp_end *self);
/* What still waits is given up. */
void slirp_drop_held(struct slirp_end *self);

/* ---- net_slirp_dns.c ---- */

/* Whether a frame of the guest's that has passed is a question to the nameserver by UDP, and is kept. */
bool slirp_dns_take(struct slirp_end *self, const uint8_t *frame, size_t size);
void slirp_dns_free(struct slirp_end *self);
/* What goes to the nameserver by TCP goes to the service, and comes from there. */
void slirp_dns_to_service(struct slirp_end *self, uint8_t *frame, size_t size);
void slirp_dns_from_service(struct slirp_end *self, uint8_t *frame, size_t size);
/* A datagram, in fragments if it is larger than a frame. */
void slirp_deliver_datagram(struct slirp_end *self, uint8_t *frame, size_t size);

/* ---- net_slirp_poll.c ---- */

/* Buffers that libslirp has for a TCP connection; what it and this have for any other flow. */
enum { SLIRP_TCP_BYTES = 256 << 10, SLIRP_OTHER_BYTES = 1 << 10 };

/* SlirpCb's and slirp_pollfds_poll's; opaque is the end. */
void slirp_register(int fd, void *opaque);
void slirp_unregister(int fd, void *opaque);
/* Closes the socket, of which libslirp has the number still. */
void slirp_close_early(struct slirp_end *self, int fd);
int slirp_get_revents(int index, void *opaque);
/* Asks libslirp what it waits for. */
void slirp_ask(struct slirp_end *self);
/* Else this is a child of fork, which has a copy. */
bool slirp_is_ours(const struct slirp_end *self);
/* A connection to a service was broken; not told if the end is closing. */
void slirp_tell_broken(struct slirp_end *self, uint32_t id);

/* ---- net_slirp_forward.c ---- */

/* libslirp connects to a service, and waits if too many have done so: each is accepted at once. */
void slirp_accept(struct slirp_end *self);
void slirp_free_services(struct slirp_end *self);
/* For a connection to a socket of a path libslirp needs a descriptor more, and ends the process when there is none. */
bool slirp_has_descriptors(void);

#endif

#endif
