"""Single-step a flat image, and show each instruction's bytes and the registers that it changed.

`VM.create` builds the machine: RAM, registers, CPUID. It is never started: as long as a vCPU has no thread of
its own, all of KVM's ioctls are the program's (`VirtualCpu.kvm_vcpu`), KVM_RUN among them. With
single-stepping on, KVM_RUN returns KVM_EXIT_DEBUG after each instruction. Exits for I/O come to the debugger
as well, which only shows them: no device of the machine answers.

    python examples/debugger.py             # steps through the image below
    python examples/debugger.py IMAGE       # through a file that real mode enters at 0x1000
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import anyio
from anyio import to_thread

from aiokvm import VM, boot, kvm
from aiokvm.kvm import KvmExit
from aiokvm.kvm.constants import KVM_GUESTDBG_SINGLESTEP

IMAGE = bytes.fromhex(
    "31 c0"  # 0x1000:    xor ax, ax
    "b9 03 00"  # 0x1002:    mov cx, 3
    "01 c8"  # 0x1005: 1: add ax, cx
    "e2 fc"  # 0x1007:    loop 1b
    "e6 f4"  # 0x1009:    out 0xf4, al
)
DEBUG_EXIT_PORT = 0xF4
HLT = b"\xf4"
MAX_STEPS = 10_000


def code_at(vm: VM, cpu: kvm.Vcpu, size: int) -> bytes:
    """The bytes of the next instruction and what is behind it; real mode has no paging."""
    gpa = cpu.get_sregs().cs.base + cpu.get_regs().rip
    return vm.memory.read(gpa, size)


def show(before: kvm.Regs, after: kvm.Regs, code: bytes) -> None:
    """Print a line about one instruction."""
    length = after.rip - before.rip
    if not 0 < length <= len(code):
        length = 2  # it jumped, and its length cannot be told without a disassembler
    old, new = asdict(before), asdict(after)
    changed = [f"{name}={value:#x}" for name, value in new.items() if value != old[name] and name != "rip"]
    if after.rip != before.rip + length:
        changed.append(f"-> {after.rip:#x}")
    print(f"{before.rip:#06x}  {code[:length].hex(' '):<24} {' '.join(changed)}".rstrip())


async def step_through(vm: VM) -> None:
    """Run the guest an instruction at a time, until it halts or ends the machine."""
    cpu = vm.vcpus[0].kvm_vcpu
    cpu.set_guest_debug(KVM_GUESTDBG_SINGLESTEP)
    before, code = cpu.get_regs(), code_at(vm, cpu, 15)
    for _ in range(MAX_STEPS):
        if code.startswith(HLT):
            print(f"{before.rip:#06x}  the guest halts")
            return
        # KVM_RUN blocks, so it has no place on the loop.
        reason = await to_thread.run_sync(cpu.run)
        if reason == KvmExit.KVM_EXIT_IO:
            io = cpu.run_state.io
            print(f"        {'out' if io.is_write else 'in'} {io.port:#x} {io.data.hex(' ')}")
            if io.port == DEBUG_EXIT_PORT and io.is_write:
                return
        elif reason == KvmExit.KVM_EXIT_DEBUG:
            after = cpu.get_regs()
            show(before, after, code)
            before, code = after, code_at(vm, cpu, 15)
        elif reason != KvmExit.KVM_EXIT_INTR:  # a signal's: once more
            raise SystemExit(f"{before.rip:#06x}: exit_reason {reason}, which this debugger does not know")


async def main() -> None:
    """Make the machine, and step through what is in it."""
    image = sys.argv[1] if len(sys.argv) > 1 else IMAGE
    async with await VM.create(boot=boot.Flat(image), memory="2M", name="debugged") as vm:
        await step_through(vm)


if __name__ == "__main__":
    anyio.run(main)
