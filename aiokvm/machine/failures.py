"""What goes wrong in a machine, or misses: counted, logged ever so seldom, and emitted as events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.machine import events

if TYPE_CHECKING:
    from aiokvm.logs import SeldomLogger


class Failures:
    """``errors`` is how often a device raised."""

    def __init__(self, machine: str, logger: SeldomLogger, hub: events.EventHub) -> None:
        self.errors = 0
        self._machine = machine
        self._failed = logger.kind()
        self._needed_resets = logger.kind()
        self._unclaimed = logger.kind()
        self._hub = hub

    def on_failed(self, device: str, access: str, error: Exception) -> None:
        """A device raised ``error`` in ``access``."""
        self.errors += 1
        self._failed.error("%s: %s failed", device, access, exc_info=error)
        self._hub.emit(events.DeviceFailed(self._machine, device, access, error))

    def on_needs_reset(self, device: str, reason: str) -> None:
        """A virtio device has set DEVICE_NEEDS_RESET."""
        self._needed_resets.warning("%s: %s needs a reset: %s", self._machine, device, reason)
        self._hub.emit(events.DeviceNeedsReset(self._machine, device, reason))

    def on_unclaimed(self, access: str) -> None:
        """The guest accessed an address where nothing is, and that is to be told."""
        self._unclaimed.info("%s: %s: nothing is there", self._machine, access)
