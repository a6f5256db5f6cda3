/* notify.c, and what exits.c does with a word of events: any thread sets bits, vCPUs read and clear them. */
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "guest.h"
#include "notify.h"

enum { GPA = 0xd0000000, STATUS = 0x60, CLEAR = 0x64 };

static struct aiokvm_region region_of(uint32_t *word)
{
    return (struct aiokvm_region){
        .base = GPA, .size = 0x1000, .id = 3, .status = word, .status_offset = STATUS, .clear_offset = CLEAR
    };
}

static enum aiokvm_access touch(struct aiokvm_machine *machine, uint64_t offset, bool is_write, size_t size,
                                uint64_t *value)
{
    struct aiokvm_region found;
    uint8_t data[8];
    memcpy(data, value, sizeof(data));
    enum aiokvm_access result =
        aiokvm_machine_access(machine, AIOKVM_BUS_MMIO, GPA + offset, is_write, size, 1, data, &found);
    memcpy(value, data, sizeof(data));
    return result;
}

TEST(notifying_sets_bits_and_signals_the_eventfd)
{
    uint32_t word = 0;
    struct aiokvm_notifier notifier = { .irqfd = eventfd(0, EFD_NONBLOCK), .status = &word };
    aiokvm_notify(&notifier, 1);
    aiokvm_notify(&notifier, 2);
    uint64_t count = 0;
    CHECK_EQ(read(notifier.irqfd, &count, sizeof(count)), 8);
    CHECK_EQ(count, 2);
    CHECK_EQ(aiokvm_status_read(&word), 3);
    aiokvm_status_clear(&word, 1);
    CHECK_EQ(aiokvm_status_read(&word), 2);
    close(notifier.irqfd);
}

TEST(without_an_eventfd_only_the_word_is_set)
{
    uint32_t word = 4;
    struct aiokvm_notifier notifier = { .irqfd = -1, .status = &word };
    aiokvm_notify(&notifier, 1);
    CHECK_EQ(aiokvm_status_read(&word), 5);
}

TEST(a_vcpu_reads_and_clears_the_word_without_the_loop)
{
    uint32_t word = 3;
    struct aiokvm_region region = region_of(&word);
    static const struct fake_step script[] = {
        LOAD(GPA + STATUS, 4), STORE(GPA + CLEAR, 4, 1), LOAD(GPA + STATUS, 4), STORE(GPA + CLEAR, 4, 0xffffffff),
        LOAD(GPA + STATUS, 4),
    };
    struct guest guest = guest_new(script, LENGTH(script));
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_MMIO, &region, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    CHECK_SOON(atomic_load(&guest.fake->asleep) > 0);
    CHECK_EQ(guest.fake->read_count, 3);
    CHECK_EQ(guest.fake->reads[0], 3);
    CHECK_EQ(guest.fake->reads[1], 2);
    CHECK_EQ(guest.fake->reads[2], 0);
    CHECK(no_news(guest.machine));
    guest_close(&guest);
}

TEST(all_other_accesses_are_the_loops)
{
    uint32_t word = 3;
    struct aiokvm_region region = region_of(&word);
    struct aiokvm_machine *machine = machine_open();
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, &region, 1), 0);
    uint64_t value = 0xffffffff;
    static const struct { uint64_t offset; size_t size; bool is_write; } others[] = {
        { STATUS, 4, true }, { CLEAR, 4, false }, { STATUS, 1, false }, { STATUS, 2, false }, { STATUS, 8, false },
        { CLEAR, 1, true },  { CLEAR, 8, true },  { 0x70, 4, true },    { 0x70, 4, false },   { STATUS + 1, 4, false },
    };
    for (size_t i = 0; i < LENGTH(others); i++)
        CHECK_EQ(touch(machine, others[i].offset, others[i].is_write, others[i].size, &value), AIOKVM_ASK);
    CHECK_EQ(aiokvm_status_read(&word), 3);
    aiokvm_machine_free(machine);
}

TEST(a_region_without_a_word_has_none)
{
    struct aiokvm_region region = { .base = GPA, .size = 0x1000, .id = 3 };
    struct aiokvm_machine *machine = machine_open();
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, &region, 1), 0);
    uint64_t value = 0;
    CHECK_EQ(touch(machine, 0, false, 4, &value), AIOKVM_ASK);
    CHECK_EQ(touch(machine, 0, true, 4, &value), AIOKVM_ASK);
    aiokvm_machine_free(machine);
}

/* Threads complete work and notify; a driver acknowledges, then looks for work, as drivers do. None is missed. */
enum { NOTIFIERS = 3, EVENTS = 20000 };

struct worker {
    struct aiokvm_notifier *notifier;
    _Atomic uint32_t *completed;
};

static void *complete(void *argument)
{
    struct worker *worker = argument;
    for (uint32_t i = 0; i < EVENTS; i++) {
        atomic_fetch_add_explicit(worker->completed, 1, memory_order_relaxed);
        aiokvm_notify(worker->notifier, 1);
    }
    return NULL;
}

TEST(no_event_is_lost_between_threads)
{
    uint32_t word = 0;
    struct aiokvm_region region = region_of(&word);
    struct aiokvm_machine *machine = machine_open();
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, &region, 1), 0);
    struct aiokvm_notifier notifier = { .irqfd = eventfd(0, EFD_NONBLOCK), .status = &word };
    _Atomic uint32_t completed = 0;
    struct worker worker = { &notifier, &completed };
    pthread_t threads[NOTIFIERS];
    for (int i = 0; i < NOTIFIERS; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, complete, &worker), 0);
    uint32_t seen = 0;
    while (seen < NOTIFIERS * EVENTS) {
        struct pollfd fd = { .fd = notifier.irqfd, .events = POLLIN };
        CHECK_EQ(poll(&fd, 1, PATIENCE_S * 1000), 1);
        uint64_t count;
        CHECK_EQ(read(notifier.irqfd, &count, sizeof(count)), 8);
        uint64_t bits = 0;
        CHECK_EQ(touch(machine, STATUS, false, 4, &bits), AIOKVM_DONE);
        bits &= 0xffffffff;
        if (!bits)
            continue; /* of an event that an earlier look has seen */
        CHECK_EQ(touch(machine, CLEAR, true, 4, &bits), AIOKVM_DONE);
        seen = atomic_load_explicit(&completed, memory_order_relaxed);
    }
    for (int i = 0; i < NOTIFIERS; i++)
        pthread_join(threads[i], NULL);
    close(notifier.irqfd);
    aiokvm_machine_free(machine);
}
