"""The command line on a terminal, with Linux in the machine."""

from __future__ import annotations

import urllib.request
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import images
from aiokvm.proto import pcapng
from tests.cli.terminal import WATCH, Terminal
from tests.linux.conftest import BOOT_S, COMMAND_S

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.linux, pytest.mark.anyio]


@pytest.fixture(scope="session")
async def debian() -> images.DebianDisk:
    """Debian's root file system; it was verified when it was built."""
    return images.find_debian() or await images.build_debian()


@pytest.mark.parametrize("system", ["busybox", "debian"])
async def test_a_program_in_the_guest_sees_that_the_window_changes(
    system: str, debian: images.DebianDisk
) -> None:
    disk = ("--disk", f"{debian.disk},ro", "--append", "aiokvm.autologin") if system == "debian" else ()
    with Terminal("run", "--lab", "never", *disk) as terminal:
        terminal.expect(b"# ", BOOT_S)
        terminal.type(WATCH)
        terminal.expect(b"24 80\r\n", COMMAND_S)
        terminal.expect(b"watching", COMMAND_S)
        for rows, cols in ((50, 132), (25, 81)):
            terminal.resize(rows, cols)
            terminal.expect(b"%d %d\r\n" % (rows, cols), COMMAND_S)
        terminal.type(b"\x03")
        if system == "debian":
            # The next login has it, too.
            terminal.type(b"exit\n")
            terminal.expect(b"(automatic login)", COMMAND_S)
            terminal.expect(b"# ", COMMAND_S)
            terminal.type(b"stty size\n")
            terminal.expect(b"25 81\r\n", COMMAND_S)
        terminal.type(b"poweroff -f\n")
        assert terminal.process.wait(COMMAND_S) == 0


async def test_a_debian_that_reboots_comes_up_again(debian: images.DebianDisk, tmp_path: Path) -> None:
    copy = images.DebianDisk.beside(tmp_path / "root.img")
    for source, target in zip(debian.files, copy.files, strict=True):
        await anyio.run_process(["cp", "--sparse=always", source, target])
    copy.disk.chmod(0o644)
    disk = ("--disk", copy.disk, "--append", "aiokvm.autologin")
    with Terminal("run", "--lab", "never", "--reboot", *disk) as terminal:
        terminal.expect(b"(automatic login)", BOOT_S)
        terminal.expect(b"# ", COMMAND_S)
        # What has been written is on the disk without a word more.
        terminal.type(b"echo here >/root/kept; touch /run/lost; reboot\n")
        terminal.expect(b"(automatic login)", BOOT_S)
        terminal.expect(b"# ", COMMAND_S)
        terminal.type(b"stty size; cat /root/kept; ls /run/lost; echo d'on'e\n")
        shown = terminal.expect(b"done\r\n", COMMAND_S)
        assert b"24 80\r\nhere\r\n" in shown
        assert b"cannot access '/run/lost'" in shown
        terminal.type(b"poweroff\n")
        assert terminal.process.wait(COMMAND_S) == 0


def test_a_port_leads_to_the_guest_and_its_packets_are_recorded(tmp_path: Path, free_tcp_port: int) -> None:
    serve = "echo page >index.html; httpd -p 80; echo serv'ing'; read line; exit 3"
    pcap = tmp_path / "packets.pcapng"
    options = ("--net", "user", "-p", f"{free_tcp_port}:80", "--pcap", pcap)
    with Terminal("run", "--lab", "never", *options, "--", "sh", "-c", serve) as terminal:
        terminal.expect(b"serving", BOOT_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{free_tcp_port}", timeout=COMMAND_S) as response:
            assert response.read() == b"page\n"
        terminal.type(b"\n")
        assert terminal.process.wait(COMMAND_S) == 3
    packets = [block.data for block in pcapng.read(pcap.read_bytes()) if isinstance(block, pcapng.Packet)]
    assert any(b"GET / HTTP/1.1" in packet for packet in packets)
