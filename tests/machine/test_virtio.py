"""Virtio devices in a machine: a guest drives them by registers, queues, notifications and interrupts."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import (
    VM,
    ConfigError,
    Device,
    DeviceError,
    DeviceFailed,
    DeviceNeedsReset,
    Exit,
    ExitReason,
    StateError,
    VirtioDevice,
    VirtqueueError,
    VmState,
    boot,
)
from aiokvm._core import lib
from aiokvm.boot.layout import CMDLINE
from aiokvm.kvm.constants import KVM_IRQCHIP_IOAPIC
from aiokvm.machine import life
from aiokvm.machine.config import Config
from aiokvm.machine.virtio import SHARED_BASE, VIRTIO_BASE, VIRTIO_SIZE, Place, described, places
from aiokvm.virtio import mmio
from tests.machine.virtio_guest import VirtioProgram, rings, steps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from aiokvm import VirtioQueue
    from aiokvm.virtio.queue import Virtqueue
    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
INTERRUPT_STATUS = mmio.VIRTIO_MMIO_INTERRUPT_STATUS
INTERRUPT_ACK = mmio.VIRTIO_MMIO_INTERRUPT_ACK
STATUS = mmio.VIRTIO_MMIO_STATUS


class Shout(VirtioDevice):
    """Gives what it reads back in capitals; its handlers are coroutines."""

    device_id = 42
    queue_size_max = (8,)

    async def serve(self, queue: VirtioQueue) -> None:
        async for request in queue:
            data = request.read(1024)
            await anyio.lowlevel.checkpoint()
            request.write(data.upper())
            request.push()


class Counter(VirtioDevice):
    """Counts what it is told, and completes what it gets; plain functions."""

    device_id = 42
    queue_size_max: tuple[int, ...] = (8, 8)

    def __init__(self) -> None:
        self.notifications = 0
        self.activations = 0
        self.resets = 0
        self.closed = 0
        self.drain: Callable[[], Awaitable[None]] | None = None

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        self.activations += 1

    def notified(self, queue: int) -> None:
        self.notifications += 1
        while (chain := self.queues[queue].pop()) is not None:
            chain.push()
        if self.queues[queue].publish():
            self.host.interrupt(queue)

    def reset(self) -> Awaitable[None] | None:
        self.resets += 1
        return self.drain() if self.drain else None

    def close(self) -> None:
        self.closed += 1


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


# With a guest.


@pytest.mark.kvm
async def test_requests_are_an_async_iterator(guest: Guest) -> None:
    program = VirtioProgram().up().notify().await_used(2).await_register(INTERRUPT_STATUS, 1)
    program.put(INTERRUPT_ACK, 1).await_register(INTERRUPT_STATUS, 0).get(mmio.VIRTIO_MMIO_DEVICE_ID)
    async with guest(program.end(), mode="protected", start=False, virtio=[Shout()]) as vm:
        driver = rings(vm.memory)
        driver.add([b"hel", b"lo"], [8])
        driver.add([b"world"], [2, 2])
        await vm.start()
        assert await vm.wait() == DONE
        assert [used.data for used in driver.used()] == [b"HELLO", b"WORL"]
        assert program.results(vm, 1) == [42]
        # InterruptStatus is read and acknowledged on the vCPU's thread.
        [stats] = [stats for stats in vm.stats().devices if stats.device == "Shout"]
        assert (stats.base, stats.bus) == (VIRTIO_BASE, "mmio")
        assert vm.stats().vcpus[0].posted >= 3


@pytest.mark.kvm
async def test_several_queues_of_a_plain_device(guest: Guest) -> None:
    device = Counter()
    program = VirtioProgram().up(queues=2).notify(1).await_used(1, 1).notify(0).await_used(1)
    async with guest(program.end(), mode="protected", start=False, virtio=[device]) as vm:
        drivers = [rings(vm.memory, queue) for queue in range(2)]
        tokens = [driver.add([b"x"]) for driver in drivers]
        await vm.start()
        assert await vm.wait() == DONE
        assert [driver.used()[0].token for driver in drivers] == tokens
    assert device.activations == 1
    assert (device.resets, device.closed) == (1, 1)


@pytest.mark.kvm
async def test_an_interrupt_reaches_the_io_apic(guest: Guest) -> None:
    program = VirtioProgram().up().notify().await_register(INTERRUPT_STATUS, 1).step()
    async with guest(program.halt(), mode="protected", start=False, virtio=[Counter()]) as vm:
        [place] = vm._life.virtio.places
        kernel, vcpu = vm._life.hardware.vm, vm._life.hardware.vcpus[0]
        # Vector 0x30, edge, not masked; and a local APIC that takes it (spurious vector 0xff, enabled).
        ioapic: Any = kernel.get_irqchip(KVM_IRQCHIP_IOAPIC)
        entries = list(ioapic.redirtbl)
        entries[place.gsi] = 0x30
        kernel.set_irqchip(KVM_IRQCHIP_IOAPIC, replace(ioapic, redirtbl=tuple(entries)))
        lapic = bytearray(vcpu.get_lapic())
        lapic[0xF0:0xF2] = b"\xff\1"
        vcpu.set_lapic(bytes(lapic))
        rings(vm.memory).add([b"x"])
        await vm.start()
        await until(lambda: steps(vm))

        async def requested() -> bool:
            await vm.pause()
            found = int.from_bytes(vcpu.get_lapic()[0x210:0x214], "little") >> 16 & 1
            await vm.resume()
            return bool(found)

        # The word is set before the irqfd is written.
        while not await requested():
            await anyio.lowlevel.checkpoint()


@pytest.mark.kvm
async def test_a_driver_that_breaks_its_queue(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    program = VirtioProgram().up().notify().await_word(VirtioProgram.RESULTS - 4, 1).get(STATUS)
    program.get(INTERRUPT_STATUS).put(STATUS, 0).get(STATUS).get(INTERRUPT_STATUS)
    async with guest(program.end(), mode="protected", start=False, virtio=[Shout()]) as vm:
        driver = rings(vm.memory)
        vm.memory.write(driver.driver + 2, (100).to_bytes(2, "little"))
        events = vm.events()
        await vm.start()
        [event] = [event async for event in _take(events, DeviceNeedsReset)]
        assert event.device == "Shout"
        assert event.reason
        vm.memory.write(program.RESULTS - 4, b"\1")
        assert await vm.wait() == DONE
        assert program.results(vm, 4) == [0x4F, mmio.VIRTIO_MMIO_INT_CONFIG, 0, 0]
    assert [r.levelname for r in caplog.records if "needs a reset" in r.message] == ["WARNING"]


@pytest.mark.kvm
async def test_notifications_that_nobody_waits_for(guest: Guest) -> None:
    """Absent queues, before DRIVER_OK, odd widths: dropped and counted, or ignored."""
    program = VirtioProgram().notify(0).notify(1).notify(2).notify(0xFFFF_FFFF)
    program.write(VIRTIO_BASE + mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 0, 2)
    device = Counter()
    async with guest(program.halt(), mode="protected", start=False, virtio=[device]) as vm:
        [attachment] = vm._life.virtio
        await vm.start()
        await until(lambda: attachment.dropped_notifies == 4)
        assert device.notifications == 0


@pytest.mark.kvm
async def test_a_million_empty_notifications_are_one(guest: Guest) -> None:
    device = Counter()
    program = VirtioProgram().up().step().notify()
    async with guest(program.halt(), mode="protected", start=False, virtio=[device]) as vm:
        [attachment] = vm._life.virtio
        rings(vm.memory)
        await vm.start()
        await until(lambda: steps(vm) == 1)
        before = device.notifications
        # As an ioeventfd counts them.
        os.eventfd_write(attachment._kicks[0].fd, 1_000_000)
        await until(lambda: device.notifications > before)
        assert device.notifications <= before + 2


@pytest.mark.kvm
async def test_a_reset_suspends_the_vcpu_until_it_is_drained(guest: Guest) -> None:
    device = Counter()
    drained, waited_for = anyio.Event(), anyio.Event()

    async def drain() -> None:
        waited_for.set()
        await drained.wait()

    program = VirtioProgram().up().step().put(STATUS, 0).get(STATUS).step()
    async with guest(program.end(), mode="protected", start=False, virtio=[device]) as vm:
        device.drain = drain
        rings(vm.memory)
        await vm.start()
        await waited_for.wait()
        assert device.resets == 1
        assert steps(vm) == 1
        drained.set()
        assert await vm.wait() == DONE
        assert steps(vm) == 2
        assert program.results(vm, 1) == [0]


@pytest.mark.kvm
async def test_a_machine_ends_while_a_reset_waits(guest: Guest) -> None:
    device = Counter()
    waited_for = anyio.Event()

    async def drain() -> None:
        waited_for.set()
        await anyio.sleep_forever()

    program = VirtioProgram().up().put(STATUS, 0)
    async with guest(program.end(), mode="protected", start=False, virtio=[device]) as vm:
        device.drain = drain
        rings(vm.memory)
        await vm.start()
        await waited_for.wait()
        assert await vm.kill() == Exit(ExitReason.KILLED)
        device.drain = None
    assert (device.resets, device.closed) == (2, 1)


@pytest.mark.kvm
async def test_what_is_never_drained_holds_the_end_up_for_a_bounded_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(life, "DRAIN_SECONDS", 0.05)
    device, other = Counter(), Counter()
    drained = anyio.Event()
    device.drain = drained.wait
    async with guest(b"\xf4\xeb\xfd", virtio=[device, other]) as vm:
        pass
    assert vm.state is VmState.CLOSED
    assert "does not end in 0.05 s" in caplog.text
    # It keeps no other from ending, and ends itself when it can.
    assert (device.closed, other.resets, other.closed) == (0, 1, 1)
    drained.set()
    await until(lambda: device.closed)


@pytest.mark.kvm
async def test_a_reset_waits_for_what_is_never_drained_for_a_bounded_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "DRAIN_SECONDS", 0.05)
    device, other = Counter(), Counter()
    drained = anyio.Event()
    async with guest(b"\xf4\xeb\xfd", virtio=[other, device]) as vm:
        device.drain = drained.wait
        with anyio.fail_after(30), pytest.raises(DeviceError, match=r"Counter at 0xd0001000 .* 0\.05 s"):
            await vm.reset()
        ended = await vm.wait()
        assert ended.reason is ExitReason.ERROR
        assert "still has in flight" in ended.detail
    assert vm.state is VmState.CLOSED
    assert device.closed == 0
    drained.set()
    await until(lambda: device.closed)


@pytest.mark.kvm
async def test_closing_goes_on_when_a_reset_under_way_gives_up(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "DRAIN_SECONDS", 0.05)
    device = Counter()
    waited_for = anyio.Event()

    async def drain() -> None:
        waited_for.set()
        await anyio.sleep_forever()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks, guest(b"\xf4\xeb\xfd", virtio=[device]) as vm:
            device.drain = drain

            async def reset() -> None:
                with pytest.raises(DeviceError):
                    await vm.reset()

            tasks.start_soon(reset)
            await waited_for.wait()
    assert vm.state is VmState.CLOSED


@pytest.mark.kvm
async def test_a_reset_cancels_handlers_and_drops_their_requests(guest: Guest) -> None:
    class Slow(VirtioDevice):
        device_id = 42
        queue_size_max = (8,)

        def __init__(self) -> None:
            self.ended: list[str] = []
            self.taken: list[Any] = []

        async def serve(self, queue: VirtioQueue) -> None:
            async for request in queue:
                self.taken.append(request)
                try:
                    await anyio.sleep_forever()
                finally:
                    self.ended.append("cancelled")

    device = Slow()
    program = VirtioProgram().up().notify().await_word(VirtioProgram.RESULTS - 4, 1).put(STATUS, 0).step()
    async with guest(program.halt(), mode="protected", start=False, virtio=[device]) as vm:
        driver = rings(vm.memory)
        driver.add([b"x"], [4])
        await vm.start()
        await until(lambda: device.taken)
        vm.memory.write(program.RESULTS - 4, b"\1")
        await until(lambda: steps(vm))
        assert device.ended == ["cancelled"]
        assert device.taken[0].write(b"late") == 0
        device.taken[0].push()
        assert driver.used() == []


@pytest.mark.kvm
async def test_what_a_device_raises_is_told(guest: Guest) -> None:
    class Broken(Counter):
        def notified(self, queue: int) -> None:
            raise ZeroDivisionError

        def read_config(self, offset: int, size: int) -> int:
            raise ZeroDivisionError

    program = VirtioProgram().get(mmio.VIRTIO_MMIO_CONFIG).up().step()
    async with guest(program.halt(), mode="protected", start=False, virtio=[Broken()]) as vm:
        rings(vm.memory)
        events = vm.events()
        await vm.start()
        found = []
        async for event in events:
            if isinstance(event, DeviceFailed):
                found.append((event.device, event.access.split(" ")[0], type(event.error)))
                if len(found) == 2:
                    break
        # It is told to look at its queue by the write of DRIVER_OK.
        assert found == [("Broken", "read", ZeroDivisionError), ("Broken", "write", ZeroDivisionError)]
        assert program.results(vm, 1) == [0xFFFF_FFFF]
        await until(lambda: steps(vm))


@pytest.mark.kvm
async def test_a_handler_that_fails_needs_a_reset(guest: Guest) -> None:
    class Failing(VirtioDevice):
        device_id = 42
        queue_size_max = (8,)

        async def serve(self, queue: VirtioQueue) -> None:
            async for _ in queue:
                raise ZeroDivisionError

    program = VirtioProgram().up().notify()
    async with guest(program.halt(), mode="protected", start=False, virtio=[Failing()]) as vm:
        rings(vm.memory).add([b"x"])
        events = vm.events()
        await vm.start()
        found = [event async for event in _take(events, DeviceFailed, DeviceNeedsReset)]
        assert (found[0].access, type(found[0].error)) == ("serve", ZeroDivisionError)
        assert "ZeroDivisionError" in found[1].reason


async def _take(events: Any, *kinds: type[Any]) -> Any:
    """One event of each kind, in this order."""
    wanted = list(kinds)
    async for event in events:
        if isinstance(event, wanted[0]):
            yield event
            del wanted[0]
            if not wanted:
                return


@pytest.mark.kvm
async def test_a_machine_reset_resets_its_devices(guest: Guest) -> None:
    device = Counter()
    program = VirtioProgram().up().notify().await_used(1).step()
    async with guest(program.halt(), mode="protected", start=False, virtio=[device]) as vm:
        rings(vm.memory).add([b"x"])
        await vm.start()
        await until(lambda: steps(vm))
        await vm.pause()
        [attachment] = vm._life.virtio
        assert attachment.registers.status == 0xF
        vm.memory.write(0xE_0000, bytes(64))
        await vm.reset()
        assert attachment.registers.status == 0
        assert b"LNRO0005" in vm.memory.read(0xE_0000, 0x1000)
        vm.memory.fill(0x14_0000, 2)
        rings(vm.memory).add([b"x"])
        await vm.resume()
        await until(lambda: steps(vm))
        assert (device.activations, device.resets) == (2, 1)


@pytest.mark.kvm
async def test_a_data_mover_takes_a_queue(guest: Guest) -> None:
    class Moved(Counter):
        fd = -1

        def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
            super().activate(features, queues)
            self.fd = self.host.take_queue(0)

        def notified(self, queue: int) -> None:
            if self.fd < 0:
                super().notified(queue)

    device = Moved()
    ready = VirtioProgram.RESULTS - 4
    program = VirtioProgram().up().notify().await_word(ready, 1).get(INTERRUPT_STATUS).put(STATUS, 0).step()
    async with guest(program.halt(), mode="protected", start=False, virtio=[device]) as vm:
        [attachment] = vm._life.virtio
        rings(vm.memory)
        await vm.start()

        def kicked() -> bool:
            try:
                return device.fd >= 0 and os.eventfd_read(device.fd) > 0
            except BlockingIOError:
                return False

        await until(kicked)
        # From a thread of its own it would be the same call.
        notifier = device.host.notifier
        lib.aiokvm_notify(notifier, mmio.VIRTIO_MMIO_INT_VRING)
        vm.memory.write(ready, b"\1")
        await until(lambda: steps(vm))
        assert program.results(vm, 1) == [mmio.VIRTIO_MMIO_INT_VRING]
        # After the reset the loop looks at the queue again.
        dropped = attachment.dropped_notifies
        os.eventfd_write(device.fd, 1)
        await until(lambda: attachment.dropped_notifies > dropped)
    # Who goes on notifying does not write to what has the descriptor's number then.
    assert notifier[0].irqfd < 0


@pytest.mark.kvm
async def test_shared_memory_is_the_guests(guest: Guest) -> None:
    class Sharing(Counter):
        shared_memory = MappingProxyType({3: 0x2000})

    device = Sharing()
    program = VirtioProgram().put(mmio.VIRTIO_MMIO_SHM_SEL, 3).get(mmio.VIRTIO_MMIO_SHM_LEN_LOW)
    program.get(mmio.VIRTIO_MMIO_SHM_BASE_LOW).write(SHARED_BASE + 0x1FFC, 0x11223344, 4)
    async with guest(program.end(), mode="protected", start=False, virtio=[device]) as vm:
        view = device.host.shared_memory(3)
        await vm.start()
        assert await vm.wait() == DONE
        assert program.results(vm, 2) == [0x2000, SHARED_BASE]
        assert bytes(view[0x1FFC:0x2000]) == b"\x44\x33\x22\x11"
        view.release()


@pytest.mark.kvm
async def test_tasks_and_timers(guest: Guest) -> None:
    class Busy(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[str] = []
            self.go = anyio.Event()

        async def run(self) -> None:
            self.log.append("run")
            self.host.timer(self.host.now_ns(), lambda: self.log.append("timer"))
            self.host.timer(self.host.now_ns() + 10**12, lambda: self.log.append("late"))
            self.host.spawn(self.work, "work")
            try:
                await anyio.sleep_forever()
            finally:
                self.log.append("end")

        async def work(self) -> None:
            await self.go.wait()
            self.log.append("work")
            raise VirtqueueError("of the driver's")

    device = Busy()
    async with guest(VirtioProgram().halt(), mode="protected", virtio=[device]) as vm:
        await until(lambda: "timer" in device.log)
        events = vm.events()
        device.go.set()
        [needs] = [event async for event in _take(events, DeviceNeedsReset)]
        assert needs.reason == "of the driver's"
    assert device.log == ["run", "timer", "work", "end"]
    with pytest.raises(DeviceError, match="not attached"):
        device.host.now_ns()


@pytest.mark.kvm
async def test_a_full_queue_does_not_hold_the_loop(guest: Guest) -> None:
    """A device that asks to be called again lets others run between."""

    class Polite(Counter):
        def notified(self, queue: int) -> None:
            self.notifications += 1
            if self.notifications < 50:
                self.host.again(queue)
                self.host.again(queue)

    device = Polite()
    program = VirtioProgram().up()
    async with guest(program.halt(), mode="protected", start=False, virtio=[device]) as vm:
        rings(vm.memory)
        await vm.start()
        await until(lambda: device.notifications)
        turns = 0
        while device.notifications < 50:
            await anyio.lowlevel.checkpoint()
            turns += 1
        assert turns > 5


# Before a machine starts.


@pytest.mark.kvm
async def test_devices_are_attached_before_the_start(guest: Guest) -> None:
    async with guest(b"\xf4\xeb\xfd", start=False) as vm:
        tables = vm.memory.read(0xE_0000, 36)
        first = vm.attach_virtio(Shout())
        second = vm.attach_virtio(Counter())
        assert (first.base, first.gsi) == (VIRTIO_BASE, 16)
        assert (second.base, second.gsi) == (VIRTIO_BASE + VIRTIO_SIZE, 17)
        assert vm.memory.read(0xE_0000, 36)[:8] == tables[:8] == b"RSD PTR "
        assert vm.memory.read(0xE_0000, 0x2000).count(b"LNRO0005") == 2
        with pytest.raises(DeviceError, match="attached to a machine already"):
            vm.attach_virtio(first.device)
        await vm.start()
        with pytest.raises(StateError):
            vm.attach_virtio(Counter())


@pytest.mark.kvm
async def test_a_kernel_that_is_told_by_its_command_line_is_told_of_all(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(elf_kernel())
    linux = boot.Linux(kernel, virtio_mmio_cmdline=True)
    async with await VM.create(boot=linux, memory="32M", virtio=[Counter()]) as vm:
        assert vm.memory.read(CMDLINE, 36) == b"virtio_mmio.device=4K@0xd0000000:16\0"
        with pytest.raises(ConfigError, match=r"virtio=\[...\]"):
            vm.attach_virtio(Counter())


def elf_kernel() -> bytes:
    """ELF64 for x86-64: one segment of two bytes at 16 MiB."""
    ident = b"\x7fELF\2\1\1" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 16 << 20, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return ident + header + struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 16 << 20, 2, 2, 4) + b"\xeb\xfe"


@pytest.mark.kvm
async def test_a_place_that_is_taken_is_left_out(guest: Guest) -> None:
    async with guest(b"\xf4", start=False) as vm:
        vm.attach(Device(), mmio=VIRTIO_BASE, size=8)
        assert vm.attach_virtio(Counter()).base == VIRTIO_BASE + VIRTIO_SIZE


@pytest.mark.kvm
async def test_attaching_what_cannot_be_changes_nothing(guest: Guest) -> None:
    class Wrong(Counter):
        queue_size_max = (7,)

    class TooLarge(Counter):
        shared_memory = MappingProxyType({0: 0x1000, 1: 1 << 40})

    async with guest(b"\xf4", start=False) as vm:
        before = sorted(os.listdir("/proc/self/fd")), list(map(str, vm._life.exits.mmio))
        for device in Wrong(), TooLarge():
            with pytest.raises(ConfigError):
                vm.attach_virtio(device)
        assert (sorted(os.listdir("/proc/self/fd")), list(map(str, vm._life.exits.mmio))) == before


@pytest.mark.kvm
async def test_a_machine_that_cannot_be_created_gives_its_devices_back() -> None:
    device = Counter()

    class Wrong(Counter):
        queue_size_max = (7,)

    with pytest.raises(ConfigError):
        await VM.create(boot=boot.Flat(b"\xf4"), memory="2M", virtio=[device, Wrong()])
    assert device.closed == 1
    async with await VM.create(boot=boot.Flat(b"\xf4"), memory="2M", virtio=[device]):
        pass
    assert device.closed == 2


# With no guest.


@pytest.mark.kvm
async def test_many_queues_hold_the_loop_neither_at_the_beginning_nor_at_the_end() -> None:
    class Wide(VirtioDevice):
        device_id = 42
        queue_size_max = (1024,) * 64

    # KVM has places for a thousand, and takes half a millisecond to take one away.
    async with await VM.create(boot=boot.Flat(b"\xf4"), memory="2M", virtio=[Wide() for _ in range(15)]):
        pass


def test_gsis_of_the_io_apic_come_first_and_are_shared_last() -> None:
    config = Config(boot=boot.Flat(b"\xf4"), serial_ports=2)
    found = list(places(config))
    gsis = [place.gsi for place in found]
    assert gsis[:8] == list(range(16, 24))
    assert gsis[8:17] == [5, 6, 7, 10, 11, 12, 13, 14, 15]
    assert set(gsis[17:]) == set(range(16, 24))
    assert [place.base for place in found[:3]] == [VIRTIO_BASE, VIRTIO_BASE + 0x1000, VIRTIO_BASE + 0x2000]
    assert found[-1].base + VIRTIO_SIZE == SHARED_BASE


def test_the_tables_say_which_gsis_are_shared() -> None:
    found = described([Place(0xD000_0000, 16), Place(0xD000_1000, 17), Place(0xD000_2000, 16)])
    assert [device.shared for device in found] == [True, False, True]
