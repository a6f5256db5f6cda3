"""Each test runs in a network namespace, of which it is root: see tap_programs.py."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from aiokvm import ConfigError
from aiokvm.net import Tap
from aiokvm.net.links import removed

FILE = Path(__file__).with_name("tap_programs.py")
PROGRAMS = (
    "traffic",
    "rates",
    "names",
    "deleted",
    "errors",
    "bridges",
    "handed",
    "elsewhere",
    "tcp",
    "cancelled",
)


@cache
def why_not() -> str:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no access to /dev/net/tun"
    for command in ("unshare", "ip"):
        if not shutil.which(command):
            return f"no {command}: the Debian package util-linux or iproute2 has it"
    if subprocess.run(("unshare", "-rn", "true"), capture_output=True, check=False).returncode:
        return "no network namespace may be made"
    return ""


def program(name: str, loop: str) -> tuple[str | Path, ...]:
    return sys.executable, "-W", "error", FILE, name, loop


def in_a_namespace(*argv: str | Path) -> None:
    done = subprocess.run(("unshare", "-rn", *argv), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_in_a_namespace(name: str, loop: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    if name in ("bridges", "errors"):
        pytest.importorskip("pyroute2", reason="no pyroute2: the extra netlink has it")
    in_a_namespace(*program(name, loop))


@cache
def why_no_macvtap() -> str:
    make = "ip tuntap add dev lower mode tap && ip link add link lower name mac7 index $((100000 + $$))"
    script = f"{make} type macvtap && test -w /dev/tap$((100000 + $$)) && ip link del mac7"
    done = subprocess.run(("unshare", "-rn", "sh", "-c", script), capture_output=True, check=False)
    return "no macvtap may be made, or its node in /dev is not there" if done.returncode else ""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_macvtap(loop: str) -> None:
    if reason := why_not() or why_no_macvtap():
        pytest.skip(reason)
    in_a_namespace(*program("macvtap", loop))


@pytest.mark.parametrize(
    ("data", "gone"),
    [
        (b"", []),
        (struct.pack("=IHHIIBxHiII", 32, 17, 0, 0, 0, 0, 1, 7, 0, 0) * 2, [7, 7]),
        (struct.pack("=IHHIIBxHiII", 32, 16, 0, 0, 0, 0, 1, 7, 0, 0), []),
        (struct.pack("=IHHIIBxHiII", 0, 17, 0, 0, 0, 0, 1, 7, 0, 0), []),
        (struct.pack("=IHHIIBxHiII", 0xFFFF_FFFF, 17, 0, 0, 0, 0, 1, 7, 0, 0) + bytes(40), [7]),
        (struct.pack("=IHHIIBxHiII", 32, 17, 0, 0, 0, 0, 1, 7, 0, 0)[:-1], []),
    ],
)
def test_messages_about_interfaces(data: bytes, gone: list[int]) -> None:
    assert list(removed(data)) == gone


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_without_privileges(loop: str) -> None:
    if reason := why_not() or ("" if shutil.which("setpriv") else "no setpriv: util-linux has it"):
        pytest.skip(reason)
    prepare = "ip tuntap add dev mine mode tap user 0 && ip link set mine up"
    drop = "exec setpriv --bounding-set=-all --inh-caps=-all"
    in_a_namespace("sh", "-c", f'{prepare} && {drop} "$@"', "sh", *program("unprivileged", loop))


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""},
        {"name": "x" * 16},
        {"name": "a/b"},
        {"name": "a b"},
        {"name": "tap%d"},
        {"name": "\ud800"},
        {"name": "tap0", "bridge": "\ud800"},
        {"name": "tap0", "bridge": "x" * 16},
        {"fds": iter([3])},
        {"queues": 0},
        {"queues": 17},
        {"mtu": 67},
        {"mtu": 70000},
        {"fds": []},
        {"fds": [3], "name": "tap0"},
        {"fds": [3], "queues": 2},
        {"fds": [3], "persist": True},
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Tap(**arguments)


def test_pyroute2_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiokvm.net import bridge

    monkeypatch.setitem(sys.modules, "pyroute2", None)
    with pytest.raises(ConfigError, match=r"aiokvm\[netlink\]"):
        bridge._configure("x", None, ())
