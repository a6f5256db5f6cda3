"""A vCPU's thread as the host sees it, and the C core when the loop is not there."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest

from aiokvm import AiokvmError, StateError, VcpuState, boot
from aiokvm._core import ffi, lib
from aiokvm.boot.plan import GuestInfo
from aiokvm.machine.config import Config
from aiokvm.machine.hardware import Hardware
from aiokvm.machine.vcpu import VirtualCpu, thread_name
from aiokvm.memory import ram_ranges

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.machine.conftest import Guest

pytestmark = pytest.mark.kvm

COUNT = bytes.fromhex(
    "fe 06 00 20"  # again: inc byte [0x2000]
    "eb fa"  # jmp again
)


@pytest.mark.parametrize(
    ("machine", "index", "name"),
    [
        ("web", 0, "web:0"),
        ("a-very-long-name", 3, "a-very-long-n:3"),
        ("a-very-long-name", 123, "a-very-long:123"),
        ("machine-ä-ä-ä", 0, "machine-ä-ä:0"),
        ("ääääääää", 0, "ääääää:0"),
    ],
)
def test_a_threads_name_keeps_the_index(machine: str, index: int, name: str) -> None:
    assert thread_name(machine, index) == name
    assert len(name.encode()) <= 15


@pytest.mark.anyio
async def test_the_threads_are_there_and_named_while_the_machine_runs(
    guest: Guest, resources: Callable[[], Any]
) -> None:
    async with guest(COUNT, cpus=2, name="a-very-long-name", start=False) as vm:
        assert [vcpu.tid for vcpu in vm.vcpus] == [0, 0]
        await vm.start()
        for index, vcpu in enumerate(vm.vcpus):
            task = Path(f"/proc/self/task/{vcpu.tid}")
            assert (task / "comm").read_text() == f"a-very-long-n:{index}\n"
        assert resources()["threads"] == ["a-very-long-n:0", "a-very-long-n:1"]
        await vm.kill()
        assert [vcpu.tid for vcpu in vm.vcpus] == [0, 0]
        assert resources()["threads"] == []


def blocked_signals(tid: int) -> set[int]:
    for line in Path(f"/proc/self/task/{tid}/status").read_text().splitlines():
        if line.startswith("SigBlk:"):
            mask = int(line.split()[1], 16)
            return {number for number in range(1, 65) if mask >> (number - 1) & 1}
    raise AssertionError("no SigBlk")


@pytest.mark.anyio
async def test_a_thread_blocks_all_signals_but_the_kick(guest: Guest) -> None:
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    async with guest(COUNT) as vm:
        # No thread can block these two, and glibc keeps 32 and 33 for itself.
        open_ = (
            set(range(1, 65)) - blocked_signals(vm.vcpus[0].tid) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}
        )
        (kick,) = open_
        assert signal.SIGRTMIN <= kick <= signal.SIGRTMAX
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mine


@pytest.mark.anyio
async def test_affinity_and_priority_of_a_thread_can_be_set(
    guest: Guest, progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(COUNT) as vm:
        tid = vm.vcpus[0].tid
        (cpu, *_) = os.sched_getaffinity(0)
        os.sched_setaffinity(tid, {cpu})
        os.setpriority(os.PRIO_PROCESS, tid, 5)
        await progress(vm)
        assert os.sched_getaffinity(tid) == {cpu}
        assert os.getpriority(os.PRIO_PROCESS, tid) == 5
        assert os.getpriority(os.PRIO_PROCESS, 0) != 5


@pytest.mark.anyio
async def test_a_signal_to_the_process_reaches_pythons_handler(
    guest: Guest, progress: Callable[..., Awaitable[None]]
) -> None:
    seen: list[tuple[int, int]] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append((number, threading.get_native_id())))
    try:
        async with guest(COUNT, cpus=2) as vm:
            for count in range(1, 21):
                os.kill(os.getpid(), signal.SIGTERM)
                while len(seen) < count:
                    await anyio.lowlevel.checkpoint()
            await progress(vm)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [(signal.SIGTERM, threading.get_native_id())] * 20


@pytest.mark.anyio
async def test_a_kick_signal_from_elsewhere_does_no_harm(
    guest: Guest, progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(COUNT) as vm:
        tid = vm.vcpus[0].tid
        kicks = set(range(1, 65)) - blocked_signals(tid) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}
        for _ in range(50):
            for kick in kicks:
                os.kill(tid, kick)
            await progress(vm)
        assert vm.vcpus[0].state is VcpuState.RUNNING


def test_the_process_can_be_stopped_continued_and_terminated() -> None:
    script = """
import asyncio, sys
from aiokvm import VM, boot

async def main():
    code = bytes.fromhex("fe060020 ebfa")
    async with await VM.create(boot=boot.Flat(code), memory="2M", cpus=2) as vm:
        await vm.start()
        for _ in sys.stdin:
            seen = vm.memory.read(0x2000, 1)
            while vm.memory.read(0x2000, 1) == seen:
                await asyncio.sleep(0)
            print("runs", flush=True)

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin
        assert child.stdout
        try:
            for _ in range(3):
                child.stdin.write("?\n")
                child.stdin.flush()
                assert child.stdout.readline() == "runs\n"
                child.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, child.pid, os.WSTOPPED)
                child.send_signal(signal.SIGCONT)
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=10) == -signal.SIGTERM
        finally:
            child.kill()


# The core alone: what it does while no loop takes its exits.


class Core:
    """A machine of the C core with vCPUs, whose doorbell only the test answers."""

    def __init__(self, stack: ExitStack, code: bytes, mode: str) -> None:
        flat = boot.Flat(code, mode=mode)  # type: ignore[arg-type]
        config = Config(boot=flat, memory_bytes=2 << 20)
        self.hardware = Hardware(config)
        stack.callback(self.hardware.close)
        plan = flat.plan({}, GuestInfo(ram=ram_ranges(config.memory_bytes)))
        for segment in plan.segments:
            self.hardware.memory.write(segment.gpa, segment.data)
        self.hardware.set_cpu_state(plan.cpu)
        self.turn = lib.aiokvm_turn_new(ffi.new("int *"))
        stack.callback(lib.aiokvm_turn_free, self.turn)
        self.core = lib.aiokvm_machine_new(self.turn, 0, ffi.new("int *"))
        stack.callback(lib.aiokvm_machine_free, self.core)
        self.vcpu = VirtualCpu(self.core, self.hardware.vcpus[0], 0, "core")
        stack.callback(self.vcpu.close)
        stack.callback(self.stop)
        self.news = ffi.new("struct aiokvm_news[]", 8)

    def claim(self, bus: int, base: int) -> None:
        region = {"base": base, "size": 8, "id": 7}
        assert lib.aiokvm_machine_publish(self.core, bus, ffi.new("struct aiokvm_region[]", [region]), 1) == 0

    def take(self, state: int) -> Any:
        """The next news of that kind; a thread's first are that it is parked, for it was not told to run."""
        while True:
            ready, _, _ = select.select([lib.aiokvm_turn_doorbell(self.turn)], [], [], 10)
            assert ready, "the doorbell has not been rung"
            for i in range(self.take_what_is_there()):
                if self.news[i].state == state:
                    return self.news[i]

    def take_what_is_there(self) -> int:
        """As a loop that does not poll."""
        assert lib.aiokvm_turn_answer(self.turn) == 0
        count = lib.aiokvm_serve(self.turn, 0, self.news, 8, ffi.new("uint32_t *"))
        assert lib.aiokvm_turn_unwatch(self.turn) == 0
        return max(count, 0)

    def stats(self) -> Any:
        stats = ffi.new("struct aiokvm_vcpu_stats *")
        lib.aiokvm_vcpu_stats(self.vcpu.core, stats)
        return stats

    def stop(self) -> None:
        if self.vcpu.tid:
            lib.aiokvm_vcpu_stop(self.vcpu.core)
            self.take(lib.AIOKVM_VCPU_STOPPED)
            self.vcpu.on_stopped()


@pytest.fixture
def core() -> Iterator[Callable[..., Core]]:
    with ExitStack() as stack:
        yield lambda code, mode="real": Core(stack, code, mode)


READS_PORT = bytes.fromhex(
    "ba 00 03"  # mov dx, 0x300
    "ec"  # in al, dx
    "a2 00 20"  # mov [0x2000], al
    "eb fe"  # jmp .
)
READS_MEMORY = bytes.fromhex(
    "a0 00 00 00 d0"  # mov al, [0xd0000000]
    "a2 00 20 00 00"  # mov [0x2000], al
    "eb fe"  # jmp .
)
ASKS = [
    pytest.param(READS_PORT, "real", lib.AIOKVM_BUS_PIO, 0x300, id="pio"),
    pytest.param(READS_MEMORY, "protected", lib.AIOKVM_BUS_MMIO, 0xD000_0000, id="mmio"),
]


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize(("code", "mode", "bus", "base"), ASKS)
def test_a_vcpu_stops_that_waits_for_a_reply_which_never_comes(
    core: Callable[..., Core], code: bytes, mode: str, bus: int, base: int, taken: bool
) -> None:
    machine = core(code, mode)
    machine.claim(bus, base)
    machine.vcpu.start()
    machine.vcpu.resume()
    if taken:
        machine.take(lib.AIOKVM_VCPU_EXIT)
    while machine.stats().exits == 0:
        pass
    machine.stop()
    assert machine.vcpu.tid == 0
    assert machine.vcpu.state is VcpuState.STOPPED


@pytest.mark.parametrize(("code", "mode", "bus", "base"), ASKS)
def test_a_vcpu_parks_as_soon_as_its_exit_is_answered(
    core: Callable[..., Core], code: bytes, mode: str, bus: int, base: int
) -> None:
    machine = core(code, mode)
    machine.claim(bus, base)
    machine.vcpu.start()
    machine.vcpu.resume()
    exit_ = machine.take(lib.AIOKVM_VCPU_EXIT)
    assert (exit_.region, exit_.offset, exit_.size, exit_.count, exit_.is_write) == (7, 0, 1, 1, 0)
    machine.vcpu.pause()
    assert machine.take_what_is_there() == 0
    assert lib.aiokvm_vcpu_reply(machine.vcpu.core, exit_.seq, 0x5A) == 1
    machine.take(lib.AIOKVM_VCPU_PARKED)
    machine.vcpu.on_parked()
    # The access is complete, and nothing that comes after it has begun.
    assert machine.vcpu.read_register("rax") == 0x5A
    assert machine.vcpu.read_register("rip") == (0x1004 if mode == "real" else 0x1005)
    assert machine.hardware.memory.read(0x2000, 1) == b"\0"
    machine.stop()


def test_a_late_or_double_reply_is_for_nobody(core: Callable[..., Core]) -> None:
    machine = core(READS_PORT)
    machine.claim(lib.AIOKVM_BUS_PIO, 0x300)
    machine.vcpu.start()
    machine.vcpu.resume()
    seq = machine.take(lib.AIOKVM_VCPU_EXIT).seq
    assert lib.aiokvm_vcpu_reply(machine.vcpu.core, seq - 1, 1) == 0
    assert lib.aiokvm_vcpu_reply(machine.vcpu.core, seq, 2) == 1
    assert lib.aiokvm_vcpu_reply(machine.vcpu.core, seq, 3) == 0
    while machine.hardware.memory.read(0x2000, 1) == b"\0":
        pass
    assert machine.hardware.memory.read(0x2000, 1) == b"\2"
    machine.stop()
    assert lib.aiokvm_vcpu_reply(machine.vcpu.core, seq, 4) == 0


def test_every_pause_is_answered_also_after_one_that_was_withdrawn(core: Callable[..., Core]) -> None:
    machine = core(COUNT)
    machine.vcpu.start()
    machine.vcpu.resume()
    for _ in range(50):
        machine.vcpu.pause()
        machine.vcpu.resume()
        machine.vcpu.pause()
        machine.take(lib.AIOKVM_VCPU_PARKED)
        machine.vcpu.on_parked()
        assert machine.vcpu.read_register("rip") in (0x1000, 0x1004)
        machine.vcpu.resume()
    machine.stop()


def test_the_core_is_safe_in_any_order(core: Callable[..., Core]) -> None:
    machine = core(COUNT)
    vcpu = machine.vcpu
    assert lib.aiokvm_vcpu_join(vcpu.core) == 0
    assert lib.aiokvm_vcpu_kick(vcpu.core) == 0
    assert lib.aiokvm_vcpu_reply(vcpu.core, 0, 0) == 0
    vcpu.start()
    with pytest.raises(AiokvmError, match=r"see RLIMIT_NPROC .*already in progress"):
        vcpu.start()
    assert lib.aiokvm_vcpu_join(vcpu.core) < 0
    vcpu.pause()
    vcpu.pause()
    vcpu.resume()
    vcpu.stop()
    vcpu.stop()
    machine.take(lib.AIOKVM_VCPU_STOPPED)
    vcpu.on_stopped()
    vcpu.on_stopped()


@pytest.mark.parametrize(
    "regions",
    [
        pytest.param([(8, 8), (0, 8)], id="unsorted"),
        pytest.param([(0, 8), (7, 8)], id="overlapping"),
        pytest.param([(0, 0x10), (0, 8)], id="same base"),
    ],
)
def test_a_table_that_a_look_up_could_not_search_is_refused(
    core: Callable[..., Core], regions: list[tuple[int, int]]
) -> None:
    machine = core(COUNT)
    table = ffi.new(
        "struct aiokvm_region[]",
        [{"base": base, "size": size, "id": i} for i, (base, size) in enumerate(regions)],
    )
    assert lib.aiokvm_machine_publish(machine.core, lib.AIOKVM_BUS_PIO, table, len(regions)) == -22
    assert lib.aiokvm_machine_publish(machine.core, 2, table, 1) == -22


def test_stats_count_what_a_vcpu_did(core: Callable[..., Core]) -> None:
    code = bytes.fromhex(
        "b9 05 00"  # mov cx, 5
        "e4 e0"  # again: in al, 0xe0: nothing is there
        "e2 fc"  # loop again
        "c6 06 00 20 01"  # mov byte [0x2000], 1
        "eb fe"  # jmp .
    )
    machine = core(code)
    machine.vcpu.start()
    machine.vcpu.resume()
    while machine.hardware.memory.read(0x2000, 1) == b"\0":
        pass
    machine.stop()
    stats = machine.stats()
    assert (stats.exits, stats.unclaimed) == (5, 5)
    assert stats.kicks >= 1


def test_nothing_is_done_with_a_vcpu_that_is_closed_or_cannot_be(core: Callable[..., Core]) -> None:
    machine = core(READS_PORT)
    machine.claim(lib.AIOKVM_BUS_PIO, 0x300)
    vcpu = machine.vcpu
    vcpu.start()
    vcpu.resume()
    with pytest.raises(StateError, match="vCPU 0 has a thread that runs"):
        vcpu.close()
    machine.stop()
    vcpu.close()
    vcpu.close()
    for work in (vcpu.start, vcpu.resume, vcpu.pause, vcpu.kick, vcpu.stop, vcpu.on_stopped, vcpu.stats):
        with pytest.raises(StateError, match="vCPU 0 is closed"):
            work()
