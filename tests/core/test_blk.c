/* blk*.c: a disk's I/O thread, by both engines. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blk_driver.h"
#include "blk_priv.h"
#include "check.h"

enum { MIB = 1 << 20 };

static void fill(struct disk *disk, uint32_t gpa, uint32_t length, uint64_t seed)
{
    for (uint32_t i = 0; i < length; i++)
        disk->ram[gpa + i] = (uint8_t)random_below(&seed, 256);
}

static void check_file(struct disk *disk, uint64_t offset, const uint8_t *bytes, size_t length)
{
    uint8_t *read = malloc(length);
    CHECK_EQ(pread(disk->fd, read, length, (off_t)offset), length);
    CHECK(memcmp(read, bytes, length) == 0);
    free(read);
}

EACH_ENGINE(what_is_written_is_read)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    int refused;
    CHECK_EQ(aiokvm_blk_engine(disk.blk, &refused), engine);
    CHECK_EQ(refused, 0);
    CHECK(aiokvm_blk_tid(disk.blk) > 0);
    fill(&disk, DATA, 65536, 1);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 8, DATA, 65536), VIRTIO_BLK_S_OK);
    check_file(&disk, 8 * SECTOR, disk.ram + DATA, 65536);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 8, DATA + MIB, 65536), VIRTIO_BLK_S_OK);
    CHECK(memcmp(disk.ram + DATA, disk.ram + DATA + MIB, 65536) == 0);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_OK);
    struct aiokvm_blk_stats stats;
    aiokvm_blk_stats(disk.blk, &stats);
    CHECK_EQ(stats.reads, 1);
    CHECK_EQ(stats.writes, 1);
    CHECK_EQ(stats.flushes, 1);
    CHECK_EQ(stats.written_bytes, 65536);
    CHECK_EQ(stats.in_flight, 0);
    CHECK_SOON(aiokvm_status_read(&disk.status) & 1);
    CHECK_SOON((aiokvm_blk_stats(disk.blk, &stats), stats.interrupts == 3));
    CHECK(no_event(&disk));
    disk_close(&disk);
}

EACH_ENGINE(buffers_may_lie_anyhow)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    fill(&disk, DATA, 1024, 2);
    header(&disk, DATA + 5000, VIRTIO_BLK_T_OUT, 3);
    /* The header in three, the data in four: one shares a descriptor with the header. */
    struct part out[] = {
        { DATA + 5000, 1, false }, { DATA + 5001, 7, false }, { DATA + 5008, 8, false },
        { DATA, 1, false },        { DATA + 1, 510, false },  { DATA + 511, 513, false },
        { DATA + 6000, 1, true },
    };
    put(&disk, 0, out, LENGTH(out));
    kick(&disk, 0);
    CHECK_EQ(wait_used(&disk, 0).length, 1);
    CHECK_EQ(disk.ram[DATA + 6000], VIRTIO_BLK_S_OK);
    check_file(&disk, 3 * SECTOR, disk.ram + DATA, 1024);
    /* Header and data in one; status behind the data in one. */
    header(&disk, DATA - 16, VIRTIO_BLK_T_OUT, 9);
    put(&disk, 0, (struct part[]){ { DATA - 16, 16 + 1024, false }, { DATA + 6000, 1, true } }, 2);
    header(&disk, DATA + 5000, VIRTIO_BLK_T_IN, 9);
    struct part in[] = { { DATA + 5000, 16, false }, { DATA + 8000, 300, true }, { DATA + 8300, 725, true } };
    kick(&disk, 0);
    CHECK_EQ(wait_used(&disk, 0).length, 1);
    put(&disk, 0, in, LENGTH(in));
    kick(&disk, 0);
    CHECK_EQ(wait_used(&disk, 0).length, 1025);
    CHECK_EQ(disk.ram[DATA + 9024], VIRTIO_BLK_S_OK);
    CHECK(memcmp(disk.ram + DATA, disk.ram + DATA + 8000, 1024) == 0);
    disk_close(&disk);
}

EACH_ENGINE(a_gibibyte_is_moved_in_pieces)
{
    enum { PIECE = 4 * MIB, COUNT = 256 };
    struct disk disk;
    disk_open(&disk, engine, (uint64_t)PIECE * COUNT);
    struct part parts[COUNT + 2] = { { DATA - 4096, 16, false } };
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    CHECK_EQ(pwrite(disk.fd, "last", 4, (off_t)PIECE * (COUNT - 1) + 77), 4);
    memset(disk.ram + DATA, 0xff, PIECE);
    for (int i = 0; i < COUNT; i++)
        parts[1 + i] = (struct part){ DATA, PIECE, true };
    parts[COUNT + 1] = (struct part){ DATA - 1, 1, true };
    put(&disk, 0, parts, LENGTH(parts));
    kick(&disk, 0);
    CHECK_EQ(wait_used(&disk, 0).length, (1u << 30) + 1);
    CHECK_EQ(disk.ram[DATA - 1], VIRTIO_BLK_S_OK);
    CHECK(memcmp(disk.ram + DATA + 77, "last", 5) == 0);
    disk_close(&disk);
}

EACH_ENGINE(a_thousand_buffers_of_odd_lengths)
{
    enum { COUNT = QUEUE_SIZE - 2 };
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine }, MIB);
    struct part parts[COUNT + 2] = { { DATA - 4096, 16, false } };
    header(&disk, DATA - 4096, VIRTIO_BLK_T_OUT, 1);
    uint32_t at = DATA, end = DATA + 512 * 513;
    fill(&disk, DATA, end - DATA, 3);
    for (int i = 0; i < COUNT; i++) {
        parts[1 + i] = (struct part){ at, i + 1 < COUNT ? 257 : end - at, false };
        at += 257;
    }
    parts[COUNT + 1] = (struct part){ DATA - 1, 1, true };
    put(&disk, 0, parts, LENGTH(parts));
    kick(&disk, 0);
    wait_used(&disk, 0);
    CHECK_EQ(disk.ram[DATA - 1], VIRTIO_BLK_S_OK);
    check_file(&disk, SECTOR, disk.ram + DATA, end - DATA);
    disk_close(&disk);
}

EACH_ENGINE(memory_that_o_direct_cannot_take_is_copied)
{
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .align = 4096 }, MIB);
    fill(&disk, DATA + 1, 200 << 10, 4);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 8, DATA + 1, 200 << 10), VIRTIO_BLK_S_OK);
    check_file(&disk, 4096, disk.ram + DATA + 1, 200 << 10);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 8, DATA + MIB + 7, 200 << 10), VIRTIO_BLK_S_OK);
    CHECK(memcmp(disk.ram + DATA + 1, disk.ram + DATA + MIB + 7, 200 << 10) == 0);
    /* What is no block of the disk's was never offered. */
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 1, DATA, 4096), VIRTIO_BLK_S_IOERR);
    CHECK(no_event(&disk));
    disk_close(&disk);
}

EACH_ENGINE(memory_that_o_direct_can_take_is_not_copied)
{
    struct disk disk;
    struct aiokvm_blk_stats stats;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .align = 4096 }, 16 * MIB);
    /* The status has a descriptor of its own, at an odd address. */
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, 5 * MIB), VIRTIO_BLK_S_OK);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 8, DATA, 5 * MIB), VIRTIO_BLK_S_OK);
    /* It has the last descriptor with the data. */
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    struct part parts[] = { { DATA - 4096, 16, false }, { DATA, 4096, true }, { DATA + 8192, 4097, true } };
    put(&disk, 0, parts, LENGTH(parts));
    kick(&disk, 0);
    CHECK_EQ(wait_used(&disk, 0).length, 8193);
    aiokvm_blk_stats(disk.blk, &stats);
    CHECK_EQ(stats.copied_bytes, 0);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 0, DATA + 1, 128 << 10), VIRTIO_BLK_S_OK);
    aiokvm_blk_stats(disk.blk, &stats);
    CHECK_EQ(stats.copied_bytes, 128 << 10);
    disk_close(&disk);
}

EACH_ENGINE(copies_have_a_share_of_the_memory_that_all_disks_have)
{
    enum { COUNT = 60, BYTES = 256 << 10 };
    struct disk disk;
    struct aiokvm_share others;
    struct aiokvm_budget_state state;
    struct aiokvm_budget *budget = aiokvm_budget_of_process(AIOKVM_BUDGET_BOUNCE_BYTES);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 0);
    /* They have it all: one buffer is left for this one. */
    aiokvm_share_open(&others, budget);
    aiokvm_share_add(&others, state.total);
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .align = 4096 }, MIB);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    for (int i = 0; i < COUNT; i++) {
        struct part parts[] = { { DATA - 4096, 16, false }, { DATA + 1, BYTES, true }, { DATA - 1, 1, true } };
        put(&disk, (uint32_t)i % QUEUES, parts, LENGTH(parts));
    }
    kick(&disk, 0);
    kick(&disk, 1);
    for (int i = 0; i < COUNT;) {
        struct used used;
        aiokvm_budget_state(budget, &state);
        CHECK(state.used <= state.total + BLK_BOUNCE_BYTES);
        if (take_used(&disk, 0, &used) || take_used(&disk, 1, &used)) {
            CHECK_EQ(used.length, BYTES + 1);
            i++;
        }
    }
    /* Those that wait for one do not hold up a stop. */
    for (int i = 0; i < COUNT; i++) {
        struct part parts[] = { { DATA - 4096, 16, false }, { DATA + 1, BYTES, true }, { DATA - 1, 1, true } };
        put(&disk, 0, parts, LENGTH(parts));
    }
    kick(&disk, 0);
    disk_stop(&disk);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, state.total);
    disk_close(&disk);
    aiokvm_share_close(&others);
}

TEST(whoever_gets_the_number_of_its_interrupt_is_not_written_to)
{
    struct disk disk;
    disk_open(&disk, AIOKVM_BLK_THREADS, MIB);
    int irqfd = dup(disk.notifier.irqfd);
    char name[] = "/tmp/aiokvm-blk-XXXXXX";
    int other = mkostemp(name, O_CLOEXEC);
    CHECK(irqfd >= 0 && other >= 0 && unlink(name) == 0);
    /* As when the machine has ended, and its disk has not. */
    CHECK_EQ(dup2(other, disk.notifier.irqfd), disk.notifier.irqfd);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 0, DATA, SECTOR), VIRTIO_BLK_S_OK);
    uint64_t count = 0;
    CHECK_SOON(read(irqfd, &count, sizeof(count)) == sizeof(count));
    CHECK_EQ(lseek(other, 0, SEEK_END), 0);
    close(other);
    close(irqfd);
    disk_close(&disk);
}

static uint8_t clear(struct disk *disk, uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags)
{
    struct virtio_blk_discard_write_zeroes segment = { sector, sectors, flags };
    memcpy(disk->ram + DATA + 2 * MIB, &segment, sizeof(segment));
    return request(disk, type, 0, DATA + 2 * MIB, sizeof(segment));
}

EACH_ENGINE(ranges_are_discarded_and_zeroed)
{
    struct disk disk;
    static const uint8_t zeros[64 << 10];
    disk_open(&disk, engine, MIB);
    memset(disk.ram + DATA, 0xab, MIB);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, MIB), VIRTIO_BLK_S_OK);
    struct stat before, after;
    CHECK_EQ(fstat(disk.fd, &before), 0);
    CHECK_EQ(clear(&disk, VIRTIO_BLK_T_DISCARD, 128, 128, 0), VIRTIO_BLK_S_OK);
    CHECK_EQ(fstat(disk.fd, &after), 0);
    CHECK(after.st_blocks < before.st_blocks);
    check_file(&disk, 128 * SECTOR, zeros, sizeof(zeros));
    CHECK_EQ(clear(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 512, 128, 0), VIRTIO_BLK_S_OK);
    check_file(&disk, 512 * SECTOR, zeros, sizeof(zeros));
    CHECK_EQ(clear(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 1024, 128, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
             VIRTIO_BLK_S_OK);
    check_file(&disk, 1024 * SECTOR, zeros, sizeof(zeros));
    /* And nothing beside them. */
    for (uint64_t sector = 0; sector < 2048; sector += 128)
        if (sector != 128 && sector != 512 && sector != 1024)
            check_file(&disk, sector * SECTOR, disk.ram + DATA, sizeof(zeros));
    CHECK_EQ(fstat(disk.fd, &after), 0);
    CHECK_EQ(after.st_size, MIB);
    struct aiokvm_blk_stats stats;
    aiokvm_blk_stats(disk.blk, &stats);
    CHECK_EQ(stats.discards, 3);
    disk_close(&disk);
}

TEST(a_failed_fdatasync_is_never_forgotten)
{
    struct disk disk;
    disk_open(&disk, AIOKVM_BLK_THREADS, MIB);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_OK);
    atomic_store(&fdatasync_error, EIO);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_IOERR);
    int calls = atomic_load(&fdatasync_calls);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(atomic_load(&fdatasync_calls), calls);
    struct aiokvm_blk_event event = wait_event(&disk);
    CHECK_EQ(event.kind, AIOKVM_BLK_FAILED);
    CHECK_EQ(event.error, EIO);
    CHECK_EQ(event.type, VIRTIO_BLK_T_FLUSH);
    /* A reset of the device does not make the data safe. */
    disk_stop(&disk);
    disk_attach(&disk, 0);
    disk_run(&disk);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_IOERR);
    disk_close(&disk);
}

EACH_ENGINE(a_full_disk_is_an_error)
{
    struct disk disk;
    int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .fd = fd }, MIB);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, 4096), VIRTIO_BLK_S_IOERR);
    struct aiokvm_blk_event event = wait_event(&disk);
    CHECK_EQ(event.kind, AIOKVM_BLK_FAILED);
    CHECK_EQ(event.error, ENOSPC);
    CHECK_EQ(event.offset, 0);
    CHECK_EQ(event.length, 4096);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 0, DATA, 4096), VIRTIO_BLK_S_OK);
    /* A character device cannot be synchronized. */
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_IOERR);
    disk_close(&disk);
}

EACH_ENGINE(an_image_that_is_truncated_under_us)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    CHECK_EQ(ftruncate(disk.fd, MIB / 2), 0);
    /* Half of the request is there, but what would the rest be? */
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 1016, DATA, 8192), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(wait_event(&disk).error, EIO);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 1800, DATA, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(clear(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), VIRTIO_BLK_S_IOERR);
    struct stat stat;
    CHECK_EQ(fstat(disk.fd, &stat), 0);
    CHECK_EQ(stat.st_size, MIB / 2);
    disk_close(&disk);
}

EACH_ENGINE(a_request_that_fails_may_wait_and_be_tried_again)
{
    struct disk disk;
    struct aiokvm_blk_stats stats;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .pause = 1 }, MIB);
    CHECK_EQ(ftruncate(disk.fd, 0), 0);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_OUT, 5);
    struct part parts[] = { { DATA - 4096, 16, false }, { DATA, 4096, false }, { DATA - 1, 1, true } };
    fill(&disk, DATA, 4096, 5);
    put(&disk, 0, parts, 3);
    kick(&disk, 0);
    struct aiokvm_blk_event event = wait_event(&disk);
    CHECK_EQ(event.error, EIO);
    CHECK_EQ(event.offset, 5 * SECTOR);
    struct used used;
    CHECK(!take_used(&disk, 0, &used));
    CHECK_EQ(aiokvm_blk_retry(disk.blk), 0);
    CHECK_EQ(wait_event(&disk).error, EIO);
    CHECK(!take_used(&disk, 0, &used));
    CHECK_EQ(ftruncate(disk.fd, MIB), 0);
    CHECK_EQ(aiokvm_blk_retry(disk.blk), 0);
    CHECK_EQ(wait_used(&disk, 0).length, 1);
    CHECK_EQ(disk.ram[DATA - 1], VIRTIO_BLK_S_OK);
    check_file(&disk, 5 * SECTOR, disk.ram + DATA, 4096);
    /* One that still waits does not hold up the end. */
    CHECK_EQ(ftruncate(disk.fd, 0), 0);
    put(&disk, 0, parts, 3);
    kick(&disk, 0);
    wait_event(&disk);
    aiokvm_blk_stats(disk.blk, &stats);
    CHECK_EQ(stats.errors, 3);
    disk_stop(&disk);
    disk_close(&disk);
}

EACH_ENGINE(a_stop_drains_and_discards)
{
    struct disk disk;
    disk_open(&disk, engine, 4 * MIB);
    for (int round = 0; round < 20; round++) {
        header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
        put_reads(&disk, round % QUEUES, 0, 100);
        kick(&disk, round % QUEUES);
        disk_stop(&disk);
        uint16_t done = disk.queues[round % QUEUES].driver.used->idx;
        memset(disk.ram + DATA, 0x55, MIB);
        CHECK_EQ(disk.ram[DATA + MIB / 2], 0x55);
        CHECK_EQ(disk.queues[round % QUEUES].driver.used->idx, done);
        struct aiokvm_blk_stats stats;
        aiokvm_blk_stats(disk.blk, &stats);
        CHECK_EQ(stats.in_flight, 0);
        for (uint32_t i = 0; i < QUEUES; i++)
            disk_attach(&disk, i);
        disk_run(&disk);
    }
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 0, DATA, 4096), VIRTIO_BLK_S_OK);
    disk_close(&disk);
}

EACH_ENGINE(one_queue_is_taken_away_and_the_other_loses_nothing)
{
    struct disk disk;
    disk_open(&disk, engine, 4 * MIB);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    put_reads(&disk, 0, 0, 50);
    put_reads(&disk, 1, 50, 50);
    kick(&disk, 0);
    kick(&disk, 1);
    CHECK_EQ(aiokvm_blk_stop(disk.blk, 0), 0);
    CHECK_SOON(aiokvm_blk_state(disk.blk) == AIOKVM_BLK_IDLE);
    CHECK_EQ(aiokvm_blk_set_queue(disk.blk, 0, NULL, -1), 0);
    uint16_t done = disk.queues[0].driver.used->idx;
    disk_run(&disk);
    for (int i = 0; i < 50; i++)
        wait_used(&disk, 1);
    CHECK_EQ(disk.queues[0].driver.used->idx, done);
    disk_close(&disk);
}

EACH_ENGINE(as_many_requests_as_all_queues_hold)
{
    enum { COUNT = QUEUE_SIZE / 2 };
    struct disk disk;
    disk_open(&disk, engine, MIB);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    for (int round = 0; round < 3; round++) {
        /* Each has a buffer of its own: two in one would race, in the guest's memory. */
        for (uint32_t i = 0; i < QUEUES * COUNT; i++) {
            const uint32_t buffer = DATA + 4096 + i * 2 * SECTOR;
            put(&disk, i % QUEUES, (struct part[]){ { DATA - 4096, 16, false }, { buffer, SECTOR + 1, true } }, 2);
        }
        kick(&disk, 0);
        kick(&disk, 1);
        for (uint32_t i = 0; i < QUEUES * COUNT; i++)
            CHECK_EQ(wait_used(&disk, i / COUNT).length, SECTOR + 1);
    }
    disk_close(&disk);
}

EACH_ENGINE(the_end_comes_with_requests_in_flight)
{
    for (int round = 0; round < 5; round++) {
        struct disk disk;
        disk_open(&disk, engine, 4 * MIB);
        header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
        put_reads(&disk, 0, 0, 100);
        kick(&disk, 0);
        disk_close(&disk);
    }
}

EACH_ENGINE(a_rate_limit_holds_requests_back)
{
    struct disk disk;
    struct used used;
    struct aiokvm_ratelimit *limit = aiokvm_ratelimit_new(0, 0, 1, 1); /* one at once, then one a second */
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .limit = limit }, MIB);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    uint64_t start = now_ns();
    put_reads(&disk, 0, 0, 4);
    kick(&disk, 0);
    for (int i = 0; i < 3; i++)
        wait_used(&disk, 0);
    CHECK(now_ns() - start > 900000000);
    struct aiokvm_blk_stats stats;
    CHECK_SOON((aiokvm_blk_stats(disk.blk, &stats), stats.throttled == 2));
    /* The one that waits does not hold up a stop. */
    disk_stop(&disk);
    CHECK(!take_used(&disk, 0, &used));
    disk_close(&disk);
    aiokvm_ratelimit_free(limit);
}

EACH_ENGINE(without_write_back_writes_are_durable)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    aiokvm_blk_set_writeback(disk.blk, 0);
    fill(&disk, DATA, 8192, 6);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, 8192), VIRTIO_BLK_S_OK);
    check_file(&disk, 0, disk.ram + DATA, 8192);
    CHECK_EQ(clear(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), VIRTIO_BLK_S_OK);
    disk_close(&disk);
}

EACH_ENGINE(the_capacity_may_change)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 2048, DATA, SECTOR), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(ftruncate(disk.fd, 2 * MIB), 0);
    aiokvm_blk_set_capacity(disk.blk, 4096);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 2048, DATA, SECTOR), VIRTIO_BLK_S_OK);
    aiokvm_blk_set_capacity(disk.blk, 8);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 8, DATA, SECTOR), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 7, DATA, SECTOR), VIRTIO_BLK_S_OK);
    disk_close(&disk);
}

TEST(what_only_an_idle_disk_allows)
{
    struct disk disk;
    disk_open(&disk, AIOKVM_BLK_THREADS, MIB);
    CHECK_EQ(aiokvm_blk_set_queue(disk.blk, 0, NULL, -1), -EBUSY);
    CHECK_EQ(aiokvm_blk_set_queue(disk.blk, AIOKVM_BLK_QUEUES, NULL, -1), -EINVAL);
    CHECK_EQ(aiokvm_blk_set_features(disk.blk, 0), -EBUSY);
    CHECK_EQ(aiokvm_blk_run(disk.blk, &disk.notifier), -EBUSY);
    CHECK_EQ(aiokvm_blk_join(disk.blk), -EBUSY);
    CHECK_EQ(aiokvm_blk_exit(disk.blk), 0);
    CHECK_EQ(aiokvm_blk_exit(disk.blk), 0);
    CHECK_EQ(aiokvm_blk_stop(disk.blk, -1), -ESHUTDOWN);
    disk_close(&disk);
}
