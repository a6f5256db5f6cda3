/* An end that is a TAP device: Documentation/networking/tuntap.rst, and drivers/net/tun.c for what it does not say. */
#define _GNU_SOURCE
#include "net_tap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "clock.h"
#include "net_priv.h"

/* The headers of 6.2 and later have them; the kernel wants both or none. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

enum { HEADER = sizeof(struct virtio_net_hdr_v1) };
/* One byte more than the longest: what does not fit is seen to be too long. */
enum { BUFFER = HEADER + AIOKVM_NET_MAX_FRAME + 1 };
/* How soon the device is told again what the peer takes: the kernel's lock for it is that of all interfaces. */
static const uint64_t TELL_NS = 100000000;
/* How much of one queue is read before the next has its turn. */
enum { SLICE = 16 };

struct tap_queue {
    struct net_watch watch;
    uint32_t header; /* HEADER, or 0: the device has none */
    bool is_full;    /* the device has said EAGAIN */
    bool is_held;    /* what is in the buffer waits for the peer */
    struct net_frame held;
    uint8_t *buffer;
};

struct tap {
    struct aiokvm_net_end end;
    bool is_lost;
    uint32_t told;    /* AIOKVM_NET_OFFLOAD_*: what the device may give us */
    uint64_t told_ns; /* when it was told */
    uint32_t first; /* the queue whose turn it is */
    uint32_t count;
    int fds[AIOKVM_NET_TAP_QUEUES];
    struct tap_queue queues[AIOKVM_NET_TAP_QUEUES];
    uint8_t *bounce; /* for frames of more pieces than writev takes */
};

static void lose(struct tap *tap, int error)
{
    for (uint32_t i = 0; i < tap->count; i++) {
        net_unwatch(&tap->queues[i].watch);
        tap->end.stats.dropped_down += tap->queues[i].is_held;
        tap->queues[i].is_held = false;
    }
    tap->is_lost = true;
    net_tell(&tap->end, AIOKVM_NET_NEWS_CLOSED, error, 0);
    net_resume(&tap->end);
}

/* ---- offloads ---- */

static unsigned long tun_flags(uint32_t offloads)
{
    unsigned long flags = 0;
    if (!(offloads & AIOKVM_NET_OFFLOAD_CSUM))
        return 0;
    flags |= TUN_F_CSUM;
    if (offloads & AIOKVM_NET_OFFLOAD_TSO4)
        flags |= TUN_F_TSO4;
    if (offloads & AIOKVM_NET_OFFLOAD_TSO6)
        flags |= TUN_F_TSO6;
    if (offloads & AIOKVM_NET_OFFLOAD_USO)
        flags |= TUN_F_USO4 | TUN_F_USO6;
    if (offloads & AIOKVM_NET_OFFLOAD_ECN && flags & (TUN_F_TSO4 | TUN_F_TSO6))
        flags |= TUN_F_TSO_ECN;
    return flags;
}

static bool set_offloads(const int *fds, uint32_t count, uint32_t offloads)
{
    for (uint32_t i = 0; i < count; i++)
        if (ioctl(fds[i], TUNSETOFFLOAD, tun_flags(offloads)) < 0)
            return false;
    return true;
}

/* What the device may give us is what the peer takes: the kernel cuts better than we do. A guest may change its mind as
 * often as it likes: meanwhile what is too much is cut on the way, also if telling fails. */
static void follow_peer(struct tap *tap)
{
    uint32_t wanted = tap->end.peer ? tap->end.peer->offloads & tap->end.offloads : 0;
    if (wanted == tap->told)
        return;
    uint64_t now_ns = aiokvm_now_ns();
    if (tap->told_ns && now_ns - tap->told_ns < TELL_NS) {
        net_at(&tap->end, tap->told_ns + TELL_NS);
        return;
    }
    tap->told = wanted;
    tap->told_ns = now_ns;
    set_offloads(tap->fds, tap->count, wanted);
}

/* ---- from the device ---- */

/* False: there is nothing. */
static bool read_frame(struct tap *tap, struct tap_queue *queue)
{
    uint8_t *start = queue->buffer + HEADER - queue->header;
    ssize_t size;
    do
        size = read(queue->watch.fd, start, queue->header + AIOKVM_NET_MAX_FRAME + 1);
    while (size < 0 && errno == EINTR);
    net_spend(tap->end.net, NET_COST_CALL);
    if (size < 0) {
        if (errno == EAGAIN)
            net_watch_done(&queue->watch, EPOLLIN);
        else
            lose(tap, errno == EBADFD ? ENODEV : errno);
        return false;
    }
    struct net_frame *frame = &queue->held;
    frame->hdr = (struct virtio_net_hdr_v1){ 0 };
    memcpy(&frame->hdr, start, queue->header);
    frame->size = size > queue->header ? (uint32_t)size - queue->header : 0;
    frame->queue = (uint32_t)(queue - tap->queues);
    frame->progress = (struct net_progress){ 0 };
    return true;
}

static enum net_result send_frame(struct tap *tap, struct tap_queue *queue)
{
    struct iovec iov[2] = { [1] = { queue->buffer + HEADER, queue->held.size } };
    queue->held.iov = iov + 1; /* [0] is the receiver's */
    queue->held.count = 1;
    if (!queue->is_held && !net_frame_check(&queue->held)) {
        tap->end.stats.dropped_invalid++;
        return NET_TAKEN;
    }
    enum net_result result = net_send(&tap->end, &queue->held);
    queue->held.iov = NULL;
    queue->is_held = result == NET_BLOCKED;
    return result;
}

static uint32_t serve_queue(struct tap *tap, struct tap_queue *queue, uint32_t most)
{
    uint32_t done = 0;
    if (!queue->is_held && !(queue->watch.events & EPOLLIN))
        return 0;
    while (done < most) {
        if (!queue->is_held && !read_frame(tap, queue))
            break;
        if (send_frame(tap, queue) == NET_BLOCKED || tap->is_lost)
            break;
        done++;
        if (tap->end.net->is_over)
            break;
    }
    return done;
}

static bool serve(struct aiokvm_net_end *end)
{
    struct tap *tap = (struct tap *)end;
    uint32_t left = NET_QUANTUM;
    bool more = false;
    if (tap->is_lost)
        return false;
    follow_peer(tap);
    for (uint32_t i = 0; i < tap->count && !tap->is_lost; i++) {
        struct tap_queue *queue = &tap->queues[(tap->first + i) % tap->count];
        if (queue->watch.events & (EPOLLERR | EPOLLHUP)) {
            lose(tap, ENODEV);
            return false;
        }
        if (queue->is_full && queue->watch.events & EPOLLOUT) {
            queue->is_full = false;
            net_resume(end);
        }
        uint32_t most = tap->count == 1 || left < SLICE ? left : SLICE;
        left -= serve_queue(tap, queue, most);
        more |= !queue->is_held && queue->watch.events & EPOLLIN;
    }
    tap->first = (tap->first + 1) % tap->count;
    return more && !tap->is_lost;
}

/* ---- to the device ---- */

static enum net_result receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct tap *tap = (struct tap *)end;
    struct tap_queue *queue = &tap->queues[frame->queue % tap->count];
    if (tap->is_lost) {
        end->stats.dropped_down++;
        return NET_TAKEN;
    }
    struct virtio_net_hdr_v1 hdr = frame->hdr;
    hdr.num_buffers = 0;
    struct iovec bounced[2], *iov = frame->iov;
    uint32_t count = frame->count;
    if (count >= IOV_MAX) {
        net_frame_copy(frame, tap->bounce);
        bounced[1] = (struct iovec){ tap->bounce, frame->size };
        iov = bounced + 1;
        count = 1;
    }
    if (queue->header) {
        *--iov = (struct iovec){ &hdr, HEADER };
        count++;
    }
    ssize_t result;
    do
        result = writev(queue->watch.fd, iov, (int)count);
    while (result < 0 && errno == EINTR);
    net_spend(end->net, NET_COST_CALL);
    if (result >= 0)
        return NET_TAKEN;
    switch (errno) {
    case EAGAIN:
        queue->watch.events &= ~(uint32_t)EPOLLOUT;
        queue->is_full = true;
        return NET_BLOCKED;
    case EIO: /* the interface is down */
        end->stats.dropped_down++;
        break;
    case ENOBUFS:
    case ENOMEM:
        end->stats.dropped_full++;
        break;
    case EBADFD:
    case EBADF:
    case ENODEV:
    case ENXIO:
        end->stats.dropped_down++;
        lose(tap, ENODEV);
        break;
    default: /* EINVAL: a header that the kernel does not believe */
        end->stats.dropped_invalid++;
    }
    return NET_TAKEN;
}

/* ---- its life ---- */

static void tap_free(struct aiokvm_net_end *end)
{
    struct tap *tap = (struct tap *)end;
    for (uint32_t i = 0; i < AIOKVM_NET_TAP_QUEUES; i++) {
        if (i < tap->count)
            net_unwatch(&tap->queues[i].watch);
        free(tap->queues[i].buffer);
    }
    free(tap->bounce);
    free(tap);
}

static const struct net_type TYPE = { .serve = serve, .receive = receive, .free = tap_free };

/* 0 or an errno. */
static int set_up_queue(struct tap_queue *queue, int fd)
{
    struct ifreq request = { 0 };
    int flags = fcntl(fd, F_GETFL), header = HEADER, little_endian = 1;
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return errno;
    if (ioctl(fd, TUNGETIFF, &request) < 0)
        return errno;
    /* IFF_NO_PI is not to be seen: TUNGETIFF uses its bit for IFF_NOFILTER. */
    if (!(request.ifr_flags & IFF_TAP))
        return EPROTOTYPE;
    if (!(request.ifr_flags & IFF_VNET_HDR))
        return 0;
    if (ioctl(fd, TUNSETVNETHDRSZ, &header) < 0)
        return errno;
    /* A kernel that does not know it has the host's order, and there are only little-endian hosts. */
    if (ioctl(fd, TUNSETVNETLE, &little_endian) < 0 && errno != EINVAL && errno != ENOTTY)
        return errno;
    queue->header = HEADER;
    return 0;
}

static void find_offloads(struct tap *tap, const int *fds, uint32_t count)
{
    static const uint32_t TRIES[] = {
        AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4 | AIOKVM_NET_OFFLOAD_TSO6 | AIOKVM_NET_OFFLOAD_ECN |
            AIOKVM_NET_OFFLOAD_USO,
        AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4 | AIOKVM_NET_OFFLOAD_TSO6 | AIOKVM_NET_OFFLOAD_ECN,
        AIOKVM_NET_OFFLOAD_CSUM | AIOKVM_NET_OFFLOAD_TSO4 | AIOKVM_NET_OFFLOAD_TSO6,
        AIOKVM_NET_OFFLOAD_CSUM,
    };
    for (size_t i = 0; i < sizeof(TRIES) / sizeof(*TRIES); i++)
        if (set_offloads(fds, count, TRIES[i])) {
            tap->end.offloads = TRIES[i];
            return;
        }
}

/* Without the plane's lock: nobody else has the end yet, and the kernel may hold its own for long. */
static int set_up(struct tap *tap, const int *fds, uint32_t count, int offload)
{
    bool has_headers = true;
    tap->bounce = malloc(AIOKVM_NET_MAX_FRAME);
    if (!tap->bounce)
        return ENOMEM;
    for (uint32_t i = 0; i < count; i++) {
        struct tap_queue *queue = &tap->queues[i];
        queue->buffer = malloc(BUFFER);
        int error = queue->buffer ? set_up_queue(queue, fds[i]) : ENOMEM;
        if (error)
            return error;
        has_headers = has_headers && queue->header;
    }
    if (has_headers && offload)
        find_offloads(tap, fds, count);
    /* Nothing until there is a peer that takes it; whoever had the device before may have asked for more. */
    set_offloads(fds, count, 0);
    return 0;
}

static int watch(struct tap *tap, const int *fds, uint32_t count)
{
    if (!net_enter(tap->end.net))
        return EOWNERDEAD;
    int error = 0;
    while (!error && tap->count < count) {
        tap->fds[tap->count] = fds[tap->count];
        tap->queues[tap->count].watch.is_source = true;
        error = -net_watch(&tap->queues[tap->count].watch, &tap->end, fds[tap->count], EPOLLIN | EPOLLOUT);
        tap->count++;
    }
    net_leave(tap->end.net);
    return error;
}

struct aiokvm_net_end *aiokvm_net_tap_new(struct aiokvm_net *net, const int *fds, uint32_t count, int offload,
                                          int *error)
{
    if (!count || count > AIOKVM_NET_TAP_QUEUES) {
        *error = EINVAL;
        return NULL;
    }
    struct tap *tap = net_end_new(net, &TYPE, sizeof(*tap), error);
    if (!tap)
        return NULL;
    *error = set_up(tap, fds, count, offload);
    if (!*error)
        *error = watch(tap, fds, count);
    if (*error) {
        aiokvm_net_end_free(&tap->end);
        return NULL;
    }
    return &tap->end;
}

uint32_t aiokvm_net_tap_offloads(const struct aiokvm_net_end *end)
{
    return end->offloads;
}
