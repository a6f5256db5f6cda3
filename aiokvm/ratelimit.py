"""How much of a disk or a network a guest may have: token buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError

if TYPE_CHECKING:
    from aiokvm._core import Pointer

_MOST = (1 << 63) - 1


class Limit:
    """So many bytes and operations a second, and what may come at once after a pause: the bursts.

    Those that share one share its rates. 0 is no limit; a burst of 0 is a tenth of a second's worth. Of a
    disk an operation is a read, a write, a flush, a discard, and bytes are those read and written, zeroes
    included. Of a network an operation is a frame, and bytes are those of its frames, Ethernet headers
    included; a frame that is still to be cut counts as the frames that it becomes. Raises ConfigError for
    negative numbers and absurd ones.
    """

    @checked
    def __init__(
        self,
        *,
        bytes_per_second: int = 0,
        operations_per_second: int = 0,
        burst_bytes: int = 0,
        burst_operations: int = 0,
    ) -> None:
        numbers = (bytes_per_second, operations_per_second, burst_bytes, burst_operations)
        if not all(0 <= number <= _MOST for number in numbers):
            raise ConfigError(f"rates and bursts are 0 to {_MOST}, not {numbers}")
        core = lib.aiokvm_ratelimit_new(
            bytes_per_second,
            burst_bytes or bytes_per_second // 10,
            operations_per_second,
            burst_operations or operations_per_second // 10,
        )
        if not core:
            raise MemoryError("no memory for a rate limit")
        self.core: Pointer = ffi.gc(core, lib.aiokvm_ratelimit_free)
        """The ``struct aiokvm_ratelimit *``, for data movers in C."""

    def take(self, now_ns: int, size_bytes: int) -> int:
        """One operation of so many bytes: 0 if it may begin, else how many ns to wait and ask again."""
        return int(lib.aiokvm_ratelimit_take(self.core, now_ns, size_bytes, 1))
