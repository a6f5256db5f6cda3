"""Every way in which a machine ends, and what its exit tells."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from aiokvm import Exit, ExitReason, VcpuState, VmState
from aiokvm.kvm import KvmExit
from aiokvm.kvm.constants import KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN

if TYPE_CHECKING:
    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

HALT = b"\xfa\xf4"
SPIN = b"\xeb\xfe"
SHUTDOWN = bytes.fromhex(
    "ba 04 06"  # mov dx, 0x604
    "b8 00 34"  # mov ax, SLP_EN | 5 << 10
    "ef"  # out dx, ax
    "eb fe"  # jmp .
)
UD2 = b"\x0f\x0b"
EXEC_FROM_NOWHERE = bytes.fromhex(
    "b8 00 00 00 d0"  # mov eax, 0xd0000000: neither RAM nor a device
    "ff e0"  # jmp eax
)


@pytest.mark.parametrize(
    ("code", "mode", "expected"),
    [
        pytest.param(SHUTDOWN, "real", Exit(ExitReason.SHUTDOWN), id="S5"),
        pytest.param(
            bytes.fromhex(
                "b0 fe"  # mov al, 0xfe: pulse the reset line
                "e6 64"  # out 0x64, al
                "eb fe"  # jmp .
            ),
            "real",
            Exit(ExitReason.RESET, detail="keyboard controller"),
            id="i8042",
        ),
        pytest.param(
            bytes.fromhex(
                "ba 08 06"  # mov dx, 0x608
                "b0 01"  # mov al, 1
                "ee"  # out dx, al
                "eb fe"  # jmp .
            ),
            "real",
            Exit(ExitReason.RESET, detail="ACPI reset register"),
            id="ACPI reset register",
        ),
        pytest.param(
            bytes.fromhex(
                "ba f9 0c"  # mov dx, 0xcf9
                "b0 02"  # mov al, 2: a hard one, to come
                "ee"  # out dx, al
                "b0 06"  # mov al, 6
                "ee"  # out dx, al
                "f4"  # hlt
            ),
            "real",
            Exit(ExitReason.RESET, detail="port 0xcf9"),
            id="reset control register",
        ),
        pytest.param(
            bytes.fromhex(
                "b0 01"  # mov al, 1
                "e6 92"  # out 0x92, al
                "f4"  # hlt
            ),
            "real",
            Exit(ExitReason.RESET, detail="port 0x92"),
            id="system control port A",
        ),
        pytest.param(
            bytes.fromhex("ea 00 00 ff ff"),  # jmp 0xffff:0
            "real",
            Exit(ExitReason.RESET, detail="jump to the reset vector"),
            id="reset vector, ffff:0",
        ),
        pytest.param(
            bytes.fromhex("ea f0 ff 00 f0"),  # jmp 0xf000:0xfff0
            "real",
            Exit(ExitReason.RESET, detail="jump to the reset vector"),
            id="reset vector, f000:fff0",
        ),
        pytest.param(
            bytes.fromhex(
                "b8 f0 ff 0f 00"  # mov eax, 0xffff0
                "ff e0"  # jmp rax
            ),
            "long",
            Exit(ExitReason.RESET, detail="jump to the reset vector"),
            id="reset vector, 64 bits",
        ),
        pytest.param(
            bytes.fromhex(
                "b8 f0 ff ff ff"  # mov eax, 0xfffffff0
                "ff e0"  # jmp eax
            ),
            "protected",
            Exit(ExitReason.RESET, detail="vCPU 0: jump to the reset vector"),
            id="reset vector, below 4 GiB",
        ),
        pytest.param(
            bytes.fromhex(
                "bb 00 03 e0 fe"  # mov ebx, 0xfee00300: ICR
                "c7 03 00 45 04 00"  # mov dword [ebx], INIT to itself
                "eb fe"  # jmp .
            ),
            "protected",
            Exit(ExitReason.RESET, detail="vCPU 0: jump to the reset vector"),
            id="INIT",
        ),
        pytest.param(
            bytes.fromhex(
                "b0 00"  # mov al, 0
                "e6 f4"  # out 0xf4, al
                "eb fe"  # jmp .
            ),
            "real",
            Exit(ExitReason.DEBUG_EXIT, code=0),
            id="debug exit 0",
        ),
        pytest.param(
            bytes.fromhex(
                "b8 fe ca"  # mov ax, 0xcafe
                "e7 f4"  # out 0xf4, ax
                "eb fe"  # jmp .
            ),
            "real",
            Exit(ExitReason.DEBUG_EXIT, code=0xCAFE),
            id="debug exit, 16 bits",
        ),
        pytest.param(
            bytes.fromhex(
                "b8 ef be ad de"  # mov eax, 0xdeadbeef
                "e7 f4"  # out 0xf4, eax
                "eb fe"  # jmp .
            ),
            "long",
            Exit(ExitReason.DEBUG_EXIT, code=0xDEADBEEF),
            id="debug exit, 32 bits",
        ),
    ],
)
async def test_the_guest_ends_its_machine(guest: Guest, code: bytes, mode: str, expected: Exit) -> None:
    async with guest(code, mode=mode) as vm:
        assert await vm.wait() == expected
        assert vm.state is VmState.STOPPED
        # The first reason stands.
        assert await vm.kill() == expected
        assert await vm.stop() == expected
        assert [vcpu.state for vcpu in vm.vcpus] == [VcpuState.STOPPED]
    assert vm.exit == expected


@pytest.mark.parametrize("mode", ["protected", "long"])
async def test_a_triple_fault_is_a_reset_with_registers(
    guest: Guest, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with guest(UD2, mode=mode, name="sad") as vm:
        exit_ = await vm.wait()
    assert exit_.reason is ExitReason.RESET
    assert exit_.code is None
    if "; these are of a processor that was reset: " in exit_.detail:
        # With AMD-V KVM cannot tell those of before.
        assert exit_.detail.startswith("vCPU 0: triple fault; rip=0xfff0 ")
    else:
        assert exit_.detail.startswith("vCPU 0: triple fault; rip=0x1000 ")
        assert "code: 0f 0b" in exit_.detail
    assert [record.getMessage() for record in caplog.records] == [f"sad: {exit_.detail}"]


async def test_what_kvm_cannot_run_is_an_error_with_registers(guest: Guest) -> None:
    async with guest(EXEC_FROM_NOWHERE, mode="protected") as vm:
        exit_ = await vm.wait()
    assert exit_.reason is ExitReason.ERROR
    assert exit_.detail.startswith("vCPU 0: KVM internal error, suberror 1, data ")
    assert "; rip=0xd0000000 " in exit_.detail
    assert " rax=0xd0000000 " in exit_.detail


@pytest.mark.parametrize(
    ("reason", "error", "expected", "detail"),
    [
        (
            KvmExit.KVM_EXIT_HLT,
            errno.EFAULT,
            ExitReason.ERROR,
            "KVM_RUN failed: Bad address (errno 14); rip=",
        ),
        (KvmExit.KVM_EXIT_FAIL_ENTRY, 0, ExitReason.ERROR, "the CPU refused to enter the guest, reason 0x"),
        (KvmExit.KVM_EXIT_HLT, 0, ExitReason.ERROR, "exit_reason 5, which this machine has no use for; rip="),
        (999, 0, ExitReason.ERROR, "exit_reason 999, which this machine has no use for; rip="),
        (KvmExit.KVM_EXIT_SHUTDOWN, errno.EIO, ExitReason.ERROR, "KVM_RUN failed: Input/output error"),
        (KvmExit.KVM_EXIT_SHUTDOWN, 0, ExitReason.RESET, "triple fault; rip="),
    ],
)
async def test_exits_that_a_guest_cannot_be_made_to_cause(
    guest: Guest, reason: int, error: int, expected: ExitReason, detail: str
) -> None:
    async with guest(HALT, start=False) as vm:
        vm._life.on_exit(0, reason, error)
        exit_ = await vm.wait()
    assert exit_.reason is expected
    assert exit_.detail.startswith(f"vCPU 0: {detail}")


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (KVM_SYSTEM_EVENT_SHUTDOWN, Exit(ExitReason.SHUTDOWN)),
        (KVM_SYSTEM_EVENT_RESET, Exit(ExitReason.RESET, detail="vCPU 0: KVM_SYSTEM_EVENT_RESET")),
    ],
)
async def test_what_the_kernels_own_devices_ask_for(guest: Guest, event: int, expected: Exit) -> None:
    async with guest(HALT, start=False) as vm:
        vm.vcpus[0].kvm_vcpu.run_pointer.system_event.type = event
        vm._life.on_exit(0, KvmExit.KVM_EXIT_SYSTEM_EVENT, 0)
        assert await vm.wait() == expected


@pytest.mark.parametrize(
    ("event", "reason", "detail"),
    [
        (KVM_SYSTEM_EVENT_CRASH, ExitReason.CRASH, "vCPU 0: KVM_SYSTEM_EVENT_CRASH; rip=0x1000 "),
        (99, ExitReason.ERROR, "vCPU 0: system event 99, which is unknown here; rip=0x1000 "),
    ],
)
async def test_a_crash_that_the_guest_tells(
    guest: Guest, event: int, reason: ExitReason, detail: str
) -> None:
    async with guest(HALT, start=False) as vm:
        vm.vcpus[0].kvm_vcpu.run_pointer.system_event.type = event
        vm._life.on_exit(0, KvmExit.KVM_EXIT_SYSTEM_EVENT, 0)
        exit_ = await vm.wait()
    assert exit_.reason is reason
    assert exit_.detail.startswith(detail)


async def test_stop_presses_the_power_button(guest: Guest) -> None:
    waits_for_the_button = bytes.fromhex(
        "ba 00 06"  # mov dx, 0x600: PM1_STS
        "ed"  # again: in ax, dx
        "f6 c4 01"  # test ah, 1: PWRBTN_STS
        "74 fa"  # jz again
        "ba 04 06"  # mov dx, 0x604
        "b8 00 34"  # mov ax, SLP_EN | 5 << 10
        "ef"  # out dx, ax
        "eb fe"  # jmp .
    )
    async with guest(waits_for_the_button) as vm:
        assert await vm.stop(timeout=60) == Exit(ExitReason.SHUTDOWN)


async def test_stop_forces_a_guest_that_ignores_the_button(guest: Guest) -> None:
    async with guest(SPIN) as vm:
        assert await vm.stop(timeout=0) == Exit(ExitReason.KILLED)
