"""The network adapters of ``aiokvm run``."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import click

from aiokvm import ConfigError, net

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from aiokvm.net import NetBackend

_FORWARD = re.compile(r"(?:(\[[0-9a-fA-F:]+\]|[0-9.]+):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?")


@dataclass(frozen=True)
class NetOption:
    """Where an adapter leads: a TAP device of this ``name``, the peer at a unix socket, or user-mode NAT."""

    kind: Literal["user", "tap", "stream"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind


@dataclass(frozen=True)
class Forward:
    """A port of the host that leads to one of the guest."""

    address: str
    host_port: int
    guest_port: int
    protocol: Literal["tcp", "udp"]

    @property
    def key(self) -> str:
        """What `net.User` calls it."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.protocol}:{address}:{self.host_port}"

    def __str__(self) -> str:
        return f"{self.key.partition(':')[2]}:{self.guest_port}/{self.protocol}"


def parse(text: str) -> NetOption:
    """Return what ``user``, ``tap:NAME`` or ``stream:PATH`` says: a parameter type. Else a usage error."""
    kind, colon, name = text.partition(":")
    if kind == "user" and not colon:
        return NetOption("user")
    if kind == "tap" and name:
        return NetOption("tap", name)
    if kind == "stream" and name:
        return NetOption("stream", os.path.abspath(name))
    raise click.BadParameter(f"{text!r} is none of user, tap:NAME and stream:PATH")


def parse_forward(text: str) -> Forward:
    """Return what ``[ADDRESS:]PORT:PORT[/udp]`` says: a parameter type. A usage error for anything else."""
    found = _FORWARD.fullmatch(text)
    if not found:
        raise click.BadParameter(f"{text!r} is not [ADDRESS:]PORT:PORT[/udp], such as 8080:80")
    address = (found[1] or "127.0.0.1").strip("[]")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise click.BadParameter(f"{address!r} in {text!r} is no address of IPv4 or [IPv6]") from None
    host_port, guest_port = int(found[2]), int(found[3])
    # Port 0, one that the system chooses, would be told to nobody.
    if not (0 < host_port <= 0xFFFF and 0 < guest_port <= 0xFFFF):
        raise click.BadParameter(f"{text!r}: ports are 1 to 65535")
    return Forward(address, host_port, guest_port, "udp" if found[4] == "udp" else "tcp")


def check(options: Sequence[NetOption], forwards: Sequence[Forward], pcap: Path | None) -> None:
    """Raise a usage error for what makes no sense together."""
    if forwards and not any(option.kind == "user" for option in options):
        raise click.UsageError("-p leads into a --net user: there is none")
    if pcap and not options:
        raise click.UsageError("--pcap records what passes a --net: there is none")
    ports = [(forward.protocol, forward.address, forward.host_port) for forward in forwards]
    for port in ports:
        if ports.count(port) > 1:
            raise click.UsageError(f"-p: port {port[2]} of {port[1]} is given twice")


def backends(
    options: Sequence[NetOption], forwards: Sequence[Forward], pcap: Path | None
) -> list[NetBackend]:
    """Return what the adapters are connected to; the first NAT has the forwarded ports."""
    tap = net.Pcap(pcap) if pcap else None
    found: list[NetBackend] = []
    for option in options:
        if option.kind == "tap":
            found.append(net.Tap(option.name, tap=tap))
        elif option.kind == "stream":
            found.append(net.Stream(option.name, tap=tap))
        else:
            found.append(net.User(forward={f.key: f.guest_port for f in forwards}, tap=tap))
            forwards = ()
    return found


def lab_forwards(options: Sequence[NetOption], forwards: Sequence[Forward]) -> tuple[str, ...]:
    """Return how the lab passes ports on, as QEMU says it. ConfigError for what is out of its reach."""
    for option in options:
        if option.kind == "tap":
            raise ConfigError(
                f"--net {option}: the lab has no way to this machine's devices; "
                f"`aiokvm lab -- aiokvm run --net {option}` makes one in the lab"
            )
        if option.kind == "stream":
            raise ConfigError(
                f"--net {option}: the lab has no way to this machine's sockets; start its peer in there: "
                f"`aiokvm lab -- sh -c 'PEER & aiokvm run --net {option}'`"
            )
    return hostfwd([replace(forward, guest_port=forward.host_port) for forward in forwards])


def hostfwd(forwards: Sequence[Forward]) -> tuple[str, ...]:
    """Return ports that lead into the lab as QEMU says it. ConfigError for what cannot be had."""
    ports = [(forward.protocol, forward.host_port) for forward in forwards]
    for forward in forwards:
        # QEMU's hostfwd knows IPv4, and in the lab all are on one address.
        if ":" in forward.address or ports.count((forward.protocol, forward.host_port)) > 1:
            raise ConfigError(f"-p {forward.key}: the lab takes each port once, at an address of IPv4")
        _check_free(forward)
    return tuple(f"{f.protocol}:{f.address}:{f.host_port}-:{f.guest_port}" for f in forwards)


def _check_free(forward: Forward) -> None:
    """Raise ConfigError for a port that cannot be had: the lab's emulator would only die of it, and late."""
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((forward.address, forward.host_port))
        except OSError as error:
            where = f"{forward.protocol} port {forward.host_port} of {forward.address}"
            raise ConfigError(f"-p: {where}: {error.strerror}") from None


def lab_arguments(options: Sequence[NetOption], forwards: Sequence[Forward]) -> list[str]:
    """Return the options of the command in the lab, which has the forwarded ports on all its addresses."""
    argv: list[str] = []
    for option in options:
        argv += ["--net", str(option)]
    for forward in forwards:
        argv += ["-p", f"0.0.0.0:{forward.host_port}:{forward.guest_port}/{forward.protocol}"]
    return argv
