/* Rules, flows and questions. The end `here` has the filter, the guest is its peer. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "net_fake.h"
#include "net_filter.h"
#include "net_flow.h"

enum { TCP = 6, UDP = 17, ICMP = 1, ICMP6 = 58, FRAGMENT = 44, HOPOPTS = 0 };
enum { DENY = AIOKVM_NET_DENY, ALLOW = AIOKVM_NET_ALLOW, ASK = AIOKVM_NET_ASK };
enum { EGRESS = AIOKVM_NET_EGRESS, INGRESS = AIOKVM_NET_INGRESS, BOTH = EGRESS | INGRESS };

static const uint8_t GUEST[4] = { 10, 0, 0, 1 }, HOST[4] = { 192, 168, 7, 9 };
static const uint8_t GUEST6[16] = { 0xfd, 1, [15] = 1 }, HOST6[16] = { 0xfd, 2, [15] = 2 };

struct packet {
    uint8_t data[600];
    uint32_t size, network, transport;
};

static void store(uint8_t *at, uint32_t value, int bytes)
{
    for (int i = bytes; i-- > 0; value >>= 8)
        at[i] = (uint8_t)value;
}

static void ethernet(struct packet *packet, uint32_t tags, uint32_t type)
{
    memset(packet, 0, sizeof(*packet));
    memcpy(packet->data, "\2\0\0\0\0\1\2\0\0\0\0\2", 12);
    uint32_t at = 12;
    for (; tags; tags--, at += 4)
        store(packet->data + at, 0x81000005, 4);
    store(packet->data + at, type, 2);
    packet->network = at + 2;
    packet->size = at + 2 + 46;
}

static void ipv4_at(uint8_t *at, const uint8_t *src, const uint8_t *dst, uint8_t protocol, uint32_t size)
{
    at[0] = 0x45;
    store(at + 2, size, 2);
    at[9] = protocol;
    memcpy(at + 12, src, 4);
    memcpy(at + 16, dst, 4);
}

static struct packet ipv4(const uint8_t *src, const uint8_t *dst, uint8_t protocol, uint32_t src_port,
                          uint32_t dst_port)
{
    struct packet packet;
    ethernet(&packet, 0, 0x800);
    packet.size = packet.network + 60;
    packet.transport = packet.network + 20;
    ipv4_at(packet.data + packet.network, src, dst, protocol, 60);
    store(packet.data + packet.transport, src_port, 2);
    store(packet.data + packet.transport + 2, dst_port, 2);
    return packet;
}

static struct packet ipv6(const uint8_t *src, const uint8_t *dst, uint8_t protocol, uint32_t src_port,
                          uint32_t dst_port)
{
    struct packet packet;
    ethernet(&packet, 0, 0x86dd);
    uint8_t *network = packet.data + packet.network;
    packet.transport = packet.network + 40;
    packet.size = packet.transport + 40;
    network[0] = 0x60;
    store(network + 4, 40, 2);
    network[6] = protocol;
    memcpy(network + 8, src, 16);
    memcpy(network + 24, dst, 16);
    store(packet.data + packet.transport, src_port, 2);
    store(packet.data + packet.transport + 2, dst_port, 2);
    return packet;
}

/* Puts an extension header of so many bytes before the transport's. */
static void extend(struct packet *packet, uint8_t type, uint32_t size)
{
    uint8_t *network = packet->data + packet->network, *at = packet->data + packet->transport;
    memmove(at + size, at, packet->size - packet->transport);
    memset(at, 0, size);
    at[0] = network[6];
    at[1] = type == FRAGMENT ? 0 : (uint8_t)(size / 8 - 1);
    network[6] = type;
    packet->transport += size;
    packet->size += size;
    store(network + 4, packet->size - packet->network - 40, 2);
}

struct fixture {
    struct aiokvm_net *net;
    struct fake_end *here, *guest;
    struct aiokvm_net_filter *filter;
};

static struct fixture start(const struct aiokvm_net_rule *rules, uint32_t count)
{
    int error = 0;
    struct fixture fixture = { .net = aiokvm_net_new(NULL, &error) };
    fixture.here = fake_end_new(fixture.net, 0);
    fixture.guest = fake_end_new(fixture.net, 0);
    CHECK_EQ(aiokvm_net_link(&fixture.here->end, &fixture.guest->end), 0);
    fixture.filter = aiokvm_net_filter_new(&fixture.here->end, rules, count, &error);
    CHECK_EQ(error, 0);
    aiokvm_net_set_policy(&fixture.here->end, fixture.filter, NULL, NULL, NULL);
    return fixture;
}

static void stop(struct fixture *fixture)
{
    aiokvm_net_free(fixture->net);
    aiokvm_net_filter_free(fixture->filter);
}

static bool passes(struct fixture *fixture, struct packet packet, int direction)
{
    struct fake_end *to = direction == EGRESS ? fixture->here : fixture->guest;
    struct fake_end *from = direction == EGRESS ? fixture->guest : fixture->here;
    struct aiokvm_net_stats before, after;
    aiokvm_net_end_stats(&from->end, &before);
    fake_end_clear(to);
    fake_end_send(from, NULL, packet.data, packet.size);
    aiokvm_net_end_stats(&from->end, &after);
    CHECK_EQ(after.dropped_filtered - before.dropped_filtered, !to->received);
    return to->received;
}

#define START(...)                                                    \
    static const struct aiokvm_net_rule rules_[] = { __VA_ARGS__ };   \
    struct fixture fixture = start(rules_, LENGTH(rules_))

static struct packet tcp_out(uint32_t port) { return ipv4(GUEST, HOST, TCP, 1000, port); }
static struct packet tcp_back(uint32_t port) { return ipv4(HOST, GUEST, TCP, port, 1000); }

TEST(the_first_rule_that_matches_decides_and_what_none_matches_passes)
{
    START({ .verdict = DENY, .directions = BOTH, .has = AIOKVM_NET_HAS_DST_PORT, .dst_ports = { 20, 25 } },
          { .verdict = ALLOW, .directions = BOTH, .has = AIOKVM_NET_HAS_DST, .dst = { 192, 168, 7, 0 }, .dst_bits = 29,
            .address_size = 4 },
          { .verdict = ALLOW, .directions = BOTH, .has = AIOKVM_NET_HAS_DST, .dst = { 192, 168, 0, 0 }, .dst_bits = 21,
            .address_size = 4 },
          { .verdict = DENY, .directions = EGRESS, .has = AIOKVM_NET_HAS_PROTOCOL, .protocol = UDP });
    CHECK(!passes(&fixture, tcp_out(20), EGRESS));
    CHECK(!passes(&fixture, tcp_out(25), EGRESS));
    CHECK(passes(&fixture, tcp_out(26), EGRESS));
    CHECK(!passes(&fixture, tcp_out(25), INGRESS));
    static const uint8_t NEAR[4] = { 192, 168, 6, 1 }, FAR[4] = { 192, 168, 8, 1 };
    CHECK(passes(&fixture, ipv4(GUEST, NEAR, UDP, 1, 2), EGRESS));
    CHECK(!passes(&fixture, ipv4(GUEST, FAR, UDP, 1, 2), EGRESS));
    CHECK(passes(&fixture, ipv4(GUEST, FAR, UDP, 1, 2), INGRESS));
    CHECK(!passes(&fixture, ipv6(GUEST6, HOST6, UDP, 1, 2), EGRESS));
    CHECK(passes(&fixture, ipv6(GUEST6, HOST6, TCP, 1, 2), EGRESS));
    stop(&fixture);
}

TEST(addresses_of_the_link_and_types_are_looked_at)
{
    START({ .verdict = DENY, .directions = BOTH, .has = AIOKVM_NET_HAS_ETHERTYPE, .ethertype = 0x806 },
          { .verdict = DENY, .directions = BOTH, .has = AIOKVM_NET_HAS_DST_MAC, .dst_mac = { 2, 0, 0, 0, 0, 9 } },
          { .verdict = DENY, .directions = BOTH, .has = AIOKVM_NET_HAS_SRC_MAC, .src_mac = { 2, 0, 0, 0, 0, 9 } });
    struct packet packet;
    ethernet(&packet, 0, 0x806);
    CHECK(!passes(&fixture, packet, EGRESS));
    ethernet(&packet, 2, 0x806);
    CHECK(!passes(&fixture, packet, EGRESS));
    /* More tags than can be: it might be anything. */
    ethernet(&packet, 3, 0x800);
    CHECK(!passes(&fixture, packet, EGRESS));
    ethernet(&packet, 0, 0x88cc);
    CHECK(passes(&fixture, packet, EGRESS));
    packet.data[5] = 9;
    CHECK(!passes(&fixture, packet, EGRESS));
    packet.data[5] = 1;
    packet.data[11] = 9;
    CHECK(!passes(&fixture, packet, INGRESS));
    stop(&fixture);
}

TEST(icmp_has_types)
{
    START({ .verdict = ALLOW, .directions = BOTH, .has = AIOKVM_NET_HAS_PROTOCOL | AIOKVM_NET_HAS_ICMP_TYPE,
            .protocol = ICMP6, .icmp_types = { 133, 136 } },
          { .verdict = DENY, .directions = BOTH });
    for (uint32_t type = 128; type < 140; type++)
        CHECK_EQ(passes(&fixture, ipv6(GUEST6, HOST6, ICMP6, type << 8, 0), EGRESS), type >= 133 && type <= 136);
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, ICMP6, 133 << 8, 0), EGRESS));
    stop(&fixture);
}

TEST(replies_of_what_was_allowed_pass)
{
    START({ .verdict = ALLOW, .directions = EGRESS }, { .verdict = DENY, .directions = BOTH });
    CHECK(!passes(&fixture, tcp_back(80), INGRESS));
    CHECK(passes(&fixture, tcp_out(80), EGRESS));
    CHECK(passes(&fixture, tcp_back(80), INGRESS));
    CHECK(!passes(&fixture, tcp_back(81), INGRESS));
    CHECK(!passes(&fixture, ipv4(HOST, GUEST, UDP, 80, 1000), INGRESS));
    /* The same from the other side: somebody who has the guest's address. */
    CHECK(!passes(&fixture, tcp_out(80), INGRESS));
    CHECK(passes(&fixture, ipv6(GUEST6, HOST6, UDP, 5, 6), EGRESS));
    CHECK(passes(&fixture, ipv6(HOST6, GUEST6, UDP, 6, 5), INGRESS));
    CHECK(!passes(&fixture, ipv6(HOST6, GUEST6, UDP, 5, 6), INGRESS));
    /* Ports and addresses that are the same on both sides. */
    CHECK(passes(&fixture, ipv4(GUEST, HOST, UDP, 123, 123), EGRESS));
    CHECK(passes(&fixture, ipv4(HOST, GUEST, UDP, 123, 123), INGRESS));
    stop(&fixture);
}

TEST(an_echo_is_answered_and_errors_find_their_flow)
{
    START({ .verdict = ALLOW, .directions = EGRESS }, { .verdict = DENY, .directions = BOTH });
    struct packet echo = ipv4(GUEST, HOST, ICMP, 8 << 8, 0), reply = ipv4(HOST, GUEST, ICMP, 0, 0);
    store(echo.data + echo.transport + 4, 77, 2);
    store(reply.data + reply.transport + 4, 77, 2);
    CHECK(!passes(&fixture, reply, INGRESS));
    CHECK(passes(&fixture, echo, EGRESS));
    CHECK(passes(&fixture, reply, INGRESS));
    store(reply.data + reply.transport + 4, 78, 2);
    CHECK(!passes(&fixture, reply, INGRESS));
    /* A request with the same number is no reply. */
    struct packet request = ipv4(HOST, GUEST, ICMP, 8 << 8, 0);
    store(request.data + request.transport + 4, 77, 2);
    CHECK(!passes(&fixture, request, INGRESS));

    /* A reply that nobody asked for begins nothing. */
    static const uint8_t OTHER[4] = { 192, 168, 7, 10 };
    CHECK(passes(&fixture, ipv4(GUEST, OTHER, ICMP, 0, 0), EGRESS));
    CHECK(!passes(&fixture, ipv4(OTHER, GUEST, ICMP, 0, 0), INGRESS));

    /* A router says that a packet of the guest's was too big. */
    static const uint8_t ROUTER[4] = { 10, 9, 9, 9 };
    struct packet error = ipv4(ROUTER, GUEST, ICMP, 3 << 8 | 4, 0);
    ipv4_at(error.data + error.transport + 8, GUEST, HOST, TCP, 1500);
    store(error.data + error.transport + 28, 1000, 2);
    store(error.data + error.transport + 30, 80, 2);
    CHECK(!passes(&fixture, error, INGRESS));
    CHECK(passes(&fixture, tcp_out(80), EGRESS));
    CHECK(passes(&fixture, error, INGRESS));
    store(error.data + error.transport + 30, 81, 2);
    CHECK(!passes(&fixture, error, INGRESS));
    stop(&fixture);
}

TEST(a_rule_may_have_no_replies)
{
    START({ .verdict = ALLOW, .directions = EGRESS, .has = AIOKVM_NET_NO_REPLIES },
          { .verdict = DENY, .directions = BOTH });
    CHECK(passes(&fixture, tcp_out(80), EGRESS));
    CHECK(!passes(&fixture, tcp_back(80), INGRESS));
    stop(&fixture);
}

TEST(fragments_follow_their_first)
{
    START({ .verdict = ALLOW, .directions = EGRESS, .has = AIOKVM_NET_HAS_DST_PORT, .dst_ports = { 53, 53 } },
          { .verdict = DENY, .directions = BOTH });
    struct packet first = ipv4(GUEST, HOST, UDP, 1000, 53), later = first, back;
    store(first.data + first.network + 4, 0xbeef, 2);
    store(later.data + first.network + 4, 0xbeef, 2);
    store(first.data + first.network + 6, 0x2000, 2);
    store(later.data + first.network + 6, 5, 2);
    CHECK(!passes(&fixture, later, EGRESS));
    CHECK(passes(&fixture, first, EGRESS));
    CHECK(passes(&fixture, later, EGRESS));
    CHECK(!passes(&fixture, later, INGRESS));
    store(later.data + first.network + 4, 0xbeee, 2);
    CHECK(!passes(&fixture, later, EGRESS));
    /* Those of a reply too. */
    back = ipv4(HOST, GUEST, UDP, 53, 1000);
    store(back.data + back.network + 6, 0x2000, 2);
    CHECK(passes(&fixture, back, INGRESS));
    store(back.data + back.network + 6, 0x2005, 2);
    CHECK(passes(&fixture, back, INGRESS));

    first = ipv6(GUEST6, HOST6, UDP, 1000, 53);
    extend(&first, FRAGMENT, 8);
    store(first.data + first.network + 42, 1, 2);
    store(first.data + first.network + 44, 0x12345678, 4);
    later = first;
    store(later.data + first.network + 42, 24, 2);
    CHECK(!passes(&fixture, later, EGRESS));
    CHECK(passes(&fixture, first, EGRESS));
    CHECK(passes(&fixture, later, EGRESS));
    later.data[first.network + 44] = 0;
    CHECK(!passes(&fixture, later, EGRESS));
    stop(&fixture);
}

TEST(headers_that_are_not_whole_do_not_pass)
{
    START({ .verdict = DENY, .directions = BOTH, .has = AIOKVM_NET_HAS_DST_PORT, .dst_ports = { 25, 25 } });
    struct packet packet = tcp_out(80);
    CHECK(passes(&fixture, packet, EGRESS));
    /* RFC 1858: a first fragment with half of a header, and one that is laid over it. */
    store(packet.data + packet.network + 6, 0x2000, 2);
    store(packet.data + packet.network + 2, 28, 2);
    CHECK(!passes(&fixture, packet, EGRESS));
    packet = tcp_out(80);
    store(packet.data + packet.network + 6, 1, 2);
    CHECK(!passes(&fixture, packet, EGRESS));
    packet = ipv4(GUEST, HOST, UDP, 1, 2);
    packet.size = packet.transport + 7;
    CHECK(!passes(&fixture, packet, EGRESS));
    /* An IP header that lies: it might be for the port that is denied. */
    packet = tcp_out(80);
    packet.data[packet.network] = 0x4f;
    packet.size = packet.network + 30;
    CHECK(!passes(&fixture, packet, EGRESS));
    packet = tcp_out(80);
    packet.data[packet.network] = 0x65;
    CHECK(!passes(&fixture, packet, EGRESS));
    stop(&fixture);
}

TEST(what_cannot_be_seen_is_denied_by_who_denies_and_not_allowed_by_who_allows)
{
    struct packet far = ipv6(GUEST6, HOST6, TCP, 1000, 80), near = far;
    extend(&near, HOPOPTS, 16);
    extend(&far, HOPOPTS, 240);
    {
        START({ .verdict = DENY, .directions = BOTH, .has = AIOKVM_NET_HAS_DST_PORT, .dst_ports = { 25, 25 } });
        CHECK(passes(&fixture, near, EGRESS));
        CHECK(!passes(&fixture, far, EGRESS));
        stop(&fixture);
    }
    {
        START({ .verdict = ALLOW, .directions = BOTH, .has = AIOKVM_NET_HAS_PROTOCOL, .protocol = TCP },
              { .verdict = DENY, .directions = BOTH });
        CHECK(passes(&fixture, near, EGRESS));
        CHECK(!passes(&fixture, far, EGRESS));
        stop(&fixture);
    }
}

TEST(rules_are_replaced_and_flows_have_to_please_the_new_ones)
{
    START({ .verdict = ALLOW, .directions = EGRESS }, { .verdict = DENY, .directions = BOTH });
    CHECK(passes(&fixture, tcp_out(80), EGRESS));
    CHECK(passes(&fixture, tcp_out(90), EGRESS));
    static const struct aiokvm_net_rule other[] = {
        { .verdict = ALLOW, .directions = EGRESS, .has = AIOKVM_NET_HAS_DST_PORT | AIOKVM_NET_HAS_DST_MAC,
          .dst_ports = { 80, 80 }, .dst_mac = { 2, 0, 0, 0, 0, 2 } },
        { .verdict = DENY, .directions = BOTH },
    };
    CHECK_EQ(aiokvm_net_filter_replace(fixture.filter, other, LENGTH(other)), 0);
    CHECK(passes(&fixture, tcp_back(80), INGRESS));
    CHECK(passes(&fixture, tcp_back(80), INGRESS));
    CHECK(!passes(&fixture, tcp_back(90), INGRESS));
    CHECK_EQ(aiokvm_net_filter_replace(fixture.filter, other, AIOKVM_NET_MAX_RULES + 1), -E2BIG);
    CHECK_EQ(aiokvm_net_filter_replace(fixture.filter, NULL, 0), 0);
    CHECK(passes(&fixture, tcp_back(90), INGRESS));
    stop(&fixture);
}

TEST(the_program_is_asked_once_and_the_first_frame_waits)
{
    START({ .verdict = ASK, .directions = EGRESS, .hook = 3 }, { .verdict = DENY, .directions = INGRESS });
    struct aiokvm_net_flow flow;
    struct aiokvm_net_news news;
    uint8_t frame[600];
    struct packet packet = tcp_out(80);
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, sizeof(frame)), 0);
    CHECK(!passes(&fixture, packet, EGRESS));
    CHECK(!passes(&fixture, packet, EGRESS));
    CHECK_EQ(aiokvm_net_take(fixture.net, &news), 1);
    CHECK_EQ(news.end, aiokvm_net_end_id(&fixture.here->end));
    CHECK_EQ(news.news, AIOKVM_NET_NEWS_FLOW);
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, sizeof(frame)), 1);
    CHECK_EQ(flow.hook, 3);
    CHECK(flow.egress && flow.has_ports);
    CHECK_EQ(flow.protocol, TCP);
    CHECK_EQ(flow.src_port, 1000);
    CHECK_EQ(flow.dst_port, 80);
    CHECK_EQ(flow.address_size, 4);
    CHECK(!memcmp(flow.src, GUEST, 4) && !memcmp(flow.dst, HOST, 4));
    CHECK_EQ(flow.frame_size, packet.size);
    CHECK(!memcmp(frame, packet.data, packet.size));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, sizeof(frame)), 0);
    CHECK(!passes(&fixture, tcp_back(80), INGRESS));
    /* The frame that waited comes, and is not counted as filtered. */
    fake_end_clear(fixture.here);
    CHECK_EQ(aiokvm_net_filter_decide(fixture.filter, flow.id, 1), 0);
    CHECK_EQ(fixture.here->received, 1);
    CHECK(!memcmp(fixture.here->frames[0].data, packet.data, packet.size));
    struct aiokvm_net_stats stats;
    aiokvm_net_end_stats(&fixture.guest->end, &stats);
    CHECK_EQ(stats.dropped_filtered, 1);
    CHECK_EQ(aiokvm_net_filter_decide(fixture.filter, flow.id, 1), -ENOENT);
    CHECK(passes(&fixture, packet, EGRESS));
    CHECK(passes(&fixture, tcp_back(80), INGRESS));
    /* Another is another. */
    CHECK(!passes(&fixture, tcp_out(81), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    CHECK_EQ(aiokvm_net_filter_decide(fixture.filter, flow.id, 0), 0);
    CHECK(!passes(&fixture, tcp_out(81), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 0);
    /* Until it is forgotten. */
    aiokvm_net_filter_forget(fixture.filter, 3);
    CHECK(!passes(&fixture, packet, EGRESS));
    CHECK(!passes(&fixture, tcp_out(81), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    CHECK_EQ(flow.dst_port, 80);
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    CHECK_EQ(flow.dst_port, 81);
    /* Other rules: nobody waits for an answer any more. */
    CHECK_EQ(aiokvm_net_filter_replace(fixture.filter, rules_, LENGTH(rules_)), 0);
    CHECK_EQ(aiokvm_net_filter_decide(fixture.filter, flow.id, 1), -ENOENT);
    CHECK(!passes(&fixture, packet, EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    stop(&fixture);
}

TEST(what_the_program_cannot_be_asked_about_does_not_pass)
{
    START({ .verdict = ASK, .directions = BOTH });
    struct packet packet;
    ethernet(&packet, 0, 0x806);
    CHECK(passes(&fixture, packet, EGRESS));
    ethernet(&packet, 3, 0x800);
    CHECK(!passes(&fixture, packet, EGRESS));
    packet = ipv4(GUEST, HOST, UDP, 1, 2);
    store(packet.data + packet.network + 6, 5, 2);
    CHECK(!passes(&fixture, packet, EGRESS));
    packet = ipv6(GUEST6, HOST6, TCP, 1000, 80);
    extend(&packet, HOPOPTS, 240);
    CHECK(!passes(&fixture, packet, EGRESS));
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, ICMP, 3 << 8, 0), EGRESS));
    struct aiokvm_net_flow flow;
    uint8_t frame[10];
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 0);
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, ICMP, 8 << 8, 0), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    stop(&fixture);
}

TEST(questions_are_bounded)
{
    START({ .verdict = ASK, .directions = BOTH });
    struct aiokvm_net_flow flow;
    uint8_t frame[10];
    uint32_t asked = 0;
    for (uint32_t i = 0; i < 20000; i++)
        CHECK(!passes(&fixture, ipv4(GUEST, HOST, UDP, i & 0xff, i), EGRESS));
    while (aiokvm_net_filter_take(fixture.filter, &flow, frame, 10) == 1)
        asked++;
    CHECK_EQ(asked, 64);
    CHECK_EQ(aiokvm_net_filter_decide(fixture.filter, flow.id, 1), 0);
    CHECK(passes(&fixture, ipv4(GUEST, HOST, UDP, flow.src_port, flow.dst_port), EGRESS));
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, UDP, 50000, 50000), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    CHECK_EQ(flow.dst_port, 50000);
    stop(&fixture);
}

TEST(questions_take_of_what_frames_that_wait_may_have)
{
    START({ .verdict = ASK, .directions = BOTH });
    struct aiokvm_net_flow flow;
    uint8_t frame[10];
    struct aiokvm_share *others = fake_share_leaving(AIOKVM_BUDGET_FRAME_BYTES, 100);
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, UDP, 1, 1), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 0);
    aiokvm_share_free(others);
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, UDP, 1, 1), EGRESS));
    CHECK_EQ(aiokvm_net_filter_take(fixture.filter, &flow, frame, 10), 1);
    struct aiokvm_budget_state state;
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES), &state);
    CHECK_EQ(state.used, flow.frame_size);
    CHECK_EQ(aiokvm_net_filter_decide(fixture.filter, flow.id, 0), 0);
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES), &state);
    CHECK_EQ(state.used, 0);
    CHECK(!passes(&fixture, ipv4(GUEST, HOST, UDP, 2, 2), EGRESS));
    stop(&fixture);
    aiokvm_budget_state(aiokvm_budget_of_process(AIOKVM_BUDGET_FRAME_BYTES), &state);
    CHECK_EQ(state.used, 0);
    CHECK_EQ(state.shares, 0);
}

TEST(a_flood_of_flows_leaves_the_newest)
{
    START({ .verdict = ALLOW, .directions = EGRESS }, { .verdict = DENY, .directions = BOTH });
    for (uint32_t i = 0; i < 100000; i++) {
        CHECK(passes(&fixture, ipv4(GUEST, HOST, UDP, i >> 8 & 0xffff, i & 0xffff), EGRESS));
        if (i % 100 == 0)
            CHECK(passes(&fixture, ipv4(HOST, GUEST, UDP, i & 0xffff, i >> 8 & 0xffff), INGRESS));
    }
    stop(&fixture);
}

TEST(flows_end_by_themselves)
{
    struct net_flows *flows = net_flows_new();
    struct net_flow_key key;
    net_flow_key_set(&key, GUEST, HOST, 4, 1, 2, true);
    key.protocol = UDP;
    uint64_t now_ns = 1000;
    struct net_flow *flow = net_flows_get(flows, &key, now_ns);
    flow->state = NET_FLOW_ALLOWED;
    net_flow_use(flow, now_ns);
    CHECK(net_flows_find(flows, &key, now_ns + UINT64_C(299) * 1000000000) == flow);
    CHECK(!net_flows_find(flows, &key, now_ns + UINT64_C(300) * 1000000000));
    flow->state = NET_FLOW_ASKED;
    CHECK(net_flows_find(flows, &key, UINT64_MAX) == flow);
    struct net_flow_key reply;
    net_flow_key_set(&reply, HOST, GUEST, 4, 2, 1, false);
    reply.protocol = UDP;
    CHECK(!memcmp(&key, &reply, sizeof(key)));
    free(flows);
}
