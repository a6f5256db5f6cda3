"""The life of a machine: every method in every state, its events, and many callers at once."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from aiokvm import (
    VM,
    BootError,
    ConfigError,
    Exit,
    Exited,
    ExitReason,
    Paused,
    Resumed,
    Started,
    StateError,
    VmState,
    WasReset,
    boot,
)
from aiokvm.machine import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

COUNT = bytes.fromhex(
    "ff 06 00 20"  # again: inc word [0x2000]
    "eb fa"  # jmp again
)
HALT = bytes.fromhex(
    "fa"  # cli
    "f4"  # hlt
)
SHUTDOWN = bytes.fromhex(
    "ba 04 06"  # mov dx, 0x604
    "b8 00 34"  # mov ax, SLP_EN | 5 << 10
    "ef"  # out dx, ax
    "eb fe"  # jmp .
)


async def in_state(vm: VM, state: VmState) -> None:
    """Bring a new machine there."""
    if state in (VmState.RUNNING, VmState.PAUSED):
        await vm.start()
    if state is VmState.PAUSED:
        await vm.pause()
    if state in (VmState.STOPPED, VmState.CLOSED):
        await vm.kill()
    if state is VmState.CLOSED:
        await vm.aclose()
    assert vm.state is state


@pytest.mark.parametrize(
    ("state", "method", "then"),
    [
        ("created", "start", "running"),
        ("created", "pause", "is created; this needs one that is running"),
        ("created", "resume", "is created; this needs one that is paused"),
        ("created", "reset", "is created; this needs one that is running or paused"),
        ("created", "power_button", "is created; this needs one that is running or paused"),
        ("created", "stop", "stopped"),
        ("created", "kill", "stopped"),
        ("created", "aclose", "closed"),
        ("running", "start", "is running; this needs one that is created"),
        ("running", "pause", "paused"),
        ("running", "resume", "running"),
        ("running", "reset", "running"),
        ("running", "power_button", "running"),
        ("running", "kill", "stopped"),
        ("running", "aclose", "closed"),
        ("paused", "start", "is paused; this needs one that is created"),
        ("paused", "pause", "paused"),
        ("paused", "resume", "running"),
        ("paused", "reset", "paused"),
        ("paused", "power_button", "paused"),
        ("paused", "stop", "stopped"),
        ("paused", "kill", "stopped"),
        ("paused", "aclose", "closed"),
        ("stopped", "start", "has ended: killed"),
        ("stopped", "pause", "has ended: killed"),
        ("stopped", "resume", "has ended: killed"),
        ("stopped", "reset", "has ended: killed"),
        ("stopped", "power_button", "has ended: killed"),
        ("stopped", "stop", "stopped"),
        ("stopped", "kill", "stopped"),
        ("stopped", "wait", "stopped"),
        ("stopped", "aclose", "closed"),
        ("closed", "start", "is closed"),
        ("closed", "pause", "is closed"),
        ("closed", "resume", "is closed"),
        ("closed", "reset", "is closed"),
        ("closed", "power_button", "is closed"),
        ("closed", "stop", "closed"),
        ("closed", "kill", "closed"),
        ("closed", "wait", "closed"),
        ("closed", "aclose", "closed"),
    ],
)
async def test_every_method_in_every_state(guest: Guest, state: str, method: str, then: str) -> None:
    async with guest(COUNT, start=False, name="box") as vm:
        await in_state(vm, VmState(state))
        call = getattr(vm, method)
        if " " in then:
            with pytest.raises(StateError, match=f"machine box {then}"):
                await call()
            assert vm.state is VmState(state)
        else:
            answer = call()
            if answer is not None:
                answer = await answer
            assert vm.state is VmState(then)
            if method in ("stop", "kill", "wait"):
                assert answer == vm.exit == Exit(ExitReason.KILLED)


@pytest.mark.parametrize("method", ["pause", "resume", "kill", "aclose"])
async def test_what_is_done_twice_is_done(guest: Guest, method: str) -> None:
    async with guest(COUNT) as vm:
        await getattr(vm, method)()
        state = vm.state
        await getattr(vm, method)()
        assert vm.state is state


async def test_events_tell_the_whole_life(guest: Guest) -> None:
    async with guest(COUNT, start=False, name="box") as vm:
        events = vm.events()
        await vm.start()
        await vm.pause()
        await vm.pause()
        late = vm.events()
        await vm.reset()
        await vm.resume()
        await vm.resume()
        await vm.reset()
        await vm.kill()
        tail = [WasReset("box"), Resumed("box"), WasReset("box"), Exited("box", Exit(ExitReason.KILLED))]
        assert [event async for event in events] == [Started("box"), Paused("box"), *tail]
        assert [event async for event in late] == tail
        assert [event async for event in vm.events()] == []


async def test_many_wait_and_all_are_told(guest: Guest) -> None:
    exits: list[Exit] = []

    async def wait(vm: VM) -> None:
        exits.append(await vm.wait())

    async with guest(SHUTDOWN, start=False) as vm:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(wait, vm)
            await anyio.wait_all_tasks_blocked()
            assert exits == []
            await vm.start()
        assert exits == [Exit(ExitReason.SHUTDOWN)] * 5


async def test_everything_at_once_leaves_one_exit(guest: Guest) -> None:
    """Whoever comes too late is told so, and nobody hangs."""
    refused: list[StateError] = []

    async def call(method: Callable[[], object]) -> None:
        try:
            await method()  # type: ignore[misc]
        except StateError as error:
            refused.append(error)

    async with guest(COUNT, cpus=2) as vm:
        async with anyio.create_task_group() as group:
            for method in (vm.pause, vm.reset, vm.resume, vm.pause, vm.reset, vm.kill, vm.wait, vm.aclose):
                group.start_soon(call, method)
        assert vm.exit == Exit(ExitReason.KILLED)
        assert vm.state is VmState.CLOSED
        assert refused
        assert {str(error) for error in refused} == {f"machine {vm.name} has ended: killed"}


async def test_the_machine_ends_while_it_is_being_paused(guest: Guest) -> None:
    async with guest(COUNT) as vm:
        async with anyio.create_task_group() as group:

            async def pause() -> None:
                with pytest.raises(StateError, match="has ended: killed"):
                    await vm.pause()

            group.start_soon(pause)
            group.start_soon(vm.kill)
        assert vm.state is VmState.STOPPED


@pytest.mark.parametrize("end", ["kill", "aclose"])
@pytest.mark.parametrize("paused", [False, True])
async def test_the_machine_ends_while_it_is_being_reset(end: str, paused: bool) -> None:
    # Large enough for the reset to give the loop to others while it copies.
    size = 8 << 20
    image = b"\xeb\xfe" + bytes(size - 2)
    plan = boot.Flat(image, load=1 << 20, entry=1 << 20, mode="protected")
    with anyio.fail_after(30):
        async with await VM.create(boot=plan, memory="16M") as vm:
            await vm.start()
            if paused:
                await vm.pause()
            events = vm.events()
            async with anyio.create_task_group() as group:

                async def reset() -> None:
                    with pytest.raises(StateError, match=r"has ended: killed|is closed"):
                        await vm.reset()

                vm.memory.write((1 << 20) + 2, b"\xff")
                group.start_soon(reset)
                while vm.memory.read((1 << 20) + 2, 1) == b"\xff":
                    await anyio.lowlevel.checkpoint()
                await getattr(vm, end)()
            assert vm.state is (VmState.CLOSED if end == "aclose" else VmState.STOPPED)
            assert [event async for event in events] == [Exited(vm.name, Exit(ExitReason.KILLED))]


async def test_a_missing_file_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "Hardware", None)
    with pytest.raises(BootError, match="No such file"):
        await VM.create(boot=boot.Flat(tmp_path / "missing"))


async def test_a_reset_without_its_file_is_refused_and_the_machine_runs_on(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(COUNT)
    async with await VM.create(boot=boot.Flat(image), memory="2M") as vm:
        await vm.start()
        image.unlink()
        with pytest.raises(BootError, match="No such file"):
            await vm.reset()
        assert vm.state is VmState.RUNNING
        seen = vm.memory.read(0x2000, 2)
        with anyio.fail_after(10):
            while vm.memory.read(0x2000, 2) == seen:
                await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cpus": 0}, "cpus is 0"),
        ({"memory": "1M"}, "at least 2M"),
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"serial_ports": 5}, "serial_ports is 5"),
        ({"hugepages": "4M"}, "hugepages of 4194304 bytes do not exist"),
        ({"name": "a\nb"}, "printable"),
    ],
)
async def test_what_cannot_be_built_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await VM.create(boot=boot.Flat(HALT), **wrong)  # type: ignore[arg-type]


async def test_its_repr_says_what_it_is(guest: Guest) -> None:
    async with guest(HALT, name="web-1", cpus=2) as vm:
        assert repr(vm) == "<VM web-1 running, 2 vCPUs>"
        assert repr(vm.vcpus[1]) == f"<VirtualCpu 1 running tid={vm.vcpus[1].tid}>"
    assert repr(vm.vcpus[1]) == "<VirtualCpu 1 stopped tid=0>"
    assert vm.name == "web-1"


async def test_a_machine_gets_a_name() -> None:
    async with (
        await VM.create(boot=boot.Flat(HALT), memory="2M") as one,
        await VM.create(boot=boot.Flat(HALT), memory="2M") as other,
    ):
        assert one.name.startswith("vm-")
        assert one.name != other.name


async def test_memory_that_the_program_closes_is_the_guest_s_until_the_end(guest: Guest) -> None:
    async with guest(COUNT) as vm:
        [region] = vm.memory.regions
        address = region.host_address
        del region
        vm.memory.close()
        gc.collect()
        # The vCPU counts at 0x2000, or KVM would have said that there is nothing.
        for _ in range(3):
            seen = ctypes.string_at(address + 0x2000, 1)
            while ctypes.string_at(address + 0x2000, 1) == seen:
                await anyio.lowlevel.checkpoint()
        assert vm.state is VmState.RUNNING
