#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <linux/prctl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

static void *map(int fd, int flags, size_t size, size_t align, int *error)
{
    /* KVM maps a guest with large pages only where host and guest addresses are congruent to them, and
     * mmap promises no alignment past a page: reserve more than is needed, and map inside. That costs munmaps,
     * and those take time for each VM of the process. */
    size_t reserved = size + align;
    if (size & ((size_t)sysconf(_SC_PAGESIZE) - 1)) {
        *error = EINVAL;
        return NULL;
    }
    if (reserved < size) {
        *error = EOVERFLOW;
        return NULL;
    }
    char *area = NULL, *address = NULL;
    if (align) {
        area = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (area == MAP_FAILED) {
            *error = errno;
            return NULL;
        }
        address = area + (-(uintptr_t)area & (align - 1));
        flags |= MAP_FIXED;
    }
    char *mapped = mmap(address, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (mapped == MAP_FAILED || madvise(mapped, size, MADV_DONTFORK) < 0) {
        *error = errno;
        if (align)
            munmap(area, reserved);
        else if (mapped != MAP_FAILED)
            munmap(mapped, size);
        return NULL;
    }
    address = mapped;
    /* A kernel without core dumps refuses this advice; there is nothing to leave out then. */
    madvise(address, size, MADV_DONTDUMP);
    if (address > area && align)
        munmap(area, (size_t)(address - area));
    if (align && address + size < area + reserved)
        munmap(address + size, (size_t)(area + reserved - (address + size)));
    *error = 0;
    return address;
}

void *aiokvm_map(int fd, size_t size, size_t align, int *error)
{
    return map(fd, MAP_SHARED, size, align, error);
}

void *aiokvm_map_anonymous(size_t size, size_t align, int overcommit, int *error)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (overcommit ? MAP_NORESERVE : 0);
    void *address = map(-1, flags, size, align, error);
    if (!address)
        return NULL;
    /* Advice, which a kernel without huge pages refuses. Memory that is not aligned to them is given the small
     * pages that it touches: a large one would be paid for with its neighbours. */
    madvise(address, size, align ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    /* For /proc/PID/maps, where the kernel has names for such memory. */
    prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, address, size, "aiokvm-ram");
    return address;
}

void aiokvm_unmap(void *address, size_t size)
{
    munmap(address, size);
}

void aiokvm_zero(void *address, size_t size)
{
    memset(address, 0, size);
}

int aiokvm_discard(void *address, size_t size)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;
    uintptr_t start = ((uintptr_t)address + page) & ~page;
    uintptr_t end = ((uintptr_t)address + size) & ~page;
    if (start >= end)
        return 0;
    /* Of a file's pages this makes a hole in the file, so that a host that is short of memory has it back: only
     * dropped from the mapping, they would come back as they were. Anonymous memory has no file, and says EINVAL. */
    if (madvise((void *)start, end - start, MADV_REMOVE) == 0)
        return 0;
    if (errno != EINVAL || madvise((void *)start, end - start, MADV_DONTNEED) < 0)
        return -errno;
    return 0;
}
