"""The entropy device. Virtio 1.2, section 5.4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.errors import ConfigError, VirtqueueError
from aiokvm.virtio.constants import VIRTIO_ID_RNG
from aiokvm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.virtio.device import Cancellable

# One buffer at a time is what Linux asks for.
QUEUE_SIZE = 64
# What one request gets at most: the driver looks at the length, and asks again (5.4.6).
REQUEST_BYTES = 64 << 10
# What all get before the loop has a turn: a host makes some 300 bytes a microsecond.
SERVE_BYTES = 256 << 10
# With a limit a request waits until it gets that much, instead of a byte at a time.
WORTH_BYTES = 64

_SECOND_NS = 1_000_000_000


class Rng(VirtioDevice):
    """Gives the guest random bytes.

    ``random`` makes up to so many bytes, and at least one, as `os.getrandom` does. ``bytes_per_second``
    limits what the guest gets in the long run, ``burst_bytes`` what it gets at once after a pause.
    ``served_bytes`` counts them. Raises ConfigError for a limit that would give the guest nothing.
    """

    device_id = VIRTIO_ID_RNG
    queue_size_max = (QUEUE_SIZE,)

    def __init__(
        self,
        random: Callable[[int], bytes],
        *,
        bytes_per_second: int | None = None,
        burst_bytes: int = REQUEST_BYTES,
    ) -> None:
        if bytes_per_second is not None and bytes_per_second < 1:
            raise ConfigError(f"bytes_per_second is {bytes_per_second}: at least 1, or None for no limit")
        if burst_bytes < WORTH_BYTES:
            raise ConfigError(f"burst_bytes is {burst_bytes}: at least {WORTH_BYTES}")
        self.served_bytes = 0
        self._random = random
        self._rate = bytes_per_second
        self._burst = burst_bytes
        # A bucket of credit: full since then, or filled up to `_credit` then.
        self._credit = burst_bytes
        self._filled_ns: int | None = None
        self._timer: Cancellable | None = None

    def notified(self, queue: int) -> None:
        """Serve requests, as far as the limit allows and for a bounded time."""
        if queue != 0 or not self.queues or not self.queues[0].ready or self._timer:
            return
        try:
            self._serve()
        except VirtqueueError as error:
            self.host.needs_reset(str(error))

    def reset(self) -> None:
        """Forget the driver; what it may have at once stays what it is."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _serve(self) -> None:
        queue = self.queues[0]
        budget = SERVE_BYTES
        for _ in range(queue.size):
            allowed = self._allowed()
            if allowed < WORTH_BYTES or budget <= 0 or (chain := queue.pop()) is None:
                break
            if wanted := min(chain.writable_bytes, REQUEST_BYTES, allowed):
                given = chain.write(self._random(wanted))
                budget -= given
                if self._rate:
                    self._credit -= given
                self.served_bytes += given
            chain.push()
        else:
            budget = 0
        if queue.publish():
            self.host.interrupt(0)
        if budget <= 0:
            self.host.again(0)
        elif self._rate and allowed < WORTH_BYTES:
            wait_ns = (WORTH_BYTES - allowed) * _SECOND_NS // self._rate + 1
            self._timer = self.host.timer(self.host.now_ns() + wait_ns, self._refilled)

    def _allowed(self) -> int:
        """How many bytes the guest may have now."""
        if self._rate is None:
            return REQUEST_BYTES
        now_ns = self.host.now_ns()
        if self._filled_ns is None:
            self._filled_ns = now_ns
        earned = (now_ns - self._filled_ns) * self._rate // _SECOND_NS
        # The rest of a byte stays earned.
        self._filled_ns += earned * _SECOND_NS // self._rate
        self._credit = min(self._credit + earned, self._burst)
        return self._credit

    def _refilled(self) -> None:
        self._timer = None
        self.notified(0)
