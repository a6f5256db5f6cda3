/* exits.c: what is answered without the loop (posted writes, latched reads), and its place in the news. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>

#include "guest.h"

enum { SERIAL = 0x3f8, OTHER = 0x2f8, PLAIN = 0x60 };

static uint32_t latch[AIOKVM_FAST_OFFSETS];
static const struct aiokvm_region ports[] = {
    { .base = PLAIN, .size = 8, .id = 3 },
    { .base = OTHER, .size = 8, .id = 2, .posted = 1 },
    { .base = SERIAL, .size = 16, .id = 1, .posted = 0x7fffff05, .latch = latch },
};

static struct aiokvm_machine *serial_machine(void)
{
    memset(latch, 0, sizeof(latch));
    struct aiokvm_machine *machine = machine_open();
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, ports, LENGTH(ports)), 0);
    return machine;
}

static enum aiokvm_access write_bytes(struct aiokvm_machine *machine, uint64_t port, const char *bytes)
{
    struct aiokvm_region found;
    uint8_t data[16];
    size_t count = strlen(bytes);
    memcpy(data, bytes, count);
    return aiokvm_machine_access(machine, AIOKVM_BUS_PIO, port, true, 1, count, data, &found);
}

static void check_posted(struct aiokvm_machine *machine, const struct aiokvm_news *news, uint32_t region,
                         uint64_t offset, const char *bytes)
{
    CHECK_EQ(news->state, AIOKVM_POSTED);
    CHECK_EQ(news->bus, AIOKVM_BUS_PIO);
    CHECK_EQ(news->region, region);
    CHECK_EQ(news->offset, offset);
    CHECK_EQ(news->size, 1);
    CHECK_EQ(news->is_write, 1);
    CHECK_EQ(news->count, strlen(bytes));
    CHECK(memcmp(aiokvm_machine_posted(machine) + news->value, bytes, news->count) == 0);
}

TEST(runs_of_bytes_to_one_offset_are_one)
{
    struct aiokvm_machine *machine = serial_machine();
    CHECK_EQ(write_bytes(machine, SERIAL, "a"), AIOKVM_DONE);
    CHECK_EQ(write_bytes(machine, SERIAL, "bc"), AIOKVM_DONE);
    CHECK_EQ(write_bytes(machine, SERIAL + 2, "d"), AIOKVM_DONE);
    CHECK_EQ(write_bytes(machine, OTHER, "e"), AIOKVM_DONE);
    CHECK_EQ(write_bytes(machine, SERIAL, "f"), AIOKVM_DONE);
    struct aiokvm_news news[8];
    CHECK_EQ(take(machine, news, LENGTH(news)), 4);
    check_posted(machine, &news[0], 1, 0, "abc");
    check_posted(machine, &news[1], 1, 2, "d");
    check_posted(machine, &news[2], 2, 0, "e");
    check_posted(machine, &news[3], 1, 0, "f");
    CHECK(no_news(machine));
    machine_close(machine);
}

TEST(one_bus_is_not_the_other)
{
    struct aiokvm_machine *machine = serial_machine();
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_MMIO, ports, LENGTH(ports)), 0);
    struct aiokvm_region found;
    uint8_t x = 'x', y = 'y';
    CHECK_EQ(aiokvm_machine_access(machine, AIOKVM_BUS_PIO, SERIAL, true, 1, 1, &x, &found), AIOKVM_DONE);
    CHECK_EQ(aiokvm_machine_access(machine, AIOKVM_BUS_MMIO, SERIAL, true, 1, 1, &y, &found), AIOKVM_DONE);
    struct aiokvm_news news[4];
    CHECK_EQ(take(machine, news, LENGTH(news)), 2);
    check_posted(machine, &news[0], 1, 0, "x");
    CHECK_EQ(news[1].bus, AIOKVM_BUS_MMIO);
    machine_close(machine);
}

TEST(only_bytes_to_the_named_offsets_are_posted)
{
    struct aiokvm_machine *machine = serial_machine();
    struct aiokvm_region found;
    uint8_t data[8] = { 0 };
    CHECK_EQ(write_bytes(machine, SERIAL + 1, "a"), AIOKVM_ASK);
    CHECK_EQ(write_bytes(machine, SERIAL + 7, "a"), AIOKVM_ASK);
    CHECK_EQ(write_bytes(machine, SERIAL + 8, "a"), AIOKVM_ASK);
    CHECK_EQ(write_bytes(machine, PLAIN, "a"), AIOKVM_ASK);
    CHECK_EQ(aiokvm_machine_access(machine, AIOKVM_BUS_PIO, SERIAL, true, 2, 1, data, &found), AIOKVM_ASK);
    CHECK_EQ(found.id, 1);
    CHECK_EQ(aiokvm_machine_access(machine, AIOKVM_BUS_PIO, SERIAL, false, 1, 1, data, &found), AIOKVM_ASK);
    CHECK(no_news(machine));
    CHECK(!doorbell_rings(machine, 0));
    machine_close(machine);
}

TEST(doorbell_is_rung_by_who_posts_into_an_empty_ring)
{
    struct aiokvm_machine *machine = serial_machine();
    eventfd_t rung;
    for (int i = 0; i < 5; i++)
        CHECK_EQ(write_bytes(machine, SERIAL, "a"), AIOKVM_DONE);
    CHECK_EQ(eventfd_read(aiokvm_turn_doorbell(machine->turn), &rung), 0);
    CHECK_EQ(rung, 1);
    struct aiokvm_news news;
    CHECK_EQ(take(machine, &news, 1), 1);
    CHECK(!doorbell_rings(machine, 0));
    CHECK_EQ(write_bytes(machine, SERIAL, "a"), AIOKVM_DONE);
    CHECK(doorbell_rings(machine, 0));
    machine_close(machine);
}

TEST(doorbell_rings_on_while_posts_are_left)
{
    struct aiokvm_machine *machine = serial_machine();
    static const char *const written[] = { "a", "b", "c" };
    for (int i = 0; i < 3; i++)
        CHECK_EQ(write_bytes(machine, i % 2 ? OTHER : SERIAL, written[i]), AIOKVM_DONE);
    for (int i = 0; i < 3; i++) {
        CHECK(doorbell_rings(machine, 0));
        struct aiokvm_news news;
        CHECK_EQ(take(machine, &news, 1), 1);
        check_posted(machine, &news, i % 2 ? 2 : 1, 0, written[i]);
    }
    CHECK(!doorbell_rings(machine, 0));
    machine_close(machine);
}

TEST(full_ring_asks_and_takes_all_of_a_string_or_nothing)
{
    struct aiokvm_machine *machine = serial_machine();
    /* From the middle of the ring, so that it wraps. */
    struct aiokvm_news news[2];
    for (int i = 0; i < AIOKVM_POSTS / 2; i++)
        CHECK_EQ(write_bytes(machine, SERIAL, "-"), AIOKVM_DONE);
    CHECK_EQ(take(machine, news, LENGTH(news)), 1);
    CHECK_EQ(news[0].count, AIOKVM_POSTS / 2);

    for (int i = 0; i < AIOKVM_POSTS - 2; i++)
        CHECK_EQ(write_bytes(machine, SERIAL, i % 2 ? "1" : "0"), AIOKVM_DONE);
    CHECK_EQ(write_bytes(machine, SERIAL, "abc"), AIOKVM_ASK);
    CHECK_EQ(write_bytes(machine, SERIAL, "de"), AIOKVM_DONE);
    CHECK_EQ(write_bytes(machine, SERIAL, "f"), AIOKVM_ASK);
    CHECK_EQ(take(machine, news, LENGTH(news)), 1);
    CHECK_EQ(news[0].count, AIOKVM_POSTS);
    const uint8_t *bytes = aiokvm_machine_posted(machine) + news[0].value;
    for (int i = 0; i < AIOKVM_POSTS - 2; i++)
        CHECK_EQ(bytes[i], i % 2 ? '1' : '0');
    CHECK(memcmp(bytes + AIOKVM_POSTS - 2, "de", 2) == 0);
    CHECK_EQ(write_bytes(machine, SERIAL, "g"), AIOKVM_DONE);
    machine_close(machine);
}

static enum aiokvm_access read_status(struct aiokvm_machine *machine, uint64_t offset, size_t size, size_t count,
                                      uint8_t *data)
{
    struct aiokvm_region found;
    return aiokvm_machine_access(machine, AIOKVM_BUS_PIO, SERIAL + offset, false, size, count, data, &found);
}

TEST(latched_reads_need_no_loop)
{
    struct aiokvm_machine *machine = serial_machine();
    uint8_t data[2] = { 0x11, 0x11 };
    aiokvm_latch_set(latch, 5, 0x60);
    CHECK_EQ(read_status(machine, 5, 1, 1, data), AIOKVM_DONE);
    CHECK_EQ(data[0], 0x60);
    CHECK_EQ(data[1], 0x11);
    /* Not another offset, not another width, not a string, not a write. */
    CHECK_EQ(read_status(machine, 4, 1, 1, data), AIOKVM_ASK);
    CHECK_EQ(read_status(machine, 13, 1, 1, data), AIOKVM_ASK);
    CHECK_EQ(read_status(machine, 5, 2, 1, data), AIOKVM_ASK);
    CHECK_EQ(read_status(machine, 5, 1, 2, data), AIOKVM_ASK);
    CHECK_EQ(write_bytes(machine, SERIAL + 5, "a"), AIOKVM_ASK);
    aiokvm_latch_set(latch, 5, 0);
    CHECK_EQ(read_status(machine, 5, 1, 1, data), AIOKVM_DONE);
    CHECK_EQ(data[0], 0);
    aiokvm_latch_set(latch, 5, -1);
    CHECK_EQ(read_status(machine, 5, 1, 1, data), AIOKVM_ASK);
    aiokvm_latch_set(latch, AIOKVM_FAST_OFFSETS, 1); /* outside: ignored */
    machine_close(machine);
}

/* A vCPU without a thread: the test is its thread. */
static struct aiokvm_vcpu *vcpu_without_thread(struct aiokvm_machine *machine, uint32_t index)
{
    int error;
    struct aiokvm_vcpu *vcpu = aiokvm_vcpu_new(machine, index, -1, NULL, 0, "alone", &error);
    CHECK(vcpu);
    return vcpu;
}

static void tell_parked(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu)
{
    atomic_store(&vcpu->posted_before, atomic_load(&machine->post_head));
    atomic_store(&vcpu->status, ((atomic_load(&vcpu->status) >> 32) + 1) << 32 | AIOKVM_VCPU_PARKED);
    aiokvm_machine_tell(machine, vcpu);
}

TEST(posts_come_in_their_place_among_the_news)
{
    struct aiokvm_machine *machine = serial_machine();
    struct aiokvm_vcpu *a = vcpu_without_thread(machine, 0), *b = vcpu_without_thread(machine, 1);
    write_bytes(machine, SERIAL, "1");
    tell_parked(machine, a);
    write_bytes(machine, SERIAL, "2");
    tell_parked(machine, b);
    write_bytes(machine, SERIAL, "3");
    struct aiokvm_news news[8];
    CHECK_EQ(take(machine, news, LENGTH(news)), 5);
    check_posted(machine, &news[0], 1, 0, "1");
    CHECK_EQ(news[1].vcpu, 0);
    check_posted(machine, &news[2], 1, 0, "2");
    CHECK_EQ(news[3].vcpu, 1);
    check_posted(machine, &news[4], 1, 0, "3");
    CHECK(no_news(machine));
    aiokvm_vcpu_free(a);
    aiokvm_vcpu_free(b);
    machine_close(machine);
}

TEST(order_holds_one_news_at_a_time)
{
    struct aiokvm_machine *machine = serial_machine();
    struct aiokvm_vcpu *vcpu = vcpu_without_thread(machine, 0);
    write_bytes(machine, SERIAL, "1");
    write_bytes(machine, OTHER, "2");
    tell_parked(machine, vcpu);
    write_bytes(machine, SERIAL, "3");
    struct aiokvm_news news = next_news(machine);
    check_posted(machine, &news, 1, 0, "1");
    news = next_news(machine);
    check_posted(machine, &news, 2, 0, "2");
    CHECK_EQ(next_news(machine).state, AIOKVM_VCPU_PARKED);
    news = next_news(machine);
    check_posted(machine, &news, 1, 0, "3");
    CHECK(!doorbell_rings(machine, 0));
    aiokvm_vcpu_free(vcpu);
    machine_close(machine);
}

TEST(a_flood_of_posts_does_not_keep_other_news_back)
{
    struct aiokvm_machine *machine = serial_machine();
    struct aiokvm_vcpu *vcpu = vcpu_without_thread(machine, 0);
    tell_parked(machine, vcpu);
    for (int i = 0; i < 40; i++)
        CHECK_EQ(write_bytes(machine, i % 2 ? OTHER : SERIAL, "x"), AIOKVM_DONE);
    struct aiokvm_news news[4];
    CHECK_EQ(take(machine, news, LENGTH(news)), 4);
    CHECK_EQ(news[0].state, AIOKVM_VCPU_PARKED);
    aiokvm_vcpu_free(vcpu);
    machine_close(machine);
}

/* A vCPU that was resumed before its news was taken may post between the loop's look at the ring and its look
 * at the vCPU. Here its news speaks of a post that the ring does not have yet. */
TEST(news_that_overtook_its_posts_waits_for_them)
{
    struct aiokvm_machine *machine = serial_machine();
    struct aiokvm_vcpu *vcpu = vcpu_without_thread(machine, 0);
    struct aiokvm_news news[4];
    write_bytes(machine, SERIAL, "1");
    tell_parked(machine, vcpu);
    atomic_fetch_add(&vcpu->posted_before, 1);
    CHECK_EQ(take(machine, news, LENGTH(news)), 1);
    check_posted(machine, &news[0], 1, 0, "1");
    CHECK(doorbell_rings(machine, 0));
    write_bytes(machine, SERIAL, "2");
    CHECK_EQ(take(machine, news, LENGTH(news)), 2);
    check_posted(machine, &news[0], 1, 0, "2");
    CHECK_EQ(news[1].state, AIOKVM_VCPU_PARKED);
    CHECK(!doorbell_rings(machine, 0));
    aiokvm_vcpu_free(vcpu);
    machine_close(machine);
}

/* A guest that prints a number's bytes and then asks: what it printed is there when it asks, also if it has
 * been paused and resumed in between while the loop was looking. */
struct printer {
    uint32_t turn;
    uint32_t printed;
};

static void print_or_ask(struct fake *fake, struct fake_step *step)
{
    struct printer *printer = fake->context;
    if (printer->turn++ % 4 == 3) {
        *step = (struct fake_step)STORE(0x1000, 4, printer->printed);
    } else {
        *step = (struct fake_step)OUT(SERIAL, 1, printer->printed & 0xff);
        printer->printed++;
    }
}

TEST(posts_come_before_the_exit_that_follows_whatever_is_paused)
{
    static const struct aiokvm_region memory = { .base = 0x1000, .size = 4, .id = 9 };
    struct printer printer = { 0 };
    struct guest guest = guest_new(NULL, 0);
    guest.fake->next = print_or_ask;
    guest.fake->context = &printer;
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_PIO, ports, LENGTH(ports)), 0);
    CHECK_EQ(aiokvm_machine_publish(guest.machine, AIOKVM_BUS_MMIO, &memory, 1), 0);
    CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), 0);
    uint32_t seen = 0;
    for (int asked = 0; asked < 3000;) {
        if (asked % 2) {
            CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
            CHECK_EQ(aiokvm_vcpu_resume(guest.vcpu), 0);
        }
        CHECK(doorbell_rings(guest.machine, PATIENCE_S * 1000));
        struct aiokvm_news news[4];
        int count = take(guest.machine, news, LENGTH(news));
        for (int i = 0; i < count; i++) {
            if (news[i].state == AIOKVM_POSTED) {
                const uint8_t *bytes = aiokvm_machine_posted(guest.machine) + news[i].value;
                for (uint32_t j = 0; j < news[i].count; j++)
                    CHECK_EQ(bytes[j], seen++ & 0xff);
            } else if (news[i].state == AIOKVM_VCPU_EXIT) {
                CHECK_EQ(news[i].value, seen);
                CHECK_EQ(aiokvm_vcpu_skip(guest.vcpu, news[i].seq), 1);
                asked++;
            }
        }
    }
    guest_close(&guest);
}

/* Several vCPUs post at once: nothing is lost, and each one's bytes stay in order. */
enum { POSTERS = 4, BYTES = 30000 };

struct poster {
    struct aiokvm_machine *machine;
    uint32_t index;
};

static void *post_bytes(void *argument)
{
    struct poster *poster = argument;
    struct aiokvm_machine *machine = poster->machine;
    struct aiokvm_region found;
    for (uint32_t i = 0; i < BYTES; i++) {
        uint8_t byte = (uint8_t)i;
        while (aiokvm_machine_access(machine, AIOKVM_BUS_PIO, poster->index, true, 1, 1, &byte, &found) != AIOKVM_DONE)
            sched_yield();
    }
    return NULL;
}

TEST(concurrent_posts_are_all_there)
{
    struct aiokvm_machine *machine = machine_open();
    const struct aiokvm_region all = { .base = 0, .size = 8, .id = 1, .posted = 0xff };
    CHECK_EQ(aiokvm_machine_publish(machine, AIOKVM_BUS_PIO, &all, 1), 0);
    struct poster posters[POSTERS];
    pthread_t threads[POSTERS];
    for (uint32_t i = 0; i < POSTERS; i++) {
        posters[i] = (struct poster){ machine, i };
        CHECK_EQ(pthread_create(&threads[i], NULL, post_bytes, &posters[i]), 0);
    }
    uint32_t seen[POSTERS] = { 0 };
    for (uint32_t total = 0; total < POSTERS * BYTES;) {
        CHECK(doorbell_rings(machine, PATIENCE_S * 1000));
        struct aiokvm_news news[7];
        int count = take(machine, news, LENGTH(news));
        for (int i = 0; i < count; i++) {
            const uint8_t *bytes = aiokvm_machine_posted(machine) + news[i].value;
            for (uint32_t j = 0; j < news[i].count; j++)
                CHECK_EQ(bytes[j], seen[news[i].offset]++ & 0xff);
            total += news[i].count;
        }
    }
    for (uint32_t i = 0; i < POSTERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK_EQ(seen[i], BYTES);
    }
    CHECK(no_news(machine));
    machine_close(machine);
}
