"""Tables of CPUID entries and MSRs: the requests that the system and a vCPU have in common."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from aiokvm._core import ffi
from aiokvm.errors import KvmError
from aiokvm.kvm.convert import from_c, to_initializer
from aiokvm.kvm.hints import hint
from aiokvm.kvm.structs import CpuidEntry, MsrEntry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokvm.kvm.ioctl import Handle

# KVM_MAX_CPUID_ENTRIES of the kernel: a table never has more.
_MAX_CPUID_ENTRIES = 256

# MAX_IO_MSRS of the kernel: it answers E2BIG to as many.
_MAX_MSRS = 255


class MsrError(KvmError):
    """KVM took or gave the MSRs before ``index`` (``done`` of them) and refused that one."""

    def __init__(self, ioctl: str, index: int, done: int) -> None:
        super().__init__(
            ioctl,
            errno.EINVAL,
            f"MSR 0x{index:x} was refused after {done} were done: the guest's CPUID or this host lacks it, "
            "or its value is not valid",
        )
        self.index = index
        self.done = done

    def __reduce__(self) -> tuple[type[MsrError], tuple[str, int, int]]:  # type: ignore[override]
        return type(self), (self.ioctl, self.index, self.done)


def get_cpuid(handle: Handle, name: str) -> tuple[CpuidEntry, ...]:
    """Return the table that the request ``name`` fills, at any length."""
    size = 64
    while True:
        table = ffi.new("struct kvm_cpuid2 *", {"nent": size, "entries": size})
        answer = handle.try_ioctl(name, table)
        if answer == -errno.E2BIG and size < _MAX_CPUID_ENTRIES:
            size *= 2
            continue
        if answer < 0:
            raise KvmError(name, -answer, hint(name, -answer))
        entries = [from_c(CpuidEntry, table.entries[i]) for i in range(table.nent)]
        # KVM_GET_CPUID2 of older kernels leaves nent as it was asked for; what it did not fill is zero.
        while len(entries) > 1 and entries[-1] == CpuidEntry(0):
            entries.pop()
        return tuple(entries)


def set_cpuid(handle: Handle, entries: Iterable[CpuidEntry]) -> None:
    """Set a vCPU's CPUID."""
    table = [to_initializer(entry) for entry in entries]
    handle.ioctl("KVM_SET_CPUID2", ffi.new("struct kvm_cpuid2 *", {"nent": len(table), "entries": table}))


def get_msrs(handle: Handle, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
    """Return the MSRs' values in order. Raises MsrError with the first that KVM refuses."""
    entries = [MsrEntry(index) for index in indices]
    result: list[MsrEntry] = []
    for chunk in _transfer(handle, "KVM_GET_MSRS", entries):
        result.extend(from_c(MsrEntry, chunk.entries[i]) for i in range(chunk.nmsrs))
    return tuple(result)


def set_msrs(handle: Handle, entries: Iterable[MsrEntry]) -> None:
    """Set MSRs in order. Raises MsrError with the first that KVM refuses; those before it are set."""
    for _ in _transfer(handle, "KVM_SET_MSRS", list(entries)):
        pass


def _transfer(handle: Handle, name: str, entries: list[MsrEntry]) -> Iterable[Any]:
    for start in range(0, len(entries), _MAX_MSRS):
        part = entries[start : start + _MAX_MSRS]
        initializer = {"nmsrs": len(part), "entries": [to_initializer(entry) for entry in part]}
        chunk = ffi.new("struct kvm_msrs *", initializer)
        done = handle.ioctl(name, chunk)
        if done < len(part):
            raise MsrError(name, part[done].index, start + done)
        yield chunk
