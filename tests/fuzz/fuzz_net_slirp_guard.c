/* What stands between a guest's frames and libslirp, under libFuzzer: guard, fragments, order, begun connections, merging,
 * neighbours and sockets. The input is frames of the guest and of libslirp, each in an allocation of its size.
 *
 * Sources: net_checksum.c net_slirp_begun.c net_slirp_fragments.c net_slirp_guard.c net_slirp_merge.c
 * Sources: net_slirp_neighbours.c net_slirp_order.c net_slirp_sockets.c budget.c clock.c
 * Runs: 100000
 */
#include "net_fuzz.h"
#include "net_packet.h"
#include "net_slirp_priv.h"

enum { SOCKETS = 8, NEEDS_CSUM = VIRTIO_NET_HDR_F_NEEDS_CSUM };

static struct slirp_order order;
static struct slirp_begun begun;
static struct slirp_merge merge;
static struct slirp_neighbours neighbours;
static struct slirp_sockets sockets;
static struct slirp_socket some[SOCKETS];

/* Its first bytes are the input's, but for what makes it likely to be one of IP. */
static uint8_t *frame_of(struct input *input, uint32_t what, uint32_t size)
{
    uint8_t *frame = calloc(1, size);
    REQUIRE(frame);
    static const uint8_t ETHERNET[12] = "\x52\x55\x0a\0\2\2\x52\x54\0\0\0\2";
    memcpy(frame, ETHERNET, 12);
    net_store16(frame + 12, what & 1 ? 0x86dd : what & 2 ? 0x0806 : 0x0800);
    for (uint32_t i = 14; i < size && i < 100 && input->left; i++)
        frame[i] = (uint8_t)take(input, 1);
    if (!(what & 3) && size > 34 && what & 8) {
        frame[14] = 0x45;
        net_store16(frame + 16, size - 14);
    }
    if (what & 1 && size > 54 && what & 8) {
        frame[14] = 0x60;
        net_store16(frame + 18, size - 54);
    }
    return frame;
}

static void of_slirp(struct slirp_guard *guard, uint8_t *frame, uint32_t size, uint64_t now)
{
    uint8_t answer[SLIRP_QUESTION_SIZE];
    slirp_guard_heard(guard, frame, size, now);
    slirp_order_heard(&order, frame, size);
    slirp_sockets_told(&sockets, frame, size, now);
    REQUIRE(slirp_neighbours_answer(frame, size, answer) <= SLIRP_QUESTION_SIZE);
    if (!slirp_neighbours_fill(&neighbours, frame, size))
        REQUIRE(slirp_neighbours_ask(guard, frame, answer) <= SLIRP_QUESTION_SIZE);
    if (slirp_merge_add(&merge, frame, size))
        return;
    struct virtio_net_hdr_v1 hdr;
    if (merge.size)
        slirp_merge_finish(&merge, &hdr);
    merge.size = 0;
    slirp_merge_add(&merge, frame, size);
}

/* One that has passed: `frame` has room for all that IP can say. */
static void of_guest(uint8_t *frame, uint32_t size, uint32_t what, uint64_t now)
{
    uint8_t reset[SLIRP_RESET_SIZE], reset6[SLIRP_RESET6_SIZE];
    uint32_t reset_size, address;
    uint16_t port;
    slirp_neighbours_learn(&neighbours, frame, size);
    bool is_reset = slirp_sockets_heard(&sockets, frame, size, now);
    struct slirp_socket *socket = &some[what % SOCKETS];
    if (is_reset || what & 64) {
        slirp_sockets_remove(&sockets, socket);
        memset(socket, 0, sizeof(*socket));
        slirp_sockets_begin(&sockets, socket, frame, size);
    }
    if ((socket = slirp_sockets_idle(&sockets, now, what & 32))) {
        REQUIRE(slirp_socket_reset(socket, what & 1, reset6) <= sizeof(reset6));
        slirp_sockets_remove(&sockets, socket);
        memset(socket, 0, sizeof(*socket));
    }
    if (slirp_begins(frame, size)) {
        slirp_begun_add(&begun, frame, size, now, reset, &reset_size);
        slirp_guard_sender(frame, &address, &port);
    }
    struct slirp_connecting *of = slirp_begun_find(&begun, frame, size);
    slirp_order_begin(&order, frame, size);
    if (what & 4)
        order.is_missing = order.is_watching;
    REQUIRE(slirp_order_end(&order, frame, size) <= size);
    if (of && slirp_resets(frame, size))
        slirp_begun_remove(&begun, of, frame, reset);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    memset(&order, 0, sizeof(order));
    memset(&begun, 0, sizeof(begun));
    memset(&neighbours, 0, sizeof(neighbours));
    memset(&sockets, 0, sizeof(sockets));
    memset(some, 0, sizeof(some));
    merge.size = 0;
    struct slirp_fragments fragments = { 0 };
    struct slirp_guard guard = {
        .network = 0x0a000200, .netmask = 0xffffff00, .host = 0x0a000202, .nameserver = 0x0a000203,
        .prefix6 = { 0xfe, 0xc0 }, .host6 = { 0xfe, 0xc0, [15] = 2 }, .nameserver6 = { 0xfe, 0xc0, [15] = 3 },
        .prefix6_length = 64, .host_loopback = take(&input, 1) & 1, .restricted = take(&input, 1) & 1,
    };
    uint64_t now = 1;
    static uint8_t whole[AIOKVM_NET_MAX_FRAME];
    while (input.left) {
        uint32_t what = take(&input, 1), length = 14 + take(&input, 1) + (what & 64 ? 400 : 0);
        now += (uint64_t)take(&input, 1) << 28;
        uint8_t *frame = frame_of(&input, what, length);
        if (what & 128) {
            of_slirp(&guard, frame, length, now);
            free(frame);
            continue;
        }
        struct virtio_net_hdr_v1 hdr = { .gso_type = (uint8_t)(take(&input, 1) % 6) };
        hdr.csum_start = (uint16_t)take(&input, 1);
        hdr.csum_offset = (uint16_t)take(&input, 1);
        if (what & 16 && (uint32_t)hdr.csum_start + hdr.csum_offset + 2 <= length && hdr.csum_start >= 14)
            hdr.flags = NEEDS_CSUM;
        struct slirp_load load = { .tcp_full = what & 16, .is_service = what & 32, .now_ns = now };
        enum slirp_verdict verdict = slirp_guard(&guard, &load, &hdr, frame, length);
        memcpy(whole, frame, length);
        free(frame);
        if (verdict == SLIRP_FRAGMENT) {
            bool is_invalid;
            length = slirp_fragments_add(&fragments, whole, now, &is_invalid);
            REQUIRE(length <= sizeof(whole));
            verdict = length ? slirp_guard(&guard, &load, &(struct virtio_net_hdr_v1){ 0 }, whole, length) : SLIRP_DENY;
        }
        if (verdict == SLIRP_PASS || verdict == SLIRP_REFUSE)
            of_guest(whole, length, what, now);
    }
    slirp_fragments_clear(&fragments);
    return 0;
}
