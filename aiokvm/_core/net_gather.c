/* Whether the loop is woken for each frame, or lets some gather: net_priv.h.
 *
 * A wake of the loop costs many times what a frame does, and takes the CPU from the vCPU or the program that was about to
 * send the next. Who waits for an answer before sending again wants the wake; a flow wants none. Which it is shows in
 * what there is after a while. */
#include "net_priv.h"

/* Wakes that follow each other so closely, and so many of them, may be a flow. */
enum { NEAR_NS = 1000000, TRY_AFTER = 16, TRY_AFTER_MAX = 1024 };
/* How long frames gather, and how much work in bytes, as net_spend counts it, is wanted then: a part of a ring. */
enum { MIN_NS = 50000, FIRST_NS = 100000, MAX_NS = 1000000, FEW = 48 << 10, MANY = 192 << 10 };
/* So many times in a row a single frame, or nothing, and it was no flow, or it has ended. */
enum { SINGLES = 8, NOTHINGS = 2 };

static void begin(struct net_gather *gather)
{
    gather->is_on = true;
    gather->period_ns = FIRST_NS;
    gather->near = gather->singles = gather->nothings = 0;
}

static void go_on(struct net_gather *gather, uint32_t batch, uint64_t work)
{
    gather->nothings = batch ? 0 : gather->nothings + 1;
    gather->singles = batch == 1 ? gather->singles + 1 : batch ? 0 : gather->singles;
    if (batch > 1)
        gather->try_after = TRY_AFTER;
    if (work < FEW && gather->period_ns < MAX_NS)
        gather->period_ns = gather->period_ns * 2 < MAX_NS ? gather->period_ns * 2 : MAX_NS;
    if (work > MANY && gather->period_ns > MIN_NS)
        gather->period_ns /= 2;
    if (gather->nothings < NOTHINGS && gather->singles < SINGLES)
        return;
    gather->is_on = false;
    /* Each time in vain it is tried half as often. */
    if (gather->singles == SINGLES && gather->try_after < TRY_AFTER_MAX)
        gather->try_after *= 2;
}

void net_gather_next(struct net_gather *gather, uint64_t now_ns, uint32_t batch, uint64_t work)
{
    if (!gather->try_after)
        gather->try_after = TRY_AFTER;
    if (gather->is_on) {
        go_on(gather, batch, work);
    } else {
        gather->near = batch && now_ns - gather->last_ns < NEAR_NS ? gather->near + 1 : 0;
        if (gather->near >= gather->try_after)
            begin(gather);
    }
    gather->last_ns = now_ns;
}
