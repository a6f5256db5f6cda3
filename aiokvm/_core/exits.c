#include "exits.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vcpu.h"

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
    pthread_rwlock_init(&machine->lock, NULL);
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
    }
    return munmap(machine, sizeof(*machine)) < 0 ? -errno : 0;
}

int aiokvm_machine_alive(const struct aiokvm_machine *machine)
{
    return machine->alive != 0;
}

int aiokvm_machine_doorbell(const struct aiokvm_machine *machine)
{
    return machine->doorbell;
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

bool aiokvm_machine_find(struct aiokvm_machine *machine, unsigned bus, uint64_t address,
                         struct aiokvm_region *found)
{
    bool claimed = false;
    pthread_rwlock_rdlock(&machine->lock);
    const struct aiokvm_table *table = &machine->tables[bus];
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (table->regions[middle].base <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low && address - table->regions[low - 1].base < table->regions[low - 1].size) {
        *found = table->regions[low - 1];
        claimed = true;
    }
    pthread_rwlock_unlock(&machine->lock);
    return claimed;
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
    if (!head) {
        uint64_t one = 1;
        ssize_t written = write(machine->doorbell, &one, sizeof(one));
        (void)written; /* an eventfd refuses only when it is about to overflow, and then it has been rung */
    }
}

static void take_pending(struct aiokvm_machine *machine)
{
    uint64_t rung;
    ssize_t got = read(machine->doorbell, &rung, sizeof(rung));
    (void)got; /* EAGAIN: not rung */
    struct aiokvm_vcpu *newest = atomic_exchange(&machine->pending, NULL);
    struct aiokvm_vcpu *oldest = NULL;
    while (newest) {
        struct aiokvm_vcpu *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    machine->taken = oldest;
}

int aiokvm_machine_take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max)
{
    if (!machine->alive)
        return -EOWNERDEAD;
    size_t count = 0;
    /* What an earlier call left over goes first: no vCPU overtakes another for ever. */
    if (!machine->taken)
        take_pending(machine);
    while (count < max && machine->taken) {
        struct aiokvm_vcpu *vcpu = machine->taken;
        machine->taken = vcpu->next;
        /* Cleared before the state is read: news from here on pushes the vCPU again. */
        atomic_store(&vcpu->queued, false);
        if (aiokvm_vcpu_news(vcpu, &news[count]))
            count++;
    }
    return (int)count;
}
