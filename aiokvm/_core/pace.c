#define _GNU_SOURCE
#include "pace.h"

#include <pthread.h>
#include <sched.h>

/* How often a batch of one makes the thread impatient again, and after how many batches it tries to be patient; that
 * doubles each time in vain. */
enum { PATIENT_FOR = 8, TRY_AFTER = 64, TRY_AFTER_MAX = 512 };

void aiokvm_pace(struct aiokvm_pace *pace, uint32_t batch)
{
    if (batch == 0)
        return;
    bool was_patient = pace->is_patient;
    if (!pace->try_after)
        pace->try_after = TRY_AFTER;
    if (was_patient && batch > 1) {
        pace->single = 0;
        pace->try_after = TRY_AFTER;
        return;
    }
    if (++pace->single < (was_patient ? PATIENT_FOR : pace->try_after))
        return;
    pace->single = 0;
    pace->is_patient = !was_patient;
    if (was_patient && pace->try_after < TRY_AFTER_MAX)
        pace->try_after *= 2;
    /* A policy of the program's own, as SCHED_FIFO, stays. */
    int policy;
    struct sched_param parameter;
    if (pthread_getschedparam(pthread_self(), &policy, &parameter) == 0 &&
        policy == (was_patient ? SCHED_BATCH : SCHED_OTHER))
        pthread_setschedparam(pthread_self(), was_patient ? SCHED_OTHER : SCHED_BATCH, &parameter);
}
