"""A plane of the C core: ends of links, served on the loop or by a thread of their own."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio.lowlevel import RunVar

from aiokvm._core import ffi, lib
from aiokvm.errors import AiokvmError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop

# News of the policy in front of a backend, which are not the backend's.
_POLICY_NEWS = lib.AIOKVM_NET_NEWS_FLOW | lib.AIOKVM_NET_NEWS_CAPTURED
# How long the loop serves frames, or news, before it looks at everything else. Planes that have more to do at
# the same time share it, down to what a call itself is worth.
BUDGET_NS, LEAST_NS = 500_000, 50_000


@dataclass(frozen=True, slots=True)
class NetStats:
    """What one end of a link has done so far: frames and bytes, and what was dropped, by reason.

    ``dropped_down``: sent while there was no peer or the link was down. ``dropped_filtered``: a filter said
    so. ``dropped_full``: no room for what it received, of its own or of what the process has for all.
    ``dropped_invalid``: too short, too long, or with a header that contradicts the frame. Of a NAT,
    ``dropped_unresolved``: nobody has answered for an address of the guest's network, or no nameserver of the
    host has answered a question; ``dropped_unsupported``: a protocol or a packet that it does not carry.
    ``throttled`` had to wait for the rate limit, ``segmented`` were cut to the peer's size in software,
    ``interrupts`` are a network adapter's.
    """

    sent_frames: int
    sent_bytes: int
    received_frames: int
    received_bytes: int
    dropped_down: int
    dropped_filtered: int
    dropped_full: int
    dropped_unresolved: int
    dropped_unsupported: int
    dropped_invalid: int
    throttled: int
    segmented: int
    interrupts: int


class End:
    """One end of a link, that a `Plane` has adopted: the ``struct aiokvm_net_end *`` is ``core``."""

    def __init__(self, plane: Plane, core: Pointer, on_news: Callable[[int, int, int], None]) -> None:
        self.plane = plane
        self.core = core
        self.on_news = on_news
        self.id = int(lib.aiokvm_net_end_id(core))
        self._stats = ffi.new("struct aiokvm_net_stats *")
        self._kept: tuple[object, ...] = ()
        self._subscribers: dict[int, Callable[[], None]] = {}

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return bool(self.core)

    def subscribe(self, news: int, callback: Callable[[], None]) -> None:
        """Have one kind of the policy's news told on the loop: AIOKVM_NET_NEWS_FLOW or _CAPTURED."""
        self._subscribers[news] = callback

    def unsubscribe(self, news: int) -> None:
        """Tell it no more."""
        self._subscribers.pop(news, None)

    def link(self, other: End) -> None:
        """Connect two ends of one plane. Raises AiokvmError if one of them is connected."""
        error = lib.aiokvm_net_link(self.core, other.core)
        if error:
            raise AiokvmError(f"two ends cannot be linked: {os.strerror(-error)}")

    def unlink(self) -> None:
        """Disconnect it, if it is connected."""
        lib.aiokvm_net_unlink(self.core)

    def set_up(self, up: bool) -> None:
        """Have its link drop what is sent, or not."""
        lib.aiokvm_net_set_up(self.core, up)

    def set_policy(
        self,
        *,
        rules: Pointer | None = None,
        capture: Pointer | None = None,
        sent: Pointer | None = None,
        received: Pointer | None = None,
        keep: tuple[object, ...] = (),
    ) -> None:
        """Filter, capture and limits of what it sends and receives; ``keep`` keeps their owners alive."""
        null = ffi.NULL
        lib.aiokvm_net_set_policy(self.core, rules or null, capture or null, sent or null, received or null)
        self._kept = keep

    def _tell(self, news: int, error: int, detail: int) -> None:
        for kind, callback in tuple(self._subscribers.items()):
            if news & kind:
                callback()
        if news & ~_POLICY_NEWS and self.core:
            self.on_news(news & ~_POLICY_NEWS, error, detail)

    def stats(self) -> NetStats:
        """What it has done so far; what it had done when it was closed."""
        if self.core:
            lib.aiokvm_net_end_stats(self.core, self._stats)
        return NetStats(**{name: int(getattr(self._stats, name)) for name in NetStats.__slots__})

    def close(self) -> None:
        """Unlink it and free it. Idempotent."""
        if self.core:
            self.stats()
            lib.aiokvm_net_end_free(self.core)
            self.core = ffi.NULL
            self._kept = ()
            self.plane._forget(self)


class _Busy:
    """How many planes of one loop have more to do than there was time for."""

    planes = 0

    @staticmethod
    def of_this_loop() -> _Busy:
        busy = _busy.get(None)
        if busy is None:
            _busy.set(busy := _Busy())
        return busy


_busy: RunVar[_Busy | None] = RunVar("aiokvm busy planes", None)


class Plane:
    """Ends and the links between them, served on ``loop``, or by a thread of this name if one is given.

    Raises AiokvmError if descriptors or the thread cannot be had. To be closed after all its ends.
    """

    def __init__(self, loop: Loop, thread: str | None = None) -> None:
        error = ffi.new("int *")
        # A thread's name has 15 bytes: keep what tells them apart.
        name = ffi.NULL if thread is None else ffi.new("char[]", thread.encode()[-15:])
        core = lib.aiokvm_net_new(name, error)
        if not core:
            raise AiokvmError(f"no plane for frames: {os.strerror(error[0])}")
        self.loop = loop
        self.core = core
        self._ends: dict[int, End] = {}
        self._news = ffi.new("struct aiokvm_net_news *")
        self._busy = _Busy.of_this_loop()
        self._scheduled = False
        self._retired = False
        self._watches = [loop.watch(lib.aiokvm_net_news_fd(core), self._on_news)]
        if thread is None:
            self._watches.append(loop.watch(lib.aiokvm_net_fd(core), self._serve))

    @property
    def tid(self) -> int:
        """The thread's id; 0 if the loop serves."""
        return int(lib.aiokvm_net_tid(self.core)) if self.core else 0

    def adopt(self, core: Pointer, error: int, on_news: Callable[[int, int, int], None]) -> End:
        """The end that a maker of the C core gave back, or AiokvmError with the errno that it gave instead.

        ``on_news(news, error, detail)`` is called on the loop.
        """
        if not core:
            raise AiokvmError(f"no end of a link: {os.strerror(error)}")
        end = End(self, core, on_news)
        self._ends[end.id] = end
        return end

    def close(self) -> None:
        """Free it. Idempotent. Ends that are left are closed."""
        if not self.core:
            return
        self._retired = False
        for watch in self._watches:
            watch.cancel()
        for end in tuple(self._ends.values()):
            end.close()
        lib.aiokvm_net_free(self.core)
        self.core = ffi.NULL

    def retire(self) -> None:
        """Free it as soon as its last end is closed: others than its maker have ends in it."""
        self._retired = True
        self._close_if_empty()

    def _forget(self, end: End) -> None:
        self._ends.pop(end.id, None)
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        if self._retired and not self._ends:
            self.close()

    def _serve(self) -> None:
        if self._scheduled:
            return
        # While there is more the loop has its turn, and then comes back by itself.
        budget_ns = max(BUDGET_NS // (self._busy.planes + 1), LEAST_NS)
        if lib.aiokvm_net_serve(self.core, budget_ns) == 1:
            self._scheduled = True
            self._busy.planes += 1
            self.loop.call_soon(self._serve_again)

    def _serve_again(self) -> None:
        self._scheduled = False
        self._busy.planes -= 1
        if self.core:
            self._serve()

    def _on_news(self) -> None:
        until_ns = time.monotonic_ns() + BUDGET_NS
        # Handlers may close ends, and the plane. A thread may have news without end: the rest still rings.
        while self.core and lib.aiokvm_net_take(self.core, self._news) == 1:
            news = self._news[0]
            end = self._ends.get(news.end)
            if end:
                end._tell(int(news.news), int(news.error), int(news.detail))
            if time.monotonic_ns() >= until_ns:
                return


def make_plane(loop: Loop, name: str, dataplane: str) -> Plane:
    """With a thread of this name for "thread", none for "loop"; for "auto" with one if it can be had."""
    if dataplane != "loop":
        try:
            return Plane(loop, name)
        except AiokvmError:
            if dataplane == "thread":
                raise
    return Plane(loop)


def check_dataplane(dataplane: str) -> None:
    """ConfigError unless it is "auto", "loop" or "thread"."""
    if dataplane not in ("auto", "loop", "thread"):
        raise ConfigError(f"dataplane {dataplane!r} is neither 'auto', 'loop' nor 'thread'")
