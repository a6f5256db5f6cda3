"""A device of the user's own: what it is, and what it is given.

It sees offsets, never addresses or interrupt numbers. `VM.attach` puts it into a machine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm.aio import Handle, Loop
    from aiokvm.machine.irq import Irq
    from aiokvm.memory import GuestMemory


ModeName: TypeAlias = Literal["exit", "posted", "doorbell", "memory"]
PolicyName: TypeAlias = Literal["keep", "stop-device", "stop-machine"]


class RegionMode(enum.Enum):
    """What an access of the guest to a region of a device does; docs/devices.md has what each guarantees."""

    EXIT = "exit"
    """The vCPU waits until ``read`` or ``write`` has answered."""
    POSTED = "posted"
    """A write is queued and the vCPU runs on; a read is as in EXIT. The device gets the writes of all vCPUs
    to the machine's posted regions in the guest's order, and before any later access that a vCPU waits for.
    With 4096 outstanding the vCPU waits. ``write`` has to be a plain function."""
    DOORBELL = "doorbell"
    """A write of the region's size, which is 1, 2, 4 or 8 bytes, wakes `Device.doorbell` and the vCPU never
    leaves the kernel (an ioeventfd). The value is not seen, and writes that come before the device looks
    become one call. Reads, and writes of other sizes, are as in EXIT."""
    MEMORY = "memory"
    """The region is RAM that the device shares, `Attachment.memory`: no access of the guest is noticed."""


class ErrorPolicy(enum.Enum):
    """What follows when a device raises. In any case the guest reads ones and `DeviceFailed` is emitted."""

    KEEP = "keep"
    """The device goes on."""
    STOP_DEVICE = "stop-device"
    """All regions of the device are detached."""
    STOP_MACHINE = "stop-machine"
    """The machine ends, with the `ExitReason` ERROR."""


@owned
class Device:
    """A device of the program's own: derive from it and override what the device has.

    `read`, `write` and `doorbell` are plain functions or coroutines. A coroutine holds up the vCPU whose
    access it serves and no other; those of several vCPUs run at the same time. Two more may be defined, for
    string instructions (``rep ins``, ``rep outs``) and runs of posted writes, which otherwise come piece by
    piece; ``size`` is that of a piece, in bytes:

    - ``read_string(offset, size, count) -> bytes``, of ``size * count`` bytes
    - ``write_string(offset, size, data)``, where ``data`` is a multiple of ``size`` bytes

    (Where KVM emulates ``rep outs`` it makes single writes of it; posted, they are a run again.)

    When the machine ends, handlers and tasks that have not ended are cancelled, and waited for up to
    `aiokvm.machine.life.DEVICES_SECONDS`. A handler must not wait for its own machine's pause or reset: these
    wait for it.
    """

    irq: Irq
    """The device's interrupt; there is none unless it was attached with one."""
    memory: GuestMemory
    """The RAM of its machine while it is attached to one: for descriptors and buffers that a guest leaves."""
    vcpu: int | None = None
    """The index of the vCPU that asks: whose access `read`, `write` and their likes were last called for. A
    coroutine looks at it before it waits for the first time. None for posted writes, nobody waits there."""

    _loop: Loop | None = None
    _timers: set[Timer] | None = None
    _failed: Callable[[str, Exception], None] | None = None

    def read(self, offset: int, size: int) -> int | Awaitable[int]:  # noqa: ARG002
        """What the guest reads: ``size`` bytes (1, 2, 4 or 8) at ``offset``, as an unsigned number.

        Of a number that is too large the low bytes count. Unless overridden it reads as ones.
        """
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:  # noqa: ARG002
        """The guest wrote ``value``, unsigned, of ``size`` bytes (1, 2, 4 or 8), at ``offset``."""
        return None

    @checked
    def doorbell(self, offset: int, count: int) -> Awaitable[None] | None:  # noqa: ARG002
        """The guest has written to the DOORBELL region at ``offset``, ``count`` times since the last call.

        A coroutine is not called again before it has returned; what is written meanwhile is in the next
        count. What was written before the machine ended is told at its end, if no coroutine is under way.
        """
        return None

    async def run(self) -> None:
        """A task beside the guest, from the machine's start until it ends or the device is detached.

        It is cancelled then. While the machine is paused or reset it goes on.
        """

    def reset(self) -> None:
        """The machine is reset: be as new."""

    def now_ns(self) -> int:
        """The monotonic clock of the event loop, in nanoseconds. Raises DeviceError unless attached."""
        return self._attached().now_ns()

    @checked
    def timer(self, deadline_ns: int, callback: Callable[[], object], period_ns: int = 0) -> Timer:
        """Call back when `now_ns` has reached ``deadline_ns``, and with a period after each period from then.

        A periodic timer does not drift: its deadlines are ``deadline_ns`` plus multiples of the period. After
        the loop was held up for several periods it calls back once. It ends by `Timer.cancel`, with the
        machine, or when the device is detached. Raises DeviceError unless the device is attached,
        ConfigError for a negative period.
        """
        return Timer(self._attached(), self, deadline_ns, callback, period_ns)

    @checked
    def at(
        self,
        *,
        pio: int | None = None,
        mmio: int | None = None,
        size: int = 1,
        irq: int | None = None,
        msi: tuple[int, int] | None = None,
        mode: RegionMode | ModeName = RegionMode.EXIT,
        offset: int = 0,
        on_error: ErrorPolicy | PolicyName = ErrorPolicy.KEEP,
    ) -> Placement:
        """Where the device is to be, for the ``devices`` of `VM.create`. The arguments are `VM.attach`'s."""
        return Placement(
            self,
            {
                "pio": pio,
                "mmio": mmio,
                "size": size,
                "irq": irq,
                "msi": msi,
                "mode": mode,
                "offset": offset,
                "on_error": on_error,
            },
        )

    @property
    def _owner(self) -> Loop | None:
        return self._loop

    def _attached(self) -> Loop:
        if self._loop is None:
            raise DeviceError(f"{type(self).__name__} is not attached to a machine")
        return self._loop


@dataclass(frozen=True)
class Placement:
    """A device and the arguments that `VM.attach` gets with it; made by `Device.at`."""

    device: Device
    where: dict[str, Any]


class TimerOwner(Protocol):
    """Whose timers end with it, and who is told what they raise."""

    _timers: set[Timer] | None
    _failed: Callable[[str, Exception], None] | None


@owned
class Timer:
    """A timer of a device; made by `Device.timer`. ``deadline_ns`` is when it calls back next."""

    def __init__(
        self,
        loop: Loop,
        device: TimerOwner,
        deadline_ns: int,
        callback: Callable[[], object],
        period_ns: int,
    ) -> None:
        if period_ns < 0:
            raise ConfigError(f"a period of {period_ns} ns is negative")
        self._loop = self._owner = loop
        self._callback = callback
        self._period_ns = period_ns
        self.deadline_ns = deadline_ns
        self._timers = device._timers
        self._failed = device._failed
        self._handle: Handle | None = None
        if self._timers is not None:
            self._timers.add(self)
        self._arm()

    def cancel(self) -> None:
        """End it: it does not call back any more. Idempotent."""
        if self._handle:
            self._handle.cancel()
            self._handle = None
        if self._timers is not None:
            self._timers.discard(self)

    def _arm(self) -> None:
        self._handle = self._loop.call_at(self.deadline_ns, self._due)

    def _due(self) -> None:
        if self._period_ns:
            late_ns = self._loop.now_ns() - self.deadline_ns
            self.deadline_ns += self._period_ns * (1 + max(0, late_ns) // self._period_ns)
            self._arm()
        else:
            self.cancel()
        try:
            self._callback()
        except Exception as error:
            if self._failed is None:
                raise
            self._failed("timer", error)
