"""The balloon as a program uses it: targets, statistics, and memory that really goes back."""

from __future__ import annotations

import logging
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm.errors import ConfigError, StateError
from aiokvm.logs import SeldomLogger
from aiokvm.machine import balloon as module
from aiokvm.machine.balloon import MemoryBalloon
from aiokvm.memory import GuestMemory
from aiokvm.virtio.balloon import INFLATEQ, STATSQ
from tests.virtio.guest import DeviceGuest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

MIB = 1 << 20
ACTUAL = 4


class Rig:
    def __init__(self, memory: GuestMemory) -> None:
        logger = SeldomLogger(logging.getLogger("aiokvm.test"))
        self.memory = memory
        self.balloon = MemoryBalloon(memory, "vm-1", logger)
        self.guest = DeviceGuest(self.balloon.device, memory=memory)

    def says(self, pages: int) -> None:
        """The driver says how many pages are in the balloon."""
        self.balloon.device.write_config(ACTUAL, 4, pages)

    def sends_stats(self, value: int) -> None:
        self.guest.drivers[STATSQ].used()
        self.guest.drivers[STATSQ].add([struct.pack("<HQ", 4, value)])
        self.guest.notify(STATSQ)


@contextmanager
def a_rig() -> Iterator[Rig]:
    memory = GuestMemory(16 * MIB, shared=True)
    rig = Rig(memory)
    yield rig
    rig.guest.reset()
    # They keep the memory mapped.
    rig.guest.queues.clear()
    memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with a_rig() as rig:
        yield rig


def test_pages_go_back_to_the_host_and_read_as_zeros(rig: Rig) -> None:
    page = 8 * MIB // 4096
    rig.memory.write(page * 4096, b"secret" * 1000)
    assert rig.memory.fd is not None
    before = os.fstat(rig.memory.fd).st_blocks
    rig.guest.drivers[INFLATEQ].add([struct.pack("<II", page, page + 1)])
    rig.guest.notify(INFLATEQ)
    assert os.fstat(rig.memory.fd).st_blocks == before - 2 * 4096 // 512
    assert rig.memory.read(page * 4096, 8192) == bytes(8192)
    assert rig.balloon.released_bytes == 8192
    assert rig.balloon.dropped == 0


def test_a_host_that_refuses_is_logged_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(pages: memoryview) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module, "discard", refuse)
    for page in (3000, 3002):
        rig.guest.drivers[INFLATEQ].add([struct.pack("<I", page)])
        rig.guest.notify(INFLATEQ)
    assert [record.message for record in caplog.records] == [
        "vm-1: the host does not take back memory of the balloon: Invalid argument"
    ]
    assert rig.guest.host.reasons == []


def test_targets(rig: Rig) -> None:
    assert (rig.balloon.target, rig.balloon.actual) == (0, 0)
    rig.balloon.target = 4 * MIB
    assert rig.balloon.target == 4 * MIB
    assert rig.guest.host.config_changes == 1
    for size in (-4096, 4097, 16 * MIB + 4096):
        with pytest.raises(ConfigError, match="multiple of 4096, at most the guest's 16777216"):
            rig.balloon.target = size
    assert rig.balloon.target == 4 * MIB


async def test_reached_waits_for_the_guest(rig: Rig) -> None:
    await rig.balloon.reached()
    rig.balloon.target = 8192
    async with anyio.create_task_group() as group:
        group.start_soon(rig.balloon.reached)
        for pages in (1, 3, 2):
            await anyio.wait_all_tasks_blocked()
            rig.says(pages)
    assert rig.balloon.actual == 8192


async def test_statistics_are_those_of_now(rig: Rig) -> None:
    rig.sends_stats(1)
    found: list[int] = []

    async def ask() -> None:
        found.append((await rig.balloon.stats())["free"])

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        assert rig.guest.host.interrupts == [STATSQ]
        rig.sends_stats(2)
    assert found == [2, 2]


async def test_a_guest_that_does_not_answer_is_waited_for_in_bounds(rig: Rig) -> None:
    with pytest.raises(TimeoutError, match=r"no statistics of vm-1's memory within 0 s"):
        await rig.balloon.stats(0)


async def test_the_end_of_the_machine_ends_all_waits(rig: Rig) -> None:
    rig.balloon.target = 4096
    ended: list[str] = []

    async def ends(call: object) -> None:
        with pytest.raises(StateError, match="vm-1 has ended"):
            await call  # type: ignore[misc]
        ended.append("")

    async with anyio.create_task_group() as group:
        group.start_soon(ends, rig.balloon.reached())
        group.start_soon(ends, rig.balloon.stats())
        await anyio.wait_all_tasks_blocked()
        rig.balloon.close()
        rig.balloon.close()
    assert len(ended) == 2
    with pytest.raises(StateError):
        await rig.balloon.stats()
    rig.sends_stats(1)
    rig.says(7)
