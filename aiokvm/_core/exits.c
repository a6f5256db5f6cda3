#define _GNU_SOURCE
#include "exits.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "notify.h"
#include "vcpu.h"

/* About what an answer takes if both sides have a CPU. */
#define YIELD_AFTER_NS 3000
/* What a posted write may wait for the loop at least: a dozen come meanwhile, and are taken at once. */
#define NAP_NS 50000

struct aiokvm_machine *aiokvm_machine_new(int *error)
{
    struct aiokvm_machine *machine = mmap(NULL, sizeof(*machine), PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (machine == MAP_FAILED) {
        *error = errno;
        return NULL;
    }
    machine->doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (machine->doorbell < 0 || madvise(machine, sizeof(*machine), MADV_WIPEONFORK) < 0) {
        *error = errno;
        if (machine->doorbell >= 0)
            close(machine->doorbell);
        munmap(machine, sizeof(*machine));
        return NULL;
    }
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
        close(machine->doorbell);
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

int aiokvm_machine_doorbell(const struct aiokvm_machine *machine)
{
    return machine->alive ? machine->doorbell : -EOWNERDEAD;
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

/* A vCPU has left news where there was none. A loop that watches will see it without being told: it clears
 * watched before it looks for the last time. */
static void ring_doorbell(struct aiokvm_machine *machine, bool post)
{
    uint32_t watched = atomic_load(&machine->watched);
    if (watched == AIOKVM_WATCHES || (post && watched == AIOKVM_NAPS))
        return;
    uint64_t one = 1;
    ssize_t written = write(machine->doorbell, &one, sizeof(one));
    (void)written; /* an eventfd refuses only when it is about to overflow, and then it has been rung */
}

static void empty_doorbell(struct aiokvm_machine *machine)
{
    uint64_t rung;
    ssize_t got = read(machine->doorbell, &rung, sizeof(rung));
    (void)got; /* EAGAIN: not rung */
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
        /* Whoever posts into an empty ring rings the doorbell, which the loop empties before it looks. */
        if (atomic_load(&machine->post_tail) == head)
            ring_doorbell(machine, true);
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
    /* Whoever pushed onto an empty stack rang; the loop takes all that has come since. */
    if (!head)
        ring_doorbell(machine, false);
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

uint64_t aiokvm_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void aiokvm_relax(uint64_t waited_ns)
{
    if (waited_ns < YIELD_AFTER_NS)
        __builtin_ia32_pause();
    else
        sched_yield();
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

int aiokvm_machine_answer(struct aiokvm_machine *machine)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    empty_doorbell(machine);
    atomic_store(&machine->watched, AIOKVM_WATCHES);
    machine->stats.rings++;
    /* Polling would have bridged a sleep as short as this: poll for longer. If not, for less. */
    uint32_t most = atomic_load(&machine->poll_ns);
    uint64_t now = aiokvm_now_ns();
    if (now - machine->last_ns < most)
        machine->window_ns = machine->window_ns ? machine->window_ns * 2 : most / 8;
    else
        machine->window_ns /= 2;
    if (machine->window_ns > most)
        machine->window_ns = most;
    machine->last_ns = now;
    return 0;
}

static bool has_news(struct aiokvm_machine *machine)
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

/* The last look before the doorbell is needed again; whether there was nothing. */
static bool stop_watching(struct aiokvm_machine *machine)
{
    atomic_store(&machine->watched, AIOKVM_ASLEEP);
    if (!has_news(machine))
        return true;
    atomic_store(&machine->watched, AIOKVM_WATCHES);
    return false;
}

static void served(struct aiokvm_machine *machine, uint64_t now)
{
    if (!machine->handed_ns)
        return;
    machine->stats.serving_ns += now - machine->handed_ns;
    machine->handed_ns = 0;
    /* The window begins when the guest has been answered. */
    machine->last_ns = now;
}

int aiokvm_machine_watch(struct aiokvm_machine *machine)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    machine->last_ns = aiokvm_now_ns();
    atomic_store(&machine->watched, AIOKVM_WATCHES);
    return 0;
}

int aiokvm_machine_unwatch(struct aiokvm_machine *machine)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    served(machine, aiokvm_now_ns());
    atomic_store(&machine->watched, AIOKVM_ASLEEP);
    if (has_news(machine))
        ring_doorbell(machine, false);
    return 0;
}

/* A guest that only posts waits for nobody, and runs faster if nobody looks at each post as it comes. */
static void nap(struct aiokvm_machine *machine)
{
    machine->posted = false;
    atomic_store(&machine->watched, AIOKVM_NAPS);
    if (!atomic_load(&machine->pending)) {
        struct pollfd doorbell = { .fd = machine->doorbell, .events = POLLIN };
        const struct timespec time = { .tv_nsec = NAP_NS };
        if (ppoll(&doorbell, 1, &time, NULL) > 0)
            empty_doorbell(machine);
    }
    atomic_store(&machine->watched, AIOKVM_WATCHES);
}

int aiokvm_serve(struct aiokvm_machine *const *machines, size_t count, uint64_t deadline_ns,
                 struct aiokvm_news *news, size_t max, size_t *which)
{
    const uint64_t start = aiokvm_now_ns();
    uint64_t now = start;
    for (size_t i = 0; i < count; i++) {
        struct aiokvm_machine *machine = machines[i];
        if (!machine->alive)
            return -EOWNERDEAD;
        served(machine, now);
    }
    if (!count || (deadline_ns && now >= deadline_ns)) {
        *which = count;
        return 0;
    }
    for (uint64_t waited = 0;; waited = 1, now = aiokvm_now_ns()) {
        for (size_t i = 0; i < count; i++) {
            size_t index = (*which + 1 + i) % count;
            struct aiokvm_machine *machine = machines[index];
            if (has_news(machine)) {
                int taken = aiokvm_machine_take(machine, news, max);
                if (taken > 0) {
                    machine->stats.poll_hits += waited;
                    machine->handed_ns = now;
                    machine->posted = true;
                    for (int j = 0; j < taken; j++)
                        if (news[j].state != AIOKVM_POSTED)
                            machine->posted = false;
                    if (!machine->posted)
                        machine->asked_ns = now;
                    *which = index;
                    return taken;
                }
            }
            if (machine->posted && count == 1 && now - machine->asked_ns > NAP_NS) {
                nap(machine);
                continue;
            }
            if (now - machine->last_ns >= machine->window_ns && stop_watching(machine)) {
                machine->stats.poll_misses++;
                *which = index;
                return 0;
            }
        }
        if (now >= deadline_ns) {
            *which = count;
            return 0;
        }
        aiokvm_relax(now - start);
    }
}
