"""Devices of the user's own: plain functions and coroutines, whatever the access; and their timers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError, Device, DeviceError, Exit, ExitReason
from aiokvm.aio import current_loop
from tests.machine.test_smp import CALLS_ALL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiokvm.machine.device import Timer
    from tests.machine.conftest import Guest, Program

kvm_test = pytest.mark.kvm
pytestmark = [pytest.mark.anyio]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
EXIT = (
    "b0 00"  # mov al, 0
    "e6 f4"  # out 0xf4, al
    "f4"  # hlt
)
PLACES = {"pio": 0x300, "mmio": 0xD000_0000}


class Recording(Device):
    """Reads as ``values`` say, then as zero."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.values = iter(values)
        self.accesses: list[tuple[str, int, int, int]] = []

    def answer(self, offset: int, size: int) -> int:
        value = next(self.values, 0)
        self.accesses.append(("read", offset, size, value))
        return value

    def take(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


class Plain(Recording):
    def read(self, offset: int, size: int) -> int:
        return self.answer(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.take(offset, size, value)


class Coroutine(Recording):
    async def read(self, offset: int, size: int) -> int:
        return self.answer(offset, size)

    async def write(self, offset: int, size: int, value: int) -> None:
        self.take(offset, size, value)


class Suspending(Recording):
    async def read(self, offset: int, size: int) -> int:
        await anyio.lowlevel.checkpoint()
        answer = self.answer(offset, size)
        await anyio.sleep(0.001)
        return answer

    async def write(self, offset: int, size: int, value: int) -> None:
        await anyio.sleep(0.001)
        self.take(offset, size, value)


class Alternating(Recording):
    """Plain and a coroutine by turns."""

    def read(self, offset: int, size: int) -> Any:
        answer = self.answer(offset, size)
        return answer if len(self.accesses) % 2 else _later(answer)

    def write(self, offset: int, size: int, value: int) -> Any:
        self.take(offset, size, value)
        return None if len(self.accesses) % 2 else _later(None)


async def _later(value: Any) -> Any:
    await anyio.lowlevel.checkpoint()
    return value


KINDS = [Plain, Coroutine, Suspending, Alternating]
kinds = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])


@kvm_test
@kinds
@pytest.mark.parametrize("bus", ["pio", "mmio"])
async def test_accesses_of_every_size(
    guest: Guest, program: type[Program], kind: type[Recording], bus: str
) -> None:
    base = PLACES[bus]
    code = (
        program()
        .read(base, 1, bus=bus)
        .read(base + 2, 2, bus=bus)
        .read(base + 4, 4, bus=bus)
        .write(base + 7, 0x8765_4321, 1, bus=bus)
        .write(base + 6, 0x8765_4321, 2, bus=bus)
        .write(base, 0x8765_4321, 4, bus=bus)
    )
    device = kind([0x1AA, 0xBBBB, -1])
    async with guest(code.end(), mode="protected", start=False) as vm:
        where: dict[str, Any] = {bus: base}
        vm.attach(device, **where, size=8)
        await vm.start()
        assert await vm.wait() == DONE
        # What is too wide is cut off.
        assert program.results(vm, 3) == [0xAA, 0xBBBB, 0xFFFF_FFFF]
    assert device.accesses == [
        ("read", 0, 1, 0x1AA),
        ("read", 2, 2, 0xBBBB),
        ("read", 4, 4, -1),
        ("write", 7, 1, 0x21),
        ("write", 6, 2, 0x4321),
        ("write", 0, 4, 0x8765_4321),
    ]


@kvm_test
@kinds
async def test_mmio_of_eight_bytes_is_one_access(guest: Guest, kind: type[Recording]) -> None:
    code = bytes.fromhex(
        "bb 00 00 00 d0"  # mov ebx, 0xd0000000
        "48 8b 03"  # mov rax, [rbx]
        "48 ff c0"  # inc rax
        "48 89 43 08" + EXIT  # mov [rbx + 8], rax
    )
    device = kind([0x0123_4567_89AB_CDEE])
    async with guest(code, mode="long", start=False) as vm:
        vm.attach(device, mmio=0xD000_0000, size=16)
        await vm.start()
        assert await vm.wait() == DONE
    assert device.accesses == [("read", 0, 8, 0x0123_4567_89AB_CDEE), ("write", 8, 8, 0x0123_4567_89AB_CDEF)]


@kvm_test
@kinds
@pytest.mark.parametrize("size", [1, 2, 4])
async def test_strings_come_piece_by_piece(
    guest: Guest, program: type[Program], kind: type[Recording], size: int
) -> None:
    values = [(0x0403_0201 + 7 * i) & ((1 << 8 * size) - 1) for i in range(40)]
    device = kind(values)
    code = program().strings(0x302, 40, size, out=False).strings(0x304, 40, size, out=True)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(device, pio=0x300, size=8)
        await vm.start()
        assert await vm.wait() == DONE
    assert [access for access in device.accesses if access[0] == "write"] == [
        ("write", 4, size, value) for value in values
    ]
    assert {access[1:3] for access in device.accesses if access[0] == "read"} == {(2, size)}


class Bulk(Device):
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls: list[int] = []
        self.got = b""

    def read_string(self, offset: int, size: int, count: int) -> Any:
        assert (offset, size) == (2, 2)
        self.calls.append(count)
        now, self.data = self.data[: size * count], self.data[size * count :]
        return now

    def write_string(self, offset: int, size: int, data: bytes) -> Any:
        assert (offset, size) == (4, 2)
        self.got += data

    # What KVM hands on one by one.
    def read(self, offset: int, size: int) -> Any:
        return int.from_bytes(self.read_string(offset, size, 1), "little")

    def write(self, offset: int, size: int, value: int) -> Any:
        self.got += value.to_bytes(size, "little")


class BulkLater(Bulk):
    async def read_string(self, offset: int, size: int, count: int) -> Any:
        await anyio.lowlevel.checkpoint()
        return bytearray(Bulk.read_string(self, offset, size, count))

    async def write_string(self, offset: int, size: int, data: bytes) -> Any:
        await anyio.lowlevel.checkpoint()
        Bulk.write_string(self, offset, size, data)


@kvm_test
@pytest.mark.parametrize("kind", [Bulk, BulkLater])
async def test_strings_come_in_bulk(guest: Guest, program: type[Program], kind: type[Bulk]) -> None:
    data = bytes(i % 251 for i in range(4000))
    device = kind(data)
    code = program().strings(0x302, 2000, 2, out=False).strings(0x304, 2000, 2, out=True)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(device, pio=0x300, size=8)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(program.RESULTS, 4000) == data
    assert device.got == data
    assert max(device.calls) > 100


@kvm_test
@pytest.mark.parametrize("answer", [b"\x11\x22", None, 3, "text"])
@pytest.mark.parametrize("later", [False, True])
async def test_a_string_that_is_too_short_or_none_reads_on_as_ones(
    guest: Guest, program: type[Program], answer: Any, later: bool
) -> None:
    class Short(Device):
        def read_string(self, offset: int, size: int, count: int) -> Any:
            return _later(answer) if later else answer

    async with guest(program().strings(0x300, 4, out=False).end(), mode="protected", start=False) as vm:
        vm.attach(Short(), pio=0x300, size=8)
        await vm.start()
        assert await vm.wait() == DONE
        short = answer if isinstance(answer, bytes) else b""
        assert vm.memory.read(program.RESULTS, 5) == short.ljust(4, b"\xff") + b"\0"
        assert vm.stats().device_errors == (0 if short else 1)


@kvm_test
async def test_a_device_that_overrides_nothing_reads_as_ones(guest: Guest, program: type[Program]) -> None:
    code = program().write(0xD000_0000, 5, 4).read(0xD000_0000, 4).read(0xD000_0004, 1)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(Device(), mmio=0xD000_0000, size=8)
        await vm.start()
        assert await vm.wait() == DONE
        assert program.results(vm, 2) == [0xFFFF_FFFF, 0xFF]


# One vCPU waits, the others run.

TWO = bytes.fromhex(
    "bb 00 00 e0 fe"  # mov ebx, 0xfee00000: the local APIC
    "c7 83 f0 00 00 00 ff 01 00 00"  # mov dword [ebx + 0xf0], 0x1ff: SVR, enabled
    "c7 83 00 03 00 00 00 45 0c 00"  # mov dword [ebx + 0x300], 0xc4500: INIT to all others
    "c7 83 00 03 00 00 03 46 0c 00"  # mov dword [ebx + 0x300], 0xc4603: SIPI, to 0x3000
    "a1 00 00 00 d0"  # mov eax, [0xd0000000]
    "a3 00 60 00 00" + EXIT  # mov [0x6000], eax
).ljust(0x2000, b"\0") + bytes.fromhex(
    "31 c0"  # 0x3000, in real mode: xor ax, ax
    "8e d8"  # mov ds, ax
    "ba 00 03"  # mov dx, 0x300
    "ec"  # again: in al, dx
    "fe 06 00 50"  # inc byte [0x5000]
    "eb f9"  # jmp again
)


@kvm_test
async def test_a_coroutine_suspends_its_own_vcpu_only(guest: Guest) -> None:
    asked, answer = anyio.Event(), anyio.Event()

    class Slow(Device):
        async def read(self, offset: int, size: int) -> int:
            asked.set()
            await answer.wait()
            return 0x1234_5678

    fast = Plain()
    async with guest(TWO, mode="protected", cpus=2, start=False) as vm:
        vm.attach(Slow(), mmio=0xD000_0000, size=4)
        vm.attach(fast, pio=0x300)
        await vm.start()
        await asked.wait()
        seen = len(fast.accesses)
        while len(fast.accesses) < seen + 100:
            await anyio.lowlevel.checkpoint()
        assert vm.exit is None
        answer.set()
        assert await vm.wait() == DONE
        assert vm.memory.read(0x6000, 4) == bytes.fromhex("78563412")


@kvm_test
async def test_handlers_of_several_vcpus_run_at_the_same_time(guest: Guest) -> None:
    both, waiting = anyio.Event(), 0

    class Meeting(Device):
        async def read(self, offset: int, size: int) -> int:
            nonlocal waiting
            waiting += 1
            if waiting == 2:
                both.set()
            await both.wait()
            return 0

    device = Meeting()
    async with guest(TWO, mode="protected", cpus=2, start=False) as vm:
        vm.attach(device, mmio=0xD000_0000, size=4)
        vm.attach(device, pio=0x300)
        await vm.start()
        assert await vm.wait() == DONE


@kvm_test
@pytest.mark.parametrize("end", ["kill", "leave"])
async def test_a_device_that_never_answers_does_not_keep_the_machine(
    guest: Guest, program: type[Program], end: str
) -> None:
    asked = anyio.Event()
    ended: list[str] = []

    class Never(Device):
        async def read(self, offset: int, size: int) -> int:
            asked.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("read")
            raise AssertionError

    async with guest(program().read(0xD000_0000).end(), mode="protected", start=False) as vm:
        vm.attach(Never(), mmio=0xD000_0000, size=4)
        await vm.start()
        await asked.wait()
        # It cannot stand still, and a pause that is given up has not happened.
        with anyio.move_on_after(0.01) as scope:
            await vm.pause()
        assert scope.cancelled_caught
        if end == "kill":
            assert await vm.kill() == Exit(ExitReason.KILLED)
    assert vm.exit == Exit(ExitReason.KILLED)
    assert ended == ["read"]


@kvm_test
async def test_a_pause_waits_for_the_answer(guest: Guest, program: type[Program]) -> None:
    asked, answer = anyio.Event(), anyio.Event()

    class Slow(Device):
        async def read(self, offset: int, size: int) -> int:
            asked.set()
            await answer.wait()
            return 0x5A

    async with guest(program().read(0xD000_0000).for_ever(), mode="protected", start=False) as vm:
        vm.attach(Slow(), mmio=0xD000_0000, size=4)
        await vm.start()
        await asked.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(vm.pause)
            await anyio.wait_all_tasks_blocked()
            answer.set()
        assert vm.vcpus[0].read_register("rax") & 0xFF == 0x5A


# Tasks.


@kvm_test
async def test_run_lives_as_long_as_the_machine_runs(guest: Guest) -> None:
    steps: list[str] = []
    began = anyio.Event()

    class Ticking(Device):
        async def run(self) -> None:
            steps.append("began")
            began.set()
            try:
                await anyio.sleep_forever()
            finally:
                steps.append("ended")

    async with guest(b"\xeb\xfe", start=False) as vm:
        vm.attach(Ticking(), pio=0x300)
        vm.attach(Ticking(), pio=0x310)
        await anyio.wait_all_tasks_blocked()
        assert steps == []
        await vm.start()
        await began.wait()
        await vm.pause()
        await vm.reset()
        await vm.resume()
    assert steps == ["began"] * 2 + ["ended"] * 2


@kvm_test
async def test_run_begins_and_ends_with_the_attachment_to_a_running_machine(guest: Guest) -> None:
    began, ended = anyio.Event(), anyio.Event()

    class Ticking(Device):
        async def run(self) -> None:
            began.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

    async with guest(b"\xeb\xfe") as vm:
        device = Ticking()
        one, two = vm.attach(device, pio=0x300), vm.attach(device, pio=0x310)
        await began.wait()
        vm.detach(one)
        await anyio.wait_all_tasks_blocked()
        assert not ended.is_set()
        vm.detach(two)
        await ended.wait()


@kvm_test
async def test_reset_reaches_each_device_once(guest: Guest) -> None:
    class Resetting(Device):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    device, other = Resetting(), Resetting()
    async with guest(b"\xeb\xfe") as vm:
        vm.attach(device, pio=0x300)
        vm.attach(device, mmio=0xD000_0000, size=8)
        vm.attach(other, pio=0x310)
        await vm.reset()
    assert (device.resets, other.resets) == (1, 1)


# Timers, on a loop whose clock is set by the test.


class FakeHandle:
    def __init__(self, loop: FakeLoop, deadline_ns: int, callback: Callable[[], object]) -> None:
        self._loop = loop
        self.deadline_ns = deadline_ns
        self.callback = callback

    def cancel(self) -> None:
        if self in self._loop.handles:
            self._loop.handles.remove(self)


class FakeLoop:
    def __init__(self) -> None:
        self.now = 0
        self.handles: list[FakeHandle] = []

    def is_here(self) -> bool:
        return True

    def now_ns(self) -> int:
        return self.now

    def call_at(self, deadline_ns: int, callback: Callable[[], object]) -> FakeHandle:
        self.handles.append(FakeHandle(self, deadline_ns, callback))
        return self.handles[-1]

    def advance(self, now: int) -> None:
        self.now = now
        due = [handle for handle in self.handles if handle.deadline_ns <= now]
        for handle in due:
            self.handles.remove(handle)
            handle.callback()


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def device(loop: FakeLoop) -> Device:
    device = Device()
    device._loop = loop  # type: ignore[assignment]
    device._timers = set()
    return device


def test_a_timer_calls_back_once(loop: FakeLoop, device: Device) -> None:
    calls: list[int] = []
    device.timer(100, lambda: calls.append(device.now_ns()))
    for now in (50, 99, 120, 1000):
        loop.advance(now)
    assert calls == [120]
    assert device._timers == set()


def test_a_periodic_timer_does_not_drift(loop: FakeLoop, device: Device) -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(loop.now)
        loop.now += 3

    timer = device.timer(100, slow, period_ns=10)
    while len(calls) < 5:
        # The loop is late, differently each time.
        loop.advance(timer.deadline_ns + len(calls))
    assert calls == [100, 111, 122, 133, 144]
    assert timer.deadline_ns == 150


def test_a_periodic_timer_makes_up_for_nothing_and_stays_in_step(loop: FakeLoop, device: Device) -> None:
    calls: list[int] = []
    timer = device.timer(100, lambda: calls.append(loop.now), period_ns=10)
    loop.advance(157)
    assert calls == [157]
    assert timer.deadline_ns == 160
    loop.advance(160)
    assert calls == [157, 160]
    assert timer.deadline_ns == 170


def test_a_timer_that_is_cancelled_does_not_call_back(loop: FakeLoop, device: Device) -> None:
    calls: list[int] = []
    once = device.timer(100, lambda: calls.append(1))
    often = device.timer(100, lambda: often.cancel(), period_ns=10)
    once.cancel()
    once.cancel()
    for now in range(100, 150, 10):
        loop.advance(now)
    assert calls == []
    assert loop.handles == []


def test_a_timer_may_make_the_next(loop: FakeLoop, device: Device) -> None:
    calls: list[int] = []

    def again() -> None:
        calls.append(loop.now)
        device.timer(loop.now + 10, again)

    device.timer(10, again)
    for now in (10, 20, 30):
        loop.advance(now)
    assert calls == [10, 20, 30]


def test_timers_and_clocks_need_a_machine(device: Device) -> None:
    with pytest.raises(ConfigError, match="-1 ns is negative"):
        device.timer(0, lambda: None, period_ns=-1)
    for call in (Device().now_ns, lambda: Device().timer(0, lambda: None)):
        with pytest.raises(DeviceError, match="Device is not attached to a machine"):
            call()


@kvm_test
async def test_timers_on_the_loop_end_with_the_device_and_the_machine(guest: Guest) -> None:
    calls: list[str] = []
    enough = anyio.Event()

    class Clocked(Device):
        def begin(self, name: str) -> Timer:
            now = self.now_ns()
            self.timer(now + 1_000_000, lambda: calls.append(f"{name} once"))
            return self.timer(now + 1_000_000, lambda: calls.append(name), period_ns=1_000_000)

    one, two, three = Clocked(), Clocked(), Clocked()
    async with guest(b"\xeb\xfe") as vm:
        vm.attach(one, pio=0x300)
        attachment = vm.attach(two, pio=0x310)
        vm.attach(three, pio=0x320)
        two.begin("detached")
        vm.detach(attachment)
        one.begin("one")
        one.timer(
            one.now_ns() + 1_500_000, lambda: enough.set() if calls.count("one") > 2 else None, 1_000_000
        )
        await enough.wait()
        assert calls.count("one once") == 1
        assert "detached" not in calls
        assert "detached once" not in calls
        calls.clear()
        one.begin("killed")
        three.begin("killed")
        await vm.kill()
        calls.clear()
        await current_loop().sleep_until(current_loop().now_ns() + 5_000_000)
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        assert calls == []
        with pytest.raises(DeviceError):
            two.now_ns()


@kvm_test
async def test_a_device_has_its_machines_memory_while_it_is_attached(guest: Guest) -> None:
    class Hypercall(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            seen.append(self.memory.read(value, 5))
            self.memory.write(value, b"world")

    seen: list[bytes] = []
    device = Hypercall()
    assert not hasattr(device, "memory")
    code = bytes.fromhex(
        "66 b8 00 30 00 00"  # mov eax, 0x3000
        "ba 00 03 66 ef"  # mov dx, 0x300; out dx, eax
        "b0 00 e6 f4 f4"  # mov al, 0; out 0xf4, al; hlt
    )
    async with guest(code, start=False) as vm:
        vm.memory.write(0x3000, b"hello")
        attachment = vm.attach(device, pio=0x300, size=4)
        other = vm.attach(device, pio=0x310)
        assert device.memory is vm.memory
        await vm.start()
        await vm.wait()
        assert seen == [b"hello"]
        assert vm.memory.read(0x3000, 5) == b"world"
    assert not attachment.attached
    assert not other.attached
    assert not hasattr(device, "memory")


EACH_ASKS = CALLS_ALL[:0x2000] + bytes.fromhex(
    "66 b8 01 00 00 00 0f a2 66 c1 eb 18"  # 0x3000, in real mode: the APIC id to ebx
    "ba 00 03 88 d8"  # mov dx, 0x300; mov al, bl
    "ee"  # out dx, al
    "ec"  # in al, dx
    "38 d8 75 05"  # cmp al, bl; jne 1f
    "f0 fe 06 00 50"  # lock inc byte [0x5000]
    "fa f4"  # 1: cli; hlt
)


@kvm_test
@pytest.mark.parametrize("is_coroutine", [False, True])
async def test_a_device_knows_which_vcpu_asks(guest: Guest, is_coroutine: bool) -> None:
    class Asked(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            seen.append((self.vcpu, value))

        def read(self, offset: int, size: int) -> int | Awaitable[int]:
            return self.later() if is_coroutine else self.vcpu or 0

        async def later(self) -> int:
            vcpu = self.vcpu
            await anyio.lowlevel.checkpoint()
            return vcpu or 0

    seen: list[tuple[int | None, int]] = []
    async with guest(EACH_ASKS, mode="protected", cpus=5, start=False) as vm:
        vm.attach(Asked(), pio=0x300)
        await vm.start()
        with anyio.fail_after(30):
            while vm.memory.read(0x5000, 1)[0] < 4:
                await anyio.lowlevel.checkpoint()
    assert sorted(seen) == [(index, index) for index in range(1, 5)]


@kvm_test
async def test_nobody_asks_for_posted_writes(guest: Guest, program: type[Program]) -> None:
    class Posted(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            seen.append(self.vcpu)

        def read(self, offset: int, size: int) -> int:
            seen.append(self.vcpu)
            return 0

    seen: list[int | None] = []
    code = program().write(0x300, 1, bus="pio").read(0x300, bus="pio").end()
    async with guest(code, mode="protected", start=False) as vm:
        vm.attach(Posted(), pio=0x300, mode="posted")
        await vm.start()
        await vm.wait()
    assert seen == [None, 0]
