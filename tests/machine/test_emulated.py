from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import VM, boot, kvm
from aiokvm.machine import emulated, life

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (emulated, life):
        monkeypatch.setattr(module, "first_start", threading.Lock())


SMALL = b"\xf4"
# By a protocol of the program's own or by another; what there is to run says how long that takes.
LARGE = b"\xf4" + bytes(1 << 20)


async def start(image: bytes) -> None:
    flat = boot.Flat(image, load=0x10_0000, entry=0x10_0000, mode="protected")
    async with await VM.create(boot=flat, memory="4M") as vm:
        await vm.start()


@pytest.mark.parametrize(("speed", "warnings"), [(1.2e6, 1), (5e8, 0)])
async def test_the_first_linux_on_an_emulated_ring_0_is_warned_of(
    speed: float, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(emulated, "HARDWARE", ())
    monkeypatch.setattr(kvm, "ring0_speed", lambda _: speed)
    with caplog.at_level(logging.WARNING, "aiokvm.machine"):
        await start(SMALL)
        assert caplog.records == []
        await start(LARGE)
        await start(LARGE)
    assert len(caplog.records) == warnings
    assert all("aiokvm lab -- COMMAND" in record.getMessage() for record in caplog.records)


async def test_of_several_that_start_at_once_one_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(_: object) -> float:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return 1.2e6

    both = threading.Barrier(2)
    monkeypatch.setattr(emulated, "HARDWARE", ())
    monkeypatch.setattr(kvm, "ring0_speed", measure)
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(start, LARGE)
    assert len(caplog.records) == 1


async def test_hosts_with_hardware_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> float:
        raise AssertionError

    monkeypatch.setattr(emulated, "HARDWARE", (str(tmp_path),))
    monkeypatch.setattr(kvm, "ring0_speed", never)
    await start(LARGE)
