#define _GNU_SOURCE
#include "exits.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "notify.h"
#include "turn.h"
#include "vcpu.h"

struct aiokvm_machine *aiokvm_machine_new(struct aiokvm_turn *turn, uint32_t id, int *error)
{
    if (!turn->alive) {
        *error = EOWNERDEAD;
        return NULL;
    }
    struct aiokvm_machine *machine = mmap(NULL, sizeof(*machine), PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (machine == MAP_FAILED || madvise(machine, sizeof(*machine), MADV_WIPEONFORK) < 0) {
        *error = errno;
        if (machine != MAP_FAILED)
            munmap(machine, sizeof(*machine));
        return NULL;
    }
    machine->turn = turn;
    machine->id = id;
    machine->sleeps = UINT64_MAX; /* none of the turn's: the first news is one for which it wakes up */
    /* The default lets readers in as long as there is one: a guest with a few vCPUs would hold the loop up in
     * aiokvm_machine_publish for as long as it likes. */
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&machine->lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    pthread_mutex_init(&machine->post_lock, NULL);
    machine->alive = 1;
    *error = 0;
    return machine;
}

int aiokvm_machine_free(struct aiokvm_machine *machine)
{
    if (machine->alive) {
        aiokvm_turn_forget(machine->turn, machine);
        for (unsigned bus = 0; bus < AIOKVM_BUSES; bus++)
            free(machine->tables[bus].regions);
        pthread_rwlock_destroy(&machine->lock);
        pthread_mutex_destroy(&machine->post_lock);
    }
    return munmap(machine, sizeof(*machine)) < 0 ? -errno : 0;
}

int aiokvm_machine_alive(const struct aiokvm_machine *machine)
{
    return machine->alive != 0;
}

int aiokvm_machine_publish(struct aiokvm_machine *machine, unsigned bus,
                           const struct aiokvm_region *regions, size_t count)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    if (bus >= AIOKVM_BUSES)
        return -EINVAL;
    for (size_t i = 1; i < count; i++)
        if (regions[i].base - regions[i - 1].base < regions[i - 1].size || regions[i].base < regions[i - 1].base)
            return -EINVAL;
    struct aiokvm_table table = { .count = count };
    if (count) {
        table.regions = calloc(count, sizeof(*table.regions));
        if (!table.regions)
            return -ENOMEM;
        memcpy(table.regions, regions, count * sizeof(*regions));
    }
    pthread_rwlock_wrlock(&machine->lock);
    struct aiokvm_table old = machine->tables[bus];
    machine->tables[bus] = table;
    pthread_rwlock_unlock(&machine->lock);
    free(old.regions);
    return 0;
}

static const struct aiokvm_region *find(const struct aiokvm_table *table, uint64_t address)
{
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (table->regions[middle].base <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low && address - table->regions[low - 1].base < table->regions[low - 1].size)
        return &table->regions[low - 1];
    return NULL;
}

/* Queues all of it or, if there is no room, nothing. */
static bool post(struct aiokvm_machine *machine, unsigned bus, const struct aiokvm_region *region,
                 uint64_t offset, const uint8_t *data, size_t size, size_t count)
{
    pthread_mutex_lock(&machine->post_lock);
    uint32_t head = atomic_load(&machine->post_head);
    uint32_t used = head - atomic_load(&machine->post_tail);
    bool fits = count <= AIOKVM_POSTS - used;
    if (fits) {
        for (size_t i = 0; i < count; i++) {
            struct aiokvm_post *entry = &machine->posts[(head + i) % AIOKVM_POSTS];
            *entry = (struct aiokvm_post){
                .region = region->id, .bus = (uint8_t)bus, .offset = offset, .size = (uint8_t)size
            };
            memcpy(&entry->value, data + i * size, size);
        }
        atomic_store(&machine->post_head, head + (uint32_t)count);
        /* Whoever posts into an empty ring tells; the loop looks again after it has emptied it. */
        if (atomic_load(&machine->post_tail) == head)
            aiokvm_turn_tell(machine->turn, machine, true);
    }
    pthread_mutex_unlock(&machine->post_lock);
    return fits;
}

/* Whether the access is one to the region's word of events, and done. */
static bool access_status(const struct aiokvm_region *region, uint64_t offset, bool is_write, uint8_t *data)
{
    uint32_t bits;
    if (is_write && offset == region->clear_offset) {
        memcpy(&bits, data, sizeof(bits));
        aiokvm_status_clear(region->status, bits);
        return true;
    }
    if (!is_write && offset == region->status_offset) {
        bits = aiokvm_status_read(region->status);
        memcpy(data, &bits, sizeof(bits));
        return true;
    }
    return false;
}

enum aiokvm_access aiokvm_machine_access(struct aiokvm_machine *machine, unsigned bus, uint64_t address,
                                         bool is_write, size_t size, size_t count, uint8_t *data,
                                         struct aiokvm_region *found)
{
    enum aiokvm_access result = AIOKVM_UNCLAIMED;
    pthread_rwlock_rdlock(&machine->lock);
    const struct aiokvm_region *region = find(&machine->tables[bus], address);
    if (region) {
        uint64_t offset = address - region->base;
        bool fast = size == 1 && offset < AIOKVM_FAST_OFFSETS;
        result = AIOKVM_ASK;
        *found = *region;
        if (is_write && (region->posted & AIOKVM_POSTED_ALL || (fast && region->posted >> offset & 1))) {
            if (post(machine, bus, region, offset, data, size, count))
                result = AIOKVM_DONE;
        } else if (fast && !is_write && count == 1 && region->latch) {
            uint32_t word = __atomic_load_n(&region->latch[offset], __ATOMIC_ACQUIRE);
            if (word & AIOKVM_LATCHED) {
                *data = (uint8_t)word;
                result = AIOKVM_DONE;
            }
        } else if (region->status && size == sizeof(uint32_t) && count == 1 &&
                   access_status(region, offset, is_write, data)) {
            result = AIOKVM_DONE;
        }
    }
    pthread_rwlock_unlock(&machine->lock);
    if (!region && atomic_load_explicit(&machine->ask_unclaimed, memory_order_relaxed)) {
        *found = (struct aiokvm_region){ .id = AIOKVM_NO_REGION };
        result = AIOKVM_ASK;
    }
    return result;
}

void aiokvm_latch_set(uint32_t *latch, unsigned offset, int value)
{
    if (offset < AIOKVM_FAST_OFFSETS)
        __atomic_store_n(&latch[offset], value < 0 ? 0 : AIOKVM_LATCHED | (uint8_t)value, __ATOMIC_RELEASE);
}

void aiokvm_machine_tell(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu)
{
    /* Already on the stack: the loop will read the state that stands when it gets there. */
    if (atomic_exchange(&vcpu->queued, true))
        return;
    struct aiokvm_vcpu *head = atomic_load(&machine->pending);
    do
        vcpu->next = head;
    while (!atomic_compare_exchange_weak(&machine->pending, &head, vcpu));
    /* Whoever pushed onto an empty stack told; the loop takes all that has come since. */
    if (!head)
        aiokvm_turn_tell(machine->turn, machine, false);
}

/* Moves what has been pushed behind what an earlier call left over: no vCPU overtakes another for ever. */
static void take_pending(struct aiokvm_machine *machine)
{
    struct aiokvm_vcpu *newest = atomic_exchange(&machine->pending, NULL);
    struct aiokvm_vcpu *oldest = NULL;
    while (newest) {
        struct aiokvm_vcpu *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    struct aiokvm_vcpu **end = &machine->taken;
    while (*end)
        end = &(*end)->next;
    *end = oldest;
}

void aiokvm_machine_forget(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu)
{
    if (!atomic_load(&vcpu->queued))
        return;
    take_pending(machine);
    struct aiokvm_vcpu **link = &machine->taken;
    while (*link && *link != vcpu)
        link = &(*link)->next;
    if (*link)
        *link = vcpu->next;
}

/* Posted writes before until, runs of one size to one offset as one; returns how many news that made. *bytes is
 * how many of posted_bytes are used. */
static size_t take_posts(struct aiokvm_machine *machine, uint32_t until, struct aiokvm_news *news, size_t max,
                         size_t *bytes)
{
    uint32_t tail = atomic_load(&machine->post_tail);
    size_t count = 0;
    for (; (int32_t)(until - tail) > 0; tail++) {
        struct aiokvm_post post = machine->posts[tail % AIOKVM_POSTS];
        struct aiokvm_news *last = count ? &news[count - 1] : NULL;
        if (!last || last->region != post.region || last->offset != post.offset || last->bus != post.bus ||
            last->size != post.size) {
            if (count == max)
                break;
            last = &news[count++];
            *last = (struct aiokvm_news){
                .state = AIOKVM_POSTED, .bus = post.bus, .region = post.region, .offset = post.offset,
                .is_write = 1, .size = post.size, .value = *bytes,
            };
        }
        memcpy(machine->posted_bytes + *bytes, &post.value, post.size);
        *bytes += post.size;
        last->count++;
    }
    atomic_store(&machine->post_tail, tail);
    return count;
}

const uint8_t *aiokvm_machine_posted(const struct aiokvm_machine *machine)
{
    return machine->posted_bytes;
}

int aiokvm_machine_ask_unclaimed(struct aiokvm_machine *machine, int ask)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    atomic_store(&machine->ask_unclaimed, ask != 0);
    return 0;
}

int aiokvm_machine_set_poll(struct aiokvm_machine *machine, uint32_t ns)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    atomic_store(&machine->poll_ns, ns);
    machine->window_ns = ns;
    return 0;
}

int aiokvm_machine_get_stats(const struct aiokvm_machine *machine, struct aiokvm_machine_stats *stats)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    *stats = machine->stats;
    return 0;
}

bool aiokvm_machine_has_news(struct aiokvm_machine *machine)
{
    return machine->taken || atomic_load(&machine->pending) ||
           atomic_load(&machine->post_head) != atomic_load(&machine->post_tail);
}

int aiokvm_machine_take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    take_pending(machine);
    /* vCPUs go on posting meanwhile: what this call takes ends here, and fits into posted_bytes. */
    uint32_t head = atomic_load(&machine->post_head);
    size_t count = 0, bytes = 0;
    while (machine->taken) {
        struct aiokvm_vcpu *vcpu = machine->taken;
        /* What had been posted before its news goes first; what has been since does not hold it up. */
        uint32_t until = atomic_load(&vcpu->posted_before);
        until = (int32_t)(until - head) < 0 ? until : head;
        count += take_posts(machine, until, &news[count], max - count, &bytes);
        if (count == max)
            break;
        machine->taken = vcpu->next;
        /* Cleared before the state is read: news from here on pushes the vCPU again. */
        atomic_store(&vcpu->queued, false);
        if (aiokvm_vcpu_news(vcpu, &news[count]))
            count++;
    }
    count += take_posts(machine, head, &news[count], max - count, &bytes);
    return (int)count;
}
