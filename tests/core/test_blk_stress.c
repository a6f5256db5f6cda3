/* blk*.c: drivers on threads of their own, as vCPUs are; what they read is what they wrote. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blk_driver.h"
#include "check.h"

enum { DEPTH = 32, REQUESTS = 4000, SLOT_BYTES = 16 << 10, PART_SECTORS = 4096 };

struct driver {
    struct disk *disk;
    uint32_t queue;
};

/* Slot s of a queue has guest memory of its own: header, status, then data; and a part of the disk. */
struct slot {
    bool busy, is_write;
    uint32_t sectors;
    uint64_t sector;
    uint8_t value;
};

static uint32_t slot_gpa(uint32_t queue, uint32_t slot)
{
    return DATA + (queue * DEPTH + slot) * 2 * SLOT_BYTES;
}

static void *drive(void *argument)
{
    struct driver *driver = argument;
    struct disk *disk = driver->disk;
    uint32_t queue = driver->queue, submitted = 0, completed = 0;
    uint64_t random = queue + 1;
    struct slot slots[DEPTH] = { 0 };
    static uint8_t shadows[QUEUES][PART_SECTORS];
    uint8_t *shadow = shadows[queue];
    /* Which slot a head belongs to. */
    uint32_t owner[QUEUE_SIZE];
    memset(shadow, 0, PART_SECTORS);
    while (completed < REQUESTS) {
        bool any = false;
        for (uint32_t i = 0; i < DEPTH && submitted < REQUESTS; i++) {
            struct slot *slot = &slots[i];
            if (slot->busy)
                continue;
            /* Each slot has sectors of its own: what overlaps in flight has no order. */
            uint32_t room = PART_SECTORS / DEPTH;
            *slot = (struct slot){ true, random_below(&random, 2), 1 + random_below(&random, 16), 0,
                                   (uint8_t)random_below(&random, 256) };
            slot->sector = i * room + random_below(&random, room - slot->sectors);
            uint32_t gpa = slot_gpa(queue, i), length = slot->sectors * SECTOR;
            header(disk, gpa, slot->is_write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
                   queue * PART_SECTORS + slot->sector);
            memset(disk->ram + gpa + SLOT_BYTES, slot->is_write ? slot->value : 0xee, length);
            disk->ram[gpa + 16] = 0xff;
            struct part parts[] = { { gpa, 16, false },
                                    { gpa + SLOT_BYTES, length, !slot->is_write },
                                    { gpa + 16, 1, true } };
            owner[put(disk, queue, parts, 3)] = i;
            submitted++;
            any = true;
        }
        if (any && !(__atomic_load_n(&disk->queues[queue].driver.used->flags, __ATOMIC_SEQ_CST) & 1))
            kick(disk, queue);
        struct used used = { 0 };
        uint64_t deadline = now_ns() + PATIENCE_S * UINT64_C(1000000000);
        while (!take_used(disk, queue, &used)) {
            CHECK(now_ns() < deadline);
            sched_yield();
        }
        do {
            struct slot *slot = &slots[owner[used.head]];
            uint32_t gpa = slot_gpa(queue, owner[used.head]);
            CHECK_EQ(disk->ram[gpa + 16], VIRTIO_BLK_S_OK);
            CHECK_EQ(used.length, slot->is_write ? 1 : slot->sectors * SECTOR + 1);
            for (uint32_t s = 0; s < slot->sectors; s++) {
                if (slot->is_write)
                    shadow[slot->sector + s] = slot->value;
                CHECK_EQ(disk->ram[gpa + SLOT_BYTES + s * SECTOR + 7], shadow[slot->sector + s]);
            }
            slot->busy = false;
            completed++;
        } while (take_used(disk, queue, &used));
    }
    return NULL;
}

static void stress(uint32_t engine)
{
    struct disk disk;
    disk_open(&disk, engine, (uint64_t)QUEUES * PART_SECTORS * SECTOR);
    struct driver drivers[QUEUES];
    pthread_t threads[QUEUES];
    for (uint32_t i = 0; i < QUEUES; i++) {
        drivers[i] = (struct driver){ &disk, i };
        CHECK_EQ(pthread_create(&threads[i], NULL, drive, &drivers[i]), 0);
    }
    for (uint32_t i = 0; i < QUEUES; i++)
        pthread_join(threads[i], NULL);
    struct aiokvm_blk_stats stats;
    aiokvm_blk_stats(disk.blk, &stats);
    CHECK_EQ(stats.reads + stats.writes, QUEUES * REQUESTS);
    CHECK_EQ(stats.errors, 0);
    disk_close(&disk);
}

TEST(two_queues_uring)
{
    if (uring_refused())
        check_skip(uring_refused());
    else
        stress(AIOKVM_BLK_IO_URING);
}

TEST(two_queues_threads)
{
    stress(AIOKVM_BLK_THREADS);
}
