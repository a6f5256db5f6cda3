/* An end that is a connected stream socket. */
#define _GNU_SOURCE
#include "net_stream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_priv.h"

/* Length and frame. */
enum { PREFIX = 4, MOST = PREFIX + AIOKVM_NET_MAX_FRAME };
/* For a call's worth of frames each. The upper half is never moved: what moves is at most the half that it has room
 * for, and only after as much has been sent. */
enum { BUFFER = 256 << 10, HALF = BUFFER / 2 };
_Static_assert((int)HALF >= (int)MOST, "a frame fits into either half");

struct stream {
    struct aiokvm_net_end end;
    struct net_watch watch; /* fd below 0: no socket */
    uint8_t *in, *out;
    uint32_t in_start, in_end;   /* what has come and was not sent to the peer */
    uint32_t out_start, out_end; /* what was received from the peer and not written */
    uint32_t out_frame;          /* where the frame begins of which out_start is a part */
    bool is_full;                /* the peer was told NET_BLOCKED */
    struct net_progress progress; /* of the frame at in_start, when that was blocked */
};

static void reset(struct stream *stream)
{
    stream->in_start = stream->in_end = stream->out_start = stream->out_end = stream->out_frame = 0;
    stream->progress = (struct net_progress){ 0 };
}

static uint32_t load_length(const uint8_t *at)
{
    uint32_t length;
    memcpy(&length, at, PREFIX);
    return ntohl(length);
}

/* Past the frames that were written completely. */
static void follow_out(struct stream *stream)
{
    for (uint32_t next; stream->out_frame < stream->out_start; stream->out_frame = next) {
        next = stream->out_frame + PREFIX + load_length(stream->out + stream->out_frame);
        if (next > stream->out_start)
            return;
    }
}

static void lose(struct stream *stream, int error, uint32_t detail)
{
    net_unwatch(&stream->watch);
    follow_out(stream);
    for (; stream->out_frame < stream->out_end; stream->end.stats.dropped_down++)
        stream->out_frame += PREFIX + load_length(stream->out + stream->out_frame);
    reset(stream);
    stream->is_full = false;
    net_tell(&stream->end, AIOKVM_NET_NEWS_CLOSED, error, detail);
    net_resume(&stream->end);
}

/* ---- from the socket ---- */

/* False: there is nothing, or the end of it. */
static bool fill(struct stream *stream)
{
    if (BUFFER - stream->in_start < MOST || stream->in_start == stream->in_end) {
        memmove(stream->in, stream->in + stream->in_start, stream->in_end - stream->in_start);
        stream->in_end -= stream->in_start;
        stream->in_start = 0;
    }
    size_t room = BUFFER - stream->in_end;
    ssize_t size;
    do
        size = recv(stream->watch.fd, stream->in + stream->in_end, room, MSG_DONTWAIT);
    while (size < 0 && errno == EINTR);
    net_spend(stream->end.net, NET_COST_CALL);
    if (size > 0) {
        stream->in_end += (uint32_t)size;
        /* It is empty (epoll(7)), but if it has ended that is still to be seen. */
        if ((size_t)size < room && !(stream->watch.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
            net_watch_done(&stream->watch, EPOLLIN);
        return true;
    }
    if (size < 0 && errno == EAGAIN)
        net_watch_done(&stream->watch, EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR);
    else if (size < 0)
        lose(stream, errno, 0);
    else
        lose(stream, stream->in_end > stream->in_start ? ENODATA : 0, 0);
    return false;
}

/* The length of the frame at in_start if all of it is there, else 0. */
static uint32_t next_length(struct stream *stream)
{
    uint32_t held = stream->in_end - stream->in_start;
    if (held < PREFIX)
        return 0;
    uint32_t length = load_length(stream->in + stream->in_start);
    if (!length || length > AIOKVM_NET_MAX_FRAME) {
        lose(stream, EMSGSIZE, length);
        return 0;
    }
    return held - PREFIX >= length ? length : 0;
}

static enum net_result send_frame(struct stream *stream, uint32_t length)
{
    if (length < AIOKVM_NET_MIN_FRAME) {
        stream->end.stats.dropped_invalid++;
        return NET_TAKEN;
    }
    struct iovec iov[2] = { [1] = { stream->in + stream->in_start + PREFIX, length } };
    struct net_frame frame = {
        .iov = iov + 1, .count = 1, .size = length, .progress = stream->progress,
    };
    enum net_result result = net_send(&stream->end, &frame);
    stream->progress = result == NET_BLOCKED ? frame.progress : (struct net_progress){ 0 };
    return result;
}

static bool read_frames(struct stream *stream)
{
    for (uint32_t left = NET_QUANTUM; left;) {
        uint32_t length = next_length(stream);
        if (stream->watch.fd < 0)
            return false;
        if (length) {
            /* The peer may have answered at once, and that have ended the connection. */
            if (send_frame(stream, length) == NET_BLOCKED || stream->watch.fd < 0)
                return false;
            stream->in_start += PREFIX + length;
            left = stream->end.net->is_over ? 0 : left - 1;
        } else if (!(stream->watch.events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) || !fill(stream)) {
            return false;
        }
    }
    return true;
}

/* ---- to the socket ---- */

static void write_out(struct stream *stream)
{
    while (stream->out_start < stream->out_end && stream->watch.events & EPOLLOUT) {
        ssize_t size = send(stream->watch.fd, stream->out + stream->out_start, stream->out_end - stream->out_start,
                            MSG_DONTWAIT | MSG_NOSIGNAL);
        net_spend(stream->end.net, NET_COST_CALL);
        if (size >= 0) {
            stream->out_start += (uint32_t)size;
        } else if (errno == EAGAIN) {
            stream->watch.events &= ~(uint32_t)EPOLLOUT;
        } else if (errno != EINTR) {
            lose(stream, errno, 0);
            return;
        }
    }
    if (stream->out_start == stream->out_end)
        stream->out_start = stream->out_end = stream->out_frame = 0;
    if (stream->is_full && (stream->out_start >= HALF || !stream->out_end)) {
        stream->is_full = false;
        net_resume(&stream->end);
    }
}

static bool make_room(struct stream *stream, uint32_t size)
{
    if (stream->out_end + size > BUFFER && stream->out_start >= HALF) {
        follow_out(stream);
        memmove(stream->out, stream->out + stream->out_frame, stream->out_end - stream->out_frame);
        stream->out_end -= stream->out_frame;
        stream->out_start -= stream->out_frame;
        stream->out_frame = 0;
    }
    return stream->out_end + size <= BUFFER;
}

static enum net_result receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct stream *stream = (struct stream *)end;
    uint32_t prefix = htonl(frame->size);
    if (stream->watch.fd >= 0 && !make_room(stream, PREFIX + frame->size)) {
        write_out(stream);
        if (stream->watch.fd >= 0 && !make_room(stream, PREFIX + frame->size)) {
            stream->is_full = true;
            return NET_BLOCKED;
        }
    }
    if (stream->watch.fd < 0) {
        end->stats.dropped_down++;
        return NET_TAKEN;
    }
    memcpy(stream->out + stream->out_end, &prefix, PREFIX);
    net_frame_copy(frame, stream->out + stream->out_end + PREFIX);
    stream->out_end += PREFIX + frame->size;
    net_dirty(end);
    return NET_TAKEN;
}

static void flush(struct aiokvm_net_end *end)
{
    struct stream *stream = (struct stream *)end;
    if (end->net->is_over)
        net_ready(end);
    else if (stream->watch.fd >= 0)
        write_out(stream);
}

static bool serve(struct aiokvm_net_end *end)
{
    struct stream *stream = (struct stream *)end;
    if (stream->watch.fd >= 0)
        write_out(stream);
    return stream->watch.fd >= 0 && read_frames(stream);
}

/* ---- its life ---- */

static void stream_free(struct aiokvm_net_end *end)
{
    struct stream *stream = (struct stream *)end;
    net_unwatch(&stream->watch);
    free(stream->in);
    free(stream->out);
    free(stream);
}

static const struct net_type TYPE = { .serve = serve, .receive = receive, .flush = flush, .free = stream_free };

struct aiokvm_net_end *aiokvm_net_stream_new(struct aiokvm_net *net, int *error)
{
    struct stream *stream = net_end_new(net, &TYPE, sizeof(*stream), error);
    if (!stream)
        return NULL;
    stream->watch.fd = -1;
    stream->in = malloc(BUFFER);
    stream->out = malloc(BUFFER);
    if (!stream->in || !stream->out) {
        aiokvm_net_end_free(&stream->end);
        *error = ENOMEM;
        return NULL;
    }
    return &stream->end;
}

static int attach(struct stream *stream, int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (stream->watch.fd >= 0)
        return -EBUSY;
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    stream->watch.is_source = true;
    int error = net_watch(&stream->watch, &stream->end, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    if (error)
        return error;
    reset(stream);
    stream->watch.events = EPOLLIN | EPOLLOUT;
    net_ready(&stream->end);
    return 0;
}

int aiokvm_net_stream_attach(struct aiokvm_net_end *end, int fd)
{
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    int error = attach((struct stream *)end, fd);
    net_leave(end->net);
    return error;
}
