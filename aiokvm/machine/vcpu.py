"""One vCPU of a machine: its thread, and its registers while it stands still."""

from __future__ import annotations

import enum
import errno
import time
import warnings
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import AiokvmError, ConfigError, KvmError, StateError
from aiokvm.machine.exits import NOT_INHERITED, check

if TYPE_CHECKING:
    from aiokvm import kvm
    from aiokvm._core import Pointer
    from aiokvm.aio import Loop
    from aiokvm.machine.stats import VcpuStats

# comm of a thread: 16 bytes with its NUL.
_NAME_MAX = 15

_GENERAL_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
_CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
# Of a machine that nobody closed: how long its collection waits for a thread.
_FORGOTTEN_SECONDS = 10.0


class VcpuState(enum.Enum):
    """What a vCPU does."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


def thread_name(machine: str, index: int) -> str:
    """The name of a vCPU's thread: the machine's, cut so that the index stays readable in top and ps."""
    suffix = f":{index}"
    name = machine.encode(errors="replace")[: _NAME_MAX - len(suffix)]
    return name.decode(errors="ignore") + suffix


@owned
class VirtualCpu:
    """A vCPU.

    It belongs to its machine, which starts, pauses and stops all of them together. While it does not run,
    `read_register`, `write_register` and everything that `kvm_vcpu` offers work on it.
    """

    def __init__(
        self, core: Pointer, vcpu: kvm.Vcpu, index: int, machine: str, loop: Loop | None = None
    ) -> None:
        self._loop = loop
        self.index = index
        self.state = VcpuState.CREATED
        self._vcpu = vcpu
        self._machine = core
        self.to_pause = False
        code = ffi.new("int *")
        self._name = thread_name(machine, index)
        self.core: Pointer = lib.aiokvm_vcpu_new(
            core, index, vcpu.fd, vcpu.run_pointer, vcpu.run_size, self._name.encode(), code
        )
        if not self.core:
            raise AiokvmError(f"cannot create vCPU {index}: out of memory")
        self._forgotten: weakref.finalize[..., VirtualCpu] | None = None
        self._stats: kvm.Stats | None = None

    @property
    def _owner(self) -> Loop | None:
        return self._loop if self.core else None

    def __repr__(self) -> str:
        return f"<VirtualCpu {self.index} {self.state.value} tid={self.tid}>"

    @property
    def tid(self) -> int:
        """The thread's id, for os.sched_setaffinity, os.setpriority, top -H and kill; 0: no thread.

        As with any thread, kill(2) on it means the process: STOP and CONT hold it up and let it go on, TERM
        ends it or calls its handler. The thread itself blocks all signals but the kick's: one that tgkill(2)
        sends to it alone stays pending, unless it is KILL or STOP.
        """
        return lib.aiokvm_vcpu_tid(self.core) if self.core else 0

    @property
    def kvm_vcpu(self) -> kvm.Vcpu:
        """All of KVM's vCPU ioctls. Raises StateError while the vCPU runs: they would wait for it to stop."""
        if self.state is VcpuState.RUNNING:
            raise StateError(f"vCPU {self.index} is running: pause the machine first")
        self._open()
        if not lib.aiokvm_machine_alive(self._machine):
            raise StateError(NOT_INHERITED)
        return self._vcpu

    @checked
    def read_register(self, name: str) -> int:
        """A general register, rip, rflags, cr0, cr2, cr3, cr4, cr8, efer or apic_base.

        Raises StateError while the vCPU runs, ConfigError for another name.
        """
        if name in _GENERAL_REGISTERS:
            return int(getattr(self.kvm_vcpu.get_regs(), name))
        if name in _CONTROL_REGISTERS:
            return int(getattr(self.kvm_vcpu.get_sregs(), name))
        raise ConfigError(_unknown(name))

    @checked
    def write_register(self, name: str, value: int) -> None:
        """Set what `read_register` reads; ``value`` is 0 to 2^64 - 1.

        Raises StateError while the vCPU runs, ConfigError for another name or value, KvmError for a control
        register that KVM refuses.
        """
        if not 0 <= value < 1 << 64:
            raise ConfigError(f"{name} cannot be {value}: a register has 64 bits, and no sign")
        change: dict[str, Any] = {name: value}
        if name in _GENERAL_REGISTERS:
            self.kvm_vcpu.set_regs(replace(self.kvm_vcpu.get_regs(), **change))
        elif name in _CONTROL_REGISTERS:
            self.kvm_vcpu.set_sregs(replace(self.kvm_vcpu.get_sregs(), **change))
        else:
            raise ConfigError(_unknown(name))

    def stats(self) -> VcpuStats:
        """What it has done so far."""
        from aiokvm.machine.stats import vcpu_stats

        return vcpu_stats(self._open(), self._stats.read() if self._stats else {})

    def _open(self) -> Pointer:
        if not self.core:
            raise StateError(f"vCPU {self.index} is closed")
        return self.core

    # What the machine does with it.

    def start(self) -> None:
        """Create the thread. Raises AiokvmError if the host has none to give."""
        self._open()
        # Now: while it runs, the kernel gives the descriptor to nobody.
        try:
            self._stats = self._vcpu.get_stats()
        except KvmError:
            self._stats = None
        try:
            check(
                lib.aiokvm_vcpu_start(self._open()),
                f"cannot create the thread of vCPU {self.index}; see RLIMIT_NPROC and the pids cgroup",
            )
        except AiokvmError:
            # One that was resumed before.
            if not self.tid:
                self.state = VcpuState.CREATED
            raise
        # The thread uses what is unmapped when the machine is collected, so it has to end before that.
        name = f"<VirtualCpu {self.index} {self._name}>"
        self._forgotten = weakref.finalize(self, _stop_forgotten, self.core, name)

    def resume(self) -> None:
        """Let it run."""
        if self.state is VcpuState.PAUSED:
            self._tell_watchdogs()
        check(lib.aiokvm_vcpu_resume(self._open()), "resuming a vCPU")
        self.state = VcpuState.RUNNING
        self.to_pause = False

    def _tell_watchdogs(self) -> None:
        """The guest's watchdogs are not to take the pause for a CPU that hangs (KVM API, 4.72)."""
        try:
            self._vcpu.kvmclock_ctrl()
        except KvmError as error:
            # EINVAL: the guest uses no kvmclock, so it cannot be told.
            if error.errno != errno.EINVAL:
                raise

    def pause(self) -> None:
        """Tell it to stand still; it says when it does."""
        check(lib.aiokvm_vcpu_pause(self._open()), "pausing a vCPU")
        self.to_pause = True

    def stop(self) -> None:
        """Tell its thread to end; it says when it has."""
        check(lib.aiokvm_vcpu_stop(self._open()), "stopping a vCPU")

    def kick(self) -> None:
        """Tell it again."""
        check(lib.aiokvm_vcpu_kick(self._open()), "kicking a vCPU")

    def on_parked(self) -> None:
        """It says that it stands still."""
        # What it says to a pause that has been withdrawn is no longer true.
        if self.to_pause:
            self.state = VcpuState.PAUSED

    def on_stopped(self) -> None:
        """Its thread has ended."""
        check(lib.aiokvm_vcpu_join(self._open()), "joining a vCPU's thread")
        if self._forgotten:
            self._forgotten.detach()
        self.state = VcpuState.STOPPED

    def close(self) -> None:
        """The thread must have ended, else StateError. Idempotent."""
        if self._forgotten and self._forgotten.alive:
            raise StateError(f"vCPU {self.index} has a thread that runs: end the machine")
        if self.core:
            if self._stats:
                self._stats.close()
            lib.aiokvm_vcpu_free(self.core)
            self.core = ffi.NULL
            self._vcpu.close()


def _stop_forgotten(core: Pointer, name: str) -> None:
    if lib.aiokvm_vcpu_stop(core) < 0:
        return  # a child of fork: it has no threads
    deadline = time.monotonic() + _FORGOTTEN_SECONDS
    while lib.aiokvm_vcpu_join(core) < 0 and time.monotonic() < deadline:
        lib.aiokvm_vcpu_kick(core)
        time.sleep(0.001)
    warnings.warn(
        f"{name} still ran when its machine was collected: leave `async with vm`", ResourceWarning, 2
    )


def _unknown(name: str) -> str:
    return f"no register {name!r}: there are {', '.join((*_GENERAL_REGISTERS, *_CONTROL_REGISTERS))}"
