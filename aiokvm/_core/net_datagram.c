/* An end that is a datagram socket. */
#define _GNU_SOURCE
#include "net_datagram.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "net_priv.h"

/* How many are read with one call, and how many may wait to be written with one. */
enum { IN = 32, OUT = NET_QUANTUM };
/* One byte more than the longest: what does not fit is seen to be too long. */
enum { SLOT = AIOKVM_NET_MAX_FRAME + 1 };
/* Of frames that wait to be written. */
enum { OUT_BYTES = 256 << 10 };
/* How often reading may fail before something new has to happen. */
enum { ERRORS = 8 };
/* How soon a named socket that was full is tried again: it grows. */
static const uint64_t MIN_PAUSE_NS = 50000, MAX_PAUSE_NS = 20000000;

struct datagram {
    struct aiokvm_net_end end;
    struct net_watch watch; /* fd below 0: it is lost */
    bool is_unix;
    bool is_seqpacket;
    bool is_full;   /* the peer was told NET_BLOCKED */
    bool is_told;   /* in this call: that nobody is there */
    /* Of AF_UNIX, else not needed: the socket is connected. That one would not hear a peer that has come back until it
     * has noticed, and would lose what it has received when it connects anew. */
    struct sockaddr_storage remote;
    socklen_t remote_size; /* 0: none */
    uint64_t pause_ns;
    uint32_t in_next, in_count;
    struct net_progress progress; /* of the frame at in_next, when that was blocked */
    uint32_t out_next, out_count, out_bytes;
    uint8_t *in_data, *out_data;
    struct mmsghdr in[IN], out[OUT];
    struct iovec in_iov[IN], out_iov[OUT];
};

/* Nobody is there (any more). */
static bool is_absence(int error)
{
    return error == ECONNREFUSED || error == ENOTCONN || error == ECONNRESET || error == EPIPE || error == ENOENT ||
           error == EDESTADDRREQ;
}

static void lose(struct datagram *datagram, int error)
{
    net_unwatch(&datagram->watch);
    datagram->end.stats.dropped_down += datagram->in_count - datagram->in_next;
    datagram->end.stats.dropped_down += datagram->out_count - datagram->out_next;
    datagram->in_next = datagram->in_count = 0;
    datagram->out_next = datagram->out_count = datagram->out_bytes = 0;
    datagram->is_full = false;
    net_tell(&datagram->end, AIOKVM_NET_NEWS_CLOSED, is_absence(error) ? 0 : error, 0);
    net_resume(&datagram->end);
}

/* Whether the socket will never work again. */
static bool is_final(const struct datagram *datagram, int error)
{
    if (error == EBADF || error == ENOTSOCK || error == EFAULT)
        return true;
    return datagram->is_unix && !datagram->remote_size && is_absence(error);
}

/* ---- from the socket ---- */

/* False: there is nothing, or it was an error. */
static bool fill(struct datagram *datagram)
{
    int count = recvmmsg(datagram->watch.fd, datagram->in, IN, MSG_DONTWAIT, NULL);
    net_spend(datagram->end.net, NET_COST_LOOK);
    if (count < 0) {
        if (errno == EAGAIN)
            net_watch_done(&datagram->watch, EPOLLIN | EPOLLERR | EPOLLHUP);
        else if (is_final(datagram, errno))
            lose(datagram, errno);
        /* Else an error of something that was sent: it has been told now, and there may be frames behind it. */
        return false;
    }
    datagram->in_next = 0;
    datagram->in_count = (uint32_t)count;
    /* It is empty, unless it was an error that ended the batch. */
    if (count < IN && !(datagram->watch.events & (EPOLLERR | EPOLLHUP)))
        net_watch_done(&datagram->watch, EPOLLIN);
    return true;
}

static enum net_result send_frame(struct datagram *datagram, const struct mmsghdr *message)
{
    if (!message->msg_len && datagram->is_seqpacket) {
        datagram->in_next = datagram->in_count; /* the end of it is no frame */
        lose(datagram, 0);
        return NET_TAKEN;
    }
    if (message->msg_len < AIOKVM_NET_MIN_FRAME || message->msg_len > AIOKVM_NET_MAX_FRAME ||
        message->msg_hdr.msg_flags & MSG_TRUNC) {
        datagram->end.stats.dropped_invalid++;
        return NET_TAKEN;
    }
    struct iovec iov[2] = { [1] = { message->msg_hdr.msg_iov->iov_base, message->msg_len } };
    struct net_frame frame = {
        .iov = iov + 1, .count = 1, .size = message->msg_len,
        .progress = datagram->progress,
    };
    enum net_result result = net_send(&datagram->end, &frame);
    datagram->progress = result == NET_BLOCKED ? frame.progress : (struct net_progress){ 0 };
    return result;
}

static bool read_frames(struct datagram *datagram)
{
    uint32_t errors = 0;
    for (uint32_t left = NET_QUANTUM; left; left = datagram->end.net->is_over ? 0 : left - 1) {
        if (datagram->in_next == datagram->in_count) {
            if (!(datagram->watch.events & (EPOLLIN | EPOLLERR | EPOLLHUP)))
                return false;
            if (!fill(datagram)) {
                /* One that does not end is waited out. */
                if (++errors == ERRORS)
                    net_watch_done(&datagram->watch, EPOLLIN | EPOLLERR | EPOLLHUP);
                continue;
            }
        }
        /* The peer may have answered at once, and that have ended it. */
        enum net_result result = send_frame(datagram, &datagram->in[datagram->in_next++]);
        if (datagram->watch.fd < 0)
            return false;
        if (result == NET_BLOCKED) {
            datagram->in_next--;
            return false;
        }
    }
    return true;
}

/* ---- to the socket ---- */

/* A named socket does not say when there is room. */
static void wait_for_room(struct datagram *datagram)
{
    datagram->watch.events &= ~(uint32_t)EPOLLOUT;
    if (!datagram->remote_size)
        return;
    uint64_t pause_ns = datagram->pause_ns * 2;
    if (pause_ns < MIN_PAUSE_NS)
        pause_ns = MIN_PAUSE_NS;
    datagram->pause_ns = pause_ns > MAX_PAUSE_NS ? MAX_PAUSE_NS : pause_ns;
    net_at(&datagram->end, aiokvm_now_ns() + datagram->pause_ns);
}

static void on_error(struct datagram *datagram, int error)
{
    struct aiokvm_net_stats *stats = &datagram->end.stats;
    if (error == EAGAIN) {
        wait_for_room(datagram);
    } else if (is_final(datagram, error)) {
        lose(datagram, error);
    } else if (is_absence(error)) {
        /* Of UDP it was said about an earlier one. */
        if (datagram->is_unix || datagram->is_told) {
            stats->dropped_down += datagram->out_count - datagram->out_next;
            datagram->out_next = datagram->out_count;
        }
        datagram->is_told = true;
    } else if (error != EINTR) {
        datagram->out_next++;
        if (error == EMSGSIZE)
            stats->dropped_invalid++;
        else if (error == ENOBUFS || error == ENOMEM)
            stats->dropped_full++;
        else
            stats->dropped_down++;
    }
}

static void write_out(struct datagram *datagram)
{
    datagram->is_told = false;
    while (datagram->out_next < datagram->out_count && datagram->watch.events & EPOLLOUT) {
        int count = sendmmsg(datagram->watch.fd, datagram->out + datagram->out_next,
                             datagram->out_count - datagram->out_next, MSG_DONTWAIT | MSG_NOSIGNAL);
        net_spend(datagram->end.net, NET_COST_LOOK);
        if (count < 0) {
            on_error(datagram, errno);
            continue;
        }
        datagram->out_next += (uint32_t)count;
        datagram->pause_ns = 0;
    }
    if (datagram->out_next < datagram->out_count || datagram->watch.fd < 0)
        return;
    datagram->out_next = datagram->out_count = datagram->out_bytes = 0;
    if (datagram->is_full) {
        datagram->is_full = false;
        net_resume(&datagram->end);
    }
}

static bool has_room(const struct datagram *datagram, uint32_t size)
{
    return datagram->out_count < OUT && datagram->out_bytes + size <= OUT_BYTES;
}

static enum net_result receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct datagram *datagram = (struct datagram *)end;
    if (datagram->watch.fd >= 0 && !has_room(datagram, frame->size)) {
        write_out(datagram);
        if (datagram->watch.fd >= 0 && !has_room(datagram, frame->size)) {
            datagram->is_full = true;
            return NET_BLOCKED;
        }
    }
    if (datagram->watch.fd < 0) {
        end->stats.dropped_down++;
        return NET_TAKEN;
    }
    uint8_t *at = datagram->out_data + datagram->out_bytes;
    net_frame_copy(frame, at);
    datagram->out_iov[datagram->out_count++] = (struct iovec){ at, frame->size };
    datagram->out_bytes += frame->size;
    net_dirty(end);
    return NET_TAKEN;
}

static void flush(struct aiokvm_net_end *end)
{
    struct datagram *datagram = (struct datagram *)end;
    if (end->net->is_over)
        net_ready(end);
    else if (datagram->watch.fd >= 0)
        write_out(datagram);
}

static bool serve(struct aiokvm_net_end *end)
{
    struct datagram *datagram = (struct datagram *)end;
    if (datagram->remote_size && !end->deadline_ns)
        datagram->watch.events |= EPOLLOUT; /* so it is tried */
    if (datagram->watch.fd >= 0)
        write_out(datagram);
    return datagram->watch.fd >= 0 && read_frames(datagram);
}

/* ---- its life ---- */

static void datagram_free(struct aiokvm_net_end *end)
{
    struct datagram *datagram = (struct datagram *)end;
    net_unwatch(&datagram->watch);
    free(datagram->in_data);
    free(datagram->out_data);
    free(datagram);
}

static const struct net_type TYPE = { .serve = serve, .receive = receive, .flush = flush, .free = datagram_free };

static int set_up(struct datagram *datagram, int fd, const void *remote, uint32_t remote_size)
{
    int flags = fcntl(fd, F_GETFL), type, domain;
    socklen_t size = sizeof(int);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
        getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0 ||
        getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0)
        return errno;
    if (type != SOCK_DGRAM && type != SOCK_SEQPACKET)
        return EPROTOTYPE;
    if (remote_size > sizeof(datagram->remote))
        return EINVAL;
    datagram->is_unix = domain == AF_UNIX;
    datagram->is_seqpacket = type == SOCK_SEQPACKET;
    if (datagram->is_unix && remote_size) {
        memcpy(&datagram->remote, remote, remote_size);
        datagram->remote_size = remote_size;
    } else if (remote_size && connect(fd, remote, remote_size) < 0) {
        return errno;
    }
    datagram->in_data = malloc((size_t)IN * SLOT);
    datagram->out_data = malloc(OUT_BYTES);
    if (!datagram->in_data || !datagram->out_data)
        return ENOMEM;
    for (uint32_t i = 0; i < IN; i++) {
        datagram->in_iov[i] = (struct iovec){ datagram->in_data + (size_t)i * SLOT, SLOT };
        datagram->in[i].msg_hdr = (struct msghdr){ .msg_iov = &datagram->in_iov[i], .msg_iovlen = 1 };
    }
    for (uint32_t i = 0; i < OUT; i++)
        datagram->out[i].msg_hdr = (struct msghdr){
            .msg_name = datagram->remote_size ? &datagram->remote : NULL, .msg_namelen = datagram->remote_size,
            .msg_iov = &datagram->out_iov[i], .msg_iovlen = 1,
        };
    /* A named socket that is full says that there is room whenever it was tried. */
    datagram->watch.is_source = true;
    int error = net_watch(&datagram->watch, &datagram->end, fd, EPOLLIN | (datagram->remote_size ? 0 : EPOLLOUT));
    datagram->watch.events = EPOLLIN | EPOLLOUT;
    net_ready(&datagram->end);
    return -error;
}

struct aiokvm_net_end *aiokvm_net_datagram_new(struct aiokvm_net *net, int fd, const void *remote,
                                               uint32_t remote_size, int *error)
{
    struct datagram *datagram = net_end_new(net, &TYPE, sizeof(*datagram), error);
    if (!datagram)
        return NULL;
    datagram->watch.fd = -1;
    if (net_enter(net)) {
        *error = set_up(datagram, fd, remote, remote_size);
        net_leave(net);
    } else {
        *error = EOWNERDEAD;
    }
    if (*error) {
        aiokvm_net_end_free(&datagram->end);
        return NULL;
    }
    return &datagram->end;
}
