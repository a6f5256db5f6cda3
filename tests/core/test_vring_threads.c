/* vring.c with the driver on another thread: nothing is lost, doubled or torn, and no wake-up goes missing.
 *
 * Either side sleeps when it has nothing to do, and only the other's notification wakes it. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "check.h"
#include "vring.h"
#include "vring_driver.h"

enum { SIZE = 16, CHAINS = 20000, SLOT = 256, HELD = 5 };
enum { RINGS = 0x1000, DATA = 0x2000, RAM = DATA + SIZE * SLOT };

struct side {
    uint8_t *ram;
    uint64_t features;
    int kick, call;
    struct driver driver;
    struct aiokvm_vring *vring;
};

static void ring(int fd)
{
    CHECK_EQ(eventfd_write(fd, 1), 0);
}

static void sleep_on(int fd)
{
    struct pollfd wait = { .fd = fd, .events = POLLIN };
    eventfd_t rings;
    CHECK_EQ(poll(&wait, 1, PATIENCE_S * 1000), 1);
    CHECK_EQ(eventfd_read(fd, &rings), 0);
}

static uint64_t answer(uint64_t number)
{
    return number * UINT64_C(0x9e3779b97f4a7c15) + 1;
}

/* Completes chains, a few at a time and in any order. */
static void *device(void *argument)
{
    struct side *side = argument;
    struct aiokvm_chain *held[HELD], *chain;
    uint32_t count = 0, done = 0;
    uint64_t random = 3;
    while (done < CHAINS) {
        aiokvm_vring_disable_notify(side->vring);
        while (count < HELD && aiokvm_vring_pop(side->vring, &chain) == 1)
            held[count++] = chain;
        CHECK_EQ(aiokvm_vring_error(side->vring), 0);
        if (!count && !aiokvm_vring_enable_notify(side->vring)) {
            sleep_on(side->kick);
            continue;
        }
        /* Some are kept back, but if there are no others nothing else may come. */
        for (uint32_t n = count ? 1 + random_below(&random, count) : 0; n; n--) {
            uint32_t which = random_below(&random, count);
            chain = held[which];
            held[which] = held[--count];
            CHECK_EQ(chain->readable_bytes, 8);
            CHECK_EQ(chain->writable_bytes, 8);
            uint64_t number, value;
            memcpy(&number, chain->iov[0].iov_base, 8);
            value = answer(number);
            memcpy(chain->iov[chain->readable].iov_base, &value, 8);
            aiokvm_vring_push(side->vring, chain, 8);
            done++;
        }
        if (aiokvm_vring_publish(side->vring))
            ring(side->call);
    }
    return NULL;
}

static void run_driver(struct side *side)
{
    struct driver *driver = &side->driver;
    uint64_t numbers[SIZE], sent = 0, random = 5;
    uint32_t free_slots = (1u << SIZE) - 1, place_of[SIZE] = { 0 }, done = 0, id, written;
    bool indirect = side->features & AIOKVM_VIRTIO_F_INDIRECT_DESC;
    while (done < CHAINS) {
        for (uint32_t n = random_below(&random, SIZE); n && sent < CHAINS && free_slots; n--) {
            uint32_t place = (uint32_t)__builtin_ctz(free_slots);
            uint64_t gpa = DATA + place * SLOT;
            memcpy(side->ram + gpa, &sent, 8);
            struct driver_buffer buffers[] = { { gpa, 8, false }, { gpa + 8, 0, true }, { gpa + 16, 8, true } };
            int added = driver_add(driver, buffers, 3, indirect && random_below(&random, 2) ? gpa + 64 : 0);
            if (added < 0)
                break;
            free_slots &= ~(1u << place);
            place_of[added] = place;
            numbers[place] = sent++;
        }
        if (driver_notifies(driver))
            ring(side->kick);
        driver_disable_interrupt(driver);
        bool some = false;
        while (driver_take(driver, &id, &written)) {
            uint64_t value;
            memcpy(&value, side->ram + DATA + place_of[id] * SLOT + 16, 8);
            CHECK_EQ(written, 8);
            CHECK_EQ(value, answer(numbers[place_of[id]]));
            free_slots |= 1u << place_of[id];
            done++;
            some = true;
        }
        bool waiting = sent == CHAINS || !free_slots || driver->free < 3;
        if (!some && waiting && done < CHAINS && !driver_enable_interrupt(driver))
            sleep_on(side->call);
    }
}

static void run(uint64_t features)
{
    struct side side = { .features = features, .kick = eventfd(0, EFD_CLOEXEC), .call = eventfd(0, EFD_CLOEXEC) };
    side.ram = aligned_alloc(4096, RAM);
    CHECK(side.ram);
    memset(side.ram, 0, RAM);
    struct aiokvm_ram ram = { .size = RAM, .host = side.ram };
    side.vring = aiokvm_vring_new(&ram, 1, SIZE);
    driver_open(&side.driver, side.ram, SIZE, features, RINGS);
    CHECK_EQ(aiokvm_vring_start(side.vring, SIZE, side.driver.desc, side.driver.driver, side.driver.device,
                                features), 0);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, device, &side), 0);
    run_driver(&side);
    pthread_join(thread, NULL);
    aiokvm_vring_free(side.vring);
    free(side.ram);
    close(side.kick);
    close(side.call);
}

static const uint64_t FEATURES[] = {
    0,
    AIOKVM_VIRTIO_F_EVENT_IDX,
    AIOKVM_VIRTIO_F_INDIRECT_DESC,
    AIOKVM_VIRTIO_F_IN_ORDER,
    AIOKVM_VIRTIO_F_EVENT_IDX | AIOKVM_VIRTIO_F_INDIRECT_DESC | AIOKVM_VIRTIO_F_IN_ORDER,
};

TEST(split_with_a_driver_on_another_thread)
{
    for (size_t i = 0; i < LENGTH(FEATURES); i++)
        run(FEATURES[i]);
}

TEST(packed_with_a_driver_on_another_thread)
{
    for (size_t i = 0; i < LENGTH(FEATURES); i++)
        run(FEATURES[i] | AIOKVM_VIRTIO_F_RING_PACKED);
}

struct scribble {
    uint8_t *ram;
    atomic_bool over;
};

/* Writes whatever into the rings; mostly zeros, or no address were ever in RAM. */
static void *vandal(void *argument)
{
    struct scribble *scribble = argument;
    uint64_t random = 9;
    static const uint16_t WORDS[] = { 0, 1, 2, 3, 4, 7, 16, 0x80, 0x100, 0x1000, 0x8000, 0x8080, 0xffff };
    while (!atomic_load(&scribble->over))
        __atomic_store_n((uint16_t *)(scribble->ram + RINGS) + random_below(&random, 512),
                         random_below(&random, 4) ? 0 : WORDS[random_below(&random, LENGTH(WORDS))],
                         __ATOMIC_RELAXED);
    return NULL;
}

TEST(rings_that_change_at_any_moment)
{
    struct scribble scribble = { .ram = aligned_alloc(4096, RAM) };
    CHECK(scribble.ram);
    memset(scribble.ram, 0, RAM);
    struct aiokvm_ram ram = { .size = RAM, .host = scribble.ram };
    struct aiokvm_vring *vring = aiokvm_vring_new(&ram, 1, SIZE);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, vandal, &scribble), 0);
    struct driver areas;
    uint8_t scratch[0x2000];
    uint64_t random = 11;
    uint32_t popped = 0;
    uint64_t deadline = now_ns() + PATIENCE_S * UINT64_C(1000000000);
    for (int round = 0; popped < 2000; round++) {
        if (round % 64 == 0) {
            CHECK(now_ns() < deadline);
            sched_yield();
        }
        uint64_t features = (uint64_t)random_below(&random, 4) << 28 | (uint64_t)random_below(&random, 4) << 34;
        driver_open(&areas, scratch, SIZE, features, RINGS);
        CHECK_EQ(aiokvm_vring_start(vring, SIZE, areas.desc, areas.driver, areas.device, features), 0);
        struct aiokvm_chain *chain;
        for (int i = 0; i < 2 * SIZE && aiokvm_vring_pop(vring, &chain) == 1; i++) {
            popped++;
            CHECK(chain->readable + chain->writable <= SIZE);
            for (uint32_t v = 0; v < chain->readable + chain->writable; v++) {
                const uint8_t *base = chain->iov[v].iov_base;
                CHECK(base >= scribble.ram && chain->iov[v].iov_len <= RAM);
                CHECK(base + chain->iov[v].iov_len <= scribble.ram + RAM);
            }
            if (i % 3)
                aiokvm_vring_push(vring, chain, 1);
            else
                aiokvm_vring_drop(vring, chain);
            aiokvm_vring_publish(vring);
        }
    }
    atomic_store(&scribble.over, true);
    pthread_join(thread, NULL);
    aiokvm_vring_free(vring);
    free(scribble.ram);
}
