#include "net_flow.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define SECOND_NS UINT64_C(1000000000)

struct net_flows *net_flows_new(void)
{
    struct net_flows *flows = calloc(1, sizeof(*flows));
    /* Nobody outside is to know which flows share a set. Without randomness they still only evict each other. */
    if (flows && getrandom(&flows->seed, sizeof(flows->seed), GRND_NONBLOCK) < 0)
        flows->seed = (uint64_t)(uintptr_t)flows;
    return flows;
}

void net_flow_key_set(struct net_flow_key *key, const uint8_t *src, const uint8_t *dst, uint32_t address_size,
                      uint16_t src_port, uint16_t dst_port, bool egress)
{
    int order = memcmp(src, dst, address_size);
    bool src_is_low = order < 0 || (order == 0 && src_port <= dst_port);
    memset(key, 0, sizeof(*key));
    memcpy(key->low, src_is_low ? src : dst, address_size);
    memcpy(key->high, src_is_low ? dst : src, address_size);
    key->low_port = src_is_low ? src_port : dst_port;
    key->high_port = src_is_low ? dst_port : src_port;
    key->address_size = (uint8_t)address_size;
    key->low_is_guest = src_is_low == egress;
}

static struct net_flow *set_of(struct net_flows *flows, const struct net_flow_key *key)
{
    _Static_assert(sizeof(*key) % 8 == 0, "a key is hashed by words");
    uint64_t hash = flows->seed, word;
    for (size_t at = 0; at < sizeof(*key); at += 8) {
        memcpy(&word, (const uint8_t *)key + at, 8);
        hash = (hash ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    return &flows->flows[hash % (NET_FLOWS / NET_FLOW_WAYS) * NET_FLOW_WAYS];
}

static bool is_free(const struct net_flow *flow, uint64_t now_ns)
{
    return flow->state == NET_FLOW_FREE || (flow->state != NET_FLOW_ASKED && flow->until_ns <= now_ns);
}

struct net_flow *net_flows_find(struct net_flows *flows, const struct net_flow_key *key, uint64_t now_ns)
{
    struct net_flow *set = set_of(flows, key);
    for (int i = 0; i < NET_FLOW_WAYS; i++)
        if (!memcmp(&set[i].key, key, sizeof(*key)) && !is_free(&set[i], now_ns))
            return &set[i];
    return NULL;
}

struct net_flow *net_flows_get(struct net_flows *flows, const struct net_flow_key *key, uint64_t now_ns)
{
    struct net_flow *flow = net_flows_find(flows, key, now_ns);
    if (flow)
        return flow;
    struct net_flow *set = set_of(flows, key);
    for (int i = 0; i < NET_FLOW_WAYS; i++) {
        if (is_free(&set[i], now_ns)) {
            flow = &set[i];
            break;
        }
        if (set[i].state != NET_FLOW_ASKED && (!flow || set[i].used_ns < flow->used_ns))
            flow = &set[i];
    }
    if (flow)
        *flow = (struct net_flow){ .key = *key, .used_ns = now_ns, .hook = NET_FLOW_NO_HOOK };
    return flow;
}

void net_flow_use(struct net_flow *flow, uint64_t now_ns)
{
    uint64_t seconds = 300; /* RFC 4787, REQ-5 */
    if (flow->key.is_fragment)
        seconds = 30; /* RFC 8200, section 4.5: twice a packet's way */
    else if (flow->key.protocol == IPPROTO_TCP)
        seconds = 7440; /* RFC 5382, REQ-5: 2 hours 4 minutes */
    else if (flow->key.protocol == IPPROTO_ICMP || flow->key.protocol == IPPROTO_ICMPV6)
        seconds = 60; /* RFC 5508, REQ-1 */
    flow->used_ns = now_ns;
    flow->until_ns = now_ns + seconds * SECOND_NS;
}
