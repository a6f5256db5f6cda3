"""net/pcap.py: captures, as we and tshark read them."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiokvm import ConfigError, net
from aiokvm.aio import current_loop
from aiokvm.net import pcap as module
from aiokvm.net.plane import Plane
from aiokvm.proto import pcapng
from aiokvm.proto.pcapng import Interface, Packet, Statistics
from tests.net.packets import GUEST_MAC, HOST_MAC, LAST, ethernet, icmp, passing, tcp, udp

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
Linked = Any
A, B = "10.0.0.1", "192.168.7.9"
FRAMES = [udp(A, 1, B, 53), tcp(A, 1, B, 80), icmp("fd01::1", "fd02::2", 128), ethernet(0x0806, bytes(28))]


def read(data: bytes) -> tuple[list[Interface], list[Packet], list[Statistics]]:
    items = list(pcapng.read(data))
    return (
        [item for item in items if isinstance(item, Interface)],
        [item for item in items if isinstance(item, Packet)],
        [item for item in items if isinstance(item, Statistics)],
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"file": None}, "file=None: give a path or a binary file"),
        ({"file": "x", "snaplen": 0}, "snaplen is 14"),
        ({"file": "x", "buffer_bytes": 1000}, "buffer_bytes is 262144"),
        ({"file": "x", "limit_bytes": 0}, "limit_bytes is above 0"),
    ],
)
def test_captures_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        net.Pcap(**arguments)


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_both_directions_of_two_backends_are_in_one_file(
    linked: Linked, tmp_path: Path, thread: str | None
) -> None:
    path = tmp_path / "x.pcapng"
    pcap = net.Pcap(path)
    here, guest, other = net.Port(tap=pcap), net.Port(), net.Port(tap=pcap)
    other.label = "web-1"
    before_ns = time.time_ns()
    async with linked(here, guest, other, net.Port(), thread=thread):
        assert await passing(guest, here, FRAMES) == FRAMES
        assert await passing(here, guest, FRAMES[:1]) == FRAMES[:1]
        await other.send(FRAMES[1])
        await pcap.flush()
        interfaces, packets, statistics = read(path.read_bytes())
        assert [interface.name for interface in interfaces] == ["port", "web-1"]
        assert (pcap.frames, pcap.dropped) == (8, 0)
        assert len(packets) == 8
        assert not statistics
    interfaces, packets, statistics = read(path.read_bytes())
    assert [interface.snaplen for interface in interfaces] == [262144] * 2
    assert [packet.data for packet in packets if packet.interface == 0] == [*FRAMES, LAST, FRAMES[0], LAST]
    assert [packet.outbound for packet in packets if packet.interface == 0] == [True] * 5 + [False] * 2
    assert [packet.data for packet in packets if packet.interface == 1] == [FRAMES[1]]
    times = [packet.time_ns for packet in packets]
    assert times == sorted(times)
    assert before_ns <= times[0] <= times[-1] <= time.time_ns()
    assert {item.interface: (item.packets, item.dropped) for item in statistics} == {0: (7, 0), 1: (1, 0)}
    assert (pcap.frames, pcap.dropped) == (8, 0)


async def test_it_goes_on_where_it_was_closed(linked: Linked, tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    path.write_bytes(b"what was there before is gone")
    pcap = net.Pcap(str(path))
    for _ in range(2):
        here, guest = net.Port(tap=pcap), net.Port()
        async with linked(here, guest):
            await passing(guest, here, FRAMES)
    interfaces, packets, statistics = read(path.read_bytes())
    assert (len(interfaces), len(packets), len(statistics)) == (2, 10, 2)
    assert pcap.frames == 10


async def test_what_is_written_appears_by_itself(linked: Linked, tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    here, guest = net.Port(tap=net.Pcap(path)), net.Port()
    async with linked(here, guest):
        await passing(guest, here, FRAMES)
        while len(read(path.read_bytes())[1]) < 5:
            await anyio.lowlevel.checkpoint()


async def test_only_snaplen_bytes_are_kept(linked: Linked) -> None:
    file = io.BytesIO()
    here, guest = net.Port(tap=net.Pcap(file, snaplen=64)), net.Port()
    async with linked(here, guest):
        await passing(guest, here, [tcp(A, 1, B, 80, bytes(1000))])
    packet = read(file.getvalue())[1][0]
    assert packet.data == tcp(A, 1, B, 80, bytes(1000))[:64]
    assert packet.original_bytes == 1054


async def test_it_ends_at_its_limit(linked: Linked) -> None:
    file = io.BytesIO()
    pcap = net.Pcap(file, limit_bytes=5000)
    here, guest = net.Port(tap=pcap), net.Port()
    frames = [tcp(A, 1, B, 80, bytes(946))] * 10  # blocks of 1,044 bytes
    async with linked(here, guest):
        assert await passing(guest, here, frames) == frames
    assert len(read(file.getvalue())[1]) == 4
    assert pcap.error is None


class Slow(io.BytesIO):
    """Waits before it writes what comes after the header."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.reached = threading.Event()

    def write(self, data: Any) -> int:
        self.reached.set()
        assert self.open.wait(60)
        # Not all at once, as raw files may.
        return super().write(bytes(data[:100_000]))


async def test_what_a_slow_disk_cannot_take_is_counted(linked: Linked) -> None:
    file = Slow()
    pcap = net.Pcap(file, buffer_bytes=1 << 18)
    here, guest = net.Port(tap=pcap), net.Port()
    frames = [tcp(A, 1, B, 80, bytes(1000))] * 100
    try:
        async with linked(here, guest):
            await guest.send(frames)
            while not file.reached.is_set():
                await anyio.lowlevel.checkpoint()
            for _ in range(10):
                assert len(await passing(guest, here, frames)) >= 100
            assert pcap.dropped > 0
            file.open.set()
    finally:
        file.open.set()
    _, packets, statistics = read(file.getvalue())
    assert pcap.frames == 1110 == statistics[0].packets
    assert pcap.dropped == statistics[0].dropped == 1110 - len(packets)


class Full(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_full_disk_ends_the_capture_and_not_the_traffic(
    linked: Linked, caplog: pytest.LogCaptureFixture
) -> None:
    pcap = net.Pcap(Full())
    here, guest = net.Port(tap=pcap), net.Port()
    async with linked(here, guest):
        for _ in range(3):
            assert await passing(guest, here, FRAMES) == FRAMES
            await pcap.flush()
    assert isinstance(pcap.error, OSError)
    assert pcap.error.errno == errno.ENOSPC
    assert [record.getMessage() for record in caplog.records] == [
        f"the capture to {pcap._file} ends here, it cannot be written: [Errno 28] No space left on device"
    ]


async def test_a_path_that_cannot_be_opened(linked: Linked, tmp_path: Path) -> None:
    here = net.Port(tap=net.Pcap(tmp_path / "missing" / "x.pcapng"))
    with pytest.raises(FileNotFoundError):
        async with linked(here, net.Port()):
            raise AssertionError("opened")
    assert here.end is None
    with pytest.raises(ConfigError, match="no file has such a name"):
        async with linked(net.Port(tap=net.Pcap("a\0b")), net.Port()):
            raise AssertionError("opened")
    # A pipe that nobody reads is nothing to wait for.
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device"):
        async with linked(net.Port(tap=net.Pcap(tmp_path / "fifo")), net.Port()):
            raise AssertionError("opened")


async def test_a_pipe_is_read_as_it_comes(linked: Linked, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    got = bytearray()

    def drain() -> None:
        while chunk := os.read(reader, 1000):
            got.extend(chunk)

    big = [tcp(A, 1, B, 80, bytes(1400))] * 200
    try:
        async with anyio.create_task_group() as group:
            here, guest = net.Port(tap=net.Pcap(path)), net.Port()
            async with linked(here, guest):
                group.start_soon(anyio.to_thread.run_sync, drain)
                assert await passing(guest, here, big) == big
    finally:
        os.close(reader)
    assert len(read(bytes(got))[1]) == 201


async def test_a_pipe_whose_reader_sleeps_does_not_hold_up_the_end(
    linked: Linked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiokvm.net.pcap.STALLED_S", 0.2)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    big = [tcp(A, 1, B, 80, bytes(1400))] * 200
    pcap = net.Pcap(path)
    try:
        here, guest = net.Port(tap=pcap), net.Port()
        async with linked(here, guest):
            assert await passing(guest, here, big) == big
    finally:
        os.close(reader)
    assert isinstance(pcap.error, TimeoutError)
    assert "nobody has read for" in caplog.text


async def test_planes_of_one_loop_share_a_capture_and_those_of_two_do_not(linked: Linked) -> None:
    file = io.BytesIO()
    pcap = net.Pcap(file)
    pairs = [(net.Port(tap=pcap), net.Port()) for _ in range(2)]

    async def elsewhere() -> None:
        with pytest.raises(ConfigError, match="belongs to one event loop"):
            async with linked(net.Port(tap=pcap), net.Port()):
                raise AssertionError("opened")

    async with linked(*pairs[0]), linked(*pairs[1], thread="net-test"):
        async with anyio.create_task_group() as group:
            for here, guest in pairs:
                group.start_soon(passing, guest, here, FRAMES * 50)
        await anyio.to_thread.run_sync(anyio.run, elsewhere)
    _, packets, statistics = read(file.getvalue())
    assert sorted(item.packets for item in statistics) == [201, 201]
    for interface in range(2):
        assert [packet.data for packet in packets if packet.interface == interface] == [*FRAMES * 50, LAST]


async def test_a_cancelled_program_has_its_capture(tmp_path: Path, linked: Linked) -> None:
    path = tmp_path / "x.pcapng"
    with anyio.CancelScope() as scope:
        here, guest = net.Port(tap=net.Pcap(path)), net.Port()
        async with linked(here, guest):
            await passing(guest, here, FRAMES)
            scope.cancel()
            await anyio.sleep_forever()
    assert [packet.data for packet in read(path.read_bytes())[1]] == [*FRAMES, LAST]
    # Opening that is cancelled leaves nothing open.
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with linked(net.Port(tap=net.Pcap(path)), net.Port()):
                raise AssertionError("opened")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not shutil.which("tshark"), reason="tshark is missing: apt-get install tshark")
async def test_tshark_reads_it(linked: Linked, tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    here, guest = net.Port(tap=net.Pcap(path)), net.Port()
    here.label = "net0"
    async with linked(here, guest):
        await passing(guest, here, FRAMES)
        await passing(here, guest, FRAMES[1:2])
    fields = [
        "frame.interface_name",
        "frame.packet_flags_direction",
        "frame.protocols",
        "frame.len",
        "eth.src",
    ]
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", *(f"-e{field}" for field in fields)]
    run = await anyio.run_process(command, stderr=subprocess.DEVNULL)
    lines = [line.split("\t") for line in run.stdout.decode().splitlines()]
    assert [line[2].split(":")[2:4] for line in lines] == [
        ["ip", "udp"],
        ["ip", "tcp"],
        ["ipv6", "icmpv6"],
        ["arp"],
        ["data"],
        ["ip", "tcp"],
        ["data"],
    ]
    assert {line[0] for line in lines} == {"net0"}
    assert [int(line[1], 0) for line in lines] == [2] * 5 + [1] * 2
    assert [int(line[3]) for line in lines[:4]] == [len(frame) for frame in FRAMES]
    assert lines[0][4] == GUEST_MAC.hex(":")
    assert HOST_MAC != GUEST_MAC


async def test_a_backend_that_is_used_again_is_recorded_under_its_new_adapter(tmp_path: Path) -> None:
    path = tmp_path / "packets"
    port = net.Port(tap=net.Pcap(path))
    plane = Plane(current_loop())
    for adapter in ("one/net0", "two/net0"):
        await port.open(plane, print, adapter)
        await port.close()
    plane.close()
    interfaces, _, _ = read(path.read_bytes())
    assert [interface.name for interface in interfaces] == ["one/net0", "two/net0"]


async def test_a_capture_whose_beginning_is_cancelled_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    make = module._Sink

    def slow(*arguments: Any, **named: Any) -> module._Sink:
        began.set()
        go_on.wait()
        return make(*arguments, **named)

    async def use() -> None:
        async with net.Switch() as switch:
            await switch.connect(net.Port(tap=net.Pcap(tmp_path / "packets")))

    await use()
    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(module, "_Sink", slow)
    using = current_loop().spawn(use, "using")
    await anyio.to_thread.run_sync(began.wait)
    using.cancel()
    for _ in range(5):
        await current_loop().turn()
    go_on.set()
    await using.wait()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
