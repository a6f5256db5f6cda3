#define _GNU_SOURCE
#include "vcpu.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "ioctl.h"

/* A thread of ours needs little stack: KVM_RUN, a look-up, a futex. */
#ifdef __SANITIZE_THREAD__
#define STACK_SIZE (2048 * 1024) /* ThreadSanitizer keeps its own on it */
#else
#define STACK_SIZE (128 * 1024)
#endif
#define STACK_GUARD 4096

static int kick_signal;
static int kick_signal_error;
static pthread_once_t kick_signal_once = PTHREAD_ONCE_INIT;

static void on_kick(int signal)
{
    (void)signal;
}

/* A disposition belongs to the whole process, so take the last real-time signal that the host program has
 * left at its default: programs count theirs from SIGRTMIN up. */
static void choose_kick_signal(void)
{
    for (int number = SIGRTMAX; number >= SIGRTMIN; number--) {
        struct sigaction old;
        if (sigaction(number, NULL, &old) < 0 || old.sa_handler != SIG_DFL)
            continue;
        struct sigaction action = { .sa_handler = on_kick };
        sigfillset(&action.sa_mask);
        if (sigaction(number, &action, NULL) == 0) {
            kick_signal = number;
            return;
        }
    }
    kick_signal_error = EBUSY;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static uint64_t status(uint32_t seq, uint32_t state)
{
    return (uint64_t)seq << 32 | state;
}

static uint32_t status_seq(uint64_t status)
{
    return (uint32_t)(status >> 32);
}

static uint32_t status_state(uint64_t status)
{
    return (uint32_t)status;
}

static uint32_t wanted(struct aiokvm_vcpu *vcpu)
{
    return atomic_load(&vcpu->want) & AIOKVM_WANT_MASK;
}

/* ---- the thread ---- */

static void set_state(struct aiokvm_vcpu *vcpu, uint32_t state)
{
    atomic_store(&vcpu->status, status(status_seq(atomic_load(&vcpu->status)), state));
}

static void tell(struct aiokvm_vcpu *vcpu, uint32_t state)
{
    atomic_store(&vcpu->posted_before, atomic_load(&vcpu->machine->post_head));
    atomic_store(&vcpu->status, status(status_seq(atomic_load(&vcpu->status)) + 1, state));
    aiokvm_machine_tell(vcpu->machine, vcpu);
}

static void *io_data(struct aiokvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    if (run->exit_reason == KVM_EXIT_IO)
        return (char *)run + run->io.data_offset;
    return run->mmio.data;
}

static void add(_Atomic uint64_t *counter, uint64_t count)
{
    /* One writer each: readers may see it late, but never torn. */
    uint64_t old = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, old + count, memory_order_relaxed);
}

/* Sleeps until wake is no longer what it was. Whoever counts it up looks at asleep after that. */
static void sleep_while(struct aiokvm_vcpu *vcpu, uint32_t wake)
{
    atomic_store(&vcpu->asleep, 1);
    futex_wait(&vcpu->wake, wake);
    atomic_store(&vcpu->asleep, 0);
}

/* A reply often comes sooner than a sleep and a wake-up take. */
static void poll_while(struct aiokvm_vcpu *vcpu, uint32_t wake, uint64_t start_ns)
{
    uint64_t waited_ns = 0;
    while (atomic_load(&vcpu->wake) == wake && waited_ns < vcpu->window_ns) {
        aiokvm_relax(waited_ns);
        waited_ns = aiokvm_now_ns() - start_ns;
    }
}

/* After a wait for the loop: polls longer if that would have spared the sleep, less if it was in vain. */
static void adapt(struct aiokvm_vcpu *vcpu, uint64_t waited_ns)
{
    uint32_t most = atomic_load_explicit(&vcpu->machine->poll_ns, memory_order_relaxed);
    if (waited_ns <= vcpu->window_ns)
        add(&vcpu->poll_hits, 1);
    else if (waited_ns >= most)
        vcpu->window_ns /= 2;
    else
        vcpu->window_ns = vcpu->window_ns ? vcpu->window_ns * 2 : most / 8;
    if (vcpu->window_ns > most)
        vcpu->window_ns = most;
    add(&vcpu->wait_ns, waited_ns);
}

/* Hands the exit to the loop and waits for its reply; false if the thread is to stop instead. */
static bool ask_loop(struct aiokvm_vcpu *vcpu)
{
    uint64_t start_ns = aiokvm_now_ns();
    tell(vcpu, AIOKVM_VCPU_EXIT);
    for (bool polled = false;; polled = true) {
        uint32_t wake = atomic_load(&vcpu->wake);
        if (status_state(atomic_load(&vcpu->status)) == AIOKVM_VCPU_REPLIED) {
            set_state(vcpu, AIOKVM_VCPU_RUNNING);
            adapt(vcpu, aiokvm_now_ns() - start_ns);
            return true;
        }
        if (wanted(vcpu) == AIOKVM_WANT_STOPPED)
            return false;
        if (!polled && vcpu->window_ns)
            poll_while(vcpu, wake, start_ns);
        else
            sleep_while(vcpu, wake);
    }
}

/* A port or memory access; false if the thread is to stop. */
static bool access_bus(struct aiokvm_vcpu *vcpu, unsigned bus, uint64_t address, bool is_write, size_t size,
                       size_t count)
{
    struct aiokvm_region region;
    switch (aiokvm_machine_access(vcpu->machine, bus, address, is_write, size, count, io_data(vcpu), &region)) {
    case AIOKVM_DONE:
        add(&vcpu->posted, 1);
        return true;
    case AIOKVM_UNCLAIMED:
        /* Nothing drives the data lines: a PC's pull-ups read as ones. */
        if (!is_write)
            memset(io_data(vcpu), 0xff, size * count);
        add(&vcpu->unclaimed, 1);
        return true;
    default:
        if (region.id == AIOKVM_NO_REGION)
            add(&vcpu->unclaimed, 1);
        vcpu->region = region.id;
        vcpu->offset = address - region.base;
        return ask_loop(vcpu);
    }
}

static bool handle_exit(struct aiokvm_vcpu *vcpu, int error)
{
    struct kvm_run *run = vcpu->run;
    add(&vcpu->exits, 1);
    add(&vcpu->reasons[run->exit_reason < AIOKVM_REASONS ? run->exit_reason : AIOKVM_REASONS - 1], 1);
    vcpu->error = error;
    vcpu->incomplete = !error;
    if (!error && run->exit_reason == KVM_EXIT_IO)
        return access_bus(vcpu, AIOKVM_BUS_PIO, run->io.port, run->io.direction == KVM_EXIT_IO_OUT,
                          run->io.size, run->io.count);
    if (!error && run->exit_reason == KVM_EXIT_MMIO)
        return access_bus(vcpu, AIOKVM_BUS_MMIO, run->mmio.phys_addr, run->mmio.is_write, run->mmio.len, 1);
    return ask_loop(vcpu);
}

/* One KVM_RUN and what follows from it; false if the thread is to stop. */
static bool run_once(struct aiokvm_vcpu *vcpu)
{
    uint64_t start_ns = aiokvm_now_ns();
    long result = aiokvm_ioctl(vcpu->fd, KVM_RUN, NULL);
    add(&vcpu->guest_ns, aiokvm_now_ns() - start_ns);
    if (result == -EINTR || result == -EAGAIN) {
        /* EAGAIN: the INIT or SIPI that it waited for came. Either way KVM finished the last exit first. */
        vcpu->incomplete = false;
        add(&vcpu->kicks, 1);
        return true;
    }
    return handle_exit(vcpu, result < 0 ? (int)-result : 0);
}

/* Has KVM finish the access that the last exit began (which may begin another), so that the registers are
 * those of an instruction boundary; false if the thread is to stop. */
static bool complete(struct aiokvm_vcpu *vcpu)
{
    while (vcpu->incomplete) {
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        if (!run_once(vcpu))
            return false;
    }
    return true;
}

static bool park(struct aiokvm_vcpu *vcpu)
{
    if (!complete(vcpu))
        return false;
    uint32_t want = atomic_load(&vcpu->want);
    if ((want & AIOKVM_WANT_MASK) != AIOKVM_WANT_PARKED)
        return true;
    tell(vcpu, AIOKVM_VCPU_PARKED);
    /* A resume and a pause that both came before this thread woke differ from the first pause by their
     * count, and the second pause is answered too. */
    for (uint32_t wake = atomic_load(&vcpu->wake); atomic_load(&vcpu->want) == want;
         wake = atomic_load(&vcpu->wake))
        sleep_while(vcpu, wake);
    set_state(vcpu, AIOKVM_VCPU_RUNNING);
    return true;
}

static void *vcpu_main(void *argument)
{
    struct aiokvm_vcpu *vcpu = argument;
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, kick_signal);
    pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
    pthread_setname_np(pthread_self(), vcpu->name);
    atomic_store(&vcpu->tid, (uint32_t)syscall(SYS_gettid));
    futex_wake(&vcpu->tid);

    for (bool run = true; run;) {
        /* Before want is read: a kick that comes later sets it again, and KVM_RUN returns at once. */
        __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        switch (wanted(vcpu)) {
        case AIOKVM_WANT_RUNNING:
            run = run_once(vcpu);
            break;
        case AIOKVM_WANT_PARKED:
            run = park(vcpu);
            break;
        default:
            run = false;
        }
    }
    tell(vcpu, AIOKVM_VCPU_STOPPED);
    return NULL;
}

/* ---- the loop ---- */

static void wake(struct aiokvm_vcpu *vcpu)
{
    atomic_fetch_add(&vcpu->wake, 1);
    if (atomic_load(&vcpu->asleep))
        futex_wake(&vcpu->wake);
}

/* Our own, for the C library keeps the stacks of hundreds of threads that have ended. NULL: errno says why. */
static char *new_stack(void)
{
    char *stack = mmap(NULL, STACK_GUARD + STACK_SIZE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return NULL;
    if (mprotect(stack + STACK_GUARD, STACK_SIZE, PROT_READ | PROT_WRITE) == 0)
        return stack;
    int error = errno;
    munmap(stack, STACK_GUARD + STACK_SIZE);
    errno = error;
    return NULL;
}

static void free_stack(struct aiokvm_vcpu *vcpu)
{
    if (vcpu->stack)
        munmap(vcpu->stack, STACK_GUARD + STACK_SIZE);
    vcpu->stack = NULL;
}

struct aiokvm_vcpu *aiokvm_vcpu_new(struct aiokvm_machine *machine, uint32_t index, int fd, void *run,
                                    size_t run_size, const char *name, int *error)
{
    struct aiokvm_vcpu *vcpu = machine->alive ? calloc(1, sizeof(*vcpu)) : NULL;
    if (!vcpu) {
        *error = machine->alive ? ENOMEM : EOWNERDEAD;
        return NULL;
    }
    vcpu->machine = machine;
    vcpu->window_ns = atomic_load(&machine->poll_ns);
    vcpu->index = index;
    vcpu->fd = fd;
    vcpu->run = run;
    vcpu->run_size = run_size;
    strncpy(vcpu->name, name, sizeof(vcpu->name) - 1);
    *error = 0;
    return vcpu;
}

void aiokvm_vcpu_free(struct aiokvm_vcpu *vcpu)
{
    aiokvm_machine_forget(vcpu->machine, vcpu);
    free_stack(vcpu); /* a child of fork has a copy */
    free(vcpu);
}

int aiokvm_vcpu_start(struct aiokvm_vcpu *vcpu)
{
    if (!vcpu->machine->alive)
        return -EOWNERDEAD;
    if (status_state(atomic_load(&vcpu->status)) != AIOKVM_VCPU_NEW)
        return -EALREADY;
    pthread_once(&kick_signal_once, choose_kick_signal);
    if (kick_signal_error)
        return -kick_signal_error;

    vcpu->stack = new_stack();
    if (!vcpu->stack)
        return -errno;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, vcpu->stack + STACK_GUARD, STACK_SIZE);
    /* The thread inherits the mask: the host program's signals are for the host program's threads. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    set_state(vcpu, AIOKVM_VCPU_RUNNING);
    int error = pthread_create(&vcpu->thread, &attributes, vcpu_main, vcpu);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    if (error) {
        set_state(vcpu, AIOKVM_VCPU_NEW);
        free_stack(vcpu);
        return -error;
    }
    vcpu->joinable = true;
    return 0;
}

int aiokvm_vcpu_kick(struct aiokvm_vcpu *vcpu)
{
    if (!vcpu->machine->alive)
        return -EOWNERDEAD;
    if (!vcpu->joinable)
        return 0;
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    wake(vcpu);
    pthread_kill(vcpu->thread, kick_signal);
    return 0;
}

static int want(struct aiokvm_vcpu *vcpu, uint32_t what)
{
    if (!vcpu->machine->alive)
        return -EOWNERDEAD;
    uint32_t count = (atomic_load(&vcpu->want) & ~AIOKVM_WANT_MASK) + AIOKVM_WANT_MASK + 1;
    if (wanted(vcpu) != AIOKVM_WANT_STOPPED)
        atomic_store(&vcpu->want, count | what);
    return aiokvm_vcpu_kick(vcpu);
}

int aiokvm_vcpu_pause(struct aiokvm_vcpu *vcpu)
{
    return want(vcpu, AIOKVM_WANT_PARKED);
}

int aiokvm_vcpu_resume(struct aiokvm_vcpu *vcpu)
{
    return want(vcpu, AIOKVM_WANT_RUNNING);
}

int aiokvm_vcpu_stop(struct aiokvm_vcpu *vcpu)
{
    return want(vcpu, AIOKVM_WANT_STOPPED);
}

int aiokvm_vcpu_join(struct aiokvm_vcpu *vcpu)
{
    if (!vcpu->machine->alive)
        return -EOWNERDEAD;
    if (!vcpu->joinable)
        return 0;
    if (status_state(atomic_load(&vcpu->status)) != AIOKVM_VCPU_STOPPED)
        return -EBUSY;
    pthread_join(vcpu->thread, NULL);
    free_stack(vcpu);
    vcpu->joinable = false;
    atomic_store(&vcpu->tid, 0);
    return 0;
}

int aiokvm_vcpu_tid(struct aiokvm_vcpu *vcpu)
{
    if (!vcpu->machine->alive)
        return 0;
    while (vcpu->joinable && !atomic_load(&vcpu->tid))
        futex_wait(&vcpu->tid, 0);
    return (int)atomic_load(&vcpu->tid);
}

int aiokvm_vcpu_skip(struct aiokvm_vcpu *vcpu, uint32_t seq)
{
    if (!vcpu->machine->alive)
        return -EOWNERDEAD;
    /* A thread that stops meanwhile says so by another status, and that must stand. */
    uint64_t waiting = status(seq, AIOKVM_VCPU_EXIT);
    if (!atomic_compare_exchange_strong(&vcpu->status, &waiting, status(seq, AIOKVM_VCPU_REPLIED)))
        return 0;
    wake(vcpu);
    return 1;
}

int aiokvm_vcpu_reply(struct aiokvm_vcpu *vcpu, uint32_t seq, uint64_t value)
{
    if (!vcpu->machine->alive)
        return -EOWNERDEAD;
    if (atomic_load(&vcpu->status) != status(seq, AIOKVM_VCPU_EXIT))
        return 0;
    struct kvm_run *run = vcpu->run;
    size_t size = run->exit_reason == KVM_EXIT_IO ? run->io.size : run->mmio.len;
    memcpy(io_data(vcpu), &value, size < sizeof(value) ? size : sizeof(value));
    return aiokvm_vcpu_skip(vcpu, seq);
}

void *aiokvm_vcpu_data(struct aiokvm_vcpu *vcpu)
{
    return vcpu->machine->alive ? io_data(vcpu) : NULL;
}

void aiokvm_vcpu_stats(const struct aiokvm_vcpu *vcpu, struct aiokvm_vcpu_stats *stats)
{
    stats->exits = atomic_load_explicit(&vcpu->exits, memory_order_relaxed);
    stats->unclaimed = atomic_load_explicit(&vcpu->unclaimed, memory_order_relaxed);
    stats->kicks = atomic_load_explicit(&vcpu->kicks, memory_order_relaxed);
    stats->posted = atomic_load_explicit(&vcpu->posted, memory_order_relaxed);
    stats->guest_ns = atomic_load_explicit(&vcpu->guest_ns, memory_order_relaxed);
    stats->wait_ns = atomic_load_explicit(&vcpu->wait_ns, memory_order_relaxed);
    stats->poll_hits = atomic_load_explicit(&vcpu->poll_hits, memory_order_relaxed);
    for (size_t i = 0; i < AIOKVM_REASONS; i++)
        stats->reasons[i] = atomic_load_explicit(&vcpu->reasons[i], memory_order_relaxed);
}

bool aiokvm_vcpu_news(struct aiokvm_vcpu *vcpu, struct aiokvm_news *news)
{
    uint64_t now = atomic_load(&vcpu->status);
    uint32_t state = status_state(now), seq = status_seq(now);
    if (seq == vcpu->taken_seq)
        return false;
    /* It ran on after it had been queued, and posted more than the call that asks here takes. */
    if ((int32_t)(atomic_load(&vcpu->machine->post_tail) - atomic_load(&vcpu->posted_before)) < 0) {
        aiokvm_machine_tell(vcpu->machine, vcpu);
        return false;
    }
    vcpu->taken_seq = seq;
    struct kvm_run *run = vcpu->run;
    *news = (struct aiokvm_news){ .vcpu = vcpu->index, .state = state, .seq = seq };
    if (state != AIOKVM_VCPU_EXIT)
        return true;
    news->error = vcpu->error;
    news->reason = run->exit_reason;
    if (vcpu->error)
        return true;
    if (run->exit_reason == KVM_EXIT_IO) {
        news->bus = AIOKVM_BUS_PIO;
        news->size = run->io.size;
        news->count = run->io.count;
        news->is_write = run->io.direction == KVM_EXIT_IO_OUT;
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
        news->bus = AIOKVM_BUS_MMIO;
        news->size = run->mmio.len;
        news->count = 1;
        news->is_write = run->mmio.is_write;
    } else {
        return true;
    }
    news->region = vcpu->region;
    news->offset = vcpu->offset;
    if (news->is_write && news->count == 1)
        memcpy(&news->value, io_data(vcpu), news->size < 8 ? news->size : 8);
    return true;
}
