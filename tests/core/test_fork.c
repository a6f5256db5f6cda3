/* A child of fork has the machine's memory, but neither its threads nor its guest: every call says so. */
#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

static const struct aiokvm_region ports = { .base = 0x60, .size = 8, .id = 7 };

/* The number of the first call that did not say what it must; 0: all did. In the child no CHECK: it would
 * speak on the parent's behalf. */
static int first_wrong(struct guest *guest, uint32_t seq)
{
    struct aiokvm_news news;
    struct aiokvm_vcpu_stats stats;
    uint32_t which;
    int error = 0;
    const bool right[] = {
        aiokvm_machine_alive(guest->machine) == 0,
        aiokvm_turn_doorbell(guest->turn) == -EOWNERDEAD,
        aiokvm_turn_answer(guest->turn) == -EOWNERDEAD,
        aiokvm_turn_watch(guest->turn, guest->machine) == -EOWNERDEAD,
        aiokvm_turn_unwatch(guest->turn) == -EOWNERDEAD,
        aiokvm_turn_ready(guest->turn) == 0,
        aiokvm_serve(guest->turn, 0, &news, 1, &which) == -EOWNERDEAD,
        aiokvm_machine_new(guest->turn, 1, &error) == NULL && error == EOWNERDEAD,
        aiokvm_machine_publish(guest->machine, AIOKVM_BUS_PIO, &ports, 1) == -EOWNERDEAD,
        aiokvm_machine_take(guest->machine, &news, 1) == -EOWNERDEAD,
        aiokvm_machine_posted(guest->machine) != NULL,
        aiokvm_vcpu_start(guest->vcpu) == -EOWNERDEAD,
        aiokvm_vcpu_pause(guest->vcpu) == -EOWNERDEAD,
        aiokvm_vcpu_resume(guest->vcpu) == -EOWNERDEAD,
        aiokvm_vcpu_stop(guest->vcpu) == -EOWNERDEAD,
        aiokvm_vcpu_kick(guest->vcpu) == -EOWNERDEAD,
        aiokvm_vcpu_join(guest->vcpu) == -EOWNERDEAD,
        aiokvm_vcpu_reply(guest->vcpu, seq, 1) == -EOWNERDEAD,
        aiokvm_vcpu_skip(guest->vcpu, seq) == -EOWNERDEAD,
        aiokvm_vcpu_data(guest->vcpu) == NULL,
        aiokvm_vcpu_tid(guest->vcpu) == 0,
        (aiokvm_vcpu_stats(guest->vcpu, &stats), stats.exits == 1),
        aiokvm_vcpu_new(guest->machine, 1, -1, NULL, 0, "child", &error) == NULL && error == EOWNERDEAD,
    };
    for (size_t i = 0; i < LENGTH(right); i++)
        if (!right[i])
            return (int)i + 1;
    aiokvm_vcpu_free(guest->vcpu);
    if (aiokvm_machine_free(guest->machine) != 0)
        return 100;
    aiokvm_turn_free(guest->turn);
    return 0;
}

static int in_child(int (*call)(struct guest *, uint32_t), struct guest *guest, uint32_t seq)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child)
        _exit(call(guest, seq));
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static struct guest asking_guest(void)
{
    static const struct fake_step script[] = { IN(0x60, 1) };
    struct guest guest = guest_new(script, LENGTH(script));
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, &ports, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    return guest;
}

TEST(every_call_in_a_child_says_owner_dead)
{
    struct guest guest = asking_guest();
    struct aiokvm_news news = guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(in_child(first_wrong, &guest, news.seq), 0);
    /* And the parent's machine has noticed nothing. */
    CHECK_EQ(aiokvm_vcpu_reply(guest.vcpu, news.seq, 0x42), 1);
    CHECK_SOON(atomic_load(&guest.fake->asleep) > 0);
    CHECK_EQ(guest.fake->reads[0], 0x42);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    guest_close(&guest);
}

TEST(fork_with_news_that_waits)
{
    struct guest guest = asking_guest();
    CHECK(doorbell_rings(guest.machine, PATIENCE_S * 1000));
    CHECK_EQ(in_child(first_wrong, &guest, 1), 0);
    guest_tells(&guest, AIOKVM_VCPU_EXIT);
    guest_close(&guest);
}

static int own_machine(struct guest *inherited, uint32_t seq)
{
    (void)inherited;
    (void)seq;
    int error;
    struct aiokvm_turn *turn = aiokvm_turn_new(&error);
    struct aiokvm_machine *machine = turn ? aiokvm_machine_new(turn, 0, &error) : NULL;
    if (!machine || !aiokvm_machine_alive(machine))
        return 1;
    if (aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, &ports, 1) != 0)
        return 3;
    if (aiokvm_machine_free(machine) != 0)
        return 2;
    aiokvm_turn_free(turn);
    return 0;
}

TEST(a_child_may_have_machines_of_its_own)
{
    struct guest guest = asking_guest();
    guest_tells(&guest, AIOKVM_VCPU_EXIT);
    CHECK_EQ(in_child(own_machine, &guest, 0), 0);
    guest_close(&guest);
}
