"""net/filter.py against a model of it in Python: random rules, random frames in both directions."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aiokvm import net
from tests.net.packets import LAST, ethernet, icmp, pass_last, tcp, udp

if TYPE_CHECKING:
    from collections.abc import Callable

Linked = Any
ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "fd01::1", "fd01::2", "fd02::1"]
NETWORKS = [
    "10.0.0.0/31",
    "10.0.0.1",
    "10.0.0.0/15",
    "0.0.0.0/0",
    "fd01::/127",
    "fd01::2",
    "fd00::/14",
    "::/0",
]
NUMBERS = {"tcp": 6, "udp": 17, "icmp": 1, "icmp6": 58}
TYPES = {"arp": 0x0806, "ipv4": 0x0800, "ipv6": 0x86DD}


@dataclass(frozen=True)
class Packet:
    protocol: str
    egress: bool
    src: str = ""
    dst: str = ""
    src_port: int = 0
    dst_port: int = 0

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.src).version if self.src else 0

    @property
    def reply(self) -> Packet:
        protocol = {"ping": "pong"}.get(self.protocol, self.protocol)
        return Packet(protocol, not self.egress, self.dst, self.src, self.dst_port, self.src_port)

    def frame(self) -> bytes:
        if self.protocol == "arp":
            return ethernet(0x0806, bytes(28))
        if self.protocol in ("ping", "pong"):
            kinds = {"ping": (8, 128), "pong": (0, 129)}[self.protocol]
            return icmp(self.src, self.dst, kinds[self.version == 6])
        make = tcp if self.protocol == "tcp" else udp
        return make(self.src, self.src_port, self.dst, self.dst_port)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    protocol = draw(st.sampled_from(["tcp", "udp", "ping", "pong", "arp"]))
    egress = draw(st.booleans())
    if protocol == "arp":
        return Packet("arp", egress)
    src, dst = draw(
        st.sampled_from([(a, b) for a in ADDRESSES for b in ADDRESSES if (":" in a) == (":" in b)])
    )
    ports = (draw(st.integers(1, 3)), draw(st.integers(1, 3))) if protocol in ("tcp", "udp") else (0, 0)
    if (src, ports[0]) == (dst, ports[1]):
        dst = ADDRESSES[(ADDRESSES.index(dst) + 1) % 3 + (3 if ":" in dst else 0)]
    return Packet(protocol, egress, src, dst, *ports)


@st.composite
def rules(draw: st.DrawFn) -> net.Rule:
    protocol = draw(st.sampled_from([None, "tcp", "udp", "icmp", "icmp6", "arp", "ipv4", "ipv6"]))
    conditions: dict[str, Any] = {
        "protocol": protocol,
        "direction": draw(st.sampled_from([None, "egress", "ingress"])),
    }
    if protocol != "arp":
        version = {"ipv4": ".", "ipv6": ":"}.get(protocol or "") or draw(st.sampled_from(".:"))
        networks = [None, *(network for network in NETWORKS if version in network)]
        conditions |= {name: draw(st.sampled_from(networks)) for name in ("src", "dst")}
    if protocol in (None, "tcp", "udp"):
        ports = st.none() | st.integers(1, 3) | st.just((2, 3))
        conditions |= {name: draw(ports) for name in ("src_port", "dst_port")}
    if draw(st.booleans()):
        return net.deny(**conditions)
    return net.allow(**conditions, replies=draw(st.booleans()))


class Model:
    """What docs and docstrings say, in the plainest way."""

    def __init__(self, items: list[net.Rule]) -> None:
        self.rules = items
        self.replies: set[Packet] = set()

    def passes(self, packet: Packet) -> bool:
        if packet in self.replies:
            return True
        rule = next((rule for rule in self.rules if self.matches(rule, packet)), net.allow())
        if rule.allows and rule.replies and packet.protocol not in ("arp", "pong"):
            self.replies.add(packet.reply)
        return rule.allows

    @staticmethod
    def matches(rule: net.Rule, packet: Packet) -> bool:
        if rule.direction and (rule.direction == "egress") != packet.egress:
            return False
        if rule.ethertype and rule.ethertype != TYPES.get(
            packet.protocol, {4: 0x0800, 6: 0x86DD}.get(packet.version)
        ):
            return False
        for network, address in ((rule.src, packet.src), (rule.dst, packet.dst)):
            if network and (not address or ipaddress.ip_address(address) not in network):
                return False
        if rule.protocol:
            name = {"ping": "icmp", "pong": "icmp"}.get(packet.protocol, packet.protocol)
            if name == "icmp" and packet.version == 6:
                name = "icmp6"
            if rule.protocol != NUMBERS.get(name):
                return False
        for ports, port in ((rule.src_ports, packet.src_port), (rule.dst_ports, packet.dst_port)):
            if ports and not (packet.protocol in ("tcp", "udp") and ports[0] <= port <= ports[1]):
                return False
        return True


def test_frames_pass_as_in_the_model(run: Callable[[Any], None], linked: Linked) -> None:
    @settings(max_examples=150)
    @given(st.lists(rules(), max_size=6), st.lists(packets(), min_size=1, max_size=60))
    def check(items: list[net.Rule], sent: list[Packet]) -> None:
        async def main() -> None:
            model = Model(items)
            here, guest = net.Port(filters=[pass_last, *items]), net.Port()
            async with linked(here, guest):
                for packet in sent:
                    sender, receiver = (guest, here) if packet.egress else (here, guest)
                    await sender.send([packet.frame(), LAST])
                    got = bytes(await anext(receiver))
                    if got != LAST:
                        assert got == packet.frame()
                        assert bytes(await anext(receiver)) == LAST
                    assert (got != LAST) == model.passes(packet), packet

        run(main)

    check()
