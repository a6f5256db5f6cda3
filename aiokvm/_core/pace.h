/* Whether a thread that serves a guest runs as soon as a vCPU notifies it, or lets one that shares its CPU go on and
 * make more available: then that is served, and completed, together. A guest that waits for each single answer wants the
 * first, one that has many in flight the second; which it is shows in what there is when the thread is patient. */
#ifndef AIOKVM_PACE_H
#define AIOKVM_PACE_H

#include <stdbool.h>
#include <stdint.h>

struct aiokvm_pace {
    bool is_patient;
    uint32_t single;    /* batches since it became (im)patient; patient ones of one in a row */
    uint32_t try_after; /* so many batches until it is patient again; 0: as at first */
};

/* The thread itself: it was woken, and there was a batch of so many. */
void aiokvm_pace(struct aiokvm_pace *pace, uint32_t batch);

#endif
