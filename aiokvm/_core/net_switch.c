/* The way of a frame through a switch: net_switch.h. */
#include "net_switch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "net_switch_priv.h"

/* What waits for a port's peer. */
enum { QUEUE_FRAMES = 256, QUEUE_BYTES = 1 << 20 };
enum { ETHERTYPE_VLAN = 0x8100, TAG = 4, TAG_AT = 12 };
/* Pieces of a frame whose tag is changed in place; others are copied. Linux's drivers give up to 19. */
enum { PIECES = 20 };

/* A frame with another tag than it came with. */
struct form {
    struct net_frame frame;
    struct iovec iov[PIECES + 4];
    uint8_t head[NET_HEAD];
    uint8_t *copy; /* or NULL */
    bool made;
};

/* A frame that is forwarded. */
struct passage {
    const struct net_frame *frame;
    struct switch_port *from;
    uint32_t vlan;
    bool has_tag; /* of 802.1Q, that the switch looks at */
    bool has_vlan; /* the tag says a VLAN, not just a priority */
    uint16_t tci;
    struct form plain, tagged;
};

static bool in_trunk(const struct switch_port *port, uint32_t vlan)
{
    return port->trunk && port->trunk[vlan / 64] >> vlan % 64 & 1;
}

static bool is_open(const struct switch_port *port)
{
    return !port->vlan && !port->trunk;
}

/* ---- tags ---- */

static uint16_t word(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] << 8 | bytes[1]);
}

/* Which VLAN a frame is of. False: of none that its port is in. */
static bool classify(struct passage *passage)
{
    const struct net_frame *frame = passage->frame;
    const struct switch_port *from = passage->from;
    const uint8_t *head = frame->iov[0].iov_base;
    passage->vlan = from->vlan;
    passage->tci = 0;
    passage->has_tag = passage->has_vlan = false;
    if (is_open(from))
        return true;
    if (word(head + TAG_AT) == ETHERTYPE_VLAN) {
        if (frame->size < AIOKVM_NET_MIN_FRAME + TAG)
            return false;
        passage->has_tag = true;
        passage->tci = word(head + TAG_AT + 2);
        uint32_t vlan = passage->tci & 0xfff;
        passage->has_vlan = vlan;
        if (vlan) {
            passage->vlan = vlan;
            return in_trunk(from, vlan);
        }
    }
    return from->vlan;
}

/* The frame without its tag and with this one, if not NULL. False: it would be too long, or there is no memory. */
static bool make(struct form *form, const struct passage *passage, const uint8_t *tag)
{
    const struct net_frame *frame = passage->frame;
    uint32_t skipped = passage->has_tag ? TAG : 0, count = 0;
    uint8_t *head = frame->iov[0].iov_base;
    struct iovec from[PIECES + 2];
    form->frame = *frame;
    form->copy = NULL;
    from[count++] = (struct iovec){ head, TAG_AT };
    if (tag)
        from[count++] = (struct iovec){ (void *)(uintptr_t)tag, TAG };
    if (frame->count <= PIECES) {
        from[count++] = (struct iovec){ head + TAG_AT + skipped, frame->iov[0].iov_len - TAG_AT - skipped };
        for (uint32_t i = 1; i < frame->count; i++)
            from[count++] = frame->iov[i];
    } else {
        form->copy = malloc(frame->size);
        if (!form->copy)
            return false;
        net_frame_copy(frame, form->copy);
        from[count++] = (struct iovec){ form->copy + TAG_AT + skipped, frame->size - TAG_AT - skipped };
    }
    net_frame_set(&form->frame, form->iov + 1, form->head, from, count, 0);
    /* A second tag would become the first: a guest does not choose its VLAN so. */
    if (!tag && word(form->head + TAG_AT) == ETHERTYPE_VLAN)
        return false;
    if (frame->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)
        form->frame.hdr.csum_start = (uint16_t)(frame->hdr.csum_start + (tag ? TAG : 0) - skipped);
    /* The checksum of what begins within the tag was never one. */
    return net_frame_check(&form->frame);
}

/* The frame as this port sends it; NULL: it cannot. */
static const struct net_frame *form_for(struct passage *passage, const struct switch_port *to)
{
    if (is_open(to))
        return passage->frame;
    bool tagged = passage->vlan != to->vlan;
    if (tagged ? passage->has_vlan : !passage->has_tag)
        return passage->frame;
    struct form *form = tagged ? &passage->tagged : &passage->plain;
    if (!form->made) {
        /* The priority is kept. */
        uint16_t tci = (uint16_t)((passage->tci & 0xf000) | passage->vlan);
        const uint8_t tag[TAG] = { ETHERTYPE_VLAN >> 8, ETHERTYPE_VLAN & 0xff, (uint8_t)(tci >> 8), (uint8_t)tci };
        form->made = true;
        if (!make(form, passage, tagged ? tag : NULL))
            form->frame.size = 0;
    }
    return form->frame.size ? &form->frame : NULL;
}

/* ---- forwarding ---- */

static bool may_go(const struct passage *passage, const struct switch_port *to)
{
    if (to == passage->from || (to->isolated && passage->from->isolated))
        return false;
    if (is_open(to) || !passage->vlan)
        return is_open(to) && !passage->vlan;
    return passage->vlan == to->vlan || in_trunk(to, passage->vlan);
}

static void put(struct switch_port *to, const struct net_frame *frame)
{
    net_spend(to->end.net, NET_COST_FRAME + frame->size);
    if (!net_queue_put(&to->queue, frame))
        to->end.stats.dropped_full++;
}

static void emit(struct passage *passage, struct switch_port *to)
{
    const struct net_frame *form = form_for(passage, to);
    if (!form) {
        to->end.stats.dropped_invalid++;
        return;
    }
    /* A frame of its own: what it passes is another link. */
    struct net_frame frame = *form;
    frame.hops++;
    frame.progress = (struct net_progress){ 0 };
    if (to->queue.frames || to->end.waits) {
        put(to, &frame);
        return;
    }
    if (net_send(&to->end, &frame) == NET_BLOCKED)
        put(to, &frame);
}

/* To all ports from number *done on, at least to one: a frame to many may take longer than there is time for. */
static enum net_result flood(struct passage *passage, uint32_t *done)
{
    struct aiokvm_net_switch *sw = passage->from->sw;
    bool sent = false;
    for (; *done < sw->top; (*done)++) {
        if (!sw->ports[*done] || !may_go(passage, sw->ports[*done]))
            continue;
        if (sent && sw->net->is_over) {
            net_yield(passage->from->end.peer);
            return NET_BLOCKED;
        }
        emit(passage, sw->ports[*done]);
        sent = true;
    }
    return NET_TAKEN;
}

/* 01-80-C2-00-00-00 to 0F: for the next bridge and no further. IEEE 802.1Q, table 8-1. */
static bool is_link_local(const uint8_t *mac)
{
    static const uint8_t PREFIX[] = { 0x01, 0x80, 0xc2, 0x00, 0x00 };
    return !memcmp(mac, PREFIX, sizeof(PREFIX)) && mac[5] < 0x10;
}

static enum net_result port_receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct switch_port *from = (struct switch_port *)end;
    struct aiokvm_net_switch *sw = from->sw;
    if (!sw) {
        end->stats.dropped_down++;
        return NET_TAKEN;
    }
    if (!end->is_dirty) {
        sw->now_ns = sw->clock();
        net_dirty(end);
    }
    const uint8_t *destination = frame->iov[0].iov_base, *source = destination + 6;
    if (source[0] & 1) {
        sw->stats.dropped_source++;
        return NET_TAKEN;
    }
    struct passage passage;
    passage.frame = frame;
    passage.from = from;
    passage.plain.made = passage.tagged.made = false;
    passage.plain.copy = passage.tagged.copy = NULL;
    if (!classify(&passage)) {
        sw->stats.dropped_vlan++;
        return NET_TAKEN;
    }
    if (!switch_learn(sw, from, switch_key(source, passage.vlan))) {
        sw->stats.dropped_source++;
        return NET_TAKEN;
    }
    enum net_result result = NET_TAKEN;
    uint32_t *done = &frame->progress.done;
    bool group = destination[0] & 1;
    struct switch_port *to = group ? NULL : switch_find(sw, switch_key(destination, passage.vlan));
    if (*done) {
        result = flood(&passage, done);
    } else if (to ? !may_go(&passage, to) : group && is_link_local(destination)) {
        sw->stats.filtered++;
    } else if (to) {
        sw->stats.forwarded++;
        emit(&passage, to);
    } else {
        sw->stats.flooded++;
        result = flood(&passage, done);
    }
    free(passage.plain.copy);
    free(passage.tagged.copy);
    return result;
}

static void port_flush(struct aiokvm_net_end *end)
{
    (void)end; /* the next batch looks at the clock again */
}

static bool port_serve(struct aiokvm_net_end *end)
{
    struct switch_port *port = (struct switch_port *)end;
    return net_queue_send(&port->queue, end, NET_QUANTUM) == NET_TAKEN && port->queue.frames;
}

/* ---- their lives ---- */

static void detach(struct switch_port *port)
{
    struct aiokvm_net_switch *sw = port->sw;
    if (!sw)
        return;
    switch_forget(sw, port);
    sw->ports[port->index] = NULL;
    while (sw->top && !sw->ports[sw->top - 1])
        sw->top--;
    port->sw = NULL;
}

static void port_free(struct aiokvm_net_end *end)
{
    struct switch_port *port = (struct switch_port *)end;
    detach(port);
    net_queue_clear(&port->queue);
    aiokvm_share_close(&port->frames);
    free(port->trunk);
    free(port);
}

static const struct net_type PORT = {
    .serve = port_serve, .receive = port_receive, .flush = port_flush, .free = port_free,
};

struct aiokvm_net_switch *aiokvm_net_switch_new(struct aiokvm_net *net, const struct aiokvm_net_switch_config *config,
                                                int *error)
{
    struct aiokvm_net_switch *sw = calloc(1, sizeof(*sw));
    if (!sw) {
        *error = ENOMEM;
        return NULL;
    }
    sw->net = net;
    sw->clock = config->now_ns ? config->now_ns : aiokvm_now_ns;
    sw->ageing_ns = config->ageing_ns;
    switch_table_init(sw);
    return sw;
}

void aiokvm_net_switch_free(struct aiokvm_net_switch *sw)
{
    bool ours = net_enter(sw->net);
    for (uint32_t i = 0; i < AIOKVM_NET_SWITCH_PORTS; i++)
        if (sw->ports[i])
            detach(sw->ports[i]);
    if (ours)
        net_leave(sw->net);
    free(sw);
}

/* NULL: no such VLAN, or no memory. */
static uint64_t *make_trunk(const struct aiokvm_net_switch_port_config *config, int *error)
{
    uint64_t *trunk = calloc(AIOKVM_NET_SWITCH_VLANS / 64, sizeof(*trunk));
    *error = trunk ? 0 : ENOMEM;
    for (uint32_t i = 0; !*error && i < config->trunks; i++) {
        uint32_t vlan = config->trunk[i];
        if (!vlan || vlan > 4094)
            *error = EINVAL;
        else
            trunk[vlan / 64] |= UINT64_C(1) << vlan % 64;
    }
    if (*error) {
        free(trunk);
        return NULL;
    }
    return trunk;
}

/* A place for it, or false. */
static bool attach(struct aiokvm_net_switch *sw, struct switch_port *port)
{
    for (uint16_t i = 0; i < AIOKVM_NET_SWITCH_PORTS; i++)
        if (!sw->ports[i]) {
            sw->ports[i] = port;
            port->index = i;
            port->sw = sw;
            if (sw->top <= i)
                sw->top = i + 1u;
            return true;
        }
    return false;
}

struct aiokvm_net_end *aiokvm_net_switch_port_new(struct aiokvm_net_switch *sw,
                                                  const struct aiokvm_net_switch_port_config *config, int *error)
{
    uint64_t *trunk = NULL;
    *error = config->vlan > 4094 ? EINVAL : 0;
    if (!*error && config->trunks)
        trunk = make_trunk(config, error);
    if (*error)
        return NULL;
    struct switch_port *port = net_end_new(sw->net, &PORT, sizeof(*port), error);
    if (!port) {
        free(trunk);
        return NULL;
    }
    port->end.offloads = AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4 | AIOKVM_NET_OFFLOAD_TSO6 |
                         AIOKVM_NET_OFFLOAD_USO | AIOKVM_NET_OFFLOAD_ECN;
    port->vlan = (uint16_t)config->vlan;
    port->isolated = config->isolated;
    port->trunk = trunk;
    port->newest = port->oldest = NO_ENTRY;
    aiokvm_share_open(&port->frames, aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES));
    net_queue_init(&port->queue, QUEUE_FRAMES, QUEUE_BYTES, &port->frames);
    bool attached = false;
    if (net_enter(sw->net)) {
        attached = attach(sw, port);
        net_leave(sw->net);
    }
    if (!attached) {
        aiokvm_net_end_free(&port->end);
        *error = ENOSPC;
        return NULL;
    }
    return &port->end;
}

void aiokvm_net_switch_stats(struct aiokvm_net_switch *sw, struct aiokvm_net_switch_stats *stats)
{
    if (!net_enter(sw->net)) {
        memset(stats, 0, sizeof(*stats));
        return;
    }
    *stats = sw->stats;
    net_leave(sw->net);
}
