/* net_offload.c under libFuzzer: the input is a header and a frame, and what the receiver takes.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_rules.c clock.c pace.c ratelimit.c
 * Runs: 10000
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net_priv.h"

#define REQUIRE(condition) \
    do {                   \
        if (!(condition))  \
            abort();       \
    } while (0)

struct receiver {
    struct aiokvm_net_end end;
    uint32_t blocks_every; /* 0: never */
    uint32_t asked, pieces;
    uint64_t bytes;
};

static bool serve(struct aiokvm_net_end *end)
{
    (void)end;
    return false;
}

/* A piece is a frame as any other, needs nothing that was not asked for, and all of it can be read. */
static enum net_result receive(struct aiokvm_net_end *end, struct net_frame *frame)
{
    struct receiver *receiver = (struct receiver *)end;
    if (receiver->blocks_every && ++receiver->asked % receiver->blocks_every == 0)
        return NET_BLOCKED;
    REQUIRE(!(net_frame_needs(frame) & ~end->offloads));
    REQUIRE(frame->size >= AIOKVM_NET_MIN_FRAME && frame->size <= AIOKVM_NET_MAX_FRAME);
    frame->iov[-1] = (struct iovec){ 0 };
    uint8_t *copy = malloc(frame->size);
    REQUIRE(copy);
    size_t size = 0;
    for (uint32_t i = 0; i < frame->count; i++)
        size += frame->iov[i].iov_len;
    REQUIRE(size == frame->size);
    net_frame_copy(frame, copy);
    free(copy);
    if (frame->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        struct virtio_net_hdr_v1 hdr = frame->hdr;
        REQUIRE(net_frame_check(frame));
        REQUIRE(!memcmp(&hdr, &frame->hdr, sizeof(hdr)));
    }
    receiver->pieces++;
    receiver->bytes += frame->size;
    return NET_TAKEN;
}

static void end_free(struct aiokvm_net_end *end)
{
    free(end);
}

static const struct net_type TYPE = { .serve = serve, .receive = receive, .free = end_free };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct aiokvm_net *net;
    static struct receiver *ends[2];
    int error;
    if (!net) {
        net = aiokvm_net_new(NULL, &error);
        for (int i = 0; i < 2; i++)
            ends[i] = net_end_new(net, &TYPE, sizeof(*ends[i]), &error);
        REQUIRE(!aiokvm_net_link(&ends[0]->end, &ends[1]->end));
    }
    struct virtio_net_hdr_v1 hdr;
    uint8_t options[5];
    if (size < sizeof(hdr) + sizeof(options))
        return 0;
    memcpy(options, data, sizeof(options));
    memcpy(&hdr, data + sizeof(options), sizeof(hdr));
    data += sizeof(hdr) + sizeof(options);
    size -= sizeof(hdr) + sizeof(options);
    /* What the input has, and zeroes behind it; in two pieces of exactly their sizes. */
    size_t whole = size + (options[0] & 1 ? (size_t)(options[1] << 8 | options[2]) : 0);
    size_t split = whole < NET_HEAD ? whole : NET_HEAD;
    uint8_t *parts[2] = { calloc(1, split + !split), calloc(1, whole - split + !(whole - split)) };
    REQUIRE(parts[0] && parts[1]);
    memcpy(parts[0], data, size < split ? size : split);
    if (size > split)
        memcpy(parts[1], data + split, size - split);
    struct iovec iov[3] = { [1] = { parts[0], split }, [2] = { parts[1], whole - split } };
    struct net_frame frame = {
        .hdr = hdr, .iov = iov + 1, .count = whole > split ? 2 : 1,
        .size = whole > AIOKVM_NET_MAX_FRAME ? AIOKVM_NET_MAX_FRAME + 1 : (uint32_t)whole,
    };
    ends[1]->end.offloads = options[3] & 31;
    ends[1]->blocks_every = options[4] & 7;
    ends[1]->pieces = 0;
    ends[1]->bytes = 0;
    if (net_frame_check(&frame)) {
        struct virtio_net_hdr_v1 checked = frame.hdr;
        bool fits = net_offload_fits(&frame);
        uint32_t needs = net_frame_needs(&frame) & ~ends[1]->end.offloads;
        /* One of every few is blocked: with 1 all are. Each try has time of its own. */
        uint32_t tries = 0;
        enum net_result result;
        do {
            REQUIRE(net_enter(net));
            result = net_send(&ends[0]->end, &frame);
            net_leave(net);
            REQUIRE(!memcmp(&frame.hdr, &checked, sizeof(checked)) && frame.iov == iov + 1);
        } while (result == NET_BLOCKED && ++tries < 70000 && ends[1]->blocks_every != 1);
        REQUIRE(tries < 70000);
        if (ends[1]->blocks_every != 1 && (fits || !needs))
            REQUIRE(ends[1]->bytes >= frame.size && ends[1]->pieces);
    }
    free(parts[0]);
    free(parts[1]);
    return 0;
}
