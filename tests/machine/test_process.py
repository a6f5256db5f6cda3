"""Threads of vCPUs are threads like others, and a process with a machine is one like others."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.lowlevel
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.kvm]

SPIN = b"\xeb\xfe"
SYS_TGKILL = 234

# Says the vCPU's thread, then for each line that it is sent what the guest has counted.
PROGRAM = """
import sys
import anyio
from aiokvm import VM, boot

COUNT = bytes.fromhex("ff 06 00 20 eb fa")  # again: inc word [0x2000]; jmp again

async def main():
    async with await VM.create(boot=boot.Flat(COUNT), memory="2M") as vm:
        await vm.start()
        print(vm.vcpus[0].tid, flush=True)
        while await anyio.to_thread.run_sync(sys.stdin.readline):
            seen = vm.memory.read(0x2000, 2)
            while vm.memory.read(0x2000, 2) == seen:
                await anyio.sleep(0)
            print("counts", flush=True)
    print(vm.exit.reason.value, flush=True)

anyio.run(main)
"""

# A machine's whole life, as most programs write it. The guest says hi, and then 42 to the debug exit.
PLAIN = """
import asyncio, sys
from aiokvm import VM, boot

HI = bytes.fromhex("ba f8 03 b0 68 ee b0 69 ee ba f4 00 b0 2a ee f4")

async def main():
    async with await VM.create(boot=boot.Flat(HI), memory="2M") as vm:
        await vm.start()
        await vm.serial.expect(b"hi", timeout=30)
        print((await vm.wait()).code)

asyncio.run(main())
print(*sys.modules)
"""

# What a service does to end its machines at a signal.
CLEAN = """
import signal
import anyio
from aiokvm import VM, boot

async def ending(scope, *, task_status):
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()

async def main():
    async with anyio.create_task_group() as tasks:
        await tasks.start(ending, tasks.cancel_scope)
        async with await VM.create(boot=boot.Flat(bytes.fromhex("ebfe")), memory="2M") as vm:
            await vm.start()
            print(vm.vcpus[0].tid, flush=True)
            await vm.wait()
    print(vm.state.value, vm.exit.reason.value, flush=True)

anyio.run(main, backend=BACKEND)
"""


@contextmanager
def process(script: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with a machine, and the id of its vCPU's thread."""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout
            yield child, int(child.stdout.readline())
        finally:
            child.kill()


def ask(child: subprocess.Popen[str]) -> str:
    assert child.stdin
    assert child.stdout
    child.stdin.write("?\n")
    child.stdin.flush()
    return child.stdout.readline()


def stat(pid: int | str, tid: int) -> list[str]:
    """Fields of /proc/PID/task/TID/stat from the third, the state, on (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()


@pytest.mark.anyio
async def test_nice_works_on_a_vcpu(guest: Guest) -> None:
    async with guest(SPIN, cpus=2) as vm:
        tid, other = (vcpu.tid for vcpu in vm.vcpus)
        mine = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, tid, 7)
        assert os.getpriority(os.PRIO_PROCESS, tid) == 7
        assert stat("self", tid)[16] == "7"
        assert os.getpriority(os.PRIO_PROCESS, other) == mine
        assert os.getpriority(os.PRIO_PROCESS, 0) == mine


@pytest.mark.anyio
async def test_taskset_works_on_a_vcpu(guest: Guest) -> None:
    async with guest(SPIN) as vm:
        tid = vm.vcpus[0].tid
        mine = os.sched_getaffinity(0)
        for cpu in mine:
            os.sched_setaffinity(tid, {cpu})
            assert os.sched_getaffinity(tid) == {cpu}
            while stat("self", tid)[36] != str(cpu):  # the CPU that it ran on last
                await anyio.lowlevel.checkpoint()
        assert os.sched_getaffinity(0) == mine
        # It goes on, and can be kicked, wherever it runs.
        await vm.pause()
        await vm.resume()


@pytest.mark.parametrize("target", ["process", "vCPU"])
def test_stop_and_continue(target: str) -> None:
    with process(PROGRAM) as (child, tid):
        assert ask(child) == "counts\n"
        victim = child.pid if target == "process" else tid
        os.kill(victim, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        for task in os.listdir(f"/proc/{child.pid}/task"):
            while stat(child.pid, int(task))[0] != "T":
                pass
        used = stat(child.pid, tid)[11:13]
        assert stat(child.pid, tid)[11:13] == used
        os.kill(victim, signal.SIGCONT)
        assert ask(child) == "counts\n"
        assert child.stdin
        child.stdin.close()
        assert child.wait() == 0


@pytest.mark.parametrize("target", ["process", "vCPU"])
def test_a_sigterm_that_nobody_handles_ends_the_process(target: str) -> None:
    with process(PROGRAM) as (child, tid):
        os.kill(child.pid if target == "process" else tid, signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
        assert not Path(f"/proc/{tid}").exists()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("target", ["process", "vCPU"])
def test_a_sigterm_that_is_handled_ends_the_machine(backend: str, target: str) -> None:
    with process(CLEAN.replace("BACKEND", repr(backend))) as (child, tid):
        os.kill(child.pid if target == "process" else tid, signal.SIGTERM)
        assert child.stdout
        assert child.stdout.read() == "closed killed\n"
        assert child.wait() == 0


def test_a_signal_for_the_thread_alone_is_left_pending() -> None:
    """Only tgkill(2) can send one; the signals of the program are for the program's threads."""
    with process(PROGRAM) as (child, tid):
        assert ctypes.CDLL(None, use_errno=True).syscall(SYS_TGKILL, child.pid, tid, signal.SIGTERM) == 0
        assert ask(child) == "counts\n"
        status = Path(f"/proc/{child.pid}/task/{tid}/status").read_text()
        pending = next(line for line in status.splitlines() if line.startswith("SigPnd:"))
        assert int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1
        assert child.stdin
        child.stdin.close()
        assert child.wait() == 0


DAEMON = """
import sys, threading, anyio
from aiokvm import VM, Device, block, boot, net
up = threading.Event()

class Slow(Device):
    async def run(self):
        await anyio.sleep_forever()
    async def read(self, offset, size):
        await anyio.sleep(0.001)
        return 1

async def main():
    options = dict(disks=[block.Raw(sys.argv[2])], console=True, rng=True, balloon=True,
                   nets=[net.Nic(net.Port(), dataplane="thread"), net.Port()],
                   devices=[Slow().at(pio=0x300)]) if sys.argv[3] == "all" else {}
    image = boot.Flat(bytes.fromhex("ba 00 03 ec eb fd"))
    async with await VM.create(boot=image, memory="2M", cpus=2, **options) as vm:
        await vm.start()
        up.set()
        await vm.wait()

name = sys.argv[1]
options = {"use_uvloop": True} if name == "uvloop" else {}
backend = "trio" if name == "trio" else "asyncio"
loop = threading.Thread(target=lambda: anyio.run(main, backend=backend, backend_options=options), daemon=True)
loop.start()
assert up.wait(20)
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("what", ["vcpus", "all"])
def test_a_loop_in_a_daemon_thread_ends_silently_with_the_program(
    tmp_path: Path, loop: str, what: str
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    argv = [sys.executable, "-c", DAEMON, loop, str(disk), what]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Its loop is given up with the machine in it.
GIVEN_UP = """
import asyncio, sys, threading
from aiokvm import VM, boot
up = threading.Event()

async def main():
    async with await VM.create(boot=boot.Flat(bytes.fromhex("eb fe")), memory="2M") as vm:
        await vm.start()
        up.set()
        await vm.wait()

async def until_up():
    task = asyncio.ensure_future(main())
    await asyncio.to_thread(up.wait, 20)

if sys.argv[1] == "uvloop":
    import uvloop
    loop = uvloop.new_event_loop()
else:
    loop = asyncio.new_event_loop()
if sys.argv[2] == "here":
    loop.run_until_complete(until_up())
else:
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(main(), loop)
    assert up.wait(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_a_loop_that_is_given_up_leaves_no_traceback(loop: str, where: str) -> None:
    argv = [sys.executable, "-c", GIVEN_UP, loop, where]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    for line in done.stderr.splitlines():
        # What asyncio may say of the program's own task.
        assert line == "Task was destroyed but it is pending!" or "coro=<main() " in line, done.stderr


def test_a_plain_machine_loads_no_more_than_it_needs() -> None:
    result = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, check=True)
    code, *modules = result.stdout.split()
    assert code == "42"
    # Loading anyio takes longer than creating a machine; the others stand for what this one has none of.
    assert not {"anyio", "sniffio", "typing_extensions", "regex"} & set(modules)
    parts = ("block", "net", "virtio", "images", "lab", "cli", "machine.disks", "machine.nets")
    assert not {f"aiokvm.{part}" for part in (*parts, "kvm.caps", "kvm.run_state")} & set(modules)
