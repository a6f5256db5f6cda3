/* One machine: which addresses are claimed, and what its vCPUs have to tell the loop.
 *
 * Two sides use it. "The loop" is whichever single thread runs the machine's event loop; "a vCPU" is one of
 * the threads of vcpu.c. Every field says which side owns it. */
#ifndef AIOKVM_EXITS_H
#define AIOKVM_EXITS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { AIOKVM_BUS_PIO, AIOKVM_BUS_MMIO, AIOKVM_BUSES };

/* A claimed range of addresses. Ranges of a bus do not overlap; ids are the loop side's. */
struct aiokvm_region {
    uint64_t base;
    uint64_t size;
    uint32_t id;
};

/* What a vCPU is doing. */
enum {
    AIOKVM_VCPU_NEW,     /* no thread yet */
    AIOKVM_VCPU_RUNNING, /* in KVM_RUN, or on its way there */
    AIOKVM_VCPU_EXIT,    /* waits for the reply to an exit */
    AIOKVM_VCPU_REPLIED, /* the reply is there; the vCPU has not seen it yet */
    AIOKVM_VCPU_PARKED,  /* paused: registers may be read and written */
    AIOKVM_VCPU_STOPPED, /* the thread has ended */
};

/* What one vCPU has to tell: its new state and, for an exit, what the guest did.
 * reason is KVM's exit_reason and error the errno of a KVM_RUN that failed (0: it did not). region, offset,
 * size (bytes), count, is_write and value (of a write with count 1) belong to KVM_EXIT_IO and KVM_EXIT_MMIO. */
struct aiokvm_news {
    uint32_t vcpu;
    uint32_t state;
    uint32_t seq;
    int32_t error;
    uint32_t reason;
    uint32_t region;
    uint64_t offset;
    uint64_t value;
    uint32_t size;
    uint32_t count;
    uint32_t is_write;
};

struct aiokvm_vcpu;

struct aiokvm_table {
    struct aiokvm_region *regions; /* sorted by base */
    size_t count;
};

struct aiokvm_machine {
    /* 1 as long as this is the process that made the machine: a fork wipes the page (MADV_WIPEONFORK),
     * and a child sees 0 without a system call. */
    uint32_t alive;
    int doorbell;                         /* eventfd; rung by vCPUs, emptied by the loop */
    pthread_rwlock_t lock;                /* of tables: held by a vCPU for one look-up, by the loop for one swap */
    struct aiokvm_table tables[AIOKVM_BUSES];
    _Atomic(struct aiokvm_vcpu *) pending; /* stack of vCPUs with news: pushed by vCPUs, taken whole by the loop */
    struct aiokvm_vcpu *taken;             /* the loop's: taken from pending, oldest first, not yet handed on */
};

/* Returns NULL and sets *error (an errno). */
struct aiokvm_machine *aiokvm_machine_new(int *error);
/* All vCPUs must have been freed. */
int aiokvm_machine_free(struct aiokvm_machine *machine);
/* Whether this process made the machine: 0 in a child of fork. */
int aiokvm_machine_alive(const struct aiokvm_machine *machine);
int aiokvm_machine_doorbell(const struct aiokvm_machine *machine);
/* Replaces the claimed ranges of a bus; they must be sorted by base. */
int aiokvm_machine_publish(struct aiokvm_machine *machine, unsigned bus,
                           const struct aiokvm_region *regions, size_t count);
/* The loop: empties the doorbell and writes the news of at most max vCPUs, oldest first; returns how many.
 * A full array may mean that there are more: call again. */
int aiokvm_machine_take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max);

/* A vCPU: the claimed range at an address; false if there is none. */
bool aiokvm_machine_find(struct aiokvm_machine *machine, unsigned bus, uint64_t address,
                         struct aiokvm_region *found);
/* A vCPU: it has news. */
void aiokvm_machine_tell(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu);

#endif
