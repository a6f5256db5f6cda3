/* Fragments of IPv4 become datagrams, RFC 815 by a map of what is there. libslirp can do so, too, but trusts the
 * lengths, and keeps as much as it gets. */
#include "net_slirp_priv.h"

#include <stdlib.h>
#include <string.h>

#include "net_packet.h"

enum { ETH_SIZE = 14, IP_SIZE = 20, MAX_IP = 65535, BLOCKS = (MAX_IP + 1) / 8, MORE = 0x2000 };
static const uint64_t PATIENCE_NS = UINT64_C(30000000000);

struct slirp_datagram {
    uint8_t key[11]; /* identification, protocol, addresses */
    uint64_t begun_ns;
    uint32_t length; /* of all of it, 0: not known */
    uint32_t blocks; /* of 8 bytes, that are there */
    bool has_first;
    uint8_t map[BLOCKS / 8];
    uint8_t frame[ETH_SIZE + MAX_IP + 1];
};

static void end(struct slirp_fragments *fragments, struct slirp_datagram **at)
{
    if (*at && fragments->share)
        aiokvm_share_give(fragments->share, sizeof(**at));
    free(*at);
    *at = NULL;
}

/* The one with this key, else a new one in the place of what is old. NULL: no room. */
static struct slirp_datagram *find(struct slirp_fragments *fragments, const uint8_t key[11], uint64_t now_ns)
{
    struct slirp_datagram **place = &fragments->datagrams[0];
    for (uint32_t i = 0; i < SLIRP_DATAGRAMS; i++) {
        struct slirp_datagram **at = &fragments->datagrams[i];
        if (*at && now_ns - (*at)->begun_ns >= PATIENCE_NS) {
            fragments->lost++;
            end(fragments, at);
        }
        if (*at && !memcmp((*at)->key, key, sizeof((*at)->key)))
            return *at;
        if (!*at || (*place && (*at)->begun_ns < (*place)->begun_ns))
            place = at;
    }
    fragments->lost += *place != NULL;
    end(fragments, place);
    if (fragments->share && !aiokvm_share_fits(fragments->share, sizeof(**place)))
        return NULL;
    *place = calloc(1, sizeof(**place));
    if (*place) {
        if (fragments->share)
            aiokvm_share_add(fragments->share, sizeof(**place));
        memcpy((*place)->key, key, sizeof((*place)->key));
        (*place)->begun_ns = now_ns;
    }
    return *place;
}

static void drop(struct slirp_fragments *fragments, struct slirp_datagram *datagram)
{
    for (uint32_t i = 0; i < SLIRP_DATAGRAMS; i++)
        if (fragments->datagrams[i] == datagram)
            end(fragments, &fragments->datagrams[i]);
}

/* False: it contradicts what is there. */
static bool put(struct slirp_datagram *datagram, const uint8_t *frame, uint32_t offset, uint32_t length, bool more)
{
    if (offset + length > MAX_IP - IP_SIZE || !length || (more && length % 8))
        return false;
    if (more ? datagram->length && offset + length >= datagram->length : datagram->length)
        return false;
    for (uint32_t block = offset / 8; block < (offset + length + 7) / 8; block++) {
        /* Overlaps have no honest use: RFC 8900, section 3.7. */
        if (datagram->map[block / 8] >> block % 8 & 1)
            return false;
        datagram->map[block / 8] |= (uint8_t)(1 << block % 8);
        datagram->blocks++;
    }
    if (!more)
        datagram->length = offset + length;
    if (!offset) {
        memcpy(datagram->frame, frame, ETH_SIZE + IP_SIZE);
        datagram->has_first = true;
    }
    memcpy(datagram->frame + ETH_SIZE + IP_SIZE + offset, frame + ETH_SIZE + IP_SIZE, length);
    return true;
}

uint32_t slirp_fragments_add(struct slirp_fragments *fragments, uint8_t *frame, uint64_t now_ns, bool *is_invalid)
{
    const uint8_t *ip = frame + ETH_SIZE;
    uint8_t key[11];
    memcpy(key, ip + 4, 2);
    key[2] = ip[9];
    memcpy(key + 3, ip + 12, 8);
    struct slirp_datagram *datagram = find(fragments, key, now_ns);
    uint32_t flags = net_load16(ip + 6);
    *is_invalid = false;
    if (!datagram) {
        fragments->lost++;
        return 0;
    }
    if (!put(datagram, frame, (flags & 0x1fff) * 8, net_load16(ip + 2) - IP_SIZE, flags & MORE)) {
        *is_invalid = true;
        drop(fragments, datagram);
        return 0;
    }
    /* Pieces beyond the end that came before it are as well too much. */
    if (!datagram->length || !datagram->has_first || datagram->blocks < (datagram->length + 7) / 8)
        return 0;
    uint32_t size = ETH_SIZE + IP_SIZE + datagram->length;
    *is_invalid = datagram->blocks > (datagram->length + 7) / 8;
    if (!*is_invalid) {
        memcpy(frame, datagram->frame, size);
        uint8_t *whole = frame + ETH_SIZE;
        net_store16(whole + 2, size - ETH_SIZE);
        net_store16(whole + 6, 0);
        net_store16(whole + 10, 0);
        net_store16(whole + 10, ~slirp_sum(whole, IP_SIZE, 0));
    }
    drop(fragments, datagram);
    return *is_invalid ? 0 : size;
}

void slirp_fragments_clear(struct slirp_fragments *fragments)
{
    for (uint32_t i = 0; i < SLIRP_DATAGRAMS; i++)
        end(fragments, &fragments->datagrams[i]);
}
