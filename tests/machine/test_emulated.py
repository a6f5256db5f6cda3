from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from aiokvm import VM, boot, kvm
from aiokvm.machine import emulated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    emulated.warn_if_emulated.cache_clear()
    yield
    emulated.warn_if_emulated.cache_clear()


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


async def test_hosts_with_hardware_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> float:
        raise AssertionError

    monkeypatch.setattr(emulated, "HARDWARE", (str(tmp_path),))
    monkeypatch.setattr(kvm, "ring0_speed", never)
    await start(LARGE)
