"""How fast this host runs a guest's ring 0: on hardware, or in KVM's instruction emulator."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from aiokvm._core import ffi
from aiokvm.errors import KvmError
from aiokvm.kvm.constants import KvmExit
from aiokvm.kvm.structs import Regs

if TYPE_CHECKING:
    from aiokvm.kvm.system import System
    from aiokvm.kvm.vcpu import Vcpu

HARDWARE_RING0 = 20_000_000
"""Instructions a second: more than any instruction emulator does, less than any processor, also one that is
itself emulated.
"""

_PAGE = 4096
# hlt; mov ecx, ebx; 1: addr32 loop 1b; hlt. The first HLT shows that the guest runs at all, and warms it up.
_PROGRAM = bytes.fromhex("f4 6689d9 67e2fd f4")
# An instruction emulator takes some 10 ms for the first run; hardware gets longer ones, to outweigh the exit.
_FIRST_LOOPS = 1 << 14
# The best of them counts: whatever else has the processor makes a run slower, and nothing makes one faster.
_TRIES = 3
_ENOUGH_S = 0.01
_MAX_LOOPS = 1 << 28


def ring0_speed(system: System) -> float:
    """Return how many instructions a second a guest runs in ring 0, in real mode; it takes some 50 ms.

    Below 1e7 it is an instruction emulator; hardware makes 1e8 and more. Raises KvmError.
    """
    memory = ffi.new("char[]", 2 * _PAGE)
    address = -(-int(ffi.cast("uintptr_t", memory)) // _PAGE) * _PAGE
    ffi.memmove(ffi.cast("char *", address), _PROGRAM, len(_PROGRAM))
    with system.create_vm() as vm:
        vm.set_user_memory_region(0, 0, _PAGE, address)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            vcpu.set_sregs(replace(sregs, cs=replace(sregs.cs, base=0, selector=0)))
            vcpu.set_regs(Regs())
            _run_to_hlt(vcpu)
            loops = _FIRST_LOOPS
            while (elapsed := _best(vcpu, loops)) < _ENOUGH_S and loops < _MAX_LOOPS:
                loops *= 16
    del memory  # the guest's, until here
    return loops / elapsed


def _best(vcpu: Vcpu, loops: int) -> float:
    return min(_time(vcpu, loops) for _ in range(_TRIES))


def _time(vcpu: Vcpu, loops: int) -> float:
    vcpu.set_regs(Regs(rip=1, rbx=loops))
    start = time.perf_counter()
    _run_to_hlt(vcpu)
    return time.perf_counter() - start


def _run_to_hlt(vcpu: Vcpu) -> None:
    reason = vcpu.run()
    while reason == KvmExit.KVM_EXIT_INTR:
        reason = vcpu.run()
    if reason != KvmExit.KVM_EXIT_HLT:
        raise KvmError(
            "KVM_RUN", errno.EIO, f"a loop of two instructions ended in exit {reason} instead of KVM_EXIT_HLT"
        )
