#include "memory.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

void *aiokvm_map(int fd, size_t size, size_t align, int *error)
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
    int flags = MAP_SHARED;
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
