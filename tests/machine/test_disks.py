"""machine/disks.py, disk_core.py and disk_loop.py: every engine against a driver, without KVM and with it."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError, Disk, DiskFailed, ImageError, Paused, StateError, block
from aiokvm.block import BlockBackend, Limit, Raw
from aiokvm.virtio.blk import (
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from tests.machine.disk_rig import MIB, SECTORS, backend, rig
from tests.virtio.driver import FakeMemory, SplitDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokvm import VM
    from aiokvm.machine.events import Event

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("collected")]


@pytest.fixture(params=["io_uring", "threads", "loop"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return path


async def failure(events: Any) -> DiskFailed:
    event = await anext(events)
    assert isinstance(event, DiskFailed)
    return event


async def test_what_is_written_is_read(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        assert r.disk.engine == engine
        data = bytes(range(256)) * 16
        assert await r.request(VIRTIO_BLK_T_OUT, 3, data) == (VIRTIO_BLK_S_OK, b"")
        assert await r.request(VIRTIO_BLK_T_IN, 3, room=4096) == (VIRTIO_BLK_S_OK, data)
        assert await r.request(VIRTIO_BLK_T_FLUSH) == (VIRTIO_BLK_S_OK, b"")
        stats = r.disk.stats()
        assert (stats.reads, stats.writes, stats.flushes, stats.errors) == (1, 1, 1, 0)
        assert (stats.read_bytes, stats.written_bytes) == (4096, 4096)
    assert image.read_bytes()[3 * 512 : 3 * 512 + 4096] == data


async def test_header_and_data_may_be_split(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        head = struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, 1)
        r.drivers[0].add([head[:3], head[3:15], head[15:] + b"a" * 100, b"b" * 412], [1])
        r.host.notify(0)
        assert (await r.used()).written == 1
        r.drivers[0].add([struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 1)], [500, 13])
        r.host.notify(0)
        used = await r.used()
        assert used.data == b"a" * 100 + b"b" * 412 + b"\0"


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([bytes(15)], [513]), ([], [16]), ([bytes(16)], []), ([bytes(16), bytes(512)], [])],
    ids=["short header", "no header", "no status", "read-only status"],
)
async def test_what_is_no_request_needs_a_reset(
    engine: str, image: Path, readable: Sequence[bytes], writable: Sequence[int]
) -> None:
    async with rig(backend(engine, image)) as r:
        r.drivers[0].add(readable, writable)
        r.host.notify(0)
        while not r.host.reasons:
            await anyio.lowlevel.checkpoint()
        assert len(r.host.reasons) == 1
        await r.reset()
        r.start()
        assert (await r.request(VIRTIO_BLK_T_IN, room=512))[0] == VIRTIO_BLK_S_OK
        assert len(r.host.reasons) == 1


async def test_a_buffer_outside_of_ram_needs_a_reset(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        driver = r.drivers[0]
        driver.write_descriptor(0, 1 << 40, 16, 0)
        driver.make_available(0)
        r.host.notify(0)
        while not r.host.reasons:
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("type_", "sector", "data", "room", "status"),
    [
        (VIRTIO_BLK_T_IN, SECTORS, 0, 512, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_OUT, SECTORS - 1, 1024, 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, (1 << 64) - 1, 0, 512, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_OUT, 1 << 55, 512, 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, 0, 0, 511, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_OUT, 0, 513, 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, 0, 512, 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_OUT, 0, 0, 512, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, 0, 0, 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, 0, 15, 0, VIRTIO_BLK_S_IOERR),
        (77, 0, 512, 0, VIRTIO_BLK_S_UNSUPP),
        (0xFFFF_FFFF, 0, 0, 512, VIRTIO_BLK_S_UNSUPP),
    ],
)
async def test_requests_that_cannot_be(
    engine: str, image: Path, type_: int, sector: int, data: int, room: int, status: int
) -> None:
    async with rig(backend(engine, image)) as r:
        before = image.read_bytes()
        parts = (bytes(data),) if data else ()
        assert (await r.request(type_, sector, *parts, room=room))[0] == status
        assert image.read_bytes() == before
        assert not r.host.reasons
        assert r.disk.failures == 0


async def test_a_read_only_disk_is_not_written(engine: str, image: Path) -> None:
    async with rig(backend(engine, image, readonly=True)) as r:
        assert (await r.request(VIRTIO_BLK_T_OUT, 0, b"x" * 512))[0] == VIRTIO_BLK_S_IOERR
        assert (await r.request(VIRTIO_BLK_T_IN, 0, room=512)) == (VIRTIO_BLK_S_OK, bytes(512))
        assert (await r.request(VIRTIO_BLK_T_FLUSH))[0] == VIRTIO_BLK_S_OK


async def test_the_id_is_cut_to_fit(engine: str, image: Path) -> None:
    async with rig(Disk(backend(engine, image), serial="root-1")) as r:
        for room in (1, 19, 20, 64):
            status, data = await r.request(VIRTIO_BLK_T_GET_ID, room=room)
            assert (status, data) == (VIRTIO_BLK_S_OK, b"root-1".ljust(20, b"\0")[:room])


async def test_discard_and_write_zeroes(engine: str, image: Path) -> None:
    image.write_bytes(b"x" * MIB)
    async with rig(backend(engine, image)) as r:
        before = image.stat().st_blocks
        segment = struct.pack("<QII", 0, 1024, 0)
        assert (await r.request(VIRTIO_BLK_T_DISCARD, 0, segment))[0] == VIRTIO_BLK_S_OK
        assert image.stat().st_blocks < before
        segments = struct.pack("<QIIQII", 1024, 8, 0, 2040, 8, 1)
        assert (await r.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, segments))[0] == VIRTIO_BLK_S_OK
        assert r.disk.stats().discards == 2
    expected = bytes(MIB // 2 + 4096) + b"x" * (MIB // 2 - 8192) + bytes(4096)
    assert image.read_bytes() == expected


async def test_a_gibibyte_is_moved_in_pieces(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    async with rig(Disk(backend(engine, path), queue_size=1024), memory=24 * MIB) as r:
        driver = r.drivers[0]
        gpa = 8 * MIB
        head, status = 7 * MIB, 7 * MIB + 16
        r.memory.write(head, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 0))
        driver.write_descriptor(0, head, 16, 1, 1)
        for i in range(1, 129):
            driver.write_descriptor(i, gpa, 8 * MIB, 3, i + 1)
        driver.write_descriptor(129, status, 1, 2)
        r.memory.write(gpa, b"x" * 100)
        r.memory.write(status, b"\xff")
        driver.make_available(0)
        r.host.notify(0)
        while driver._u16(driver.device + 2) == 0:
            await r.host.next_interrupt()
        assert r.memory.read(status, 1) == b"\0"
        assert r.memory.read(gpa, 100) == bytes(100)


async def test_many_requests_at_once_on_two_queues(engine: str, image: Path) -> None:
    async with rig(Disk(backend(engine, image), queues=2)) as r:
        for i in range(200):
            r.submit(VIRTIO_BLK_T_OUT, i * 8, bytes([i]) * 4096, queue=i % 2)
        r.host.notify(0)
        r.host.notify(1)
        done = 0
        while done < 200:
            done += len(r.drivers[0].used()) + len(r.drivers[1].used())
            if done < 200:
                await r.host.next_interrupt()
        assert r.disk.stats().writes == 200
    assert image.read_bytes()[: 200 * 4096] == b"".join(bytes([i]) * 4096 for i in range(200))


async def test_an_image_that_is_truncated_under_us(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        os.truncate(image, MIB // 2)
        assert (await r.request(VIRTIO_BLK_T_IN, 1016, room=8192))[0] == VIRTIO_BLK_S_IOERR
        assert (await r.request(VIRTIO_BLK_T_OUT, 2000, b"x" * 512))[0] == VIRTIO_BLK_S_IOERR
        assert image.stat().st_size == MIB // 2
        event = await failure(r.events)
        assert (event.disk, event.operation, event.paused) == ("test/disk0", "read", False)
        assert event.error.errno == errno.EIO
        assert (await failure(r.events)).operation == "write"
        assert r.disk.failures == 2


async def test_failures_that_come_at_once_are_all_counted(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        os.truncate(image, 0)
        for _ in range(80):
            r.submit(VIRTIO_BLK_T_OUT, 8, b"z" * 512)
        r.host.notify(0)
        with anyio.fail_after(30):
            while r.disk.failures < 80:
                await anyio.lowlevel.checkpoint()
        assert r.disk.failures == r.disk.stats().errors == 80


async def test_a_failed_request_pauses_the_machine_and_is_tried_again(engine: str, image: Path) -> None:
    async with rig(Disk(backend(engine, image), on_error="pause")) as r:
        os.truncate(image, 0)
        r.submit(VIRTIO_BLK_T_OUT, 8, b"y" * 4096)
        r.host.notify(0)
        assert (await failure(r.events)).paused
        while not r.pauses:
            await anyio.lowlevel.checkpoint()
        r.disks.retry()
        assert (await failure(r.events)).operation == "write"
        assert not r.drivers[0].used()
        os.truncate(image, MIB)
        r.disks.retry()
        await r.used()
        # One that still waits holds up neither a reset nor the end.
        os.truncate(image, 0)
        r.submit(VIRTIO_BLK_T_OUT, 8, b"y" * 4096)
        r.host.notify(0)
        await failure(r.events)
    assert r.disk.stats().in_flight == 0


async def test_a_reset_drains_and_discards(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        for _ in range(5):
            for i in range(100):
                r.submit(VIRTIO_BLK_T_IN, i, room=65536)
            r.host.notify(0)
            await anyio.lowlevel.checkpoint()
            await r.reset()
            assert r.disk.stats().in_flight == 0
            idx = r.drivers[0]._u16(r.drivers[0].device + 2)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            assert r.drivers[0]._u16(r.drivers[0].device + 2) == idx
            r.start()
        assert (await r.request(VIRTIO_BLK_T_IN, room=512))[0] == VIRTIO_BLK_S_OK


async def test_a_reset_right_after_the_start(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        for _ in range(50):
            r.submit(VIRTIO_BLK_T_IN, 0, room=512)
            r.host.notify(0)
            await r.reset()
            r.start()
        assert (await r.request(VIRTIO_BLK_T_IN, room=512))[0] == VIRTIO_BLK_S_OK


async def test_one_queue_is_taken_away(engine: str, image: Path) -> None:
    async with rig(Disk(backend(engine, image), queues=2)) as r:
        for i in range(20):
            r.submit(VIRTIO_BLK_T_IN, i, room=4096, queue=0)
            r.submit(VIRTIO_BLK_T_IN, i, room=4096, queue=1)
        r.host.notify(0)
        r.host.notify(1)
        done = r.disk.device.stop_queue(0)
        if done is not None:
            await done
        r.queues[0].stop()
        found = 0
        while found < 20:
            found += len(r.drivers[1].used())
            await anyio.lowlevel.checkpoint()
        assert (await r.request(VIRTIO_BLK_T_IN, room=512, queue=1))[0] == VIRTIO_BLK_S_OK


async def test_a_limit_holds_requests_back(engine: str, image: Path) -> None:
    limit = Limit(operations_per_second=1, burst_operations=1)
    async with rig(Disk(backend(engine, image), limit=limit)) as r:
        for _ in range(4):
            r.submit(VIRTIO_BLK_T_IN, 0, room=512)
        r.host.notify(0)
        found = 0
        while found < 2:
            found += len(r.drivers[0].used())
            await anyio.lowlevel.checkpoint()
        while not r.disk.stats().throttled:
            await anyio.lowlevel.checkpoint()
        assert not r.drivers[0].used()


async def test_write_through(engine: str, image: Path) -> None:
    async with rig(Disk(backend(engine, image), cache="writethrough")) as r:
        assert (await r.request(VIRTIO_BLK_T_OUT, 0, b"z" * 512))[0] == VIRTIO_BLK_S_OK
        segment = struct.pack("<QII", 8, 8, 0)
        assert (await r.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, segment))[0] == VIRTIO_BLK_S_OK


async def test_resize(engine: str, image: Path) -> None:
    async with rig(backend(engine, image)) as r:
        assert (await r.request(VIRTIO_BLK_T_IN, SECTORS, room=512))[0] == VIRTIO_BLK_S_IOERR
        await r.disk.resize(2 * MIB)
        assert r.host.changes == 1
        assert r.disk.device.read_config(0, 4) == 2 * SECTORS
        assert (await r.request(VIRTIO_BLK_T_IN, SECTORS, room=512))[0] == VIRTIO_BLK_S_OK
        await r.disk.resize(4096)
        assert (await r.request(VIRTIO_BLK_T_IN, 8, room=512))[0] == VIRTIO_BLK_S_IOERR
        assert (await r.request(VIRTIO_BLK_T_OUT, 7, b"q" * 512))[0] == VIRTIO_BLK_S_OK
        with pytest.raises(ConfigError):
            await r.disk.resize(100)
        with pytest.raises(ConfigError):
            await r.disk.resize(1 << 63)
    assert image.stat().st_size == 4096


async def test_a_disk_that_cannot_be_made_smaller_stays_as_it_is() -> None:
    class Stiff(Failing):
        async def resize(self, size_bytes: int) -> None:
            raise OSError(errno.EPERM, f"not {size_bytes}")

    async with rig(Stiff()) as r:
        with pytest.raises(OSError, match="not 4096"):
            await r.disk.resize(4096)
        assert r.disk.device.read_config(0, 4) == SECTORS
        assert (await r.request(VIRTIO_BLK_T_IN, SECTORS - 1, room=512))[0] == VIRTIO_BLK_S_OK


class Failing(BlockBackend):
    """Fails as its attribute says."""

    def __init__(self) -> None:
        self.size_bytes = MIB
        self.discard_granularity_bytes = 512
        self.error: Exception | None = None
        self.short = 0
        self.flushes = 0
        self.is_open = False

    async def open(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    def _fail(self) -> None:
        if self.error:
            raise self.error

    async def read(self, offset: int, length: int) -> bytes:
        self._fail()
        return bytes(length - self.short)

    async def write(self, offset: int, data: memoryview) -> None:
        self._fail()

    async def flush(self) -> None:
        self.flushes += 1
        self._fail()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), RuntimeError("bug")]
)
async def test_what_a_backend_raises_is_an_io_error(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing()
    async with rig(failing) as r:
        failing.error = error
        assert (await r.request(VIRTIO_BLK_T_IN, room=512))[0] == VIRTIO_BLK_S_IOERR
        event = await failure(r.events)
        assert event.error.errno == (error.errno if isinstance(error, OSError) else errno.EIO)
        assert (await r.request(VIRTIO_BLK_T_OUT, 0, bytes(512)))[0] == VIRTIO_BLK_S_IOERR
        failing.error = None
        assert (await r.request(VIRTIO_BLK_T_OUT, 0, bytes(512)))[0] == VIRTIO_BLK_S_OK
    assert not failing.is_open
    caplog.clear()  # a traceback keeps what it tells of


async def test_a_short_read_is_an_io_error() -> None:
    failing = Failing()
    async with rig(failing) as r:
        failing.short = 1
        assert (await r.request(VIRTIO_BLK_T_IN, room=512))[0] == VIRTIO_BLK_S_IOERR


async def test_a_failed_flush_is_sticky() -> None:
    failing = Failing()
    async with rig(failing) as r:
        failing.error = OSError(errno.EIO, "bad")
        assert (await r.request(VIRTIO_BLK_T_FLUSH))[0] == VIRTIO_BLK_S_IOERR
        failing.error = None
        assert (await r.request(VIRTIO_BLK_T_FLUSH))[0] == VIRTIO_BLK_S_IOERR
        await r.reset()
        r.start()
        assert (await r.request(VIRTIO_BLK_T_FLUSH))[0] == VIRTIO_BLK_S_IOERR
        assert failing.flushes == 1


async def test_a_discard_that_a_backend_cannot_is_a_hint() -> None:
    async with rig(Failing()) as r:
        segment = struct.pack("<QII", 0, 8, 0)
        assert (await r.request(VIRTIO_BLK_T_DISCARD, 0, segment))[0] == VIRTIO_BLK_S_OK
        assert (await r.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, segment))[0] == VIRTIO_BLK_S_OK


async def test_options_that_cannot_be(image: Path) -> None:
    raw = Raw(image)
    for options in ({"cache": "none"}, {"on_error": "stop"}, {"queues": 0}, {"queue_size": 3}):
        with pytest.raises(ConfigError):
            Disk(raw, **options)
    with pytest.raises(ConfigError, match="backend='image': give "):
        Disk("image")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="twice"):
        async with rig(raw, raw):
            pass
    assert raw.fd == -1


async def test_nothing_is_left_of_disks_that_cannot_all_be_opened(image: Path, tmp_path: Path) -> None:
    raw = Raw(image)
    with pytest.raises(ImageError, match="No such file"):
        async with rig(raw, Raw(tmp_path / "missing")):
            pass
    assert raw.fd == -1
    assert not [t for t in threads() if "disk" in t]


def threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


# ---- on KVM ----

REGISTERS = 0xD000_0000
RINGS = 0x14_0000


def booted(program: Any, driver: SplitDriver) -> bytes:
    """A guest that brings up the first disk's first queue, notifies it once, and stands still."""
    p = program()
    for offset, value in (
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),  # VIRTIO_F_VERSION_1
        (0x24, 0),
        (0x20, 1 << 9),  # VIRTIO_BLK_F_FLUSH
        (0x70, 11),
        (0x30, 0),
        (0x38, driver.size),
        (0x80, driver.desc),
        (0x90, driver.driver),
        (0xA0, driver.device),
        (0x44, 1),
        (0x70, 15),
        (0x50, 0),
    ):
        p.write(REGISTERS + offset, value, 4)
    return bytes(p.halt())


def rings(memory: Any, data: bytes) -> SplitDriver:
    """With one write of these bytes to sector 1."""
    driver = SplitDriver(memory, 8, base=RINGS)
    driver.add([struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, 1), data], [1])
    return driver


def probe() -> SplitDriver:
    """Where a driver's rings will lie, before there is a machine."""
    return rings(FakeMemory((0, 2 * MIB)), bytes(512))


@pytest.mark.kvm
@pytest.mark.parametrize("engine", ["io_uring", "threads", "loop"])
async def test_a_guest_writes(engine: str, image: Path, guest: Any, program: Any) -> None:
    code = booted(program, probe())
    async with guest(code, mode="protected", start=False, disks=[backend(engine, image)]) as vm:
        driver = rings(vm.memory, b"guest".ljust(512, b"."))
        await vm.start()
        while not driver.used():
            await anyio.lowlevel.checkpoint()
        assert vm.disks[0].stats().writes == 1
        assert vm.disks[0].engine == engine
    assert image.read_bytes()[512:1024] == b"guest".ljust(512, b".")


@pytest.mark.kvm
@pytest.mark.parametrize("engine", ["io_uring", "loop"])
async def test_a_machine_is_paused_by_a_disk(engine: str, image: Path, guest: Any, program: Any) -> None:
    code = booted(program, probe())
    disk = Disk(backend(engine, image), on_error="pause")
    async with guest(code, mode="protected", start=False, disks=[disk]) as vm:
        driver = rings(vm.memory, b"x" * 512)
        events = vm.events()
        os.truncate(image, 0)
        await vm.start()
        seen: list[Event] = []
        while not any(isinstance(event, Paused) for event in seen):
            seen.append(await anext(events))
        [failed] = [event for event in seen if isinstance(event, DiskFailed)]
        assert failed.paused
        assert not driver.used()
        os.truncate(image, MIB)
        await vm.resume()
        while not driver.used():
            await anyio.lowlevel.checkpoint()
    assert image.read_bytes()[512:1024] == b"x" * 512


@pytest.mark.kvm
@pytest.mark.parametrize("engine", ["io_uring", "threads", "loop"])
async def test_a_machine_is_reset_and_killed_with_a_disk(
    engine: str, image: Path, guest: Any, program: Any
) -> None:
    code = booted(program, probe())
    async with guest(code, mode="protected", start=False, disks=[backend(engine, image)]) as vm:
        for _ in range(3):
            driver = rings(vm.memory, b"x" * 512)
            if vm.state.value == "created":
                await vm.start()
            else:
                await vm.reset()
            while not driver.used():
                await anyio.lowlevel.checkpoint()
        await vm.kill()
        with pytest.raises(StateError):
            await vm.resume()
    assert not [t for t in threads() if "disk" in t]


@pytest.mark.kvm
async def test_two_machines_cannot_write_one_image(image: Path, guest: Any) -> None:
    async with guest(b"\xf4", start=False, disks=[block.Raw(image)]):
        with pytest.raises(ImageError, match="locked"):
            async with guest(b"\xf4", start=False, disks=[block.Raw(image)]):
                pass


@pytest.mark.kvm
async def test_creation_that_fails_leaves_nothing(image: Path, tmp_path: Path, guest: Any) -> None:
    raw = block.Raw(image)
    with pytest.raises(ImageError, match="No such file"):
        async with guest(b"\xf4", disks=[raw, block.Raw(tmp_path / "missing")]):
            pass
    assert raw.fd == -1


@pytest.mark.kvm
async def test_creation_that_is_cancelled_leaves_nothing(image: Path, guest: Any, cancelled: Any) -> None:
    for turns in range(0, 40, 3):
        raw = block.Raw(image)

        async def create(raw: Raw = raw) -> None:
            vm: VM
            async with guest(b"\xf4", start=False, disks=[raw]) as vm:
                assert vm.disks

        await cancelled(turns, create)
        assert raw.fd == -1
