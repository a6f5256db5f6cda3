#include "net_fake.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static bool serve(struct aiokvm_net_end *end)
{
    ((struct fake_end *)end)->served++;
    return false;
}

static enum net_result receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct fake_end *fake = (struct fake_end *)end;
    if (fake->blocks || (fake->most && fake->received >= fake->most))
        return NET_BLOCKED;
    fake->received++;
    if (fake->kept < LENGTH(fake->frames)) {
        struct fake_frame *kept = &fake->frames[fake->kept++];
        *kept = (struct fake_frame){ frame->hdr, frame->size, frame->hops, frame->queue, malloc(frame->size) };
        CHECK(kept->data);
        net_frame_copy(frame, kept->data);
    }
    net_dirty(end);
    return NET_TAKEN;
}

static void resume(struct aiokvm_net_end *end)
{
    ((struct fake_end *)end)->resumed = true;
}

static void flush(struct aiokvm_net_end *end)
{
    ((struct fake_end *)end)->flushed++;
}

static void fake_end_free(struct aiokvm_net_end *end)
{
    fake_end_clear((struct fake_end *)end);
    free(end);
}

static const struct net_type TYPE = {
    .serve = serve, .receive = receive, .resume = resume, .flush = flush, .free = fake_end_free,
};

struct fake_end *fake_end_new(struct aiokvm_net *net, uint32_t offloads)
{
    int error;
    struct fake_end *fake = net_end_new(net, &TYPE, sizeof(*fake), &error);
    CHECK(fake);
    fake->end.offloads = offloads;
    return fake;
}

enum net_result fake_end_send(struct fake_end *fake, const struct virtio_net_hdr_v1 *hdr, const void *data, uint32_t size)
{
    uint8_t head[NET_HEAD];
    struct iovec iov[3], from = { (void *)(uintptr_t)data, size };
    struct net_frame frame = { .hdr = hdr ? *hdr : (struct virtio_net_hdr_v1){ 0 } };
    net_frame_set(&frame, iov + 1, head, &from, 1, 0);
    CHECK(net_enter(fake->end.net));
    enum net_result result = net_send(&fake->end, &frame);
    net_leave(fake->end.net);
    return result;
}

void fake_end_unblock(struct fake_end *fake)
{
    CHECK(net_enter(fake->end.net));
    fake->blocks = false;
    net_resume(&fake->end);
    net_leave(fake->end.net);
}

void fake_end_clear(struct fake_end *fake)
{
    while (fake->kept)
        free(fake->frames[--fake->kept].data);
    fake->received = 0;
}

struct aiokvm_share *fake_share(void)
{
    static struct aiokvm_share share;
    if (!share.budget)
        aiokvm_share_open(&share, aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES));
    return &share;
}

struct aiokvm_share *fake_share_leaving(int which, uint64_t amount)
{
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(which), &state);
    struct aiokvm_share *share = aiokvm_share_new(which);
    CHECK(share && state.total - state.used >= amount);
    aiokvm_share_add(share, state.total - state.used - amount);
    return share;
}

void fake_end_serve(struct aiokvm_net *net)
{
    while (aiokvm_net_serve(net, UINT64_C(1) << 40) == 1)
        continue;
}

uint32_t fake_end_woken(struct aiokvm_net *net)
{
    if (!poll(&(struct pollfd){ .fd = aiokvm_net_fd(net), .events = POLLIN }, 1, 0))
        return 0;
    fake_end_serve(net);
    return 1;
}
