/* What the process has once and its guests share: descriptors, memory, lines of its log.
 *
 * Each who takes from a budget has a share of it, which may become as large as half of what is left. So one alone gets
 * a third of the whole, those that want all they can get come to have as much each, and there is always something
 * left for who comes later. All calls may come from any thread. */
#ifndef AIOKVM_BUDGET_H
#define AIOKVM_BUDGET_H

#include <stdint.h>

enum {
    AIOKVM_BUDGET_DESCRIPTORS,  /* of guests' connections: three quarters of RLIMIT_NOFILE */
    AIOKVM_BUDGET_NET_BYTES,    /* buffers of guests' connections: an eighth of the host's memory */
    AIOKVM_BUDGET_FRAME_BYTES,  /* frames that wait in switches, ports and filters: as much */
    AIOKVM_BUDGET_BOUNCE_BYTES, /* copies of what disks cannot read or write where it is: as much */
    AIOKVM_BUDGET_LOG_LINES,    /* that guests can bring about, per second */
    AIOKVM_BUDGETS,
};

struct aiokvm_budget;

struct aiokvm_share {
    struct aiokvm_budget *budget; /* NULL: not open */
    struct aiokvm_share *whole;   /* NULL: it is no part of another */
    uint64_t used, since_ns;      /* `used` includes that of its parts */
    uint32_t parts;
    uint32_t is_gone; /* it is freed with the last of its parts */
};

struct aiokvm_budget_state {
    uint64_t total, used, shares;
};

/* One of those above. */
struct aiokvm_budget *aiokvm_budget_of_process(int which);
/* One of so much, for a test. NULL: no memory. */
struct aiokvm_budget *aiokvm_budget_new(uint64_t total);
void aiokvm_budget_free(struct aiokvm_budget *budget);
void aiokvm_budget_state(struct aiokvm_budget *budget, struct aiokvm_budget_state *state);

void aiokvm_share_open(struct aiokvm_share *share, struct aiokvm_budget *budget);
/* What takes from it takes from `whole`, and as much as that may have. `whole` is closed after it. */
void aiokvm_share_open_part(struct aiokvm_share *share, struct aiokvm_share *whole);
/* Gives back all of it. Idempotent. */
void aiokvm_share_close(struct aiokvm_share *share);
/* 1: so much more is taken. 0: it would be more than this share may have now, nothing is taken. */
int aiokvm_share_take(struct aiokvm_share *share, uint64_t amount);
/* Whether it could be taken now. */
int aiokvm_share_fits(struct aiokvm_share *share, uint64_t amount);
/* What is there already is counted, whether it fits or not. */
void aiokvm_share_add(struct aiokvm_share *share, uint64_t amount);
void aiokvm_share_give(struct aiokvm_share *share, uint64_t amount);

/* The same for Python: a share that is open. NULL: no memory. They may be freed in any order. */
struct aiokvm_share *aiokvm_share_new(int which);
struct aiokvm_share *aiokvm_share_new_part(struct aiokvm_share *whole);
void aiokvm_share_free(struct aiokvm_share *share);

#endif
