/* A vCPU without KVM: the linker sends ioctl here (--wrap=ioctl), and a KVM_RUN of a fake's descriptor plays
 * the fake's script.
 *
 * As in the kernel: what the last exit began is finished first; then immediate_exit is read; then the guest
 * runs. Signals are blocked from the call to its return, as if a handler could not run before then, and a
 * guest that runs or sleeps is ended by one that is pending. */
#ifndef AIOKVM_FAKE_KVM_H
#define AIOKVM_FAKE_KVM_H

#include <linux/kvm.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum fake_op {
    FAKE_HALT,  /* the guest sleeps until fake_interrupt; what follows the end of a script, too */
    FAKE_SPIN,  /* the guest runs and never exits */
    FAKE_SIPI,  /* the vCPU waits for its SIPI, which is fake_interrupt: EAGAIN */
    FAKE_ERROR, /* KVM_RUN fails */
    FAKE_IO,
    FAKE_MMIO,
    FAKE_EXIT, /* any other exit_reason */
};

struct fake_step {
    enum fake_op op;
    bool is_write;
    bool and_next; /* the next step is the rest of this one: the exit that finishing this one ends in */
    uint8_t size;
    uint32_t count; /* of an FAKE_IO; 0 is 1 */
    uint64_t address;
    uint64_t value;       /* what a write writes, count 1 */
    const uint8_t *bytes; /* what a write writes, count > 1 */
    uint32_t reason;      /* of a FAKE_EXIT */
    int error;            /* of a FAKE_ERROR */
};

#define IN(port, width) { .op = FAKE_IO, .address = (port), .size = (width) }
#define OUT(port, width, datum) \
    { .op = FAKE_IO, .is_write = true, .address = (port), .size = (width), .value = (datum) }
#define LOAD(gpa, width) { .op = FAKE_MMIO, .address = (gpa), .size = (width) }
#define STORE(gpa, width, datum) \
    { .op = FAKE_MMIO, .is_write = true, .address = (gpa), .size = (width), .value = (datum) }

/* A point that a vCPU does not pass before the test has been there. */
struct fake_gate {
    sem_t reached, open;
};

struct fake {
    int fd;
    struct kvm_run *run;
    size_t run_size;

    /* Either a script, or a function that writes the next step and, if it is not NULL, one that is told what
     * a finished step read (or wrote). Both are called by the vCPU. */
    const struct fake_step *script;
    size_t length, at;
    void (*next)(struct fake *fake, struct fake_step *step);
    void (*finished)(struct fake *fake, const struct fake_step *step, const uint8_t *data);
    void *context;

    struct fake_step step; /* the last one whose exit has been reported */
    bool pending;          /* that exit is not finished */
    int interrupt;         /* eventfd */

    /* Passed once, if set: before the kernel is entered; after immediate_exit was read as 0. */
    _Atomic(struct fake_gate *) before, window;

    _Atomic uint32_t calls;    /* of KVM_RUN */
    _Atomic uint32_t entries;  /* into the guest: past immediate_exit */
    _Atomic uint32_t asleep;   /* halts begun */
    _Atomic uint32_t done;     /* exits finished */
    uint64_t reads[32];        /* what finished reads gave, in order */
    size_t read_count;
    uint8_t string[4096]; /* what the last finished read of several data gave */
};

struct fake *fake_new(const struct fake_step *script, size_t length);
void fake_free(struct fake *fake);
void fake_interrupt(struct fake *fake);

void fake_gate_init(struct fake_gate *gate);
/* The test: waits until a vCPU stands at the gate. */
void fake_gate_wait(struct fake_gate *gate);
void fake_gate_open(struct fake_gate *gate);

/* Have all ioctls of this kind counted from now on, of whatever descriptor; and how many there were. */
void fake_count(unsigned long request);
uint32_t fake_counted(void);

#endif
