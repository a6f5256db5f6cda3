"""Where a network adapter leads: the interface of every backend, and what may be had on any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypedDict

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiokvm.aio import Loop
    from aiokvm.net.filter import Rule
    from aiokvm.net.hook import Filter, Hook
    from aiokvm.net.pcap import Capture, Pcap
    from aiokvm.net.plane import End, NetStats, Plane
    from aiokvm.ratelimit import Limit


class Policy(TypedDict, total=False):
    """What every backend takes, and does to the frames that pass it."""

    tap: Pcap | None
    """Records them."""
    filters: Iterable[Rule | Hook]
    """Say which may pass: `net.filter`."""
    egress: Limit | None
    """How fast frames may leave the guest for here."""
    ingress: Limit | None
    """How fast frames may come from here to the guest."""


@owned
class NetBackend(ABC):
    """What a network adapter, or a port of a switch, is connected to. One use at a time.

    ``egress`` is what comes from the guest, ``ingress`` what goes to it.
    """

    mtu: int | None = None
    """What it carries at most, told to the guest; None: it does not say."""
    queues: int = 1
    """How many queue pairs it can serve."""

    @checked
    def __init__(
        self,
        *,
        tap: Pcap | None = None,
        filters: Iterable[Rule | Hook] = (),
        egress: Limit | None = None,
        ingress: Limit | None = None,
    ) -> None:
        self.tap = tap
        self.filters: tuple[Rule | Hook, ...] = _checked(filters)
        self.egress = egress
        self.ingress = ingress
        self.end: End | None = None
        """Its end of the link, while it is open."""
        self.label = ""
        """What it is called in captures; empty: the adapter that leads here, its own name, or what it is."""
        self.carrier = True
        """Whether somebody is at the other end now, where that can be told."""
        self._on_carrier: Callable[[], None] = _nothing
        self._opening = False
        self._closing = False
        self._last_stats: NetStats | None = None
        self._filter: Filter | None = None
        self._capture: Capture | None = None

    @property
    def _owner(self) -> Loop | None:
        return self.end.plane.loop if self.end else None

    @property
    def plane(self) -> Plane | None:
        """The plane that it has to be in; None: any, it is made where its peer is."""
        return None

    @property
    def needs_loop(self) -> bool:
        """Whether the program takes part in what passes, so that frames are best moved on its loop."""
        if not self.filters:
            return False
        from aiokvm.net.hook import Hook

        return any(isinstance(item, Hook) for item in self.filters)

    @abstractmethod
    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        """Makes the end. One that raises left nothing behind.

        ``on_lost(why)`` is called on the loop when nothing will ever come from here again: the peer has
        gone, the device was deleted. The end stays until `close`.
        """

    async def _wind_down(self, end: End) -> None:  # noqa: B027
        """Ends what would take long all at once, before ``end`` is closed."""

    @abstractmethod
    async def _close(self) -> None:
        """Gives back what `_open` got; the end has been closed."""

    async def open(
        self,
        plane: Plane,
        on_lost: Callable[[str], None],
        adapter: str = "",
        on_carrier: Callable[[], None] | None = None,
    ) -> End:
        """An end in this plane, with the policy in force. ``adapter`` is what a machine calls its own end.

        ``on_carrier()`` is called on the loop when `carrier` has changed, also while it is being opened.

        Raises ConfigError if it is in use, OSError and AiokvmError for what cannot be had.
        """
        if self.end or self._opening or self._closing:
            raise ConfigError(f"{self!r} is in use already: every adapter needs a backend of its own")
        self._opening = True
        self.carrier = True
        self._on_carrier = on_carrier or _nothing
        try:
            end = await self._open(plane, on_lost)
            self.end = end
        finally:
            self._opening = False
        try:
            await self._set_policy(end, adapter)
        except BaseException:
            await plane.loop.uncancelled(self.close)
            raise
        return end

    async def close(self) -> None:
        """Close the end and give everything back. Idempotent; to be called where nothing cancels it."""
        end, self.end = self.end, None
        if end is None:
            return
        self._on_carrier = _nothing
        self._last_stats = end.stats()
        self._closing = True
        try:
            await self._wind_down(end)
        finally:
            self._last_stats = end.stats()
            end.close()
            if self._filter:
                self._filter.close()
                self._filter = None
            capture, self._capture = self._capture, None
            try:
                await self._close()
            finally:
                self._closing = False
                if capture:
                    await capture.close()

    def stats(self) -> NetStats:
        """What it has sent to the guest and received from it. Raises StateError before it was opened."""
        if self.end:
            return self.end.stats()
        if self._last_stats is None:
            raise StateError(f"{self!r} was never in use")
        return self._last_stats

    def _set_carrier(self, carrier: bool) -> None:
        """For a backend whose peer comes and goes."""
        if carrier != self.carrier:
            self.carrier = carrier
            self._on_carrier()

    @checked
    async def set_filters(self, filters: Iterable[Rule | Hook]) -> None:
        """Have other filters from now on, also while it is in use.

        Flows that the old ones have let through go on as far as the new ones allow them; hooks are asked
        anew. Raises ConfigError for what are no filters, and leaves the old ones in force.
        """
        items = _checked(filters)
        if self.end and self._filter:
            self._filter.replace(items)
        elif self.end and items:
            self._filter = self._new_filter(self.end, items)
            self._apply(self.end)
        self.filters = items

    def _new_filter(self, end: End, items: Sequence[Rule | Hook]) -> Filter:
        from aiokvm.net.hook import Filter

        return Filter(end, items)

    async def _set_policy(self, end: End, adapter: str) -> None:
        if self.tap:
            name = self.label or adapter or getattr(self, "name", None) or type(self).__name__.lower()
            self._capture = await self.tap._attach(end, str(name))
        if self.filters:
            self._filter = self._new_filter(end, self.filters)
        self._apply(end)

    def _apply(self, end: End) -> None:
        limits = (self.ingress, self.egress)
        sent, received = (limit.core if limit else None for limit in limits)
        end.set_policy(
            rules=self._filter.core if self._filter else None,
            capture=self._capture.core if self._capture else None,
            sent=sent,
            received=received,
            keep=(*limits, self._filter, self._capture),
        )


def _nothing() -> None:
    pass


def _checked(filters: Iterable[Rule | Hook]) -> tuple[Rule | Hook, ...]:
    if not filters:
        return ()
    from aiokvm.net.hook import check_filters

    return check_filters(filters)
