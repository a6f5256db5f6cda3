/* Packed virtqueues: virtio 1.2, section 2.8. */
#include "vring_internal.h"

/* Driver and device area: event suppression, off_wrap in the lower half and flags in the upper. */
enum { EVENT_SIZE = 4 };
enum { EVENT_F_ENABLE = 0, EVENT_F_DISABLE = 1, EVENT_F_DESC = 2, EVENT_FLAGS = 3 };
enum { WRAP = 1 << 15 };

int aiokvm_packed_areas(struct aiokvm_vring *vring, uint64_t desc, uint64_t driver, uint64_t device)
{
    int error = aiokvm_vring_area(vring, desc, vring->size * DESC_SIZE, 16, &vring->desc);
    if (!error)
        error = aiokvm_vring_area(vring, driver, EVENT_SIZE, 4, &vring->driver);
    if (!error)
        error = aiokvm_vring_area(vring, device, EVENT_SIZE, 4, &vring->device);
    return error;
}

int aiokvm_packed_look(struct aiokvm_vring *vring)
{
    const uint8_t *at = vring->desc + vring->avail_next * DESC_SIZE + DESC_FLAGS_PACKED;
    /* Acquire: the rest of the chain was written before the flags of its first descriptor. */
    uint16_t flags = GUEST_LOAD(guest16, at, __ATOMIC_SEQ_CST);
    return !!(flags & DESC_F_AVAIL) == vring->avail_wrap && !!(flags & DESC_F_USED) != vring->avail_wrap;
}

/* A table has as many descriptors as its length says. */
static int take_table(struct walk *walk, const uint8_t *table, uint32_t count)
{
    int error = 0;
    for (uint32_t i = 0; i < count && !error; i++) {
        struct descriptor descriptor = load_descriptor(table + i * DESC_SIZE);
        uint16_t flags = descriptor.half[1];
        if (flags & DESC_F_INDIRECT)
            return AIOKVM_VRING_EINDIRECT;
        error = aiokvm_vring_add(walk, descriptor.addr, descriptor.len, flags & DESC_F_WRITE);
    }
    return error;
}

int aiokvm_packed_take(struct walk *walk)
{
    struct aiokvm_vring *vring = walk->vring;
    uint32_t at = vring->avail_next, slots = 0;
    uint16_t flags;
    do {
        if (slots++ == vring->size)
            return AIOKVM_VRING_ELONG;
        struct descriptor descriptor = load_descriptor(vring->desc + at * DESC_SIZE);
        at = at + 1 == vring->size ? 0 : at + 1;
        flags = descriptor.half[1];
        int error;
        if (flags & DESC_F_INDIRECT) {
            const uint8_t *table;
            uint32_t count;
            error = aiokvm_vring_table(vring, descriptor.addr, descriptor.len, flags & DESC_F_NEXT, &table, &count);
            if (!error)
                error = take_table(walk, table, count);
        } else {
            error = aiokvm_vring_add(walk, descriptor.addr, descriptor.len, flags & DESC_F_WRITE);
        }
        if (error)
            return error;
        /* The last one counts. */
        walk->chain->id = descriptor.half[0];
    } while (flags & DESC_F_NEXT);
    walk->chain->slots = slots;
    vring->avail_wrap ^= at <= vring->avail_next;
    vring->avail_next = (uint16_t)at;
    return 0;
}

void aiokvm_packed_complete(struct aiokvm_vring *vring, uint32_t id, uint32_t written, uint32_t slots)
{
    uint8_t *descriptor = vring->desc + vring->used_next * DESC_SIZE;
    uint16_t flags = (uint16_t)((vring->used_wrap ? DESC_F_AVAIL | DESC_F_USED : 0) | (written ? DESC_F_WRITE : 0));
    GUEST_STORE(guest32, descriptor + 8, written, __ATOMIC_RELAXED);
    GUEST_STORE(guest16, descriptor + 12, (uint16_t)id, __ATOMIC_RELAXED);
    if (vring->first) {
        GUEST_STORE(guest16, descriptor + DESC_FLAGS_PACKED, flags, __ATOMIC_RELAXED);
    } else {
        /* The driver looks at completions in their order: it sees none before this one's flags. */
        vring->first = descriptor;
        vring->first_flags = flags;
    }
    uint32_t next = vring->used_next + slots;
    vring->used_wrap ^= next >= vring->size;
    vring->used_next = (uint16_t)(next >= vring->size ? next - vring->size : next);
}

bool aiokvm_packed_publish(struct aiokvm_vring *vring)
{
    uint16_t now = vring->used_next, old = (uint16_t)(now - vring->added);
    /* Release: the other completions and the buffers were written before. */
    GUEST_STORE(guest16, vring->first + DESC_FLAGS_PACKED, vring->first_flags, __ATOMIC_SEQ_CST);
    vring->first = NULL;
    uint32_t wish = GUEST_LOAD(guest32, vring->driver, __ATOMIC_SEQ_CST);
    uint16_t flags = wish >> 16 & EVENT_FLAGS, event = wish & (WRAP - 1);
    if (flags != EVENT_F_DESC || !vring->event_idx)
        return flags != EVENT_F_DISABLE;
    /* The event's slot, counted from the lap that the used index is in. */
    if (!!(wish & WRAP) != vring->used_wrap)
        event = (uint16_t)(event - vring->size);
    return passes_event(event, now, old);
}

void aiokvm_packed_ask(struct aiokvm_vring *vring)
{
    uint32_t wish = EVENT_F_ENABLE << 16;
    if (!vring->notify)
        wish = EVENT_F_DISABLE << 16;
    else if (vring->event_idx)
        wish = EVENT_F_DESC << 16 | (vring->avail_wrap ? WRAP : 0) | vring->avail_next;
    if (wish == vring->asked)
        return;
    vring->asked = wish;
    /* Both halves at once: the driver never sees a new one with an old one. */
    GUEST_STORE(guest32, vring->device, wish, __ATOMIC_SEQ_CST);
}
