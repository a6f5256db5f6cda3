"""What goes wrong in a machine, or misses: counted, logged ever more seldom, and emitted as events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.machine import events

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

# Of a kind, those that are logged one by one; after that each whose number is a power of two.
LOGGED = 10


class Failures:
    """``errors`` is how often a device raised."""

    def __init__(self, machine: str, logger: LoggerAdapter[Logger], hub: events.EventHub) -> None:
        self.errors = 0
        self._needed_resets = 0
        self._unclaimed = 0
        self._machine = machine
        self._logger = logger
        self._hub = hub

    def on_failed(self, device: str, access: str, error: Exception) -> None:
        """A device raised ``error`` in ``access``."""
        self.errors += 1
        if is_logged(self.errors):
            self._logger.error("%s: %s failed", device, access, exc_info=error)
        self._hub.emit(events.DeviceFailed(self._machine, device, access, error))

    def on_needs_reset(self, device: str, reason: str) -> None:
        """A virtio device has set DEVICE_NEEDS_RESET."""
        self._needed_resets += 1
        if is_logged(self._needed_resets):
            self._logger.warning("%s: %s needs a reset: %s", self._machine, device, reason)
        self._hub.emit(events.DeviceNeedsReset(self._machine, device, reason))

    def on_unclaimed(self, access: str) -> None:
        """The guest accessed an address where nothing is, and that is to be told."""
        self._unclaimed += 1
        if is_logged(self._unclaimed):
            self._logger.info("%s: %s: nothing is there", self._machine, access)


def is_logged(count: int) -> bool:
    """Whether what has happened ``count`` times is logged this time."""
    # A guest can bring it about as often as it likes: its log must not grow as fast.
    return count <= LOGGED or count & (count - 1) == 0
