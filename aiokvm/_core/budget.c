#include "budget.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "clock.h"

#define SECOND_NS UINT64_C(1000000000)

enum { LOG_LINES = 1000, PART = 2 };

struct aiokvm_budget {
    uint64_t (*measure)(void); /* its total, which can change; NULL: it is `total` */
    uint64_t total, used, shares;
    bool is_rate; /* of each second */
    uint64_t since_ns;
};

static uint64_t descriptors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return 0;
    return (limit.rlim_cur > INT32_MAX ? INT32_MAX : limit.rlim_cur) / 4 * 3;
}

static uint64_t bytes(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size / 8 : UINT64_C(1) << 30;
}

/* They are one each in a process, as what they count is. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct aiokvm_budget of_process[AIOKVM_BUDGETS] = {
    [AIOKVM_BUDGET_DESCRIPTORS] = { .measure = descriptors },
    [AIOKVM_BUDGET_NET_BYTES] = { .measure = bytes },
    [AIOKVM_BUDGET_FRAME_BYTES] = { .measure = bytes },
    [AIOKVM_BUDGET_BOUNCE_BYTES] = { .measure = bytes },
    [AIOKVM_BUDGET_LOG_LINES] = { .total = LOG_LINES, .is_rate = true },
};

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

/* A child of fork has copies of all shares: whoever had the lock at that moment is not in it. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork, after_fork);
}

/* What was used in a second that is over does not count. */
static void look(struct aiokvm_budget *budget, struct aiokvm_share *share)
{
    if (!budget->is_rate)
        return;
    if (share && share->whole)
        look(budget, share->whole);
    uint64_t now_ns = aiokvm_now_ns();
    if (now_ns - budget->since_ns >= SECOND_NS) {
        budget->since_ns = now_ns;
        budget->used = 0;
    }
    if (share && share->since_ns != budget->since_ns) {
        share->since_ns = budget->since_ns;
        share->used = 0;
    }
}

static uint64_t total_of(const struct aiokvm_budget *budget)
{
    return budget->measure ? budget->measure() : budget->total;
}

static bool fits(struct aiokvm_share *share, uint64_t amount)
{
    look(share->budget, share);
    uint64_t total = total_of(share->budget), used = share->budget->used;
    const struct aiokvm_share *whole = share->whole ? share->whole : share;
    return used < total && amount <= total - used && whole->used + amount <= (total - used - amount) / PART;
}

/* By a number that may be below 0. */
static void change(struct aiokvm_share *share, uint64_t by)
{
    share->used += by;
    if (share->whole)
        share->whole->used += by;
    share->budget->used += by;
}

/* Gives back all of it; what has to be freed then. */
static struct aiokvm_share *end(struct aiokvm_share *share)
{
    struct aiokvm_share *whole = share->whole, *gone = NULL;
    /* What was used of a second has been used, whoever is gone. */
    if (!share->budget->is_rate)
        change(share, -share->used);
    if (!whole)
        share->budget->shares--;
    else if (!--whole->parts && whole->is_gone)
        gone = (end(whole), whole);
    *share = (struct aiokvm_share){ 0 };
    return gone;
}

struct aiokvm_budget *aiokvm_budget_of_process(int which)
{
    return &of_process[which];
}

struct aiokvm_budget *aiokvm_budget_new(uint64_t total)
{
    struct aiokvm_budget *budget = calloc(1, sizeof(*budget));
    if (budget)
        budget->total = total;
    return budget;
}

void aiokvm_budget_free(struct aiokvm_budget *budget)
{
    free(budget);
}

void aiokvm_budget_state(struct aiokvm_budget *budget, struct aiokvm_budget_state *state)
{
    pthread_mutex_lock(&lock);
    look(budget, NULL);
    *state = (struct aiokvm_budget_state){ .total = total_of(budget), .used = budget->used, .shares = budget->shares };
    pthread_mutex_unlock(&lock);
}

void aiokvm_share_open(struct aiokvm_share *share, struct aiokvm_budget *budget)
{
    pthread_mutex_lock(&lock);
    *share = (struct aiokvm_share){ .budget = budget };
    budget->shares++;
    pthread_mutex_unlock(&lock);
}

void aiokvm_share_open_part(struct aiokvm_share *share, struct aiokvm_share *whole)
{
    pthread_mutex_lock(&lock);
    *share = (struct aiokvm_share){ .budget = whole->budget, .whole = whole };
    whole->parts++;
    pthread_mutex_unlock(&lock);
}

void aiokvm_share_close(struct aiokvm_share *share)
{
    if (!share->budget)
        return;
    pthread_mutex_lock(&lock);
    struct aiokvm_share *gone = end(share);
    pthread_mutex_unlock(&lock);
    free(gone);
}

int aiokvm_share_take(struct aiokvm_share *share, uint64_t amount)
{
    pthread_mutex_lock(&lock);
    bool taken = fits(share, amount);
    if (taken)
        change(share, amount);
    pthread_mutex_unlock(&lock);
    return taken;
}

int aiokvm_share_fits(struct aiokvm_share *share, uint64_t amount)
{
    pthread_mutex_lock(&lock);
    bool result = fits(share, amount);
    pthread_mutex_unlock(&lock);
    return result;
}

void aiokvm_share_add(struct aiokvm_share *share, uint64_t amount)
{
    pthread_mutex_lock(&lock);
    look(share->budget, share);
    change(share, amount);
    pthread_mutex_unlock(&lock);
}

void aiokvm_share_give(struct aiokvm_share *share, uint64_t amount)
{
    pthread_mutex_lock(&lock);
    look(share->budget, share);
    change(share, -(amount < share->used ? amount : share->used));
    pthread_mutex_unlock(&lock);
}

struct aiokvm_share *aiokvm_share_new(int which)
{
    struct aiokvm_share *share = malloc(sizeof(*share));
    if (share)
        aiokvm_share_open(share, &of_process[which]);
    return share;
}

struct aiokvm_share *aiokvm_share_new_part(struct aiokvm_share *whole)
{
    struct aiokvm_share *share = malloc(sizeof(*share));
    if (share)
        aiokvm_share_open_part(share, whole);
    return share;
}

void aiokvm_share_free(struct aiokvm_share *share)
{
    pthread_mutex_lock(&lock);
    bool has_parts = share->parts != 0;
    share->is_gone = has_parts;
    pthread_mutex_unlock(&lock);
    if (has_parts)
        return;
    aiokvm_share_close(share);
    free(share);
}
