#define _GNU_SOURCE
#include "blk_driver.h"

#include <errno.h>
#include <fcntl.h>
#ifdef AIOKVM_HAVE_LIBURING
#include <liburing.h>
#endif
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "check.h"

enum { HEADER = DATA - 4096, STATUS = DATA - 1 };

_Atomic int fdatasync_error, fdatasync_calls;
int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);

int __wrap_fdatasync(int fd)
{
    atomic_fetch_add(&fdatasync_calls, 1);
    errno = atomic_exchange(&fdatasync_error, 0);
    return errno ? -1 : __real_fdatasync(fd);
}

sem_t *_Atomic write_permits;
ssize_t __real_pwritev64v2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int count, off_t offset, int flags);

ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    sem_t *permits = atomic_load(&write_permits);
    if (permits)
        CHECK_EQ(sem_wait(permits), 0);
    return __real_pwritev64v2(fd, iov, count, offset, flags);
}

void disk_attach(struct disk *disk, uint32_t index)
{
    struct queue *queue = &disk->queues[index];
    uint64_t base = index * RING_BYTES;
    memset(disk->ram + base, 0, RING_BYTES);
    vring_init(&queue->driver, QUEUE_SIZE, disk->ram + base, 4096);
    queue->next = queue->seen = 0;
    uint64_t avail = (uint64_t)((uint8_t *)queue->driver.avail - disk->ram);
    uint64_t used = (uint64_t)((uint8_t *)queue->driver.used - disk->ram);
    aiokvm_vring_stop(queue->vring);
    CHECK_EQ(aiokvm_vring_start(queue->vring, QUEUE_SIZE, base, avail, used, 0), 0);
    CHECK_EQ(aiokvm_blk_set_queue(disk->blk, index, queue->vring, queue->kick), 0);
}

const char *uring_refused(void)
{
#ifdef AIOKVM_HAVE_LIBURING
    struct io_uring ring;
    int result = io_uring_queue_init(1, &ring, 0);
    if (result == 0)
        io_uring_queue_exit(&ring);
    return result == 0 ? NULL : strerror(-result);
#else
    return "built without io_uring";
#endif
}

void disk_open_with(struct disk *disk, struct aiokvm_blk_config config, uint64_t bytes)
{
    *disk = (struct disk){ .bytes = bytes };
    disk->ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(disk->ram != MAP_FAILED);
    if (!config.fd) {
        char name[] = "/tmp/aiokvm-blk-XXXXXX";
        config.fd = mkostemp(name, O_CLOEXEC);
        CHECK(config.fd >= 0 && unlink(name) == 0 && ftruncate(config.fd, (off_t)bytes) == 0);
    }
    disk->fd = config.fd;
    config.capacity_sectors = bytes / SECTOR;
    config.threads = config.threads ? config.threads : 4;
    config.name = "test/disk0";
    config.id = config.id ? config.id : "serial";
    int error = -1;
    disk->blk = aiokvm_blk_new(&config, &error);
    CHECK_EQ(error, 0);
    CHECK(disk->blk);
    disk->notifier = (struct aiokvm_notifier){ eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), &disk->status };
    uint64_t features = 1u << VIRTIO_BLK_F_DISCARD | 1u << VIRTIO_BLK_F_WRITE_ZEROES;
    CHECK_EQ(aiokvm_blk_set_features(disk->blk, features), 0);
    struct aiokvm_ram ram = { 0, RAM_BYTES, disk->ram };
    for (uint32_t i = 0; i < QUEUES; i++) {
        disk->queues[i].kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        disk->queues[i].vring = aiokvm_vring_new(&ram, 1, QUEUE_SIZE);
        disk_attach(disk, i);
    }
    disk_run(disk);
}

void disk_open(struct disk *disk, uint32_t engine, uint64_t bytes)
{
    disk_open_with(disk, (struct aiokvm_blk_config){ .engine = engine, .discard = 1 }, bytes);
}

void disk_run(struct disk *disk)
{
    CHECK_EQ(aiokvm_blk_run(disk->blk, &disk->notifier), 0);
    CHECK_SOON(aiokvm_blk_state(disk->blk) == AIOKVM_BLK_RUNNING);
}

void disk_stop(struct disk *disk)
{
    CHECK_EQ(aiokvm_blk_stop(disk->blk, -1), 0);
    CHECK_SOON(aiokvm_blk_state(disk->blk) == AIOKVM_BLK_IDLE);
}

void disk_close(struct disk *disk)
{
    CHECK_EQ(aiokvm_blk_exit(disk->blk), 0);
    CHECK_SOON(aiokvm_blk_state(disk->blk) == AIOKVM_BLK_EXITED);
    CHECK_EQ(aiokvm_blk_join(disk->blk), 0);
    aiokvm_blk_free(disk->blk);
    for (uint32_t i = 0; i < QUEUES; i++) {
        aiokvm_vring_free(disk->queues[i].vring);
        close(disk->queues[i].kick);
    }
    close(disk->notifier.irqfd);
    close(disk->fd);
    munmap(disk->ram, RAM_BYTES);
}

uint32_t put(struct disk *disk, uint32_t index, const struct part *parts, uint32_t count)
{
    struct queue *queue = &disk->queues[index];
    struct vring *ring = &queue->driver;
    uint32_t head = queue->next;
    CHECK(count && count <= QUEUE_SIZE);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = (head + i) % QUEUE_SIZE;
        ring->desc[at] = (struct vring_desc){
            .addr = parts[i].gpa,
            .len = parts[i].length,
            .flags = (uint16_t)((parts[i].writable ? VRING_DESC_F_WRITE : 0) |
                                (i + 1 < count ? VRING_DESC_F_NEXT : 0)),
            .next = (uint16_t)((at + 1) % QUEUE_SIZE),
        };
    }
    queue->next = (head + count) % QUEUE_SIZE;
    uint16_t idx = ring->avail->idx;
    ring->avail->ring[idx % QUEUE_SIZE] = (uint16_t)head;
    /* Before a look at whether the device wants to be notified. */
    __atomic_store_n(&ring->avail->idx, (uint16_t)(idx + 1), __ATOMIC_SEQ_CST);
    return head;
}

void kick(struct disk *disk, uint32_t index)
{
    CHECK_EQ(write(disk->queues[index].kick, &(uint64_t){ 1 }, 8), 8);
}

bool take_used(struct disk *disk, uint32_t index, struct used *used)
{
    struct queue *queue = &disk->queues[index];
    if (__atomic_load_n(&queue->driver.used->idx, __ATOMIC_ACQUIRE) == queue->seen)
        return false;
    struct vring_used_elem *element = &queue->driver.used->ring[queue->seen++ % QUEUE_SIZE];
    *used = (struct used){ element->id, element->len };
    return true;
}

struct used wait_used(struct disk *disk, uint32_t index)
{
    struct used used;
    CHECK_SOON(take_used(disk, index, &used));
    return used;
}

void header(struct disk *disk, uint32_t gpa, uint32_t type, uint64_t sector)
{
    struct virtio_blk_outhdr outhdr = { .type = type, .sector = sector };
    memcpy(disk->ram + gpa, &outhdr, sizeof(outhdr));
}

uint8_t request(struct disk *disk, uint32_t type, uint64_t sector, uint32_t gpa, uint32_t length)
{
    bool to_guest = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    struct part parts[] = { { HEADER, 16, false }, { gpa, length, to_guest }, { STATUS, 1, true } };
    header(disk, HEADER, type, sector);
    disk->ram[STATUS] = 0xee;
    uint32_t head = length ? put(disk, 0, parts, 3) : put(disk, 0, (struct part[]){ parts[0], parts[2] }, 2);
    kick(disk, 0);
    CHECK_EQ(wait_used(disk, 0).head, head);
    return disk->ram[STATUS];
}

struct aiokvm_blk_event wait_event(struct disk *disk)
{
    struct aiokvm_blk_event event;
    CHECK_SOON(aiokvm_blk_take(disk->blk, &event));
    return event;
}

bool no_event(struct disk *disk)
{
    struct aiokvm_blk_event event;
    return !aiokvm_blk_take(disk->blk, &event);
}

void put_reads(struct disk *disk, uint32_t queue, uint32_t first, uint32_t count)
{
    enum { BYTES = 64 << 10 };
    for (uint32_t i = first; i < first + count; i++) {
        struct part parts[] = { { DATA - 4096, 16, false }, { DATA + i * BYTES, BYTES, true }, { DATA - 1, 1, true } };
        put(disk, queue, parts, 3);
    }
}
