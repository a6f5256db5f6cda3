#ifndef AIOKVM_MEMORY_H
#define AIOKVM_MEMORY_H

#include <stddef.h>

/* Maps size bytes (whole pages) of fd, shared and writable, at a multiple of align (a power of two; 0: any
 * page). A fork does not inherit the mapping and a core dump leaves it out. Returns NULL and sets *error. */
void *aiokvm_map(int fd, size_t size, size_t align, int *error);
void aiokvm_unmap(void *address, size_t size);
/* Gives the whole pages in a part of such a mapping back to the kernel: they read as zeros. Returns 0 or -errno. */
int aiokvm_discard(void *address, size_t size);

#endif
