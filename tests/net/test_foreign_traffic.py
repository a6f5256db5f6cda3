"""Traffic that nobody here wrote: port scans, packets made of noise, a load generator, against `net.User`."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from anyio import to_thread

from aiokvm import net

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.net.namespace import needs
from tests.net.nat import PAGE, application, guest_of, needs_slirp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.net.namespace import Namespace

pytestmark = needs_slirp
GATEWAY = "10.0.2.2"
# Scapy's `fuzz` fills the fields that nobody sets with what is random, lengths and checksums among them.
NOISE = """
import random, sys, logging
logging.getLogger("scapy").setLevel(logging.ERROR)
from scapy.all import (ARP, BOOTP, DHCP, DNS, ICMP, IP, IPv6, TCP, UDP, Ether, ICMPv6ND_NS, ICMPv6ND_RA,
    IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, Raw, conf, fuzz)
random.seed(int(sys.argv[1]))
src, dst = "10.0.2.15", "10.0.2.2"
def kinds():
    here = Ether(dst="52:55:0a:00:02:02", src="52:54:00:12:34:56")
    yield here / fuzz(ARP())
    yield here / fuzz(IP(src=src, dst=dst)) / Raw(random.randbytes(random.randrange(64)))
    yield here / IP(src=src, dst=random.choice((dst, "10.0.2.3", "10.0.2.100"))) / fuzz(TCP())
    yield here / IP(src=src, dst=dst) / fuzz(TCP(dport=80, flags=random.choice("SAFRPU")))
    yield here / IP(src=src, dst="10.0.2.3") / fuzz(UDP(dport=53)) / fuzz(DNS())
    everybody = IP(src="0.0.0.0", dst="255.255.255.255")
    yield here / everybody / UDP(sport=68, dport=67) / fuzz(BOOTP()) / fuzz(DHCP())
    yield here / IP(src=src, dst=dst) / UDP(dport=69) / Raw(random.randbytes(random.randrange(600)))
    yield here / IP(src=src, dst=dst) / fuzz(ICMP())
    piece = IP(src=src, dst=dst, frag=random.randrange(8192), flags=random.choice((0, 1)))
    yield here / piece / Raw(bytes(48))
    yield here / fuzz(IPv6(src="fec0::15", dst="fec0::2")) / Raw(random.randbytes(random.randrange(64)))
    yield here / IPv6(src="fec0::15", dst="fec0::2") / fuzz(TCP())
    yield here / IPv6(src="fec0::15", dst="ff02::1") / fuzz(ICMPv6ND_NS())
    yield here / IPv6(src="fe80::1", dst="ff02::1") / fuzz(ICMPv6ND_RA())
    yield here / IPv6(src="fec0::15", dst="fec0::2") / fuzz(IPv6ExtHdrHopByHop()) / fuzz(UDP())
    yield here / IPv6(src="fec0::15", dst="fec0::2") / fuzz(IPv6ExtHdrFragment()) / Raw(bytes(64))
sender = conf.L2socket(iface="tap0")
sent = 0
for _ in range(int(sys.argv[2])):
    for packet in kinds():
        data = bytes(packet)[:1514]
        if random.random() < 0.2:
            data = data[: random.randrange(14, len(data) + 1)]
        sender.send(data)
        sent += 1
print("sent", sent)
"""


@contextmanager
def iperf_server() -> Iterator[subprocess.Popen[str]]:
    """It says where it listens in its first lines."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["iperf3", "-s", "--forceflush", "-B", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


async def page(guest: Namespace) -> str:
    return await guest.run("curl", "-sS", "http://10.0.2.100/")


@needs("curl", "nmap")
@pytest.mark.anyio
async def test_a_port_scan_finds_the_service_and_nothing_of_the_host(tmp_path: Path) -> None:
    # Restricted, for the host may have a network with such an address.
    async with guest_of(net.User(services={PAGE: application}, restrict=True), tmp_path) as guest:
        for kind in ("-sT", "-sS"):
            arguments = ("-n", "-Pn", "-p", "75-85", "--max-retries", "2", "--host-timeout", "40s", kind)
            output = await guest.run("nmap", *arguments, "10.0.2.100", GATEWAY)
            service, gateway = output.split("Nmap scan report for")[1:]
            assert re.findall(r"(\d+)/tcp +open\b", service) == ["80"]
            assert " open " not in gateway
        assert await page(guest) == "hello 10.0.2.15"


@needs("curl", "nmap")
@pytest.mark.anyio
async def test_a_scan_with_odd_flags_and_fragments_does_no_harm(tmp_path: Path) -> None:
    async with guest_of(net.User(services={PAGE: application}), tmp_path) as guest:
        for arguments in (
            ("-sX",),
            ("-sF", "-f"),
            ("-sA", "--badsum"),
            ("-sO", "-p", "0-20"),
            ("-sS", "-f", "-O"),
        ):
            ports = () if "-p" in arguments else ("-p", "80-82")
            await guest.run(
                *("nmap", "-n", "-Pn", "--max-retries", "0", "--host-timeout", "10s"),
                *(*ports, *arguments, "10.0.2.100"),
                check=False,
            )
        assert await page(guest) == "hello 10.0.2.15"


@needs("curl")
@pytest.mark.skipif(not importlib.util.find_spec("scapy"), reason="no scapy: it is of the extra dev")
@pytest.mark.anyio
async def test_packets_made_of_noise_do_no_harm(tmp_path: Path) -> None:
    user = net.User(services={PAGE: application}, tap=net.Pcap(tmp_path / "noise.pcapng"))
    async with guest_of(user, tmp_path) as guest:
        before = user.stats().received_frames
        output = await guest.python(NOISE, "1", "60")
        assert "sent 900" in output
        assert user.stats().received_frames - before > 500
        assert await page(guest) == "hello 10.0.2.15"


@needs("iperf3")
@pytest.mark.anyio
async def test_a_load_generator_both_ways(tmp_path: Path) -> None:
    async with guest_of(net.User(allow_host_loopback=True), tmp_path) as guest:
        for options in ((), ("-R",), ("-u", "-b", "20M", "-R")):
            with iperf_server() as server:
                assert server.stdout
                # A line of dashes, and the one that counts.
                for _ in range(2):
                    line = await to_thread.run_sync(server.stdout.readline, abandon_on_cancel=True)
                port = re.findall(r"Server listening on (\d+)", line)[0]
                output = await guest.run("iperf3", "-J", "-c", GATEWAY, "-p", port, "-n", "4M", *options)
            end = json.loads(output)["end"]
            assert end.get("sum_received", end.get("sum"))["bytes"] > 1 << 20
