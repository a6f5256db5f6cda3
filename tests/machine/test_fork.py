"""What os.fork() in the host program does: the machine stays its parent's, whatever the child tries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aiokvm import VM, Exit, ExitReason, GuestMemoryError, StateError, VmState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

COUNT = bytes.fromhex(
    "fe 06 00 20"  # again: inc byte [0x2000]
    "eb fa"  # jmp again
)


def in_child(check: Callable[[], Awaitable[None]], backend: tuple[str, dict[str, Any]]) -> int:
    """The exit status of a child that awaits ``check`` in a loop of its own."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1

    def run() -> None:
        nonlocal status
        try:
            anyio.run(check, backend=backend[0], backend_options=backend[1])
            status = 0
        except BaseException:
            traceback.print_exc()

    # The parent's loop is this thread's, and stands where it was forked.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    os._exit(status)


async def refuses_all(vm: VM) -> None:
    calls: dict[VmState, list[Callable[[], Any]]] = {
        VmState.CREATED: [vm.start],
        VmState.RUNNING: [vm.pause, vm.reset, vm.stop],
        VmState.PAUSED: [vm.resume, vm.reset, vm.stop],
    }

    async def call(method: Callable[[], Any]) -> None:
        with anyio.fail_after(5):
            await method()

    for method in (*calls[vm.state], vm.kill, vm.wait, vm.aclose):
        with pytest.raises(StateError, match="a fork does not inherit it"):
            await call(method)
    with pytest.raises(StateError, match="a fork does not inherit it"):
        vm.power_button()
    for access in (lambda: vm.memory.read(0x1000, 1), lambda: vm.memory.write(0x1000, b"x")):
        with pytest.raises(GuestMemoryError, match="a fork does not inherit it"):
            access()
    for vcpu in vm.vcpus:
        with pytest.raises(StateError):
            vcpu.read_register("rip")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_childs_hands_are_off_a_running_machine(
    guest: Guest, anyio_backend: tuple[str, dict[str, Any]], progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(COUNT, cpus=2) as vm:
        assert in_child(lambda: refuses_all(vm), anyio_backend) == 0
        assert vm.state is VmState.RUNNING
        await progress(vm)
        await vm.pause()
        assert in_child(lambda: refuses_all(vm), anyio_backend) == 0
        await vm.reset()
        await vm.resume()
        await progress(vm)
        assert await vm.kill() == Exit(ExitReason.KILLED)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_childs_hands_are_off_a_machine_that_is_about_to_start(
    guest: Guest, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    # It ends by way of the loop, whose descriptors a child shares with its parent.
    code = bytes.fromhex(
        "b0 07"  # mov al, 7
        "e6 f4"  # out 0xf4, al
        "f4"  # hlt
    )
    async with guest(code, start=False) as vm:
        assert in_child(lambda: refuses_all(vm), anyio_backend) == 0
        assert vm.memory.read(0x1000, 5) == code
        await vm.start()
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=7)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_closed_machine_stays_closed_in_a_child(
    guest: Guest, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    async def is_closed() -> None:
        await vm.aclose()
        assert await vm.kill() == await vm.wait() == Exit(ExitReason.KILLED)
        with pytest.raises(StateError, match="is closed"):
            await vm.start()

    async with guest(COUNT) as vm:
        await vm.aclose()
        assert in_child(is_closed, anyio_backend) == 0


def test_a_child_that_ends_as_python_ends_frees_nothing_of_its_parents() -> None:
    """The interpreter of the child collects and finalizes all that it inherited."""
    script = """
import gc, os, weakref
from anyio.from_thread import start_blocking_portal
from aiokvm import VM, boot

async def create():
    vm = await VM.create(boot=boot.Flat(bytes.fromhex("fe060020 ebfa")), memory="2M", cpus=2)
    await vm.start()
    return vm

async def progress():
    seen = vm.memory.read(0x2000, 1)
    while vm.memory.read(0x2000, 1) == seen:
        pass

with start_blocking_portal() as portal:
    vm = portal.call(create)
    pid = os.fork()
    if pid == 0:
        del vm
        gc.collect()
        weakref.finalize._exitfunc()
        gc.collect()
        os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    portal.call(progress)
    portal.call(vm.pause)
    print(status, hex(portal.call(vm.vcpus[0].read_register, "rip") & ~7))
    portal.call(vm.aclose)
"""
    done = subprocess.run(
        # From Python 3.12 on it warns of what is tried here.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 0x1000\n", "")
