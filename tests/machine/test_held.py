"""What a guest does to hold the loop: long strings, runs of posted writes, many vCPUs, all queues at once.

That nothing holds it is checked by the measure that every test on a loop runs under (tests/holdups.py); these
tests bring about what held it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiokvm import VM, ConfigError, Device, Exit, ExitReason, boot
from aiokvm.aio import current_loop
from aiokvm.machine import search as module
from aiokvm.machine.console import OUTPUT_LIMIT, SerialConsole
from aiokvm.machine.share import LoopShare
from aiokvm.machine.turn import LONG_SLICE_NS, SLICE_NS, Slice
from tests.machine.test_smp import CALLS_ALL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from aiokvm.boot.plan import BootPlan, GuestInfo
    from tests.machine.conftest import Guest, Program

pytestmark = pytest.mark.anyio

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
PORT = 0x300
PIECES = 1024
LIMIT_S = 30.0


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Slow(Device):
    """A plain device that computes at each access; a thousand accesses are more than the loop may be held."""

    def __init__(self, seconds: float = 100e-6) -> None:
        self.seconds = seconds
        self.accesses = 0
        self.written: list[int] = []

    def read(self, offset: int, size: int) -> int:
        burn(self.seconds)
        self.accesses += 1
        return self.accesses & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        burn(self.seconds)
        self.accesses += 1
        self.written.append(value)


@pytest.mark.kvm
async def test_a_string_is_read_in_slices(guest: Guest, program: type[Program]) -> None:
    device = Slow()
    code = program().strings(PORT, PIECES, out=False).end()
    async with guest(code, mode="protected", start=False) as vm:
        vm.attach(device, pio=PORT)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(program.RESULTS, PIECES) == bytes(i & 0xFF for i in range(1, PIECES + 1))


@pytest.mark.kvm
async def test_a_string_ends_in_ones_when_its_device_goes_meanwhile(
    guest: Guest, program: type[Program]
) -> None:
    class Leaves(Slow):
        def read(self, offset: int, size: int) -> int:
            if self.accesses == 10:
                vm.detach(attachment)
            return super().read(offset, size)

    device = Leaves(seconds=50e-6)
    code = program().strings(PORT, PIECES, out=False).end()
    async with guest(code, mode="protected", start=False) as vm:
        attachment = vm.attach(device, pio=PORT)
        await vm.start()
        assert await vm.wait() == DONE
        assert 10 < device.accesses < PIECES // 2
        rest = vm.memory.read(program.RESULTS, PIECES)[device.accesses :]
        assert rest == b"\xff" * len(rest)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["exit", "posted"])
async def test_written_strings_and_runs_of_posted_writes_are_served_in_slices(
    guest: Guest, program: type[Program], mode: Literal["exit", "posted"]
) -> None:
    device = Slow()
    code = program().strings(PORT, PIECES, out=True).read(PORT, bus="pio").end()
    async with guest(code, mode="protected", start=False) as vm:
        vm.attach(device, pio=PORT, mode=mode)
        data = bytes(i % 251 for i in range(PIECES))
        vm.memory.write(program.RESULTS, data)
        await vm.start()
        assert await vm.wait() == DONE
        # The read comes after all that was posted before it.
        assert bytes(device.written) == data
        assert device.accesses == PIECES + 1


FLOOD_AP = CALLS_ALL[:0x2000] + bytes.fromhex(
    "ba 00 03"  # 0x3000, in real mode: mov dx, 0x300
    "ec"  # again: in al, dx
    "eb fd"  # jmp again
)


@pytest.mark.kvm
async def test_exits_of_many_vcpus_are_served_in_slices(guest: Guest) -> None:
    device = Slow(seconds=3e-3)
    async with guest(FLOOD_AP, mode="protected", cpus=33, memory="4M", start=False) as vm:
        vm.attach(device, pio=PORT)
        await vm.start()
        with anyio.fail_after(LIMIT_S):
            while device.accesses < 200:
                await anyio.lowlevel.checkpoint()


@pytest.mark.kvm
async def test_while_a_coroutine_answers_a_flood_leaves_the_loop_its_turns(guest: Guest) -> None:
    """Whatever is suspended: the vCPUs have news at each look."""
    asked, answer = anyio.Event(), anyio.Event()

    class Mixed(Slow):
        async def answer(self) -> int:
            await answer.wait()
            return 1

        def read(self, offset: int, size: int) -> int:
            super().read(offset, size)
            if asked.is_set():
                return 0
            asked.set()
            return self.answer()  # type: ignore[return-value]

    device = Mixed(seconds=1e-3)
    async with guest(FLOOD_AP, mode="protected", cpus=9, memory="4M", start=False) as vm:
        vm.attach(device, pio=PORT)
        await vm.start()
        with anyio.fail_after(LIMIT_S):
            await asked.wait()
            while device.accesses < 200:
                await anyio.lowlevel.checkpoint()
        answer.set()


ONE_CPU = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import anyio
import anyio.lowlevel
from aiokvm import VM, Device, boot
options = {"use_uvloop": True} if sys.argv[1] == "uvloop" else {}

class Fast(Device):
    count = 0
    def read(self, offset, size):
        self.count += 1
        if self.count == 20:
            asked.set()
            return self.slow()
        return 1
    async def slow(self):
        await answer.wait()
        return 1

async def main():
    global asked, answer
    asked, answer = anyio.Event(), anyio.Event()
    device, other = Fast(), Fast()
    image = boot.Flat(bytes.fromhex(sys.argv[2]), mode="protected")
    async with await VM.create(boot=image, cpus=5, memory="4M", devices=[device.at(pio=0x300)]) as vm:
        await vm.start()
        with anyio.fail_after(30):
            await asked.wait()
            before, turns = device.count, 0
            while device.count < before + 1000:
                await anyio.sleep(0.001)
                turns += 1
            answer.set()
            while device.count < before + 2000:
                await anyio.lowlevel.checkpoint()
                turns += 1
    print("turns", turns)

backend = "trio" if sys.argv[1] == "trio" else "asyncio"
anyio.run(main, backend=backend, backend_options=options)
"""


@pytest.mark.kvm
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_one_cpu_is_shared_with_a_flood_while_a_coroutine_answers(loop: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_CPU, loop, FLOOD_AP.hex()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"turns (\d+)\n", done.stdout)
    assert found
    assert int(found[1]) > 5


@dataclass(frozen=True)
class Zeroing:
    """A boot protocol that needs a large part of RAM to be zero, as an ELF file whose memsz is large."""

    flat: boot.Flat

    def files(self) -> tuple[Path, ...]:
        return self.flat.files()

    def plan(self, files: Mapping[Path, bytes], guest: GuestInfo) -> BootPlan:
        return replace(self.flat.plan(files, guest), zero=((1 << 20, 255 << 20),))


@pytest.mark.kvm
async def test_what_a_reset_zeroes_is_zeroed_elsewhere() -> None:
    image = Zeroing(boot.Flat(b"\xeb\xfe"))
    async with await VM.create(boot=image, memory="256M") as vm:
        await vm.start()
        vm.memory.write(128 << 20, b"secret")
        await vm.reset()
        assert vm.memory.read(128 << 20, 6) == bytes(6)


# How long a slice is.


def test_a_loop_with_nothing_else_to_do_has_its_turns_more_seldom() -> None:
    part = Slice()
    lengths = []
    for turn_ns in (20_000, 20_000, 20_000, 20_000, 500_000, 20_000):
        part.begin_after(turn_ns)
        lengths.append(part.length_ns)
    assert lengths == [600_000, 1_200_000, LONG_SLICE_NS, LONG_SLICE_NS, SLICE_NS, 600_000]
    assert not part.is_over()


# All virtio devices of a loop.


async def test_the_share_of_virtio_devices_is_bounded_over_all_of_them() -> None:
    share = LoopShare.of(current_loop())
    done: list[int] = []

    def work(number: int) -> None:
        burn(5e-3)
        done.append(number)

    for number in range(20):
        share.serve(lambda number=number: work(number))  # type: ignore[misc]
    assert len(done) <= 2
    with anyio.fail_after(LIMIT_S):
        while len(done) < 20:
            await anyio.lowlevel.checkpoint()
    assert done == list(range(20))


async def test_what_is_asked_for_again_waits_for_another_turn() -> None:
    share = LoopShare.of(current_loop())
    calls = 0

    def again() -> None:
        nonlocal calls
        calls += 1
        if calls < 50:
            share.later(again)

    share.later(again)
    turns = 0
    while calls < 50:
        await anyio.lowlevel.checkpoint()
        turns += 1
    assert turns > 10


# What a guest prints, and somebody expects.


async def printing(
    console: SerialConsole, pattern: re.Pattern[bytes], pieces: Sequence[bytes], **options: Any
) -> bytes:
    """What is found in output that comes piece by piece."""
    found: list[bytes] = []

    async def wait() -> None:
        found.append(await console.expect(pattern, **options))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        for piece in pieces:
            await anyio.wait_all_tasks_blocked()
            console.on_transmit(piece)
    return found[0]


@pytest.mark.parametrize(
    "pattern", [rb"\w+ login: ", rb"(a|aa)+$x", rb"^(([a-z])+.)+[A-Z]([a-z])+$", rb"(a*)*[^a]\1 login: "]
)
async def test_a_pattern_that_backtracks_does_not_hold_the_loop(pattern: bytes) -> None:
    console = SerialConsole(lambda data: 0)
    console.on_transmit(b"a" * (64 << 10))
    with pytest.raises((TimeoutError, ConfigError), match=r"within|backtracks"):
        await console.expect(re.compile(pattern), timeout=0.2)
    assert len(await console.read(1 << 20)) == 64 << 10


async def test_a_pattern_that_backtracks_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ON_THREAD_SECONDS", 0.05)
    console = SerialConsole(lambda data: 0)
    console.on_transmit(b"a" * 8000)
    with pytest.raises(ConfigError, match="backtracks: it takes more than"):
        await console.expect(re.compile(rb"(a|aa)+$x"))
    assert len(await console.read()) == 8000


async def test_patterns_that_backtrack_leave_the_program_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may run for seconds, also when nobody waits for it any more."""
    monkeypatch.setattr(module, "ON_THREAD_SECONDS", 0.1)
    threads = anyio.to_thread.current_default_thread_limiter()
    consoles, ended, most = 2 * module.THREADS_MAX, 0, 0

    async def wait() -> None:
        nonlocal ended
        console = SerialConsole(lambda data: 0)
        console.on_transmit(b"a" * 8000)
        with pytest.raises(ConfigError, match="backtracks"):
            await console.expect(re.compile(rb"(a|aa)+$x"))
        ended += 1

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(consoles):
                tasks.start_soon(wait)
            while ended < consoles:
                most = max(most, int(threads.borrowed_tokens))
                await anyio.lowlevel.checkpoint()
    assert most == 0


async def test_output_is_searched_once() -> None:
    """A megabyte in small pieces: each search is of what is new, and of the overlap."""
    console = SerialConsole(lambda data: 0)
    pieces = [b"nothing of interest here; " * 40] * 1000
    began = time.thread_time()
    assert await printing(console, re.compile(rb"(?i)LOGIN: $"), [*pieces, b"login: "], timeout=LIMIT_S)
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("cut", [1, 3, 100, 4095, 4096, 4097, 8192, 10_000])
async def test_a_match_is_found_however_the_output_is_cut(cut: int) -> None:
    text = b"x" * 9000 + b"b=123456 " + b"y" * 9000 + b"END"
    console = SerialConsole(lambda data: 0)
    pieces = (
        [text[at : at + cut] for at in range(0, len(text), cut)] if cut > 50 else [text[:cut], text[cut:]]
    )
    found = await printing(console, re.compile(rb"b=(\d+) y"), pieces, timeout=LIMIT_S)
    assert found == text[:9010]


async def test_all_at_once_is_found_as_a_whole_would_be() -> None:
    """The longest of a match that crosses the pieces that are searched; anchors are of the whole output."""
    for before in (4090, 8185, 12_280):
        console = SerialConsole(lambda data: 0)
        console.on_transmit(b"-" * before + b"1" * 3000 + b" rest " * 3000)
        assert await console.expect(re.compile(rb"\d+"), timeout=LIMIT_S) == b"-" * before + b"1" * 3000
    console = SerialConsole(lambda data: 0)
    console.on_transmit(b"first\n" + b"z" * 3000 + b"\n" + b"first" * 2000)
    with pytest.raises(TimeoutError):
        await console.expect(re.compile(rb"^z"), timeout=0.01)
    assert (await console.expect(re.compile(rb"(?<=\n)z+\n"), timeout=LIMIT_S)).endswith(b"z\n")


async def test_how_much_is_searched_again_is_the_callers_choice() -> None:
    pieces = [b"BEGIN", *[b"." * 1000] * 20, b"END"]
    pattern = re.compile(rb"(?s)BEGIN.*END")
    found = await printing(SerialConsole(lambda data: 0), pattern, pieces, overlap=64 << 10, timeout=LIMIT_S)
    assert found == b"".join(pieces)
    with pytest.raises(ConfigError, match="overlap is 0"):
        await SerialConsole(lambda data: 0).expect(pattern, overlap=0)


async def test_a_match_outlives_output_that_is_dropped() -> None:
    console = SerialConsole(lambda data: 0)
    pieces = [b"." * (OUTPUT_LIMIT // 4)] * 9 + [b"ready\n", b"more"]
    found = await printing(console, re.compile(rb"r\w+\n"), pieces, timeout=LIMIT_S)
    assert found.endswith(b"..ready\n")
    assert len(found) <= OUTPUT_LIMIT
    assert console.dropped + len(found) + 4 == sum(map(len, pieces))
