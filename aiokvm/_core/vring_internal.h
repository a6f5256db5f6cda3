/* What vring.c shares with the two layouts, vring_split.c and vring_packed.c. */
#ifndef AIOKVM_VRING_INTERNAL_H
#define AIOKVM_VRING_INTERNAL_H

#include <stdbool.h>

#include "vring.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "virtio is little-endian, and so are all guests");

/* Guest memory is written by the guest's processors at any time: it is accessed by these alone, which the
 * compiler neither tears nor repeats. */
typedef uint16_t __attribute__((may_alias)) guest16;
typedef uint32_t __attribute__((may_alias)) guest32;
typedef uint64_t __attribute__((may_alias)) guest64;

#define GUEST_LOAD(type, at, order) __atomic_load_n((const type *)(at), order)
#define GUEST_STORE(type, at, value, order) __atomic_store_n((type *)(at), value, order)

/* Each side writes one thing (chains or completions; the wish to be told of them) and then reads the other's: both
 * are sequentially consistent, so that one of the two sees the other. */

/* A descriptor. Split: addr, len, flags, next. Packed: addr, len, id, flags. */
enum { DESC_SIZE = 16, DESC_FLAGS_PACKED = 14 };
enum { DESC_F_NEXT = 1, DESC_F_WRITE = 2, DESC_F_INDIRECT = 4, DESC_F_AVAIL = 1 << 7, DESC_F_USED = 1 << 15 };

struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t half[2];
};

struct aiokvm_vring {
    struct aiokvm_ram *ram;
    size_t ram_count;
    size_t ram_last; /* the range that was found last: most often it is the next, too */

    /* The pool: twice as many chains as the queue has entries, for those of the last start may still be out.
     * Each has room for as many iovecs as the queue has entries. Untouched, it takes no memory. */
    uint32_t max_size;
    struct aiokvm_chain *chains;
    struct iovec *iov;
    struct aiokvm_chain *free; /* the one that was used last comes first: it is in the cache */
    uint32_t free_count;
    uint32_t generation; /* counts the stops, from 1 on */

    _Atomic int error;
    bool started;
    bool packed, indirect, event_idx, in_order;
    bool notify;    /* the driver is to notify */
    int64_t asked;  /* for what, as it was written to the device area last */
    uint32_t size;
    uint8_t *desc, *driver, *device;

    /* The cursors are the device's; what the guest writes into the rings does not move them. */
    uint16_t avail_next; /* split: free-running. packed: a slot, as is used_next */
    uint16_t avail_seen; /* split: the driver's index when it was last read */
    uint16_t used_next;
    bool avail_wrap, used_wrap; /* packed */
    uint32_t outstanding;       /* slots that were popped, and whose completion is not in the ring yet */
    uint32_t added;             /* slots that completions not yet published make free */
    uint8_t *first;             /* packed: the first of those completions, whose flags make all visible */
    uint16_t first_flags;

    /* IN_ORDER: chains in the order of popping, from position completed to popped; NULL: it was dropped. */
    uint32_t popped, completed;
    struct aiokvm_chain *order[AIOKVM_VRING_MAX_SIZE];
};

/* A chain on its way out. */
struct walk {
    struct aiokvm_vring *vring;
    struct aiokvm_chain *chain;
    uint32_t descriptors;
    bool writing; /* a writable one has come */
};

/* Where size bytes at gpa are, if they are in one range; else NULL. */
uint8_t *aiokvm_vring_ram(struct aiokvm_vring *vring, uint64_t gpa, uint64_t size);
/* The next buffer of a chain. Returns 0, or what is wrong, as the next one does. */
int aiokvm_vring_add(struct walk *walk, uint64_t addr, uint32_t len, bool write);
/* The table of count descriptors that an indirect one refers to. */
int aiokvm_vring_table(struct aiokvm_vring *vring, uint64_t addr, uint32_t len, bool has_next,
                       const uint8_t **table, uint32_t *count);

/* A private copy. Indirect tables need not be aligned. */
static inline struct descriptor load_descriptor(const uint8_t *at)
{
    struct descriptor copy;
    if ((uintptr_t)at % sizeof(uint64_t) == 0) {
        copy.addr = GUEST_LOAD(guest64, at, __ATOMIC_RELAXED);
        copy.len = GUEST_LOAD(guest32, at + 8, __ATOMIC_RELAXED);
        copy.half[0] = GUEST_LOAD(guest16, at + 12, __ATOMIC_RELAXED);
        copy.half[1] = GUEST_LOAD(guest16, at + 14, __ATOMIC_RELAXED);
    } else {
        for (size_t i = 0; i < DESC_SIZE; i++)
            ((uint8_t *)&copy)[i] = GUEST_LOAD(uint8_t, at + i, __ATOMIC_RELAXED);
    }
    return copy;
}

/* Whether the event index lies in what came from old to now: vring_need_event of the specification. */
static inline bool passes_event(uint16_t event, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

/* One layout. look: 1, there is a chain; 0, there is none; below 0, an error. take: the chain that look has seen. */
int aiokvm_split_areas(struct aiokvm_vring *vring, uint64_t desc, uint64_t driver, uint64_t device);
int aiokvm_split_look(struct aiokvm_vring *vring);
int aiokvm_split_take(struct walk *walk);
void aiokvm_split_complete(struct aiokvm_vring *vring, uint32_t id, uint32_t written, uint32_t slots);
bool aiokvm_split_publish(struct aiokvm_vring *vring);
void aiokvm_split_ask(struct aiokvm_vring *vring);

int aiokvm_packed_areas(struct aiokvm_vring *vring, uint64_t desc, uint64_t driver, uint64_t device);
int aiokvm_packed_look(struct aiokvm_vring *vring);
int aiokvm_packed_take(struct walk *walk);
void aiokvm_packed_complete(struct aiokvm_vring *vring, uint32_t id, uint32_t written, uint32_t slots);
bool aiokvm_packed_publish(struct aiokvm_vring *vring);
void aiokvm_packed_ask(struct aiokvm_vring *vring);

/* Where an area of the rings is. */
int aiokvm_vring_area(struct aiokvm_vring *vring, uint64_t gpa, uint64_t size, unsigned align, uint8_t **area);

#endif
