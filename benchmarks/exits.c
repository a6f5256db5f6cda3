/* The peer of benchmarks/exits.py: what an exit costs with nothing around it. */
#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { STOP = 1 << 30 };

/* Whom a doorbell wakes: counts its rings until somebody adds STOP to them. */
uint64_t listen_bare(int fd)
{
    uint64_t total = 0, rings;
    while (total < STOP && read(fd, &rings, sizeof(rings)) == sizeof(rings))
        total += rings;
    return total - STOP;
}

/* Runs a vCPU until it writes to end_port; reads give ones. Returns 0, or what went wrong. */
int run_bare(int fd, struct kvm_run *run, unsigned end_port)
{
    for (;;) {
        if (ioctl(fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR)
                continue; /* some hosts come back for nothing when they are busy */
            return errno;
        }
        if (run->exit_reason != KVM_EXIT_IO)
            return -(int)run->exit_reason;
        if (run->io.port == end_port)
            return 0;
        if (run->io.direction == KVM_EXIT_IO_IN)
            memset((char *)run + run->io.data_offset, 0xff, run->io.size * run->io.count);
    }
}
