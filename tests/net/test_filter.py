"""net/filter.py: rules, as the program writes them and as frames meet them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from aiokvm import ConfigError, net
from tests.net.packets import TCP, UDP, ethernet, icmp, pass_last, passing, tcp, udp

pytestmark = pytest.mark.anyio
Linked = Any
A, B, C = "10.0.0.1", "192.168.7.9", "203.0.113.5"
A6, B6 = "fd01::1", "fd02::2"


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        ({"direction": "out"}, "direction='out': give 'egress' or 'ingress'"),
        ({"src": "10.0.0.1/8"}, "src: 10.0.0.1/8 has host bits set"),
        ({"dst": "example.org"}, "dst: 'example.org' does not appear"),
        ({"src": A, "dst": A6}, "different versions"),
        ({"src_mac": "52:54:00:00:00"}, "no MAC address"),
        ({"protocol": "gre"}, "none of arp, dccp, icmp"),
        ({"protocol": 256}, "256 is none of"),
        ({"protocol": "arp", "src": A}, "arp has no addresses of IPv4"),
        ({"protocol": "ipv6", "src": A}, "ipv6 has no addresses of IPv4"),
        ({"protocol": "icmp", "dst_port": 80}, "icmp has no ports"),
        ({"protocol": "arp", "dst_port": 80}, "arp has no ports"),
        ({"dst_port": 65536}, "dst_port 65536 is no number from 0 to 65535"),
        ({"dst_port": (90, 80)}, "ends before it begins"),
        ({"dst_port": (1, 2, 3)}, r"give a whole number or a tuple of 2 \(a whole number, a whole"),
        ({"dst_port": ("80", 90)}, r"give a whole number or a tuple of 2 \(a whole number, a whole"),
        ({"dst_port": "9" * 5000}, "no range like '80-90'"),
        ({"src_port": "80-"}, "no range like '80-90'"),
        ({"src_port": "http"}, "no range like '80-90'"),
        ({"icmp_type": 8}, "icmp_type needs protocol"),
        ({"protocol": "icmp", "icmp_type": 256}, "icmp_type 256"),
    ],
)
def test_rules_that_cannot_be(conditions: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        net.allow(**conditions)
    with pytest.raises(ConfigError, match=says):
        net.deny(**conditions)


def test_rules_are_what_was_said() -> None:
    rule = net.allow(src="10.0.0.0/8", protocol="tcp", dst_port="80-90", src_port=(1, 2))
    assert rule.src == ipaddress.ip_network("10.0.0.0/8")
    assert (rule.protocol, rule.dst_ports, rule.src_ports) == (TCP, (80, 90), (1, 2))
    assert net.allow(dst_port="53") == net.allow(dst_port=53)
    assert net.allow(protocol="udp") == net.allow(protocol=UDP)


def test_filters_are_rules_and_hooks() -> None:
    with pytest.raises(ConfigError, match=r"filters=\['deny'\]: give a list of Rule or Hook"):
        net.Port(filters=["deny"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="2000 rules are more than"):
        net.Port(filters=[net.deny()] * 2000)


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_an_allow_list_lets_replies_in(linked: Linked, thread: str | None) -> None:
    here = net.Port(
        filters=[
            pass_last,
            *net.essentials(),
            net.allow(direction="egress", dst="192.168.0.0/16", protocol="tcp", dst_port=(80, 443)),
            net.allow(direction="egress", dst="fd02::/64"),
            net.deny(),
        ]
    )
    guest = net.Port()
    good = [
        tcp(A, 1000, B, 80),
        tcp(A, 1000, B, 443),
        udp(A6, 5, B6, 53),
        ethernet(0x0806, bytes(28)),
        udp("0.0.0.0", 68, "255.255.255.255", 67),
        icmp("fe80::1", "ff02::2", 133),
    ]
    bad = [
        tcp(A, 1000, B, 79),
        udp(A, 1000, B, 80),
        tcp(A, 1000, C, 80),
        udp(A6, 5, "fd02:1::", 53),
        udp("0.0.0.0", 67, "255.255.255.255", 68),
        icmp("fe80::1", "ff02::2", 137),
        ethernet(0x88CC, bytes(28)),
    ]
    back = [tcp(B, 80, A, 1000), udp(B6, 53, A6, 5)]
    async with linked(here, guest, thread=thread):
        assert await passing(here, guest, back) == []
        assert await passing(guest, here, [*good, *bad]) == good
        assert await passing(here, guest, [*back, tcp(B, 81, A, 1000), tcp(B, 80, A, 1001)]) == back
    assert here.stats().dropped_filtered == 4
    assert guest.stats().dropped_filtered == len(bad)


async def test_a_deny_list(linked: Linked) -> None:
    here = net.Port(filters=[net.deny(direction="egress", dst_port=25), net.deny(protocol="icmp")])
    guest = net.Port()
    async with linked(here, guest):
        frames = [tcp(A, 1, B, 25), tcp(A, 1, B, 26), icmp(A, B, 8), icmp(A6, B6, 128)]
        assert await passing(guest, here, frames) == [frames[1], frames[3]]
        assert await passing(here, guest, frames) == [frames[0], frames[1], frames[3]]


async def test_filters_are_replaced_while_frames_pass(linked: Linked) -> None:
    here, guest = net.Port(), net.Port()
    out, back = tcp(A, 1000, B, 80), tcp(B, 80, A, 1000)
    async with linked(here, guest):
        assert await passing(guest, here, [out]) == [out]
        await here.set_filters([pass_last, net.allow(direction="egress"), net.deny()])
        assert await passing(here, guest, [back]) == []
        assert await passing(guest, here, [out]) == [out]
        assert await passing(here, guest, [back]) == [back]
        await here.set_filters([pass_last, net.allow(direction="egress", dst_port=80), net.deny()])
        assert await passing(here, guest, [back]) == [back]
        with pytest.raises(ConfigError, match="give a list of Rule or Hook"):
            await here.set_filters([None])  # type: ignore[list-item]
        assert await passing(here, guest, [back]) == [back]
        await here.set_filters([pass_last, net.deny()])
        assert await passing(here, guest, [back]) == []
        assert await passing(guest, here, [out]) == []
        await here.set_filters([])
        assert await passing(guest, here, [out]) == [out]
        assert here.filters == ()


async def test_filters_may_be_set_before_and_after(linked: Linked) -> None:
    here, guest = net.Port(), net.Port()
    await here.set_filters([pass_last, net.deny()])
    async with linked(here, guest):
        assert await passing(guest, here, [tcp(A, 1, B, 2)]) == []
    await here.set_filters([])
    async with linked(here, guest):
        assert await passing(guest, here, [tcp(A, 1, B, 2)]) == [tcp(A, 1, B, 2)]


async def test_both_sides_have_filters(linked: Linked) -> None:
    # For each of two backends, what comes from the other is egress.
    one = net.Port(filters=[net.deny(direction="egress", dst_port=1)])
    other = net.Port(filters=[net.deny(direction="ingress", dst_port=2)])
    async with linked(one, other):
        frames = [tcp(A, 9, B, 1), tcp(A, 9, B, 2), tcp(A, 9, B, 3)]
        assert await passing(other, one, frames) == [frames[2]]
        assert await passing(one, other, frames) == frames
