/* A request on its way: cut into pieces, which the engine moves or clears one after the other, until it ends. */
#define _GNU_SOURCE
#include "blk_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Never written: what zeroes are written from where a file cannot be zeroed. */
static uint8_t zeroes[256u << 10] __attribute__((aligned(4096)));

/* ---- iovecs, which are the chain's private copies and are used up in place ---- */

/* Copies so many bytes from the front, or leaves them out (to is NULL). */
void blk_consume(struct blk_request *request, void *to, uint64_t bytes)
{
    char *out = to;
    while (bytes) {
        struct iovec *iov = request->iov;
        size_t n = iov->iov_len < bytes ? iov->iov_len : (size_t)bytes;
        if (out) {
            memcpy(out, iov->iov_base, n);
            out += n;
        }
        bytes -= n;
        iov->iov_base = (char *)iov->iov_base + n;
        iov->iov_len -= n;
        if (!iov->iov_len) {
            request->iov++;
            request->count--;
        }
    }
}

/* Copies from iovecs to a buffer or back, without using them up. */
void blk_copy(const struct iovec *iov, char *buffer, uint64_t bytes, bool to_buffer)
{
    for (; bytes; iov++) {
        size_t n = iov->iov_len < bytes ? iov->iov_len : (size_t)bytes;
        if (to_buffer)
            memcpy(buffer, iov->iov_base, n);
        else
            memcpy(iov->iov_base, buffer, n);
        buffer += n;
        bytes -= n;
    }
}

static bool is_aligned(const struct iovec *iov, uint32_t count, uint32_t align)
{
    for (uint32_t i = 0; i < count; i++)
        if (((uintptr_t)iov[i].iov_base | iov[i].iov_len) & (align - 1))
            return false;
    return true;
}

/* ---- copies: all disks of the process share the memory for them ---- */

/* Each disk may have one, so that it goes on whatever the others do. */
static bool has_room(struct aiokvm_blk *blk)
{
    return !blk->bounces.used || aiokvm_share_fits(&blk->bounces, BLK_BOUNCE_BYTES);
}

/* 0: the request has a buffer. EAGAIN: it has to wait for one. ENOMEM. */
static int bounce_get(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    if (request->bounce)
        return 0;
    if (!blk->bounces.used)
        aiokvm_share_add(&blk->bounces, BLK_BOUNCE_BYTES);
    else if (!aiokvm_share_take(&blk->bounces, BLK_BOUNCE_BYTES))
        return EAGAIN;
    request->bounce = aligned_alloc(4096, BLK_BOUNCE_BYTES);
    if (request->bounce)
        return 0;
    aiokvm_share_give(&blk->bounces, BLK_BOUNCE_BYTES);
    return ENOMEM;
}

static void bounce_put(struct blk_request *request)
{
    if (!request->bounce)
        return;
    free(request->bounce);
    request->bounce = NULL;
    aiokvm_share_give(&request->queue->blk->bounces, BLK_BOUNCE_BYTES);
}

/* Goes on with requests that wait for one. */
static void bounce_feed(struct aiokvm_blk *blk)
{
    while (blk->starved.first && has_room(blk))
        blk_proceed(blk_list_pop(&blk->starved));
}

/* ---- the end of a request ---- */

void blk_finish(struct blk_request *request, uint8_t status)
{
    struct blk_queue *queue = request->queue;
    struct aiokvm_blk *blk = queue->blk;
    if (status == VIRTIO_BLK_S_OK) {
        if (request->type == VIRTIO_BLK_T_IN) {
            blk_count(&blk->stats.reads, 1);
            blk_count(&blk->stats.read_bytes, request->total);
        } else if (request->type == VIRTIO_BLK_T_OUT) {
            blk_count(&blk->stats.writes, 1);
            blk_count(&blk->stats.written_bytes, request->total);
        } else if (request->type == VIRTIO_BLK_T_FLUSH) {
            blk_count(&blk->stats.flushes, 1);
        } else if (request->range_count) {
            blk_count(&blk->stats.discards, 1);
        }
    } else {
        blk_count(&blk->stats.errors, 1);
    }
    /* A queue that broke meanwhile is the loop's to reset: nothing is completed there any more. */
    if (queue->broken) {
        aiokvm_vring_drop(queue->vring, request->chain);
    } else {
        *request->status = status;
        aiokvm_vring_push(queue->vring, request->chain, request->written + 1);
        queue->dirty = true;
        blk->ended.count++;
        blk->ended.some_small |= status != VIRTIO_BLK_S_OK || request->total < BLK_LARGE_BYTES;
    }
    bounce_put(request);
    blk_release(request);
}

void blk_drop(struct blk_request *request)
{
    bounce_put(request);
    aiokvm_vring_drop(request->queue->vring, request->chain);
    blk_release(request);
}

/* A request that the driver got wrong, or that this disk does not do: no business of the host's. */
void blk_refuse(struct blk_request *request, uint8_t status)
{
    request->written = 0;
    blk_finish(request, status);
}

/* The range that is being cleared; NULL if the request has none, or none left. */
static struct blk_range *range_of(struct blk_request *request)
{
    return request->range < request->range_count ? &request->ranges[request->range] : NULL;
}

/* The host failed. */
static void fail(struct blk_request *request, int error)
{
    struct aiokvm_blk *blk = request->queue->blk;
    const struct blk_range *range = range_of(request);
    struct aiokvm_blk_event event = {
        .kind = AIOKVM_BLK_FAILED,
        .queue = request->queue->index,
        .error = error,
        .type = request->type,
        .offset = range ? range->offset : request->offset,
        .length = range ? range->length : request->left,
    };
    bounce_put(request);
    /* A flush cannot succeed by trying again. */
    if (blk->config.pause && request->type != VIRTIO_BLK_T_FLUSH && !blk->sync_failed) {
        blk_count(&blk->stats.errors, 1);
        blk_list_push(&blk->failed, request);
    } else {
        blk_refuse(request, VIRTIO_BLK_S_IOERR);
    }
    /* Who hears of it finds it counted. */
    blk_tell(blk, &event);
}

/* ---- its pieces ---- */

static void submit(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    blk_count(&blk->stats.in_flight, 1);
    blk->in_flight++;
    blk->engine->type->submit(blk->engine, &request->op);
}

/* A file that got shorter would grow again by a write, and then reads of what is lost would give zeroes. */
static bool has_shrunk(struct aiokvm_blk *blk)
{
    struct stat stat;
    if (!blk->shrunk && fstat(blk->config.fd, &stat) == 0 && S_ISREG(stat.st_mode)) {
        uint64_t capacity = atomic_load_explicit(&blk->capacity_sectors, memory_order_relaxed);
        blk->shrunk = (uint64_t)stat.st_size < capacity * SECTOR_BYTES;
    }
    return blk->shrunk;
}

static void move_piece(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    struct blk_op *op = &request->op;
    bool is_write = request->type == VIRTIO_BLK_T_OUT;
    if (is_write && has_shrunk(blk)) {
        fail(request, EIO);
        return;
    }
    uint32_t count = 0;
    uint64_t length = 0;
    while (count < request->count && count < BLK_IOV_MAX && length < BLK_PIECE_BYTES)
        length += request->iov[count++].iov_len;
    bool bounce = blk->config.align && !is_aligned(request->iov, count, blk->config.align);
    int error = 0;
    if (bounce)
        error = bounce_get(request);
    else
        bounce_put(request);
    if (error == EAGAIN)
        blk_list_push(&blk->starved, request);
    else if (error)
        fail(request, error);
    if (error)
        return;
    /* Unless it is the last, a piece ends with a block. */
    uint64_t block = blk->config.align > SECTOR_BYTES ? blk->config.align : SECTOR_BYTES;
    uint64_t piece = length < request->left ? length - length % block : length;
    uint64_t most = bounce ? BLK_BOUNCE_BYTES : BLK_PIECE_BYTES;
    if (piece > most)
        piece = most;
    if (piece < length && !bounce) {
        while (length - request->iov[count - 1].iov_len >= piece)
            length -= request->iov[--count].iov_len;
        request->hidden = (size_t)(length - piece);
        request->iov[count - 1].iov_len -= request->hidden;
    }
    length = piece;
    *op = (struct blk_op){
        .kind = is_write ? BLK_OP_WRITE : BLK_OP_READ,
        .iov = request->iov,
        .count = count,
        .offset = request->offset,
        .length = length,
        .durable = is_write && !atomic_load_explicit(&blk->writeback, memory_order_relaxed),
    };
    if (bounce) {
        blk_count(&blk->stats.copied_bytes, length);
        if (is_write)
            blk_copy(request->iov, request->bounce, length, true);
        request->own = (struct iovec){ request->bounce, (size_t)length };
        op->iov = &request->own;
        op->count = 1;
    }
    submit(request);
}

static void moved_piece(struct blk_request *request, int64_t result)
{
    if (request->hidden) {
        uint32_t last = request->op.count - 1;
        request->iov[last].iov_len += request->hidden;
        request->hidden = 0;
    }
    if (request->bounce && result > 0 && request->op.kind == BLK_OP_READ)
        blk_copy(request->iov, request->bounce, (uint64_t)result, false);
    if (result == 0) {
        /* The end of the file, before that of the disk. */
        request->queue->blk->shrunk = true;
        result = -EIO;
    }
    if (result < 0) {
        fail(request, (int)-result);
        return;
    }
    request->offset += (uint64_t)result;
    request->left -= (uint64_t)result;
    blk_consume(request, NULL, (uint64_t)result);
    if (request->left)
        blk_proceed(request);
    else
        blk_finish(request, VIRTIO_BLK_S_OK);
}

static void clear_piece(struct blk_request *request)
{
    struct blk_range *range = range_of(request);
    bool durable = !atomic_load_explicit(&request->queue->blk->writeback, memory_order_relaxed);
    if (has_shrunk(request->queue->blk)) {
        fail(request, EIO);
        return;
    }
    if (request->by_hand) {
        uint64_t length = range->length < sizeof(zeroes) ? range->length : sizeof(zeroes);
        request->own = (struct iovec){ zeroes, (size_t)length };
        request->op = (struct blk_op){ .kind = BLK_OP_WRITE, .iov = &request->own, .count = 1,
                                       .offset = range->offset, .length = length, .durable = durable };
    } else {
        bool punch = request->type == VIRTIO_BLK_T_DISCARD || range->unmap;
        request->op = (struct blk_op){ .kind = BLK_OP_ALLOCATE, .offset = range->offset, .length = range->length,
                                       .mode = FALLOC_FL_KEEP_SIZE |
                                           (punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE) };
    }
    submit(request);
}

static void cleared_piece(struct blk_request *request, int64_t result)
{
    struct blk_range *range = range_of(request);
    bool allocates = request->op.kind == BLK_OP_ALLOCATE;
    if (!allocates && result == 0)
        result = -EIO;
    /* EINVAL: a block device, which takes whole blocks of its own only. */
    if (allocates && (result == -EOPNOTSUPP || result == -EINVAL)) {
        /* A discard is a hint. */
        request->by_hand = request->type == VIRTIO_BLK_T_WRITE_ZEROES;
        result = request->by_hand ? 0 : (int64_t)range->length;
    } else if (result == 0) {
        request->unsynced |= request->type == VIRTIO_BLK_T_WRITE_ZEROES;
        result = (int64_t)range->length;
    }
    if (result < 0) {
        fail(request, (int)-result);
        return;
    }
    range->offset += (uint64_t)result;
    range->length -= (uint64_t)result;
    if (!range->length)
        request->range++;
    if (request->range < request->range_count)
        blk_proceed(request);
    else if (request->unsynced &&
             !atomic_load_explicit(&request->queue->blk->writeback, memory_order_relaxed)) {
        request->op = (struct blk_op){ .kind = BLK_OP_SYNC };
        submit(request);
    } else {
        blk_finish(request, VIRTIO_BLK_S_OK);
    }
}

static void synced(struct blk_request *request, int64_t result)
{
    if (request->queue->blk->sync_failed)
        fail(request, result < 0 ? (int)-result : EIO);
    else
        blk_finish(request, VIRTIO_BLK_S_OK);
}

/* Its next piece. */
void blk_proceed(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    switch (request->type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        move_piece(request);
        break;
    case VIRTIO_BLK_T_FLUSH:
        request->op = (struct blk_op){ .kind = BLK_OP_SYNC };
        if (blk->sync_failed)
            fail(request, EIO);
        else
            submit(request);
        break;
    default:
        clear_piece(request);
    }
}

/* Whether it belongs to a queue that is stopped. */
bool blk_is_discarded(const struct blk_request *request)
{
    const struct aiokvm_blk *blk = request->queue->blk;
    return blk->stopping && (blk->stop_queue < 0 || (uint32_t)blk->stop_queue == request->queue->index);
}

void blk_request_done(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    int64_t result = request->op.result;
    if ((result == -EINTR || result == -EAGAIN) && ++request->tries < BLK_TRIES && !blk_is_discarded(request)) {
        submit(request);
        return;
    }
    request->tries = 0;
    /* The same happens to what RWF_DSYNC could not write as to what fdatasync could not. */
    if (result < 0 && (request->op.kind == BLK_OP_SYNC || (request->op.durable && result == -EIO)))
        blk->sync_failed = true;
    if (blk_is_discarded(request)) {
        blk_drop(request);
    } else if (request->op.kind == BLK_OP_SYNC) {
        synced(request, result);
    } else if (request->range_count) {
        cleared_piece(request, result);
    } else {
        moved_piece(request, result);
    }
    bounce_feed(blk);
}
