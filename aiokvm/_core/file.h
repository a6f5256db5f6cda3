#ifndef AIOKVM_FILE_H
#define AIOKVM_FILE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdint.h>

/* Gives back what a range of a file holds, which reads as zeroes then: 0 or a negative errno. */
static inline int aiokvm_punch_hole(int fd, uint64_t offset, uint64_t length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return fallocate(fd, mode, (off_t)offset, (off_t)length) < 0 ? -errno : 0;
}

#endif
