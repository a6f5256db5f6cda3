#include "guest.h"

#include <errno.h>
#include <poll.h>

struct aiokvm_machine *machine_open(void)
{
    int error = -1;
    struct aiokvm_machine *machine = aiokvm_machine_new(&error);
    CHECK(machine);
    CHECK_EQ(error, 0);
    return machine;
}

bool doorbell_rings(struct aiokvm_machine *machine, int timeout_ms)
{
    struct pollfd doorbell = { .fd = aiokvm_machine_doorbell(machine), .events = POLLIN };
    int ready = poll(&doorbell, 1, timeout_ms);
    CHECK(ready >= 0);
    return ready == 1;
}

int take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max)
{
    int error = aiokvm_machine_answer(machine);
    if (error < 0)
        return error;
    int count = aiokvm_machine_take(machine, news, max);
    CHECK_EQ(aiokvm_machine_unwatch(machine), 0);
    return count;
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

struct guest guest_new(const struct fake_step *script, size_t length)
{
    struct guest guest = { .machine = machine_open(), .fake = fake_new(script, length) };
    int error = -1;
    guest.vcpu = aiokvm_vcpu_new(guest.machine, 0, guest.fake->fd, guest.fake->run, guest.fake->run_size,
                                 "test:0", &error);
    CHECK(guest.vcpu);
    CHECK_EQ(error, 0);
    return guest;
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

void guest_close(struct guest *guest)
{
    if (aiokvm_vcpu_tid(guest->vcpu))
        vcpu_finish(guest->machine, guest->vcpu);
    aiokvm_vcpu_free(guest->vcpu);
    CHECK_EQ(aiokvm_machine_free(guest->machine), 0);
    fake_free(guest->fake);
}
