#ifndef AIOKVM_IOCTL_H
#define AIOKVM_IOCTL_H

#include <errno.h>
#include <sys/ioctl.h>

/* ioctl(2) with a failure as the negative errno: cffi's errno is the calling thread's and easily lost. */
static inline long aiokvm_ioctl(int fd, unsigned long request, void *arg)
{
    int result = ioctl(fd, request, arg);
    return result < 0 ? -errno : result;
}

#endif
