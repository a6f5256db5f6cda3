"""A device of the user's own: what it is, and what it is given.

It sees offsets, never addresses or interrupt numbers. `VM.attach` puts it into a machine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiokvm.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm.aio import Handle, Loop
    from aiokvm.machine.irq import Irq


class RegionMode(enum.Enum):
    """What happens when the guest writes to a region of a device."""

    EXIT = "exit"
    """The vCPU waits until the device has answered. Reads do in every mode but MEMORY."""
    POSTED = "posted"
    """The write is queued and the vCPU runs on. The device gets the writes of all vCPUs to the machine's
    posted regions in the guest's order, and before any later access that the vCPU waits for. When more than
    4096 are outstanding the vCPU waits. ``write`` has to be a plain function."""
    DOORBELL = "doorbell"
    """The write wakes `Device.doorbell` and the vCPU never leaves the guest's side of the kernel (an
    ioeventfd). The value is not seen, and several writes before the device looks may become one call."""
    MEMORY = "memory"
    """The region is RAM that the device shares: no access of the guest is noticed (`Attachment.memory`)."""


class ErrorPolicy(enum.Enum):
    """What follows when a device raises; the guest reads ones, and `DeviceFailed` is emitted in any case."""

    KEEP = "keep"
    """The device goes on."""
    STOP_DEVICE = "stop-device"
    """The device is detached."""
    STOP_MACHINE = "stop-machine"
    """The machine ends, with `ExitReason.ERROR`."""


class Device:
    """A device: override what it has.

    ``read`` and ``write`` are plain functions or coroutines. A coroutine holds up the vCPU whose access it
    serves and no other; those of several vCPUs run at the same time. ``run``, if there is one, is a task that
    lives as long as the machine runs. Two more may be defined, for string instructions (``rep ins``, ``rep
    outs``) and runs of posted writes, which otherwise come piece by piece:

    - ``read_string(offset, size, count) -> bytes``
    - ``write_string(offset, size, data)``

    (Where KVM emulates ``rep outs`` it makes single writes of it; posted, they are a run again.)

    When the machine ends, handlers and tasks that have not ended are cancelled, and waited for up to
    `aiokvm.machine.vm.DEVICES_SECONDS`. A handler must not wait for its own machine's pause or reset: these
    wait for it.
    """

    irq: Irq
    """The device's interrupt, if it was attached with one."""

    _loop: Loop | None = None
    _timers: set[Timer] | None = None
    _failed: Callable[[str, Exception], None] | None = None

    def read(self, offset: int, size: int) -> int | Awaitable[int]:  # noqa: ARG002
        """What the guest reads at an offset: ``size`` is 1, 2, 4 or 8 bytes; more than fit is cut off."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:  # noqa: ARG002
        """The guest wrote ``value``, of ``size`` bytes, at an offset."""
        return None

    def doorbell(self, offset: int, count: int) -> Awaitable[None] | None:  # noqa: ARG002
        """The guest wrote ``count`` times, at least, to the DOORBELL region that begins at ``offset``.

        A coroutine is not called again before it has returned; what is written meanwhile is in the next
        count. What was written before the machine ended is told at its end, if no coroutine is under way.
        """
        return None

    async def run(self) -> None:
        """A task that runs beside the guest; cancelled when the machine ends or the device is detached."""

    def reset(self) -> None:
        """The machine is reset."""

    def now_ns(self) -> int:
        """The clock of the event loop, in nanoseconds. Raises DeviceError unless attached."""
        return self._attached().now_ns()

    def timer(self, deadline_ns: int, callback: Callable[[], object], period_ns: int = 0) -> Timer:
        """Call back when `now_ns` has reached the deadline, and with a period again at each multiple from it.

        A periodic timer does not drift. If the loop was held up for several periods, it is called once and
        goes on in step. It ends with the device or by its ``cancel``. Raises DeviceError unless attached.
        """
        return Timer(self._attached(), self, deadline_ns, callback, period_ns)

    def at(
        self,
        *,
        pio: int | None = None,
        mmio: int | None = None,
        size: int = 1,
        irq: int | None = None,
        msi: tuple[int, int] | None = None,
        mode: RegionMode | str = RegionMode.EXIT,
        offset: int = 0,
        on_error: ErrorPolicy | str = ErrorPolicy.KEEP,
    ) -> Placement:
        """Where it is to be in a machine, for the ``devices`` of `VM.create`; as `VM.attach` has it."""
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

    def _attached(self) -> Loop:
        if self._loop is None:
            raise DeviceError(f"{type(self).__name__} is not attached to a machine")
        return self._loop


@dataclass(frozen=True)
class Placement:
    """A device and the arguments of `VM.attach`; made by `Device.at`."""

    device: Device
    where: dict[str, Any]


class Timer:
    """A timer of a device; made by `Device.timer`."""

    def __init__(
        self,
        loop: Loop,
        device: Device,
        deadline_ns: int,
        callback: Callable[[], object],
        period_ns: int,
    ) -> None:
        if period_ns < 0:
            raise ValueError(f"a period of {period_ns} ns is negative")
        self._loop = loop
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
        """It does not call back any more. Idempotent."""
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
