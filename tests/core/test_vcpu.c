/* vcpu.c: the thread of a vCPU, and what the loop can tell it at any time. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

static const struct fake_step spins[] = { { .op = FAKE_SPIN } };
static const struct fake_step asks[] = { IN(0x60, 1), IN(0x61, 1) };
static const struct aiokvm_region ports = { .base = 0x60, .size = 8, .id = 7 };

static struct guest asking_guest(void)
{
    struct guest guest = guest_new(asks, LENGTH(asks));
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &ports, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    return guest;
}

static void wait_asleep(struct guest *guest)
{
    CHECK_SOON(atomic_load(&guest->fake->asleep) > 0);
}

/* What /proc says about the vCPU's thread. */
static bool proc_line(int tid, const char *file, const char *key, char *line, size_t size)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/task/%d/%s", tid, file);
    FILE *stream = fopen(path, "re");
    if (!stream)
        return false;
    bool found = false;
    while (!found && fgets(line, (int)size, stream))
        found = strncmp(line, key, strlen(key)) == 0;
    fclose(stream);
    return found;
}

TEST(thread_has_a_name_and_a_tid)
{
    struct guest guest = guest_open(NULL, 0);
    int tid = aiokvm_vcpu_tid(guest.vcpu);
    CHECK(tid > 0 && tid != getpid());
    char line[128];
    CHECK(proc_line(tid, "comm", "", line, sizeof(line)));
    CHECK(strcmp(line, "test:0\n") == 0);
    guest_close(&guest);
}

TEST(long_name_is_cut)
{
    struct guest guest = guest_new(NULL, 0);
    aiokvm_vcpu_free(guest.vcpu);
    int error;
    guest.vcpu = aiokvm_vcpu_new(guest.machine, 0, guest.fake->fd, guest.fake->run, guest.fake->run_size,
                                 "a-machine-with-a-name:12", &error);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    char line[128];
    CHECK(proc_line(aiokvm_vcpu_tid(guest.vcpu), "comm", "", line, sizeof(line)));
    CHECK(strcmp(line, "a-machine-with-\n") == 0);
    guest_close(&guest);
}

TEST(thread_blocks_all_signals_but_the_kick)
{
    sigset_t before, after;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    CHECK_EQ(sigismember(&before, SIGTERM), 0);
    struct guest guest = guest_open(spins, 1);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (int number = 1; number <= SIGRTMAX; number++)
        CHECK_EQ(sigismember(&after, number), sigismember(&before, number));
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    char line[128];
    unsigned long long blocked;
    CHECK(proc_line(aiokvm_vcpu_tid(guest.vcpu), "status", "SigBlk:", line, sizeof(line)));
    CHECK_EQ(sscanf(line, "SigBlk: %llx", &blocked), 1);
    int open_to = 0;
    for (int number = 1; number <= SIGRTMAX; number++) {
        /* Nobody can block SIGKILL and SIGSTOP; those below SIGRTMIN are libc's own. */
        if (number == SIGKILL || number == SIGSTOP || (number >= 32 && number < SIGRTMIN))
            continue;
        if (!(blocked >> (number - 1) & 1)) {
            CHECK(number >= SIGRTMIN);
            open_to++;
        }
    }
    CHECK_EQ(open_to, 1);
    guest_close(&guest);
}

TEST(start_parks_until_the_first_resume)
{
    struct guest guest = guest_new(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_tid(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(atomic_load(&guest.fake->calls), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    wait_asleep(&guest);
    guest_close(&guest);
}

TEST(a_thread_is_started_once)
{
    struct guest guest = guest_open(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), -EALREADY);
    vcpu_finish(guest.machine, guest.vcpu);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), -EALREADY);
    guest_close(&guest);
}

TEST(running_is_a_state_from_the_start_on)
{
    struct guest guest = guest_open(NULL, 0);
    CHECK_EQ((uint32_t)atomic_load(&guest.vcpu->status), AIOKVM_VCPU_RUNNING);
    guest_close(&guest);
}

TEST(pause_parks_a_halted_guest)
{
    struct guest guest = guest_open(NULL, 0);
    wait_asleep(&guest);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    guest_close(&guest);
}

TEST(pause_parks_a_guest_that_never_exits)
{
    struct guest guest = guest_open(spins, 1);
    CHECK_SOON(atomic_load(&guest.fake->entries) == 1);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    guest_close(&guest);
}

TEST(parked_stays_parked_when_kicked)
{
    struct guest guest = guest_open(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    struct aiokvm_news parked = guest_tells(&guest, AIOKVM_VCPU_PARKED);
    uint32_t calls = atomic_load(&guest.fake->calls);
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(aiokvm_vcpu_kick(guest.vcpu), 0);
        sched_yield();
    }
    CHECK(no_news(guest.machine));
    /* The answer to the next wish comes after whatever the kicks have done. */
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    CHECK_EQ(guest_tells(&guest, AIOKVM_VCPU_PARKED).seq, parked.seq + 1);
    CHECK_EQ(atomic_load(&guest.fake->calls), calls);
    guest_close(&guest);
}

TEST(every_pause_is_answered_however_short_the_resume)
{
    struct guest guest = guest_open(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    uint32_t seq = guest_tells(&guest, AIOKVM_VCPU_PARKED).seq;
    for (int i = 0; i < 2000; i++) {
        CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
        CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
        CHECK_EQ(guest_tells(&guest, AIOKVM_VCPU_PARKED).seq, ++seq);
    }
    guest_close(&guest);
}

TEST(a_pause_that_is_withdrawn_lets_the_guest_run)
{
    static const struct fake_step script[] = { IN(0x60, 1) };
    for (int i = 0; i < 200; i++) {
        struct guest guest = guest_new(script, LENGTH(script));
        CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &ports, 1), 0);
        CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
        CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
        CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
        CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
        struct aiokvm_news news;
        do
            news = next_news(guest.machine);
        while (news.state != AIOKVM_VCPU_EXIT);
        guest_close(&guest);
    }
}

TEST(stop_ends_a_guest_that_never_exits)
{
    struct guest guest = guest_open(spins, 1);
    CHECK_SOON(atomic_load(&guest.fake->entries) == 1);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    guest_close(&guest);
}

TEST(stop_ends_a_halted_guest)
{
    struct guest guest = guest_open(NULL, 0);
    wait_asleep(&guest);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    guest_close(&guest);
}

TEST(stop_ends_a_parked_vcpu)
{
    struct guest guest = guest_open(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    guest_close(&guest);
}

TEST(stop_ends_the_wait_for_a_reply)
{
    struct guest guest = asking_guest();
    struct aiokvm_news exit = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    CHECK_EQ(guest_tells(&guest, AIOKVM_VCPU_STOPPED).seq, exit.seq + 1);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, exit.seq, 1), 0);
    CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, exit.seq), 0);
    CHECK_EQ(aiokvm_vcpu_join(guest.vcpu), 0);
    CHECK_EQ(guest.fake->read_count, 0);
    guest_close(&guest);
}

/* Whichever comes first, the thread ends, and says so. */
TEST(stop_races_with_a_reply)
{
    for (int i = 0; i < 300; i++) {
        struct guest guest = asking_guest();
        struct aiokvm_news exit = guest_tells(&guest, AIOKVM_VCPU_EXIT);
        CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
        int heard = aiokvm_vcpu_reply(guest.vcpu, exit.seq, 1);
        CHECK(heard == 0 || heard == 1);
        guest_tells(&guest, AIOKVM_VCPU_STOPPED);
        guest_close(&guest);
    }
}

TEST(stop_before_start_ends_the_thread_at_once)
{
    struct guest guest = guest_new(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    CHECK_EQ(atomic_load(&guest.fake->calls), 0);
    guest_close(&guest);
}

TEST(stop_is_final)
{
    for (int i = 0; i < 200; i++) {
        struct guest guest = guest_open(NULL, 0);
        CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
        CHECK_EQ(i & 1 ? aiokvm_vcpu_resume(guest.vcpu) : aiokvm_vcpu_pause(guest.vcpu), 0);
        guest_tells(&guest, AIOKVM_VCPU_STOPPED);
        guest_close(&guest);
    }
}

TEST(join_waits_for_nobody)
{
    struct guest guest = guest_new(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_join(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_join(guest.vcpu), -EBUSY);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(aiokvm_vcpu_join(guest.vcpu), -EBUSY);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    CHECK_EQ(aiokvm_vcpu_join(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_tid(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_join(guest.vcpu), 0);
    /* Nobody is left to hear it. */
    CHECK_EQ(aiokvm_vcpu_kick(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    CHECK(no_news(guest.machine));
    guest_close(&guest);
}

/* The loop need not have taken the last news of a vCPU that it frees. */
TEST(freed_vcpu_leaves_no_news_behind)
{
    struct guest guest = guest_open(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    CHECK_SOON(aiokvm_vcpu_join(guest.vcpu) == 0);
    aiokvm_vcpu_free(guest.vcpu);
    CHECK(no_news(guest.machine));
    machine_close(guest.machine);
    fake_free(guest.fake);
}

TEST(kick_ends_one_kvm_run_and_tells_nothing)
{
    struct guest guest = guest_new(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_kick(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    struct aiokvm_vcpu_stats stats;
    for (uint32_t i = 1; i <= 50; i++) {
        CHECK_SOON(atomic_load(&guest.fake->asleep) == i);
        aiokvm_vcpu_stats(guest.vcpu, &stats);
        CHECK_EQ(stats.kicks, i - 1);
        CHECK_EQ(aiokvm_vcpu_kick(guest.vcpu), 0);
    }
    CHECK_SOON((aiokvm_vcpu_stats(guest.vcpu, &stats), stats.kicks == 50));
    CHECK_EQ(stats.exits, 0);
    CHECK(no_news(guest.machine));
    guest_close(&guest);
}

/* The thread has read what is wanted and is on its way into the kernel. The signal's handler runs too early
 * to end anything: immediate_exit does. */
TEST(kick_between_the_look_and_kvm_run)
{
    struct fake_gate gate;
    fake_gate_init(&gate);
    struct guest guest = guest_new(NULL, 0);
    atomic_store(&guest.fake->before, &gate);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    fake_gate_wait(&gate);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    fake_gate_open(&gate);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(atomic_load(&guest.fake->entries), 0);
    guest_close(&guest);
}

/* The kernel has read immediate_exit: the signal, pending by then, ends the guest's sleep. */
TEST(kick_between_immediate_exit_and_the_guest)
{
    struct fake_gate gate;
    fake_gate_init(&gate);
    struct guest guest = guest_new(NULL, 0);
    atomic_store(&guest.fake->window, &gate);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    fake_gate_wait(&gate);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    fake_gate_open(&gate);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(atomic_load(&guest.fake->entries), 1);
    guest_close(&guest);
}

TEST(vcpu_that_waits_for_its_sipi_is_entered_again)
{
    static const struct fake_step script[] = { { .op = FAKE_SIPI }, IN(0x60, 1) };
    struct guest guest = guest_new(script, LENGTH(script));
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &ports, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    wait_asleep(&guest);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    fake_interrupt(guest.fake);
    guest_tells(&guest, AIOKVM_VCPU_EXIT);
    guest_close(&guest);
}

TEST(random_wishes_end_where_the_last_one_says)
{
    static const struct fake_step both[] = { { .op = FAKE_HALT }, { .op = FAKE_SPIN } };
    uint64_t state = 1;
    struct guest guest = guest_open(both, LENGTH(both));
    for (int i = 0; i < 300; i++) {
        for (uint32_t n = random_below(&state, 6); n; n--) {
            switch (random_below(&state, 3)) {
            case 0: CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0); break;
            case 1: CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0); break;
            default: CHECK_EQ(aiokvm_vcpu_kick(guest.vcpu), 0);
            }
        }
        if (i == 150)
            fake_interrupt(guest.fake);
        CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
        while (next_news(guest.machine).state != AIOKVM_VCPU_PARKED)
            ;
        /* Whatever pause this was the answer to: from here on nothing enters the guest. */
        uint32_t entries = atomic_load(&guest.fake->entries);
        sched_yield();
        CHECK_EQ(atomic_load(&guest.fake->entries), entries);
        CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
        CHECK_SOON(atomic_load(&guest.fake->entries) > entries);
    }
    guest_close(&guest);
}
