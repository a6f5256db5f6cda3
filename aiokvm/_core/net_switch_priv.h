/* What the two parts of a switch have in common. All of it runs with the plane's lock held. */
#ifndef AIOKVM_NET_SWITCH_PRIV_H
#define AIOKVM_NET_SWITCH_PRIV_H

#include "net_priv.h"
#include "net_switch.h"

/* No entry. */
enum { NO_ENTRY = 0xffff, BUCKETS = AIOKVM_NET_SWITCH_ADDRESSES };

struct switch_entry {
    uint64_t key; /* switch_key */
    uint64_t seen_ns;
    uint16_t port;
    uint16_t next;         /* in its bucket, or of the free ones */
    uint16_t newer, older; /* of the same port */
};

struct switch_port {
    struct aiokvm_net_end end;
    struct aiokvm_net_switch *sw; /* NULL: it is gone */
    uint16_t index;
    uint16_t vlan;
    bool isolated;
    uint64_t *trunk;  /* a bit for each VLAN; NULL: not a trunk */
    uint16_t newest, oldest; /* entries */
    uint32_t addresses;
    struct aiokvm_share frames; /* of AIOKVM_BUDGET_FRAME_BYTES */
    struct net_queue queue;     /* what waits for the peer */
};

struct aiokvm_net_switch {
    struct aiokvm_net *net;
    uint64_t (*clock)(void);
    uint64_t ageing_ns;
    uint64_t now_ns; /* when the batch began */
    uint64_t factor; /* of the hash: odd, and a secret, so that nobody can choose addresses that share a bucket */
    struct aiokvm_net_switch_stats stats;
    uint32_t top; /* ports beyond are NULL */
    struct switch_port *ports[AIOKVM_NET_SWITCH_PORTS];
    uint16_t free;
    uint16_t buckets[BUCKETS];
    struct switch_entry entries[AIOKVM_NET_SWITCH_ADDRESSES];
};

static inline uint64_t switch_key(const uint8_t mac[6], uint32_t vlan)
{
    uint64_t key = vlan;
    for (int i = 0; i < 6; i++)
        key = key << 8 | mac[i];
    return key;
}

void switch_table_init(struct aiokvm_net_switch *sw);
/* Who was heard with this address, or NULL. */
struct switch_port *switch_find(struct aiokvm_net_switch *sw, uint64_t key);
/* False: the address is another's, and this port may not take it over. */
bool switch_learn(struct aiokvm_net_switch *sw, struct switch_port *port, uint64_t key);
/* All of the port's. */
void switch_forget(struct aiokvm_net_switch *sw, struct switch_port *port);

#endif
