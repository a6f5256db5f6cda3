/* How long calls of the core hold their thread. The core is built with -finstrument-functions, so every call of it that
 * the program's first thread makes is measured, whatever its name: that thread stands for the loop's. */
#ifndef AIOKVM_HOLDUPS_H
#define AIOKVM_HOLDUPS_H

#include <stdint.h>

struct holdup {
    const char *function; /* NULL: nothing has been called */
    uint64_t cpu_ns;
};

/* The worst since this was called last. */
struct holdup holdups_take(void);

/* What the loop does without looking at anything else may be several calls. */
void holdups_begin(void);
void holdups_end(void);

#define HOLDUPS_STEP(statement) \
    do {                        \
        holdups_begin();        \
        statement;              \
        holdups_end();          \
    } while (0)

/* A call has taken `HOLDUPS_LIMIT_NS`. Without another of this name the program aborts. */
void holdups_over(struct holdup holdup);

/* CPU time of the thread: 5 ms are wanted, 50 ms never. Under AddressSanitizer most calls take as long as without, or half
 * as much again, and so nothing is added; ThreadSanitizer's free is 30 times as slow as the libc's. */
#ifdef __SANITIZE_THREAD__
enum { HOLDUPS_SLOWER = 2 };
#else
enum { HOLDUPS_SLOWER = 1 };
#endif
enum { HOLDUPS_WANTED_NS = 5000000, HOLDUPS_LIMIT_NS = HOLDUPS_SLOWER * 50000000 };

#endif
