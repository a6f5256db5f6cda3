/* Ends: their lives, their links, and what the program sets. */
#include "net_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void *net_end_new(struct aiokvm_net *net, const struct net_type *type, size_t size, int *error)
{
    struct aiokvm_net_end *end = calloc(1, size);
    if (!end || !net_enter(net)) {
        *error = end ? EOWNERDEAD : ENOMEM;
        free(end);
        return NULL;
    }
    end->type = type;
    end->net = net;
    end->id = ++net->next_id;
    end->up = true;
    end->next = net->ends;
    if (net->ends)
        net->ends->previous = end;
    net->ends = end;
    net_leave(net);
    return end;
}

uint32_t aiokvm_net_end_id(const struct aiokvm_net_end *end)
{
    return end->id;
}

/* The limit that holds it back is gone, or another. */
static void unthrottle(struct aiokvm_net_end *end)
{
    if (end && end->throttled_ns)
        net_throttle(end, 1);
}

static void unlink_ends(struct aiokvm_net_end *end)
{
    struct aiokvm_net_end *peer = end->peer;
    if (!peer)
        return;
    /* What waits may go: it will be dropped. */
    unthrottle(end);
    unthrottle(peer);
    net_resume(end);
    net_resume(peer);
    end->peer = peer->peer = NULL;
}

int aiokvm_net_link(struct aiokvm_net_end *one, struct aiokvm_net_end *other)
{
    if (one->net != other->net)
        return -EXDEV;
    if (one == other)
        return -EINVAL;
    struct aiokvm_net *net = one->net;
    if (!net_enter(net))
        return -EOWNERDEAD;
    int error = one->peer || other->peer ? -EBUSY : 0;
    if (!error) {
        one->peer = other;
        other->peer = one;
        one->link = other->link = ++net->next_link;
        net_ready(one);
        net_ready(other);
    }
    net_leave(net);
    return error;
}

void aiokvm_net_unlink(struct aiokvm_net_end *end)
{
    if (!net_enter(end->net))
        return;
    unlink_ends(end);
    net_leave(end->net);
}

void aiokvm_net_set_up(struct aiokvm_net_end *end, int up)
{
    if (!net_enter(end->net))
        return;
    end->up = up;
    if (end->peer) {
        net_resume(end);
        net_resume(end->peer);
    }
    net_leave(end->net);
}

void aiokvm_net_set_policy(struct aiokvm_net_end *end, struct aiokvm_net_filter *filter,
                           struct aiokvm_net_capture *capture, struct aiokvm_ratelimit *sent,
                           struct aiokvm_ratelimit *received)
{
    if (!net_enter(end->net))
        return;
    end->filter = filter;
    end->capture = capture;
    end->sent_limit = sent;
    end->received_limit = received;
    unthrottle(end);
    unthrottle(end->peer);
    net_leave(end->net);
}

void aiokvm_net_end_stats(struct aiokvm_net_end *end, struct aiokvm_net_stats *stats)
{
    if (!net_enter(end->net)) {
        memset(stats, 0, sizeof(*stats));
        return;
    }
    *stats = end->stats;
    net_leave(end->net);
}

static void forget(struct aiokvm_net_end *end)
{
    struct aiokvm_net *net = end->net;
    net->ready_tail = &net->ready;
    for (struct aiokvm_net_end **at = &net->ready; *at;) {
        if (*at == end)
            *at = end->next_ready;
        else
            net->ready_tail = at = &(*at)->next_ready;
    }
    net->told_tail = &net->told;
    for (struct aiokvm_net_end **at = &net->told; *at;) {
        if (*at == end)
            *at = end->next_told;
        else
            net->told_tail = at = &(*at)->next_told;
    }
    for (struct aiokvm_net_end **at = &net->dirty; *at;) {
        if (*at == end)
            *at = end->next_dirty;
        else
            at = &(*at)->next_dirty;
    }
    for (struct aiokvm_net_end **at = &net->later; *at;) {
        if (*at == end)
            *at = end->next_later;
        else
            at = &(*at)->next_later;
    }
    if (end->previous)
        end->previous->next = end->next;
    else
        net->ends = end->next;
    if (end->next)
        end->next->previous = end->previous;
}

void aiokvm_net_end_free(struct aiokvm_net_end *end)
{
    struct aiokvm_net *net = end->net;
    bool ours = net_enter(net);
    if (ours) {
        net_flush(net);
        unlink_ends(end);
    }
    forget(end);
    end->type->free(end);
    if (ours)
        net_leave(net);
}
