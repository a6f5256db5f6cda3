/* Whether the loop is woken for each frame, or lets some gather: net_priv.h.
 *
 * A wake of the loop costs many times what a frame does, and takes the CPU from the vCPU or the program that was about
 * to send the next. Who waits for an answer before sending again wants the wake; a flow wants none. Which of the two it
 * is shows in how much there is after a while. */
#include "net_priv.h"

/* Wakes that follow each other so closely, and so many of them, may be a flow. */
enum { NEAR_NS = 1000000, TRY_AFTER = 16, TRY_AFTER_MAX = 1024 };
/* How long frames gather: a turn finds between FEW and MANY bytes of work, as net_spend counts it; that is a part of a
 * ring. But no longer than TURNS times what a turn takes: the loop is hardly busy then. */
enum { MIN_NS = 50000, FIRST_NS = 100000, MAX_NS = 1000000, FEW = 48 << 10, MANY = 192 << 10, TURNS = 8 };
/* A turn with fewer frames than FLOW_FRAMES and less work than FLOW_WORK is no part of a flow: it may be a question and
 * its answer. After SINGLES such turns frames gather no more: somebody waits for each answer. After NOTHINGS turns with
 * no frame at all the flow has ended. */
enum { FLOW_FRAMES = 4, FLOW_WORK = 16 << 10, SINGLES = 8, NOTHINGS = 2 };

static void begin(struct net_gather *gather)
{
    gather->is_on = true;
    gather->period_ns = FIRST_NS;
    gather->near = gather->singles = gather->nothings = 0;
}

static uint32_t longest(uint64_t took_ns)
{
    if (took_ns > MAX_NS / TURNS)
        return MAX_NS;
    return took_ns * TURNS < MIN_NS ? MIN_NS : (uint32_t)took_ns * TURNS;
}

static void go_on(struct net_gather *gather, const struct net_turn *turn)
{
    uint32_t longest_ns = longest(turn->took_ns);
    gather->nothings = turn->batch ? 0 : gather->nothings + 1;
    if (turn->batch >= FLOW_FRAMES || turn->work >= FLOW_WORK) {
        gather->singles = 0;
        gather->try_after = TRY_AFTER;
    } else if (turn->batch) {
        gather->singles++;
    }
    if (turn->work < FEW)
        gather->period_ns = gather->period_ns * 2 < longest_ns ? gather->period_ns * 2 : longest_ns;
    else if (turn->work > MANY && gather->period_ns > MIN_NS)
        gather->period_ns /= 2;
    if (gather->nothings < NOTHINGS && gather->singles < SINGLES)
        return;
    gather->is_on = false;
    /* Each time in vain it is tried half as often. */
    if (gather->singles == SINGLES && gather->try_after < TRY_AFTER_MAX)
        gather->try_after *= 2;
}

void net_gather_next(struct net_gather *gather, uint64_t now_ns, const struct net_turn *turn)
{
    if (!gather->try_after)
        gather->try_after = TRY_AFTER;
    if (gather->is_on) {
        go_on(gather, turn);
    } else {
        gather->near = turn->batch && now_ns - gather->last_ns < NEAR_NS ? gather->near + 1 : 0;
        if (gather->near >= gather->try_after)
            begin(gather);
    }
    gather->last_ns = now_ns;
}
