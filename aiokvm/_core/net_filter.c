#include "net_filter.h"

#include <errno.h>
#include <linux/if_ether.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "net_flow.h"
#include "net_priv.h"
#include "net_rules.h"

/* Flows that are being asked about, each with its first frame. */
enum { MAX_ASKED = 64 };
/* Of looking at a rule, for net_spend. */
enum { COST_RULE = 32 };
/* For how long a denial of the program's is not asked again. */
static const uint64_t DENIED_NS = UINT64_C(30) * 1000000000;

struct asked {
    uint64_t id; /* 0: free */
    bool taken;
    struct net_flow *flow;
    struct aiokvm_net_flow what;
    struct virtio_net_hdr_v1 hdr;
    uint32_t hops, queue;
    uint8_t *data;
};

struct aiokvm_net_filter {
    struct aiokvm_net_end *end;
    struct aiokvm_net_rule *rules;
    uint32_t count;
    uint32_t generation;
    bool tracks; /* something may be denied, so that it matters what is a reply */
    uint64_t next_id;
    struct net_flows *flows; /* NULL: none yet */
    struct asked asked[MAX_ASKED];
    struct aiokvm_share frames; /* of AIOKVM_BUDGET_FRAME_BYTES: of those that are asked about */
};

/* ---- flows ---- */

static void set_key(struct net_flow_key *key, const struct net_facts *facts)
{
    const struct net_packet *packet = &facts->packet;
    net_flow_key_set(key, packet->src, packet->dst, packet->address_size, facts->src_port, facts->dst_port,
                     facts->egress);
    key->protocol = packet->protocol;
}

static void set_fragment_key(struct net_flow_key *key, const struct net_packet *packet, bool egress)
{
    net_flow_key_set(key, packet->src, packet->dst, packet->address_size, (uint16_t)(packet->fragment_id >> 16),
                     (uint16_t)packet->fragment_id, egress);
    /* The first fragment of IPv6 may have further headers before the transport's: those behind cannot know. */
    key->protocol = packet->address_size == 4 ? packet->protocol : 0;
    key->is_fragment = 1;
}

static void allow(struct aiokvm_net_filter *filter, struct net_flow *flow, bool egress, uint64_t now_ns)
{
    if (flow->state != NET_FLOW_ALLOWED) {
        flow->state = NET_FLOW_ALLOWED;
        flow->egress = egress;
    }
    flow->generation = filter->generation;
    net_flow_use(flow, now_ns);
}

/* The fragments that follow a first one that passes may pass too. */
static void allow_fragments(struct aiokvm_net_filter *filter, const struct net_facts *facts, uint64_t now_ns)
{
    if (facts->packet.fragment != NET_FRAGMENT_FIRST)
        return;
    struct net_flow_key key;
    set_fragment_key(&key, &facts->packet, facts->egress);
    struct net_flow *flow = net_flows_get(filter->flows, &key, now_ns);
    if (flow)
        allow(filter, flow, facts->egress, now_ns);
}

static void reverse(struct net_facts *to, const struct net_facts *facts, uint8_t macs[2 * ETH_ALEN])
{
    *to = *facts;
    to->egress = !facts->egress;
    to->packet.src = facts->packet.dst;
    to->packet.dst = facts->packet.src;
    to->src_port = facts->dst_port;
    to->dst_port = facts->src_port;
    if (to->has_icmp_type)
        to->icmp_type = facts->packet.address_size == 4 ? 8 : 128;
    memcpy(macs, facts->packet.head + ETH_ALEN, ETH_ALEN);
    memcpy(macs + ETH_ALEN, facts->packet.head, ETH_ALEN);
    /* Of the head only these are looked at from here on. */
    to->packet.head = macs;
}

/* Whether the rules, which are others now, would let through what this replies to. */
static bool still_allowed(const struct aiokvm_net_filter *filter, const struct net_facts *reply)
{
    struct net_facts facts;
    uint8_t macs[2 * ETH_ALEN];
    reverse(&facts, reply, macs);
    const struct aiokvm_net_rule *rule = net_rules_decide(filter->rules, filter->count, &facts);
    return rule->verdict == AIOKVM_NET_ALLOW && !(rule->has & AIOKVM_NET_NO_REPLIES);
}

/* Whether the frame belongs to a flow that has been let through, so that no rule has to be asked: a reply, a later
 * fragment, an error about a packet of it. */
static bool belongs(struct aiokvm_net_filter *filter, const struct net_facts *facts, uint32_t frame_size,
                    uint64_t now_ns)
{
    struct net_flow_key key;
    if (!filter->flows || !facts->packet.has_network)
        return false;
    if (facts->packet.fragment == NET_FRAGMENT_LATER) {
        set_fragment_key(&key, &facts->packet, facts->egress);
        struct net_flow *flow = net_flows_find(filter->flows, &key, now_ns);
        return flow && flow->egress == facts->egress && flow->generation == filter->generation;
    }
    if (facts->is_error) {
        struct net_facts quoted;
        if (!net_facts_quoted(&quoted, facts, frame_size))
            return false;
        set_key(&key, &quoted);
        struct net_flow *flow = net_flows_find(filter->flows, &key, now_ns);
        return flow && flow->state == NET_FLOW_ALLOWED && flow->generation == filter->generation;
    }
    if (!facts->replies)
        return false;
    set_key(&key, facts);
    struct net_flow *flow = net_flows_find(filter->flows, &key, now_ns);
    if (!flow || flow->state != NET_FLOW_ALLOWED || flow->egress == facts->egress)
        return false;
    if (flow->generation != filter->generation && !still_allowed(filter, facts)) {
        flow->state = NET_FLOW_FREE;
        return false;
    }
    allow(filter, flow, flow->egress, now_ns);
    allow_fragments(filter, facts, now_ns);
    return true;
}

/* ---- asking ---- */

static void drop_asked(struct aiokvm_net_filter *filter, struct asked *asked)
{
    aiokvm_share_give(&filter->frames, asked->what.frame_size);
    free(asked->data);
    *asked = (struct asked){ 0 };
}

static bool ask(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rule, struct net_flow *flow,
                const struct net_facts *facts, const struct net_frame *frame)
{
    const struct net_packet *packet = &facts->packet;
    struct asked *asked = filter->asked;
    while (asked < filter->asked + MAX_ASKED && asked->id)
        asked++;
    if (asked == filter->asked + MAX_ASKED || !aiokvm_share_take(&filter->frames, frame->size))
        return false;
    asked->data = malloc(frame->size);
    if (!asked->data) {
        aiokvm_share_give(&filter->frames, frame->size);
        return false;
    }
    net_frame_copy(frame, asked->data);
    asked->id = asked->what.id = ++filter->next_id;
    asked->flow = flow;
    asked->hdr = frame->hdr;
    asked->hops = frame->hops;
    asked->queue = frame->queue;
    struct aiokvm_net_flow *what = &asked->what;
    what->hook = rule->hook;
    what->egress = facts->egress;
    what->protocol = packet->protocol;
    what->address_size = (uint8_t)packet->address_size;
    what->has_ports = facts->has_ports;
    what->src_port = facts->src_port;
    what->dst_port = facts->dst_port;
    memcpy(what->src, packet->src, packet->address_size);
    memcpy(what->dst, packet->dst, packet->address_size);
    what->frame_size = frame->size;
    flow->state = NET_FLOW_ASKED;
    flow->hook = rule->hook;
    flow->egress = facts->egress;
    flow->generation = filter->generation;
    net_tell(filter->end, AIOKVM_NET_NEWS_FLOW, 0, 0);
    return true;
}

/* Whether a flow that the program decides about may pass; it is asked if it does not know. */
static bool passes_by_answer(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rule,
                             struct net_flow *flow, const struct net_facts *facts, const struct net_frame *frame)
{
    if (!flow)
        return false;
    if (flow->state != NET_FLOW_FREE && flow->generation == filter->generation)
        return flow->state == NET_FLOW_ALLOWED;
    if (!ask(filter, rule, flow, facts, frame))
        flow->state = NET_FLOW_FREE;
    return false;
}

static bool passes_by_rule(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rule,
                           const struct net_facts *facts, const struct net_frame *frame, uint64_t now_ns)
{
    bool asks = rule->verdict == AIOKVM_NET_ASK, replies = !(rule->has & AIOKVM_NET_NO_REPLIES);
    if (rule->verdict == AIOKVM_NET_DENY)
        return false;
    if (!filter->tracks || !facts->begins || (!replies && facts->packet.fragment == NET_FRAGMENT_NONE))
        return !asks;
    if (!filter->flows && !(filter->flows = net_flows_new()))
        return !asks;
    if (replies) {
        struct net_flow_key key;
        set_key(&key, facts);
        struct net_flow *flow = net_flows_get(filter->flows, &key, now_ns);
        if (asks && !passes_by_answer(filter, rule, flow, facts, frame))
            return false;
        if (flow && flow->state != NET_FLOW_ASKED)
            allow(filter, flow, facts->egress, now_ns);
    }
    allow_fragments(filter, facts, now_ns);
    return true;
}

bool net_filter_passes(struct aiokvm_net_filter *filter, struct aiokvm_net_end *end, const struct net_frame *frame,
                       bool sent, uint64_t now_ns)
{
    struct net_facts facts;
    net_spend(end->net, filter->count * COST_RULE);
    net_facts_set(&facts, frame, !sent);
    if (facts.is_bad)
        return false;
    return belongs(filter, &facts, frame->size, now_ns) ||
           passes_by_rule(filter, net_rules_decide(filter->rules, filter->count, &facts), &facts, frame, now_ns);
}

/* ---- the program's side ---- */

static int set_rules(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rules, uint32_t count)
{
    if (count > AIOKVM_NET_MAX_RULES)
        return -E2BIG;
    struct aiokvm_net_rule *copy = calloc(count + 1, sizeof(*rules));
    if (!copy)
        return -ENOMEM;
    if (count)
        memcpy(copy, rules, count * sizeof(*rules));
    free(filter->rules);
    filter->rules = copy;
    filter->count = count;
    filter->generation++;
    filter->tracks = false;
    for (uint32_t i = 0; i < count; i++)
        filter->tracks |= copy[i].verdict != AIOKVM_NET_ALLOW;
    return 0;
}

struct aiokvm_net_filter *aiokvm_net_filter_new(struct aiokvm_net_end *end, const struct aiokvm_net_rule *rules,
                                                uint32_t count, int *error)
{
    struct aiokvm_net_filter *filter = calloc(1, sizeof(*filter));
    *error = filter ? -set_rules(filter, rules, count) : ENOMEM;
    if (*error) {
        free(filter);
        return NULL;
    }
    filter->end = end;
    aiokvm_share_open(&filter->frames, aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES));
    return filter;
}

int aiokvm_net_filter_replace(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rules, uint32_t count)
{
    struct aiokvm_net *net = filter->end->net;
    if (!net_enter(net))
        return -EOWNERDEAD;
    int error = set_rules(filter, rules, count);
    for (struct asked *asked = filter->asked; !error && asked < filter->asked + MAX_ASKED; asked++)
        if (asked->id) {
            asked->flow->state = NET_FLOW_FREE;
            drop_asked(filter, asked);
        }
    net_leave(net);
    return error;
}

int aiokvm_net_filter_take(struct aiokvm_net_filter *filter, struct aiokvm_net_flow *flow, uint8_t *frame,
                           uint32_t size)
{
    struct aiokvm_net *net = filter->end->net;
    if (!net_enter(net))
        return -EOWNERDEAD;
    struct asked *oldest = NULL;
    for (struct asked *asked = filter->asked; asked < filter->asked + MAX_ASKED; asked++)
        if (asked->id && !asked->taken && (!oldest || asked->id < oldest->id))
            oldest = asked;
    if (oldest) {
        oldest->taken = true;
        *flow = oldest->what;
        memcpy(frame, oldest->data, flow->frame_size < size ? flow->frame_size : size);
    }
    net_leave(net);
    return oldest != NULL;
}

/* Counts start anew: it was counted as one that was filtered. It pays no rate limit, which might have it wait. */
static void send_asked(struct aiokvm_net_filter *filter, const struct asked *asked)
{
    struct aiokvm_net_end *from = asked->what.egress ? filter->end->peer : filter->end;
    if (!from)
        return;
    struct iovec iov[3] = { [1] = { asked->data, asked->what.frame_size } };
    struct net_frame frame = {
        .hdr = asked->hdr, .iov = iov + 1, .count = 1, .size = asked->what.frame_size, .hops = asked->hops,
        .queue = asked->queue,
        .progress = { .passed = NET_PASSED_SENT_LIMIT | NET_PASSED_RECEIVED_LIMIT, .link = from->link },
    };
    if (from->stats.dropped_filtered)
        from->stats.dropped_filtered--;
    if (net_send(from, &frame) == NET_BLOCKED)
        from->peer->stats.dropped_full++;
}

int aiokvm_net_filter_decide(struct aiokvm_net_filter *filter, uint64_t id, int allow_it)
{
    struct aiokvm_net *net = filter->end->net;
    if (!net_enter(net))
        return -EOWNERDEAD;
    struct asked *asked = filter->asked;
    while (asked < filter->asked + MAX_ASKED && asked->id != id)
        asked++;
    bool found = id && asked < filter->asked + MAX_ASKED;
    if (found) {
        uint64_t now_ns = aiokvm_now_ns();
        struct asked decided = *asked;
        *asked = (struct asked){ 0 };
        if (allow_it) {
            allow(filter, decided.flow, decided.what.egress, now_ns);
            send_asked(filter, &decided);
        } else {
            decided.flow->state = NET_FLOW_DENIED;
            decided.flow->used_ns = now_ns;
            decided.flow->until_ns = now_ns + DENIED_NS;
        }
        drop_asked(filter, &decided);
    }
    net_leave(net);
    return found ? 0 : -ENOENT;
}

void aiokvm_net_filter_forget(struct aiokvm_net_filter *filter, uint32_t hook)
{
    struct aiokvm_net *net = filter->end->net;
    if (!net_enter(net))
        return;
    for (uint32_t i = 0; filter->flows && i < NET_FLOWS; i++) {
        struct net_flow *flow = &filter->flows->flows[i];
        if (flow->hook == hook && flow->state != NET_FLOW_ASKED)
            flow->state = NET_FLOW_FREE;
    }
    net_leave(net);
}

void aiokvm_net_filter_free(struct aiokvm_net_filter *filter)
{
    for (struct asked *asked = filter->asked; asked < filter->asked + MAX_ASKED; asked++)
        free(asked->data);
    aiokvm_share_close(&filter->frames);
    free(filter->flows);
    free(filter->rules);
    free(filter);
}
