/* What a request of virtio 1.2, section 5.2.6 asks for: parsed from private copies, cut into pieces, ended. */
#define _GNU_SOURCE
#include "blk_priv.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "clock.h"

#define SECTOR_BYTES 512

/* Never written: what zeroes are written from where a file cannot be zeroed. */
static uint8_t zeroes[256u << 10] __attribute__((aligned(4096)));

static void proceed(struct blk_request *request);

/* ---- iovecs, which are the chain's private copies and are used up in place ---- */

/* Copies so many bytes from the front, or leaves them out (to is NULL). */
static void consume(struct blk_request *request, void *to, uint64_t bytes)
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
static void copy(const struct iovec *iov, char *buffer, uint64_t bytes, bool to_buffer)
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

/* ---- the end of a request ---- */

static void finish(struct blk_request *request, uint8_t status)
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
    }
    blk_release(request);
}

static void drop(struct blk_request *request)
{
    aiokvm_vring_drop(request->queue->vring, request->chain);
    blk_release(request);
}

/* A request that the driver got wrong, or that this disk does not do: no business of the host's. */
static void refuse(struct blk_request *request, uint8_t status)
{
    request->written = 0;
    finish(request, status);
}

/* The host failed. */
static void fail(struct blk_request *request, int error)
{
    struct aiokvm_blk *blk = request->queue->blk;
    struct aiokvm_blk_event event = {
        .kind = AIOKVM_BLK_FAILED,
        .queue = request->queue->index,
        .error = error,
        .type = request->type,
        .offset = request->range_count ? request->ranges[request->range].offset : request->offset,
        .length = request->range_count ? request->ranges[request->range].length : request->left,
    };
    free(request->bounce);
    request->bounce = NULL;
    /* A flush cannot succeed by trying again. */
    if (blk->config.pause && request->type != VIRTIO_BLK_T_FLUSH && !blk->sync_failed) {
        blk_count(&blk->stats.errors, 1);
        blk_list_push(&blk->failed, request);
    } else {
        refuse(request, VIRTIO_BLK_S_IOERR);
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
    /* Unless it is the last, a piece ends with a sector. */
    uint64_t piece = length < request->left ? length - length % SECTOR_BYTES : length;
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
        request->bounce = aligned_alloc(4096, BLK_BOUNCE_BYTES);
        if (!request->bounce) {
            fail(request, ENOMEM);
            return;
        }
        if (is_write)
            copy(request->iov, request->bounce, length, true);
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
        copy(request->iov, request->bounce, (uint64_t)result, false);
    free(request->bounce);
    request->bounce = NULL;
    if (result == 0) {
        /* The end of the file, before that of the disk. */
        request->queue->blk->shrunk = true;
        result = -EIO;
    }
    if (result < 0) {
        /* The same happens to what RWF_DSYNC could not write as to what fdatasync could not. */
        if (request->op.durable && result == -EIO)
            request->queue->blk->sync_failed = true;
        fail(request, (int)-result);
        return;
    }
    request->offset += (uint64_t)result;
    request->left -= (uint64_t)result;
    consume(request, NULL, (uint64_t)result);
    if (request->left)
        proceed(request);
    else
        finish(request, VIRTIO_BLK_S_OK);
}

static void clear_piece(struct blk_request *request)
{
    struct blk_range *range = &request->ranges[request->range];
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
    struct blk_range *range = &request->ranges[request->range];
    if (request->op.kind == BLK_OP_WRITE && result == 0)
        result = -EIO;
    if (result == -EOPNOTSUPP && request->op.kind == BLK_OP_ALLOCATE) {
        /* A discard is a hint. */
        request->by_hand = request->type == VIRTIO_BLK_T_WRITE_ZEROES;
        result = request->by_hand ? 0 : (int64_t)range->length;
    } else if (result == 0) {
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
        proceed(request);
    else if (!request->by_hand && !atomic_load_explicit(&request->queue->blk->writeback, memory_order_relaxed) &&
             request->type == VIRTIO_BLK_T_WRITE_ZEROES) {
        request->op = (struct blk_op){ .kind = BLK_OP_SYNC };
        submit(request);
    } else {
        finish(request, VIRTIO_BLK_S_OK);
    }
}

static void synced(struct blk_request *request, int64_t result)
{
    struct aiokvm_blk *blk = request->queue->blk;
    if (result < 0)
        blk->sync_failed = true;
    if (blk->sync_failed)
        fail(request, result < 0 ? (int)-result : EIO);
    else
        finish(request, VIRTIO_BLK_S_OK);
}

/* Its next piece. */
static void proceed(struct blk_request *request)
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
static bool is_discarded(const struct blk_request *request)
{
    const struct aiokvm_blk *blk = request->queue->blk;
    return blk->stopping && (blk->stop_queue < 0 || (uint32_t)blk->stop_queue == request->queue->index);
}

void blk_request_done(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    int64_t result = request->op.result;
    if ((result == -EINTR || result == -EAGAIN) && ++request->tries < BLK_TRIES && !is_discarded(request)) {
        submit(request);
        return;
    }
    request->tries = 0;
    if (result < 0 && request->op.kind == BLK_OP_SYNC)
        blk->sync_failed = true;
    if (is_discarded(request)) {
        free(request->bounce);
        request->bounce = NULL;
        drop(request);
    } else if (request->op.kind == BLK_OP_SYNC) {
        synced(request, result);
    } else if (request->range_count) {
        cleared_piece(request, result);
    } else {
        moved_piece(request, result);
    }
}

/* ---- its beginning ---- */

/* Starts it if the rate limit lets it. */
static bool try_start(struct blk_request *request, uint64_t now_ns)
{
    struct aiokvm_blk *blk = request->queue->blk;
    uint64_t wait_ns = aiokvm_ratelimit_take(blk->config.limit, now_ns, request->total);
    if (wait_ns) {
        blk->throttle_ns = now_ns + wait_ns;
        return false;
    }
    proceed(request);
    return true;
}

static void start(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    if (!blk->config.limit) {
        proceed(request);
    } else if (blk->throttled.first || !try_start(request, aiokvm_now_ns())) {
        blk_count(&blk->stats.throttled, 1);
        blk_list_push(&blk->throttled, request);
    }
}

void blk_request_throttle(struct aiokvm_blk *blk)
{
    uint64_t now_ns = blk->throttled.first ? aiokvm_now_ns() : 0;
    while (blk->throttled.first) {
        /* Taken off first: it may go to another list at once. */
        struct blk_request *request = blk->throttled.first, *next = request->next;
        if (!try_start(request, now_ns))
            return;
        blk->throttled.first = next;
    }
}

void blk_request_retry(struct aiokvm_blk *blk)
{
    struct blk_list again = blk->failed;
    blk->failed.first = NULL;
    blk->shrunk = false; /* somebody may have mended it */
    for (struct blk_request *request; (request = blk_list_pop(&again));)
        proceed(request);
}

static void drop_some(struct blk_list *list)
{
    struct blk_list all = *list;
    list->first = NULL;
    for (struct blk_request *request; (request = blk_list_pop(&all));) {
        if (is_discarded(request))
            drop(request);
        else
            blk_list_push(list, request);
    }
}

void blk_request_drop(struct aiokvm_blk *blk)
{
    drop_some(&blk->throttled);
    drop_some(&blk->failed);
}

static bool is_inside(struct aiokvm_blk *blk, uint64_t sector, uint64_t sectors)
{
    uint64_t capacity = atomic_load_explicit(&blk->capacity_sectors, memory_order_relaxed);
    return sector <= capacity && sectors <= capacity - sector;
}

static void take_move(struct blk_request *request, uint64_t sector)
{
    struct aiokvm_blk *blk = request->queue->blk;
    bool is_write = request->type == VIRTIO_BLK_T_OUT;
    struct aiokvm_chain *chain = request->chain;
    uint64_t in = chain->readable_bytes - sizeof(struct virtio_blk_outhdr), out = chain->writable_bytes - 1;
    uint64_t length = is_write ? in : out;
    if ((is_write ? out : in) || !length || length % SECTOR_BYTES ||
        !is_inside(blk, sector, length / SECTOR_BYTES) || (is_write && blk->config.readonly) ||
        (blk->config.align && (sector * SECTOR_BYTES | length) & (blk->config.align - 1))) {
        refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    if (!is_write) {
        request->iov = chain->iov + chain->readable;
        request->count = chain->writable;
        request->written = (uint32_t)length;
    }
    request->offset = sector * SECTOR_BYTES;
    request->left = request->total = length;
    start(request);
}

static void take_clear(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    struct virtio_blk_discard_write_zeroes segments[AIOKVM_BLK_SEGMENTS];
    uint64_t length = request->chain->readable_bytes - sizeof(struct virtio_blk_outhdr);
    if (!length || length % sizeof(*segments) || length > sizeof(segments) || blk->config.readonly) {
        refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    consume(request, segments, length);
    bool discard = request->type == VIRTIO_BLK_T_DISCARD;
    uint32_t count = (uint32_t)(length / sizeof(*segments)), used = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t sector = le64toh(segments[i].sector), sectors = le32toh(segments[i].num_sectors);
        uint32_t flags = le32toh(segments[i].flags);
        if (flags & ~(uint32_t)VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP || (discard && flags)) {
            refuse(request, VIRTIO_BLK_S_UNSUPP);
            return;
        }
        if (!is_inside(blk, sector, sectors)) {
            refuse(request, VIRTIO_BLK_S_IOERR);
            return;
        }
        if (sectors)
            request->ranges[used++] = (struct blk_range){ sector * SECTOR_BYTES, sectors * SECTOR_BYTES,
                                                          flags && blk->config.discard };
    }
    request->range_count = used;
    /* Zeroes cost the host more than their description does: the limit counts them. */
    for (uint32_t i = 0; i < used && !discard; i++)
        request->total += request->ranges[i].length;
    if (!used || (discard && !blk->config.discard))
        finish(request, VIRTIO_BLK_S_OK);
    else
        start(request);
}

static void take_id(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    struct aiokvm_chain *chain = request->chain;
    uint64_t room = chain->writable_bytes - 1;
    request->written = room < sizeof(blk->id) ? (uint32_t)room : sizeof(blk->id);
    copy(chain->iov + chain->readable, blk->id, request->written, false);
    finish(request, VIRTIO_BLK_S_OK);
}

bool blk_request_take(struct blk_queue *queue, struct blk_request *request)
{
    struct aiokvm_chain *chain = request->chain;
    struct virtio_blk_outhdr header;
    request->iov = chain->iov;
    request->count = chain->readable;
    int error = chain->readable_bytes < sizeof(header) ? AIOKVM_BLK_EHEADER
        : !chain->writable_bytes                       ? AIOKVM_BLK_ESTATUS
                                                       : 0;
    if (error) {
        queue->broken = true;
        blk_tell(queue->blk,
                 &(struct aiokvm_blk_event){ .kind = AIOKVM_BLK_BROKEN, .queue = queue->index, .error = error });
        drop(request);
        return false;
    }
    consume(request, &header, sizeof(header));
    /* The status is the last byte that the device may write. */
    struct iovec *last = chain->iov + chain->readable + chain->writable - 1;
    request->status = (uint8_t *)last->iov_base + --last->iov_len;
    uint64_t features = queue->blk->features;
    request->type = le32toh(header.type);
    switch (request->type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        take_move(request, le64toh(header.sector));
        return true;
    case VIRTIO_BLK_T_FLUSH:
        start(request);
        return true;
    case VIRTIO_BLK_T_GET_ID:
        take_id(request);
        return true;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        if (features & UINT64_C(1) << (request->type == VIRTIO_BLK_T_DISCARD ? VIRTIO_BLK_F_DISCARD
                                                                             : VIRTIO_BLK_F_WRITE_ZEROES)) {
            take_clear(request);
            return true;
        }
        break;
    default:
        break;
    }
    refuse(request, VIRTIO_BLK_S_UNSUPP);
    return true;
}
