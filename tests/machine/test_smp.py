"""Machines with several vCPUs: all but the first wait for their start-up interrupt, and come when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.lowlevel
import pytest

from aiokvm import Exit, ExitReason, VcpuState
from aiokvm.kvm import MpState

if TYPE_CHECKING:
    from aiokvm import VM
    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

CALLS_ALL = bytes.fromhex(
    "bb 00 00 e0 fe"  # mov ebx, 0xfee00000: the local APIC
    "c7 83 f0 00 00 00 ff 01 00 00"  # mov dword [ebx + 0xf0], 0x1ff: SVR, enabled
    "c7 83 00 03 00 00 00 45 0c 00"  # mov dword [ebx + 0x300], 0xc4500: INIT to all others
    "c7 83 00 03 00 00 03 46 0c 00"  # mov dword [ebx + 0x300], 0xc4603: SIPI, to 0x3000
    "f4"  # hlt
).ljust(0x2000, b"\0") + bytes.fromhex(
    "31 c0"  # 0x3000, in real mode: xor ax, ax
    "8e d8"  # mov ds, ax
    "66 b8 01 00 00 00"  # mov eax, 1
    "0f a2"  # cpuid
    "66 c1 eb 18"  # shr ebx, 24: the APIC id
    "c6 87 00 60 01"  # mov byte [bx + 0x6000], 1
    "f0 fe 06 00 50"  # lock inc byte [0x5000]
    "fa"  # cli
    "f4"  # hlt
)
SPIN = b"\xeb\xfe"


async def until_called(vm: VM, count: int) -> None:
    while vm.memory.read(0x5000, 1)[0] < count:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
async def test_the_others_come_when_they_are_called(guest: Guest, cpus: int) -> None:
    async with guest(CALLS_ALL, mode="protected", cpus=cpus) as vm:
        assert len({vcpu.tid for vcpu in vm.vcpus}) == cpus
        await until_called(vm, cpus - 1)
        assert vm.memory.read(0x6000, 10) == bytes([0, *[1] * (cpus - 1)]).ljust(10, b"\0")
        await vm.pause()
        assert [vcpu.state for vcpu in vm.vcpus] == [VcpuState.PAUSED] * cpus
        # A reset sends them back, and they come once more.
        vm.memory.fill(0x5000, 0x2000)
        await vm.reset()
        states = [vcpu.kvm_vcpu.get_mp_state() for vcpu in vm.vcpus]
        assert states == [MpState.KVM_MP_STATE_RUNNABLE, *[MpState.KVM_MP_STATE_UNINITIALIZED] * (cpus - 1)]
        await vm.resume()
        await until_called(vm, cpus - 1)


@pytest.mark.parametrize("cpus", [2, 4, 8])
async def test_those_that_wait_can_be_paused_reset_and_stopped(guest: Guest, cpus: int) -> None:
    async with guest(SPIN, cpus=cpus) as vm:
        for _ in range(3):
            await vm.pause()
            states = [vcpu.kvm_vcpu.get_mp_state() for vcpu in vm.vcpus[1:]]
            assert states == [MpState.KVM_MP_STATE_UNINITIALIZED] * (cpus - 1)
            await vm.resume()
        await vm.reset()
        assert await vm.kill() == Exit(ExitReason.KILLED)


async def test_one_vcpu_ends_the_machine_for_all(guest: Guest) -> None:
    code = CALLS_ALL[:0x2000] + bytes.fromhex(
        "b0 09"  # mov al, 9
        "e6 f4"  # out 0xf4, al
        "f4"  # hlt
    )
    async with guest(code, mode="protected", cpus=4) as vm:
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=9)
        assert [vcpu.state for vcpu in vm.vcpus] == [VcpuState.STOPPED] * 4
