/* vcpu.c: what a KVM_RUN that returned leads to: accesses, their replies, other exits, errors, and what must
 * be finished before a vCPU parks. */
#include <errno.h>
#include <string.h>

#include "guest.h"

enum { PORT = 0x60, GPA = 0x50000000 };

static const struct aiokvm_region ports = { .base = PORT, .size = 0x10, .id = 7 };
static const struct aiokvm_region memory = { .base = GPA, .size = 0x1000, .id = 8 };

static struct guest claimed_guest(const struct fake_step *script, size_t length)
{
    struct guest guest = guest_new(script, length);
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &ports, 1), 0);
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_MMIO, &memory, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    return guest;
}

/* The guest has come to the end of its script. */
static void wait_asleep(struct guest *guest)
{
    CHECK_SOON(atomic_load(&guest->fake->asleep) > 0);
}

TEST(reads_get_the_bytes_of_the_reply)
{
    static const struct fake_step script[] = {
        IN(PORT, 1), IN(PORT + 1, 2), IN(PORT + 4, 4), LOAD(GPA, 1), LOAD(GPA + 0xff8, 8), LOAD(GPA + 3, 3),
    };
    static const struct { uint32_t reason, region, size; uint64_t offset, got; } expected[] = {
        { KVM_EXIT_IO, 7, 1, 0, 0x88 },
        { KVM_EXIT_IO, 7, 2, 1, 0x7788 },
        { KVM_EXIT_IO, 7, 4, 4, 0x55667788 },
        { KVM_EXIT_MMIO, 8, 1, 0, 0x88 },
        { KVM_EXIT_MMIO, 8, 8, 0xff8, 0x1122334455667788 },
        { KVM_EXIT_MMIO, 8, 3, 3, 0x667788 },
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    for (size_t i = 0; i < LENGTH(expected); i++) {
        struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
        CHECK_EQ(news.seq, i + 1);
        CHECK_EQ(news.error, 0);
        CHECK_EQ(news.reason, expected[i].reason);
        CHECK_EQ(news.bus, news.reason == KVM_EXIT_IO ? AIOKVM_BUS_PIO : AIOKVM_BUS_MMIO);
        CHECK_EQ(news.region, expected[i].region);
        CHECK_EQ(news.offset, expected[i].offset);
        CHECK_EQ(news.size, expected[i].size);
        CHECK_EQ(news.count, 1);
        CHECK_EQ(news.is_write, 0);
        CHECK_EQ(news.value, 0);
        CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 0x1122334455667788), 1);
    }
    wait_asleep(&guest);
    CHECK_EQ(guest.fake->read_count, LENGTH(expected));
    for (size_t i = 0; i < LENGTH(expected); i++)
        CHECK_EQ(guest.fake->reads[i], expected[i].got);
    guest_close(&guest);
}

TEST(writes_bring_their_value)
{
    static const struct fake_step script[] = {
        OUT(PORT, 1, 0x11), OUT(PORT, 2, 0x2211), OUT(PORT, 4, 0x44332211), STORE(GPA, 2, 0x1234),
        STORE(GPA + 8, 8, 0x8877665544332211),
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    for (size_t i = 0; i < LENGTH(script); i++) {
        struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
        CHECK_EQ(news.is_write, 1);
        CHECK_EQ(news.count, 1);
        CHECK_EQ(news.size, script[i].size);
        CHECK_EQ(news.value, script[i].value);
        CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news.seq), 1);
    }
    wait_asleep(&guest);
    CHECK_EQ(guest.fake->read_count, 0);
    guest_close(&guest);
}

TEST(string_accesses_move_through_the_data)
{
    static const uint8_t written[] = { 1, 2, 3, 4, 5, 6 };
    static const struct fake_step script[] = {
        { .op = FAKE_IO, .is_write = true, .address = PORT, .size = 2, .count = 3, .bytes = written },
        { .op = FAKE_IO, .address = PORT, .size = 4, .count = 2 },
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.size, 2);
    CHECK_EQ(news.count, 3);
    CHECK_EQ(news.value, 0);
    CHECK(memcmp(aiokvm_vcpu_data(guest.vcpu), written, sizeof(written)) == 0);
    CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news.seq), 1);
    news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.count, 2);
    CHECK_EQ(news.is_write, 0);
    memcpy(aiokvm_vcpu_data(guest.vcpu), "gotcha!!", 8);
    CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news.seq), 1);
    wait_asleep(&guest);
    CHECK(memcmp(guest.fake->string, "gotcha!!", 8) == 0);
    guest_close(&guest);
}

TEST(reply_to_another_exit_changes_nothing)
{
    static const struct fake_step script[] = { IN(PORT, 4), IN(PORT, 4) };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news first = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq + 1, 0xbad), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq - 1, 0xbad), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq, 1), 1);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq, 0xbad), 0);
    struct aiokvm_news second = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(second.seq, first.seq + 1);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq, 0xbad), 0);
    CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, first.seq), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, second.seq, 2), 1);
    wait_asleep(&guest);
    CHECK_EQ(guest.fake->reads[0], 1);
    CHECK_EQ(guest.fake->reads[1], 2);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, second.seq, 0xbad), 0);
    guest_close(&guest);
}

static void read_for_ever(struct fake *fake, struct fake_step *step)
{
    (void)fake;
    *step = (struct fake_step)IN(PORT, 1);
}

/* The loop does not sleep: its replies, and its resumes, come while the vCPU is on its way to its futex, now
 * earlier, now later. */
TEST(answer_that_comes_at_once_is_heard)
{
    struct guest guest = guest_new(NULL, 0);
    guest.fake->next = read_for_ever;
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &ports, 1), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    int replies = 0, resumes = 0;
    uint64_t state = 11;
    for (uint64_t deadline = now_ns() + PATIENCE_S * UINT64_C(1000000000); replies < 20000;) {
        CHECK(now_ns() < deadline);
        struct aiokvm_news news;
        if (!take(guest.machine, &news, 1))
            continue;
        for (uint32_t spin = random_below(&state, 400); spin; spin--)
            atomic_load(&guest.vcpu->want);
        if (news.state == AIOKVM_VCPU_EXIT) {
            if (++replies % 8 == 0)
                CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
            CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 1), 1);
        } else {
            CHECK_EQ(news.state, AIOKVM_VCPU_PARKED);
            CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
            resumes++;
        }
    }
    CHECK(resumes > 2000);
    guest_close(&guest);
}

TEST(kick_does_not_end_the_wait_for_a_reply)
{
    static const struct fake_step script[] = { IN(PORT, 1) };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    for (int i = 0; i < 100; i++)
        CHECK_EQ(aiokvm_vcpu_kick(guest.vcpu), 0);
    CHECK(no_news(guest.machine));
    CHECK_EQ(atomic_load(&guest.fake->calls), 1);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 5), 1);
    wait_asleep(&guest);
    CHECK_EQ(guest.fake->reads[0], 5);
    guest_close(&guest);
}

TEST(unclaimed_reads_are_ones_and_writes_go_nowhere)
{
    static const uint8_t written[4] = { 0 };
    static const struct fake_step script[] = {
        IN(0x80, 1), IN(0x80, 2), IN(0x80, 4), LOAD(0x1000, 8), OUT(0x80, 1, 0), STORE(0x1000, 8, 0),
        { .op = FAKE_IO, .is_write = true, .address = 0x80, .size = 1, .count = 4, .bytes = written },
        { .op = FAKE_IO, .address = 0x80, .size = 2, .count = 100 },
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    wait_asleep(&guest);
    CHECK_EQ(guest.fake->read_count, 4);
    CHECK_EQ(guest.fake->reads[0], 0xff);
    CHECK_EQ(guest.fake->reads[1], 0xffff);
    CHECK_EQ(guest.fake->reads[2], 0xffffffff);
    CHECK_EQ(guest.fake->reads[3], UINT64_MAX);
    for (int i = 0; i < 200; i++)
        CHECK_EQ(guest.fake->string[i], 0xff);
    CHECK_EQ(guest.fake->string[200], 0);
    struct aiokvm_vcpu_stats stats;
    aiokvm_vcpu_stats(guest.vcpu, &stats);
    CHECK_EQ(stats.exits, LENGTH(script));
    CHECK_EQ(stats.unclaimed, LENGTH(script));
    CHECK_EQ(stats.kicks, 0);
    CHECK(no_news(guest.machine));
    guest_close(&guest);
}

TEST(other_exits_are_told_by_their_reason)
{
    static const struct fake_step script[] = {
        { .op = FAKE_EXIT, .reason = KVM_EXIT_HLT },
        { .op = FAKE_EXIT, .reason = KVM_EXIT_INTERNAL_ERROR },
        { .op = FAKE_EXIT, .reason = KVM_EXIT_SYSTEM_EVENT },
        { .op = FAKE_EXIT, .reason = KVM_EXIT_SHUTDOWN },
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    for (size_t i = 0; i < LENGTH(script); i++) {
        struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
        CHECK_EQ(news.reason, script[i].reason);
        CHECK_EQ(news.error, 0);
        CHECK_EQ(news.size, 0);
        CHECK_EQ(news.count, 0);
        CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news.seq), 1);
    }
    wait_asleep(&guest);
    guest_close(&guest);
}

TEST(failed_kvm_run_is_told_by_its_errno_and_tried_again)
{
    static const struct fake_step script[] = {
        { .op = FAKE_ERROR, .error = EFAULT }, { .op = FAKE_ERROR, .error = ENOEXEC }, IN(PORT, 1),
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.error, EFAULT);
    CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news.seq), 1);
    news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.error, ENOEXEC);
    /* It began nothing that would have to be finished. */
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news.seq), 1);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(atomic_load(&guest.fake->calls), 2);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(news.error, 0);
    CHECK_EQ(news.reason, KVM_EXIT_IO);
    guest_close(&guest);
}

TEST(descriptor_without_a_vcpu_is_an_error_not_a_loop)
{
    struct guest guest = guest_new(NULL, 0);
    aiokvm_vcpu_free(guest.vcpu);
    int error;
    guest.vcpu = aiokvm_vcpu_new(guest.machine, 0, -1, guest.fake->run, guest.fake->run_size, "bad", &error);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    CHECK_EQ(guest_tells(&guest, AIOKVM_VCPU_EXIT).error, EBADF);
    guest_close(&guest);
}

/* ---- KVM finishes the access that an exit began, without entering the guest, before the vCPU parks ---- */

TEST(pause_waits_for_the_reply_and_has_the_read_finished)
{
    static const struct fake_step script[] = { LOAD(GPA, 4), LOAD(GPA, 4) };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    CHECK(no_news(guest.machine));
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 0x1234), 1);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(guest.fake->reads[0], 0x1234);
    CHECK_EQ(atomic_load(&guest.fake->done), 1);
    CHECK_EQ(atomic_load(&guest.fake->entries), 1);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_EXIT);
    guest_close(&guest);
}

TEST(access_in_two_parts_is_finished_before_the_vcpu_parks)
{
    static const struct fake_step script[] = {
        { .op = FAKE_MMIO, .address = GPA + 0xffc, .size = 4, .and_next = true },
        LOAD(GPA, 4),
        LOAD(GPA + 8, 4),
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news first = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(first.offset, 0xffc);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq, 0x1111), 1);
    struct aiokvm_news second = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(second.offset, 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, second.seq, 0x2222), 1);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(guest.fake->read_count, 2);
    CHECK_EQ(guest.fake->reads[0], 0x1111);
    CHECK_EQ(guest.fake->reads[1], 0x2222);
    CHECK_EQ(atomic_load(&guest.fake->entries), 1);
    guest_close(&guest);
}

TEST(stop_in_the_middle_of_two_parts)
{
    static const struct fake_step script[] = {
        { .op = FAKE_MMIO, .address = GPA, .size = 4, .and_next = true }, LOAD(GPA, 4),
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news first = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, first.seq, 0), 1);
    guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_stop(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_STOPPED);
    guest_close(&guest);
}

TEST(pause_that_is_withdrawn_while_the_loop_thinks)
{
    static const struct fake_step script[] = {
        { .op = FAKE_MMIO, .address = GPA, .size = 4, .and_next = true }, LOAD(GPA, 4), OUT(PORT, 1, 9),
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 0), 1);
    news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 0), 1);
    CHECK_EQ(guest_tells(&guest, AIOKVM_VCPU_EXIT).value, 9);
    guest_close(&guest);
}

/* Exits that need no loop begin accesses too. The gate holds the vCPU where it is about to finish one. */
TEST(unclaimed_posted_and_other_exits_are_finished_before_the_vcpu_parks)
{
    static const struct aiokvm_region posted = { .base = PORT, .size = 1, .id = 7, .posted = 1 };
    static const struct fake_step scripts[][2] = {
        { LOAD(0x1000, 4), { .op = FAKE_SPIN } },
        { OUT(PORT, 1, 'x'), { .op = FAKE_SPIN } },
    };
    for (size_t i = 0; i < LENGTH(scripts); i++) {
        struct fake_gate in, again;
        fake_gate_init(&in);
        fake_gate_init(&again);
        struct guest guest = guest_new(scripts[i], 2);
        CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &posted, 1), 0);
        atomic_store(&guest.fake->window, &in);
        CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
        CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
        fake_gate_wait(&in);
        atomic_store(&guest.fake->before, &again);
        fake_gate_open(&in);
        fake_gate_wait(&again);
        CHECK_EQ(atomic_load(&guest.fake->done), 0);
        CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
        fake_gate_open(&again);
        struct aiokvm_news news;
        do
            news = next_news(guest.machine);
        while (news.state == AIOKVM_POSTED);
        CHECK_EQ(news.state, AIOKVM_VCPU_PARKED);
        CHECK_EQ(atomic_load(&guest.fake->done), 1);
        CHECK_EQ(atomic_load(&guest.fake->entries), 1);
        guest_close(&guest);
    }
}

TEST(stats_count_each_return_of_kvm_run)
{
    static const struct fake_step script[] = {
        IN(PORT, 1), { .op = FAKE_EXIT, .reason = KVM_EXIT_HLT }, { .op = FAKE_ERROR, .error = EFAULT },
        LOAD(0x1000, 1), IN(PORT, 1),
    };
    struct guest guest = claimed_guest(script, LENGTH(script));
    for (int i = 0; i < 4; i++)
        CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, guest_tells(&guest, AIOKVM_VCPU_EXIT).seq), 1);
    wait_asleep(&guest);
    struct aiokvm_vcpu_stats stats;
    aiokvm_vcpu_stats(guest.vcpu, &stats);
    CHECK_EQ(stats.exits, 5);
    CHECK_EQ(stats.unclaimed, 1);
    CHECK_EQ(stats.kicks, 0);
    guest_close(&guest);
}
