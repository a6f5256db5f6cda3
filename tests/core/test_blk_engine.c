/* blk*.c: which engine serves a disk, and when its thread runs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blk_driver.h"
#include "blk_priv.h"
#include "check.h"

enum { MIB = 1 << 20 };

/* As a container's policy does: from here on io_uring_setup is refused. */
static bool refuse_uring(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { LENGTH(filter), filter };
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(threads_serve_where_io_uring_is_refused)
{
    if (uring_refused()) {
        check_skip(uring_refused());
        return;
    }
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(refuse_uring());
        int error = 0, refused = 0;
        struct aiokvm_blk_config config = { .fd = 0, .engine = AIOKVM_BLK_IO_URING, .name = "x", .id = "" };
        CHECK(!aiokvm_blk_new(&config, &error));
        CHECK_EQ(error, EPERM);
        struct disk disk;
        disk_open(&disk, AIOKVM_BLK_AUTO, MIB);
        CHECK_EQ(aiokvm_blk_engine(disk.blk, &refused), AIOKVM_BLK_THREADS);
        CHECK_EQ(refused, EPERM);
        CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, SECTOR), VIRTIO_BLK_S_OK);
        disk_close(&disk);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
}

EACH_ENGINE(a_flush_that_failed_fails_for_ever)
{
    /* A device that takes writes and cannot be synchronized. */
    struct aiokvm_blk_config config = { .engine = engine, .fd = open("/dev/zero", O_RDWR | O_CLOEXEC) };
    CHECK(config.fd >= 0);
    struct disk disk;
    disk_open_with(&disk, config, MIB);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, SECTOR), VIRTIO_BLK_S_OK);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(wait_event(&disk).error, EINVAL);
    /* From now on it could be. */
    char name[] = "/tmp/aiokvm-blk-XXXXXX";
    int file = mkostemp(name, O_CLOEXEC);
    CHECK(file >= 0 && unlink(name) == 0 && ftruncate(file, MIB) == 0);
    CHECK_EQ(dup3(file, disk.fd, O_CLOEXEC), disk.fd);
    close(file);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_OUT, 0, DATA, SECTOR), VIRTIO_BLK_S_OK);
    CHECK_EQ(request(&disk, VIRTIO_BLK_T_FLUSH, 0, 0, 0), VIRTIO_BLK_S_IOERR);
    disk_close(&disk);
}

static int policy_of(const struct disk *disk)
{
    return sched_getscheduler(aiokvm_blk_tid(disk->blk));
}

/* So many requests with one notification, to their end. */
static void batch(struct disk *disk, uint32_t count)
{
    struct used used;
    put_reads(disk, 0, 0, count);
    kick(disk, 0);
    for (uint32_t i = 0; i < count; i++)
        used = wait_used(disk, 0);
    (void)used;
}

EACH_ENGINE(the_thread_lets_vcpus_go_on_while_that_makes_batches)
{
    struct disk disk;
    disk_open(&disk, engine, MIB);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_IN, 0);
    CHECK_EQ(policy_of(&disk), SCHED_OTHER);
    int single = 0;
    for (; policy_of(&disk) == SCHED_OTHER; single++) {
        CHECK(single < 1000);
        batch(&disk, 1);
    }
    CHECK(single >= 60);
    /* That pays. A notification may be seen before all requests are: then a batch is two. */
    for (int i = 0; i < 50; i++)
        batch(&disk, 8);
    CHECK_EQ(policy_of(&disk), SCHED_BATCH);
    /* That does not. */
    for (single = 0; policy_of(&disk) == SCHED_BATCH; single++) {
        CHECK(single < 1000);
        batch(&disk, 1);
    }
    disk_close(&disk);
}

TEST(the_driver_is_told_of_large_requests_together)
{
    struct blk_ended ended = { .count = 1 };
    CHECK_EQ(blk_hold_ns(&ended, 2), BLK_HOLD_NS);
    CHECK(ended.since_ns);
    ended.count = 3;
    /* Others have to keep the storage busy, and the wait has an end. */
    CHECK_EQ(blk_hold_ns(&ended, 5), 0);
    ended.since_ns = 1;
    CHECK_EQ(blk_hold_ns(&ended, 6), 0);
}

TEST(the_driver_is_told_at_once_of_small_requests_and_of_nothing)
{
    struct blk_ended ended = { .count = 1, .some_small = true }, none = { 0 };
    CHECK_EQ(blk_hold_ns(&ended, 1000), 0);
    CHECK_EQ(blk_hold_ns(&none, 1000), 0);
}

TEST(a_large_request_that_has_ended_does_not_wait_for_one_that_takes_long)
{
    enum { REQUESTS = 6 };
    sem_t permits;
    CHECK_EQ(sem_init(&permits, 0, 0), 0);
    atomic_store(&write_permits, &permits);
    struct disk disk;
    disk_open_with(&disk, (struct aiokvm_blk_config){ .engine = AIOKVM_BLK_THREADS, .threads = REQUESTS }, 4 * MIB);
    header(&disk, DATA - 4096, VIRTIO_BLK_T_OUT, 0);
    for (uint32_t i = 0; i < REQUESTS; i++) {
        struct part parts[] = { { DATA - 4096, 16, false }, { DATA, BLK_LARGE_BYTES, false }, { DATA - 1, 1, true } };
        put(&disk, 0, parts, LENGTH(parts));
    }
    kick(&disk, 0);
    struct aiokvm_blk_stats stats;
    for (uint32_t left = REQUESTS; left-- > 0;) {
        CHECK_EQ(sem_post(&permits), 0);
        wait_used(&disk, 0);
        CHECK_SOON((aiokvm_blk_stats(disk.blk, &stats), stats.in_flight == left));
    }
    CHECK_EQ(stats.writes, REQUESTS);
    disk_close(&disk);
    atomic_store(&write_permits, NULL);
    sem_destroy(&permits);
}
