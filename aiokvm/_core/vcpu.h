/* The thread of a vCPU: KVM_RUN, kick, pause, park, stop. It never calls Python.
 *
 * The loop writes what it wants (want) and kicks; the thread answers by its state and by ringing the
 * doorbell. A kick is immediate_exit, which KVM_RUN reads on entry, and a signal, which ends a KVM_RUN
 * under way; the signal's handler does nothing. */
#ifndef AIOKVM_VCPU_H
#define AIOKVM_VCPU_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "exits.h"

enum { AIOKVM_WANT_PARKED, AIOKVM_WANT_RUNNING, AIOKVM_WANT_STOPPED, AIOKVM_WANT_MASK = 3 };

/* Exit reasons that are counted one by one. */
enum { AIOKVM_REASONS = 64 };

struct aiokvm_vcpu_stats {
    uint64_t exits;     /* returns from KVM_RUN with something to do */
    uint64_t unclaimed; /* accesses to addresses that nothing claims */
    uint64_t kicks;     /* returns from KVM_RUN because of a kick */
    uint64_t posted;    /* accesses that were queued for the loop, or answered by a latch */
    uint64_t guest_ns;  /* in KVM_RUN: the guest, and the kernel on its behalf */
    uint64_t wait_ns;   /* for the loop's replies */
    uint64_t poll_hits; /* replies that came while the thread polled */
    uint64_t reasons[AIOKVM_REASONS]; /* exits by exit_reason; the last counts all that are beyond */
};

struct aiokvm_vcpu {
    struct aiokvm_machine *machine;
    struct kvm_run *run; /* shared with the kernel; in AIOKVM_VCPU_EXIT the loop may write the data of a read */
    size_t run_size;
    int fd;
    uint32_t index;
    char name[16];

    _Atomic uint32_t want; /* the loop's: AIOKVM_WANT_* in the low bits, a count of the wishes above */
    _Atomic uint32_t wake; /* futex: counts changes that a waiting thread must look at */
    _Atomic uint32_t asleep; /* the thread's: it waits on the futex, or is about to */
    _Atomic uint32_t tid;  /* futex; the thread's: 0 before and after */
    /* AIOKVM_VCPU_* in the low half; in the high half the number of the newest news, by which a reply to an
     * older one is told. The thread's, but EXIT -> REPLIED is the loop's. */
    _Atomic uint64_t status;

    /* The mailbox. Written by the thread before it sets status, read by the loop after. */
    int32_t error; /* of KVM_RUN */
    uint32_t region;
    uint64_t offset;
    _Atomic uint32_t posted_before; /* the machine's post_head then: what had been posted goes before the news */

    _Atomic bool queued;      /* on the machine's pending stack */
    struct aiokvm_vcpu *next; /* of that stack: the pusher's, then the loop's */
    uint32_t taken_seq;       /* the loop's: of the news it took last */

    bool incomplete; /* the thread's: KVM has still to finish what the last exit began */
    pthread_t thread;
    char *stack;   /* the loop's: of the thread, with its guard in front */
    bool joinable; /* the loop's */
    uint32_t window_ns; /* the thread's: how long it polls for a reply now */
    _Atomic uint64_t exits, unclaimed, kicks, posted, guest_ns, wait_ns, poll_hits, reasons[AIOKVM_REASONS];
};

/* name: of the thread, at most 15 bytes. run: the mapping of the vCPU's kvm_run. NULL and *error on failure. */
struct aiokvm_vcpu *aiokvm_vcpu_new(struct aiokvm_machine *machine, uint32_t index, int fd, void *run,
                                    size_t run_size, const char *name, int *error);
/* The thread must have been joined, or never started. News of it that was not taken is dropped. */
void aiokvm_vcpu_free(struct aiokvm_vcpu *vcpu);
/* Creates the thread, once; it runs the guest as soon as aiokvm_vcpu_resume says so. */
int aiokvm_vcpu_start(struct aiokvm_vcpu *vcpu);
/* These return at once; the thread's answer is news. They may be repeated, and are safe in any state. A stop
 * is final: what is wanted later changes nothing. */
int aiokvm_vcpu_pause(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_resume(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_stop(struct aiokvm_vcpu *vcpu);
/* Makes the thread look at what is wanted; what is wanted stays. */
int aiokvm_vcpu_kick(struct aiokvm_vcpu *vcpu);
/* Waits for the end of a thread that has told AIOKVM_VCPU_STOPPED: a few instructions. -EBUSY before that. */
int aiokvm_vcpu_join(struct aiokvm_vcpu *vcpu);
/* The kernel's thread id; 0 if there is no thread. Waits until a new thread has begun. */
int aiokvm_vcpu_tid(struct aiokvm_vcpu *vcpu);
/* The loop: answers exit seq; value is what a read of one datum returns. 0 if nobody waits for it any more. */
int aiokvm_vcpu_reply(struct aiokvm_vcpu *vcpu, uint32_t seq, uint64_t value);
/* The same, leaving the data as it is: for writes, and for reads whose data was put into aiokvm_vcpu_data. */
int aiokvm_vcpu_skip(struct aiokvm_vcpu *vcpu, uint32_t seq);
/* The data of the port access or MMIO access that waits: size * count bytes. NULL in a child of fork. */
void *aiokvm_vcpu_data(struct aiokvm_vcpu *vcpu);
void aiokvm_vcpu_stats(const struct aiokvm_vcpu *vcpu, struct aiokvm_vcpu_stats *stats);

/* The loop: the news of a vCPU; false if it has been told already. */
bool aiokvm_vcpu_news(struct aiokvm_vcpu *vcpu, struct aiokvm_news *news);

#endif
