/* An end that records what it receives and sends what it is told to, for tests of the net. */
#ifndef AIOKVM_NET_FAKE_H
#define AIOKVM_NET_FAKE_H

#include "net_priv.h"

struct fake_frame {
    struct virtio_net_hdr_v1 hdr;
    uint32_t size, hops, queue;
    uint8_t *data;
};

struct fake_end {
    struct aiokvm_net_end end;
    bool blocks; /* what it is sent has to wait */
    uint32_t most; /* blocks after so many; 0: never */
    bool resumed;
    uint32_t flushed, served;
    uint32_t received, kept; /* how many there were; how many of them are in frames */
    struct fake_frame frames[256];
};

/* offloads: what it takes. */
struct fake_end *fake_end_new(struct aiokvm_net *net, uint32_t offloads);
/* Sends a frame, which is one buffer; hdr may be NULL. */
enum net_result fake_end_send(struct fake_end *fake, const struct virtio_net_hdr_v1 *hdr, const void *data, uint32_t size);
/* Takes frames again, and says so. */
void fake_end_unblock(struct fake_end *fake);
/* Forgets what it has received. */
void fake_end_clear(struct fake_end *fake);
/* For memory of frames that wait. */
struct aiokvm_share *fake_share(void);
/* Leaves others so much of a budget of the process, until it is freed. */
struct aiokvm_share *fake_share_leaving(int which, uint64_t amount);
/* Serves until nothing is ready. */
void fake_end_serve(struct aiokvm_net *net);
/* The same, if whoever serves is woken: 1, else 0. */
uint32_t fake_end_woken(struct aiokvm_net *net);

#endif
