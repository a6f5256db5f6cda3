/* blk*.c: drivers that do what they must not. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "blk_driver.h"
#include "check.h"

enum { MIB = 1 << 20, SECTORS = 2048 };

EACH_ENGINE(requests_that_end_with_a_status)
{
    static const struct {
        uint32_t type;
        uint64_t sector;
        uint32_t length;
        uint8_t status;
    } cases[] = {
        { VIRTIO_BLK_T_IN, SECTORS, SECTOR, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_IN, SECTORS - 1, 2 * SECTOR, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_OUT, SECTORS - 1, 2 * SECTOR, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_IN, UINT64_MAX, SECTOR, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_IN, UINT64_MAX / SECTOR, SECTOR, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_OUT, UINT64_MAX / SECTOR + 1, SECTOR, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_IN, 0, 511, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_OUT, 0, 513, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_IN, 0, 0, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_OUT, 0, 0, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_SCSI_CMD, 0, SECTOR, VIRTIO_BLK_S_UNSUPP },
        { VIRTIO_BLK_T_SECURE_ERASE, 0, 16, VIRTIO_BLK_S_UNSUPP },
        { 77, 0, SECTOR, VIRTIO_BLK_S_UNSUPP },
        { UINT32_MAX, 0, 0, VIRTIO_BLK_S_UNSUPP },
        { VIRTIO_BLK_T_FLUSH, 0, SECTOR, VIRTIO_BLK_S_OK },
        { VIRTIO_BLK_T_DISCARD, 0, 0, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_DISCARD, 0, 15, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_WRITE_ZEROES, 0, 17, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_DISCARD, 0, 16 * (AIOKVM_BLK_SEGMENTS + 1), VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_DISCARD, 0, 16 * AIOKVM_BLK_SEGMENTS, VIRTIO_BLK_S_OK }, /* all empty */
    };
    struct disk disk;
    disk_open(&disk, engine, MIB);
    for (size_t i = 0; i < LENGTH(cases); i++) {
        memset(disk.ram + DATA, 0, MIB);
        uint8_t status = request(&disk, cases[i].type, cases[i].sector, DATA, cases[i].length);
        if (status != cases[i].status)
            check_failed(__FILE__, __LINE__, "case %zu: status %u", i, status);
    }
    CHECK(no_event(&disk)); /* none of it is the host's fault */
    disk_close(&disk);
}

EACH_ENGINE(segments_that_lie)
{
    static const struct {
        uint32_t type;
        struct virtio_blk_discard_write_zeroes segment;
        uint8_t status;
    } cases[] = {
        { VIRTIO_BLK_T_DISCARD, { SECTORS, 1, 0 }, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_DISCARD, { UINT64_MAX, 2, 0 }, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_WRITE_ZEROES, { 0, UINT32_MAX, 0 }, VIRTIO_BLK_S_IOERR },
        { VIRTIO_BLK_T_DISCARD, { 0, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP }, VIRTIO_BLK_S_UNSUPP },
        { VIRTIO_BLK_T_DISCARD, { 0, 1, 2 }, VIRTIO_BLK_S_UNSUPP },
        { VIRTIO_BLK_T_WRITE_ZEROES, { 0, 1, 2 }, VIRTIO_BLK_S_UNSUPP },
        { VIRTIO_BLK_T_WRITE_ZEROES, { 0, 1, 0x80000001 }, VIRTIO_BLK_S_UNSUPP },
    };
    struct disk disk;
    disk_open(&disk, engine, MIB);
    for (size_t i = 0; i < LENGTH(cases); i++) {
        memcpy(disk.ram + DATA, &cases[i].segment, 16);
        CHECK_EQ(request(&disk, cases[i].type, 0, DATA, 16), cases[i].status);
        /* A good one before it changes nothing. */
        memcpy(disk.ram + DATA, &(struct virtio_blk_discard_write_zeroes){ 0, 1, 0 }, 16);
        memcpy(disk.ram + DATA + 16, &cases[i].segment, 16);
        CHECK_EQ(request(&disk, cases[i].type, 0, DATA, 32), cases[i].status);
    }
    disk_stop(&disk);
    CHECK_EQ(aiokvm_blk_set_features(disk.blk, 0), 0);
    disk_run(&disk);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_DISCARD, 0, DATA, 16), VIRTIO_BLK_S_UNSUPP);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, DATA, 16), VIRTIO_BLK_S_UNSUPP);
    disk_close(&disk);
}

EACH_ENGINE(a_range_longer_than_promised_is_refused)
{
    static const uint32_t types[] = { VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES };
    struct disk disk;
    disk_open(&disk, engine, UINT64_C(2) << 30);
    for (size_t i = 0; i < LENGTH(types); i++) {
        struct virtio_blk_discard_write_zeroes segment = { 1, AIOKVM_BLK_CLEAR_SECTORS, 0 };
        memcpy(disk.ram + DATA, &segment, 16);
        CHECK_EQ(request(&disk, types[i], 0, DATA, 16), VIRTIO_BLK_S_OK);
        segment.num_sectors++;
        memcpy(disk.ram + DATA, &segment, 16);
        CHECK_EQ(request(&disk, types[i], 0, DATA, 16), VIRTIO_BLK_S_IOERR);
    }
    CHECK(no_event(&disk));
    disk_close(&disk);
}

EACH_ENGINE(ranges_that_direct_io_cannot_take_are_refused)
{
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .align = 4096, .discard = 1 }, MIB);
    static const struct virtio_blk_discard_write_zeroes segments[] = { { 1, 8, 0 }, { 8, 1, 0 } };
    for (size_t i = 0; i < LENGTH(segments); i++) {
        memcpy(disk.ram + DATA, &segments[i], 16);
        CHECK_EQ(request(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, DATA, 16), VIRTIO_BLK_S_IOERR);
        CHECK_EQ(request(&disk, VIRTIO_BLK_T_DISCARD, 0, DATA, 16), VIRTIO_BLK_S_IOERR);
    }
    CHECK(no_event(&disk));
    disk_close(&disk);
}

/* The sync behind the last range: there is no range that it is about. */
TEST(all_ranges_are_zeroed_and_then_the_sync_fails)
{
    struct disk disk;
    disk_open(&disk, AIOKVM_BLK_THREADS, MIB);
    aiokvm_blk_set_writeback(disk.blk, 0);
    struct virtio_blk_discard_write_zeroes segments[AIOKVM_BLK_SEGMENTS];
    for (uint32_t i = 0; i < AIOKVM_BLK_SEGMENTS; i++)
        segments[i] = (struct virtio_blk_discard_write_zeroes){ .sector = i, .num_sectors = 1 };
    memcpy(disk.ram + DATA, segments, sizeof(segments));
    atomic_store(&fdatasync_error, EIO);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, DATA, sizeof(segments)), VIRTIO_BLK_S_IOERR);
    struct aiokvm_blk_event event = wait_event(&disk);
    CHECK_EQ(event.error, EIO);
    CHECK_EQ(event.offset, 0);
    CHECK_EQ(event.length, 0);
    disk_close(&disk);
}

/* The device's own answer makes a second queue of requests available, at the end of the first: were they taken at one
 * go, one that goes on so would keep the thread for ever. */
EACH_ENGINE(no_more_is_taken_at_a_time_than_the_queue_is_long)
{
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .id = "\x10\x08" }, MIB);
    for (int i = 0; i < 0x10; i++)
        CHECK_EQ(request(&disk, VIRTIO_BLK_T_GET_ID, 0, DATA, 20), VIRTIO_BLK_S_OK);
    struct aiokvm_blk_stats before, after;
    CHECK_SOON((aiokvm_blk_stats(disk.blk, &before), before.interrupts == 0x10));
    struct vring *ring = &disk.queues[0].driver;
    uint32_t idx = (uint32_t)((uint8_t *)&ring->avail->idx - disk.ram);
    header(&disk, DATA, VIRTIO_BLK_T_GET_ID, 0);
    ring->desc[0] = (struct vring_desc){ DATA, 16, VRING_DESC_F_NEXT, 1 };
    ring->desc[1] = (struct vring_desc){ DATA + 16, 1, VRING_DESC_F_WRITE, 0 };
    ring->desc[2] = (struct vring_desc){ DATA, 16, VRING_DESC_F_NEXT, 3 };
    ring->desc[3] = (struct vring_desc){ idx, 2, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1 };
    for (uint32_t i = 0; i < QUEUE_SIZE; i++)
        ring->avail->ring[i] = i == 0x0f ? 2 : 0;
    __atomic_store_n(&ring->avail->idx, (uint16_t)(0x10 + QUEUE_SIZE), __ATOMIC_SEQ_CST);
    kick(&disk, 0);
    CHECK_SOON(__atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) == 0x10 + 2 * QUEUE_SIZE);
    aiokvm_blk_stats(disk.blk, &after);
    CHECK_EQ(after.batches - before.batches, 2);
    CHECK(no_event(&disk));
    disk_close(&disk);
}

EACH_ENGINE(data_in_the_wrong_direction)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    struct part read[] = { { DATA - 4096, 16, false }, { DATA, SECTOR, false }, { DATA - 1, 1, true } };
    struct part write[] = { { DATA - 4096, 16, false }, { DATA, SECTOR, true }, { DATA - 1, 1, true } };
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    put(&disk, 0, read, 3);
    kick(&disk, 0);
    wait_used(&disk, 0);
    CHECK_EQ(disk.ram[DATA - 1], VIRTIO_BLK_S_IOERR);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_OUT, 0);
    put(&disk, 0, write, 3);
    kick(&disk, 0);
    CHECK_EQ(wait_used(&disk, 0).length, 1);
    CHECK_EQ(disk.ram[DATA - 1], VIRTIO_BLK_S_IOERR);
    disk_close(&disk);
}

EACH_ENGINE(a_read_only_disk_is_not_written)
{
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .readonly = 1, .discard = 1 }, MIB);
    memset(disk.ram + DATA, 0xff, SECTOR);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, SECTOR), VIRTIO_BLK_S_IOERR);
    memcpy(disk.ram + DATA, &(struct virtio_blk_discard_write_zeroes){ 0, 1, 0 }, 16);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_DISCARD, 0, DATA, 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, DATA, 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_OK);
    uint8_t byte;
    CHECK_EQ(pread(disk.fd, &byte, 1, 0), 1);
    CHECK_EQ(byte, 0);
    disk_close(&disk);
}

EACH_ENGINE(the_id_is_cut_to_fit)
{
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = engine, .id = "0123456789012345678901234" }, MIB);
    for (uint32_t length = 1; length < 64; length++) {
        memset(disk.ram + DATA, 0xcc, 100);
        CHECK_EQ(request(&disk, VIRTIO_BLK_T_GET_ID, 0, DATA, length), VIRTIO_BLK_S_OK);
        uint32_t copied = length < 20 ? length : 20;
        CHECK(memcmp(disk.ram + DATA, "01234567890123456789", copied) == 0);
        CHECK_EQ(disk.ram[DATA + copied], 0xcc);
    }
    disk_close(&disk);
}

/* Gives the chain to a disk that runs: its queue breaks, and nothing else does. */
static void breaks(uint32_t engine, const struct part *parts, uint32_t count, int error)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    header(&disk, DATA, VIRTIO_BLK_T_IN, 0);
    put(&disk, 1, parts, count);
    kick(&disk, 1);
    struct aiokvm_blk_event event = wait_event(&disk);
    CHECK_EQ(event.kind, AIOKVM_BLK_BROKEN);
    CHECK_EQ(event.queue, 1);
    CHECK_EQ(event.error, error);
    struct used used;
    put(&disk, 1, (struct part[]){ { DATA, 16, false }, { DATA + 4096, 513, true } }, 2);
    kick(&disk, 1);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 0, DATA + 8192, SECTOR), VIRTIO_BLK_S_OK);
    CHECK(!take_used(&disk, 1, &used));
    CHECK(no_event(&disk));
    /* Until the driver resets the device. */
    disk_stop(&disk);
    disk_attach(&disk, 1);
    disk_run(&disk);
    put(&disk, 1, (struct part[]){ { DATA, 16, false }, { DATA + 4096, 513, true } }, 2);
    kick(&disk, 1);
    CHECK_EQ(wait_used(&disk, 1).length, 513);
    disk_close(&disk);
}

EACH_ENGINE(a_header_that_is_too_short_breaks_the_queue)
{
    breaks(engine, (struct part[]){ { DATA, 15, false }, { DATA + 4096, 513, true } }, 2, AIOKVM_BLK_EHEADER);
    breaks(engine, (struct part[]){ { DATA, 16, true } }, 1, AIOKVM_BLK_EHEADER);
}

EACH_ENGINE(a_status_that_cannot_be_written_breaks_the_queue)
{
    breaks(engine, (struct part[]){ { DATA, 16, false } }, 1, AIOKVM_BLK_ESTATUS);
    breaks(engine, (struct part[]){ { DATA, 16, false }, { DATA + 4096, 513, false } }, 2, AIOKVM_BLK_ESTATUS);
}

EACH_ENGINE(a_buffer_outside_of_ram_breaks_the_queue)
{
    breaks(engine, (struct part[]){ { DATA, 16, false }, { RAM_BYTES - 512, 513, true } }, 2,
           AIOKVM_VRING_EADDRESS);
}

EACH_ENGINE(empty_notifications_cost_nothing_but_time)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    for (int i = 0; i < 20000; i++)
        kick(&disk, i % QUEUES);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_IN, 0, DATA, SECTOR), VIRTIO_BLK_S_OK);
    struct aiokvm_blk_stats stats;
    CHECK_SOON((aiokvm_blk_stats(disk.blk, &stats), stats.interrupts == 1));
    disk_close(&disk);
}

EACH_ENGINE(notifications_before_the_driver_is_ready_are_dropped)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    disk_stop(&disk);
    header(&disk, DATA, VIRTIO_BLK_T_IN, 0);
    put(&disk, 0, (struct part[]){ { DATA, 16, false }, { DATA + 4096, 513, true } }, 2);
    kick(&disk, 0);
    struct used used;
    CHECK(!take_used(&disk, 0, &used));
    disk_run(&disk);
    CHECK_EQ(wait_used(&disk, 0).length, 513);
    disk_close(&disk);
}
