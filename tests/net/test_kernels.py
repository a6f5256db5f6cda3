"""TCP between the kernels of two namespaces, through software in between: see kernel_programs.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from aiokvm.proto import pcapng
from aiokvm.proto.pcapng import Packet, Statistics

PROGRAM = Path(__file__).with_name("kernel_programs.py")


@cache
def why_not() -> str:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no access to /dev/net/tun"
    for command in ("unshare", "ip"):
        if not shutil.which(command):
            return f"no {command}: the Debian package util-linux or iproute2 has it"
    if subprocess.run(
        ("unshare", "-rn", "unshare", "-n", "true"), capture_output=True, check=False
    ).returncode:
        return "no network namespace may be made"
    return ""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_tcp_through_segmentation_filters_and_a_capture(loop: str, family: str, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    file = tmp_path / "x.pcapng"
    command = ("unshare", "-rn", sys.executable, "-W", "error", PROGRAM, loop, family, file)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    items = list(pcapng.read(file.read_bytes()))
    packets = [item for item in items if isinstance(item, Packet)]
    assert [(item.packets, item.dropped) for item in items if isinstance(item, Statistics)] == [
        (len(packets), 0)
    ]
    # What goes there is recorded before it is cut.
    assert max(packet.original_bytes for packet in packets if packet.outbound) > 10_000
    assert max(packet.original_bytes for packet in packets if not packet.outbound) > 1_000
