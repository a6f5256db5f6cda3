"""What follows when a guest resets its machine, and what its watchdogs are told after a pause."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import VM, ConfigError, Exit, ExitReason, KvmError, StateError, WasReset, boot, kvm
from aiokvm.logs import BURST
from aiokvm.machine import build, life

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

COUNT = bytes.fromhex("fe 06 00 20 eb fa")  # inc byte [0x2000]; jmp
# Marks RAM, tells on COM1 what was there before, and resets itself.
MARK = (
    "a0 00 30"  # mov al, [0x3000]
    "c6 06 00 30 5a"  # mov byte [0x3000], 0x5a
    "c6 06 40 10 a5"  # mov byte [0x1040], 0xa5: in the image
    "ba f8 03 ee"  # out 0x3f8, al
)
WAYS = {
    "keyboard controller": "b0 fe e6 64 f4",
    "ACPI reset register": "ba 08 06 b0 01 ee f4",
    "port 0xcf9": "ba f9 0c b0 06 ee f4",
    "port 0x92": "b0 01 e6 92 f4",
    "jump to the reset vector": "ea 00 00 ff ff",
}
UD2 = b"\x0f\x0b"


async def read(vm: VM, count: int) -> bytes:
    output = b""
    while len(output) < count:
        output += await vm.serial.read()
    return output


@pytest.mark.parametrize("way", WAYS)
async def test_a_guest_that_resets_itself_begins_anew_with_empty_ram(guest: Guest, way: str) -> None:
    code = bytes.fromhex(MARK + WAYS[way]).ljust(0x41, b"\0")
    async with guest(code, on_reset="reboot", start=False) as vm:
        events = vm.events()
        await vm.start()
        assert (await read(vm, 5))[:5] == bytes(5)
        await anext(events)
        assert await anext(events) == WasReset(vm.name, way)
        assert vm.exit is None


async def test_a_triple_fault_may_reboot_too(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    began = anyio.current_time()
    async with guest(UD2, mode="protected", on_reset="reboot", cpus=2, start=False) as vm:
        events = vm.events()
        await vm.start()
        await anext(events)
        for _ in range(15):
            event = await anext(events)
            assert isinstance(event, WasReset)
            assert event.cause.startswith("vCPU 0: triple fault; rip=0x1000 ")
        assert (await vm.kill()) == Exit(ExitReason.KILLED)
    # A guest may do so as often as it likes.
    assert 0 < len(caplog.records) <= BURST + 1 + (anyio.current_time() - began)


async def test_a_machine_that_reboots_can_be_paused_and_reset(guest: Guest) -> None:
    code = bytes.fromhex(MARK + WAYS["keyboard controller"])
    async with guest(code, on_reset="reboot") as vm:
        for _ in range(10):
            await vm.pause()
            await vm.reset()
            await vm.resume()
            await vm.reset()
        await vm.pause()
        assert vm.exit is None


async def test_nothing_is_executed_between_a_reset_and_the_new_beginning(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = anyio.Event(), anyio.Event()

    async def slow(*args: Any) -> boot.BootPlan:
        asked.set()
        await go_on.wait()
        return await plan(*args)

    plan = build.boot_plan
    code = bytes.fromhex(
        "ba f9 0c b0 06 ee"  # mov dx, 0xcf9; mov al, 6; out dx, al
        "b0 07 e6 f4"  # mov al, 7; out 0xf4, al
    )
    async with guest(code, on_reset="reboot", start=False) as vm:
        events = vm.events()
        monkeypatch.setattr(life, "boot_plan", slow)
        await vm.start()
        await asked.wait()
        await vm.pause()
        await vm.resume()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await vm.pause()
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert vm.exit is None
        go_on.set()
        while not isinstance(await anext(events), WasReset):
            pass
        assert vm.exit is None


async def test_what_can_no_longer_be_booted_ends_the_machine(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes.fromhex(WAYS["port 0x92"]))
    async with await VM.create(boot=boot.Flat(kernel), memory="2M", on_reset="reboot") as vm:
        kernel.unlink()
        await vm.start()
        with anyio.fail_after(30):
            end = await vm.wait()
    assert end.reason is ExitReason.ERROR
    assert end.detail.startswith("reset failed: ")
    assert "kernel" in end.detail


async def test_a_machine_can_be_closed_while_it_reboots(guest: Guest) -> None:
    for turns in range(8):
        async with guest(bytes.fromhex(WAYS["port 0xcf9"]), on_reset="reboot") as vm:
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
        with pytest.raises(StateError):
            await vm.reset()


async def test_what_on_reset_says_is_checked() -> None:
    wrong: Any = "restart"
    with pytest.raises(ConfigError, match="on_reset='restart': give 'exit' or 'reboot'"):
        await VM.create(boot=boot.Flat(UD2), memory="2M", on_reset=wrong)


# kvmclock.


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The vCPUs whose watchdogs are told."""
    vcpus: list[int] = []

    def kvmclock_ctrl(self: kvm.Vcpu) -> None:
        vcpus.append(self.id)
        raise KvmError("KVM_KVMCLOCK_CTRL", errno.EINVAL, "the guest uses no kvmclock")

    monkeypatch.setattr(kvm.Vcpu, "kvmclock_ctrl", kvmclock_ctrl)
    return vcpus


async def test_watchdogs_are_told_of_a_pause(
    guest: Guest, told: list[int], progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(COUNT, cpus=2) as vm:
        await progress(vm)
        assert told == []
        await vm.pause()
        assert told == []
        await vm.resume()
        assert told == [0, 1]
        await vm.reset()
        assert told == [0, 1, 0, 1]
        await progress(vm)


async def test_another_refusal_is_told(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def kvmclock_ctrl(self: kvm.Vcpu) -> None:
        raise KvmError("KVM_KVMCLOCK_CTRL", errno.EIO)

    async with guest(COUNT) as vm:
        await vm.pause()
        with monkeypatch.context() as patch:
            patch.setattr(kvm.Vcpu, "kvmclock_ctrl", kvmclock_ctrl)
            with pytest.raises(KvmError, match="KVM_KVMCLOCK_CTRL"):
                await vm.resume()
