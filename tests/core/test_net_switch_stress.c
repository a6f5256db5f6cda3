/* A switch that a thread serves while others send, learn, come, go and look. */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "net_fake.h"
#include "net_port.h"
#include "net_switch.h"

enum { HOSTS = 4, FRAMES = 100000, BATCH = 50 };

struct host {
    pthread_t thread;
    struct aiokvm_net_end *end;
    uint8_t number;
    uint32_t taken;
    atomic_bool *done;
};

/* Sends to the next, takes what comes. */
static void *host_main(void *argument)
{
    struct host *host = argument;
    static const uint8_t PROTOTYPE[60] = { 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0x08, 0x06 };
    uint8_t bytes[BATCH][60];
    uint32_t sizes[BATCH], sent = 0;
    struct aiokvm_net_port_batch batch;
    for (int i = 0; i < BATCH; i++) {
        memcpy(bytes[i], PROTOTYPE, 60);
        bytes[i][5] = (uint8_t)((host->number + 1) % HOSTS);
        bytes[i][11] = host->number;
        sizes[i] = 60;
    }
    while (sent < FRAMES || !atomic_load(host->done)) {
        if (sent < FRAMES) {
            uint32_t most = FRAMES - sent < BATCH ? FRAMES - sent : BATCH;
            int count = aiokvm_net_port_send(host->end, bytes[0], sizes, NULL, most);
            CHECK(count >= 0);
            sent += (uint32_t)count;
        }
        int count = aiokvm_net_port_take(host->end, 64, &batch);
        for (int i = 0; i < count; i++)
            CHECK_EQ(batch.data[i * 60 + 13], 0x06);
        aiokvm_net_port_release(host->end, (uint32_t)count);
        host->taken += (uint32_t)count;
        if (!count)
            sched_yield();
    }
    return NULL;
}

/* Frames that the switch has sent to its hosts, or dropped for want of room. */
static uint64_t left(struct aiokvm_net_end *ports[HOSTS])
{
    uint64_t count = 0;
    for (int i = 0; i < HOSTS; i++) {
        struct aiokvm_net_stats stats;
        aiokvm_net_end_stats(ports[i], &stats);
        count += stats.sent_frames + stats.dropped_full;
    }
    return count;
}

TEST(threads_share_a_switch)
{
    int error;
    struct aiokvm_net *net = aiokvm_net_new("net-switch", &error);
    CHECK(net);
    const struct aiokvm_net_switch_config config = { .ageing_ns = UINT64_C(300000000000) };
    struct aiokvm_net_switch *sw = aiokvm_net_switch_new(net, &config, &error);
    const struct aiokvm_net_switch_port_config open = { 0 };
    const struct aiokvm_net_port_config ring = { .depth = 128, .bytes = 1 << 17 };
    struct host hosts[HOSTS];
    struct aiokvm_net_end *ports[HOSTS];
    atomic_bool done = false;
    for (uint8_t i = 0; i < HOSTS; i++) {
        hosts[i] = (struct host){ .number = i, .done = &done };
        hosts[i].end = aiokvm_net_port_new(net, &ring, &error);
        ports[i] = aiokvm_net_switch_port_new(sw, &open, &error);
        CHECK_EQ(aiokvm_net_link(hosts[i].end, ports[i]), 0);
    }
    for (int i = 0; i < HOSTS; i++)
        CHECK_EQ(pthread_create(&hosts[i].thread, NULL, host_main, &hosts[i]), 0);
    uint64_t sent = 0;
    while (sent < HOSTS * FRAMES) {
        static struct aiokvm_net_switch_entry entries[16];
        CHECK(aiokvm_net_switch_table(sw, entries, 16) <= HOSTS);
        /* A port that comes, floods the others' way, and goes. */
        struct aiokvm_net_end *guest = aiokvm_net_port_new(net, &ring, &error);
        struct aiokvm_net_end *port = aiokvm_net_switch_port_new(sw, &open, &error);
        CHECK(guest && port);
        CHECK_EQ(aiokvm_net_link(guest, port), 0);
        aiokvm_net_end_free(sent & 1 ? guest : port);
        aiokvm_net_end_free(sent & 1 ? port : guest);
        struct aiokvm_net_news news;
        while (aiokvm_net_take(net, &news) == 1)
            continue;
        sent = 0;
        for (int i = 0; i < HOSTS; i++) {
            struct aiokvm_net_stats stats;
            aiokvm_net_end_stats(hosts[i].end, &stats);
            sent += stats.sent_frames + stats.dropped_down;
        }
    }
    struct aiokvm_net_switch_stats counts;
    aiokvm_net_switch_stats(sw, &counts);
    CHECK_EQ(counts.forwarded + counts.flooded + counts.filtered, HOSTS * FRAMES);
    /* What was forwarded leaves the switch for as long as the hosts take: nothing stays in it. */
    uint64_t taken = 0, gone = 0, deadline_ns = aiokvm_now_ns() + UINT64_C(20000000000);
    while (gone < counts.forwarded && aiokvm_now_ns() < deadline_ns)
        gone = left(ports);
    CHECK(gone >= counts.forwarded);
    atomic_store(&done, true);
    for (int i = 0; i < HOSTS; i++) {
        pthread_join(hosts[i].thread, NULL);
        taken += hosts[i].taken;
    }
    CHECK(taken <= left(ports));
    CHECK(taken > 0);
    aiokvm_net_switch_free(sw);
    aiokvm_net_free(net);
}
