"""Pause, stop and kill work within a bound whatever the guest does, and leave whole instructions behind."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import anyio.lowlevel
import pytest

from aiokvm import ConfigError, Exit, ExitReason, StateError, VcpuState, VmState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.machine.conftest import Attach, Cancelled, Guest, Recorder

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

STUBBORN = {
    "spins with interrupts off": (
        "real",
        "fa"  # cli
        "eb fe",  # jmp .
    ),
    "halted with interrupts off": (
        "real",
        "fa"  # cli
        "f4",  # hlt
    ),
    "halted with interrupts on": (
        "real",
        "fb"  # again: sti
        "f4"  # hlt
        "eb fc",  # jmp again
    ),
    "reads a port that a device answers": (
        "real",
        "e4 64"  # again: in al, 0x64
        "eb fc",  # jmp again
    ),
    "reads a port that nothing answers": (
        "real",
        "e4 e0"  # again: in al, 0xe0
        "eb fc",  # jmp again
    ),
    "writes to the serial port": (
        "real",
        "ba f8 03"  # mov dx, 0x3f8
        "ee"  # again: out dx, al
        "eb fd",  # jmp again
    ),
    "reads memory that nothing answers": (
        "protected",
        "a1 00 00 00 d0"  # again: mov eax, [0xd0000000]
        "eb f9",  # jmp again
    ),
    "writes memory that nothing answers": (
        "protected",
        "a3 00 00 00 d0"  # again: mov [0xd0000000], eax
        "eb f9",  # jmp again
    ),
    "writes strings to a port": (
        "protected",
        "66 ba f8 03"  # again: mov dx, 0x3f8
        "be 00 20 00 00"  # mov esi, 0x2000
        "b9 00 10 00 00"  # mov ecx, 0x1000
        "f3 6e"  # rep outsb
        "eb ee",  # jmp again
    ),
    "reads strings from a port": (
        "protected",
        "66 ba 60 00"  # again: mov dx, 0x60
        "bf 00 20 00 00"  # mov edi, 0x2000
        "b9 00 10 00 00"  # mov ecx, 0x1000
        "f3 6c"  # rep insb
        "eb ee",  # jmp again
    ),
    "reads strings from a port that nothing answers": (
        "protected",
        "66 ba e0 00"  # again: mov dx, 0xe0
        "bf 00 20 00 00"  # mov edi, 0x2000
        "b9 00 04 00 00"  # mov ecx, 0x400
        "f3 6d"  # rep insd
        "eb ee",  # jmp again
    ),
}


@pytest.fixture(params=list(STUBBORN))
def stubborn(request: pytest.FixtureRequest) -> tuple[bytes, str]:
    mode, code = STUBBORN[request.param]
    return bytes.fromhex(code), mode


async def test_any_guest_can_be_paused_resumed_reset_and_killed(
    guest: Guest, stubborn: tuple[bytes, str]
) -> None:
    code, mode = stubborn
    async with guest(code, mode=mode) as vm:
        for _ in range(5):
            await vm.pause()
            assert vm.vcpus[0].state is VcpuState.PAUSED
            assert 0x1000 <= vm.vcpus[0].read_register("rip") <= 0x1000 + len(code)
            await vm.resume()
        await vm.reset()
        await vm.pause()
        await vm.reset()
        assert vm.vcpus[0].read_register("rip") == 0x1000
        await vm.resume()
        assert await vm.kill() == Exit(ExitReason.KILLED)


async def test_any_guest_can_be_left(guest: Guest, stubborn: tuple[bytes, str]) -> None:
    code, mode = stubborn
    async with guest(code, mode=mode) as vm:
        pass
    assert vm.exit == Exit(ExitReason.KILLED)
    assert vm.state is VmState.CLOSED


# What an access began is finished before registers are read: the device has been asked as often as the guest
# has counted, and what it said is in the register.


async def test_a_paused_guest_has_finished_its_port_read(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder]
) -> None:
    code = bytes.fromhex(
        "ba 00 03"  # mov dx, 0x300
        "31 c9"  # xor cx, cx
        "b0 00"  # 0x1005: mov al, 0
        "ec"  # 0x1007: in al, dx
        "41"  # 0x1008: inc cx
        "eb fa"  # 0x1009: jmp 0x1005
    )
    device = recorder(itertools.repeat(0xA5))
    async with guest(code, start=False) as vm:
        attach(vm, device, pio=0x300)
        await vm.start()
        for _ in range(60):
            await vm.pause()
            rip, rax, rcx = (vm.vcpus[0].read_register(name) for name in ("rip", "rax", "rcx"))
            if rip >= 0x1005:
                assert len(device.accesses) & 0xFFFF == (rcx + (rip == 0x1008)) & 0xFFFF
                assert rax & 0xFF == (0 if rip == 0x1007 or not device.accesses else 0xA5)
            await vm.resume()


@pytest.mark.parametrize(
    "outs",
    [
        pytest.param(True, id="outs"),
        pytest.param(False, id="ins"),
    ],
)
async def test_a_paused_guest_has_finished_its_string(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder], outs: bool
) -> None:
    """KVM takes a string's bytes in batches; pointer and count agree with what the device has seen."""
    code = bytes.fromhex(
        "66 ba 00 03"  # mov dx, 0x300
        "be 00 00 10 00"  # 0x1004: mov esi, 0x100000
        "bf 00 00 10 00"  # mov edi, 0x100000
        "b9 00 80 00 00"  # mov ecx, 0x8000
        + ("f3 6e" if outs else "f3 6c")  # 0x1013: rep outsb, rep insb
        + "eb ed"  # 0x1015: jmp 0x1004
    )
    device = recorder()
    async with guest(code, mode="protected", start=False) as vm:
        attach(vm, device, pio=0x300)
        await vm.start()
        for _ in range(30):
            await vm.pause()
            rip, count, pointer = (
                vm.vcpus[0].read_register(name) for name in ("rip", "rcx", "rsi" if outs else "rdi")
            )
            if rip == 0x1013:
                assert pointer + count == 0x108000
                assert len(device.accesses) % 0x8000 == (pointer - 0x100000) % 0x8000
            else:
                assert len(device.accesses) % 0x8000 == 0
            await vm.resume()


async def test_an_access_is_made_once_although_the_guest_is_paused_in_it(guest: Guest) -> None:
    """Each pause falls into some access; none is lost and none is repeated."""
    code = bytes.fromhex(
        "ba f8 03"  # mov dx, 0x3f8
        "b0 00"  # mov al, 0
        "ee"  # again: out dx, al
        "fe c0"  # inc al
        "ba ff 03"  # mov dx, 0x3ff: answered by the loop
        "ee"  # out dx, al
        "ba f8 03"  # mov dx, 0x3f8
        "3c 00"  # cmp al, 0
        "75 f2"  # jnz again
        "f4"  # hlt
    )
    async with guest(code) as vm:
        output = b""
        while len(output) < 256:
            output += await vm.serial.read()
            await vm.pause()
            await vm.resume()
    assert output == bytes(range(256))


# Registers.


async def test_registers_are_read_and_written_while_paused(
    guest: Guest,
) -> None:
    code = bytes.fromhex(
        "eb fe"  # jmp .
        "a3 00 20"  # mov [0x2000], ax
        "eb fb"  # jmp .-3
    )
    async with guest(code) as vm:
        vcpu = vm.vcpus[0]
        await vm.pause()
        names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r15")
        for number, name in enumerate(names):
            vcpu.write_register(name, 0x1_0000_0000 + number)
        vcpu.write_register("rip", 0x1002)
        vcpu.write_register("cr2", 0x1234)
        assert [vcpu.read_register(name) for name in names] == [0x1_0000_0000 + n for n in range(len(names))]
        assert vcpu.read_register("cr2") == 0x1234
        assert vcpu.read_register("rip") == 0x1002
        assert vcpu.read_register("rflags") & 2
        vcpu.write_register("rax", 0xAB)
        await vm.resume()
        while vm.memory.read(0x2000, 2) != b"\xab\0":
            await anyio.lowlevel.checkpoint()


async def test_registers_of_a_running_vcpu_are_refused(guest: Guest) -> None:
    async with guest(b"\xeb\xfe", start=False) as vm:
        vcpu = vm.vcpus[0]
        assert vcpu.read_register("rip") == 0x1000
        await vm.start()
        for call in (
            lambda: vcpu.read_register("rip"),
            lambda: vcpu.write_register("rip", 0),
            lambda: vcpu.kvm_vcpu,
        ):
            with pytest.raises(StateError, match="vCPU 0 is running: pause the machine first"):
                call()
        await vm.pause()
        assert vcpu.read_register("rip") == 0x1000
        assert vcpu.kvm_vcpu.get_mp_state() == 0
        await vm.kill()
        assert vcpu.read_register("rip") == 0x1000
    with pytest.raises(StateError, match="vCPU 0 is closed"):
        vcpu.read_register("rip")


async def test_unknown_registers_are_named(guest: Guest) -> None:
    async with guest(b"\xeb\xfe", start=False) as vm:
        with pytest.raises(ConfigError, match="no register 'eax': there are rax, "):
            vm.vcpus[0].read_register("eax")
        with pytest.raises(ConfigError, match="no register 'st0'"):
            vm.vcpus[0].write_register("st0", 1)
        for value in (-1, 1 << 64):
            with pytest.raises(ConfigError, match=f"rip cannot be {value}"):
                vm.vcpus[0].write_register("rip", value)


# Cancellation.

COUNT = bytes.fromhex(
    "fe 06 00 20"  # again: inc byte [0x2000]
    "eb fa"  # jmp again
)


async def test_a_cancelled_pause_has_not_happened(
    guest: Guest, cancelled: Cancelled, progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(COUNT, cpus=2) as vm:
        outcomes = set()
        for turns in range(12):
            returned = await cancelled(turns, vm.pause)
            outcomes.add(returned)
            assert vm.state is (VmState.PAUSED if returned else VmState.RUNNING)
            if returned:
                assert [vcpu.state for vcpu in vm.vcpus] == [VcpuState.PAUSED] * 2
                await vm.resume()
            await progress(vm)
        assert False in outcomes


async def test_a_pause_right_after_a_cancelled_one_is_answered(guest: Guest, cancelled: Cancelled) -> None:
    async with guest(COUNT, cpus=2) as vm:
        for turns in range(12):
            await cancelled(turns, vm.pause)
            await vm.pause()
            before = vm.memory.read(0x2000, 1)
            assert vm.vcpus[0].read_register("rip") in (0x1000, 0x1004)
            assert vm.memory.read(0x2000, 1) == before
            await vm.resume()


async def test_a_cancelled_kill_ends_the_machine_all_the_same(guest: Guest, cancelled: Cancelled) -> None:
    for turns in range(1, 5):
        async with guest(COUNT, cpus=2) as vm:
            await cancelled(turns, vm.kill)
            assert await vm.wait() == Exit(ExitReason.KILLED)


async def test_a_cancelled_stop_leaves_the_machine_to_the_guest(
    guest: Guest, cancelled: Cancelled, progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(COUNT) as vm:
        assert not await cancelled(3, vm.stop)
        assert vm.state is VmState.RUNNING
        await progress(vm)


async def test_a_cancelled_reset_has_happened_wholly_or_not_at_all(
    guest: Guest, cancelled: Cancelled, progress: Callable[..., Awaitable[None]]
) -> None:
    image = COUNT + bytes(400_000)
    async with guest(image) as vm:
        for turns in range(0, 40, 3):
            events = vm.events()
            vm.memory.write(0x1000 + 300_000, b"old")
            returned = await cancelled(turns, vm.reset)
            assert vm.state is VmState.RUNNING
            happened = vm.memory.read(0x1000 + 300_000, 3) == bytes(3)
            assert happened or not returned
            await progress(vm)
            await vm.pause()
            told = [type(await anext(events)).__name__ for _ in range(1 + happened)]
            assert told == ["WasReset"] * happened + ["Paused"]
            await vm.resume()


async def test_a_cancelled_reset_of_a_paused_machine_leaves_it_paused(
    guest: Guest, cancelled: Cancelled
) -> None:
    async with guest(COUNT) as vm:
        await vm.pause()
        for turns in range(8):
            await cancelled(turns, vm.reset)
            assert vm.state is VmState.PAUSED
            assert vm.vcpus[0].state is VcpuState.PAUSED
            assert vm.vcpus[0].read_register("rip") in (0x1000, 0x1004)


async def test_a_cancelled_wait_is_no_more_than_that(guest: Guest, cancelled: Cancelled) -> None:
    async with guest(COUNT) as vm:
        assert not await cancelled(2, vm.wait)
        assert vm.state is VmState.RUNNING
