/* The program as the peer: net_port.h. */
#include "net_port.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "net_priv.h"

/* How long a ring is empty before it gives memory back: a flow that fills and empties it goes on with what it has. */
static const uint64_t IDLE_NS = 100000000;
/* How much it gives back before it looks at the clock. */
enum { SHRINK_BYTES = 256 << 10 };

struct held {
    uint32_t offset, size;
    struct aiokvm_net_port_header header;
};

struct port {
    struct aiokvm_net_end end;
    bool drops;
    bool asked;   /* the program waits for READABLE */
    bool refused; /* the peer, for want of room */
    bool wants;   /* the program waits for WRITABLE */
    /* A ring of frames, each in one piece: what does not fit in before the slab's end lies at its beginning. */
    uint8_t *slab;
    uint32_t bytes, write; /* where the next would lie */
    uint32_t touched;      /* there may be memory for so much of the slab; the ring has no more */
    bool shrinks;          /* at the end's deadline */
    struct held *held;     /* a ring of `depth` */
    uint32_t depth, first, count;
    struct aiokvm_share frames; /* of AIOKVM_BUDGET_FRAME_BYTES */
    struct net_room room;       /* what of it the slab takes */
    struct net_queue out;
};

/* ---- from the peer ---- */

/* Whether the ring may reach that far. */
static bool reach(struct port *port, uint32_t end)
{
    if (end <= port->touched)
        return true;
    if (!net_room_take(&port->room, end - port->touched))
        return false;
    port->touched = end;
    return true;
}

/* Where so many bytes fit in, or UINT32_MAX. While frames are held, `write` never catches up with the oldest. */
static uint32_t place(struct port *port, uint32_t size)
{
    uint32_t begin = port->count ? port->write : 0, oldest = port->count ? port->held[port->first].offset : 0;
    if (port->count && begin <= oldest)
        return size < oldest - begin ? begin : UINT32_MAX;
    if (size <= port->bytes - begin && reach(port, begin + size))
        return begin;
    return size < oldest ? 0 : UINT32_MAX;
}

/* Gives back what a flood has left in an empty ring, from its end on, while there is time. */
static void shrink(struct port *port)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    while (port->touched && !port->end.net->is_over) {
        uint32_t size = port->touched < SHRINK_BYTES ? port->touched : SHRINK_BYTES;
        size_t to = (port->touched + page - 1) / page * page, from = (port->touched - size + page - 1) / page * page;
        madvise(port->slab + from, to - from, MADV_DONTNEED);
        port->touched -= size;
        net_room_give(&port->room, size);
        net_spend(port->end.net, size);
    }
}

static enum net_result port_receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct port *port = (struct port *)end;
    uint32_t offset = port->count < port->depth ? place(port, frame->size) : UINT32_MAX;
    if (offset == UINT32_MAX) {
        if (port->drops) {
            end->stats.dropped_full++;
            return NET_TAKEN;
        }
        port->refused = true;
        return NET_BLOCKED;
    }
    uint32_t index = port->first + port->count++;
    struct held *held = &port->held[index < port->depth ? index : index - port->depth];
    held->offset = offset;
    held->size = frame->size;
    /* That a checksum is right, DATA_VALID, needs nothing of the program. */
    held->header = (struct aiokvm_net_port_header){
        .flags = frame->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .gso_type = frame->hdr.gso_type, .gso_size = frame->hdr.gso_size,
        .csum_start = frame->hdr.csum_start, .csum_offset = frame->hdr.csum_offset,
    };
    net_frame_copy(frame, port->slab + offset);
    port->write = offset + frame->size;
    if (port->asked) {
        port->asked = false;
        net_tell(end, AIOKVM_NET_NEWS_READABLE, 0, 0);
    }
    return NET_TAKEN;
}

int aiokvm_net_port_take(struct aiokvm_net_end *end, uint32_t most, struct aiokvm_net_port_batch *batch)
{
    struct port *port = (struct port *)end;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    if (most > AIOKVM_NET_PORT_BATCH)
        most = AIOKVM_NET_PORT_BATCH;
    if (most > port->count)
        most = port->count;
    port->asked = !port->count;
    uint32_t begin = port->held[port->first].offset, next = begin, index = port->first;
    batch->data = port->slab + begin;
    batch->count = batch->special = 0;
    while (batch->count < most && port->held[index].offset == next) {
        const struct held *held = &port->held[index];
        if (batch->count && next + held->size - begin > AIOKVM_NET_PORT_BATCH_BYTES)
            break;
        next += held->size;
        batch->ends[batch->count] = next - begin;
        batch->headers[batch->count++] = held->header;
        batch->special += held->header.flags || held->header.gso_type;
        index = index + 1 == port->depth ? 0 : index + 1;
    }
    net_leave(end->net);
    return (int)batch->count;
}

void aiokvm_net_port_release(struct aiokvm_net_end *end, uint32_t count)
{
    struct port *port = (struct port *)end;
    if (!net_enter(end->net))
        return;
    if (count > port->count)
        count = port->count;
    port->first = (port->first + count) % port->depth;
    port->count -= count;
    /* A sender that goes on for each frame that was taken would be woken for each. */
    if (port->refused && port->count <= port->depth / 2) {
        port->refused = false;
        net_resume(end);
    }
    if (!port->count && port->touched > NET_ROOM_STEP && !port->shrinks) {
        port->shrinks = true;
        net_at(end, aiokvm_now_ns() + IDLE_NS);
    }
    net_leave(end->net);
}

/* ---- to the peer ---- */

static bool has_room(const struct port *port)
{
    return port->out.frames <= port->out.max_frames / 2 && port->out.bytes <= port->out.max_bytes / 2;
}

static bool port_serve(struct aiokvm_net_end *end)
{
    struct port *port = (struct port *)end;
    bool more = net_queue_send(&port->out, end, NET_QUANTUM) == NET_TAKEN && port->out.frames;
    if (port->wants && has_room(port)) {
        port->wants = false;
        net_tell(end, AIOKVM_NET_NEWS_WRITABLE, 0, 0);
    }
    if (port->shrinks && !end->deadline_ns) {
        if (!port->count)
            shrink(port);
        port->shrinks = !port->count && port->touched;
    }
    return more || (port->shrinks && !end->deadline_ns);
}

/* False: there is no such frame. */
static bool make_frame(struct net_frame *frame, const struct aiokvm_net_port_header *header)
{
    if (frame->size < AIOKVM_NET_MIN_FRAME || frame->size > AIOKVM_NET_MAX_FRAME)
        return false;
    if (!header || (!header->flags && !header->gso_type))
        return true;
    frame->hdr = (struct virtio_net_hdr_v1){
        .flags = header->flags, .gso_type = header->gso_type, .gso_size = header->gso_size,
        .csum_start = header->csum_start, .csum_offset = header->csum_offset,
    };
    return net_frame_check(frame);
}

/* Behind what waits, if something does. */
static bool send_or_queue(struct port *port, struct net_frame *frame)
{
    if (port->out.frames || port->end.waits)
        return net_queue_put(&port->out, frame);
    if (net_send(&port->end, frame) == NET_TAKEN)
        return true;
    /* One always fits in an empty queue: it may have been sent in part. */
    if (!net_queue_put(&port->out, frame))
        port->end.stats.dropped_full++;
    return true;
}

int aiokvm_net_port_send(struct aiokvm_net_end *end, const uint8_t *data, const uint32_t *sizes,
                         const struct aiokvm_net_port_header *headers, uint32_t count)
{
    struct port *port = (struct port *)end;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    uint32_t done = 0;
    bool wrong = false;
    if (count > AIOKVM_NET_PORT_BATCH)
        count = AIOKVM_NET_PORT_BATCH;
    for (; done < count; data += sizes[done++]) {
        /* [0] is the receiver's. */
        struct iovec iov[2] = { [1] = { (void *)(uintptr_t)data, sizes[done] } };
        struct net_frame frame = { .iov = iov + 1, .count = 1, .size = sizes[done] };
        wrong = !make_frame(&frame, headers ? &headers[done] : NULL);
        if (wrong || !send_or_queue(port, &frame))
            break;
        if (end->net->is_over) {
            /* The others may come at once. */
            done++;
            net_ready(end);
            break;
        }
    }
    port->wants = !wrong && done < count;
    net_leave(end->net);
    return wrong && !done ? -EINVAL : (int)done;
}

/* ---- its life ---- */

int aiokvm_net_port_clear_some(struct aiokvm_net_end *end)
{
    struct port *port = (struct port *)end;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    net_queue_clear_some(&port->out, end->net);
    port->count = 0;
    shrink(port);
    bool more = port->out.frames || port->touched;
    net_leave(end->net);
    return more;
}

static void port_free(struct aiokvm_net_end *end)
{
    struct port *port = (struct port *)end;
    net_queue_clear(&port->out);
    aiokvm_share_close(&port->frames);
    free(port->held);
    free(port->slab);
    free(port);
}

static const struct net_type PORT = { .serve = port_serve, .receive = port_receive, .free = port_free };

struct aiokvm_net_end *aiokvm_net_port_new(struct aiokvm_net *net, const struct aiokvm_net_port_config *config,
                                           int *error)
{
    if (!config->depth || config->depth > AIOKVM_NET_PORT_MAX_DEPTH || config->bytes < AIOKVM_NET_MAX_FRAME ||
        config->bytes > INT32_MAX) {
        *error = EINVAL;
        return NULL;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *slab = aligned_alloc(page, (config->bytes + page - 1) / page * page);
    struct held *held = calloc(config->depth, sizeof(*held));
    struct port *port = slab && held ? net_end_new(net, &PORT, sizeof(*port), error) : NULL;
    if (!port) {
        if (!slab || !held)
            *error = ENOMEM;
        free(slab);
        free(held);
        return NULL;
    }
    port->end.offloads = config->offloads;
    port->drops = config->drop;
    port->asked = true;
    port->slab = slab;
    port->bytes = (uint32_t)config->bytes;
    port->held = held;
    port->depth = config->depth;
    aiokvm_share_open(&port->frames, aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES));
    net_room_init(&port->room, &port->frames);
    net_queue_init(&port->out, config->depth, config->bytes, &port->frames);
    return &port->end;
}
