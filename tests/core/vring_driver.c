#include "vring_driver.h"

#include <string.h>

#include "vring.h"

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };
enum { DISABLE = 1, DESC = 2 };

#define LOAD16(driver, gpa) __atomic_load_n((uint16_t *)((driver)->ram + (gpa)), __ATOMIC_SEQ_CST)
#define STORE16(driver, gpa, value) __atomic_store_n((uint16_t *)((driver)->ram + (gpa)), value, __ATOMIC_SEQ_CST)

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t half[2];
};

static uint64_t avail_event(const struct driver *driver)
{
    return driver->device + 4 + driver->size * 8;
}

static uint64_t used_event(const struct driver *driver)
{
    return driver->driver + 4 + driver->size * 2;
}

size_t driver_bytes(uint32_t size)
{
    return size * 16 + ((6 + size * 2 + 3) & ~3u) + 6 + size * 8;
}

void driver_open(struct driver *driver, uint8_t *ram, uint32_t size, uint64_t features, uint64_t base)
{
    memset(driver, 0, sizeof(*driver));
    memset(ram + base, 0, driver_bytes(size));
    driver->ram = ram;
    driver->size = driver->free = size;
    driver->features = features;
    driver->packed = features & AIOKVM_VIRTIO_F_RING_PACKED;
    driver->event_idx = features & AIOKVM_VIRTIO_F_EVENT_IDX;
    driver->in_order = features & AIOKVM_VIRTIO_F_IN_ORDER;
    driver->desc = base;
    driver->driver = base + size * 16;
    driver->device = driver->driver + ((6 + size * 2 + 3) & ~3u);
    driver->avail_wrap = driver->used_wrap = true;
    driver->batch = -1;
    for (uint32_t i = 0; i < size; i++)
        driver->free_next[i] = (uint16_t)(i + 1);
}

static void put(const struct driver *driver, uint64_t gpa, uint64_t addr, uint32_t len, uint16_t low, uint16_t high)
{
    uint8_t *at = driver->ram + gpa;
    __atomic_store_n((uint64_t *)at, addr, __ATOMIC_RELAXED);
    __atomic_store_n((uint32_t *)(at + 8), len, __ATOMIC_RELAXED);
    __atomic_store_n((uint16_t *)(at + 12), low, __ATOMIC_RELAXED);
    /* Release: in a packed ring these are the flags. */
    __atomic_store_n((uint16_t *)(at + 14), high, __ATOMIC_RELEASE);
}

static uint32_t add_split(struct driver *driver, const struct driver_buffer *buffers, size_t count)
{
    uint16_t head = driver->free_head, slot = head;
    for (size_t i = 0; i < count; i++) {
        uint16_t next = driver->free_next[slot];
        uint16_t flags = (uint16_t)((buffers[i].write ? WRITE : 0) | (i + 1 < count ? NEXT : 0));
        put(driver, driver->desc + slot * 16u, buffers[i].gpa, buffers[i].len, flags, next);
        driver->out[head].last = slot;
        slot = next;
    }
    driver->free_head = slot;
    return head;
}

static void expose_split(struct driver *driver, uint16_t head)
{
    STORE16(driver, driver->driver + 4 + driver->avail_next % driver->size * 2, head);
    STORE16(driver, driver->driver + 2, ++driver->avail_next);
    driver->added++;
}

static uint32_t add_packed(struct driver *driver, const struct driver_buffer *buffers, size_t count, uint16_t also)
{
    uint16_t id = driver->free_head;
    driver->free_head = driver->free_next[id];
    uint16_t first = driver->avail_next, first_flags = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)(also | (buffers[i].write ? WRITE : 0) | (i + 1 < count ? NEXT : 0));
        flags |= driver->avail_wrap ? AVAIL : USED;
        uint64_t at = driver->desc + driver->avail_next * 16u;
        if (i) {
            put(driver, at, buffers[i].gpa, buffers[i].len, id, flags);
        } else {
            first_flags = flags;
            put(driver, at, buffers[i].gpa, buffers[i].len, id, LOAD16(driver, at + 14));
        }
        if (++driver->avail_next == driver->size) {
            driver->avail_next = 0;
            driver->avail_wrap = !driver->avail_wrap;
        }
    }
    STORE16(driver, driver->desc + first * 16u + 14, first_flags);
    driver->added = (uint16_t)(driver->added + count);
    return id;
}

int driver_add(struct driver *driver, const struct driver_buffer *buffers, size_t count, uint64_t table)
{
    size_t slots = table ? 1 : count;
    if (slots > driver->free)
        return -1;
    uint32_t writable = 0, id;
    for (size_t i = 0; i < count; i++)
        writable += buffers[i].write ? buffers[i].len : 0;
    struct driver_buffer indirect = { .gpa = table, .len = (uint32_t)count * 16 };
    for (size_t i = 0; table && i < count; i++) {
        uint16_t flags = (uint16_t)((buffers[i].write ? WRITE : 0) | (!driver->packed && i + 1 < count ? NEXT : 0));
        put(driver, table + i * 16, buffers[i].gpa, buffers[i].len, driver->packed ? 0 : flags,
            driver->packed ? flags : (uint16_t)(i + 1));
    }
    if (driver->packed) {
        id = driver->free_head;
        driver->out[id].writable = writable;
        driver->out[id].slots = (uint32_t)slots;
        driver->order[driver->order_tail++ % DRIVER_MAX_SIZE] = (uint16_t)id;
        add_packed(driver, table ? &indirect : buffers, slots, table ? INDIRECT : 0);
    } else {
        id = add_split(driver, table ? &indirect : buffers, slots);
        if (table)
            __atomic_store_n((uint16_t *)(driver->ram + driver->desc + id * 16 + 12), INDIRECT, __ATOMIC_RELAXED);
        driver->out[id].writable = writable;
        driver->out[id].slots = (uint32_t)slots;
        driver->order[driver->order_tail++ % DRIVER_MAX_SIZE] = (uint16_t)id;
        expose_split(driver, (uint16_t)id);
    }
    driver->free -= (uint32_t)slots;
    return (int)id;
}

static bool passes(uint16_t event, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

bool driver_notifies(struct driver *driver)
{
    uint16_t now = driver->avail_next, old = (uint16_t)(now - driver->added);
    driver->added = 0;
    if (now == old)
        return false;
    if (!driver->packed) {
        if (driver->event_idx)
            return passes(LOAD16(driver, avail_event(driver)), now, old);
        return !(LOAD16(driver, driver->device) & 1);
    }
    uint32_t wish = __atomic_load_n((uint32_t *)(driver->ram + driver->device), __ATOMIC_SEQ_CST);
    uint16_t event = wish & 0x7fff;
    if (wish >> 16 != DESC)
        return wish >> 16 != DISABLE;
    if ((wish >> 15 & 1) != driver->avail_wrap)
        event = (uint16_t)(event - driver->size);
    return passes(event, now, old);
}

static bool look(const struct driver *driver)
{
    if (!driver->packed)
        return LOAD16(driver, driver->device + 2) != driver->used_next;
    uint16_t flags = LOAD16(driver, driver->desc + driver->used_next * 16u + 14);
    return !!(flags & AVAIL) == driver->used_wrap && !!(flags & USED) == driver->used_wrap;
}

static void take_entry(const struct driver *driver, uint32_t *id, uint32_t *written)
{
    if (driver->packed) {
        const uint8_t *at = driver->ram + driver->desc + driver->used_next * 16u;
        *written = __atomic_load_n((const uint32_t *)(at + 8), __ATOMIC_RELAXED);
        *id = __atomic_load_n((const uint16_t *)(at + 12), __ATOMIC_RELAXED);
    } else {
        const uint8_t *at = driver->ram + driver->device + 4 + driver->used_next % driver->size * 8;
        *id = __atomic_load_n((const uint32_t *)at, __ATOMIC_RELAXED);
        *written = __atomic_load_n((const uint32_t *)(at + 4), __ATOMIC_RELAXED);
    }
}

/* Makes a chain's descriptors free, and goes past its place in the used ring. */
static void finish(struct driver *driver, uint32_t id)
{
    uint32_t slots = driver->out[id].slots;
    driver->free += slots;
    driver->free_next[driver->packed ? id : driver->out[id].last] = driver->free_head;
    driver->free_head = (uint16_t)id;
    if (!driver->packed) {
        driver->used_next++;
        return;
    }
    uint32_t next = driver->used_next + slots;
    driver->used_wrap ^= next >= driver->size;
    driver->used_next = (uint16_t)(next % driver->size);
}

bool driver_take(struct driver *driver, uint32_t *id, uint32_t *written)
{
    if (driver->batch < 0) {
        if (!look(driver))
            return false;
        take_entry(driver, id, written);
        if (driver->in_order) {
            driver->batch = (int32_t)*id;
            driver->batch_written = *written;
        }
    }
    if (driver->in_order) {
        /* Those before the last of a batch have no entry: they were written completely. */
        *id = driver->order[driver->order_head++ % DRIVER_MAX_SIZE];
        bool last = (int32_t)*id == driver->batch;
        *written = last ? driver->batch_written : driver->out[*id].writable;
        if (last)
            driver->batch = -1;
    }
    finish(driver, *id);
    return true;
}

bool driver_enable_interrupt(struct driver *driver)
{
    if (driver->packed) {
        uint32_t wish = 0;
        if (driver->event_idx)
            wish = DESC << 16 | (uint32_t)driver->used_wrap << 15 | driver->used_next;
        __atomic_store_n((uint32_t *)(driver->ram + driver->driver), wish, __ATOMIC_SEQ_CST);
    } else if (driver->event_idx) {
        STORE16(driver, used_event(driver), driver->used_next);
    } else {
        STORE16(driver, driver->driver, 0);
    }
    return look(driver);
}

void driver_disable_interrupt(struct driver *driver)
{
    if (driver->packed)
        __atomic_store_n((uint32_t *)(driver->ram + driver->driver), DISABLE << 16, __ATOMIC_SEQ_CST);
    else if (driver->event_idx)
        STORE16(driver, used_event(driver), (uint16_t)(driver->used_next + 0x8000));
    else
        STORE16(driver, driver->driver, 1);
}
