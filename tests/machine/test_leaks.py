"""A machine leaves nothing behind, however its creation, its life or its end goes wrong."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import VM, AiokvmError, ExitReason, VmState, boot, kvm
from aiokvm._core import lib
from aiokvm.machine import build, hardware, life, platform, vcpus
from aiokvm.machine import vm as machine
from aiokvm.machine.exits import Exits
from aiokvm.machine.vcpu import VirtualCpu
from aiokvm.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.machine.conftest import Cancelled, Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

SPIN = b"\xeb\xfe"
HALT = b"\xfa\xf4"


class StepError(Exception):
    """What the injected step raises."""


async def create(cpus: int = 2) -> VM:
    return await VM.create(boot=boot.Flat(SPIN), memory="2M", cpus=cpus)


def descriptors() -> list[str]:
    return sorted(
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if Path(f"/proc/self/fd/{fd}").exists()
    )


STEPS: list[tuple[Any, str]] = [
    (hardware, "_check_limits"),
    (hardware, "GuestMemory"),
    (hardware, "cpuid"),
    (hardware, "gsi_routing"),
    (hardware, "_set_up_apic"),
    (hardware, "_set_msr"),
    (hardware, "_set_cpu_state"),
    (kvm.System, "create_vm"),
    (kvm.System, "get_supported_cpuid"),
    (kvm.Vm, "set_tss_addr"),
    (kvm.Vm, "set_identity_map_addr"),
    (kvm.Vm, "create_irqchip"),
    (kvm.Vm, "create_pit2"),
    (kvm.Vm, "set_gsi_routing"),
    (kvm.Vm, "set_user_memory_region"),
    (kvm.Vm, "create_vcpu"),
    (kvm.Vcpu, "set_cpuid2"),
    (kvm.Vcpu, "set_lapic"),
    (kvm.Vcpu, "set_regs"),
    (build, "Hardware"),
    (life, "Exits"),
    (life, "Platform"),
    (vcpus, "VirtualCpu"),
    (platform, "SerialConsole"),
    (platform, "I8042"),
    (platform, "Cmos"),
    (platform, "AcpiPm"),
    (Exits, "publish"),
    (Exits, "serve_vcpus"),
    (GuestMemory, "write"),
    (machine, "load"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[f"{o.__name__}.{n}" for o, n in STEPS])
@pytest.mark.parametrize("call", [1, 2])
async def test_a_creation_that_fails_at_any_step_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    before = descriptors()
    real = getattr(owner, name)
    calls = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise StepError(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, step)
    try:
        vm = await create()
    except StepError as error:
        error.__traceback__ = None
    else:
        # It was called once only.
        assert calls < call
        await vm.aclose()
    # What collected objects would give back does not count as given back.
    assert descriptors() == before


@pytest.mark.parametrize("vcpu", [0, 1])
async def test_a_start_that_fails_at_a_thread_ends_the_machine(
    monkeypatch: pytest.MonkeyPatch, vcpu: int
) -> None:
    start = VirtualCpu.start

    def no_more_threads(self: VirtualCpu) -> None:
        if self.index == vcpu:
            raise AiokvmError("no more threads")
        start(self)

    monkeypatch.setattr(VirtualCpu, "start", no_more_threads)
    async with await create() as vm:
        with pytest.raises(AiokvmError, match="no more threads"):
            await vm.start()
        exit_ = await vm.wait()
        assert (exit_.reason, exit_.detail) == (ExitReason.ERROR, "no more threads")
        assert vm.state is VmState.STOPPED


@pytest.mark.parametrize("state", ["created", "running", "paused", "stopped", "closed"])
async def test_an_exception_inside_the_context_frees_all(state: str) -> None:
    vm = await create()

    async def fail() -> None:
        async with vm:
            if state in ("running", "paused"):
                await vm.start()
            if state == "paused":
                await vm.pause()
            if state == "stopped":
                await vm.kill()
            if state == "closed":
                await vm.aclose()
            raise StepError

    with pytest.raises(StepError):
        await fail()
    assert vm.state is VmState.CLOSED


async def test_a_create_that_is_cancelled_at_any_await_frees_all(
    cancelled: Cancelled, resources: Callable[[], object]
) -> None:
    before = resources()
    made: list[VM] = []

    async def make() -> None:
        made.append(
            await VM.create(
                boot=boot.Flat(bytes(3 << 20), load=1 << 20, entry=1 << 20, mode="long"), memory="8M"
            )
        )

    for turns in range(10):
        returned = await cancelled(turns, make)
        assert returned == bool(made)
        while made:
            await made.pop().aclose()
        assert resources() == before


async def test_a_life_that_is_cancelled_at_any_await_frees_all(
    cancelled: Cancelled, resources: Callable[[], object]
) -> None:
    before = resources()

    async def live() -> None:
        async with await create() as vm:
            await vm.start()
            await vm.pause()
            await vm.resume()
            await vm.reset()
            await vm.stop(timeout=0)

    for turns in range(0, 40, 2):
        await cancelled(turns, live)
        assert resources() == before


async def test_a_close_that_is_cancelled_frees_all(
    cancelled: Cancelled, resources: Callable[[], object]
) -> None:
    before = resources()
    for turns in range(8):
        vm = await create()
        await vm.start()
        await cancelled(turns, vm.aclose)
        if turns:
            assert vm.state is VmState.CLOSED
        await vm.aclose()
        assert resources() == before


async def test_two_closes_at_once_both_wait_for_the_end(resources: Callable[[], object]) -> None:
    before = resources()
    vm = await create()
    await vm.start()

    async def close() -> None:
        await vm.aclose()
        assert vm.state is VmState.CLOSED
        assert resources() == before

    async with anyio.create_task_group() as group:
        group.start_soon(close)
        group.start_soon(close)


async def test_memory_that_a_view_holds_is_freed_with_the_view(resources: Callable[[], Any]) -> None:
    before = resources()
    vm = await create()
    vm_bytes = vm.memory.size_bytes
    view = vm.memory.view(0x1000, 2)
    await vm.aclose()
    assert bytes(view) == SPIN
    assert resources()["memory"] == before["memory"] + vm_bytes
    view.release()
    del vm
    gc.collect()
    assert resources() == before


async def test_a_thread_that_the_kernel_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kick that does nothing stands for a thread that no signal gets out of the kernel."""
    monkeypatch.setattr(life, "STUCK_SECONDS", 0.05)
    async with await create(cpus=1) as vm:
        await vm.start()
        with monkeypatch.context() as patch:
            patch.setattr(VirtualCpu, "stop", lambda self: None)
            patch.setattr(VirtualCpu, "kick", lambda self: None)
            with pytest.raises(
                AiokvmError, match=rf"vCPU 0's \(thread {vm.vcpus[0].tid}\) .* have not left KVM_RUN"
            ):
                await vm.kill()
        vm.vcpus[0].stop()
        assert (await vm.wait()).reason is ExitReason.KILLED


async def test_a_lost_kick_is_sent_again(monkeypatch: pytest.MonkeyPatch, guest: Guest) -> None:
    """The first wish of each kind reaches the thread as a word in memory only."""
    async with guest(SPIN) as vm:
        vcpu = vm.vcpus[0]

        def pause_unheard(self: VirtualCpu) -> None:
            self.to_pause = True

        def kick(self: VirtualCpu) -> None:
            lib.aiokvm_vcpu_pause(self.core)

        with monkeypatch.context() as patch:
            patch.setattr(VirtualCpu, "pause", pause_unheard)
            patch.setattr(VirtualCpu, "kick", kick)
            await vm.pause()
        assert vcpu.read_register("rip") == 0x1000


def test_a_machine_that_nobody_closed_does_not_take_the_process_with_it() -> None:
    """Its thread touches kvm_run at every turn, and it is collected, with its mappings, while it runs."""
    script = """
import asyncio, gc, warnings
from aiokvm import VM, boot

async def main():
    vm = await VM.create(boot=boot.Flat(bytes.fromhex("e4e0 ebfc")), memory="2M", name="lost")
    await vm.start()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    asyncio.run(main())
    gc.collect()
print(*[warning.message for warning in caught if "VirtualCpu" in str(warning.message)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert re.fullmatch(
        r"<VirtualCpu 0 .*> still ran when its machine was collected: leave `async with vm`\n", done.stdout
    )


# 10,000 on asyncio: the others' adapters are told apart by fewer.
CYCLES = {"asyncio": 10_000}
AT_ONCE = 16


async def test_thousands_of_cycles_leave_all_as_it_was(request: pytest.FixtureRequest) -> None:
    left = CYCLES.get(request.node.callspec.id, 300)

    async def cycles() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with await VM.create(boot=boot.Flat(HALT), memory="2M") as vm:
                await vm.start()
                await vm.kill()
            if left % AT_ONCE == 0:
                # Hundreds of machines that are gone would be collected in one step.
                gc.collect()

    async def all_cycles(count: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(cycles)

    def taken() -> list[int]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [len(descriptors()), len(os.listdir("/proc/self/task")), len(maps)]

    # The loop's worker threads come when they are needed and stay, with what malloc keeps for each.
    workers = [0, AT_ONCE, 10 * AT_ONCE]
    left, rest = 4 * AT_ONCE, left - 4 * AT_ONCE
    await all_cycles(AT_ONCE)
    before = taken()
    left = rest
    await all_cycles(AT_ONCE)
    gc.collect()
    now = taken()
    assert all(n <= b + w for n, b, w in zip(now, before, workers, strict=True)), (before, now)
