"""How a device on the loop takes chains from a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiokvm.virtio.queue import Chain, Virtqueue


def take(queue: Virtqueue) -> Chain | None:
    """The next chain. If there is none the driver's next one will be notified.

    Raises VirtqueueError if the driver has broken the queue.
    """
    chain = queue.pop()
    # One may have come before notifications were on. That it is gone again is a driver's game: no loop.
    if chain is None and queue.enable_notify():
        chain = queue.pop()
    return chain
