#include "guest.h"

#include <errno.h>
#include <poll.h>

struct aiokvm_machine *machine_beside(struct aiokvm_turn *turn, uint32_t id)
{
    int error = -1;
    struct aiokvm_machine *machine = aiokvm_machine_new(turn, id, &error);
    CHECK(machine);
    CHECK_EQ(error, 0);
    return machine;
}

struct aiokvm_machine *machine_open(void)
{
    int error = -1;
    struct aiokvm_turn *turn = aiokvm_turn_new(&error);
    CHECK(turn);
    CHECK_EQ(error, 0);
    return machine_beside(turn, 0);
}

void machine_close(struct aiokvm_machine *machine)
{
    struct aiokvm_turn *turn = machine->turn;
    CHECK_EQ(aiokvm_machine_free(machine), 0);
    aiokvm_turn_free(turn);
}

bool doorbell_rings(struct aiokvm_machine *machine, int timeout_ms)
{
    struct pollfd doorbell = { .fd = aiokvm_turn_doorbell(machine->turn), .events = POLLIN };
    int ready = poll(&doorbell, 1, timeout_ms);
    CHECK(ready >= 0);
    return ready == 1;
}

int take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max)
{
    uint32_t which = UINT32_MAX;
    int error = aiokvm_turn_answer(machine->turn);
    if (error < 0)
        return error;
    int count = max ? aiokvm_serve(machine->turn, 0, news, max, &which) : 0;
    if (count > 0)
        CHECK_EQ(which, machine->id);
    CHECK_EQ(aiokvm_turn_unwatch(machine->turn), 0);
    return count == -EAGAIN ? 0 : count;
}

struct aiokvm_news next_news(struct aiokvm_machine *machine)
{
    struct aiokvm_news news;
    int count;
    do {
        CHECK(doorbell_rings(machine, PATIENCE_S * 1000));
        count = take(machine, &news, 1);
        CHECK(count >= 0);
    } while (!count);
    return news;
}

bool no_news(struct aiokvm_machine *machine)
{
    struct aiokvm_news news;
    return take(machine, &news, 1) == 0;
}

static struct guest new_guest(struct aiokvm_machine *machine, const struct fake_step *script, size_t length)
{
    struct guest guest = { .turn = machine->turn, .machine = machine, .fake = fake_new(script, length) };
    int error = -1;
    guest.vcpu = aiokvm_vcpu_new(guest.machine, 0, guest.fake->fd, guest.fake->run, guest.fake->run_size,
                                 "test:0", &error);
    CHECK(guest.vcpu);
    CHECK_EQ(error, 0);
    return guest;
}

struct guest guest_new(const struct fake_step *script, size_t length)
{
    return new_guest(machine_open(), script, length);
}

struct guest guest_beside(struct guest *other, uint32_t id, const struct fake_step *script, size_t length)
{
    return new_guest(machine_beside(other->machine->turn, id), script, length);
}

struct guest guest_open(const struct fake_step *script, size_t length)
{
    struct guest guest = guest_new(script, length);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    return guest;
}

struct aiokvm_news guest_tells(struct guest *guest, uint32_t state)
{
    struct aiokvm_news news = next_news(guest->machine);
    CHECK_EQ(news.state, state);
    CHECK_EQ(news.vcpu, 0);
    return news;
}

void vcpu_finish(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu)
{
    CHECK_EQ(aiokvm_vcpu_stop(vcpu), 0);
    for (int error; (error = aiokvm_vcpu_join(vcpu)) != 0;) {
        CHECK_EQ(error, -EBUSY);
        next_news(machine);
    }
}

void guest_leave(struct guest *guest)
{
    if (aiokvm_vcpu_tid(guest->vcpu))
        vcpu_finish(guest->machine, guest->vcpu);
    aiokvm_vcpu_free(guest->vcpu);
    CHECK_EQ(aiokvm_machine_free(guest->machine), 0);
    fake_free(guest->fake);
}

void guest_close(struct guest *guest)
{
    guest_leave(guest);
    aiokvm_turn_free(guest->turn);
}
