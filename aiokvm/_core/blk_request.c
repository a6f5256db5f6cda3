/* What a request of virtio 1.2, section 5.2.6 asks for: parsed from private copies, checked, and started. */
#define _GNU_SOURCE
#include "blk_priv.h"

#include <endian.h>
#include <linux/virtio_blk.h>
#include <string.h>

#include "clock.h"

/* ---- its beginning ---- */

/* Starts it if the rate limit lets it. */
static bool try_start(struct blk_request *request, uint64_t now_ns)
{
    struct aiokvm_blk *blk = request->queue->blk;
    uint64_t wait_ns = aiokvm_ratelimit_take(blk->config.limit, now_ns, request->total, 1);
    if (wait_ns) {
        blk->throttle_ns = now_ns + wait_ns;
        return false;
    }
    blk_proceed(request);
    return true;
}

static void start(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    if (!blk->config.limit) {
        blk_proceed(request);
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
        blk_proceed(request);
}

static void drop_some(struct blk_list *list)
{
    struct blk_list all = *list;
    list->first = NULL;
    for (struct blk_request *request; (request = blk_list_pop(&all));) {
        if (blk_is_discarded(request))
            blk_drop(request);
        else
            blk_list_push(list, request);
    }
}

void blk_request_drop(struct aiokvm_blk *blk)
{
    drop_some(&blk->throttled);
    drop_some(&blk->failed);
    drop_some(&blk->starved);
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
        blk_refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    if (!is_write) {
        request->iov = chain->iov + chain->readable;
        /* Without the descriptor that had the status alone: empty, and aligned to nothing. */
        request->count = chain->writable - !request->iov[chain->writable - 1].iov_len;
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
        blk_refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    blk_consume(request, segments, length);
    bool discard = request->type == VIRTIO_BLK_T_DISCARD;
    uint32_t count = (uint32_t)(length / sizeof(*segments)), used = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t sector = le64toh(segments[i].sector), sectors = le32toh(segments[i].num_sectors);
        uint32_t flags = le32toh(segments[i].flags);
        if (flags & ~(uint32_t)VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP || (discard && flags)) {
            blk_refuse(request, VIRTIO_BLK_S_UNSUPP);
            return;
        }
        if (!is_inside(blk, sector, sectors) || sectors > AIOKVM_BLK_CLEAR_SECTORS ||
            (blk->config.align && (sector | sectors) * SECTOR_BYTES & (blk->config.align - 1))) {
            blk_refuse(request, VIRTIO_BLK_S_IOERR);
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
        blk_finish(request, VIRTIO_BLK_S_OK);
    else
        start(request);
}

static void take_id(struct blk_request *request)
{
    struct aiokvm_blk *blk = request->queue->blk;
    struct aiokvm_chain *chain = request->chain;
    uint64_t room = chain->writable_bytes - 1;
    request->written = room < sizeof(blk->id) ? (uint32_t)room : sizeof(blk->id);
    blk_copy(chain->iov + chain->readable, blk->id, request->written, false);
    blk_finish(request, VIRTIO_BLK_S_OK);
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
        blk_drop(request);
        return false;
    }
    blk_consume(request, &header, sizeof(header));
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
    blk_refuse(request, VIRTIO_BLK_S_UNSUPP);
    return true;
}
