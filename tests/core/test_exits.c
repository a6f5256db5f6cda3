/* exits.c: the table of the claimed addresses, the stack of vCPUs with news, and the doorbell. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "guest.h"

static const uint64_t top = UINT64_MAX;

static enum aiokvm_access look_up(struct aiokvm_machine *machine, unsigned bus, uint64_t address,
                                  struct aiokvm_region *found)
{
    uint8_t data[8] = { 0 };
    return aiokvm_machine_access(machine, bus, address, false, 4, 1, data, found);
}

TEST(empty_bus_claims_nothing)
{
    struct aiokvm_machine *machine = machine_open();
    struct aiokvm_region found;
    CHECK_EQ(look_up(machine, AIOKVM_BUS_PIO, 0, &found), AIOKVM_UNCLAIMED);
    CHECK_EQ(look_up(machine, AIOKVM_BUS_MMIO, top, &found), AIOKVM_UNCLAIMED);
    machine_close(machine);
}

TEST(publish_refuses_what_is_not_sorted_or_overlaps)
{
    static const struct aiokvm_region refused[][2] = {
        { { .base = 16, .size = 4 }, { .base = 8, .size = 4 } },
        { { .base = 16, .size = 4 }, { .base = 19, .size = 4 } },
        { { .base = 16, .size = 4 }, { .base = 16, .size = 4 } },
        { { .base = 16, .size = 4 }, { .base = 17, .size = 0 } },
        { { .base = 16, .size = UINT64_MAX }, { .base = 100, .size = 4 } },
        { { .base = UINT64_MAX, .size = 1 }, { .base = 0, .size = 1 } },
    };
    struct aiokvm_machine *machine = machine_open();
    const struct aiokvm_region old = { .base = 0x100, .size = 1, .id = 5 };
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, &old, 1), 0);
    for (size_t i = 0; i < LENGTH(refused); i++)
        CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, refused[i], 2), -EINVAL);
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUSES, &old, 1), -EINVAL);
    /* What was there stays. */
    struct aiokvm_region found;
    CHECK_EQ(look_up(machine, AIOKVM_BUS_PIO, 0x100, &found), AIOKVM_ASK);
    CHECK_EQ(found.id, 5);
    machine_close(machine);
}

TEST(regions_may_touch_and_reach_the_top)
{
    static const struct aiokvm_region regions[] = {
        { .base = 0, .size = 1, .id = 1 },
        { .base = 1, .size = 15, .id = 2 },
        { .base = 16, .size = 0, .id = 3 },
        { .base = 16, .size = 1, .id = 4 },
        { .base = UINT64_MAX, .size = 1, .id = 5 },
    };
    struct aiokvm_machine *machine = machine_open();
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, regions, LENGTH(regions)), 0);
    static const struct { uint64_t address; uint32_t id; } expected[] = {
        { 0, 1 }, { 1, 2 }, { 15, 2 }, { 16, 4 }, { 17, 0 }, { UINT64_MAX - 1, 0 }, { UINT64_MAX, 5 },
    };
    for (size_t i = 0; i < LENGTH(expected); i++) {
        struct aiokvm_region found = { 0 };
        enum aiokvm_access access = look_up(machine, AIOKVM_BUS_MMIO, expected[i].address, &found);
        CHECK_EQ(access, expected[i].id ? AIOKVM_ASK : AIOKVM_UNCLAIMED);
        CHECK_EQ(found.id, expected[i].id);
    }
    machine_close(machine);
}

TEST(buses_do_not_mix_and_publish_replaces)
{
    struct aiokvm_machine *machine = machine_open();
    const struct aiokvm_region ports = { .base = 0x60, .size = 1, .id = 1 };
    const struct aiokvm_region memory = { .base = 0x60, .size = 1, .id = 2 };
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, &ports, 1), 0);
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, &memory, 1), 0);
    struct aiokvm_region found;
    CHECK_EQ(look_up(machine, AIOKVM_BUS_PIO, 0x60, &found), AIOKVM_ASK);
    CHECK_EQ(found.id, 1);
    CHECK_EQ(look_up(machine, AIOKVM_BUS_MMIO, 0x60, &found), AIOKVM_ASK);
    CHECK_EQ(found.id, 2);
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, NULL, 0), 0);
    CHECK_EQ(look_up(machine, AIOKVM_BUS_PIO, 0x60, &found), AIOKVM_UNCLAIMED);
    CHECK_EQ(look_up(machine, AIOKVM_BUS_MMIO, 0x60, &found), AIOKVM_ASK);
    machine_close(machine);
}

TEST(look_ups_agree_with_a_linear_search)
{
    struct aiokvm_machine *machine = machine_open();
    uint64_t state = 3;
    for (int round = 0; round < 300; round++) {
        struct aiokvm_region regions[64];
        size_t count = random_below(&state, LENGTH(regions) + 1);
        uint64_t address = round % 3 ? 0 : UINT64_MAX - 2000; /* the last ones may end past the top */
        size_t used = 0;
        while (used < count) {
            uint64_t base = address + random_below(&state, 20), size = random_below(&state, 30);
            if (base < address)
                break;
            regions[used] = (struct aiokvm_region){ .base = base, .size = size, .id = (uint32_t)used + 1 };
            used++;
            if (base + size < base)
                break;
            address = base + size;
        }
        CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, regions, used), 0);
        for (int i = 0; i < 300; i++) {
            uint64_t wanted = (round % 3 ? 0 : UINT64_MAX - 2100) + random_below(&state, 2101);
            uint32_t expected = 0;
            for (size_t j = 0; j < used; j++)
                if (wanted >= regions[j].base && wanted - regions[j].base < regions[j].size)
                    expected = regions[j].id;
            struct aiokvm_region found = { 0 };
            enum aiokvm_access access = look_up(machine, AIOKVM_BUS_MMIO, wanted, &found);
            CHECK_EQ(access, expected ? AIOKVM_ASK : AIOKVM_UNCLAIMED);
            CHECK_EQ(found.id, expected);
        }
    }
    machine_close(machine);
}

/* vCPUs without a thread: the test is their thread. */
enum { CROWD = 8 };

struct crowd {
    struct aiokvm_machine *machine;
    struct aiokvm_vcpu *vcpus[CROWD];
};

static struct crowd crowd_new(void)
{
    struct crowd crowd = { .machine = machine_open() };
    for (uint32_t i = 0; i < CROWD; i++) {
        int error;
        crowd.vcpus[i] = aiokvm_vcpu_new(crowd.machine, i, -1, NULL, 0, "crowd", &error);
        CHECK(crowd.vcpus[i]);
    }
    return crowd;
}

static void crowd_free(struct crowd *crowd)
{
    for (uint32_t i = 0; i < CROWD; i++)
        if (crowd->vcpus[i])
            aiokvm_vcpu_free(crowd->vcpus[i]);
    machine_close(crowd->machine);
}

static void tell_parked(struct crowd *crowd, uint32_t index)
{
    uint64_t seq = (atomic_load(&crowd->vcpus[index]->status) >> 32) + 1;
    atomic_store(&crowd->vcpus[index]->status, seq << 32 | AIOKVM_VCPU_PARKED);
    aiokvm_machine_tell(crowd->machine, crowd->vcpus[index]);
}

static void check_taken(struct crowd *crowd, size_t max, const char *indices)
{
    struct aiokvm_news news[CROWD];
    int count = take(crowd->machine, news, max);
    CHECK_EQ(count, strlen(indices));
    for (int i = 0; i < count; i++) {
        CHECK_EQ(news[i].vcpu, indices[i] - '0');
        CHECK_EQ(news[i].state, AIOKVM_VCPU_PARKED);
    }
}

TEST(news_comes_oldest_first_and_once)
{
    struct crowd crowd = crowd_new();
    tell_parked(&crowd, 3);
    tell_parked(&crowd, 0);
    tell_parked(&crowd, 5);
    check_taken(&crowd, CROWD, "305");
    check_taken(&crowd, CROWD, "");
    crowd_free(&crowd);
}

TEST(news_of_one_vcpu_is_its_newest)
{
    struct crowd crowd = crowd_new();
    tell_parked(&crowd, 2);
    tell_parked(&crowd, 2);
    tell_parked(&crowd, 2);
    struct aiokvm_news news[2];
    CHECK_EQ(take(crowd.machine, news, 2), 1);
    CHECK_EQ(news[0].seq, 3);
    CHECK_EQ(take(crowd.machine, news, 2), 0);
    crowd_free(&crowd);
}

TEST(doorbell_is_rung_once_for_many)
{
    struct crowd crowd = crowd_new();
    int doorbell = aiokvm_turn_doorbell(crowd.machine->turn);
    eventfd_t rung;
    CHECK(!doorbell_rings(crowd.machine, 0));
    for (uint32_t i = 0; i < CROWD; i++)
        tell_parked(&crowd, i);
    CHECK(doorbell_rings(crowd.machine, 0));
    CHECK_EQ(eventfd_read(doorbell, &rung), 0);
    CHECK_EQ(rung, 1);
    check_taken(&crowd, CROWD, "01234567");
    CHECK(!doorbell_rings(crowd.machine, 0));
    tell_parked(&crowd, 1);
    CHECK(doorbell_rings(crowd.machine, 0));
    check_taken(&crowd, CROWD, "1");
    CHECK(!doorbell_rings(crowd.machine, 0));
    crowd_free(&crowd);
}

TEST(doorbell_rings_on_while_news_is_left)
{
    struct crowd crowd = crowd_new();
    for (uint32_t i = 0; i < 5; i++)
        tell_parked(&crowd, i);
    check_taken(&crowd, 0, "");
    CHECK(doorbell_rings(crowd.machine, 0));
    check_taken(&crowd, 2, "01");
    CHECK(doorbell_rings(crowd.machine, 0));
    check_taken(&crowd, 2, "23");
    CHECK(doorbell_rings(crowd.machine, 0));
    check_taken(&crowd, 2, "4");
    CHECK(!doorbell_rings(crowd.machine, 0));
    crowd_free(&crowd);
}

/* The doorbell is emptied for what was left over and for what has come since, at once. */
TEST(news_that_comes_while_some_is_left_is_not_forgotten)
{
    struct crowd crowd = crowd_new();
    tell_parked(&crowd, 0);
    tell_parked(&crowd, 1);
    check_taken(&crowd, 1, "0");
    tell_parked(&crowd, 2);
    struct aiokvm_news news[CROWD];
    int count = 0;
    while (doorbell_rings(crowd.machine, 0)) {
        int more = take(crowd.machine, news + count, CROWD - (size_t)count);
        CHECK(more > 0);
        count += more;
    }
    CHECK_EQ(count, 2);
    CHECK_EQ(news[0].vcpu, 1);
    CHECK_EQ(news[1].vcpu, 2);
    crowd_free(&crowd);
}

TEST(no_vcpu_overtakes_another_for_ever)
{
    struct crowd crowd = crowd_new();
    uint32_t turns[CROWD] = { 0 };
    for (uint32_t i = 0; i < CROWD; i++)
        tell_parked(&crowd, i);
    for (int i = 0; i < 10 * CROWD; i++) {
        struct aiokvm_news news;
        CHECK_EQ(take(crowd.machine, &news, 1), 1);
        turns[news.vcpu]++;
        tell_parked(&crowd, news.vcpu);
    }
    for (uint32_t i = 0; i < CROWD; i++)
        CHECK_EQ(turns[i], 10);
    crowd_free(&crowd);
}

TEST(freed_vcpu_is_forgotten_wherever_its_news_waits)
{
    struct crowd crowd = crowd_new();
    for (uint32_t i = 0; i < 4; i++)
        tell_parked(&crowd, i);
    check_taken(&crowd, 1, "0");
    tell_parked(&crowd, 4);
    tell_parked(&crowd, 5);
    tell_parked(&crowd, 6);
    static const uint32_t freed[] = { 0, 1, 3, 5 };
    for (size_t i = 0; i < LENGTH(freed); i++) {
        aiokvm_vcpu_free(crowd.vcpus[freed[i]]);
        crowd.vcpus[freed[i]] = NULL;
    }
    CHECK(doorbell_rings(crowd.machine, 0));
    check_taken(&crowd, CROWD, "246");
    tell_parked(&crowd, 7);
    CHECK(doorbell_rings(crowd.machine, 0));
    check_taken(&crowd, CROWD, "7");
    crowd_free(&crowd);
}

/* A loop that sleeps whenever the doorbell is silent hears of everything that threads tell. */
enum { TELLS = 20000 };

static void *tell_often(void *argument)
{
    struct aiokvm_vcpu *vcpu = argument;
    for (uint64_t seq = 1; seq <= TELLS; seq++) {
        atomic_store(&vcpu->status, seq << 32 | AIOKVM_VCPU_PARKED);
        aiokvm_machine_tell(vcpu->machine, vcpu);
        if (seq % 64 == 0)
            sched_yield();
    }
    return NULL;
}

TEST(no_wake_up_is_lost)
{
    for (size_t max = 1; max <= CROWD; max *= 2) {
        struct crowd crowd = crowd_new();
        pthread_t threads[CROWD];
        for (uint32_t i = 0; i < CROWD; i++)
            CHECK_EQ(pthread_create(&threads[i], NULL, tell_often, crowd.vcpus[i]), 0);
        uint32_t seq[CROWD] = { 0 };
        for (int left = CROWD; left;) {
            CHECK(doorbell_rings(crowd.machine, PATIENCE_S * 1000));
            struct aiokvm_news news[CROWD];
            int count = take(crowd.machine, news, max);
            for (int i = 0; i < count; i++) {
                CHECK(news[i].seq > seq[news[i].vcpu]);
                seq[news[i].vcpu] = news[i].seq;
                left -= news[i].seq == TELLS;
            }
        }
        for (uint32_t i = 0; i < CROWD; i++)
            pthread_join(threads[i], NULL);
        crowd_free(&crowd);
    }
}

/* vCPUs that do nothing but look up and post hold the table's lock all the time, one or another. */
struct hammer {
    struct aiokvm_machine *machine;
    _Atomic bool end;
    _Atomic uint64_t accesses;
};

static void *hammer(void *argument)
{
    struct hammer *hammer = argument;
    while (!atomic_load(&hammer->end)) {
        uint8_t data = 1;
        struct aiokvm_region found;
        aiokvm_machine_access(hammer->machine, AIOKVM_BUS_PIO, 0x3f8, true, 1, 1, &data, &found);
        atomic_fetch_add_explicit(&hammer->accesses, 1, memory_order_relaxed);
    }
    return NULL;
}

TEST(publish_gets_through_a_crowd)
{
    struct hammer state = { .machine = machine_open() };
    const struct aiokvm_region serial = { .base = 0x3f8, .size = 8, .posted = 1 };
    CHECK_EQ(aiokvm_machine_publish(state.machine, AIOKVM_BUS_PIO, &serial, 1), 0);
    pthread_t threads[CROWD];
    for (int i = 0; i < CROWD; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, hammer, &state), 0);
    CHECK_SOON(atomic_load(&state.accesses) > 1000);
    uint64_t longest = 0;
    for (int i = 0; i < 50; i++) {
        uint64_t begin = now_ns();
        CHECK_EQ(aiokvm_machine_publish(state.machine, AIOKVM_BUS_PIO, &serial, 1), 0);
        uint64_t took = now_ns() - begin;
        longest = took > longest ? took : longest;
    }
    atomic_store(&state.end, true);
    for (int i = 0; i < CROWD; i++)
        pthread_join(threads[i], NULL);
    CHECK(longest < UINT64_C(1000000000));
    machine_close(state.machine);
}
