/* Split virtqueues: virtio 1.2, section 2.7. */
#include "vring_internal.h"

/* Available ring, in the driver area: flags, idx, ring[size], used_event.
 * Used ring, in the device area: flags, idx, ring[size] of id and len, avail_event. */
enum { RING_FLAGS = 0, RING_IDX = 2, RING = 4 };
enum { AVAIL_ENTRY = 2, USED_ENTRY = 8 };
enum { AVAIL_F_NO_INTERRUPT = 1, USED_F_NO_NOTIFY = 1 };

int aiokvm_split_areas(struct aiokvm_vring *vring, uint64_t desc, uint64_t driver, uint64_t device)
{
    uint32_t size = vring->size, event = vring->event_idx ? 2 : 0;
    int error = aiokvm_vring_area(vring, desc, size * DESC_SIZE, 16, &vring->desc);
    if (!error)
        error = aiokvm_vring_area(vring, driver, RING + size * AVAIL_ENTRY + event, 2, &vring->driver);
    if (!error)
        error = aiokvm_vring_area(vring, device, RING + size * USED_ENTRY + event, 4, &vring->device);
    return error;
}

int aiokvm_split_look(struct aiokvm_vring *vring)
{
    if (vring->avail_seen == vring->avail_next) {
        /* Acquire: the entries of the ring and their descriptors were written before. */
        vring->avail_seen = GUEST_LOAD(guest16, vring->driver + RING_IDX, __ATOMIC_SEQ_CST);
        if ((uint16_t)(vring->avail_seen - vring->avail_next) > vring->size) {
            vring->avail_seen = vring->avail_next;
            return AIOKVM_VRING_EINDEX;
        }
    }
    return vring->avail_seen != vring->avail_next;
}

int aiokvm_split_take(struct walk *walk)
{
    struct aiokvm_vring *vring = walk->vring;
    uint32_t slot = vring->avail_next & (vring->size - 1);
    uint32_t at = GUEST_LOAD(guest16, vring->driver + RING + slot * AVAIL_ENTRY, __ATOMIC_RELAXED);
    if (at >= vring->size)
        return AIOKVM_VRING_EHEAD;
    walk->chain->id = at;
    const uint8_t *table = vring->desc;
    uint32_t limit = vring->size;
    bool is_indirect = false; /* the table's address does not tell: a driver may give that of the ring */
    /* Ends: each round adds a descriptor, of which there are no more than the queue is long, or enters the table. */
    for (;;) {
        struct descriptor descriptor = load_descriptor(table + at * DESC_SIZE);
        uint16_t flags = descriptor.half[0], next = descriptor.half[1];
        int error;
        if (flags & DESC_F_INDIRECT) {
            if (is_indirect)
                return AIOKVM_VRING_EINDIRECT;
            is_indirect = true;
            error = aiokvm_vring_table(vring, descriptor.addr, descriptor.len, flags & DESC_F_NEXT, &table, &limit);
            at = 0;
        } else {
            error = aiokvm_vring_add(walk, descriptor.addr, descriptor.len, flags & DESC_F_WRITE);
            if (!error && !(flags & DESC_F_NEXT))
                break;
            at = next;
            if (!error && at >= limit)
                error = AIOKVM_VRING_ENEXT;
        }
        if (error)
            return error;
    }
    vring->avail_next++;
    return 0;
}

void aiokvm_split_complete(struct aiokvm_vring *vring, uint32_t id, uint32_t written, uint32_t slots)
{
    uint8_t *entry = vring->device + RING + (vring->used_next & (vring->size - 1)) * USED_ENTRY;
    GUEST_STORE(guest32, entry, id, __ATOMIC_RELAXED);
    GUEST_STORE(guest32, entry + 4, written, __ATOMIC_RELAXED);
    vring->used_next = (uint16_t)(vring->used_next + slots);
}

bool aiokvm_split_publish(struct aiokvm_vring *vring)
{
    uint16_t now = vring->used_next, old = (uint16_t)(now - vring->added);
    /* Release: the entries and the buffers were written before. */
    GUEST_STORE(guest16, vring->device + RING_IDX, now, __ATOMIC_SEQ_CST);
    if (!vring->event_idx)
        return !(GUEST_LOAD(guest16, vring->driver + RING_FLAGS, __ATOMIC_SEQ_CST) & AVAIL_F_NO_INTERRUPT);
    const uint8_t *used_event = vring->driver + RING + vring->size * AVAIL_ENTRY;
    return passes_event(GUEST_LOAD(guest16, used_event, __ATOMIC_SEQ_CST), now, old);
}

void aiokvm_split_ask(struct aiokvm_vring *vring)
{
    /* With an event index the flags are not used. The index that was left behind disables: it comes by again
     * after 2^16 chains. */
    if (vring->event_idx && !vring->notify)
        return;
    uint16_t wish = vring->event_idx ? vring->avail_next : vring->notify ? 0 : USED_F_NO_NOTIFY;
    if (wish == vring->asked)
        return;
    vring->asked = wish;
    uint8_t *at = vring->device + (vring->event_idx ? RING + vring->size * USED_ENTRY : RING_FLAGS);
    GUEST_STORE(guest16, at, wish, __ATOMIC_SEQ_CST);
}
