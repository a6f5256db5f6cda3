/* A disk under test: a temporary file behind aiokvm_blk, and a driver with a split ring for each queue. */
#ifndef AIOKVM_BLK_DRIVER_H
#define AIOKVM_BLK_DRIVER_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "blk.h"

enum {
    RAM_BYTES = 8 << 20,
    QUEUE_SIZE = 1024,
    RING_BYTES = 64 << 10,
    DATA = 1 << 20, /* guest addresses from here on are the test's */
    QUEUES = 2,
    SECTOR = 512,
};

struct queue {
    struct aiokvm_vring *vring;
    struct vring driver;
    uint32_t next; /* descriptor */
    uint16_t seen; /* of the used ring */
    int kick;
};

struct disk {
    struct aiokvm_blk *blk;
    uint8_t *ram;
    struct queue queues[QUEUES];
    struct aiokvm_notifier notifier;
    uint32_t status;
    int fd;
    uint64_t bytes;
};

/* A buffer of the driver's: a guest address and a length. */
struct part {
    uint32_t gpa, length;
    bool writable;
};

struct used {
    uint32_t head, length;
};

/* The next call fails so; how many there were. */
extern _Atomic int fdatasync_error, fdatasync_calls;

/* While write_permits is set each write of the pool of threads takes one first. */
extern sem_t *_Atomic write_permits;

/* Why io_uring cannot be had, NULL if it can. */
const char *uring_refused(void);

/* A test for each engine; without io_uring one is skipped. */
#define EACH_ENGINE(name)                                       \
    static void name(uint32_t engine);                          \
    TEST(name##_uring)                                          \
    {                                                           \
        if (uring_refused())                                    \
            check_skip(uring_refused());                        \
        else                                                    \
            name(AIOKVM_BLK_IO_URING);                          \
    }                                                           \
    TEST(name##_threads) { name(AIOKVM_BLK_THREADS); }          \
    static void name(uint32_t engine)

/* The file is bytes long and empty. */
void disk_open(struct disk *disk, uint32_t engine, uint64_t bytes);
/* The same with what config says; fd, capacity, name and id are filled in where they are not set. */
void disk_open_with(struct disk *disk, struct aiokvm_blk_config config, uint64_t bytes);
void disk_close(struct disk *disk);
void disk_run(struct disk *disk);
void disk_stop(struct disk *disk);
void disk_attach(struct disk *disk, uint32_t queue);

/* Makes a chain available. */
uint32_t put(struct disk *disk, uint32_t queue, const struct part *parts, uint32_t count);
void kick(struct disk *disk, uint32_t queue);
bool take_used(struct disk *disk, uint32_t queue, struct used *used);
struct used wait_used(struct disk *disk, uint32_t queue);

/* Writes a header there. */
void header(struct disk *disk, uint32_t gpa, uint32_t type, uint64_t sector);
/* One request on queue 0 with one buffer of data (none if length is 0), to its end: its status. */
uint8_t request(struct disk *disk, uint32_t type, uint64_t sector, uint32_t gpa, uint32_t length);
/* So many reads, each to a buffer of its own, with the header at DATA - 4096. */
void put_reads(struct disk *disk, uint32_t queue, uint32_t first, uint32_t count);
/* The next event, which has to come. */
struct aiokvm_blk_event wait_event(struct disk *disk);
bool no_event(struct disk *disk);

#endif
