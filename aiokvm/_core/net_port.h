/* An end whose peer is the program: what it receives waits in a ring of its own memory, from which the program takes
 * batches; what the program sends goes to the peer at once, or waits in a queue while that is blocked.
 *
 * The ring is private memory: a guest's own may change while the program looks at it, and the guest would not have its
 * buffers back before the program is done. */
#ifndef AIOKVM_NET_PORT_H
#define AIOKVM_NET_PORT_H

#include <stdint.h>

#include "net.h"

enum { AIOKVM_NET_PORT_MAX_DEPTH = 65536, AIOKVM_NET_PORT_BATCH = 256, AIOKVM_NET_PORT_BATCH_BYTES = 256 << 10 };

struct aiokvm_net_port_config {
    uint32_t depth;    /* frames that may wait for the program, and as many for the peer: 1 to MAX_DEPTH */
    uint64_t bytes;    /* of these frames, in each direction: at least AIOKVM_NET_MAX_FRAME */
    uint32_t offloads; /* AIOKVM_NET_OFFLOAD_*: what frames that are taken may need */
    uint32_t drop;     /* without room a frame is dropped; else the peer waits */
};

/* What virtio_net_hdr says of a frame, in the byte order of the host: virtio 1.2, section 5.1.6. */
struct aiokvm_net_port_header {
    uint8_t flags, gso_type;
    uint16_t gso_size;
    uint16_t csum_start, csum_offset;
};

/* Frames that lie one behind the other, without gaps. */
struct aiokvm_net_port_batch {
    const uint8_t *data;
    uint32_t count;
    uint32_t special; /* how many have a header that is not all 0 */
    uint32_t ends[AIOKVM_NET_PORT_BATCH]; /* where each ends, from `data` on */
    struct aiokvm_net_port_header headers[AIOKVM_NET_PORT_BATCH]; /* without a special one: not filled in */
};

struct aiokvm_net_end *aiokvm_net_port_new(struct aiokvm_net *net, const struct aiokvm_net_port_config *config,
                                           int *error);
/* The next frames, at most so many, and of BATCH_BYTES in all; `data` is theirs until they are released. Returns how
 * many; after 0 AIOKVM_NET_NEWS_READABLE tells when there are some. */
int aiokvm_net_port_take(struct aiokvm_net_end *end, uint32_t most, struct aiokvm_net_port_batch *batch);
/* The oldest `count` are not looked at any more. */
void aiokvm_net_port_release(struct aiokvm_net_end *end, uint32_t count);
/* Before the end is freed, which takes long if much waits: forgets it, for as long as a call may take. 1: there is more. */
int aiokvm_net_port_clear_some(struct aiokvm_net_end *end);
/* Sends frames that lie one behind the other in `data`, in the caller's memory that nobody changes. headers: NULL, or
 * one for each. Returns how many were taken; if not all, AIOKVM_NET_NEWS_WRITABLE tells when to go on. -EINVAL: the
 * first has no size or no header that can be. */
int aiokvm_net_port_send(struct aiokvm_net_end *end, const uint8_t *data, const uint32_t *sizes,
                         const struct aiokvm_net_port_header *headers, uint32_t count);

#endif
