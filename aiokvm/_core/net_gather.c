/* Whether the loop is woken for each frame, or lets some gather: net_priv.h.
 *
 * A wake of the loop costs many times what a frame does, and takes the CPU from the vCPU or the program that was about
 * to send the next. Who waits for an answer before sending again wants the wake; a flow wants none. Which of the two it
 * is shows in how much there is after a while. */
#include "net_priv.h"

/* Wakes that follow each other so closely, and so many of them, may be a flow; END_NS where each finds several frames. */
enum { NEAR_NS = 1000000, TRY_AFTER = 16, TRY_AFTER_MAX = 1024 };
/* How long frames gather: a turn finds between FEW and MANY bytes of work, as net_spend counts it; that is a part of a
 * ring. But no longer than TURNS times what a turn takes: the loop is hardly busy then. */
enum { MIN_NS = 50000, FIRST_NS = 100000, MAX_NS = 2000000, FEW = 48 << 10, MANY = 192 << 10, TURNS = 8 };
/* A turn with fewer frames than FLOW_FRAMES is no part of a flow: it may be a question and its answer, or frames so long
 * that a wake costs little beside them. After SINGLES such turns frames gather no more. After END_NS with no frame at
 * all the flow has ended; a sender may wait that long for a CPU. */
enum { FLOW_FRAMES = 4, SINGLES = 8, END_NS = 4000000 };

static void begin(struct net_gather *gather, uint64_t now_ns)
{
    gather->is_on = true;
    gather->period_ns = gather->longest_ns = FIRST_NS;
    gather->near = gather->singles = 0;
    gather->frames_ns = now_ns;
}

static uint32_t longest(uint64_t took_ns)
{
    if (took_ns > MAX_NS / TURNS)
        return MAX_NS;
    return took_ns * TURNS < MIN_NS ? MIN_NS : (uint32_t)took_ns * TURNS;
}

static void go_on(struct net_gather *gather, uint64_t now_ns, const struct net_turn *turn)
{
    uint32_t longest_ns = longest(turn->took_ns);
    /* A turn of nothing says little. */
    if (longest_ns < gather->longest_ns)
        longest_ns = gather->longest_ns - (gather->longest_ns - longest_ns) / 16;
    gather->longest_ns = longest_ns;
    if (turn->batch)
        gather->frames_ns = now_ns;
    if (turn->batch >= FLOW_FRAMES) {
        gather->singles = 0;
        gather->try_after = TRY_AFTER;
    } else if (turn->batch) {
        gather->singles++;
    }
    if (turn->work < FEW)
        gather->period_ns = gather->period_ns * 2 < longest_ns ? gather->period_ns * 2 : longest_ns;
    else if (turn->work > MANY && gather->period_ns > MIN_NS)
        gather->period_ns /= 2;
    if (now_ns - gather->frames_ns < END_NS && gather->singles < SINGLES)
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
        go_on(gather, now_ns, turn);
    } else {
        uint64_t near_ns = turn->batch < FLOW_FRAMES ? NEAR_NS : END_NS;
        gather->near = turn->batch && now_ns - gather->last_ns < near_ns ? gather->near + 1 : 0;
        if (gather->near >= gather->try_after)
            begin(gather, now_ns);
    }
    gather->last_ns = now_ns;
}
