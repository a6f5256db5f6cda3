/* net_offload.c under libFuzzer: the input is a header and a frame, and what the receiver takes.
 *
 * Sources: net.c net_capture.c net_checksum.c net_filter.c net_flow.c net_link.c net_offload.c net_packet.c net_queue.c
 * Sources: net_end.c net_gather.c net_rules.c budget.c clock.c pace.c ratelimit.c
 * Runs: 300000
 */
#include "net_fuzz.h"

/* Of most inputs: each piece is copied, and a frame of 64 KiB may be as many pieces. */
enum { PIECES = 32 };

/* Blocked now and then, with time of its own for each try. */
static void send_all(struct peer *from, struct peer *to, struct net_frame *frame)
{
    struct virtio_net_hdr_v1 checked = frame->hdr;
    const struct iovec *iov = frame->iov;
    uint32_t needs = net_frame_needs(frame) & ~to->end.offloads, tries = 0;
    bool fits = net_offload_fits(frame);
    enum net_result result;
    do {
        REQUIRE(net_enter(from->end.net));
        result = net_send(&from->end, frame);
        net_leave(from->end.net);
        REQUIRE(!memcmp(&frame->hdr, &checked, sizeof(checked)) && frame->iov == iov);
    } while (result == NET_BLOCKED && ++tries < 70000 && to->blocks_every != 1);
    REQUIRE(tries < 70000);
    if (to->blocks_every != 1 && (fits || !needs))
        REQUIRE(to->received && to->bytes >= frame->size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct peer *from, *to;
    if (!from) {
        int error;
        struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
        REQUIRE(net);
        from = peer_new(net, 0);
        to = peer_new(net, 0);
        REQUIRE(!aiokvm_net_link(&from->end, &to->end));
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
    if (options[0] != 255 && hdr.gso_size && whole > size && whole > (size_t)PIECES * hdr.gso_size)
        whole = size + (size_t)PIECES * hdr.gso_size;
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
    to->end.offloads = options[3] & 31;
    to->blocks_every = options[4] & 7;
    to->received = to->bytes = 0;
    if (net_frame_check(&frame))
        send_all(from, to, &frame);
    free(parts[0]);
    free(parts[1]);
    return 0;
}
