"""Disks whose guests ask for as much as they can: no step of the loop takes long; conftest.py measures."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aiokvm import Disk, DiskFailed
from aiokvm._core import ffi, lib
from aiokvm.block import BlockBackend, Overlay, Raw
from aiokvm.budget import BOUNCE_BYTES, Share
from aiokvm.virtio.blk import (
    MAX_CLEAR_SECTORS,
    MAX_SEGMENTS,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from tests.machine.disk_rig import MIB, Rig, backend, rig

if TYPE_CHECKING:
    from pathlib import Path

    from tests.virtio.driver import SplitDriver

pytestmark = pytest.mark.anyio
GIB = 1 << 30
# Where no ring is.
HEADER, STATUS, TABLE, DATA = 0x20_0000, 0x20_1000, 0x21_0000, 0x28_0000


class Eager(BlockBackend):
    """A disk that never waits for anything."""

    size_bytes = 4 * GIB
    discard_granularity_bytes = 512

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    async def write(self, offset: int, data: memoryview) -> None:
        bytes(data)

    async def flush(self) -> None:
        pass

    async def discard(self, offset: int, length: int) -> None:
        pass


def sparse(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def write_table(r: Rig, type_: int, data: list[tuple[int, int]]) -> int:
    """An indirect table of a request with its data there: its length in bytes."""
    write = 2 if type_ in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_GET_ID) else 0
    r.memory.write(HEADER, struct.pack("<IIQ", type_, 0, 0))
    parts = [(HEADER, 16, 0), *((at, length, write) for at, length in data), (STATUS, 1, 2)]
    table = b"".join(
        struct.pack("<QIHH", at, length, flags | (index + 1 < len(parts)), index + 1)
        for index, (at, length, flags) in enumerate(parts)
    )
    r.memory.write(TABLE, table)
    return len(table)


async def served(r: Rig, queues: int, count: int, table_bytes: int) -> None:
    """The same table, so many times in each queue, all at once."""
    drivers: list[SplitDriver] = r.drivers[:queues]
    for driver in drivers:
        r.memory.write(driver.desc, struct.pack("<QIHH", TABLE, table_bytes, 4, 0) * count)
        r.memory.write(driver.driver + 4, struct.pack(f"<{count}H", *range(count)))
        r.memory.write(driver.driver + 2, struct.pack("<H", count))
    for queue in range(queues):
        r.host.notify(queue)
    for driver in drivers:
        while int.from_bytes(r.memory.read(driver.device + 2, 2), "little") < count:
            await r.host.next_interrupt()


@pytest.mark.parametrize("type_", [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN])
@pytest.mark.parametrize("kind", ["overlay", "eager"])
async def test_half_a_gibibyte_in_one_request(kind: str, type_: int, tmp_path: Path) -> None:
    disk: Any = Overlay(Raw(sparse(tmp_path / "base", GIB))) if kind == "overlay" else Eager()
    async with rig(disk, memory=24 * MIB) as r:
        table = write_table(r, type_, [(16 * MIB, 8 * MIB)] * 64)
        await served(r, 1, 1, table)
        assert r.memory.read(STATUS, 1)[0] == VIRTIO_BLK_S_OK


@pytest.mark.parametrize("how", ["commit", "discard_changes"])
async def test_half_a_gibibyte_of_changes_in_memory_goes(how: str) -> None:
    """Whatever it is: moved away, dropped, or closed."""
    overlay = Overlay(Eager())
    async with rig(overlay, memory=24 * MIB) as r:
        table = write_table(r, VIRTIO_BLK_T_OUT, [(16 * MIB, 8 * MIB)] * 64)
        await served(r, 1, 1, table)
        await getattr(overlay, how)()
        await served(r, 1, 2, table)


@pytest.mark.parametrize("type_", [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_GET_ID])
async def test_requests_in_as_many_pieces_as_can_be_on_all_queues(type_: int) -> None:
    """The pieces are a byte each, and as many requests as the queues hold."""
    disk = Disk(Eager(), queues=4, queue_size=1024)
    async with rig(disk, memory=32 * MIB) as r:
        table = write_table(r, type_, [(DATA + index, 1) for index in range(512)] + [(DATA, 512)])
        await served(r, 4, 256, table)


@pytest.mark.parametrize("type_", [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES])
async def test_ranges_as_long_as_they_may_be(type_: int, tmp_path: Path) -> None:
    base = Raw(sparse(tmp_path / "base", 1024 * GIB))
    ranges = b"".join(
        struct.pack("<QII", index * MAX_CLEAR_SECTORS, MAX_CLEAR_SECTORS, type_ == VIRTIO_BLK_T_WRITE_ZEROES)
        for index in range(MAX_SEGMENTS)
    )
    async with rig(Overlay(base, cluster_bytes=4096)) as r:
        for _ in range(3):
            assert await r.request(type_, 0, ranges) == (VIRTIO_BLK_S_OK, b"")


async def test_zeroes_by_a_backend_that_never_waits() -> None:
    ranges = struct.pack("<QII", 0, MAX_CLEAR_SECTORS, 0)
    async with rig(Eager()) as r:
        assert await r.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, ranges) == (VIRTIO_BLK_S_OK, b"")


@pytest.mark.parametrize("engine", ["threads", "loop"])
async def test_failures_are_told_a_few_at_a_time(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long each of them takes."""
    told = 0

    def slow(*_: object) -> None:
        nonlocal told
        told += 1
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass

    image = sparse(tmp_path / "image", MIB)
    async with rig(Disk(backend(engine, image), queues=2)) as r:
        with image.open("r+b") as file:
            file.truncate(0)
        monkeypatch.setattr(r.disks._failures, "error", slow)
        table = write_table(r, VIRTIO_BLK_T_IN, [(DATA, 512)])
        await served(r, 2, 40, table)
        with anyio.fail_after(20):
            while told < 40:
                assert isinstance(await anext(r.events), DiskFailed)


async def test_copies_are_a_share_of_what_the_process_has() -> None:
    """One piece goes on though others have it all."""
    state = ffi.new("struct aiokvm_budget_state *")
    lib.aiokvm_budget_state(lib.aiokvm_budget_of_process(BOUNCE_BYTES), state)
    others = Share(BOUNCE_BYTES)
    others.add(state.total)

    class Counting(Eager):
        running = most = 0

        async def read(self, offset: int, length: int) -> bytes:
            self.running += 1
            self.most = max(self.most, self.running)
            await anyio.lowlevel.checkpoint()
            self.running -= 1
            return bytes(length)

    try:
        disk = Counting()
        async with rig(disk) as r:
            table = write_table(r, VIRTIO_BLK_T_IN, [(DATA, 512)])
            await served(r, 1, 64, table)
        assert disk.most == 1
    finally:
        others.give(state.total)
