/* The driver's side of a virtqueue, split or packed, for tests and benchmarks of vring.c. It keeps to the
 * specification, and may run on another thread than the device. */
#ifndef AIOKVM_VRING_DRIVER_H
#define AIOKVM_VRING_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DRIVER_MAX_SIZE = 1024 };

struct driver_buffer {
    uint64_t gpa;
    uint32_t len;
    bool write;
};

struct driver {
    uint8_t *ram; /* of the guest address 0 */
    uint32_t size;
    uint64_t features;
    bool packed, event_idx, in_order;
    uint64_t desc, driver, device; /* the areas */
    uint32_t free;                 /* descriptors */

    uint16_t avail_next, used_next; /* split: free-running. packed: slots */
    bool avail_wrap, used_wrap;
    uint16_t added;                   /* since the device was last notified: chains, or descriptors if packed */
    uint16_t free_next[DRIVER_MAX_SIZE]; /* split: a list of free descriptors. packed: a stack of free ids */
    uint16_t free_head;
    struct {
        uint32_t slots, writable, last;
    } out[DRIVER_MAX_SIZE]; /* by id */
    uint16_t order[DRIVER_MAX_SIZE]; /* IN_ORDER: ids */
    uint32_t order_head, order_tail;
    int32_t batch; /* IN_ORDER: the last id of the batch that is being taken; -1: none is */
    uint32_t batch_written;
};

/* Bytes of RAM that the rings take. */
size_t driver_bytes(uint32_t size);
/* Rings of size entries at the guest address base, a multiple of 16. */
void driver_open(struct driver *driver, uint8_t *ram, uint32_t size, uint64_t features, uint64_t base);
/* Makes a chain available; table: where to put an indirect table, 0: nowhere. Returns its id, or -1: no room. */
int driver_add(struct driver *driver, const struct driver_buffer *buffers, size_t count, uint64_t table);
/* Whether the device wants to be notified of what was added since the last call. */
bool driver_notifies(struct driver *driver);
/* Takes the next completion. */
bool driver_take(struct driver *driver, uint32_t *id, uint32_t *written);
/* Asks for an interrupt for the next completion. True: it has come already; look again. */
bool driver_enable_interrupt(struct driver *driver);
void driver_disable_interrupt(struct driver *driver);

#endif
