/* turn.c and vcpu.c: a loop and vCPUs that poll for each other, and sleep when that is in vain. */
#include "clock.h"
#include "guest.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>

#define PORT 0x40
#define SECOND 1000000000ull
/* Longer than any test. */
#define POLL_NS 4000000000u

static const struct aiokvm_region region = { .base = PORT, .size = 8, .id = 7 };

static void start_polling(struct guest *guest, uint32_t poll_ns)
{
    CHECK_EQ(aiokvm_machine_publish(guest->machine, AIOKVM_BUS_PIO, &region, 1), 0);
    CHECK_EQ(aiokvm_machine_set_poll(guest->machine, poll_ns), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest->vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest->vcpu), 0);
}

static struct guest polling_guest(const struct fake_step *script, size_t length, uint32_t poll_ns)
{
    struct guest guest = guest_new(script, length);
    start_polling(&guest, poll_ns);
    return guest;
}

static int serve(struct aiokvm_turn *turn, uint64_t wait_ns, struct aiokvm_news *news, uint32_t *which)
{
    *which = UINT32_MAX;
    return aiokvm_serve(turn, aiokvm_now_ns() + wait_ns, news, 1, which);
}

/* A loop that watches is not rung for; one that has stopped is. */
TEST(a_watched_machine_does_not_ring)
{
    static const struct fake_step script[] = { IN(PORT, 1), IN(PORT, 1), IN(PORT, 1) };
    struct guest guest = polling_guest(script, LENGTH(script), 0);
    CHECK(doorbell_rings(guest.machine, PATIENCE_S * 1000));
    CHECK_EQ(aiokvm_turn_answer(guest.turn), 0);
    struct aiokvm_news news;
    uint32_t which;
    CHECK_EQ(aiokvm_machine_set_poll(guest.machine, POLL_NS), 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(serve(guest.turn, PATIENCE_S * SECOND, &news, &which), 1);
        CHECK_EQ(which, 0);
        CHECK_EQ(news.state, AIOKVM_VCPU_EXIT);
        CHECK(!doorbell_rings(guest.machine, 0));
        CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 1), 1);
    }
    CHECK_EQ(aiokvm_turn_unwatch(guest.turn), 0);
    CHECK(doorbell_rings(guest.machine, PATIENCE_S * 1000));
    guest_close(&guest);
}

/* A loop that begins to look by itself sees what has rung already, and what comes is no ring. */
TEST(a_loop_may_watch_unasked)
{
    static const struct fake_step script[] = { IN(PORT, 1), IN(PORT, 1) };
    struct guest guest = polling_guest(script, LENGTH(script), POLL_NS);
    CHECK(doorbell_rings(guest.machine, PATIENCE_S * 1000));
    CHECK_EQ(aiokvm_turn_answer(guest.turn), 0);
    CHECK_EQ(aiokvm_turn_unwatch(guest.turn), 0);
    CHECK_EQ(aiokvm_turn_watch(guest.turn, guest.machine), 0);
    struct aiokvm_news news;
    uint32_t which;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(serve(guest.turn, PATIENCE_S * SECOND, &news, &which), 1);
        CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 1), 1);
    }
    CHECK_EQ(aiokvm_turn_unwatch(guest.turn), 0);
    guest_close(&guest);
}

/* When nothing has come for as long as the window is, the machine is told to ring again. */
TEST(a_window_ends)
{
    static const struct fake_step script[] = { IN(PORT, 1) };
    struct guest guest = polling_guest(script, LENGTH(script), 1000000);
    CHECK(doorbell_rings(guest.machine, PATIENCE_S * 1000));
    CHECK_EQ(aiokvm_turn_answer(guest.turn), 0);
    struct aiokvm_news news;
    uint32_t which;
    CHECK_EQ(serve(guest.turn, PATIENCE_S * SECOND, &news, &which), 1);
    CHECK_EQ(serve(guest.turn, PATIENCE_S * SECOND, &news, &which), 0);
    struct aiokvm_machine_stats stats;
    CHECK_EQ(aiokvm_machine_get_stats(guest.machine, &stats), 0);
    CHECK_EQ(stats.poll_misses, 1);
    CHECK_EQ(stats.rings, 1);
    CHECK(stats.serving_ns > 0);
    guest_close(&guest);
}

/* A deadline that is over: what is there is taken, nothing is waited for, and the machine stays watched. */
TEST(a_deadline_ends_the_wait)
{
    struct aiokvm_machine *machine = machine_open();
    struct aiokvm_news news;
    uint32_t which;
    CHECK_EQ(aiokvm_machine_set_poll(machine, POLL_NS), 0);
    CHECK_EQ(aiokvm_turn_watch(machine->turn, machine), 0);
    CHECK_EQ(aiokvm_serve(machine->turn, 0, &news, 1, &which), -EAGAIN);
    CHECK_EQ(aiokvm_serve(machine->turn, 1, &news, 1, &which), -EAGAIN);
    machine_close(machine);
}

/* Of two machines that always have news, neither is served twice before the other. */
TEST(machines_are_served_in_turn)
{
    static const struct fake_step script[] = { IN(PORT, 1), IN(PORT, 1), IN(PORT, 1), IN(PORT, 1) };
    struct guest guests[2];
    guests[0] = polling_guest(script, LENGTH(script), POLL_NS);
    guests[1] = guest_beside(&guests[0], 1, script, LENGTH(script));
    start_polling(&guests[1], POLL_NS);
    struct aiokvm_turn *turn = guests[0].turn;
    CHECK(doorbell_rings(guests[0].machine, PATIENCE_S * 1000));
    CHECK_EQ(aiokvm_turn_answer(turn), 0);
    for (int i = 0; i < 2; i++)
        CHECK_SOON(atomic_load(&guests[i].machine->pending));
    uint32_t before = UINT32_MAX;
    for (int i = 0; i < 6; i++) {
        struct aiokvm_news news;
        uint32_t which;
        CHECK_EQ(aiokvm_serve(turn, aiokvm_now_ns() + PATIENCE_S * SECOND, &news, 1, &which), 1);
        CHECK(which < 2);
        CHECK(which != before);
        before = which;
        /* The other's next exit is there before this one's, whatever the threads do. */
        CHECK_EQ(aiokvm_vcpu_reply(guests[which].vcpu, news.seq, 0), 1);
        CHECK_SOON(atomic_load(&guests[which].machine->queued));
    }
    CHECK_EQ(aiokvm_turn_unwatch(turn), 0);
    for (int i = 0; i < 2; i++) {
        aiokvm_vcpu_stop(guests[i].vcpu);
        while (aiokvm_vcpu_join(guests[i].vcpu) == -EBUSY)
            sched_yield();
    }
    guest_leave(&guests[1]);
    guest_close(&guests[0]);
}

/* A loop that polls for one machine hears of another at once; when the first has nothing for as long as its
 * window is, they need the doorbell, which is rung once for both. */
TEST(machines_share_a_doorbell)
{
    struct aiokvm_machine *first = machine_open();
    struct aiokvm_turn *turn = first->turn;
    struct aiokvm_machine *second = machine_beside(turn, 1);
    struct aiokvm_machine *machines[] = { first, second };
    struct aiokvm_region posted = region;
    posted.posted = AIOKVM_POSTED_ALL;
    struct aiokvm_region found;
    uint8_t byte = 0;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(aiokvm_machine_publish(machines[i], AIOKVM_BUS_PIO, &posted, 1), 0);
        CHECK_EQ(aiokvm_machine_access(machines[i], AIOKVM_BUS_PIO, PORT, true, 1, 1, &byte, &found), AIOKVM_DONE);
    }
    eventfd_t rung;
    CHECK_EQ(eventfd_read(aiokvm_turn_doorbell(turn), &rung), 0);
    CHECK_EQ(rung, 1);
    CHECK_EQ(aiokvm_turn_answer(turn), 0);
    struct aiokvm_news news;
    uint32_t which;
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(aiokvm_serve(turn, 0, &news, 1, &which), 1);
        CHECK_EQ(which, i);
    }
    CHECK_EQ(aiokvm_serve(turn, 0, &news, 1, &which), 0);
    /* What a machine has left goes with it. */
    for (int i = 0; i < 2; i++)
        CHECK_EQ(aiokvm_machine_access(machines[i], AIOKVM_BUS_PIO, PORT, true, 1, 1, &byte, &found), AIOKVM_DONE);
    CHECK(aiokvm_turn_ready(turn));
    CHECK_EQ(aiokvm_machine_free(second), 0);
    CHECK_EQ(aiokvm_serve(turn, 0, &news, 1, &which), 1);
    CHECK_EQ(which, 0);
    CHECK(!aiokvm_turn_ready(turn));
    machine_close(first);
}

/* A vCPU that polls for its reply can be stopped, and paused. */
TEST(a_vcpu_that_polls_hears_a_stop)
{
    static const struct fake_step script[] = { IN(PORT, 1) };
    struct guest guest = polling_guest(script, LENGTH(script), POLL_NS);
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.region, region.id);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    guest_close(&guest);
}

/* The first reply comes while the thread sleeps, and sooner than polling would have given up: so it polls for
 * the second. */
TEST(a_vcpu_learns_to_poll)
{
    static const struct fake_step script[] = { IN(PORT, 1), IN(PORT, 1) };
    struct guest guest = polling_guest(script, LENGTH(script), POLL_NS);
    for (int i = 0; i < 2; i++) {
        struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
        CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 1), 1);
    }
    vcpu_finish(guest.machine, guest.vcpu);
    struct aiokvm_vcpu_stats stats;
    aiokvm_vcpu_stats(guest.vcpu, &stats);
    CHECK_EQ(stats.poll_hits, 1);
    CHECK_EQ(stats.reasons[KVM_EXIT_IO], 2);
    CHECK(stats.wait_ns > 0);
    guest_close(&guest);
}

/* What no region claims reaches the loop if it asks for it. */
TEST(unclaimed_accesses_can_be_asked_for)
{
    static const struct fake_step script[] = { IN(PORT + 0x100, 2), IN(PORT, 1) };
    struct guest guest = guest_new(script, LENGTH(script));
    CHECK_EQ(aiokvm_machine_ask_unclaimed(guest.machine, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.region, AIOKVM_NO_REGION);
    CHECK_EQ(news.offset, PORT + 0x100);
    CHECK_EQ(news.size, 2);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 0xffff), 1);
    guest_tells(&guest, AIOKVM_VCPU_EXIT);
    guest_close(&guest);
}

/* A loop that polls, and sleeps on the doorbell when that is in vain, hears of everything. */
enum { ROUNDS = 20000 };

static void *exit_again_and_again(void *argument)
{
    struct aiokvm_machine *machine = argument;
    struct aiokvm_region found;
    for (int i = 0; i < ROUNDS; i++) {
        uint8_t byte = (uint8_t)i;
        while (aiokvm_machine_access(machine, AIOKVM_BUS_PIO, PORT, true, 1, 1, &byte, &found) != AIOKVM_DONE)
            sched_yield();
        for (int pause = i % 200; pause; pause--)
            __builtin_ia32_pause();
    }
    return NULL;
}

TEST(no_post_is_missed_between_polling_and_sleep)
{
    struct aiokvm_machine *machine = machine_open();
    struct aiokvm_region posted = region;
    posted.posted = AIOKVM_POSTED_ALL;
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, &posted, 1), 0);
    CHECK_EQ(aiokvm_machine_set_poll(machine, 2000), 0);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, exit_again_and_again, machine), 0);
    for (int seen = 0; seen < ROUNDS;) {
        CHECK(doorbell_rings(machine, PATIENCE_S * 1000));
        CHECK_EQ(aiokvm_turn_answer(machine->turn), 0);
        struct aiokvm_news news;
        uint32_t which = 0;
        while (aiokvm_serve(machine->turn, UINT64_MAX, &news, 1, &which) == 1) {
            const uint8_t *bytes = aiokvm_machine_posted(machine) + news.value;
            for (uint32_t i = 0; i < news.count; i++, seen++)
                CHECK_EQ(bytes[i], (uint8_t)seen);
        }
    }
    CHECK_EQ(pthread_join(thread, NULL), 0);
    machine_close(machine);
}
