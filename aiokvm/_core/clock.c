#include "clock.h"

#include <sched.h>
#include <time.h>

/* About what an answer takes if both sides have a CPU. */
#define YIELD_AFTER_NS 3000

uint64_t aiokvm_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void aiokvm_relax(uint64_t waited_ns)
{
    if (waited_ns < YIELD_AFTER_NS)
        __builtin_ia32_pause();
    else
        sched_yield();
}
