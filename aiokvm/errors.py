"""The exceptions of aiokvm: one tree, each saying what was wrong and what to do about it."""

from __future__ import annotations

import os

from aiokvm.text import printable


class AiokvmError(Exception):
    """The root of all errors that aiokvm raises on purpose.

    As a string it is printable, whatever text from outside it was made of: ``args`` have that as it came.
    More than one argument are more than one line, such as another program's last words.
    """

    def __str__(self) -> str:
        if isinstance(self, OSError):
            return printable(super().__str__())
        return "\n".join(printable(str(line)) for line in self.args)


class ConfigError(AiokvmError, ValueError):
    """A machine was described in a way that cannot be built; nothing was allocated."""


class BootError(AiokvmError):
    """What was to be booted is missing, damaged, unsupported or too large; nothing was allocated."""


class GuestMemoryError(AiokvmError, ValueError):
    """A guest physical address range is not wholly inside the guest's RAM, or the RAM is gone."""


class DeviceError(AiokvmError):
    """A device could not be attached, or failed."""


class VirtqueueError(DeviceError):
    """The driver has put into its virtqueue what the specification forbids, or a place that cannot be."""


class ImageError(AiokvmError):
    """A kernel or image could not be found, fetched, verified or built."""


class LabError(AiokvmError):
    """The lab could not be built or started."""


class TraceError(AiokvmError):
    """A file is no trace, is damaged or breaks off."""


class KvmError(AiokvmError, OSError):
    """A KVM ioctl failed.

    ``ioctl`` is the request's name as the UAPI header spells it, ``errno`` the kernel's answer and
    ``hint`` what to do about it, empty where that is not known.
    """

    def __init__(self, ioctl: str, errno: int, hint: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.ioctl = ioctl
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.ioctl}: {self.strerror} (errno {self.errno})"
        return printable(f"{text}: {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[type[KvmError], tuple[str, int, str]]:
        return type(self), (self.ioctl, self.errno or 0, self.hint)


class NbdError(AiokvmError, OSError):
    """An NBD server cannot be reached or used, refused an export, or broke the protocol: it is not connected.

    ``errno`` is EPROTO for what no server may do or this client does not speak, else what the host says, or
    the server's refusal means.
    """


class StateError(AiokvmError):
    """The operation does not fit the machine's present state; the state is unchanged."""


class SerialClosedError(AiokvmError, EOFError):
    """The machine behind a serial port has ended: nothing more will come, and nothing is read there."""
