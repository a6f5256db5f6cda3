#include "memory.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

void *aiokvm_map(int fd, size_t size, size_t align, int *error)
{
    /* KVM maps a guest with large pages only where host and guest addresses are congruent to them, and
     * mmap promises no alignment past a page: reserve more than is needed, and map inside. */
    size_t reserved = size + align;
    if (size & ((size_t)sysconf(_SC_PAGESIZE) - 1)) {
        *error = EINVAL;
        return NULL;
    }
    if (reserved < size) {
        *error = EOVERFLOW;
        return NULL;
    }
    char *area = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        *error = errno;
        return NULL;
    }
    size_t lead = align ? -(uintptr_t)area & (align - 1) : 0;
    char *address = area + lead;
    if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
        madvise(address, size, MADV_DONTFORK) < 0) {
        *error = errno;
        munmap(area, reserved);
        return NULL;
    }
    /* A kernel without core dumps refuses this advice; there is nothing to leave out then. */
    madvise(address, size, MADV_DONTDUMP);
    if (lead)
        munmap(area, lead);
    if (align - lead)
        munmap(address + size, align - lead);
    *error = 0;
    return address;
}

void aiokvm_unmap(void *address, size_t size)
{
    munmap(address, size);
}

int aiokvm_discard(void *address, size_t size)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;
    uintptr_t start = ((uintptr_t)address + page) & ~page;
    uintptr_t end = ((uintptr_t)address + size) & ~page;
    /* Of a file's pages this makes a hole in the file, so that a host that is short of memory has it back. */
    if (start < end && madvise((void *)start, end - start, MADV_REMOVE) < 0)
        return -errno;
    return 0;
}
