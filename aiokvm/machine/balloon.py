"""A machine's memory balloon, as a program uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, StateError
from aiokvm.memory import PAGE_SIZE, discard
from aiokvm.virtio.balloon import Balloon

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiokvm.aio import Loop
    from aiokvm.logs import SeldomLogger
    from aiokvm.memory import GuestMemory

# A guest that has a driver answers in milliseconds.
ANSWER_SECONDS = 10.0


@owned
class MemoryBalloon:
    """Memory that the guest lends the host: `VM.balloon`. All sizes are in bytes.

    What the guest puts into the balloon, and free pages that it reports by itself, go back to the host at
    once. It takes pages out again when `target` is lowered, and may when it runs out of memory.
    """

    def __init__(
        self, memory: GuestMemory, name: str, logger: SeldomLogger, loop: Loop | None = None
    ) -> None:
        self._owner = loop
        self.device = Balloon(memory, self._release, on_actual=self._on_actual, on_stats=self._on_stats)
        self._size_bytes = memory.size_bytes
        self._name = name
        self._logger = logger
        self._refused = False
        self._closed = False
        self._stats: Mapping[str, int] = {}
        self._answered = anyio.Event()
        self._moved = anyio.Event()

    @property
    def target(self) -> int:
        """How much the guest is asked to put into the balloon: 0 at first.

        Setting it raises ConfigError for what is no multiple of 4096, negative, or more than the guest's RAM.
        """
        return self.device.num_pages * PAGE_SIZE

    @target.setter
    @checked
    def target(self, size_bytes: int) -> None:
        if size_bytes % PAGE_SIZE or not 0 <= size_bytes <= self._size_bytes:
            raise ConfigError(
                f"a balloon of {size_bytes} bytes: it has to be a multiple of {PAGE_SIZE}, "
                f"at most the guest's {self._size_bytes}"
            )
        self.device.num_pages = size_bytes // PAGE_SIZE

    @property
    def actual(self) -> int:
        """How much is in the balloon, by what the guest's driver says."""
        return self.device.actual * PAGE_SIZE

    @property
    def released_bytes(self) -> int:
        """What has been given back to the host in all; a page that was used again counts again."""
        return self.device.released_bytes

    @property
    def dropped(self) -> int:
        """Pages that the guest had no right to put in or take out: a driver that is in order has none."""
        return self.device.dropped

    async def reached(self) -> None:
        """Wait until `actual` is `target`, which may never be. Raises StateError if the machine ends."""
        while self.actual != self.target:
            self._require_guest()
            await self._moved.wait()

    @checked
    async def stats(self, timeout: float = ANSWER_SECONDS) -> Mapping[str, int]:
        """What the guest says about its memory now, by the names of `aiokvm.virtio.balloon.STATISTICS`.

        A guest gives those that it has, true or not. Raises TimeoutError if it does not answer, as a guest
        with no driver, and StateError if the machine ends.
        """
        self._require_guest()
        self.device.request_stats()
        try:
            with anyio.fail_after(timeout):
                await self._answered.wait()
        except TimeoutError:
            raise TimeoutError(f"no statistics of {self._name}'s memory within {timeout:g} s") from None
        self._require_guest()
        return self._stats

    def close(self) -> None:
        """The machine has ended. Idempotent."""
        self._closed = True
        self._owner = None
        self._answered.set()
        self._moved.set()

    def _require_guest(self) -> None:
        if self._closed:
            raise StateError(f"machine {self._name} has ended")

    # The device's side.

    def _release(self, pages: memoryview) -> None:
        try:
            discard(pages)
        except OSError as error:
            if not self._refused:
                self._refused = True
                self._logger.warning(
                    "%s: the host does not take back memory of the balloon: %s", self._name, error.strerror
                )

    def _on_actual(self) -> None:
        if not self._closed:
            self._moved.set()
            self._moved = anyio.Event()

    def _on_stats(self, stats: Mapping[str, int]) -> None:
        self._stats = stats
        if not self._closed:
            self._answered.set()
            self._answered = anyio.Event()
