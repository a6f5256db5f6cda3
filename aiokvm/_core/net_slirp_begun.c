/* Connections to services that a guest has begun. libslirp has a descriptor of one, which is counted, when the guest
 * has acknowledged it; until then it has two buffers of 128 KiB alone, and any segment of the guest's keeps them for
 * longer. Here is each of these, and none is forgotten but together with what libslirp has of it. */
#include "net_slirp_priv.h"

#include <string.h>

#include "net_packet.h"

enum { ETH_SIZE = 14, IP_SIZE = 20, TCP_SIZE = 20, TCP_FIN = 0x01, TCP_SYN = 0x02, TCP_RST = 0x04, TCP_ACK = 0x10 };

/* As long as libslirp waits for a guest that says nothing more. */
static const uint64_t BEGUN_NS = UINT64_C(75000000000);

static bool is_tcp(const uint8_t *frame, size_t size)
{
    return size >= ETH_SIZE + IP_SIZE + TCP_SIZE && net_load16(frame + 12) == 0x0800 && frame[ETH_SIZE] == 0x45 &&
           frame[ETH_SIZE + 9] == 6;
}

bool slirp_begins(const uint8_t *frame, size_t size)
{
    return is_tcp(frame, size) &&
           (frame[ETH_SIZE + IP_SIZE + 13] & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) == TCP_SYN;
}

bool slirp_resets(const uint8_t *frame, size_t size)
{
    return is_tcp(frame, size) && frame[ETH_SIZE + IP_SIZE + 13] & TCP_RST;
}

/* The reset of a connection: `frame` is any of the guest's. It is believed, as nothing before `next` has come. */
static uint32_t make_reset(const struct slirp_connecting *of, const uint8_t *frame, uint8_t *reset)
{
    uint8_t *ip = reset + ETH_SIZE;
    memcpy(reset, frame, ETH_SIZE);
    net_store16(reset + 12, 0x0800);
    memset(ip, 0, IP_SIZE + TCP_SIZE);
    ip[0] = 0x45;
    ip[8] = 64;
    ip[9] = 6;
    net_store32(ip + 12, of->guest);
    net_store32(ip + 16, of->service);
    net_store32(ip + IP_SIZE, of->ports);
    return slirp_make_reset(reset, ETH_SIZE + IP_SIZE, of->next, TCP_RST);
}

struct slirp_connecting *slirp_begun_find(struct slirp_begun *begun, const uint8_t *frame, size_t size)
{
    if (!begun->count || !is_tcp(frame, size))
        return NULL;
    const uint8_t *ip = frame + ETH_SIZE;
    uint32_t guest = net_load32(ip + 12), service = net_load32(ip + 16), ports = net_load32(ip + IP_SIZE);
    for (struct slirp_connecting *at = begun->connecting; at < begun->connecting + begun->count; at++)
        if (at->ports == ports && at->guest == guest && at->service == service)
            return at;
    return NULL;
}

bool slirp_begun_add(struct slirp_begun *begun, const uint8_t *frame, size_t size, uint64_t now_ns, uint8_t *reset,
                     uint32_t *reset_size)
{
    const uint8_t *ip = frame + ETH_SIZE;
    struct slirp_connecting *at = slirp_begun_find(begun, frame, size);
    uint32_t next = net_load32(ip + IP_SIZE + 4) + 1;
    *reset_size = 0;
    /* The same once more. */
    if (at && at->next == next && now_ns - at->since_ns < BEGUN_NS)
        return true;
    if (!at && begun->count < SLIRP_CONNECTING) {
        at = &begun->connecting[begun->count++];
    } else {
        if (!at) {
            at = begun->connecting;
            for (uint32_t i = 1; i < begun->count; i++)
                if (begun->connecting[i].since_ns < at->since_ns)
                    at = &begun->connecting[i];
            if (now_ns - at->since_ns < BEGUN_NS)
                return false;
        }
        *reset_size = make_reset(at, frame, reset);
    }
    *at = (struct slirp_connecting){
        .guest = net_load32(ip + 12), .service = net_load32(ip + 16), .ports = net_load32(ip + IP_SIZE), .next = next,
        .since_ns = now_ns,
    };
    return true;
}

uint32_t slirp_begun_remove(struct slirp_begun *begun, struct slirp_connecting *of, const uint8_t *frame,
                            uint8_t *reset)
{
    uint32_t size = make_reset(of, frame, reset);
    *of = begun->connecting[--begun->count];
    return size;
}
