#define _GNU_SOURCE
#include "fake_kvm.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "memory.h"

/* Far above any real descriptor. */
enum { FIRST_FD = 1 << 20, FAKES = 64 };
/* A page for kvm_run and one for the data of port accesses, as KVM has it. */
enum { PAGE = 4096, RUN_SIZE = 2 * PAGE };

static _Atomic(struct fake *) fakes[FAKES];

int __wrap_ioctl(int fd, unsigned long request, ...);
int __real_ioctl(int fd, unsigned long request, void *argument);

static void semaphore_wait(sem_t *semaphore)
{
    while (sem_wait(semaphore) < 0)
        CHECK_EQ(errno, EINTR);
}

void fake_gate_init(struct fake_gate *gate)
{
    sem_init(&gate->reached, 0, 0);
    sem_init(&gate->open, 0, 0);
}

void fake_gate_wait(struct fake_gate *gate)
{
    semaphore_wait(&gate->reached);
}

void fake_gate_open(struct fake_gate *gate)
{
    sem_post(&gate->open);
}

static void pass(_Atomic(struct fake_gate *) *slot)
{
    struct fake_gate *gate = atomic_exchange(slot, NULL);
    if (!gate)
        return;
    sem_post(&gate->reached);
    semaphore_wait(&gate->open);
}

struct fake *fake_new(const struct fake_step *script, size_t length)
{
    struct fake *fake = calloc(1, sizeof(*fake));
    CHECK(fake);
    /* Mapped as the real one is: a child of fork must not touch it. */
    int memfd = memfd_create("kvm_run", MFD_CLOEXEC);
    CHECK(memfd >= 0 && ftruncate(memfd, RUN_SIZE) == 0);
    int error;
    fake->run_size = RUN_SIZE;
    fake->run = aiokvm_map(memfd, RUN_SIZE, 0, &error);
    CHECK(fake->run);
    close(memfd);
    fake->script = script;
    fake->length = length;
    fake->interrupt = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(fake->interrupt >= 0);
    for (int i = 0; i < FAKES; i++) {
        struct fake *none = NULL;
        fake->fd = FIRST_FD + i;
        if (atomic_compare_exchange_strong(&fakes[i], &none, fake))
            return fake;
    }
    check_failed(__FILE__, __LINE__, "more than %d fakes", FAKES);
}

void fake_free(struct fake *fake)
{
    atomic_store(&fakes[fake->fd - FIRST_FD], NULL);
    close(fake->interrupt);
    aiokvm_unmap(fake->run, fake->run_size);
    free(fake);
}

void fake_interrupt(struct fake *fake)
{
    eventfd_write(fake->interrupt, 1);
}

static uint8_t *step_data(struct fake *fake, const struct fake_step *step)
{
    return step->op == FAKE_IO ? (uint8_t *)fake->run + PAGE : fake->run->mmio.data;
}

static size_t step_size(const struct fake_step *step)
{
    return (size_t)step->size * (step->count ? step->count : 1);
}

static void finish(struct fake *fake)
{
    const struct fake_step *step = &fake->step;
    const uint8_t *data = step_data(fake, step);
    fake->pending = false;
    if (fake->finished)
        fake->finished(fake, step, data);
    else if ((step->op == FAKE_IO || step->op == FAKE_MMIO) && !step->is_write) {
        if (step->count > 1)
            memcpy(fake->string, data, step_size(step));
        else if (fake->read_count < LENGTH(fake->reads))
            memcpy(&fake->reads[fake->read_count++], data, step->size);
    }
    atomic_fetch_add(&fake->done, 1);
}

static void next_step(struct fake *fake, struct fake_step *step)
{
    if (fake->next)
        fake->next(fake, step);
    else
        *step = fake->at < fake->length ? fake->script[fake->at] : (struct fake_step){ .op = FAKE_HALT };
}

static int fail(int error)
{
    errno = error;
    return -1;
}

static int report(struct fake *fake, const struct fake_step *step)
{
    struct kvm_run *run = fake->run;
    fake->at++;
    if (step->op == FAKE_ERROR)
        return fail(step->error);
    fake->step = *step;
    fake->pending = true;
    /* Nothing of the last exit stays behind for anyone to rely on. */
    memset(&run->io, 0xa5, sizeof(run->padding));
    if (step->op == FAKE_IO) {
        run->exit_reason = KVM_EXIT_IO;
        run->io.direction = step->is_write ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
        run->io.size = step->size;
        run->io.port = (uint16_t)step->address;
        run->io.count = step->count ? step->count : 1;
        run->io.data_offset = PAGE;
    } else if (step->op == FAKE_MMIO) {
        run->exit_reason = KVM_EXIT_MMIO;
        run->mmio.phys_addr = step->address;
        run->mmio.len = step->size;
        run->mmio.is_write = step->is_write;
    } else {
        run->exit_reason = step->reason;
        return 0;
    }
    uint8_t *data = step_data(fake, step);
    memset(data, 0x5a, step_size(step));
    if (step->is_write)
        memcpy(data, step->count > 1 ? step->bytes : (const uint8_t *)&step->value, step_size(step));
    return 0;
}

static int interrupted(struct fake *fake)
{
    fake->run->exit_reason = KVM_EXIT_INTR;
    return fail(EINTR);
}

/* Whether one of the signals that the thread listens to is pending. */
static bool signal_pending(const sigset_t *mask)
{
    sigset_t pending;
    sigpending(&pending);
    for (int number = 1; number <= SIGRTMAX; number++)
        if (sigismember(&pending, number) == 1 && sigismember(mask, number) == 0)
            return true;
    return false;
}

static int run_guest(struct fake *fake, const sigset_t *mask)
{
    for (;;) {
        if (signal_pending(mask))
            return interrupted(fake);
        struct fake_step step = { 0 };
        next_step(fake, &step);
        if (step.op == FAKE_SPIN) {
            while (!signal_pending(mask))
                ;
            return interrupted(fake);
        }
        if (step.op != FAKE_HALT && step.op != FAKE_SIPI)
            return report(fake, &step);
        struct pollfd interrupt = { .fd = fake->interrupt, .events = POLLIN };
        atomic_fetch_add(&fake->asleep, 1);
        if (ppoll(&interrupt, 1, NULL, mask) < 0)
            return interrupted(fake);
        eventfd_t count;
        eventfd_read(fake->interrupt, &count);
        fake->at++;
        if (step.op == FAKE_SIPI)
            return fail(EAGAIN);
    }
}

static int run(struct fake *fake, const sigset_t *mask)
{
    if (fake->pending) {
        bool and_next = fake->step.and_next;
        finish(fake);
        if (and_next) {
            struct fake_step step = { 0 };
            next_step(fake, &step);
            return report(fake, &step);
        }
    }
    if (__atomic_load_n(&fake->run->immediate_exit, __ATOMIC_SEQ_CST))
        return fail(EINTR);
    pass(&fake->window);
    atomic_fetch_add(&fake->entries, 1);
    return run_guest(fake, mask);
}

static atomic_ulong counted;
static atomic_uint count;

void fake_count(unsigned long request)
{
    atomic_store(&counted, request);
    atomic_store(&count, 0);
}

uint32_t fake_counted(void)
{
    return atomic_load(&count);
}

int __wrap_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == atomic_load(&counted))
        atomic_fetch_add(&count, 1);
    if (fd < FIRST_FD || fd >= FIRST_FD + FAKES)
        return __real_ioctl(fd, request, argument);
    struct fake *fake = atomic_load(&fakes[fd - FIRST_FD]);
    if (!fake || request != KVM_RUN)
        return fail(fake ? ENOTTY : EBADF);
    pass(&fake->before);
    atomic_fetch_add(&fake->calls, 1);
    sigset_t all, mask;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &mask);
    int result = run(fake, &mask), error = errno;
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    errno = error;
    return result;
}
