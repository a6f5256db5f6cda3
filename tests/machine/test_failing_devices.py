"""A device that raises: the guest reads ones, the program is told, and the policy is the program's."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
import pytest

from aiokvm import VM, Device, DeviceError, DeviceFailed, ErrorPolicy, Exit, ExitReason, StateError, VmState
from aiokvm.aio import current_loop
from aiokvm.machine import life
from aiokvm.machine.events import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.machine.conftest import Guest, Program

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
MMIO = 0xD000_0000
SPIN = b"\xeb\xfe"


class FailureError(Exception):
    """What devices of these tests raise."""


async def _raise() -> Any:
    raise FailureError("first")


async def _raise_later() -> Any:
    await anyio.lowlevel.checkpoint()
    raise FailureError("later")


def _raise_now() -> Any:
    raise FailureError("now")


async def _wait_for_what_is_cancelled() -> Any:
    """asyncio only: the handler's own task is not cancelled."""
    import asyncio

    task = asyncio.create_task(asyncio.sleep(3600))
    await asyncio.sleep(0)
    task.cancel()
    await task


async def _wait_for_what_was_cancelled() -> Any:
    import asyncio

    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


HOW = {"now": _raise_now, "first": _raise, "later": _raise_later}


class Failing(Device):
    def __init__(self, how: Callable[[], Any]) -> None:
        self.how = how
        self.calls = 0

    def read(self, offset: int, size: int) -> Any:
        self.calls += 1
        return self.how()

    def write(self, offset: int, size: int, value: int) -> Any:
        self.calls += 1
        return self.how()


class FailingString(Failing):
    def read_string(self, offset: int, size: int, count: int) -> Any:
        self.calls += 1
        return self.how()


class FailingDoorbell(Failing):
    def doorbell(self, offset: int, count: int) -> Any:
        self.calls += 1
        return self.how()


class FailingReset(Failing):
    def reset(self) -> None:
        self.calls += 1
        _raise_now()


class FailingRun(Failing):
    async def run(self) -> None:
        self.calls += 1
        await self.how()


async def failure(vm: VM, events: Any) -> DeviceFailed:
    async for event in events:
        if isinstance(event, DeviceFailed):
            return event
    raise AssertionError("no device failed")


# Where a device fails: the guest's access, the class, the mode; what the event says of the access.
ACCESSES: dict[str, tuple[type[Failing], Literal["exit", "posted", "doorbell"], str]] = {
    "read": (Failing, "exit", "read of 4 bytes at offset 0x0 of the region at 0xd0000000-0xd0000003"),
    "write": (Failing, "exit", "write of 2 bytes at offset 0x0 of the region at 0xd0000000-0xd0000003"),
    "string": (
        FailingString,
        "exit",
        "string read of 1 bytes at offset 0x0, 4 times of the region at 0x300-0x307",
    ),
    "pieces": (
        Failing,
        "exit",
        "string read of 1 bytes at offset 0x0, 4 times of the region at 0x300-0x307",
    ),
    "posted": (
        Failing,
        "posted",
        "posted write of 2 bytes at offset 0x0 of the region at 0xd0000000-0xd0000003",
    ),
    "doorbell": (FailingDoorbell, "doorbell", "doorbell"),
}


def code_of(program: type[Program], what: str) -> Program:
    if what == "read":
        return program().read(MMIO, 4)
    if what in ("string", "pieces"):
        return program().strings(0x300, 4, out=False)
    return program().write(MMIO, 1, 4 if what == "doorbell" else 2)


def place(vm: VM, device: Device, what: str, policy: ErrorPolicy) -> Any:
    if what in ("string", "pieces"):
        return vm.attach(device, pio=0x300, size=8, on_error=policy)
    return vm.attach(device, mmio=MMIO, size=4, offset=8, mode=ACCESSES[what][1], on_error=policy)


CASES = [
    (what, how)
    for what in ACCESSES
    for how in HOW
    if what != "posted" or how == "now"  # a coroutine is refused
]


@pytest.mark.parametrize("policy", list(ErrorPolicy))
@pytest.mark.parametrize(("what", "how"), CASES)
async def test_a_failure_is_told_and_the_policy_followed(
    guest: Guest,
    program: type[Program],
    caplog: pytest.LogCaptureFixture,
    what: str,
    how: str,
    policy: ErrorPolicy,
) -> None:
    kind, _, access = ACCESSES[what]
    code = code_of(program, what)
    device = kind(HOW[how])
    # A doorbell is not waited for: its guest has to be there when it fails.
    async with guest(code.halt() if what == "doorbell" else code.end(), mode="protected", start=False) as vm:
        attachment = place(vm, device, what, policy)
        events = vm.events()
        await vm.start()
        event = await failure(vm, events)
        assert (event.machine, event.device, event.access) == (vm.name, kind.__name__, access)
        assert isinstance(event.error, FailureError)
        records = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.getMessage() for record in records] == [f"{kind.__name__}: {access} failed"]
        assert [record.machine for record in records] == [vm.name]  # type: ignore[attr-defined]
        assert records[0].exc_info
        assert records[0].exc_info[1] is event.error
        assert vm.stats().device_errors == 1
        if policy is ErrorPolicy.STOP_MACHINE:
            exit_ = await vm.wait()
            assert exit_.reason is ExitReason.ERROR
            assert exit_.detail == f"{kind.__name__}: {access}: FailureError('{how}')"
        elif what != "doorbell":
            assert await vm.wait() == DONE
            if what == "read":
                assert program.results(vm, 1) == [0xFFFF_FFFF]
            elif what in ("string", "pieces"):
                assert vm.memory.read(program.RESULTS, 5) == b"\xff\xff\xff\xff\0"
        assert attachment.attached == (policy is not ErrorPolicy.STOP_DEVICE)


@pytest.mark.parametrize("policy", list(ErrorPolicy))
@pytest.mark.parametrize("what", ["run", "run later", "reset", "timer", "periodic timer"])
async def test_a_failure_outside_of_accesses_is_told_and_the_policy_followed(
    guest: Guest, caplog: pytest.LogCaptureFixture, what: str, policy: ErrorPolicy
) -> None:
    kind = {"run": FailingRun, "reset": FailingReset}.get(what.split()[0], Failing)
    device = kind(_raise_later if what == "run later" else _raise)
    access = what.split()[-1] if "timer" in what else what.split()[0]
    async with guest(SPIN) as vm:
        events = vm.events()
        attachment = vm.attach(device, pio=0x300, irq=5, on_error=policy)
        other = vm.attach(device, pio=0x310)
        if what == "reset":
            with suppress(StateError):  # it ends the machine, if that is the policy
                await vm.reset()
        if "timer" in what:
            timer = device.timer(device.now_ns(), _raise_now, period_ns=1000 * (what != "timer"))
        event = await failure(vm, events)
        if "timer" in what and policy is ErrorPolicy.KEEP:
            timer.cancel()
        assert (event.device, event.access) == (kind.__name__, access)
        assert f"{kind.__name__}: {access} failed" in caplog.text
        if policy is ErrorPolicy.STOP_MACHINE:
            exit_ = await vm.wait()
            assert exit_.reason is ExitReason.ERROR
            assert exit_.detail.startswith(f"{kind.__name__}: {access}: FailureError(")
        else:
            assert vm.state is VmState.RUNNING
        # A device is stopped with all of its regions.
        kept = policy is not ErrorPolicy.STOP_DEVICE
        assert (attachment.attached, other.attached) == (kept, kept)
        assert hasattr(device, "irq") == kept


@pytest.mark.parametrize("policy", list(ErrorPolicy))
@pytest.mark.parametrize("how", [_wait_for_what_is_cancelled, _wait_for_what_was_cancelled])
async def test_a_handler_whose_work_is_cancelled_answers_all_the_same(
    guest: Guest,
    program: type[Program],
    anyio_backend_name: str,
    how: Callable[[], Any],
    policy: ErrorPolicy,
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("trio cancels nothing but scopes")
    device = Failing(how)
    code = program().read(MMIO, 4).write(MMIO, 1)
    async with guest(code.times(3).halt(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=4, on_error=policy)
        events = vm.events()
        await vm.start()
        event = await failure(vm, events)
        assert isinstance(event.error, DeviceError)
        assert "what the device waited for was cancelled" in str(event.error)
        if policy is ErrorPolicy.STOP_MACHINE:
            assert (await vm.wait()).reason is ExitReason.ERROR
            return
        while vm.stats().vcpus[0].reasons.get("KVM_EXIT_MMIO", 0) < 6:
            await anyio.lowlevel.checkpoint()
        await vm.pause()
        assert program.results(vm, 1) == [0xFFFF_FFFF]
        assert device.calls == (6 if policy is ErrorPolicy.KEEP else 1)


async def test_posted_writes_after_one_that_fails_arrive(guest: Guest, program: type[Program]) -> None:
    class Picky(Device):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def write(self, offset: int, size: int, value: int) -> None:
            if value % 3 == 0:
                raise FailureError(value)
            self.seen.append(value)

    device = Picky()
    code = program()
    for value in range(30):
        code.write(MMIO, value)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, mode="posted")
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.stats().device_errors == 10
    assert device.seen == [value for value in range(30) if value % 3]


async def test_what_is_posted_to_a_device_that_was_stopped_is_dropped(
    guest: Guest, program: type[Program]
) -> None:
    device = Failing(_raise_now)
    async with guest(program().write(MMIO, 1).times(100).end(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, mode="posted", on_error="stop-device")
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.stats().device_errors == 1
    assert device.calls == 1


async def test_a_plain_function_that_posts_with_a_coroutine_is_told(
    guest: Guest, program: type[Program]
) -> None:
    """It looks plain when it is attached."""
    device = Failing(_raise_later)
    async with guest(program().write(MMIO, 1).end(), mode="protected", start=False) as vm:
        events = vm.events()
        vm.attach(device, mmio=MMIO, mode="posted")
        await vm.start()
        assert "cannot be served by a coroutine" in str((await failure(vm, events)).error)
        assert await vm.wait() == DONE


@pytest.mark.parametrize("how", list(HOW))
async def test_the_log_of_a_guest_that_makes_a_device_fail_is_bounded(
    guest: Guest, program: type[Program], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    device = Failing(HOW[how])
    code = program().read(MMIO).write(MMIO, 1).times(1500)
    async with guest(code.end(), mode="protected", start=False) as vm:
        events = vm.events()
        vm.attach(device, mmio=MMIO, size=4)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.stats().device_errors == device.calls == 3000
        # Ten, and one for each second that this took.
        assert 10 <= len([record for record in caplog.records if record.levelno == logging.ERROR]) < 100
        # A subscriber that does not look keeps the newest.
        assert len([event async for event in events]) == BACKLOG


async def test_a_device_that_was_detached_and_fails_is_logged(
    guest: Guest, caplog: pytest.LogCaptureFixture, fresh_log: None
) -> None:
    began = anyio.Event()

    class Ungrateful(Device):
        async def run(self) -> None:
            began.set()
            try:
                await anyio.sleep_forever()
            finally:
                _raise_now()

    async with guest(SPIN) as vm:
        attachment = vm.attach(Ungrateful(), pio=0x300)
        await began.wait()
        vm.detach(attachment)
    assert "exception in Ungrateful.run" in caplog.text


# Tasks that do not end though cancelled.


class Stubborn(Device):
    """Swallows its cancellation, and goes on until it is let go."""

    def __init__(self) -> None:
        self.began = anyio.Event()
        self.let_go = False
        self.ended = anyio.Event()

    async def stay(self, *_: int) -> int:
        self.began.set()
        while not self.let_go:
            try:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.001)
                await anyio.lowlevel.checkpoint()
            except BaseException:
                continue
        self.ended.set()
        return 0x42


class StubbornHandler(Stubborn):
    async def read(self, offset: int, size: int) -> int:
        return await self.stay()


class StubbornRun(Stubborn):
    async def run(self) -> None:
        await self.stay()


class StubbornDoorbell(Stubborn):
    async def doorbell(self, offset: int, count: int) -> None:
        await self.stay()


@pytest.mark.parametrize("kind", [StubbornHandler, StubbornRun, StubbornDoorbell])
async def test_a_task_that_swallows_its_cancellation_holds_the_end_up_for_a_bounded_time(
    guest: Guest,
    program: type[Program],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Stubborn],
) -> None:
    monkeypatch.setattr(life, "DEVICES_SECONDS", 0.05)
    device = kind()
    code = program().read(MMIO) if kind is StubbornHandler else program().write(MMIO, 1, 4)
    async with guest(code.halt(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO, size=4, mode="doorbell" if kind is StubbornDoorbell else "exit")
        await vm.start()
        await device.began.wait()
    assert vm.state is VmState.CLOSED
    assert "has been cancelled and does not end in 0.05 s" in caplog.text
    # What it does now reaches nobody.
    device.let_go = True
    await device.ended.wait()
    await current_loop().sleep_until(current_loop().now_ns() + 1_000_000)


async def test_a_handler_that_begins_as_the_machine_ends_is_cancelled(
    guest: Guest, program: type[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit was on its way: kill came first."""
    ended: list[BaseException] = []

    class Late(Device):
        async def read(self, offset: int, size: int) -> int:
            machine_._life._end(Exit(ExitReason.KILLED))
            try:
                await anyio.sleep_forever()
            except BaseException as error:
                ended.append(error)
                raise
            raise AssertionError

    async with guest(program().read(MMIO).end(), mode="protected", start=False) as machine_:
        machine_.attach(Late(), mmio=MMIO)
        await machine_.start()
        assert (await machine_.wait()).reason is ExitReason.KILLED
    assert len(ended) == 1
