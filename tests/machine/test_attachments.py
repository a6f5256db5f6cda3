"""Regions of devices: where they may be, what they are given, and that they come and go."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import VM, ConfigError, Device, DeviceError, Exit, ExitReason, RegionMode, StateError, boot
from aiokvm.kvm import Vm
from aiokvm.machine.attachments import Attachments

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.machine.conftest import Guest, Program

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
MMIO = 0xD000_0000
SPIN = b"\xeb\xfe"


class Recording(Device):
    def __init__(self, name: int = 0) -> None:
        self.name = name
        self.accesses: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size, 0))
        return self.name + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


def state(vm: VM) -> tuple[object, ...]:
    """All that attaching changes."""
    return (
        [str(region) for region in vm._life.exits.pio],
        [str(region) for region in vm._life.exits.mmio],
        list(vm._life.attachments),
        sorted(os.listdir("/proc/self/fd")),
    )


async def test_several_regions_of_one_device(guest: Guest, program: type[Program]) -> None:
    device = Recording(0x10)
    code = program().read(0x301, bus="pio").read(0x402, bus="pio").read(MMIO + 4).write(0x400, 7, bus="pio")
    code = code.strings(0x401, 2, out=False)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(device, pio=0x300, size=2)
        vm.attach(device, pio=0x400, size=4, offset=0x20)
        vm.attach(device, mmio=MMIO, size=8, offset=0x40)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(program.RESULTS, 9)[2:] != b""
        assert [stats.exits for stats in vm.stats().devices if stats.device == "Recording"] == [1, 3, 1]
    assert device.accesses[:4] == [
        ("read", 1, 1, 0),
        ("read", 0x22, 1, 0),
        ("read", 0x44, 1, 0),
        ("write", 0x20, 1, 7),
    ]
    assert {access[1] for access in device.accesses[4:]} == {0x21}


async def test_devices_are_given_to_create(program: type[Program]) -> None:
    device, other = Recording(0x10), Recording(0x20)
    code = program().read(0x303, bus="pio").read(MMIO + 0x102)
    async with await VM.create(
        boot=boot.Flat(code.end(), mode="protected"),
        memory="2M",
        devices=[device.at(pio=0x300, size=4), other.at(mmio=MMIO, size=0x1000, offset=1, irq=5)],
    ) as vm:
        assert other.irq.gsi == 5
        await vm.start()
        assert await vm.wait() == DONE
        assert program.results(vm, 2) == [0x13, 0x23]
    assert not hasattr(other, "irq")


async def test_a_device_that_create_refuses_leaves_the_others_free(guest: Guest) -> None:
    device, other = Recording(), Recording()
    with pytest.raises(DeviceError, match="overlaps"):
        await VM.create(
            boot=boot.Flat(SPIN), memory="2M", devices=[device.at(pio=0x300, irq=5), other.at(pio=0x300)]
        )
    async with guest(SPIN) as vm:
        vm.attach(device, pio=0x300, irq=5)
        vm.attach(other, pio=0x301)


@dataclass
class Equal(Device):
    """Equal to every other, and not to be hashed."""

    value: int = 0x77

    def read(self, offset: int, size: int) -> int:
        return self.value


async def test_devices_are_told_apart_by_identity(guest: Guest, program: type[Program]) -> None:
    one, two = Equal(), Equal()
    code = program().read(0x300, bus="pio").read(0x301, bus="pio")
    async with guest(code.end(), mode="protected", start=False) as vm:
        attachment = vm.attach(one, pio=0x300)
        vm.attach(two, pio=0x301)
        vm.detach(attachment)
        await vm.start()
        assert await vm.wait() == DONE
        assert program.results(vm, 2) == [0xFF, 0x77]


# A running machine.

HAMMER = bytes.fromhex(
    "ba 00 03"  # mov dx, 0x300
    "ec"  # again: in al, dx
    "a2 00 20"  # mov [0x2000], al
    "fe 06 01 20"  # inc byte [0x2001]
    "eb f6"  # jmp again
)


async def until_byte(vm: VM, value: int) -> None:
    while vm.memory.read(0x2000, 1) != bytes([value]):
        await anyio.lowlevel.checkpoint()


class Suspending(Recording):
    async def read(self, offset: int, size: int) -> int:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        return super().read(offset, size)


@pytest.mark.parametrize("kind", [Recording, Suspending])
async def test_devices_come_and_go_while_a_guest_hammers_them(guest: Guest, kind: type[Recording]) -> None:
    async with guest(HAMMER) as vm:
        await until_byte(vm, 0xFF)
        for round_ in range(20):
            device = kind(0x11 + round_)
            attachment = vm.attach(device, pio=0x300)
            await until_byte(vm, 0x11 + round_)
            vm.detach(attachment)
            await until_byte(vm, 0xFF)
            seen = len(device.accesses)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert len(device.accesses) == seen
        assert not attachment.attached


async def test_an_access_that_is_served_when_its_region_goes_is_answered(guest: Guest) -> None:
    asked, answer = anyio.Event(), anyio.Event()

    class Slow(Device):
        async def read(self, offset: int, size: int) -> int:
            asked.set()
            await answer.wait()
            return 0x42

    async with guest(
        bytes.fromhex("ba 00 03 ec a2 00 20 eb fe"),
        start=False,  # mov dx, 0x300; in al, dx; mov [0x2000], al
    ) as vm:
        attachment = vm.attach(Slow(), pio=0x300)
        await vm.start()
        await asked.wait()
        vm.detach(attachment)
        answer.set()
        await until_byte(vm, 0x42)


async def test_a_device_may_detach_itself(guest: Guest) -> None:
    class Once(Device):
        def read(self, offset: int, size: int) -> int:
            vm.detach(attachment)
            return 0x42

    async with guest(HAMMER, start=False) as vm:
        attachment = vm.attach(Once(), pio=0x300)
        await vm.start()
        await until_byte(vm, 0xFF)


async def test_what_has_gone_may_come_back(guest: Guest) -> None:
    device = Recording(0x21)
    async with guest(HAMMER) as vm:
        for _ in range(3):
            attachment = vm.attach(device, pio=0x300, irq=7)
            await until_byte(vm, 0x21)
            vm.detach(attachment)
            await until_byte(vm, 0xFF)
        with pytest.raises(
            DeviceError, match="Attachment Recording pio 0x300-0x300> is not attached to this"
        ):
            vm.detach(attachment)


# What is refused changes nothing.

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another device": (
        {"pio": 0x315},
        DeviceError,
        "0x315-0x315 for Recording overlaps 0x310-0x317 of Recording",
    ),
    "another device's end": ({"pio": 0x30F, "size": 2}, DeviceError, "overlaps 0x310-0x317"),
    "a device of the machine": (
        {"pio": 0x3F8, "size": 8},
        DeviceError,
        "overlaps 0x3f8-0x3ff",
    ),
    "a PIC": ({"pio": 0x1F, "size": 2}, DeviceError, "0x20-0x21 of the first PIC, which KVM serves"),
    "the I/O APIC": ({"mmio": 0xFEC0_0010, "size": 4}, DeviceError, "of the I/O APIC"),
    "the local APIC": ({"mmio": 0xFEE0_0000, "size": 4096, "mode": "memory"}, DeviceError, "the local APIC"),
    "another in memory": ({"mmio": MMIO + 0xFF8, "size": 16}, DeviceError, "overlaps"),
    "RAM": ({"mmio": 0x1000, "size": 4}, DeviceError, "overlaps memory at 0x0-0x1fffff; choose another"),
    "the end of RAM": ({"mmio": 0x1F_FFFF, "size": 4}, DeviceError, "overlaps memory at 0x0-0x1fffff"),
    "memory of a device": ({"mmio": 0xD100_0FFF, "size": 2}, DeviceError, "overlaps"),
    "memory over a device": ({"mmio": MMIO, "size": 4096, "mode": "memory"}, DeviceError, "overlaps"),
    "memory over RAM": ({"mmio": 0x1F_F000, "size": 8192, "mode": "memory"}, DeviceError, "overlaps memory"),
    "memory over memory": ({"mmio": 0xD100_0000, "size": 4096, "mode": "memory"}, DeviceError, "overlaps"),
    "memory that is no page": ({"mmio": 0xD200_0000, "size": 100, "mode": "memory"}, ConfigError, "4096"),
    "memory on no page": ({"mmio": 0xD200_0010, "size": 4096, "mode": "memory"}, ConfigError, "multiples"),
    "no memory": ({"mmio": 0xD200_0000, "size": 0, "mode": "memory"}, ConfigError, "multiples of 4096"),
    "memory on ports": ({"pio": 0x1000, "size": 4096, "mode": "memory"}, ConfigError, "mmio, not pio"),
    "nothing": ({"pio": 0x320, "size": 0}, DeviceError, "a range is not empty"),
    "beyond the ports": ({"pio": 0xFFFF, "size": 2}, DeviceError, "addresses from 0 to 0xffff"),
    "below the ports": ({"pio": -1}, DeviceError, "no range of this bus"),
    "beyond memory": ({"mmio": 1 << 52}, DeviceError, "no range of this bus"),
    "nowhere": ({}, ConfigError, "give either pio or mmio"),
    "in two places": ({"pio": 0x320, "mmio": MMIO + 0x10000}, ConfigError, "give either pio or mmio"),
    "an offset": ({"pio": 0x320, "offset": -1}, ConfigError, "offset -1 is before"),
    "two interrupts": (
        {"pio": 0x320, "irq": 5, "msi": (0xFEE0_0000, 0x41)},
        ConfigError,
        "either irq or msi",
    ),
    "no such interrupt": ({"pio": 0x320, "irq": 24}, ConfigError, "irq 24 is no input"),
    "the cascade": ({"pio": 0x320, "irq": 2}, ConfigError, "irq 2 is no input"),
    "a long message": ({"pio": 0x320, "msi": (0xFEE0_0000, 1 << 32)}, ConfigError, "has 32"),
    "no such message": ({"pio": 0x320, "msi": (-1, 0)}, ConfigError, "64 bits"),
    "no such mode": ({"pio": 0x320, "mode": "fast"}, ConfigError, "mode='fast': give RegionMode or 'exit'"),
    "no such policy": (
        {"pio": 0x320, "on_error": "panic"},
        ConfigError,
        "on_error='panic': give ErrorPolicy or 'keep'",
    ),
    "a wide doorbell": (
        {"pio": 0x320, "size": 3, "mode": "doorbell"},
        ConfigError,
        "1, 2, 4 or 8 bytes, not 3",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
@pytest.mark.parametrize("running", [False, True])
async def test_what_is_refused_changes_nothing(guest: Guest, what: str, running: bool) -> None:
    where, error, message = REFUSED[what]
    device = Recording()
    async with guest(SPIN, start=running) as vm:
        vm.attach(Recording(), pio=0x310, size=8)
        vm.attach(Recording(), mmio=MMIO, size=0x1000)
        vm.attach(Recording(), mmio=0xD100_0000, size=4096, mode="memory")
        before = state(vm)
        with pytest.raises(error, match=message):
            vm.attach(device, **where)
        assert state(vm) == before
        assert not hasattr(device, "irq")
        with pytest.raises(DeviceError, match="not attached to a machine"):
            device.now_ns()
        vm.attach(device, pio=0x320, size=4, irq=5)


async def test_coroutines_cannot_be_posted_to(guest: Guest) -> None:
    class Write(Device):
        async def write(self, offset: int, size: int, value: int) -> None: ...

    class WriteString(Device):
        async def write_string(self, offset: int, size: int, data: bytes) -> None: ...

    async with guest(SPIN) as vm:
        before = state(vm)
        for device, name in ((Write(), "Write.write"), (WriteString(), "WriteString.write_string")):
            with pytest.raises(ConfigError, match=rf"{name} is a coroutine: .* needs a plain function"):
                vm.attach(device, pio=0x300, mode="posted")
        assert state(vm) == before


async def test_a_device_has_one_machine_and_one_interrupt(guest: Guest) -> None:
    device = Recording()
    async with guest(SPIN) as vm, guest(SPIN) as other:
        vm.attach(device, pio=0x300, irq=5)
        before = state(vm), state(other)
        with pytest.raises(DeviceError, match="Recording is attached to another machine"):
            other.attach(device, pio=0x300)
        with pytest.raises(ConfigError, match="Recording has an interrupt already"):
            vm.attach(device, pio=0x310, irq=6)
        assert (state(vm), state(other)) == before


async def test_a_machine_that_has_ended_takes_no_device(guest: Guest) -> None:
    async with guest(SPIN) as vm:
        attachment = vm.attach(Recording(), pio=0x300)
        await vm.kill()
        with pytest.raises(StateError, match="has ended: killed"):
            vm.attach(Recording(), pio=0x310)
        vm.detach(attachment)
    with pytest.raises(StateError, match="is closed"):
        vm.attach(Recording(), pio=0x310)
    with pytest.raises(DeviceError, match="is not attached"):
        vm.detach(attachment)


class StepError(Exception):
    """What the injected step raises."""


@pytest.mark.parametrize(
    ("owner", "name", "mode"),
    [
        (Attachments, "_claim", "exit"),
        (Attachments, "_share_memory", "memory"),
        (Attachments, "_install_doorbell", "doorbell"),
        (Vm, "set_user_memory_region", "memory"),
        (Vm, "ioeventfd", "doorbell"),
        (Vm, "irqfd", "exit"),
        (Vm, "irqfd", "doorbell"),
        (Vm, "irqfd", "memory"),
    ],
)
async def test_an_attachment_that_fails_at_any_step_leaves_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, mode: str
) -> None:
    where: dict[str, Any] = {"mmio": MMIO, "size": 4096 if mode == "memory" else 4, "mode": mode, "irq": 5}
    device = Recording()
    real = getattr(owner, name)
    async with guest(SPIN) as vm:
        before = state(vm)

        def step(*args: Any, **kwargs: Any) -> Any:
            # What gives back goes through the same methods.
            if kwargs.get("deassign") or (name == "set_user_memory_region" and args[3] == 0):
                return real(*args, **kwargs)
            raise StepError

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, step)
            with pytest.raises(StepError):
                vm.attach(device, **where)
        assert state(vm) == before
        vm.attach(device, **where)


# Posted.


class Posted(Recording):
    pass


class PostedInBulk(Device):
    def __init__(self) -> None:
        self.accesses: list[tuple[str, int, int, int]] = []

    def write_string(self, offset: int, size: int, data: bytes) -> None:
        for at in range(0, len(data), size):
            value = int.from_bytes(data[at : at + size], "little")
            self.accesses.append(("write", offset, size, value))

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size, 0))
        return 0


@pytest.mark.parametrize("kind", [Posted, PostedInBulk])
@pytest.mark.parametrize("bus", ["pio", "mmio"])
async def test_posted_writes_come_in_order_and_before_the_next_read(
    guest: Guest, program: type[Program], kind: type[Any], bus: str
) -> None:
    base = 0x300 if bus == "pio" else MMIO
    where: dict[str, Any] = {bus: base}
    code = program()
    for size in (1, 2, 4):
        code.write(base + 2, 0x1122_3344, size, bus=bus).write(base + 2, 0x5566_7788, size, bus=bus)
        code.write(base + 3, 1, bus=bus).read(base + size, bus=bus)
    expected: list[tuple[str, int, int, int]] = []
    for size in (1, 2, 4):
        ones = (1 << 8 * size) - 1
        expected += [("write", 12, size, 0x1122_3344 & ones), ("write", 12, size, 0x5566_7788 & ones)]
        expected += [("write", 13, 1, 1), ("read", 10 + size, 1, 0)]
    device = kind()
    async with guest(code.times(50).end(), mode="protected", start=False) as vm:
        attachment = vm.attach(device, **where, size=8, offset=10, mode=RegionMode.POSTED)
        assert attachment.mode is RegionMode.POSTED
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.stats().vcpus[0].posted == 50 * 9
    assert device.accesses == expected * 50


async def test_posted_writes_of_eight_bytes(guest: Guest) -> None:
    code = bytes.fromhex(
        "bb 00 00 00 d0"  # mov ebx, 0xd0000000
        "48 b8 ef cd ab 89 67 45 23 01"  # mov rax, 0x0123456789abcdef
        "48 89 03"  # mov [rbx], rax
        "48 ff c0"  # inc rax
        "48 89 43 08"  # mov [rbx + 8], rax
        "b0 00 e6 f4 f4"  # mov al, 0; out 0xf4, al; hlt
    )
    device = Recording()
    async with guest(code, mode="long", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=16, mode="posted")
        await vm.start()
        assert await vm.wait() == DONE
    assert device.accesses == [("write", 0, 8, 0x0123_4567_89AB_CDEF), ("write", 8, 8, 0x0123_4567_89AB_CDF0)]


async def test_posts_that_are_on_their_way_when_their_region_goes_are_dropped(
    guest: Guest, program: type[Program]
) -> None:
    class Detaching(Recording):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if attachment.attached:
                vm.detach(attachment)

    device = Detaching()
    code = program()
    for i in range(10):
        code.write(MMIO + i % 2, i)
    async with guest(code.end(), mode="protected", start=False) as vm:
        attachment = vm.attach(device, mmio=MMIO, size=4, mode="posted")
        await vm.start()
        assert await vm.wait() == DONE
    assert device.accesses == [("write", 0, 1, 0)]


# Doorbells.


@pytest.mark.parametrize(("bus", "size"), [("pio", 1), ("pio", 2), ("pio", 4), ("mmio", 1), ("mmio", 4)])
async def test_a_doorbell_wakes_the_device_and_the_vcpu_runs_on(
    guest: Guest, program: type[Program], bus: str, size: int
) -> None:
    base = 0x300 if bus == "pio" else MMIO
    where: dict[str, Any] = {bus: base}

    class Belled(Recording):
        count = 0

        def doorbell(self, offset: int, count: int) -> None:
            assert offset == 0x40
            self.count += count

    device = Belled()
    other = 1 if size != 1 else 2
    code = program().write(base, 1, size, bus=bus).times(30)
    # Another size is a plain access, as is a read.
    code = code.write(base, 5, other, bus=bus).read(base, bus=bus)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(device, **where, size=size, offset=0x40, mode="doorbell")
        await vm.start()
        assert await vm.wait() == DONE
        # What was written before the end has been told.
        assert device.count == 30
    # What is wider than the region goes to its beginning.
    assert device.accesses == [("write", 0x40, other, 5), ("read", 0x40, 1, 0)]


async def test_a_doorbells_coroutine_is_not_entered_twice(guest: Guest, program: type[Program]) -> None:
    class Belled(Recording):
        def __init__(self) -> None:
            super().__init__()
            self.counts: list[int] = []
            self.inside = 0
            self.entered = anyio.Event()
            self.leave = anyio.Event()
            self.all = anyio.Event()

        async def doorbell(self, offset: int, count: int) -> None:
            self.inside += 1
            assert self.inside == 1
            self.counts.append(count)
            self.entered.set()
            await self.leave.wait()
            if sum(self.counts) == 100:
                self.all.set()
            self.inside -= 1

    device = Belled()
    # The guest waits at the port until the first call is inside.
    gate = Gate()
    code = program().write(MMIO, 0, 4).read(0x300, bus="pio")
    for _ in range(99):
        code.write(MMIO, 0, 4)
    async with guest(code.halt(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=4, mode="doorbell")
        vm.attach(gate, pio=0x300)
        await vm.start()
        await device.entered.wait()
        gate.open.set()
        await until(lambda: gate.passed)
        device.leave.set()
        await device.all.wait()
    assert device.counts[0] == 1
    assert sum(device.counts) == 100


async def test_a_reset_forgets_what_the_guest_has_written_to_a_doorbell(
    guest: Guest, program: type[Program]
) -> None:
    class Belled(Device):
        def __init__(self) -> None:
            self.counts: list[int] = []
            self.entered, self.leave, self.left = anyio.Event(), anyio.Event(), anyio.Event()

        async def doorbell(self, offset: int, count: int) -> None:
            self.counts.append(count)
            self.entered.set()
            await self.leave.wait()
            self.left.set()

    device, first, second = Belled(), Gate(), Gate()
    code = program().write(MMIO, 0, 4).read(0x300, bus="pio").write(MMIO, 0, 4).read(0x301, bus="pio")
    async with guest(code.for_ever(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=4, mode="doorbell")
        vm.attach(first, pio=0x300)
        vm.attach(second, pio=0x301)
        await vm.start()
        await device.entered.wait()
        first.open.set()
        second.open.set()
        await until(lambda: second.passed)
        await vm.pause()
        await vm.reset()
        device.leave.set()
        await device.left.wait()
        await anyio.wait_all_tasks_blocked()
        assert device.counts == [1]


class Gate(Device):
    def __init__(self) -> None:
        self.open = anyio.Event()
        self.passed = False

    async def read(self, offset: int, size: int) -> int:
        await self.open.wait()
        self.passed = True
        return 0


async def until(true: Callable[[], object]) -> None:
    while not true():
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("end", ["detach", "kill"])
async def test_a_doorbells_coroutine_ends_with_its_region_and_its_machine(
    guest: Guest, program: type[Program], end: str
) -> None:
    entered, ended = anyio.Event(), anyio.Event()

    class Belled(Device):
        async def doorbell(self, offset: int, count: int) -> None:
            entered.set()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                ended.set()

    async with guest(program().write(MMIO, 0, 4).for_ever(), mode="protected", start=False) as vm:
        attachment = vm.attach(Belled(), mmio=MMIO, size=4, mode="doorbell")
        await vm.start()
        await entered.wait()
        if end == "detach":
            vm.detach(attachment)
            await ended.wait()
    assert ended.is_set()


async def test_a_doorbells_coroutine_that_has_not_begun_is_not_left(
    guest: Guest, program: type[Program]
) -> None:
    """It is made, and then its region goes before its task has run."""

    class Belled(Device):
        gone = False

        def doorbell(self, offset: int, count: int) -> Any:
            work = self.later()
            self.gone = True
            return work

        async def later(self) -> None:
            raise AssertionError

    device = Belled()
    async with guest(program().write(MMIO, 0, 4).for_ever(), mode="protected", start=False) as vm:
        attachment = vm.attach(device, mmio=MMIO, size=4, mode="doorbell")
        bell = attachment._bell
        assert bell is not None
        ring = bell._call

        def call() -> None:
            ring()
            vm.detach(attachment)

        bell._call = call  # type: ignore[method-assign]
        await vm.start()
        await until(lambda: device.gone)


# Memory.


async def test_memory_is_shared_both_ways_and_outlives_its_region(guest: Guest) -> None:
    code = bytes.fromhex(
        "a1 00 00 00 d0"  # again: mov eax, [0xd0000000]
        "a3 fc 1f 00 d0"  # mov [0xd0001ffc], eax
        "eb f4"  # jmp again
    )
    device = Recording()
    async with guest(code, mode="protected", start=False) as vm:
        attachment = vm.attach(device, mmio=MMIO, size=0x2000, mode="memory")
        memory = attachment.memory
        assert memory is not None
        assert bytes(memory) == bytes(0x2000)
        await vm.start()
        for value in (b"abcd", b"efgh"):
            memory[:4] = value
            await until(lambda value=value: bytes(memory[-4:]) == value)  # type: ignore[misc]
        assert vm.memory.size_bytes == 2 << 20
        vm.detach(attachment)
        await vm.pause()
        # Nothing is there any more.
        memory[-4:] = b"mine"
        await vm.resume()
        await until(lambda: vm.stats().vcpus[0].unclaimed > 10)
        assert bytes(memory[-4:]) == b"mine"
        # The slot is free for another.
        again = vm.attach(device, mmio=MMIO, size=0x2000, mode="memory").memory
        assert again is not None
        again[:4] = b"more"
        await until(lambda: bytes(again[-4:]) == b"more")
    assert bytes(memory[:4]) == b"efgh"
    assert device.accesses == []
    memory.release()
    again.release()


async def test_many_memory_regions_come_and_go(guest: Guest, resources: Callable[[], Any]) -> None:
    async with guest(SPIN) as vm:
        assert vm.vcpus[0].tid  # the thread has begun, and has its name
        before = state(vm), resources()
        for _ in range(5):
            attachments = [
                vm.attach(Device(), mmio=MMIO + i * 0x10000, size=0x1000, mode="memory") for i in range(20)
            ]
            assert re.search("mmio 0xd0010000-0xd0010fff", repr(attachments[1]))
            await anyio.lowlevel.checkpoint()
            for attachment in attachments[::2] + attachments[1::2]:
                vm.detach(attachment)
            await anyio.lowlevel.checkpoint()
        del attachment, attachments  # which keep their pages
        assert (state(vm), resources()) == before
