/* The device's side of a virtqueue, split or packed: virtio 1.2, sections 2.7 and 2.8.
 *
 * Chains of descriptors come out as private iovecs that lie in guest RAM; completions go back, a batch at a
 * time. Whatever the driver writes, nothing outside RAM is read or written, and every call ends within as many
 * steps as the queue is long.
 *
 * A vring belongs to one thread at a time; only aiokvm_vring_error may be called by any. */
#ifndef AIOKVM_VRING_H
#define AIOKVM_VRING_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* A chain is at most as long as its queue, and preadv takes no more iovecs than this (IOV_MAX). */
enum { AIOKVM_VRING_MAX_SIZE = 1024 };

/* Of features: bits of virtio 1.2, section 6. All others are ignored here. */
#define AIOKVM_VIRTIO_F_INDIRECT_DESC (UINT64_C(1) << 28)
#define AIOKVM_VIRTIO_F_EVENT_IDX (UINT64_C(1) << 29)
#define AIOKVM_VIRTIO_F_RING_PACKED (UINT64_C(1) << 34)
#define AIOKVM_VIRTIO_F_IN_ORDER (UINT64_C(1) << 35)

/* What is wrong with a ring, or with what the driver has put there; aiokvm_vring_strerror has the words. */
enum {
    AIOKVM_VRING_ESIZE = -1,
    AIOKVM_VRING_EALIGN = -2,
    AIOKVM_VRING_ERING = -3,
    AIOKVM_VRING_EBUSY = -4,
    AIOKVM_VRING_EINDEX = -5,
    AIOKVM_VRING_EHEAD = -6,
    AIOKVM_VRING_ENEXT = -7,
    AIOKVM_VRING_ELONG = -8,
    AIOKVM_VRING_EBYTES = -9,
    AIOKVM_VRING_EADDRESS = -10,
    AIOKVM_VRING_EORDER = -11,
    AIOKVM_VRING_EINDIRECT = -12,
};

/* A contiguous range of guest RAM: size bytes at gpa, which this process sees at host. */
struct aiokvm_ram {
    uint64_t gpa;
    uint64_t size;
    uint8_t *host;
};

/* A chain that the driver has made available. It is the vring's memory: valid until it is pushed or dropped,
 * also past aiokvm_vring_stop. The iovecs may be changed by whoever popped it. */
struct aiokvm_chain {
    uint32_t id;             /* what the driver knows it by */
    uint32_t readable;       /* the first iovecs, for the device to read */
    uint32_t writable;       /* those behind them, for the device to write */
    uint64_t readable_bytes; /* both together are at most 2^32 */
    uint64_t writable_bytes;
    struct iovec *iov; /* none is empty; a chain without any is possible */

    /* The vring's own. */
    struct aiokvm_chain *next_free;
    uint32_t slots;      /* of the ring that its completion makes free: descriptors if packed, 1 if split */
    uint32_t generation; /* of the start that it belongs to */
    uint32_t position;   /* IN_ORDER: in the order of popping */
    uint32_t written;
    uint32_t done; /* IN_ORDER: pushed, and waits for those before it */
};

struct aiokvm_vring;

/* A queue of at most max_size (1 to AIOKVM_VRING_MAX_SIZE) entries, not started. The ranges are copied; the RAM must
 * outlive it. NULL: no memory, or no such size. In a child of fork every vring is stopped, and cannot be started. */
struct aiokvm_vring *aiokvm_vring_new(const struct aiokvm_ram *ram, size_t count, uint32_t max_size);
void aiokvm_vring_free(struct aiokvm_vring *vring);

/* Begins at the beginning of rings of size entries at these guest addresses: descriptor area, driver area, device
 * area. The driver is to notify. features: what was negotiated. Returns 0, or what is wrong: ESIZE, EALIGN,
 * ERING, or EBUSY (too many chains of earlier starts are neither pushed nor dropped). */
int aiokvm_vring_start(struct aiokvm_vring *vring, uint32_t size, uint64_t desc, uint64_t driver,
                       uint64_t device, uint64_t features);
/* The rings are touched no more. Chains that are out stay valid; pushing them is dropping them. */
void aiokvm_vring_stop(struct aiokvm_vring *vring);

/* Takes the next chain. 1: *chain is it. 0: there is none, or the vring is stopped; unless notifications are
 * disabled the driver will notify when there is one. Below 0: what the driver has done wrong, from now on until
 * the vring is stopped. */
int aiokvm_vring_pop(struct aiokvm_vring *vring, struct aiokvm_chain **chain);
/* Completes a chain of whose writable bytes the first `written` were written. Chains may be pushed in any order: with
 * IN_ORDER they wait for each other here. The driver sees it after aiokvm_vring_publish. */
void aiokvm_vring_push(struct aiokvm_vring *vring, struct aiokvm_chain *chain, uint32_t written);
/* Gives a chain's memory back. Unless the vring was stopped since, the driver never gets its buffers back, nor, with
 * IN_ORDER, any that came later. */
void aiokvm_vring_drop(struct aiokvm_vring *vring, struct aiokvm_chain *chain);
/* Copies n bytes at offset of the readable part to memory, or from memory into the writable part. How many there are:
 * fewer where the part ends before. */
size_t aiokvm_chain_read(const struct aiokvm_chain *chain, uint64_t offset, void *to, size_t n);
size_t aiokvm_chain_write(const struct aiokvm_chain *chain, uint64_t offset, const void *from, size_t n);
/* Makes all that was pushed visible to the driver. 1: it wants an interrupt. */
int aiokvm_vring_publish(struct aiokvm_vring *vring);

/* The driver is to notify of what comes from now on. 1: something had come before; look again. */
int aiokvm_vring_enable_notify(struct aiokvm_vring *vring);
/* The driver need not notify; it may all the same. */
void aiokvm_vring_disable_notify(struct aiokvm_vring *vring);

/* Its entries; 0 before the first start. */
uint32_t aiokvm_vring_size(const struct aiokvm_vring *vring);
/* Any thread: what aiokvm_vring_pop has found wrong; 0: nothing, or the vring was stopped since. */
int aiokvm_vring_error(const struct aiokvm_vring *vring);
/* The words for a negative result. */
const char *aiokvm_vring_strerror(int error);

#endif
