/* All at once: vCPUs that post, ask, fail and read at random, and a loop that answers, pauses, resumes,
 * kicks, stops, frees and publishes at random. Nothing is lost, doubled, out of order, or read by two sides at once.
 *
 * The loop sleeps on the doorbell alone: a wake-up that is lost ends the test. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "guest.h"

enum { VCPUS = 4, LIVES = 500, STEPS = 1200 };
enum { LOG, STATUS, ASK }; /* offsets in a vCPU's ports: posted or not, latched or not, neither */
enum { PORTS = 0x100, UNCLAIMED = 0x9000, GPA = 0x10000, LATCHED_VALUE = 0x55 };

/* One vCPU from its creation to its end. */
struct life {
    struct aiokvm_vcpu *vcpu;
    struct fake *fake;
    uint32_t index;

    /* The guest's; the loop looks when it is parked or joined. */
    uint64_t random;
    uint32_t steps;
    uint32_t logged;   /* bytes, each its own number */
    uint32_t asked;    /* exits that only the loop can answer */
    bool in_two_parts;
    uint8_t bytes[8];
    uint64_t registers;

    /* The loop's. */
    uint32_t seen_logged, seen_asked;
    bool pausing, parked, stopping, ended;
};

struct stress {
    struct aiokvm_machine *machine;
    struct life *lives[VCPUS];
    uint32_t born;
    uint32_t *latches;
    uint64_t random;
    uint64_t parked, stopped, posted, replied;
};

static uint64_t answer(const struct life *life, uint64_t offset)
{
    return (offset << 32 | life->index << 16) * UINT64_C(0x9e3779b97f4a7c15);
}

/* ---- the guest ---- */

static struct fake_step ask_memory(struct life *life, bool is_write)
{
    uint32_t number = life->asked++;
    return (struct fake_step){
        .op = FAKE_MMIO, .is_write = is_write, .size = 8, .value = number,
        .address = (uint64_t)GPA * (life->index + 1) + number % 512 * 8,
    };
}

static void next_step(struct fake *fake, struct fake_step *step)
{
    struct life *life = fake->context;
    uint32_t ports = PORTS * (life->index + 1);
    life->registers++;
    if (life->in_two_parts) {
        life->in_two_parts = false;
        *step = ask_memory(life, false);
        return;
    }
    if (!life->steps)
        return; /* FAKE_HALT */
    if (!--life->steps) {
        life->asked++;
        *step = (struct fake_step){ .op = FAKE_EXIT, .reason = KVM_EXIT_SHUTDOWN };
        return;
    }
    switch (random_below(&life->random, 12)) {
    case 0: case 1: case 2: case 3:
        *step = (struct fake_step)OUT(ports + LOG, 1, life->logged++ & 0xff);
        break;
    case 4: {
        uint32_t count = 2 + random_below(&life->random, 6);
        for (uint32_t i = 0; i < count; i++)
            life->bytes[i] = (uint8_t)life->logged++;
        *step = (struct fake_step){
            .op = FAKE_IO, .is_write = true, .address = ports + LOG, .size = 1, .count = count,
            .bytes = life->bytes,
        };
        break;
    }
    case 5:
        *step = ask_memory(life, false);
        break;
    case 6:
        *step = ask_memory(life, false);
        step->and_next = life->in_two_parts = true;
        break;
    case 7:
        *step = ask_memory(life, true);
        break;
    case 8:
        *step = (struct fake_step)IN(ports + STATUS, 1);
        break;
    case 9:
        *step = (struct fake_step)IN(UNCLAIMED, 4);
        break;
    case 10:
        life->asked++;
        *step = (struct fake_step){ .op = FAKE_ERROR, .error = EFAULT };
        break;
    default:
        life->asked++;
        *step = (struct fake_step)OUT(ports + ASK, 2, 0x1234);
    }
}

static void check_step(struct fake *fake, const struct fake_step *step, const uint8_t *data)
{
    const struct life *life = fake->context;
    uint64_t value = 0;
    if (step->is_write || step->op == FAKE_EXIT)
        return;
    memcpy(&value, data, step->size);
    if (step->op == FAKE_MMIO)
        CHECK_EQ(value, answer(life, step->address % GPA));
    else
        CHECK_EQ(value, step->address == UNCLAIMED ? UINT32_MAX : LATCHED_VALUE);
}

/* ---- the loop ---- */

static void publish(struct stress *stress)
{
    struct aiokvm_region ports[2 * VCPUS], memory[2 * VCPUS];
    size_t port_count = 0, memory_count = 0;
    uint32_t *latches = calloc(VCPUS * AIOKVM_FAST_OFFSETS, sizeof(*latches));
    CHECK(latches);
    for (uint32_t i = 0; i < VCPUS; i++) {
        uint32_t *latch = random_below(&stress->random, 3) ? &latches[i * AIOKVM_FAST_OFFSETS] : NULL;
        if (latch)
            aiokvm_latch_set(latch, STATUS, random_below(&stress->random, 2) ? LATCHED_VALUE : -1);
        ports[port_count++] = (struct aiokvm_region){
            .base = PORTS * (i + 1), .size = 8, .id = i + 1, .latch = latch,
            .posted = random_below(&stress->random, 4) ? 1 << LOG : 0,
        };
        memory[memory_count++] = (struct aiokvm_region){
            .base = (uint64_t)GPA * (i + 1), .size = 0x1000, .id = 100 + i,
        };
        /* What nobody uses, so that the others change their places. */
        struct aiokvm_region filler = { .size = 1 + random_below(&stress->random, 16), .id = 999 };
        if (random_below(&stress->random, 2)) {
            filler.base = PORTS * (i + 1) + 0x80;
            ports[port_count++] = filler;
        }
        if (random_below(&stress->random, 2)) {
            filler.base = (uint64_t)GPA * (i + 1) + 0x2000;
            memory[memory_count++] = filler;
        }
    }
    CHECK_EQ(aiokvm_machine_publish(stress->machine, AIOKVM_BUS_PIO, ports, port_count), 0);
    CHECK_EQ(aiokvm_machine_publish(stress->machine, AIOKVM_BUS_MMIO, memory, memory_count), 0);
    free(stress->latches);
    stress->latches = latches;
}

static void begin_life(struct stress *stress, uint32_t index)
{
    struct life *life = calloc(1, sizeof(*life));
    CHECK(life);
    stress->born++;
    life->index = index;
    life->random = stress->born * UINT64_C(0x9e3779b97f4a7c15);
    life->steps = 1 + random_below(&stress->random, STEPS);
    struct fake *fake = life->fake = fake_new(NULL, 0);
    fake->next = next_step;
    fake->finished = check_step;
    fake->context = life;
    int error;
    life->vcpu = aiokvm_vcpu_new(stress->machine, index, fake->fd, fake->run, fake->run_size, "stress", &error);
    CHECK(life->vcpu);
    CHECK_EQ(aiokvm_vcpu_resume(life->vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(life->vcpu), 0);
    stress->lives[index] = life;
}

static void end_life(struct stress *stress, struct life *life)
{
    CHECK(life->stopping);
    CHECK_EQ(aiokvm_vcpu_join(life->vcpu), 0);
    if (life->ended) {
        CHECK_EQ(life->steps, 0);
        CHECK_EQ(life->seen_logged, life->logged);
        CHECK_EQ(life->seen_asked, life->asked);
    } else {
        /* It may have been stopped while it asked: an exit, or bytes that could not be posted. */
        uint32_t unseen_log = life->logged - life->seen_logged, unseen_asked = life->asked - life->seen_asked;
        CHECK(unseen_asked <= 1 && unseen_log <= sizeof(life->bytes) && !(unseen_asked && unseen_log));
    }
    aiokvm_vcpu_free(life->vcpu);
    fake_free(life->fake);
    stress->lives[life->index] = NULL;
    stress->stopped++;
    uint32_t index = life->index;
    free(life);
    if (stress->born < LIVES)
        begin_life(stress, index);
}

static void stop(struct life *life)
{
    life->stopping = true;
    CHECK_EQ(aiokvm_vcpu_stop(life->vcpu), 0);
}

static void check_log(struct life *life, const uint8_t *bytes, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        CHECK_EQ(bytes[i], life->seen_logged++ & 0xff);
}

static void on_exit_news(struct stress *stress, struct life *life, const struct aiokvm_news *news)
{
    CHECK(!life->parked);
    if (news->error) {
        CHECK_EQ(news->error, EFAULT);
        life->seen_asked++;
    } else if (news->reason == KVM_EXIT_SHUTDOWN) {
        life->seen_asked++;
        life->ended = true;
        stop(life);
        return;
    } else if (news->bus == AIOKVM_BUS_PIO) {
        CHECK_EQ(news->region, life->index + 1);
        if (news->offset == LOG)
            check_log(life, aiokvm_vcpu_data(life->vcpu), news->count);
        else if (news->offset == ASK)
            life->seen_asked++;
    } else {
        CHECK_EQ(news->region, 100 + life->index);
        CHECK_EQ(news->offset, life->seen_asked % 512 * 8);
        if (news->is_write)
            CHECK_EQ(news->value, life->seen_asked);
        life->seen_asked++;
    }
    uint64_t value = news->bus == AIOKVM_BUS_PIO ? LATCHED_VALUE : answer(life, news->offset);
    int heard = news->is_write || news->error ? aiokvm_vcpu_skip(life->vcpu, news->seq)
                                              : aiokvm_vcpu_reply(life->vcpu, news->seq, value);
    CHECK(heard == 1 || life->stopping);
    stress->replied += (uint64_t)heard;
}

static void on_news(struct stress *stress, const struct aiokvm_news *news)
{
    if (news->state == AIOKVM_POSTED) {
        struct life *writer = stress->lives[news->region - 1];
        CHECK(writer);
        CHECK_EQ(news->offset, LOG);
        check_log(writer, aiokvm_machine_posted(stress->machine) + news->value, news->count);
        stress->posted += news->count;
        return;
    }
    struct life *life = stress->lives[news->vcpu];
    CHECK(life);
    if (news->state == AIOKVM_VCPU_EXIT) {
        on_exit_news(stress, life, news);
    } else if (news->state == AIOKVM_VCPU_STOPPED) {
        end_life(stress, life);
    } else if (news->state == AIOKVM_VCPU_PARKED && life->pausing && !life->stopping) {
        life->parked = true;
        life->registers++;
        stress->parked++;
    }
}

static void resume(struct life *life)
{
    life->pausing = life->parked = false;
    CHECK_EQ(aiokvm_vcpu_resume(life->vcpu), 0);
}

static void interfere(struct stress *stress)
{
    struct life *life = stress->lives[random_below(&stress->random, VCPUS)];
    if (!life)
        return;
    switch (random_below(&stress->random, 12)) {
    case 0: case 1: case 2:
        life->pausing = true;
        CHECK_EQ(aiokvm_vcpu_pause(life->vcpu), 0);
        break;
    case 3: case 4: case 5: case 6:
        resume(life);
        break;
    case 7:
        CHECK_EQ(aiokvm_vcpu_kick(life->vcpu), 0);
        break;
    case 8:
        publish(stress);
        break;
    case 9:
        aiokvm_latch_set(stress->latches, STATUS, random_below(&stress->random, 2) ? LATCHED_VALUE : -1);
        break;
    case 10:
        if (random_below(&stress->random, 40) == 0)
            stop(life);
        break;
    default:
        /* A parked one is the loop's own. */
        if (life->parked && !life->stopping)
            life->registers++;
    }
}

/* The vCPU whose answer is to be waited for; all of them parked would be silent. */
static void keep_one_running(struct stress *stress)
{
    struct life *silent = NULL;
    for (int i = 0; i < VCPUS; i++) {
        struct life *life = stress->lives[i];
        if (life && (!life->parked || life->stopping))
            return;
        silent = life ? life : silent;
    }
    CHECK(silent);
    resume(silent);
}

TEST(nothing_is_lost_whatever_comes_together)
{
    struct stress stress = { .machine = machine_open(), .random = 7 };
    publish(&stress);
    for (uint32_t i = 0; i < VCPUS; i++)
        begin_life(&stress, i);
    while (stress.stopped < LIVES) {
        for (uint32_t n = random_below(&stress.random, 3); n; n--)
            interfere(&stress);
        keep_one_running(&stress);
        CHECK(doorbell_rings(stress.machine, PATIENCE_S * 1000));
        struct aiokvm_news news[8];
        int count = take(stress.machine, news, 1 + random_below(&stress.random, LENGTH(news)));
        for (int i = 0; i < count; i++)
            on_news(&stress, &news[i]);
    }
    CHECK(no_news(stress.machine));
    machine_close(stress.machine);
    free(stress.latches);
    /* It was about something. */
    CHECK(stress.parked > 100 && stress.posted > 1000 && stress.replied > 1000);
}
