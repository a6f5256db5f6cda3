#define _GNU_SOURCE
#include "vring_internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct aiokvm_vring *aiokvm_vring_new(const struct aiokvm_ram *ram, size_t count, uint32_t max_size)
{
    if (!max_size || max_size > AIOKVM_VRING_MAX_SIZE)
        return NULL;
    struct aiokvm_vring *vring =
        mmap(NULL, sizeof(*vring), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (vring == MAP_FAILED)
        return NULL;
    size_t chains = 2 * (size_t)max_size;
    vring->ram = calloc(count ? count : 1, sizeof(*ram));
    vring->chains = calloc(chains, sizeof(*vring->chains));
    vring->iov = calloc(chains * max_size, sizeof(*vring->iov));
    /* A child of fork has no guest RAM: it finds a vring that was never started. */
    if (!vring->ram || !vring->chains || !vring->iov || madvise(vring, sizeof(*vring), MADV_WIPEONFORK) < 0) {
        aiokvm_vring_free(vring);
        return NULL;
    }
    if (count)
        memcpy(vring->ram, ram, count * sizeof(*ram));
    vring->ram_count = count;
    vring->max_size = max_size;
    vring->generation = 1;
    for (size_t i = chains; i-- > 0;) {
        vring->chains[i].iov = vring->iov + i * max_size;
        vring->chains[i].next_free = vring->free;
        vring->free = &vring->chains[i];
    }
    vring->free_count = (uint32_t)chains;
    return vring;
}

void aiokvm_vring_free(struct aiokvm_vring *vring)
{
    free(vring->ram);
    free(vring->chains);
    free(vring->iov);
    munmap(vring, sizeof(*vring));
}

uint8_t *aiokvm_vring_ram(struct aiokvm_vring *vring, uint64_t gpa, uint64_t size)
{
    size_t at = vring->ram_last;
    for (size_t i = 0; i < vring->ram_count; i++) {
        const struct aiokvm_ram *ram = &vring->ram[at];
        uint64_t offset = gpa - ram->gpa;
        if (gpa >= ram->gpa && offset < ram->size && size <= ram->size - offset) {
            vring->ram_last = at;
            return ram->host + offset;
        }
        at = at + 1 == vring->ram_count ? 0 : at + 1;
    }
    return NULL;
}

int aiokvm_vring_area(struct aiokvm_vring *vring, uint64_t gpa, uint64_t size, unsigned align, uint8_t **area)
{
    *area = aiokvm_vring_ram(vring, gpa, size);
    if (!*area)
        return AIOKVM_VRING_ERING;
    return gpa % align || (uintptr_t)*area % align ? AIOKVM_VRING_EALIGN : 0;
}

static void release(struct aiokvm_vring *vring, struct aiokvm_chain *chain)
{
    chain->next_free = vring->free;
    vring->free = chain;
    vring->free_count++;
}

static int look(struct aiokvm_vring *vring)
{
    return vring->packed ? aiokvm_packed_look(vring) : aiokvm_split_look(vring);
}

/* Tells the driver whether, and from where on, it is to notify. */
static void ask(struct aiokvm_vring *vring)
{
    if (vring->packed)
        aiokvm_packed_ask(vring);
    else
        aiokvm_split_ask(vring);
}

int aiokvm_vring_start(struct aiokvm_vring *vring, uint32_t size, uint64_t desc, uint64_t driver,
                       uint64_t device, uint64_t features)
{
    aiokvm_vring_stop(vring);
    bool packed = features & AIOKVM_VIRTIO_F_RING_PACKED;
    if (!size || size > vring->max_size || (!packed && (size & (size - 1))))
        return AIOKVM_VRING_ESIZE;
    /* Each slot may be a chain. */
    if (vring->free_count < size)
        return AIOKVM_VRING_EBUSY;
    vring->size = size;
    vring->packed = packed;
    vring->indirect = features & AIOKVM_VIRTIO_F_INDIRECT_DESC;
    vring->event_idx = features & AIOKVM_VIRTIO_F_EVENT_IDX;
    vring->in_order = features & AIOKVM_VIRTIO_F_IN_ORDER;
    int error = packed ? aiokvm_packed_areas(vring, desc, driver, device)
                       : aiokvm_split_areas(vring, desc, driver, device);
    if (error)
        return error;
    vring->avail_next = vring->avail_seen = vring->used_next = 0;
    vring->avail_wrap = vring->used_wrap = true;
    vring->outstanding = vring->added = 0;
    vring->first = NULL;
    vring->popped = vring->completed = 0;
    vring->notify = true;
    vring->asked = -1;
    vring->started = true;
    ask(vring);
    return 0;
}

void aiokvm_vring_stop(struct aiokvm_vring *vring)
{
    /* Pushed, but those before them were not. */
    for (; vring->completed != vring->popped; vring->completed++) {
        struct aiokvm_chain *chain = vring->order[vring->completed % AIOKVM_VRING_MAX_SIZE];
        if (chain && chain->done)
            release(vring, chain);
    }
    vring->started = false;
    vring->error = 0;
    vring->generation++;
}

int aiokvm_vring_add(struct walk *walk, uint64_t addr, uint32_t len, bool write)
{
    struct aiokvm_chain *chain = walk->chain;
    if (walk->descriptors++ == walk->vring->size)
        return AIOKVM_VRING_ELONG;
    if (!write && walk->writing)
        return AIOKVM_VRING_EORDER;
    walk->writing = write;
    if (!len)
        return 0;
    if (chain->readable_bytes + chain->writable_bytes + len > UINT64_C(1) << 32)
        return AIOKVM_VRING_EBYTES;
    uint8_t *host = aiokvm_vring_ram(walk->vring, addr, len);
    if (!host)
        return AIOKVM_VRING_EADDRESS;
    chain->iov[chain->readable + chain->writable] = (struct iovec){ .iov_base = host, .iov_len = len };
    if (write) {
        chain->writable++;
        chain->writable_bytes += len;
    } else {
        chain->readable++;
        chain->readable_bytes += len;
    }
    return 0;
}

int aiokvm_vring_table(struct aiokvm_vring *vring, uint64_t addr, uint32_t len, bool has_next,
                       const uint8_t **table, uint32_t *count)
{
    *count = len / DESC_SIZE;
    if (!vring->indirect || has_next || !len || len % DESC_SIZE || *count > vring->size)
        return AIOKVM_VRING_EINDIRECT;
    *table = aiokvm_vring_ram(vring, addr, len);
    return *table ? 0 : AIOKVM_VRING_EADDRESS;
}

static int take(struct aiokvm_vring *vring, struct aiokvm_chain **taken)
{
    /* All slots are out already: the driver offers one twice. So the pool has a chain: it had one for each slot. */
    if (vring->outstanding == vring->size)
        return AIOKVM_VRING_EINDEX;
    struct aiokvm_chain *chain = vring->free;
    assert(chain);
    chain->readable = chain->writable = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
    chain->slots = 1;
    struct walk walk = { .vring = vring, .chain = chain };
    int error = vring->packed ? aiokvm_packed_take(&walk) : aiokvm_split_take(&walk);
    if (error)
        return error;
    if (vring->outstanding + chain->slots > vring->size)
        return AIOKVM_VRING_EINDEX;
    vring->outstanding += chain->slots;
    vring->free = chain->next_free;
    vring->free_count--;
    chain->generation = vring->generation;
    if (vring->in_order) {
        chain->done = 0;
        chain->position = vring->popped++;
        vring->order[chain->position % AIOKVM_VRING_MAX_SIZE] = chain;
    }
    *taken = chain;
    return 1;
}

int aiokvm_vring_pop(struct aiokvm_vring *vring, struct aiokvm_chain **chain)
{
    if (!vring->started)
        return 0;
    int result = vring->error;
    if (!result)
        result = look(vring);
    if (!result && vring->notify) {
        ask(vring);
        result = look(vring);
    }
    if (result > 0)
        result = take(vring, chain);
    if (result < 0)
        vring->error = result;
    return result;
}

/* Puts a completion into the ring that makes slots free, and with it those before it that were left out. */
static void complete(struct aiokvm_vring *vring, struct aiokvm_chain *chain, uint32_t slots)
{
    if (vring->packed)
        aiokvm_packed_complete(vring, chain->id, chain->written, slots);
    else
        aiokvm_split_complete(vring, chain->id, chain->written, slots);
    vring->outstanding -= slots;
    vring->added += slots;
}

void aiokvm_vring_push(struct aiokvm_vring *vring, struct aiokvm_chain *chain, uint32_t written)
{
    if (chain->generation != vring->generation) {
        release(vring, chain);
        return;
    }
    chain->written = written < chain->writable_bytes ? written : (uint32_t)chain->writable_bytes;
    chain->done = 1;
    if (vring->in_order)
        return;
    complete(vring, chain, chain->slots);
    release(vring, chain);
}

void aiokvm_vring_drop(struct aiokvm_vring *vring, struct aiokvm_chain *chain)
{
    if (vring->in_order && chain->generation == vring->generation)
        vring->order[chain->position % AIOKVM_VRING_MAX_SIZE] = NULL;
    release(vring, chain);
}

/* One of the two is NULL. */
static size_t copy(const struct iovec *iov, uint32_t count, uint64_t offset, uint8_t *to, const uint8_t *from, size_t n)
{
    size_t done = 0;
    for (uint32_t i = 0; i < count && done < n; i++) {
        if (offset >= iov[i].iov_len) {
            offset -= iov[i].iov_len;
            continue;
        }
        uint8_t *base = (uint8_t *)iov[i].iov_base + offset;
        size_t part = iov[i].iov_len - (size_t)offset;
        if (part > n - done)
            part = n - done;
        if (to)
            memcpy(to + done, base, part);
        else
            memcpy(base, from + done, part);
        done += part;
        offset = 0;
    }
    return done;
}

size_t aiokvm_chain_read(const struct aiokvm_chain *chain, uint64_t offset, void *to, size_t n)
{
    return copy(chain->iov, chain->readable, offset, to, NULL, n);
}

size_t aiokvm_chain_write(const struct aiokvm_chain *chain, uint64_t offset, const void *from, size_t n)
{
    return copy(chain->iov + chain->readable, chain->writable, offset, NULL, from, n);
}

static struct aiokvm_chain *next_in_order(const struct aiokvm_vring *vring)
{
    if (vring->completed == vring->popped)
        return NULL;
    struct aiokvm_chain *chain = vring->order[vring->completed % AIOKVM_VRING_MAX_SIZE];
    return chain && chain->done ? chain : NULL;
}

/* Section 2.7.9: of a batch the last completion alone needs to be in the ring, if the others' buffers were written
 * completely: the driver takes them for that. */
static void complete_in_order(struct aiokvm_vring *vring)
{
    uint32_t slots = 0;
    struct aiokvm_chain *chain = next_in_order(vring);
    while (chain) {
        vring->completed++;
        slots += chain->slots;
        struct aiokvm_chain *next = next_in_order(vring);
        if (!next || chain->written != chain->writable_bytes) {
            complete(vring, chain, slots);
            slots = 0;
        }
        release(vring, chain);
        chain = next;
    }
}

int aiokvm_vring_publish(struct aiokvm_vring *vring)
{
    if (!vring->started)
        return 0;
    if (vring->in_order)
        complete_in_order(vring);
    if (!vring->added)
        return 0;
    bool interrupt = vring->packed ? aiokvm_packed_publish(vring) : aiokvm_split_publish(vring);
    vring->added = 0;
    return interrupt;
}

int aiokvm_vring_enable_notify(struct aiokvm_vring *vring)
{
    vring->notify = true;
    if (!vring->started)
        return 0;
    ask(vring);
    return look(vring) != 0;
}

void aiokvm_vring_disable_notify(struct aiokvm_vring *vring)
{
    vring->notify = false;
    if (vring->started)
        ask(vring);
}

uint32_t aiokvm_vring_size(const struct aiokvm_vring *vring)
{
    return vring->size;
}

int aiokvm_vring_error(const struct aiokvm_vring *vring)
{
    return vring->error;
}

const char *aiokvm_vring_strerror(int error)
{
    switch (error) {
    case 0:
        return "no error";
    case AIOKVM_VRING_ESIZE:
        return "the queue size is 0 or too large, or that of a split queue is no power of two";
    case AIOKVM_VRING_EALIGN:
        return "a queue area is not aligned";
    case AIOKVM_VRING_ERING:
        return "a queue area is not in one range of RAM";
    case AIOKVM_VRING_EBUSY:
        return "too many chains of earlier starts of the queue are still in use";
    case AIOKVM_VRING_EINDEX:
        return "more is available than the queue is long";
    case AIOKVM_VRING_EHEAD:
        return "the head of a chain is outside the queue";
    case AIOKVM_VRING_ENEXT:
        return "the next descriptor of a chain is outside its table";
    case AIOKVM_VRING_ELONG:
        return "a chain loops, or is longer than the queue";
    case AIOKVM_VRING_EBYTES:
        return "a chain has more than 2^32 bytes";
    case AIOKVM_VRING_EADDRESS:
        return "a buffer or indirect table is not in one range of RAM";
    case AIOKVM_VRING_EORDER:
        return "a readable buffer comes after a writable one";
    case AIOKVM_VRING_EINDIRECT:
        return "an indirect descriptor was not negotiated, is nested, has a next one, "
               "or has a table of no possible size";
    default:
        return "unknown error";
    }
}
