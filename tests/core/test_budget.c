/* budget.c: what the process has once, and fair shares of it. */
#include "budget.h"
#include "check.h"

#include <sys/resource.h>

static uint64_t take_all(struct aiokvm_share *share)
{
    uint64_t taken = 0;
    while (aiokvm_share_take(share, 1))
        taken++;
    return taken;
}

TEST(one_alone_gets_a_third)
{
    struct aiokvm_budget *budget = aiokvm_budget_new(1000);
    struct aiokvm_share one;
    aiokvm_share_open(&one, budget);
    CHECK_EQ(take_all(&one), 333);
    CHECK_EQ(aiokvm_share_fits(&one, 1), 0);
    aiokvm_share_give(&one, 1);
    CHECK_EQ(aiokvm_share_fits(&one, 1), 1);
    aiokvm_share_close(&one);
    struct aiokvm_budget_state state;
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 0);
    CHECK_EQ(state.shares, 0);
    aiokvm_budget_free(budget);
}

TEST(whoever_comes_later_is_served)
{
    enum { MANY = 12, TOTAL = 10000 };
    struct aiokvm_budget *budget = aiokvm_budget_new(TOTAL);
    struct aiokvm_share shares[MANY];
    uint64_t all = 0, taken = 0;
    for (int i = 0; i < MANY; i++) {
        aiokvm_share_open(&shares[i], budget);
        taken = take_all(&shares[i]);
        CHECK(taken > 10);
        all += taken;
    }
    struct aiokvm_budget_state state;
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.total, TOTAL);
    CHECK_EQ(state.used, all);
    CHECK_EQ(state.shares, MANY);
    CHECK(all < TOTAL);
    for (int i = 0; i < MANY; i++)
        aiokvm_share_close(&shares[i]);
    aiokvm_budget_free(budget);
}

TEST(those_that_want_all_come_to_have_as_much_each)
{
    enum { MANY = 9, TOTAL = 11000 };
    struct aiokvm_budget *budget = aiokvm_budget_new(TOTAL);
    struct aiokvm_share shares[MANY];
    for (int i = 0; i < MANY; i++)
        aiokvm_share_open(&shares[i], budget);
    uint64_t state = 1;
    for (int i = 0; i < 200000; i++) {
        struct aiokvm_share *share = &shares[random_below(&state, MANY)];
        if (!aiokvm_share_take(share, 1))
            aiokvm_share_give(share, random_below(&state, 3));
    }
    for (int i = 0; i < MANY; i++) {
        CHECK(shares[i].used >= 950 && shares[i].used <= 1050);
        aiokvm_share_close(&shares[i]);
    }
    aiokvm_budget_free(budget);
}

TEST(parts_of_a_share_have_no_more_than_it_may)
{
    struct aiokvm_budget *budget = aiokvm_budget_new(1000);
    struct aiokvm_budget_state state;
    struct aiokvm_share whole, parts[3];
    aiokvm_share_open(&whole, budget);
    uint64_t taken = 0;
    for (int i = 0; i < 3; i++) {
        aiokvm_share_open_part(&parts[i], &whole);
        taken += i ? take_all(&parts[i]) : (uint64_t)aiokvm_share_take(&parts[i], 100) * 100;
    }
    CHECK_EQ(taken, 333);
    CHECK_EQ(whole.used, 333);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.shares, 1);
    aiokvm_share_close(&parts[0]);
    CHECK_EQ(whole.used, 233);
    CHECK_EQ(aiokvm_share_take(&parts[2], 100), 1);
    aiokvm_share_close(&parts[1]);
    aiokvm_share_close(&parts[2]);
    aiokvm_share_close(&whole);
    aiokvm_budget_state(budget, &state);
    CHECK_EQ(state.used, 0);
    CHECK_EQ(state.shares, 0);
    aiokvm_budget_free(budget);
}

TEST(a_share_and_its_parts_may_be_freed_in_any_order)
{
    struct aiokvm_budget_state before, state;
    struct aiokvm_budget *budget = aiokvm_budget_of_process(AIOKVM_BUDGET_NET_BYTES);
    aiokvm_budget_state(budget, &before);
    for (int order = 0; order < 6; order++) {
        struct aiokvm_share *whole = aiokvm_share_new(AIOKVM_BUDGET_NET_BYTES);
        struct aiokvm_share *all[3] = { whole, aiokvm_share_new_part(whole), aiokvm_share_new_part(whole) };
        for (int i = 0; i < 3; i++)
            CHECK_EQ(aiokvm_share_take(all[i], 1), 1);
        int first = order / 2, second = (first + 1 + order % 2) % 3;
        aiokvm_share_free(all[first]);
        aiokvm_share_free(all[second]);
        aiokvm_share_free(all[3 - first - second]);
        aiokvm_budget_state(budget, &state);
        CHECK_EQ(state.used, before.used);
        CHECK_EQ(state.shares, before.shares);
    }
}

TEST(what_is_there_is_counted_though_it_is_too_much)
{
    struct aiokvm_budget *budget = aiokvm_budget_new(10);
    struct aiokvm_share one, other;
    aiokvm_share_open(&one, budget);
    aiokvm_share_open(&other, budget);
    aiokvm_share_add(&one, 10);
    CHECK_EQ(aiokvm_share_take(&one, 1), 0);
    CHECK_EQ(aiokvm_share_take(&other, 1), 0);
    CHECK_EQ(aiokvm_share_take(&other, 0), 0);
    aiokvm_share_give(&one, 100);
    CHECK_EQ(one.used, 0);
    CHECK_EQ(aiokvm_share_take(&other, 1), 1);
    CHECK_EQ(aiokvm_share_take(&other, UINT64_MAX - 1), 0);
    aiokvm_share_close(&one);
    aiokvm_share_close(&one);
    aiokvm_share_close(&other);
    aiokvm_budget_free(budget);
}

TEST(descriptors_are_three_quarters_of_what_the_process_may_have)
{
    struct rlimit old, limit = { 1024, 1024 };
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
    limit.rlim_max = old.rlim_max;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_DESCRIPTORS), &state);
    CHECK_EQ(state.total, 768);
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_NET_BYTES), &state);
    CHECK(state.total > 0);
}

TEST(lines_are_of_a_second)
{
    struct aiokvm_share *share = aiokvm_share_new(AIOKVM_BUDGET_LOG_LINES);
    uint64_t taken = take_all(share);
    CHECK(taken >= 333 && taken <= 700);
    CHECK_SOON(aiokvm_share_take(share, 1));
    aiokvm_share_free(share);
}

TEST(lines_of_those_that_are_gone_stay_used)
{
    /* Until the second is over, which may be in the middle of this. */
    uint64_t taken = 0, least = UINT64_MAX;
    for (int round = 0; round < 3; round++, taken = 0) {
        for (int i = 0; i < 5000; i++) {
            struct aiokvm_share *share = aiokvm_share_new(AIOKVM_BUDGET_LOG_LINES);
            taken += (uint64_t)aiokvm_share_take(share, 1);
            aiokvm_share_free(share);
        }
        least = taken < least ? taken : least;
    }
    CHECK(least <= 1000);
}
