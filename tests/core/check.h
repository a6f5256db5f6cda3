/* What a test program is made of: TEST defines a test, CHECK and its kin end the program when they fail, and
 * main (in check.c) runs the tests in the order of their definitions and speaks TAP. */
#ifndef AIOKVM_CHECK_H
#define AIOKVM_CHECK_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* Whatever takes longer than this will never come. */
enum { PATIENCE_S = 20 };

struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};


void test_register(struct test *test);
_Noreturn void check_failed(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The test that runs is over, and shows nothing here. */
void check_skip(const char *reason);

#define TEST(function)                                                                   \
    static void function(void);                                                          \
    __attribute__((constructor)) static void function##_register(void)                   \
    {                                                                                    \
        static struct test test = { .name = #function, .run = function };                \
        test_register(&test);                                                            \
    }                                                                                    \
    static void function(void)

#define CHECK(condition)                                           \
    do {                                                           \
        if (!(condition))                                          \
            check_failed(__FILE__, __LINE__, "%s", #condition);    \
    } while (0)

#define CHECK_EQ(actual, expected)                                                                           \
    do {                                                                                                     \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);                          \
        if (actual_ != expected_)                                                                            \
            check_failed(__FILE__, __LINE__, "%s is %lld (%#llx), not %lld (%#llx)", #actual, actual_,       \
                         (unsigned long long)actual_, expected_, (unsigned long long)expected_);             \
    } while (0)

/* Ends a test that cannot run here. */
#define SKIP(reason)              \
    do {                          \
        check_skip(reason);      \
        return;                   \
    } while (0)

/* Waits for what another thread is about to make true. */
#define CHECK_SOON(condition)                                                            \
    do {                                                                                 \
        uint64_t deadline_ = now_ns() + PATIENCE_S * UINT64_C(1000000000);               \
        while (!(condition)) {                                                           \
            if (now_ns() > deadline_)                                                    \
                check_failed(__FILE__, __LINE__, "never: %s", #condition);               \
            sched_yield();                                                               \
        }                                                                                \
    } while (0)

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* CPU time of this thread. */
static inline uint64_t cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* xorshift64*: the same numbers in every run. The state is any number but 0. */
static inline uint32_t random_below(uint64_t *state, uint32_t limit)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)((*state * UINT64_C(2685821657736338717) >> 32) * limit >> 32);
}

#define LENGTH(array) (sizeof(array) / sizeof(*(array)))

#endif
