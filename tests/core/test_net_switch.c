/* A learning switch: who gets which frame, with what tag. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "net_fake.h"
#include "net_switch.h"

enum { MOST = 8 };
static const uint64_t SECOND_NS = 1000000000;
static uint64_t fake_now_ns;

static uint64_t fake_clock(void)
{
    return fake_now_ns;
}

struct bench {
    struct aiokvm_net *net;
    struct aiokvm_net_switch *sw;
    uint32_t count;
    struct aiokvm_net_end *ports[MOST];
    struct fake_end *hosts[MOST];
};

static struct bench setup(void)
{
    int error = 0;
    struct bench bench = { .net = aiokvm_net_new(NULL, &error) };
    const struct aiokvm_net_switch_config config = { .ageing_ns = 300 * SECOND_NS, .now_ns = fake_clock };
    CHECK(bench.net);
    fake_now_ns = 1000 * SECOND_NS;
    bench.sw = aiokvm_net_switch_new(bench.net, &config, &error);
    CHECK(bench.sw);
    return bench;
}

static void add(struct bench *bench, struct aiokvm_net_switch_port_config config)
{
    int error = 0;
    uint32_t i = bench->count++;
    bench->ports[i] = aiokvm_net_switch_port_new(bench->sw, &config, &error);
    CHECK(bench->ports[i]);
    bench->hosts[i] = fake_end_new(bench->net, 0);
    CHECK_EQ(aiokvm_net_link(bench->ports[i], &bench->hosts[i]->end), 0);
}

static struct bench hub(uint32_t count)
{
    struct bench bench = setup();
    while (bench.count < count)
        add(&bench, (struct aiokvm_net_switch_port_config){ 0 });
    return bench;
}

static void end(struct bench *bench)
{
    aiokvm_net_switch_free(bench->sw);
    aiokvm_net_free(bench->net);
}

static struct aiokvm_net_switch_stats stats(struct bench *bench)
{
    struct aiokvm_net_switch_stats stats;
    aiokvm_net_switch_stats(bench->sw, &stats);
    return stats;
}

enum { UNTAGGED = -1, EVERYBODY = 0xff };

/* A frame of 60 bytes without its tag: host number `to` has the address 02-00-00-00-00-to. */
static uint32_t frame(uint8_t *bytes, uint32_t to, uint32_t from, int tag)
{
    const uint8_t head[] = { 2, 0, 0, 0, 0, (uint8_t)to, 2, 0, 0, 0, (uint8_t)(from >> 8), (uint8_t)from };
    memset(bytes, 0x5a, 64);
    memcpy(bytes, head, 12);
    if (to == EVERYBODY)
        memset(bytes, 0xff, 6);
    uint8_t *next = bytes + 12;
    if (tag != UNTAGGED) {
        const uint8_t vlan[] = { 0x81, 0x00, (uint8_t)(tag >> 8), (uint8_t)tag };
        memcpy(next, vlan, 4);
        next += 4;
    }
    next[0] = 0x08;
    next[1] = 0x06;
    return tag == UNTAGGED ? 60 : 64;
}

static enum net_result say(struct bench *bench, uint32_t from, uint32_t to, int tag)
{
    uint8_t bytes[64];
    uint32_t size = frame(bytes, to, from, tag);
    return fake_end_send(bench->hosts[from], NULL, bytes, size);
}

/* Who has received something since: a bit for each. */
static uint32_t heard(struct bench *bench)
{
    uint32_t who = 0;
    for (uint32_t i = 0; i < bench->count; i++) {
        who |= bench->hosts[i]->received ? 1u << i : 0;
        fake_end_clear(bench->hosts[i]);
    }
    return who;
}

/* Whether exactly one frame came there, with this tag. */
static bool got(struct bench *bench, uint32_t host, uint32_t from, uint32_t to, int tag)
{
    uint8_t bytes[64];
    uint32_t size = frame(bytes, to, from, tag);
    struct fake_end *fake = bench->hosts[host];
    bool right = fake->received == 1 && fake->frames[0].size == size && !memcmp(fake->frames[0].data, bytes, size);
    fake_end_clear(fake);
    return right;
}

TEST(it_learns_who_is_where)
{
    struct bench bench = hub(4);
    say(&bench, 0, 1, UNTAGGED);
    CHECK_EQ(heard(&bench), 0xe);
    say(&bench, 1, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x1);
    say(&bench, 0, 1, UNTAGGED);
    CHECK_EQ(bench.hosts[1]->frames[0].hops, 1);
    CHECK(got(&bench, 1, 0, 1, UNTAGGED));
    CHECK_EQ(heard(&bench), 0);
    say(&bench, 2, EVERYBODY, UNTAGGED);
    CHECK_EQ(heard(&bench), 0xb);
    CHECK_EQ(stats(&bench).learned, 3);
    CHECK_EQ(stats(&bench).forwarded, 2);
    CHECK_EQ(stats(&bench).flooded, 2);
    end(&bench);
}

TEST(an_address_that_moves_is_learned_anew)
{
    struct bench bench = hub(3);
    uint8_t bytes[64];
    say(&bench, 0, 9, UNTAGGED);
    CHECK_EQ(fake_end_send(bench.hosts[2], NULL, bytes, frame(bytes, 9, 0, UNTAGGED)), NET_TAKEN);
    heard(&bench);
    say(&bench, 1, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x4);
    CHECK_EQ(stats(&bench).moved, 1);
    /* What is for a host at the same port has arrived already. */
    CHECK_EQ(fake_end_send(bench.hosts[2], NULL, bytes, frame(bytes, 0, 7, UNTAGGED)), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0);
    CHECK_EQ(stats(&bench).filtered, 1);
    end(&bench);
}

TEST(who_is_not_heard_of_is_forgotten)
{
    struct bench bench = hub(3);
    struct aiokvm_net_switch_entry entries[4];
    say(&bench, 0, 9, UNTAGGED);
    fake_now_ns += 299 * SECOND_NS;
    heard(&bench);
    say(&bench, 1, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x1);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, 1), 1);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, 4), 2);
    CHECK_EQ(entries[0].port, aiokvm_net_end_id(bench.ports[0]));
    CHECK_EQ(entries[0].age_ns, 299 * SECOND_NS);
    CHECK_EQ(entries[1].age_ns, 0);
    CHECK_EQ(entries[1].mac[5], 1);
    fake_now_ns += 2 * SECOND_NS;
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, 4), 1);
    say(&bench, 1, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x5);
    /* Being heard keeps it. */
    for (int i = 0; i < 10; i++) {
        say(&bench, 0, 9, UNTAGGED);
        fake_now_ns += 200 * SECOND_NS;
    }
    heard(&bench);
    say(&bench, 1, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x1);
    end(&bench);
}

TEST(what_no_station_sends_is_dropped)
{
    struct bench bench = hub(2);
    uint8_t bytes[64];
    uint32_t size = frame(bytes, 1, 0, UNTAGGED);
    bytes[6] |= 1;
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, size), NET_TAKEN);
    CHECK_EQ(stats(&bench).dropped_source, 1);
    /* Spanning tree, pause: not for those behind the bridge. */
    static const uint8_t STP[] = { 0x01, 0x80, 0xc2, 0, 0, 0 };
    frame(bytes, 1, 0, UNTAGGED);
    memcpy(bytes, STP, 6);
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, size), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0);
    bytes[5] = 0x10;
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, size), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0x2);
    /* The shortest that there is. */
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, 14), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0x2);
    end(&bench);
}

TEST(isolated_ports_talk_to_the_others_only)
{
    struct bench bench = setup();
    for (uint32_t i = 0; i < 4; i++)
        add(&bench, (struct aiokvm_net_switch_port_config){ .isolated = i < 2 });
    say(&bench, 0, EVERYBODY, UNTAGGED);
    CHECK_EQ(heard(&bench), 0xc);
    say(&bench, 1, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0);
    say(&bench, 2, EVERYBODY, UNTAGGED);
    CHECK_EQ(heard(&bench), 0xb);
    say(&bench, 2, 1, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x2);
    end(&bench);
}

TEST(isolated_ports_do_not_pass_themselves_off_as_others)
{
    struct bench bench = setup();
    uint8_t bytes[64];
    for (uint32_t i = 0; i < 4; i++)
        add(&bench, (struct aiokvm_net_switch_port_config){ .isolated = i < 2 });
    say(&bench, 2, 9, UNTAGGED);
    heard(&bench);
    uint32_t size = frame(bytes, 9, 2, UNTAGGED);
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, size), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0);
    CHECK_EQ(stats(&bench).dropped_source, 1);
    say(&bench, 1, 2, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x4);
    /* Ports that are not isolated may, and isolated ones among each other. */
    CHECK_EQ(fake_end_send(bench.hosts[3], NULL, bytes, size), NET_TAKEN);
    heard(&bench);
    say(&bench, 1, 2, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x8);
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, frame(bytes, 9, 1, UNTAGGED)), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0xc);
    /* Until the station has been forgotten. */
    fake_now_ns += 301 * SECOND_NS;
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, frame(bytes, 9, 2, UNTAGGED)), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0xc);
    end(&bench);
}

/* 0, 1: VLAN 10. 2: VLAN 20. 3: trunk of 10 and 20. 4: trunk of 20 and 30, 10 without tags. 5: open. */
static struct bench vlans(void)
{
    static const uint16_t TRUNK[] = { 10, 20 }, NATIVE[] = { 20, 30 };
    struct bench bench = setup();
    add(&bench, (struct aiokvm_net_switch_port_config){ .vlan = 10 });
    add(&bench, (struct aiokvm_net_switch_port_config){ .vlan = 10 });
    add(&bench, (struct aiokvm_net_switch_port_config){ .vlan = 20 });
    add(&bench, (struct aiokvm_net_switch_port_config){ .trunk = TRUNK, .trunks = 2 });
    add(&bench, (struct aiokvm_net_switch_port_config){ .trunk = NATIVE, .trunks = 2, .vlan = 10 });
    add(&bench, (struct aiokvm_net_switch_port_config){ 0 });
    return bench;
}

TEST(vlans_are_apart)
{
    struct bench bench = vlans();
    say(&bench, 0, EVERYBODY, UNTAGGED);
    CHECK(got(&bench, 1, 0, EVERYBODY, UNTAGGED));
    CHECK(got(&bench, 3, 0, EVERYBODY, 10));
    CHECK(got(&bench, 4, 0, EVERYBODY, UNTAGGED));
    CHECK_EQ(heard(&bench), 0);
    say(&bench, 2, EVERYBODY, UNTAGGED);
    CHECK(got(&bench, 3, 2, EVERYBODY, 20));
    CHECK(got(&bench, 4, 2, EVERYBODY, 20));
    CHECK_EQ(heard(&bench), 0);
    /* The priority of a tag is kept where there is a tag. */
    say(&bench, 3, EVERYBODY, 0x6014);
    CHECK(got(&bench, 2, 3, EVERYBODY, UNTAGGED));
    CHECK(got(&bench, 4, 3, EVERYBODY, 0x6014));
    CHECK_EQ(heard(&bench), 0);
    say(&bench, 4, EVERYBODY, UNTAGGED);
    CHECK(got(&bench, 3, 4, EVERYBODY, 10));
    CHECK_EQ(heard(&bench), 0x3);
    say(&bench, 5, EVERYBODY, UNTAGGED);
    CHECK_EQ(heard(&bench), 0);
    /* An address is known in its VLAN only. */
    say(&bench, 3, 2, 10);
    CHECK_EQ(heard(&bench), 0x13);
    say(&bench, 3, 2, 20);
    CHECK(got(&bench, 2, 3, 2, UNTAGGED));
    CHECK_EQ(heard(&bench), 0);
    end(&bench);
}

TEST(tags_do_not_let_a_guest_out_of_its_vlan)
{
    struct bench bench = vlans();
    say(&bench, 0, EVERYBODY, 20);
    say(&bench, 0, EVERYBODY, 10);
    say(&bench, 3, EVERYBODY, 30);
    say(&bench, 3, EVERYBODY, UNTAGGED);
    say(&bench, 3, EVERYBODY, 0xfff);
    say(&bench, 4, EVERYBODY, 10);
    CHECK_EQ(heard(&bench), 0);
    CHECK_EQ(stats(&bench).dropped_vlan, 6);
    /* A tag that ends with the frame. */
    uint8_t bytes[64];
    frame(bytes, EVERYBODY, 3, 10);
    CHECK_EQ(fake_end_send(bench.hosts[3], NULL, bytes, 17), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0);
    CHECK_EQ(fake_end_send(bench.hosts[3], NULL, bytes, 18), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0x13);
    /* A tag with a priority and no VLAN is none. */
    say(&bench, 0, EVERYBODY, 0x6000);
    CHECK(got(&bench, 1, 0, EVERYBODY, UNTAGGED));
    CHECK(got(&bench, 3, 0, EVERYBODY, 0x600a));
    CHECK(got(&bench, 4, 0, EVERYBODY, UNTAGGED));
    /* Among open ports a tag is data. */
    add(&bench, (struct aiokvm_net_switch_port_config){ 0 });
    say(&bench, 5, EVERYBODY, 10);
    CHECK(got(&bench, 6, 5, EVERYBODY, 10));
    CHECK_EQ(heard(&bench), 0);
    end(&bench);
}

/* Of as many pieces as a hostile guest may make, with a checksum to fill in: what is behind the tag moves. */
TEST(a_second_tag_leads_nowhere)
{
    struct bench bench = vlans();
    uint8_t bytes[68];
    frame(bytes, EVERYBODY, 0, 0);
    /* Behind the tag of priority, that of a VLAN where the guest has no business; port 4 takes the first one off. */
    memmove(bytes + 20, bytes + 16, sizeof(bytes) - 20);
    memcpy(bytes + 16, "\x81\x00\x00\x1e", 4);
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, sizeof(bytes)), NET_TAKEN);
    CHECK_EQ(bench.hosts[4]->received, 0);
    CHECK_EQ(bench.hosts[3]->received, 1);
    heard(&bench);
    end(&bench);
}

TEST(tags_of_frames_in_pieces)
{
    struct bench bench = vlans();
    uint8_t bytes[1100], expected[1104];
    for (uint32_t i = 0; i < bench.count; i++)
        bench.hosts[i]->end.offloads = AIOKVM_NET_OFFLOAD_CSUM;
    for (uint32_t pieces = 1; pieces <= 1000; pieces += pieces < 30 ? 1 : 97) {
        uint32_t size = frame(bytes, EVERYBODY, 0, UNTAGGED);
        for (uint32_t i = size; i < sizeof(bytes); i++)
            bytes[i] = (uint8_t)(i * pieces);
        struct iovec from[1000], *iov = malloc((pieces + 2) * sizeof(*iov));
        uint8_t head[NET_HEAD];
        for (uint32_t i = 0; i < pieces; i++)
            from[i] = (struct iovec){ bytes + i, i + 1 < pieces ? 1 : sizeof(bytes) - i };
        struct net_frame given = { .hdr = { .flags = 1, .csum_start = 34, .csum_offset = 16 } };
        net_frame_set(&given, iov + 1, head, from, pieces, 0);
        CHECK(net_enter(bench.net));
        CHECK_EQ(net_send(&bench.hosts[0]->end, &given), NET_TAKEN);
        net_leave(bench.net);
        free(iov);
        struct fake_frame *got = &bench.hosts[3]->frames[0];
        memcpy(expected, bytes, 12);
        memcpy(expected + 12, "\x81\x00\x00\x0a", 4);
        memcpy(expected + 16, bytes + 12, sizeof(bytes) - 12);
        CHECK_EQ(bench.hosts[3]->received, 1);
        CHECK_EQ(got->size, sizeof(expected));
        CHECK(!memcmp(got->data, expected, sizeof(expected)));
        CHECK_EQ(got->hdr.csum_start, 38);
        /* And back. */
        fake_end_clear(bench.hosts[0]);
        CHECK_EQ(fake_end_send(bench.hosts[3], &got->hdr, expected, sizeof(expected)), NET_TAKEN);
        CHECK_EQ(bench.hosts[0]->frames[0].size, sizeof(bytes));
        CHECK(!memcmp(bench.hosts[0]->frames[0].data, bytes, sizeof(bytes)));
        CHECK_EQ(bench.hosts[0]->frames[0].hdr.csum_start, 34);
        heard(&bench);
    }
    end(&bench);
}

TEST(a_tag_does_not_make_a_frame_too_long)
{
    struct bench bench = vlans();
    uint8_t *bytes = calloc(1, AIOKVM_NET_MAX_FRAME);
    frame(bytes, EVERYBODY, 0, UNTAGGED);
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, AIOKVM_NET_MAX_FRAME), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0x12);
    struct aiokvm_net_stats trunk;
    aiokvm_net_end_stats(bench.ports[3], &trunk);
    CHECK_EQ(trunk.dropped_invalid, 1);
    free(bytes);
    end(&bench);
}

TEST(a_port_that_is_blocked_does_not_block_others)
{
    struct bench bench = hub(3);
    say(&bench, 1, 9, UNTAGGED);
    say(&bench, 2, 9, UNTAGGED);
    heard(&bench);
    bench.hosts[1]->blocks = true;
    for (int i = 0; i < 300; i++) {
        CHECK_EQ(say(&bench, 0, 1, UNTAGGED), NET_TAKEN);
        CHECK_EQ(say(&bench, 0, 2, UNTAGGED), NET_TAKEN);
    }
    CHECK_EQ(bench.hosts[2]->received, 300);
    struct aiokvm_net_stats port;
    aiokvm_net_end_stats(bench.ports[1], &port);
    CHECK_EQ(port.dropped_full, 300 - 256);
    fake_end_unblock(bench.hosts[1]);
    /* In order: what comes now is behind what waits. */
    CHECK_EQ(say(&bench, 2, 1, UNTAGGED), NET_TAKEN);
    fake_end_serve(bench.net);
    CHECK_EQ(bench.hosts[1]->received, 256);
    CHECK_EQ(say(&bench, 2, 1, UNTAGGED), NET_TAKEN);
    CHECK_EQ(bench.hosts[1]->received, 257);
    end(&bench);
}

static uint64_t used_bytes(void)
{
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES), &state);
    return state.used;
}

/* How many frames of `size` bytes wait for who is blocked, of 250 that come. */
static uint32_t flood(struct bench *bench, uint32_t to, uint32_t size)
{
    static uint8_t bytes[4096];
    struct aiokvm_net_stats before, after;
    frame(bytes, to, 0, UNTAGGED);
    aiokvm_net_end_stats(bench->ports[to], &before);
    for (int i = 0; i < 250; i++)
        CHECK_EQ(fake_end_send(bench->hosts[0], NULL, bytes, size), NET_TAKEN);
    aiokvm_net_end_stats(bench->ports[to], &after);
    return 250 - (uint32_t)(after.dropped_full - before.dropped_full);
}

TEST(a_port_that_is_flooded_leaves_what_another_needs)
{
    struct bench bench = hub(5);
    for (uint32_t i = 1; i < 5; i++)
        say(&bench, i, 9, UNTAGGED);
    heard(&bench);
    for (uint32_t i = 1; i < 5; i++)
        bench.hosts[i]->blocks = true;
    uint64_t idle = used_bytes();
    CHECK_EQ(idle, 5 * NET_ROOM_STEP);
    struct aiokvm_share *others = fake_share_leaving(AIOKVM_BUDGET_FRAME_BYTES, 2 << 20);
    uint32_t wait[5];
    for (uint32_t i = 1; i < 4; i++)
        wait[i] = flood(&bench, i, 4000);
    /* A third of it, a third of what is left... */
    CHECK(wait[1] > 140 && wait[1] < 180);
    CHECK(wait[2] > 90 && wait[2] < 130);
    CHECK(wait[3] > 50 && wait[3] < wait[2]);
    aiokvm_share_add(others, 2 << 20);
    /* Nothing is left: a few frames wait in any case. */
    CHECK(flood(&bench, 4, 4000) >= 16);
    CHECK(used_bytes() >= idle + others->used + wait[1] * 4000 - NET_ROOM_STEP);
    for (uint32_t i = 1; i < 5; i++)
        fake_end_unblock(bench.hosts[i]);
    fake_end_serve(bench.net);
    CHECK_EQ(bench.hosts[1]->received, wait[1]);
    aiokvm_share_free(others);
    CHECK_EQ(used_bytes(), idle);
    end(&bench);
    CHECK_EQ(used_bytes(), 0);
}

TEST(a_flood_that_takes_too_long_goes_on_where_it_was)
{
    struct bench bench = hub(8);
    uint8_t bytes[64];
    struct iovec iov[2] = { [1] = { bytes, frame(bytes, EVERYBODY, 0, UNTAGGED) } };
    struct net_frame frame = { .iov = iov + 1, .count = 1, .size = 60 };
    uint32_t calls = 1;
    for (;; calls++) {
        CHECK(net_enter(bench.net));
        bench.net->is_over = true;
        bench.net->until_ns = 1;
        enum net_result result = net_send(&bench.hosts[0]->end, &frame);
        net_leave(bench.net);
        if (result == NET_TAKEN)
            break;
        /* Nobody resumes it but the next turn. */
        CHECK(!bench.hosts[0]->resumed);
        fake_end_serve(bench.net);
        CHECK(bench.hosts[0]->resumed);
        bench.hosts[0]->resumed = false;
    }
    CHECK_EQ(calls, 7);
    for (uint32_t i = 1; i < 8; i++)
        CHECK_EQ(bench.hosts[i]->received, 1);
    CHECK_EQ(stats(&bench).flooded, 1);
    end(&bench);
}

static void teach(struct bench *bench, uint32_t host, uint32_t address)
{
    uint8_t bytes[64];
    uint32_t size = frame(bytes, EVERYBODY, address & 0xffff, UNTAGGED);
    bytes[8] = (uint8_t)(address >> 16);
    bytes[3] = bytes[4] = 0xff;
    CHECK_EQ(fake_end_send(bench->hosts[host], NULL, bytes, size), NET_TAKEN);
    heard(bench);
}

TEST(one_guest_cannot_push_out_the_addresses_of_others)
{
    struct bench bench = hub(3);
    static struct aiokvm_net_switch_entry entries[AIOKVM_NET_SWITCH_ADDRESSES + 1];
    say(&bench, 0, 9, UNTAGGED);
    for (uint32_t i = 0; i < 3000; i++)
        teach(&bench, 1, 0x10000 + i);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, LENGTH(entries)), 1 + AIOKVM_NET_SWITCH_PORT_ADDRESSES);
    CHECK_EQ(stats(&bench).forgotten, 3000 - AIOKVM_NET_SWITCH_PORT_ADDRESSES);
    say(&bench, 2, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x1);
    /* What moves to a port that has taught all it may: its oldest goes. */
    uint8_t bytes[64];
    CHECK_EQ(fake_end_send(bench.hosts[1], NULL, bytes, frame(bytes, 9, 0, UNTAGGED)), NET_TAKEN);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, LENGTH(entries)), 1 + AIOKVM_NET_SWITCH_PORT_ADDRESSES);
    end(&bench);
}

TEST(a_full_table_has_room_for_those_with_few_addresses)
{
    int error;
    struct bench bench = hub(8);
    static struct aiokvm_net_switch_entry entries[AIOKVM_NET_SWITCH_ADDRESSES + 1];
    for (uint32_t i = 0; i < AIOKVM_NET_SWITCH_ADDRESSES; i++)
        teach(&bench, i % 8, i);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, LENGTH(entries)), AIOKVM_NET_SWITCH_ADDRESSES);
    struct aiokvm_net_end *port = aiokvm_net_switch_port_new(
        bench.sw, &(struct aiokvm_net_switch_port_config){ 0 }, &error);
    CHECK(port);
    struct fake_end *late = fake_end_new(bench.net, 0);
    CHECK_EQ(aiokvm_net_link(port, &late->end), 0);
    uint8_t bytes[64];
    CHECK_EQ(fake_end_send(late, NULL, bytes, frame(bytes, EVERYBODY, 0xfffe, UNTAGGED)), NET_TAKEN);
    heard(&bench);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, LENGTH(entries)), AIOKVM_NET_SWITCH_ADDRESSES);
    frame(bytes, 0xfe, 1, UNTAGGED);
    bytes[4] = 0xff;
    CHECK_EQ(fake_end_send(bench.hosts[0], NULL, bytes, 60), NET_TAKEN);
    CHECK_EQ(late->received, 1);
    CHECK_EQ(heard(&bench), 0);
    end(&bench);
}

TEST(a_port_takes_its_addresses_along)
{
    struct bench bench = hub(3);
    struct aiokvm_net_switch_entry entries[4];
    say(&bench, 0, 9, UNTAGGED);
    say(&bench, 1, 9, UNTAGGED);
    aiokvm_net_end_free(bench.ports[0]);
    heard(&bench);
    CHECK_EQ(aiokvm_net_switch_table(bench.sw, entries, 4), 1);
    say(&bench, 2, 0, UNTAGGED);
    CHECK_EQ(heard(&bench), 0x2);
    CHECK_EQ(say(&bench, 0, 1, UNTAGGED), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0);
    /* A switch that goes first leaves ports that hear nothing. */
    aiokvm_net_switch_free(bench.sw);
    CHECK_EQ(say(&bench, 1, 2, UNTAGGED), NET_TAKEN);
    CHECK_EQ(heard(&bench), 0);
    aiokvm_net_free(bench.net);
}

TEST(ports_are_bounded_and_have_vlans_that_exist)
{
    struct bench bench = setup();
    int error = 0;
    const uint16_t wrong[][1] = { { 0 }, { 4095 }, { 0xffff } };
    for (size_t i = 0; i < LENGTH(wrong); i++) {
        const struct aiokvm_net_switch_port_config config = { .trunk = wrong[i], .trunks = 1 };
        CHECK(!aiokvm_net_switch_port_new(bench.sw, &config, &error));
        CHECK_EQ(error, EINVAL);
    }
    CHECK(!aiokvm_net_switch_port_new(bench.sw, &(struct aiokvm_net_switch_port_config){ .vlan = 4095 }, &error));
    CHECK_EQ(error, EINVAL);
    for (int i = 0; i < AIOKVM_NET_SWITCH_PORTS; i++)
        CHECK(aiokvm_net_switch_port_new(bench.sw, &(struct aiokvm_net_switch_port_config){ 0 }, &error));
    CHECK(!aiokvm_net_switch_port_new(bench.sw, &(struct aiokvm_net_switch_port_config){ 0 }, &error));
    CHECK_EQ(error, ENOSPC);
    end(&bench);
}

/* Two switches that are linked twice, which nobody should do: frames die out. */
TEST(a_loop_ends)
{
    struct bench bench = hub(1);
    int error;
    const struct aiokvm_net_switch_config config = { .ageing_ns = SECOND_NS };
    struct aiokvm_net_switch *other = aiokvm_net_switch_new(bench.net, &config, &error);
    for (int i = 0; i < 2; i++) {
        const struct aiokvm_net_switch_port_config open = { 0 };
        struct aiokvm_net_end *one = aiokvm_net_switch_port_new(bench.sw, &open, &error);
        CHECK_EQ(aiokvm_net_link(one, aiokvm_net_switch_port_new(other, &open, &error)), 0);
    }
    say(&bench, 0, EVERYBODY, UNTAGGED);
    fake_end_serve(bench.net);
    CHECK(bench.hosts[0]->received < 10);
    aiokvm_net_switch_free(other);
    end(&bench);
}

TEST(a_child_of_fork_has_no_switch)
{
    struct bench bench = hub(2);
    say(&bench, 0, 9, UNTAGGED);
    pid_t pid = fork();
    if (pid == 0) {
        struct aiokvm_net_switch_entry entry;
        bool right = aiokvm_net_switch_table(bench.sw, &entry, 1) == -EOWNERDEAD && !stats(&bench).learned;
        aiokvm_net_end_free(bench.ports[0]);
        aiokvm_net_switch_free(bench.sw);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    CHECK_EQ(stats(&bench).learned, 1);
    heard(&bench);
    end(&bench);
}

/* A day's frames, with addresses that come and go: nothing is left behind. */
TEST(many_frames_do_not_make_it_grow)
{
    struct bench bench = hub(3);
    static struct aiokvm_net_switch_entry entries[AIOKVM_NET_SWITCH_ADDRESSES];
    uint8_t bytes[64];
    uint32_t size = frame(bytes, 1, 0, UNTAGGED);
    struct iovec iov[2] = { [1] = { bytes, size } };
    say(&bench, 1, 9, UNTAGGED);
    for (uint32_t sent = 0; sent < 10000000;) {
        fake_end_clear(bench.hosts[1]);
        CHECK(net_enter(bench.net));
        for (int i = 0; i < 64; i++, sent++) {
            if (sent % 16 == 0)
                memcpy(bytes + 7, &sent, 4);
            struct net_frame frame = { .iov = iov + 1, .count = 1, .size = size };
            bench.hosts[1]->kept = 256; /* which it need not keep */
            CHECK_EQ(net_send(&bench.hosts[0]->end, &frame), NET_TAKEN);
        }
        bench.hosts[1]->kept = 0;
        net_leave(bench.net);
        CHECK_EQ(bench.hosts[1]->received, 64);
        fake_now_ns += SECOND_NS / 1000;
    }
    CHECK(aiokvm_net_switch_table(bench.sw, entries, LENGTH(entries)) <= 1 + AIOKVM_NET_SWITCH_PORT_ADDRESSES);
    heard(&bench);
    end(&bench);
}
