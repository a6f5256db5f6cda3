/* vring.c, from one thread: both layouts, all features, the pool. */
#include <stdlib.h>
#include <linux/virtio_ring.h>
#include <string.h>

#include "check.h"
#include "vring.h"
#include "vring_driver.h"

enum { RAM = 1 << 16, RINGS = 0x1000, DATA = 0x4000, TABLES = 0x8000, SIZE = 8 };

static const uint64_t LAYOUTS[] = { 0, AIOKVM_VIRTIO_F_RING_PACKED };
static const uint64_t EVENTS[] = { 0, AIOKVM_VIRTIO_F_EVENT_IDX };
static const uint64_t ORDERS[] = { 0, AIOKVM_VIRTIO_F_IN_ORDER };

struct pair {
    uint8_t *ram;
    struct aiokvm_vring *vring;
    struct driver driver;
};

static void start(struct pair *pair, uint32_t size, uint64_t features)
{
    driver_open(&pair->driver, pair->ram, size, features, RINGS);
    CHECK_EQ(aiokvm_vring_start(pair->vring, size, pair->driver.desc, pair->driver.driver, pair->driver.device,
                                features), 0);
}

static void open_pair(struct pair *pair, uint32_t size, uint64_t features)
{
    pair->ram = aligned_alloc(4096, RAM);
    CHECK(pair->ram);
    memset(pair->ram, 0, RAM);
    struct aiokvm_ram ram = { .size = RAM, .host = pair->ram };
    pair->vring = aiokvm_vring_new(&ram, 1, size);
    CHECK(pair->vring);
    start(pair, size, features);
}

static void close_pair(struct pair *pair)
{
    aiokvm_vring_free(pair->vring);
    free(pair->ram);
}

static int add(struct pair *pair, uint32_t len)
{
    struct driver_buffer buffers[] = { { DATA, len, false }, { DATA + 64, len, true } };
    return driver_add(&pair->driver, buffers, 2, 0);
}

static struct aiokvm_chain *pop(struct pair *pair)
{
    struct aiokvm_chain *chain = NULL;
    CHECK_EQ(aiokvm_vring_pop(pair->vring, &chain), 1);
    return chain;
}

#define FOR_EACH_KIND(features)                                                                    \
    for (size_t kind_ = 0; kind_ < 8; kind_++)                                                     \
        for (uint64_t features = LAYOUTS[kind_ & 1] | EVENTS[kind_ >> 1 & 1] | ORDERS[kind_ >> 2], \
                      once_ = 1; once_; once_ = 0)

TEST(all_indices_wrap)
{
    FOR_EACH_KIND(features) {
        struct pair pair;
        open_pair(&pair, SIZE, features);
        uint64_t random = 1;
        int outstanding = 0;
        uint32_t completed = 0, id, written;
        struct aiokvm_chain *chain;
        while (completed < 70000) {
            for (uint32_t n = random_below(&random, 4); n && add(&pair, 8) >= 0; n--)
                outstanding++;
            while (aiokvm_vring_pop(pair.vring, &chain) == 1)
                aiokvm_vring_push(pair.vring, chain, random_below(&random, 9));
            aiokvm_vring_publish(pair.vring);
            while (driver_take(&pair.driver, &id, &written)) {
                CHECK(written <= 8);
                completed++;
                outstanding--;
            }
            CHECK_EQ(outstanding, 0);
        }
        close_pair(&pair);
    }
}

TEST(iovecs_are_where_the_descriptors_say)
{
    for (int indirect = 0; indirect < 2; indirect++) {
        FOR_EACH_KIND(features) {
            struct pair pair;
            open_pair(&pair, SIZE, features | AIOKVM_VIRTIO_F_INDIRECT_DESC);
            struct driver_buffer buffers[] = {
                { 0x100, 1, false }, { 0, 0, false }, { RAM - 2, 2, false }, { 0, 0x1000, true }, { 5, 0, true },
            };
            int id = driver_add(&pair.driver, buffers, LENGTH(buffers), indirect ? TABLES : 0);
            struct aiokvm_chain *chain = pop(&pair);
            CHECK_EQ(chain->id, id);
            CHECK_EQ(chain->readable, 2);
            CHECK_EQ(chain->writable, 1);
            CHECK_EQ(chain->readable_bytes, 3);
            CHECK_EQ(chain->writable_bytes, 0x1000);
            CHECK(chain->iov[0].iov_base == pair.ram + 0x100 && chain->iov[0].iov_len == 1);
            CHECK(chain->iov[1].iov_base == pair.ram + RAM - 2 && chain->iov[1].iov_len == 2);
            CHECK(chain->iov[2].iov_base == pair.ram && chain->iov[2].iov_len == 0x1000);
            close_pair(&pair);
        }
    }
}

TEST(ram_is_found_range_by_range)
{
    uint8_t *ram = aligned_alloc(4096, RAM);
    CHECK(ram);
    memset(ram, 0, RAM);
    /* In the host the other way round. */
    struct aiokvm_ram ranges[] = {
        { .gpa = 0, .size = RAM / 2, .host = ram + RAM / 2 },
        { .gpa = UINT64_C(1) << 40, .size = RAM / 2, .host = ram },
    };
    struct aiokvm_vring *vring = aiokvm_vring_new(ranges, 2, SIZE);
    struct driver driver;
    driver_open(&driver, ram + RAM / 2, SIZE, 0, RINGS);
    CHECK_EQ(aiokvm_vring_start(vring, SIZE, driver.desc, driver.driver, driver.device, 0), 0);
    struct driver_buffer buffers[] = { { 16, 16, false }, { (UINT64_C(1) << 40) + 16, 16, false }, { 32, 1, true } };
    driver_add(&driver, buffers, 3, 0);
    struct aiokvm_chain *chain;
    CHECK_EQ(aiokvm_vring_pop(vring, &chain), 1);
    CHECK(chain->iov[0].iov_base == ram + RAM / 2 + 16);
    CHECK(chain->iov[1].iov_base == ram + 16);
    CHECK(chain->iov[2].iov_base == ram + RAM / 2 + 32);
    buffers[0] = (struct driver_buffer){ (UINT64_C(1) << 40) - 1, 2, false };
    driver_add(&driver, buffers, 1, 0);
    CHECK_EQ(aiokvm_vring_pop(vring, &chain), AIOKVM_VRING_EADDRESS);
    CHECK_EQ(aiokvm_vring_error(vring), AIOKVM_VRING_EADDRESS);
    aiokvm_vring_free(vring);
    free(ram);
}

TEST(chains_survive_a_stop_and_a_start)
{
    FOR_EACH_KIND(features) {
        struct pair pair;
        open_pair(&pair, SIZE, features);
        struct aiokvm_chain *old[SIZE / 2];
        for (int round = 0; round < 5; round++) {
            for (int i = 0; i < SIZE / 2; i++) {
                CHECK(add(&pair, 8) >= 0);
                old[i] = pop(&pair);
            }
            aiokvm_vring_stop(pair.vring);
            start(&pair, SIZE, features);
            for (int i = 0; i < SIZE / 2; i++) {
                CHECK(add(&pair, 8) >= 0);
                struct aiokvm_chain *chain = pop(&pair);
                for (int j = 0; j < SIZE / 2; j++)
                    CHECK(chain != old[j] && chain->iov != old[j]->iov);
                aiokvm_vring_push(pair.vring, chain, 1);
            }
            /* What belongs to the last start is not completed in this one. */
            for (int i = 0; i < SIZE / 2; i++)
                if (i % 2)
                    aiokvm_vring_push(pair.vring, old[i], 8);
                else
                    aiokvm_vring_drop(pair.vring, old[i]);
            aiokvm_vring_publish(pair.vring);
            uint32_t id, written, count = 0;
            while (driver_take(&pair.driver, &id, &written)) {
                CHECK_EQ(written, 1);
                count++;
            }
            CHECK_EQ(count, SIZE / 2);
        }
        close_pair(&pair);
    }
}

TEST(a_start_waits_for_chains_of_the_one_before_the_last)
{
    struct pair pair;
    open_pair(&pair, SIZE, 0);
    struct driver_buffer buffer = { DATA, 8, false };
    struct aiokvm_chain *out[2 * SIZE];
    for (int i = 0; i < 2 * SIZE; i++) {
        if (i == SIZE)
            start(&pair, SIZE, 0);
        CHECK(driver_add(&pair.driver, &buffer, 1, 0) >= 0);
        out[i] = pop(&pair);
    }
    const struct driver *driver = &pair.driver;
    for (int i = 0; i < SIZE; i++) {
        CHECK_EQ(aiokvm_vring_start(pair.vring, SIZE, driver->desc, driver->driver, driver->device, 0),
                 AIOKVM_VRING_EBUSY);
        aiokvm_vring_drop(pair.vring, out[i]);
    }
    start(&pair, SIZE, 0);
    close_pair(&pair);
}

TEST(a_chain_beyond_the_queue_is_refused_when_the_pool_is_empty)
{
    struct pair pair;
    open_pair(&pair, SIZE, 0);
    struct driver_buffer buffer = { DATA, 8, false };
    for (int i = 0; i < 2 * SIZE; i++) {
        if (i == SIZE)
            start(&pair, SIZE, 0);
        CHECK(driver_add(&pair.driver, &buffer, 1, 0) >= 0);
        pop(&pair);
    }
    /* All are out, those of the start before too: the available index goes on all the same. */
    uint16_t idx;
    memcpy(&idx, pair.ram + pair.driver.driver + 2, sizeof(idx));
    idx++;
    memcpy(pair.ram + pair.driver.driver + 2, &idx, sizeof(idx));
    struct aiokvm_chain *chain;
    CHECK_EQ(aiokvm_vring_pop(pair.vring, &chain), AIOKVM_VRING_EINDEX);
    close_pair(&pair);
}

TEST(the_ring_is_no_indirect_table_of_itself)
{
    struct pair pair;
    open_pair(&pair, SIZE, AIOKVM_VIRTIO_F_INDIRECT_DESC);
    struct driver_buffer buffer = { DATA, 8, false };
    CHECK(driver_add(&pair.driver, &buffer, 1, 0) >= 0);
    struct vring_desc desc = { .addr = pair.driver.desc, .len = 16 * SIZE, .flags = VRING_DESC_F_INDIRECT };
    for (int i = 0; i < SIZE; i++)
        memcpy(pair.ram + pair.driver.desc + 16 * i, &desc, sizeof(desc));
    struct aiokvm_chain *chain;
    CHECK_EQ(aiokvm_vring_pop(pair.vring, &chain), AIOKVM_VRING_EINDIRECT);
    close_pair(&pair);
}

TEST(a_dropped_chain_holds_up_those_behind_it_in_order)
{
    struct pair pair;
    uint32_t id, written;
    open_pair(&pair, SIZE, AIOKVM_VIRTIO_F_IN_ORDER);
    add(&pair, 8);
    add(&pair, 8);
    aiokvm_vring_drop(pair.vring, pop(&pair));
    aiokvm_vring_push(pair.vring, pop(&pair), 8);
    CHECK_EQ(aiokvm_vring_publish(pair.vring), 0);
    CHECK(!driver_take(&pair.driver, &id, &written));
    close_pair(&pair);
}

TEST(what_waited_for_its_turn_is_given_back_by_a_stop)
{
    struct pair pair;
    open_pair(&pair, SIZE, AIOKVM_VIRTIO_F_IN_ORDER);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < SIZE / 2; i++)
            CHECK(add(&pair, 8) >= 0);
        struct aiokvm_chain *first = pop(&pair);
        for (int i = 1; i < SIZE / 2; i++)
            aiokvm_vring_push(pair.vring, pop(&pair), 8);
        start(&pair, SIZE, AIOKVM_VIRTIO_F_IN_ORDER);
        aiokvm_vring_push(pair.vring, first, 8);
    }
    close_pair(&pair);
}

TEST(an_in_order_batch_is_one_entry)
{
    for (size_t layout = 0; layout < LENGTH(LAYOUTS); layout++) {
        struct pair pair;
        open_pair(&pair, SIZE, LAYOUTS[layout] | AIOKVM_VIRTIO_F_IN_ORDER);
        int last = 0;
        for (int i = 0; i < SIZE / 2; i++) {
            last = add(&pair, 8);
            aiokvm_vring_push(pair.vring, pop(&pair), i == SIZE / 2 - 1 ? 3 : 8);
        }
        CHECK_EQ(aiokvm_vring_publish(pair.vring), 1);
        /* The last one's id and length, in the place of the first. */
        const uint8_t *entry = pair.ram + (layout ? pair.driver.desc : pair.driver.device + 4);
        uint32_t len = *(const uint32_t *)(entry + (layout ? 8 : 4));
        uint32_t id = layout ? *(const uint16_t *)(entry + 12) : *(const uint32_t *)entry;
        CHECK_EQ(len, 3);
        CHECK_EQ(id, last);
        close_pair(&pair);
    }
}

TEST(every_error_has_its_words)
{
    for (int error = AIOKVM_VRING_EINDIRECT; error <= 0; error++)
        for (int other = error + 1; other <= 1; other++)
            CHECK(strcmp(aiokvm_vring_strerror(error), aiokvm_vring_strerror(other)) != 0);
}

TEST(sizes_that_cannot_be)
{
    struct aiokvm_ram none = { 0 };
    CHECK(!aiokvm_vring_new(&none, 0, 0));
    CHECK(!aiokvm_vring_new(&none, 0, AIOKVM_VRING_MAX_SIZE + 1));
    struct aiokvm_vring *vring = aiokvm_vring_new(&none, 0, AIOKVM_VRING_MAX_SIZE);
    CHECK(vring);
    CHECK_EQ(aiokvm_vring_start(vring, 3, 0, 0, 0, 0), AIOKVM_VRING_ESIZE);
    CHECK_EQ(aiokvm_vring_start(vring, 2 * AIOKVM_VRING_MAX_SIZE, 0, 0, 0, 0), AIOKVM_VRING_ESIZE);
    CHECK_EQ(aiokvm_vring_start(vring, 3, 0, 0, 0, AIOKVM_VIRTIO_F_RING_PACKED), AIOKVM_VRING_ERING);
    aiokvm_vring_free(vring);
}
