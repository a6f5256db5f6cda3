/* Which address is at which port of a switch: IEEE 802.1Q, section 8.8. */
#include "net_switch_priv.h"

#include <errno.h>
#include <sys/random.h>

#include "clock.h"

void switch_table_init(struct aiokvm_net_switch *sw)
{
    if (getrandom(&sw->factor, sizeof(sw->factor), GRND_NONBLOCK) != sizeof(sw->factor))
        sw->factor = aiokvm_now_ns() * UINT64_C(0x9e3779b97f4a7c15);
    sw->factor |= 1;
    for (uint32_t i = 0; i < BUCKETS; i++)
        sw->buckets[i] = NO_ENTRY;
    for (uint16_t i = 0; i < AIOKVM_NET_SWITCH_ADDRESSES; i++)
        sw->entries[i].next = i + 1 < AIOKVM_NET_SWITCH_ADDRESSES ? (uint16_t)(i + 1) : NO_ENTRY;
}

static uint16_t *bucket(struct aiokvm_net_switch *sw, uint64_t key)
{
    /* The topmost bits, as many as number the buckets. */
    return &sw->buckets[key * sw->factor >> (64 - __builtin_ctz(BUCKETS))];
}

static uint16_t find(struct aiokvm_net_switch *sw, uint64_t key)
{
    uint16_t index = *bucket(sw, key);
    while (index != NO_ENTRY && sw->entries[index].key != key)
        index = sw->entries[index].next;
    return index;
}

static bool is_old(const struct aiokvm_net_switch *sw, const struct switch_entry *entry)
{
    return sw->now_ns > entry->seen_ns && sw->now_ns - entry->seen_ns > sw->ageing_ns;
}

struct switch_port *switch_find(struct aiokvm_net_switch *sw, uint64_t key)
{
    uint16_t index = find(sw, key);
    if (index == NO_ENTRY || is_old(sw, &sw->entries[index]))
        return NULL;
    return sw->ports[sw->entries[index].port];
}

/* ---- what a port has taught, by age ---- */

static void attach(struct aiokvm_net_switch *sw, struct switch_port *port, uint16_t index)
{
    struct switch_entry *entry = &sw->entries[index];
    entry->port = port->index;
    entry->newer = NO_ENTRY;
    entry->older = port->newest;
    if (port->newest != NO_ENTRY)
        sw->entries[port->newest].newer = index;
    else
        port->oldest = index;
    port->newest = index;
    port->addresses++;
}

static void detach(struct aiokvm_net_switch *sw, uint16_t index)
{
    struct switch_entry *entry = &sw->entries[index];
    struct switch_port *port = sw->ports[entry->port];
    if (entry->newer != NO_ENTRY)
        sw->entries[entry->newer].older = entry->older;
    else
        port->newest = entry->older;
    if (entry->older != NO_ENTRY)
        sw->entries[entry->older].newer = entry->newer;
    else
        port->oldest = entry->newer;
    port->addresses--;
}

static void forget(struct aiokvm_net_switch *sw, uint16_t index)
{
    uint16_t *at = bucket(sw, sw->entries[index].key);
    while (*at != index)
        at = &sw->entries[*at].next;
    *at = sw->entries[index].next;
    detach(sw, index);
    sw->entries[index].next = sw->free;
    sw->free = index;
}

void switch_forget(struct aiokvm_net_switch *sw, struct switch_port *port)
{
    while (port->oldest != NO_ENTRY)
        forget(sw, port->oldest);
}

/* Makes room for one more address of this port. */
static void make_room(struct aiokvm_net_switch *sw, struct switch_port *port)
{
    struct switch_port *most = port;
    if (port->addresses < AIOKVM_NET_SWITCH_PORT_ADDRESSES) {
        if (sw->free != NO_ENTRY)
            return;
        /* Who has few keeps them. */
        for (uint32_t i = 0; i < sw->top; i++)
            if (sw->ports[i] && sw->ports[i]->addresses > most->addresses)
                most = sw->ports[i];
    }
    sw->stats.forgotten++;
    forget(sw, most->oldest);
}

bool switch_learn(struct aiokvm_net_switch *sw, struct switch_port *port, uint64_t key)
{
    uint16_t index = find(sw, key);
    if (index != NO_ENTRY) {
        struct switch_entry *entry = &sw->entries[index];
        /* Most frames are of those heard a moment ago: an age need not be that exact. */
        if (entry->port == port->index && sw->now_ns - entry->seen_ns < sw->ageing_ns / 256)
            return true;
        if (entry->port != port->index) {
            /* A guest that says it is the gateway would cut off all others: they are isolated from it. */
            if (port->isolated && !sw->ports[entry->port]->isolated && !is_old(sw, entry))
                return false;
            sw->stats.moved++;
            if (port->addresses >= AIOKVM_NET_SWITCH_PORT_ADDRESSES)
                make_room(sw, port);
        }
        detach(sw, index);
        attach(sw, port, index);
        entry->seen_ns = sw->now_ns;
        return true;
    }
    make_room(sw, port);
    index = sw->free;
    struct switch_entry *entry = &sw->entries[index];
    sw->free = entry->next;
    uint16_t *first = bucket(sw, key);
    entry->next = *first;
    *first = index;
    entry->key = key;
    entry->seen_ns = sw->now_ns;
    attach(sw, port, index);
    sw->stats.learned++;
    return true;
}

int aiokvm_net_switch_table(struct aiokvm_net_switch *sw, struct aiokvm_net_switch_entry *entries, uint32_t most)
{
    if (!net_enter(sw->net))
        return -EOWNERDEAD;
    sw->now_ns = sw->clock();
    uint32_t count = 0;
    for (uint32_t i = 0; i < sw->top; i++) {
        if (!sw->ports[i])
            continue;
        for (uint16_t index = sw->ports[i]->newest; index != NO_ENTRY && count < most;) {
            const struct switch_entry *entry = &sw->entries[index];
            index = entry->older;
            if (is_old(sw, entry))
                continue;
            struct aiokvm_net_switch_entry *given = &entries[count++];
            for (int byte = 0; byte < 6; byte++)
                given->mac[byte] = (uint8_t)(entry->key >> (40 - 8 * byte));
            given->vlan = (uint16_t)(entry->key >> 48);
            given->port = sw->ports[i]->end.id;
            given->age_ns = sw->now_ns - entry->seen_ns;
        }
    }
    net_leave(sw->net);
    return (int)count;
}
