"""A real VM, and tiny guests in real mode."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from aiokvm._core import ffi
from aiokvm.kvm import Cap, KvmExit, Regs, System, Vcpu, Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENTRY = 0x1000
PAGE = 4096
PAGES = 16
LIMIT_S = 10.0


@dataclass
class Guest:
    """A VM of 16 pages at 0 and one vCPU, at 0x1000 in real mode with all segments at 0."""

    vm: Vm
    vcpu: Vcpu
    memory: memoryview
    host_address: int

    def run(self) -> int:
        """Run to the next exit; a guest that makes none for 10 s fails the test instead of hanging it."""
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S, 1)
        try:
            return self.vcpu.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def run_to_hlt(self) -> None:
        reason = self.run()
        assert reason == KvmExit.KVM_EXIT_HLT, self.vcpu.run_state.internal_error

    def go(self, rip: int = ENTRY, rflags: int = 2) -> None:
        """Start anew."""
        self.vcpu.set_regs(Regs(rip=rip, rsp=0x8000, rflags=rflags))


@pytest.fixture
def system() -> Iterator[System]:
    with System() as system:
        yield system


@pytest.fixture
def vm(system: System) -> Iterator[Vm]:
    with system.create_vm() as vm:
        yield vm


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    with vm.create_vcpu(0) as vcpu:
        yield vcpu


@pytest.fixture
def chips(vm: Vm) -> Vm:
    """The VM with interrupt controllers and timer in the kernel."""
    vm.create_irqchip()
    vm.create_pit2()
    return vm


@pytest.fixture
def requires(system: System) -> Callable[[Cap], int]:
    """Skip the test where the host lacks a capability; return what it counts."""

    def check(cap: Cap) -> int:
        value = system.check_extension(cap)
        if value == 0:
            pytest.skip(f"this host lacks {cap.name}")
        return value

    return check


@pytest.fixture
def guest(vm: Vm) -> Iterator[Callable[..., Guest]]:
    """Make the guest of a VM: ``guest(code, flags=0)``, ``flags`` of its memory slot."""
    with ExitStack() as stack:

        def make(code: bytes, flags: int = 0) -> Guest:
            owner: Any = ffi.new("char[]", (PAGES + 1) * PAGE)
            stack.callback(lambda: owner)
            address = -(-int(ffi.cast("uintptr_t", owner)) // PAGE) * PAGE
            memory = memoryview(ffi.buffer(ffi.cast("char *", address), PAGES * PAGE))
            memory[ENTRY : ENTRY + len(code)] = code
            vm.set_user_memory_region(0, 0, PAGES * PAGE, address, flags)
            vcpu = stack.enter_context(vm.create_vcpu(0))
            sregs = vcpu.get_sregs()
            vcpu.set_sregs(replace(sregs, cs=replace(sregs.cs, base=0, selector=0)))
            guest = Guest(vm, vcpu, memory, address)
            guest.go()
            return guest

        yield make
        vm.close()
