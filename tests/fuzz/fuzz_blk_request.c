/* blk_request.c and blk_piece.c under libFuzzer: the input is what a driver writes into its queue, and how the host
 * answers, late or with errors, while requests are dropped, retried and throttled. The engine is the test's own.
 *
 * Sources: blk.c blk_piece.c blk_pool.c blk_request.c blk_uring.c budget.c clock.c notify.c pace.c ratelimit.c vring*.c
 * Runs: 200000
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stddef.h>

#include "blk_priv.h"
#include "fuzz.h"

enum { SIZE = 16, RANGE = 0x8000, DRIVER = 0x200, DEVICE = 0x300, QUEUES = 2, RING = 0x800, SECTORS = 1000 };
enum { DESC_FLAGS = 3 }; /* NEXT and WRITE */

/* ---- an engine that leaves its operations lying about ---- */

struct engine {
    struct blk_engine engine; /* the first */
    struct blk_op *ops[QUEUES * SIZE];
    unsigned count;
};

static int begin(struct blk_engine *engine)
{
    (void)engine;
    return 0;
}

static int watch(struct blk_engine *engine, int fd)
{
    (void)engine;
    (void)fd;
    return 0;
}

static void submit(struct blk_engine *base, struct blk_op *op)
{
    struct engine *engine = (struct engine *)base;
    const struct aiokvm_blk_config *config = &base->blk->config;
    if (op->kind == BLK_OP_READ || op->kind == BLK_OP_WRITE) {
        uint64_t sum = 0;
        for (uint32_t i = 0; i < op->count; i++) {
            /* A byte outside of what it may touch, and AddressSanitizer says so. */
            volatile uint8_t *bytes = op->iov[i].iov_base;
            size_t length = op->iov[i].iov_len;
            REQUIRE(length);
            if (config->align)
                REQUIRE((((uintptr_t)bytes | length) & (config->align - 1)) == 0);
            sum += length;
            if (op->kind == BLK_OP_READ) {
                bytes[0] = 1;
                bytes[length - 1] = 2;
            } else {
                (void)bytes[0];
                (void)bytes[length - 1];
            }
        }
        REQUIRE(sum && sum == op->length);
    }
    if (op->kind != BLK_OP_SYNC) {
        REQUIRE(op->length && op->offset + op->length <= SECTORS * SECTOR_BYTES);
        REQUIRE(op->length <= (op->kind == BLK_OP_ALLOCATE ? AIOKVM_BLK_CLEAR_SECTORS * SECTOR_BYTES : BLK_PIECE_BYTES));
    }
    REQUIRE(engine->count < QUEUES * SIZE);
    REQUIRE(base->blk->bounces.used <= 2 * BLK_BOUNCE_BYTES);
    engine->ops[engine->count++] = op;
}

static void wait_for(struct blk_engine *engine, int64_t timeout_ns)
{
    (void)engine;
    (void)timeout_ns;
}

static void free_engine(struct blk_engine *engine)
{
    (void)engine;
}

static const struct blk_engine_type type = { begin, watch, submit, wait_for, free_engine };

/* One of those lying about has been done, so. */
static void answer(struct input *input, struct engine *engine)
{
    if (!engine->count)
        return;
    uint32_t which = take(input, 1) % engine->count, how = take(input, 1);
    struct blk_op *op = engine->ops[which];
    engine->ops[which] = engine->ops[--engine->count];
    static const int errors[] = { EIO, EOPNOTSUPP, EINVAL, EAGAIN, ENOSPC, EINTR };
    if (how < 60)
        op->result = -errors[how % 6];
    else if (op->kind == BLK_OP_SYNC || op->kind == BLK_OP_ALLOCATE)
        op->result = 0;
    else if (how < 64)
        op->result = 0;
    else
        op->result = how < 200 ? (int64_t)op->length : (int64_t)(1 + take(input, 2) % op->length);
    /* Direct I/O ends with a block, unless the file does. */
    if (op->result > 0 && engine->engine.blk->config.align && op->result < (int64_t)op->length)
        op->result = (int64_t)op->length;
    aiokvm_blk_done(engine->engine.blk, op);
}

/* ---- a driver ---- */

static void write_ring(struct input *input, uint8_t *ram, uint32_t at)
{
    for (uint32_t i = 0; i < SIZE; i++) {
        uint64_t addr = take(input, 2) % (RANGE + 16);
        uint32_t len = take(input, 2);
        uint16_t flags = (uint16_t)(take(input, 1) & DESC_FLAGS), next = (uint16_t)(take(input, 1) % SIZE);
        uint16_t head = (uint16_t)(take(input, 1) % SIZE);
        memcpy(ram + at + 16 * i, &addr, 8);
        memcpy(ram + at + 16 * i + 8, &len, 4);
        memcpy(ram + at + 16 * i + 12, &flags, 2);
        memcpy(ram + at + 16 * i + 14, &next, 2);
        memcpy(ram + at + DRIVER + 4 + 2 * i, &head, 2);
    }
}

static void write_header(struct input *input, uint8_t *ram)
{
    uint32_t at = take(input, 2) % (RANGE - 16), kind = take(input, 1);
    uint64_t sector = take(input, 2);
    if (kind & 0x80)
        sector = ~sector;
    struct virtio_blk_outhdr outhdr = { .type = kind & 0xf, .sector = sector };
    memcpy(ram + at, &outhdr, sizeof(outhdr));
}

static void write_segment(struct input *input, uint8_t *ram)
{
    uint32_t at = take(input, 2) % (RANGE - 16);
    uint64_t sector = take(input, 2);
    uint32_t sectors = take(input, 2), flags = take(input, 1) & 1;
    struct virtio_blk_discard_write_zeroes segment = { sector, sectors, flags };
    memcpy(ram + at, &segment, sizeof(segment));
}

static void release_all(struct blk_queue *queue)
{
    for (struct blk_request *request; (request = queue->free);) {
        queue->free = request->next;
        free(request);
    }
}

static void pop(struct blk_queue *queue)
{
    if (queue->broken || queue->blk->stopping)
        return;
    struct blk_request *request = malloc(sizeof(*request));
    REQUIRE(request);
    memset(request, 0, offsetof(struct blk_request, ranges));
    request->queue = queue;
    int result = aiokvm_vring_pop(queue->vring, &request->chain);
    queue->broken |= result < 0;
    if (result > 0)
        blk_request_take(queue, request);
    else
        free(request);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    uint8_t *ram = aligned_alloc(4096, RANGE);
    REQUIRE(ram);
    memset(ram, 0, RANGE);
    struct aiokvm_ram range = { 0, RANGE, ram };
    uint32_t how = take(&input, 1), limited = take(&input, 1);
    struct aiokvm_blk *blk = calloc(1, sizeof(*blk));
    REQUIRE(blk);
    struct engine engine = { .engine = { &type, blk } };
    struct aiokvm_ratelimit *limit = limited & 1 ? aiokvm_ratelimit_new(1 << 20, 4096, 0, 0) : NULL;
    blk->config = (struct aiokvm_blk_config){
        .fd = -1, .readonly = how & 1, .discard = how & 2, .pause = how & 4, .align = how & 8 ? 512 : 0, .limit = limit,
    };
    pthread_mutex_init(&blk->lock, NULL);
    blk->news = blk->control = blk->notifier.irqfd = -1;
    blk->engine = &engine.engine;
    blk->running = true;
    blk->capacity_sectors = SECTORS;
    blk->writeback = !(how & 16);
    blk->features = how & 32 ? ~UINT64_C(0) : 0;
    memcpy(blk->id, "serial", 6);
    /* Of which two are for this disk. */
    struct aiokvm_budget *budget = aiokvm_budget_new(8 * BLK_BOUNCE_BYTES);
    REQUIRE(budget);
    aiokvm_share_open(&blk->bounces, budget);
    for (uint32_t i = 0; i < QUEUES; i++) {
        struct blk_queue *queue = &blk->queues[i];
        *queue = (struct blk_queue){ .blk = blk, .index = i, .kick = -1 };
        queue->vring = aiokvm_vring_new(&range, 1, SIZE);
        uint64_t features = how & 64 ? AIOKVM_VIRTIO_F_IN_ORDER : 0;
        write_ring(&input, ram, i * RING);
        REQUIRE(aiokvm_vring_start(queue->vring, SIZE, i * RING, i * RING + DRIVER, i * RING + DEVICE, features) == 0);
    }
    while (input.left) {
        uint32_t what = take(&input, 1);
        struct blk_queue *queue = &blk->queues[what >> 7];
        uint16_t *idx = (uint16_t *)(ram + queue->index * RING + DRIVER + 2);
        struct aiokvm_blk_event event;
        switch (what % 8) {
        case 0:
            write_header(&input, ram);
            break;
        case 1:
            write_segment(&input, ram);
            break;
        case 2:
        case 3:
            ++*idx;
            pop(queue);
            break;
        case 4:
        case 5:
            answer(&input, &engine);
            break;
        case 6:
            blk_request_retry(blk);
            blk_request_throttle(blk);
            break;
        case 7:
            blk->writeback = take(&input, 1) & 1;
            while (aiokvm_blk_take(blk, &event))
                REQUIRE(event.kind != AIOKVM_BLK_FAILED || event.offset + event.length <= SECTORS * SECTOR_BYTES);
            aiokvm_vring_publish(queue->vring);
            break;
        }
        for (uint32_t i = 0; i < QUEUES; i++)
            release_all(&blk->queues[i]);
    }
    /* One queue, then all. */
    blk->stopping = true;
    for (blk->stop_queue = limited & 2 ? 0 : -1;; blk->stop_queue = -1) {
        blk_request_drop(blk);
        while (engine.count) {
            struct blk_op *op = engine.ops[--engine.count];
            op->result = -EIO;
            aiokvm_blk_done(blk, op);
        }
        REQUIRE(!blk->in_flight && !blk->starved.first && !blk->bounces.used);
        if (blk->stop_queue < 0)
            break;
    }
    REQUIRE(!blk->failed.first && !blk->throttled.first);
    for (uint32_t i = 0; i < QUEUES; i++) {
        release_all(&blk->queues[i]);
        aiokvm_vring_free(blk->queues[i].vring);
    }
    aiokvm_share_close(&blk->bounces);
    aiokvm_budget_free(budget);
    pthread_mutex_destroy(&blk->lock);
    if (limit)
        aiokvm_ratelimit_free(limit);
    free(blk);
    free(ram);
    return 0;
}
