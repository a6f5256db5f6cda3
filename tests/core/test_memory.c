/* memory.c: mappings of guest RAM and of kvm_run. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "memory.h"

enum { PAGE = 4096, SIZE = 16 * PAGE };

static int ram(size_t size)
{
    int fd = memfd_create("ram", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static bool is_mapped(void *address)
{
    unsigned char vector;
    return mincore(address, PAGE, &vector) == 0;
}

TEST(mapping_is_aligned_and_is_the_file)
{
    int fd = ram(SIZE);
    static const size_t aligns[] = { 0, 1, PAGE, 2 * PAGE, 2 << 20, 1 << 30 };
    for (size_t i = 0; i < LENGTH(aligns); i++) {
        int error = -1;
        unsigned char *bytes = aiokvm_map(fd, SIZE, aligns[i], &error);
        CHECK(bytes);
        CHECK_EQ(error, 0);
        CHECK(!aligns[i] || (uintptr_t)bytes % aligns[i] == 0);
        unsigned char mark = (unsigned char)(i + 1), read = 0;
        bytes[SIZE - 1] = mark;
        CHECK_EQ(pread(fd, &read, 1, SIZE - 1), 1);
        CHECK_EQ(read, mark);
        aiokvm_unmap(bytes, SIZE);
        CHECK(!is_mapped(bytes));
        CHECK(!is_mapped(bytes + SIZE - PAGE));
    }
    close(fd);
}

/* The mapping of ram in this process: its bounds, and what smaps says of it. */
struct mapping {
    uintptr_t start, end;
    char flags[128];
    int count;
    bool crowded; /* an inaccessible reservation lies next to it */
};

static struct mapping find_ram(void)
{
    struct mapping ram = { 0 };
    FILE *smaps = fopen("/proc/self/smaps", "re");
    if (!smaps)
        return ram;
    uintptr_t start = 0, end, reserved_end = 0;
    char line[512], access[5] = "";
    bool inside = false;
    while (fgets(line, sizeof(line), smaps)) {
        if (sscanf(line, "%lx-%lx %4s", &start, &end, access) == 3) {
            bool reserved = strcmp(access, "---p") == 0;
            ram.crowded |= ram.count && reserved && start == ram.end;
            inside = strstr(line, "memfd:ram");
            if (inside) {
                ram.start = start;
                ram.end = end;
                ram.count++;
                ram.crowded |= reserved_end == start;
            }
            reserved_end = reserved ? end : 0;
        } else if (inside && strncmp(line, "VmFlags:", 8) == 0) {
            strcpy(ram.flags, line);
        }
    }
    fclose(smaps);
    return ram;
}

/* Of the space that was reserved for the sake of the alignment nothing is left, on either side. */
TEST(nothing_is_mapped_around_it)
{
    int fd = ram(SIZE), error;
    for (int i = 0; i < 20; i++) {
        char *bytes = aiokvm_map(fd, SIZE, 2 << 20, &error);
        CHECK(bytes);
        struct mapping mapping = find_ram();
        CHECK_EQ(mapping.count, 1);
        CHECK_EQ(mapping.start, (uintptr_t)bytes);
        CHECK_EQ(mapping.end, (uintptr_t)bytes + SIZE);
        CHECK(!mapping.crowded);
        aiokvm_unmap(bytes, SIZE);
        CHECK_EQ(find_ram().count, 0);
    }
    close(fd);
}

static void check_refused(int fd, size_t size, size_t align, int expected)
{
    int error = 0;
    CHECK(!aiokvm_map(fd, size, align, &error));
    CHECK_EQ(error, expected);
}

TEST(what_cannot_be_mapped_is_refused_by_its_errno)
{
    int fd = ram(SIZE);
    check_refused(fd, 0, 0, EINVAL);
    check_refused(fd, 0, 2 << 20, EINVAL);
    check_refused(fd, PAGE + 1, 2 << 20, EINVAL);
    check_refused(-1, SIZE, 0, EBADF);
    check_refused(-1, SIZE, 2 << 20, EBADF);
    check_refused(fd, -(size_t)PAGE, 2 << 20, EOVERFLOW);
    check_refused(fd, (size_t)1 << 60, 0, ENOMEM);
    int no_memory = eventfd(0, EFD_CLOEXEC);
    check_refused(no_memory, SIZE, 0, ENODEV);
    check_refused(no_memory, SIZE, 2 << 20, ENODEV);
    close(no_memory);
    close(fd);
}

TEST(a_fork_does_not_inherit_it)
{
    int fd = ram(SIZE), error;
    CHECK(aiokvm_map(fd, SIZE, 2 << 20, &error));
    struct mapping mapping = find_ram();
    CHECK_EQ(mapping.count, 1);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child)
        _exit(find_ram().count);
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    aiokvm_unmap((void *)mapping.start, SIZE);
    close(fd);
}

TEST(a_core_dump_leaves_it_out)
{
    int fd = ram(SIZE), error;
    char *bytes = aiokvm_map(fd, SIZE, 0, &error);
    CHECK(bytes);
    CHECK(strstr(find_ram().flags, " dd"));
    aiokvm_unmap(bytes, SIZE);
    close(fd);
}

TEST(whole_pages_of_a_part_can_be_discarded)
{
    int fd = ram(SIZE), error;
    unsigned char *bytes = aiokvm_map(fd, SIZE, 0, &error);
    CHECK(bytes);
    memset(bytes, 'x', SIZE);
    CHECK_EQ(aiokvm_discard(bytes + 1, 3 * PAGE), 0);
    CHECK_EQ(aiokvm_discard(bytes + 8 * PAGE + 1, PAGE), 0);
    CHECK_EQ(aiokvm_discard(bytes, 0), 0);
    for (size_t i = 0; i < SIZE; i++)
        CHECK_EQ(bytes[i], i / PAGE == 1 || i / PAGE == 2 ? 0 : 'x');
    aiokvm_unmap(bytes, SIZE);
    close(fd);

    bytes = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(bytes != MAP_FAILED);
    munmap(bytes, PAGE);
    CHECK_EQ(aiokvm_discard(bytes, PAGE), -ENOMEM);
}

TEST(anonymous_memory_is_aligned_and_can_be_discarded)
{
    static const size_t aligns[] = { 0, 2 << 20 };
    for (size_t i = 0; i < LENGTH(aligns); i++) {
        for (int overcommit = 0; overcommit < 2; overcommit++) {
            int error = -1;
            unsigned char *bytes = aiokvm_map_anonymous(SIZE, aligns[i], overcommit, &error);
            CHECK(bytes);
            CHECK_EQ(error, 0);
            CHECK(!aligns[i] || (uintptr_t)bytes % aligns[i] == 0);
            memset(bytes, 'x', SIZE);
            CHECK_EQ(aiokvm_discard(bytes + PAGE, PAGE), 0);
            CHECK_EQ(bytes[PAGE - 1], 'x');
            CHECK_EQ(bytes[PAGE], 0);
            CHECK_EQ(bytes[2 * PAGE], 'x');
            aiokvm_zero(bytes + 2 * PAGE, PAGE);
            CHECK_EQ(bytes[3 * PAGE - 1], 0);
            CHECK_EQ(bytes[3 * PAGE], 'x');
            aiokvm_unmap(bytes, SIZE);
            CHECK(!is_mapped(bytes));
        }
    }
    int error = 0;
    CHECK(!aiokvm_map_anonymous(PAGE + 1, 0, 0, &error));
    CHECK_EQ(error, EINVAL);
    CHECK(!aiokvm_map_anonymous((size_t)1 << 60, 0, 1, &error));
    CHECK_EQ(error, ENOMEM);
}
