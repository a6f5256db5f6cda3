"""Devices under cancellation, failures, blocked loops and kicks: nothing is lost, doubled or left."""

from __future__ import annotations

import itertools
import os
import random
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import VM, Device, Exit, ExitReason, StateError, VcpuState, VmState, boot, kvm
from aiokvm.machine import attachments, vcpus
from aiokvm.machine import vm as machine
from aiokvm.machine.attachments import Attachments

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.machine.device import Placement
    from tests.machine.conftest import Cancelled, Guest, Program

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
MMIO = 0xD000_0000
COUNT = 10_000


class Everything(Device):
    """Has of all that a device can have."""

    def __init__(self) -> None:
        self.runs = 0

    async def read(self, offset: int, size: int) -> int:
        with anyio.fail_after(60):
            await anyio.lowlevel.checkpoint()
        return 0

    async def doorbell(self, offset: int, count: int) -> None:
        await anyio.lowlevel.checkpoint()

    async def run(self) -> None:
        self.runs += 1
        timer = self.timer(self.now_ns(), lambda: None, period_ns=1_000_000)
        try:
            while True:
                await anyio.sleep(0.001)
                self.irq.pulse()
        finally:
            self.runs -= 1
            timer.cancel()

    def everywhere(self) -> list[Placement]:
        return [
            self.at(mmio=MMIO, size=4, irq=5),
            self.at(mmio=MMIO + 0x1000, size=4, mode="doorbell"),
            self.at(mmio=MMIO + 0x2000, size=4, mode="posted"),
            self.at(mmio=MMIO + 0x3000, size=0x1000, mode="memory"),
        ]


@pytest.fixture
def busy(program: type[Program]) -> boot.Flat:
    """Makes use of it, for ever."""
    code = program().read(MMIO).write(MMIO + 0x1000, 1, 4).write(MMIO + 0x2000, 1).write(MMIO + 0x3000, 1)
    return boot.Flat(code.for_ever(), mode="protected")


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# Cancellation.


async def test_a_life_with_devices_that_is_cancelled_at_any_await_leaves_nothing(
    cancelled: Cancelled, busy: boot.Flat, resources: Callable[[], object]
) -> None:
    before = resources()
    device = Everything()

    async def live() -> None:
        async with await VM.create(boot=busy, memory="2M", devices=device.everywhere()) as vm:
            await vm.start()
            await vm.pause()
            await vm.resume()
            await vm.reset()
            await vm.stop(timeout=0)

    for turns in range(0, 60, 3):
        await cancelled(turns, live)
        assert resources() == before
        # It is free for the next.
        assert (device.runs, hasattr(device, "irq")) == (0, False)


@pytest.mark.parametrize("name", ["start", "pause", "resume", "reset", "stop", "kill", "aclose"])
async def test_each_call_may_be_cancelled_while_devices_work(
    cancelled: Cancelled, busy: boot.Flat, name: str
) -> None:
    for turns in range(0, 12, 2):
        device = Everything()
        async with await VM.create(boot=busy, memory="2M", devices=device.everywhere()) as vm:
            if name != "start":
                await vm.start()
            if name == "resume":
                await vm.pause()
            await cancelled(turns, getattr(vm, name))
            if vm.state is VmState.CREATED:
                await vm.start()
            if vm.exit is None and vm.state is VmState.PAUSED:
                await vm.resume()
            # Whatever has become of the call, the machine is whole: it runs, or has ended.
            if vm.exit is None:
                seen = vm.vcpus[0].stats().exits
                while vm.vcpus[0].stats().exits < seen + 10:
                    await anyio.lowlevel.checkpoint()
        assert device.runs == 0


# Failures.


class StepError(Exception):
    """What the injected step raises."""


STEPS: list[tuple[Any, str]] = [
    (Attachments, "_claim"),
    (Attachments, "_share_memory"),
    (Attachments, "_install_doorbell"),
    (attachments, "SharedPages"),
    (attachments, "GsiIrq"),
    (attachments, "_Doorbell"),
    (attachments, "_window"),
    (os, "eventfd"),
    (kvm.Vm, "ioeventfd"),
    (kvm.Vm, "irqfd"),
    (machine, "load"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[f"{o.__name__}.{n}" for o, n in STEPS])
@pytest.mark.parametrize("call", [1, 2, 3])
async def test_a_creation_with_devices_that_fails_at_any_step_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, busy: boot.Flat, owner: Any, name: str, call: int
) -> None:
    device = Everything()
    real = getattr(owner, name)
    calls = itertools.count(1)
    before = descriptors()

    def step(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("deassign") and next(calls) == call:
            raise StepError(name)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, step)
        try:
            vm = await VM.create(boot=busy, memory="2M", devices=device.everywhere())
        except StepError:
            pass
        else:
            assert next(calls) <= call
            await vm.aclose()
    assert descriptors() == before
    async with await VM.create(boot=busy, memory="2M", devices=device.everywhere()) as vm:
        await vm.start()


# A loop that is busy elsewhere.


class Counting(Device):
    """Blocks the loop in the middle."""

    def __init__(self, block_at: int, seconds: float) -> None:
        self.block_at = block_at
        self.seconds = seconds
        self.seen: list[object] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append("read")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(value)
        if value == self.block_at:
            time.sleep(self.seconds)  # the vCPU goes on as far as it can


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize(("block_at", "seconds"), [(0, 1), (100, 5), (5000, 1)])
async def test_a_blocked_loop_loses_and_doubles_nothing(
    guest: Guest, reads: bool, block_at: int, seconds: float
) -> None:
    read = "a1 04 00 00 d0" if reads else ""  # mov eax, [0xd0000004]
    code = bytes.fromhex(
        "31 c9"  # xor ecx, ecx
        "89 0d 00 00 00 d0"  # again: mov [0xd0000000], ecx
        + read
        + "41"  # inc ecx
        + f"81 f9 {COUNT.to_bytes(4, 'little').hex()}"  # cmp ecx, COUNT
        + f"72 {'ec' if reads else 'f1'}"  # jb again
        + "b0 00 e6 f4 f4"  # mov al, 0; out 0xf4, al; hlt
    )
    device = Counting(block_at, seconds)
    async with guest(code, mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=8, mode="posted")
        await vm.start()
        assert await vm.wait() == DONE
    expected = [[i, "read"] if reads else [i] for i in range(COUNT)]
    assert device.seen == list(itertools.chain.from_iterable(expected))


async def test_a_blocked_loop_hears_all_doorbells_and_keeps_its_timers_in_step(
    guest: Guest, program: type[Program]
) -> None:
    class Belled(Device):
        count = 0
        ticks = 0

        def doorbell(self, offset: int, count: int) -> None:
            self.count += count

        def tick(self) -> None:
            self.ticks += 1
            if self.ticks == 1:
                time.sleep(1)

    device = Belled()
    async with guest(program().write(MMIO, 1, 4).times(500).end(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=4, mode="doorbell")
        first_ns = device.now_ns()
        timer = device.timer(first_ns, device.tick, period_ns=10_000_000)
        await vm.start()
        assert await vm.wait() == DONE
        assert device.count == 500
        assert (timer.deadline_ns - first_ns) % 10_000_000 == 0


# Kicks.

KICKED: dict[str, Callable[[type[Program]], bytes]] = {
    "spins": lambda _: b"\xeb\xfe",
    "halts": lambda _: b"\xfa\xf4",
    "accesses a device": lambda program: program().read(MMIO).for_ever(),
    "waits for a coroutine": lambda program: program().read(MMIO + 4).for_ever(),
    "posts": lambda program: program().write(MMIO + 0x1000, 1).for_ever(),
}


class Kicked(Device):
    def read(self, offset: int, size: int) -> Any:
        return self.later() if offset else 0

    async def later(self) -> int:
        await anyio.lowlevel.checkpoint()
        return 0

    def write(self, offset: int, size: int, value: int) -> None: ...


@pytest.mark.parametrize("what", list(KICKED))
async def test_no_kick_is_lost(
    guest: Guest, program: type[Program], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    # No second kick makes up for a lost one.
    monkeypatch.setattr(vcpus, "KICK_AGAIN_NS", 3600 * 10**9)
    moments = random.Random(what)
    async with guest(KICKED[what](program), mode="protected", start=False) as vm:
        vm.attach(Kicked(), mmio=MMIO, size=8)
        vm.attach(Kicked(), mmio=MMIO + 0x1000, mode="posted")
        await vm.start()
        for _ in range(100):
            for _ in range(moments.randrange(4)):
                await anyio.lowlevel.checkpoint()
            await vm.pause()
            assert vm.vcpus[0].state is VcpuState.PAUSED
            await vm.resume()
        await vm.kill()
        with pytest.raises(StateError):
            await vm.pause()
