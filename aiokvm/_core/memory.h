#ifndef AIOKVM_MEMORY_H
#define AIOKVM_MEMORY_H

#include <stddef.h>

/* Maps size bytes (whole pages) of fd, shared and writable, at a multiple of align (a power of two; 0: any
 * page). A fork does not inherit the mapping and a core dump leaves it out. Returns NULL and sets *error. */
void *aiokvm_map(int fd, size_t size, size_t align, int *error);
/* The same of memory without a file, in the largest pages that the host gives where it is aligned to 2 MiB.
 * overcommit: the kernel need not promise that there will be as much. */
void *aiokvm_map_anonymous(size_t size, size_t align, int overcommit, int *error);
void aiokvm_unmap(void *address, size_t size);
/* memset, which lets other threads of Python run meanwhile. */
void aiokvm_zero(void *address, size_t size);
/* Gives the whole pages in a part of such a mapping back to the kernel: they read as zeros. Returns 0 or -errno. */
int aiokvm_discard(void *address, size_t size);

#endif
