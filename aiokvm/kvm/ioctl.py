"""The one way into KVM: ioctl, its failures as KvmError, and the descriptors that it goes to."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Self, TypeVar

from aiokvm._core import ffi, lib
from aiokvm.errors import KvmError
from aiokvm.kvm.convert import Struct, from_c, to_c
from aiokvm.kvm.hints import hint

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T", bound=Struct)


class Handle:
    """A descriptor of KVM's: owned, closed once, never used after that.

    ``close`` must not race with another thread that is inside a method of the same object. A descriptor
    that nobody holds any more is closed when its object is collected. Any use after ``close`` raises
    KvmError with EBADF.
    """

    _fd = -1

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor's number; it stays this object's."""
        return self._open_fd("fd")

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0

    def ioctl(self, name: str, arg: Any = 0) -> int:
        """Call the request that the UAPI header calls ``name``; ``arg`` is a number or a cffi pointer.

        Returns the kernel's answer, which is never negative. Raises KvmError.
        """
        answer = self.try_ioctl(name, arg)
        if answer < 0:
            raise KvmError(name, -answer, hint(name, -answer))
        return answer

    def try_ioctl(self, name: str, arg: Any = 0) -> int:
        """Do what ``ioctl`` does, but return the negative errno of a failure."""
        if isinstance(arg, int):
            arg = ffi.cast("void *", arg)
        return lib.aiokvm_ioctl(self._open_fd(name), getattr(lib, name), arg)

    def close(self) -> None:
        """Close the descriptor; the second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open_fd(self, name: str) -> int:
        if self._fd < 0:
            raise KvmError(name, errno.EBADF, f"the {type(self).__name__} is closed")
        return self._fd

    def _get(self, name: str, struct: type[T]) -> T:
        c = ffi.new(f"struct {struct.c_name} *")
        self.ioctl(name, c)
        return from_c(struct, c)

    def _set(self, name: str, value: Struct) -> int:
        return self.ioctl(name, to_c(value))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.closed else f'fd={self._fd}'}>"


class AttributeHandle(Handle):
    """A descriptor with device attributes (KVM API, sections 4.80 and 4.81)."""

    def has_device_attr(self, group: int, attr: int) -> bool:
        """Whether the attribute exists (KVM_HAS_DEVICE_ATTR)."""
        answer = self.try_ioctl("KVM_HAS_DEVICE_ATTR", self._attr(group, attr))
        if answer in (0, -errno.ENXIO, -errno.ENOTTY, -errno.EINVAL):
            return answer == 0
        raise KvmError("KVM_HAS_DEVICE_ATTR", -answer, hint("KVM_HAS_DEVICE_ATTR", -answer))

    def get_device_attr(self, group: int, attr: int, size: int) -> bytes:
        """Return the attribute's ``size`` bytes; ``size`` must be what the attribute's description says."""
        data = ffi.new("char[]", size)
        self.ioctl("KVM_GET_DEVICE_ATTR", self._attr(group, attr, data))
        return bytes(ffi.buffer(data))

    def set_device_attr(self, group: int, attr: int, value: bytes) -> None:
        """Set the attribute to ``value``, whose length must be what the attribute's description says."""
        data = ffi.from_buffer("char[]", value)
        self.ioctl("KVM_SET_DEVICE_ATTR", self._attr(group, attr, data))

    @staticmethod
    def _attr(group: int, attr: int, data: Any = None) -> Any:
        address = 0 if data is None else int(ffi.cast("uintptr_t", data))
        return ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr, "addr": address})
