#define _GNU_SOURCE
#include "holdups.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PLAIN __attribute__((no_instrument_function))

/* So old may a reading of the thread's clock be: it is a system call, the other clock is none. */
enum { FRESH_NS = 100000 };

static _Thread_local bool is_first;
static unsigned depth;
static uint64_t began_ns, read_ns, cpu_ns;
static void *worst_function;
static uint64_t worst_ns;

void __cyg_profile_func_enter(void *function, void *caller) PLAIN;
void __cyg_profile_func_exit(void *function, void *caller) PLAIN;

PLAIN static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

__attribute__((constructor)) PLAIN static void begin(void)
{
    is_first = true;
}

PLAIN static struct holdup named(void *function, uint64_t took_ns)
{
    /* A static function has no name there. */
    Dl_info info = { 0 };
    if (function == (void *)holdups_end)
        return (struct holdup){ "a step", took_ns };
    dladdr(function, &info);
    return (struct holdup){ info.dli_sname ? info.dli_sname : "a callback", took_ns };
}

/* Of a program that never asks: a fuzzer. */
__attribute__((destructor)) PLAIN static void end(void)
{
    struct holdup worst = holdups_take();
    if (worst.function)
        fprintf(stderr, "held up: %.3f ms in %s\n", (double)worst.cpu_ns / 1e6, worst.function);
}

void __cyg_profile_func_enter(void *function, void *caller)
{
    (void)function;
    (void)caller;
    if (!is_first || depth++)
        return;
    began_ns = clock_ns(CLOCK_MONOTONIC);
    if (began_ns - read_ns > FRESH_NS) {
        read_ns = began_ns;
        cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    }
}

void __cyg_profile_func_exit(void *function, void *caller)
{
    (void)caller;
    if (!is_first || --depth)
        return;
    /* It cannot have had more CPU time. */
    if (clock_ns(CLOCK_MONOTONIC) - began_ns <= worst_ns)
        return;
    uint64_t now_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID), took_ns = now_ns > cpu_ns ? now_ns - cpu_ns : 0;
    if (took_ns <= worst_ns)
        return;
    worst_ns = took_ns;
    worst_function = function;
    if (took_ns >= HOLDUPS_LIMIT_NS)
        holdups_over(named(function, took_ns));
}

PLAIN void holdups_begin(void)
{
    __cyg_profile_func_enter((void *)holdups_end, NULL);
}

PLAIN void holdups_end(void)
{
    __cyg_profile_func_exit((void *)holdups_end, NULL);
}

PLAIN struct holdup holdups_take(void)
{
    struct holdup holdup = { 0 };
    if (worst_function)
        holdup = named(worst_function, worst_ns);
    worst_function = NULL;
    worst_ns = 0;
    return holdup;
}

__attribute__((weak)) PLAIN void holdups_over(struct holdup holdup)
{
    fprintf(stderr, "%s held its thread for %.1f ms of CPU time\n", holdup.function, (double)holdup.cpu_ns / 1e6);
    abort();
}
