/* All machines of one event loop: which of them have news, the doorbell that wakes the loop, and polling.
 *
 * "The loop" and "a vCPU" are as in exits.h. */
#ifndef AIOKVM_TURN_H
#define AIOKVM_TURN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "exits.h"

/* Of watched: how much the loop sees by itself, and so who has to ring. */
enum {
    AIOKVM_ASLEEP,  /* nothing: whoever has news rings */
    AIOKVM_NAPS,    /* posts, in a moment; what a vCPU waits for rings */
    AIOKVM_RUNG,    /* nothing, but it has been rung for */
    AIOKVM_WATCHES, /* everything */
};

struct aiokvm_turn {
    /* As a machine's. */
    uint32_t alive;
    int doorbell; /* eventfd; rung by vCPUs, emptied by the loop */
    /* The loop looks by itself and needs no doorbell while it watches; read by vCPUs after they have left
     * news. */
    _Atomic uint32_t watched;
    _Atomic(struct aiokvm_machine *) ready; /* stack of machines with news: pushed by vCPUs, taken whole */

    /* The loop's. */
    struct aiokvm_machine *first, *last; /* taken from ready, oldest first, not yet served */
    struct aiokvm_machine *serving;      /* was handed out last, and has not come back */
    struct aiokvm_machine *polled;       /* for whose sake the loop polls */
    uint64_t poll_until_ns;
    uint64_t asked_ns; /* when it last took an exit, for whose answer a vCPU waits */
    uint64_t sleeps;   /* how often it has stopped watching */
    bool posted;       /* what it took last were posts */
};

/* Returns NULL and sets *error (an errno). */
struct aiokvm_turn *aiokvm_turn_new(int *error);
/* All its machines must have been freed. */
void aiokvm_turn_free(struct aiokvm_turn *turn);
/* -EOWNERDEAD in a child of fork, as from all that returns a negative errno. */
int aiokvm_turn_doorbell(const struct aiokvm_turn *turn);
/* The doorbell was rung. Empties it; from here on the loop watches, and has to serve. */
int aiokvm_turn_answer(struct aiokvm_turn *turn);
/* The loop looks by itself from here on though nothing has rung, for as long as machine's window is. */
int aiokvm_turn_watch(struct aiokvm_turn *turn, struct aiokvm_machine *machine);
/* The loop does not look by itself any more. If there is news, the doorbell is rung. */
int aiokvm_turn_unwatch(struct aiokvm_turn *turn);
/* Whether a machine has news now. */
int aiokvm_turn_ready(const struct aiokvm_turn *turn);

/* Takes the news of the machine that has had some for longest, and waits for it, polling, until deadline_ns or
 * until the windows of all machines are over. Returns how many news there are, at most max, and sets *which to
 * the machine's id. 0: the loop is no longer watching, and the doorbell will ring. -EAGAIN: the deadline came
 * first, and nothing has been looked at if it had come already; deadline_ns 0 is one look, whatever the time. */
int aiokvm_serve(struct aiokvm_turn *turn, uint64_t deadline_ns, struct aiokvm_news *news, size_t max,
                 uint32_t *which);

/* A vCPU, for exits.c: the machine has news where it had none; of posts only, or for which a vCPU waits. */
void aiokvm_turn_tell(struct aiokvm_turn *turn, struct aiokvm_machine *machine, bool post);
/* The loop: the machine is about to be freed, and has no vCPUs. */
void aiokvm_turn_forget(struct aiokvm_turn *turn, struct aiokvm_machine *machine);

#endif
