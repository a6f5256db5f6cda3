"""Handlers on the loop: what they enter in their first step stays theirs, and they end with the machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import sniffio
import trio

from aiokvm import Device, Exit, ExitReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.machine.conftest import Guest, Program

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
MMIO = 0xD000_0000
# Of the time limits that are not to be reached.
LONG_S = 60.0


class Reading(Device):
    """Reads by one of the functions below, which are given the device."""

    def __init__(self, how: Callable[[Reading], Any]) -> None:
        self.how = how
        self.steps: list[object] = []

    async def read(self, offset: int, size: int) -> int:
        value = await self.how(self)
        self.steps.append(value)
        return int(value)

    async def read_string(self, offset: int, size: int, count: int) -> bytes:
        return bytes([await self.read(offset, size)] * count)

    async def write(self, offset: int, size: int, value: int) -> None:
        await self.read(offset, size)


async def scope_that_holds(_: Reading) -> int:
    with anyio.fail_after(LONG_S):
        await anyio.sleep(0.001)
        await anyio.lowlevel.checkpoint()
    return 1


async def scope_that_ends(_: Reading) -> int:
    with anyio.move_on_after(0.001) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    await anyio.sleep(0.001)
    return 2


async def scope_that_fails(_: Reading) -> int:
    try:
        with anyio.fail_after(0.001):
            await anyio.sleep_forever()
    except TimeoutError:
        await anyio.lowlevel.checkpoint()
        return 3
    raise AssertionError


async def scopes_in_scopes(_: Reading) -> int:
    with anyio.CancelScope(shield=True), anyio.move_on_after(LONG_S), anyio.move_on_after(0.001) as inner:
        await anyio.sleep_forever()
    return 4 * inner.cancelled_caught


async def returns(value: object) -> object:
    return value


async def scope_that_never_suspends(_: Reading) -> int:
    with anyio.fail_after(LONG_S):
        await returns(None)
    return 5


async def scope_that_is_cancelled_by_itself(_: Reading) -> int:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.sleep_forever()
    return 6


async def group(_: Reading) -> int:
    values: list[int] = []

    async def child(value: int) -> None:
        await anyio.sleep(0.001)
        values.append(value)

    async with anyio.create_task_group() as tasks:
        for value in (1, 2, 4):
            tasks.start_soon(child, value)
    return sum(values)


async def native(_: Reading) -> int:
    if sniffio.current_async_library() == "trio":
        with trio.move_on_after(0.001) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        return 8 * scope.cancelled_caught
    try:
        async with asyncio.timeout(0.001):
            await asyncio.sleep(LONG_S)
    except TimeoutError:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(asyncio.sleep(0.001, 8))
        return task.result()
    raise AssertionError


async def native_that_holds(_: Reading) -> int:
    if sniffio.current_async_library() == "trio":
        with trio.fail_after(LONG_S):
            await trio.sleep(0.001)
        return 9
    async with asyncio.timeout(LONG_S):
        return await asyncio.wait_for(asyncio.sleep(0.001, 9), LONG_S)


HOW = {
    scope_that_holds: 1,
    scope_that_ends: 2,
    scope_that_fails: 3,
    scopes_in_scopes: 4,
    scope_that_never_suspends: 5,
    scope_that_is_cancelled_by_itself: 6,
    group: 7,
    native: 8,
    native_that_holds: 9,
}


@pytest.mark.parametrize(("how", "value"), HOW.items(), ids=[how.__name__ for how in HOW])
async def test_what_a_handler_enters_stays_with_it(
    guest: Guest, program: type[Program], how: Callable[[Reading], Any], value: int
) -> None:
    device = Reading(how)
    code = program().read(MMIO).write(MMIO, 1).read(MMIO).strings(0x300, 3, out=False)
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO)
        vm.attach(device, pio=0x300)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.stats().device_errors == 0
        assert vm.memory.read(program.RESULTS, 3) == bytes([value] * 3)
    assert device.steps[:3] == [value] * 3


async def test_handlers_of_many_kinds_follow_each_other(guest: Guest, program: type[Program]) -> None:
    """Each hands the leader's task over, or does not, and none is mistaken for another."""
    kinds = list(HOW)
    calls = 0

    class All(Device):
        async def read(self, offset: int, size: int) -> int:
            nonlocal calls
            calls += 1
            return int(await kinds[offset](Reading(kinds[offset])))

    code = program()
    for offset in range(len(kinds)):
        code.read(MMIO + offset)
    async with guest(code.times(10).end(), mode="protected", start=False) as vm:
        vm.attach(All(), mmio=MMIO, size=len(kinds))
        await vm.start()
        assert await vm.wait() == DONE
        assert program.results(vm, len(kinds)) == list(HOW.values())
        assert vm.stats().device_errors == 0
    assert calls == 10 * len(kinds)


async def test_machines_of_one_loop_do_not_wait_for_each_others_handlers(
    guest: Guest, program: type[Program]
) -> None:
    answer = anyio.Event()

    async def wait(_: Reading) -> int:
        with anyio.fail_after(LONG_S):
            await answer.wait()
        return 1

    slow, fast = Reading(wait), Reading(scope_that_never_suspends)
    code = program().read(MMIO)
    async with (
        guest(code.end(), mode="protected", start=False) as one,
        guest(code.times(100).end(), mode="protected", start=False) as two,
    ):
        one.attach(slow, mmio=MMIO)
        two.attach(fast, mmio=MMIO)
        await one.start()
        await two.start()
        assert await two.wait() == DONE
        assert one.exit is None
        answer.set()
        assert await one.wait() == DONE


async def test_a_guest_that_exits_all_the_time_leaves_the_loop_to_others(
    guest: Guest, program: type[Program]
) -> None:
    device = Reading(scope_that_never_suspends)
    async with guest(program().read(MMIO).for_ever(), mode="protected", start=False) as vm:
        vm.attach(device, mmio=MMIO)
        await vm.start()
        for _ in range(20):
            seen = len(device.steps)
            await anyio.sleep(0.001)
            while len(device.steps) == seen:
                await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("poll_ns", [0, 50_000])
@pytest.mark.parametrize("end", ["kill", "leave", "raise"])
async def test_handlers_are_cancelled_and_awaited_when_the_machine_ends(
    guest: Guest, program: type[Program], end: str, poll_ns: int
) -> None:
    steps: list[str] = []
    began = anyio.Event()

    class Waiting(Device):
        async def read(self, offset: int, size: int) -> int:
            with anyio.fail_after(LONG_S):
                began.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(0.001)
                    steps.append("ended")
            raise AssertionError

    class LeavingError(Exception):
        pass

    async def live() -> None:
        code = program().read(MMIO).end()
        async with guest(code, mode="protected", start=False, poll_ns=poll_ns) as vm:
            vm.attach(Waiting(), mmio=MMIO)
            await vm.start()
            await began.wait()
            if end == "kill":
                await vm.kill()
            if end == "raise":
                raise LeavingError

    if end == "raise":
        with pytest.raises(LeavingError):
            await live()
    else:
        await live()
    assert steps == ["ended"]


async def test_a_handler_may_end_the_machine(guest: Guest, program: type[Program]) -> None:
    class Killing(Device):
        async def read(self, offset: int, size: int) -> int:
            await anyio.lowlevel.checkpoint()
            await vm.kill()
            raise AssertionError  # it has been cancelled with the machine

    async with guest(program().read(MMIO).end(), mode="protected", start=False) as vm:
        vm.attach(Killing(), mmio=MMIO)
        await vm.start()
        assert await vm.wait() == Exit(ExitReason.KILLED)
        assert vm.stats().device_errors == 0


async def test_with_no_polling_all_is_served(guest: Guest, program: type[Program]) -> None:
    device = Reading(scope_that_never_suspends)
    code = program().read(MMIO).times(200)
    async with guest(code.end(), mode="protected", start=False, poll_ns=0) as vm:
        vm.attach(device, mmio=MMIO)
        await vm.start()
        assert await vm.wait() == DONE
        stats = vm.stats()
        assert (stats.poll_hits, stats.vcpus[0].poll_hits) == (0, 0)
    assert len(device.steps) == 200
