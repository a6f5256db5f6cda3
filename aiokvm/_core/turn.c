#define _GNU_SOURCE
#include "turn.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

/* What a posted write may wait for the loop at least: a dozen come meanwhile, and are taken at once. */
#define NAP_NS 50000

struct aiokvm_turn *aiokvm_turn_new(int *error)
{
    struct aiokvm_turn *turn =
        mmap(NULL, sizeof(*turn), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (turn == MAP_FAILED) {
        *error = errno;
        return NULL;
    }
    turn->doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (turn->doorbell < 0 || madvise(turn, sizeof(*turn), MADV_WIPEONFORK) < 0) {
        *error = errno;
        if (turn->doorbell >= 0)
            close(turn->doorbell);
        munmap(turn, sizeof(*turn));
        return NULL;
    }
    turn->alive = 1;
    *error = 0;
    return turn;
}

void aiokvm_turn_free(struct aiokvm_turn *turn)
{
    if (turn->alive)
        close(turn->doorbell);
    munmap(turn, sizeof(*turn));
}

int aiokvm_turn_doorbell(const struct aiokvm_turn *turn)
{
    return turn->alive ? turn->doorbell : -EOWNERDEAD;
}

/* A vCPU has left news. A loop that watches will see it without being told: it stops watching before it looks
 * for the last time. */
static void ring(struct aiokvm_turn *turn, bool post)
{
    uint32_t watched = atomic_load(&turn->watched);
    do
        if (watched == AIOKVM_WATCHES || watched == AIOKVM_RUNG || (post && watched == AIOKVM_NAPS))
            return;
    while (!atomic_compare_exchange_weak(&turn->watched, &watched, AIOKVM_RUNG));
    uint64_t one = 1;
    ssize_t written = write(turn->doorbell, &one, sizeof(one));
    (void)written; /* an eventfd refuses only when it is about to overflow, and then it has been rung */
}

static void empty_doorbell(struct aiokvm_turn *turn)
{
    uint64_t rung;
    ssize_t got = read(turn->doorbell, &rung, sizeof(rung));
    (void)got; /* EAGAIN: not rung */
}

void aiokvm_turn_tell(struct aiokvm_turn *turn, struct aiokvm_machine *machine, bool post)
{
    if (!atomic_exchange(&machine->queued, true)) {
        struct aiokvm_machine *head = atomic_load(&turn->ready);
        do
            machine->next = head;
        while (!atomic_compare_exchange_weak(&turn->ready, &head, machine));
    }
    /* Though it may have been queued for a post, for which a loop that naps was not woken. */
    ring(turn, post);
}

static void append(struct aiokvm_turn *turn, struct aiokvm_machine *machine)
{
    machine->next = NULL;
    if (turn->first)
        turn->last->next = machine;
    else
        turn->first = machine;
    turn->last = machine;
}

/* Moves what has been pushed behind what waits already: no machine overtakes another for ever. */
static void take_ready(struct aiokvm_turn *turn)
{
    struct aiokvm_machine *newest = atomic_exchange(&turn->ready, NULL);
    struct aiokvm_machine *oldest = NULL;
    while (newest) {
        struct aiokvm_machine *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest) {
        struct aiokvm_machine *next = oldest->next;
        append(turn, oldest);
        oldest = next;
    }
}

void aiokvm_turn_forget(struct aiokvm_turn *turn, struct aiokvm_machine *machine)
{
    if (!turn->alive)
        return;
    if (turn->serving == machine)
        turn->serving = NULL;
    if (turn->polled == machine)
        turn->polled = NULL;
    if (!atomic_load(&machine->queued))
        return;
    take_ready(turn);
    struct aiokvm_machine *rest = turn->first;
    turn->first = NULL;
    while (rest) {
        struct aiokvm_machine *next = rest->next;
        if (rest != machine)
            append(turn, rest);
        rest = next;
    }
}

int aiokvm_turn_ready(const struct aiokvm_turn *turn)
{
    return turn->alive && (turn->first || atomic_load(&turn->ready));
}

int aiokvm_turn_answer(struct aiokvm_turn *turn)
{
    if (!turn->alive)
        return -EOWNERDEAD;
    empty_doorbell(turn);
    atomic_store(&turn->watched, AIOKVM_WATCHES);
    return 0;
}

/* The loop polls for the machine's sake from now on. */
static void poll_for(struct aiokvm_turn *turn, struct aiokvm_machine *machine, uint64_t now)
{
    machine->last_ns = now;
    if (now + machine->window_ns > turn->poll_until_ns) {
        turn->poll_until_ns = now + machine->window_ns;
        turn->polled = machine;
    }
}

int aiokvm_turn_watch(struct aiokvm_turn *turn, struct aiokvm_machine *machine)
{
    if (!turn->alive)
        return -EOWNERDEAD;
    poll_for(turn, machine, aiokvm_now_ns());
    atomic_store(&turn->watched, AIOKVM_WATCHES);
    return 0;
}

/* The guest has been answered: its window begins. */
static void served(struct aiokvm_turn *turn, uint64_t now)
{
    struct aiokvm_machine *machine = turn->serving;
    if (!machine)
        return;
    machine->stats.serving_ns += now - machine->handed_ns;
    turn->serving = NULL;
    poll_for(turn, machine, now);
}

int aiokvm_turn_unwatch(struct aiokvm_turn *turn)
{
    if (!turn->alive)
        return -EOWNERDEAD;
    served(turn, aiokvm_now_ns());
    turn->sleeps++;
    turn->poll_until_ns = 0;
    atomic_store(&turn->watched, AIOKVM_ASLEEP);
    if (aiokvm_turn_ready(turn))
        ring(turn, false);
    return 0;
}

/* The last look before the doorbell is needed again; whether there was nothing. */
static bool stop_watching(struct aiokvm_turn *turn)
{
    atomic_store(&turn->watched, AIOKVM_ASLEEP);
    if (!aiokvm_turn_ready(turn)) {
        turn->sleeps++;
        return true;
    }
    /* It may have been rung for already: then it will answer once for nothing. */
    atomic_store(&turn->watched, AIOKVM_WATCHES);
    return false;
}

/* A guest that only posts waits for nobody, and runs faster if nobody looks at each post as it comes. */
static void nap(struct aiokvm_turn *turn)
{
    turn->posted = false;
    atomic_store(&turn->watched, AIOKVM_NAPS);
    if (!atomic_load(&turn->ready)) {
        struct pollfd doorbell = { .fd = turn->doorbell, .events = POLLIN };
        const struct timespec time = { .tv_nsec = NAP_NS };
        if (ppoll(&doorbell, 1, &time, NULL) > 0)
            empty_doorbell(turn);
    }
    atomic_store(&turn->watched, AIOKVM_WATCHES);
}

/* Polling would have bridged a sleep as short as the machine's: poll for longer. If not, for less. */
static void adapt(struct aiokvm_turn *turn, struct aiokvm_machine *machine, uint64_t now)
{
    if (machine->sleeps == turn->sleeps)
        return;
    machine->sleeps = turn->sleeps;
    machine->stats.rings++;
    uint32_t most = atomic_load(&machine->poll_ns);
    if (now - machine->last_ns < most)
        machine->window_ns = machine->window_ns ? machine->window_ns * 2 : most / 8;
    else
        machine->window_ns /= 2;
    if (machine->window_ns > most)
        machine->window_ns = most;
}

/* The news of the machine that waits first; 0: of none. */
static int take_first(struct aiokvm_turn *turn, struct aiokvm_news *news, size_t max, uint64_t now)
{
    struct aiokvm_machine *machine;
    while ((machine = turn->first)) {
        turn->first = machine->next;
        /* Cleared before its news is read: what comes from here on queues it again. */
        atomic_store(&machine->queued, false);
        int taken = aiokvm_machine_take(machine, news, max);
        if (aiokvm_machine_has_news(machine) && !atomic_exchange(&machine->queued, true))
            append(turn, machine);
        if (taken > 0) {
            adapt(turn, machine, now);
            machine->handed_ns = now;
            turn->serving = machine;
            turn->posted = true;
            for (int i = 0; i < taken; i++)
                if (news[i].state != AIOKVM_POSTED)
                    turn->posted = false;
            if (!turn->posted)
                turn->asked_ns = now;
            return taken;
        }
    }
    return 0;
}

int aiokvm_serve(struct aiokvm_turn *turn, uint64_t deadline_ns, struct aiokvm_news *news, size_t max,
                 uint32_t *which)
{
    if (!turn->alive)
        return -EOWNERDEAD;
    const uint64_t start = aiokvm_now_ns();
    uint64_t now = start;
    served(turn, now);
    if (deadline_ns && now >= deadline_ns)
        return -EAGAIN;
    for (uint64_t waited = 0;; waited = 1, now = aiokvm_now_ns()) {
        take_ready(turn);
        int taken = take_first(turn, news, max, now);
        if (taken > 0) {
            turn->serving->stats.poll_hits += waited;
            *which = turn->serving->id;
            return taken;
        }
        if (now >= turn->poll_until_ns && stop_watching(turn)) {
            if (turn->polled)
                turn->polled->stats.poll_misses++;
            turn->polled = NULL;
            return 0;
        }
        if (deadline_ns && turn->posted && now - turn->asked_ns > NAP_NS)
            nap(turn);
        else if (now >= deadline_ns)
            return -EAGAIN;
        else
            aiokvm_relax(now - start);
    }
}
