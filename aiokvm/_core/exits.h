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

/* The offsets, in bytes, that may be posted or latched: the registers of a small device. */
enum { AIOKVM_FAST_OFFSETS = 8 };
/* Of a latch's word: the low byte is what a read gives. */
#define AIOKVM_LATCHED 0x100u
/* Of a region's posted: all that is written there, of any size. */
#define AIOKVM_POSTED_ALL 0x80000000u

/* In the place of a region's id: nothing claims the address, which stands in the place of the offset. */
#define AIOKVM_NO_REGION 0xffffffffu

/* A claimed range of addresses. Ranges of a bus do not overlap; ids are the loop side's.
 *
 * posted has a bit for each of the first offsets: a byte that the guest writes there is queued for the loop,
 * and the vCPU runs on. latch, if there is one, has a word for each of them: a byte that the guest reads
 * there comes from it, without the loop, while AIOKVM_LATCHED is set.
 *
 * status, if there is one, is a word of events that other threads set (notify.h): 4 bytes that the guest reads at
 * status_offset are it, and bits that it writes with 4 bytes at clear_offset are cleared, without the loop. */
struct aiokvm_region {
    uint64_t base;
    uint64_t size;
    uint32_t id;
    uint32_t posted;
    uint32_t *latch;
    uint32_t *status;
    uint32_t status_offset;
    uint32_t clear_offset;
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

/* Of watched: how much the loop sees by itself. */
enum {
    AIOKVM_ASLEEP,  /* nothing: whatever comes rings */
    AIOKVM_WATCHES, /* everything */
    AIOKVM_NAPS,    /* posts, in a moment; what a vCPU waits for rings */
};

/* In news, in the place of a state: what was written to a posted offset, in the guest's order. */
enum { AIOKVM_POSTED = 0x100 };

/* What one vCPU has to tell: its new state and, for an exit, what the guest did.
 * reason is KVM's exit_reason and error the errno of a KVM_RUN that failed (0: it did not). region, offset,
 * size (bytes), count, is_write and value (of a write with count 1) belong to KVM_EXIT_IO and KVM_EXIT_MMIO.
 * AIOKVM_POSTED has no vCPU: bus, region and offset were written count times, with size bytes each from the
 * machine's posted_bytes + value on, which stay until the next call. */
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
    uint32_t bus;
};

struct aiokvm_vcpu;

struct aiokvm_table {
    struct aiokvm_region *regions; /* sorted by base */
    size_t count;
};

/* A posted write. */
struct aiokvm_post {
    uint64_t offset;
    uint64_t value;
    uint32_t region;
    uint8_t bus;
    uint8_t size;
};

/* A power of two. What a guest can write while the loop is busy elsewhere; then it waits for the loop. */
enum { AIOKVM_POSTS = 4096 };

struct aiokvm_machine_stats {
    uint64_t serving_ns; /* from when news was handed over until the loop asked for more */
    uint64_t poll_hits;  /* news that came while the loop polled */
    uint64_t poll_misses;
    uint64_t rings; /* of the doorbell that the loop answered */
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

    /* Polling. The loop looks by itself and needs no doorbell while watched is set: the loop's, read by vCPUs
     * after they have left news. */
    _Atomic uint32_t watched;
    _Atomic uint32_t ask_unclaimed; /* the loop's: accesses that no region claims are its, too */
    _Atomic uint32_t poll_ns; /* the loop's: how long at most either side polls for the other; 0: not at all */
    uint32_t window_ns;       /* the loop's: how long it polls now */
    uint64_t last_ns;         /* the loop's: when it had served what came last */
    uint64_t asked_ns;        /* the loop's: when it last took an exit, for whose answer a vCPU waits */
    bool posted;              /* the loop's: what it took last were posts */
    uint64_t handed_ns;       /* the loop's: when it was handed news that it is serving; 0: it is not */
    struct aiokvm_machine_stats stats; /* the loop's */

    /* The ring of posted writes. One for all vCPUs: what the guest has ordered among them stays ordered. */
    pthread_mutex_t post_lock;    /* vCPUs among themselves */
    _Atomic uint32_t post_head;   /* the next to be written; vCPUs' */
    _Atomic uint32_t post_tail;   /* the next to be read; the loop's */
    struct aiokvm_post posts[AIOKVM_POSTS];
    uint8_t posted_bytes[AIOKVM_POSTS * 8]; /* the loop's */
};

/* Returns NULL and sets *error (an errno). */
struct aiokvm_machine *aiokvm_machine_new(int *error);
/* All vCPUs must have been freed. */
int aiokvm_machine_free(struct aiokvm_machine *machine);
/* Whether this process made the machine: 0 in a child of fork. */
int aiokvm_machine_alive(const struct aiokvm_machine *machine);
/* -EOWNERDEAD in a child of fork, as from all that returns a negative errno. */
int aiokvm_machine_doorbell(const struct aiokvm_machine *machine);
/* Replaces the claimed ranges of a bus; they must be sorted by base. */
int aiokvm_machine_publish(struct aiokvm_machine *machine, unsigned bus,
                           const struct aiokvm_region *regions, size_t count);
/* The loop: the doorbell was rung. Empties it; from here on the machine is watched, and has to be served. */
int aiokvm_machine_answer(struct aiokvm_machine *machine);
/* Whether accesses that no region claims are handed to the loop as exits of AIOKVM_NO_REGION. */
int aiokvm_machine_ask_unclaimed(struct aiokvm_machine *machine, int ask);
/* The loop: it looks by itself from here on, as after an answer, though nothing has rung. */
int aiokvm_machine_watch(struct aiokvm_machine *machine);
/* The loop: it does not look by itself any more. If there is news, the doorbell is rung. */
int aiokvm_machine_unwatch(struct aiokvm_machine *machine);
/* How long, in nanoseconds, either side polls for the other before it sleeps. */
int aiokvm_machine_set_poll(struct aiokvm_machine *machine, uint32_t ns);
int aiokvm_machine_get_stats(const struct aiokvm_machine *machine, struct aiokvm_machine_stats *stats);
/* The loop: writes at most max news, oldest first; returns how many. */
int aiokvm_machine_take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max);
/* The loop: takes the news of one of the count machines that are watched, beginning behind *which, and waits
 * for it until one's window is over, or deadline_ns has come.
 * Returns how many news there are of machine *which. 0: it is no longer watched, since its window is over; its
 * doorbell will ring. *which is count if the deadline came first, and nothing has been looked at if it had come
 * already; deadline_ns 0 is one look, whatever the time. */
int aiokvm_serve(struct aiokvm_machine *const *machines, size_t count, uint64_t deadline_ns,
                 struct aiokvm_news *news, size_t max, size_t *which);
/* CLOCK_MONOTONIC. */
uint64_t aiokvm_now_ns(void);
/* Between two looks of one who has polled for so long: lets the other side run if it waits for this CPU. */
void aiokvm_relax(uint64_t waited_ns);

/* The loop: what AIOKVM_POSTED news point into. */
const uint8_t *aiokvm_machine_posted(const struct aiokvm_machine *machine);
/* The loop: what the guest reads at an offset of a latch from now on; below 0: it asks the loop. */
void aiokvm_latch_set(uint32_t *latch, unsigned offset, int value);

/* A vCPU: an access of size bytes, count times, to data. */
enum aiokvm_access {
    AIOKVM_UNCLAIMED, /* nothing is there */
    AIOKVM_DONE,      /* it was posted, or answered by the latch or the status */
    AIOKVM_ASK,       /* *found is for the loop */
};
enum aiokvm_access aiokvm_machine_access(struct aiokvm_machine *machine, unsigned bus, uint64_t address,
                                         bool is_write, size_t size, size_t count, uint8_t *data,
                                         struct aiokvm_region *found);
/* A vCPU: it has news. */
void aiokvm_machine_tell(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu);
/* The loop: drops the news of a vCPU whose thread has ended. */
void aiokvm_machine_forget(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu);

#endif
