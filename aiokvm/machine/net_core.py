"""The frames of one adapter: what the loop has to do with ``_core/net_nic.c``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import anyio

from aiokvm._core import ffi, lib
from aiokvm.errors import AiokvmError, ConfigError, StateError
from aiokvm.net.plane import NetStats, make_plane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop
    from aiokvm.net.backend import NetBackend
    from aiokvm.net.plane import End, Plane
    from aiokvm.virtio.device import VirtioHost
    from aiokvm.virtio.net_control import ReceiveFilter
    from aiokvm.virtio.queue import Virtqueue

_BROKEN = {
    lib.AIOKVM_NET_NIC_EHEADER: "a receive buffer is shorter than its header, or has a part to be read"
}


class NicData:
    """`aiokvm.virtio.net.NetData` of an adapter, and its link to a backend; ``dataplane`` is `Nic`'s.

    ``on_lost(backend, why)`` is told when a backend has nothing more to give, ``on_carrier(backend)`` when
    its `NetBackend.carrier` has changed.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        dataplane: str,
        on_lost: Callable[[NetBackend, str], None],
        on_carrier: Callable[[NetBackend], None],
    ) -> None:
        self._loop = loop
        self._name = name
        self._dataplane = dataplane
        self._on_lost = on_lost
        self._on_carrier = on_carrier
        self._backend: NetBackend | None = None
        self._own_plane: Plane | None = None
        self._end: End | None = None
        self._up = True
        self._before = _sum([])
        self._host: VirtioHost | None = None
        # They keep guest RAM mapped while the plane uses them.
        self._queues: tuple[Virtqueue, ...] = ()
        self._connecting = anyio.Lock()
        self._opening: anyio.CancelScope | None = None
        self._closing = False
        self._closed = anyio.Event()

    @property
    def tid(self) -> int:
        """The id of the thread that moves the frames; 0 if it is the loop's."""
        return self._end.plane.tid if self._end and not self._closing else 0

    def stats(self) -> NetStats:
        """What the guest has sent and received, whatever the backends were."""
        return _sum([self._before, self._end.stats()] if self._end else [self._before])

    def set_up(self, up: bool) -> None:
        """Have the link drop what is sent, or not."""
        self._up = up
        if self._end:
            self._end.set_up(up)

    async def connect(
        self,
        backend: NetBackend,
        opened: Callable[[], None] = lambda: None,
        swap: Callable[[], None] = lambda: None,
        swapped: Callable[[], None] = lambda: None,
    ) -> None:
        """Open a backend and link the adapter to it; the one before is closed.

        ``opened`` is called when it is open and may refuse it by raising, ``swap`` before the link changes,
        and ``swapped`` after it. Nothing has changed if opening raises: StateError when the machine has
        ended, and what `NetBackend.open` raises.
        """
        async with self._connecting:
            self._require_open()
            if backend.plane and self._dataplane == "thread":
                raise ConfigError(
                    f"{self._name}: {backend!r} has a data plane already; leave the adapter's at 'auto'"
                )
            own = None if backend.plane else self._plane(backend)
            plane = backend.plane or own
            assert plane
            try:
                old = await self._open(backend, plane, opened, swap)
            except BaseException:
                if own and own is not self._own_plane:
                    own.close()
                raise
            before, self._backend = self._backend, backend
            plane_before, self._own_plane = self._own_plane, own
            if old:
                self._before = _sum([self._before, old.stats()])
                old.close()
            try:
                # The guest does not wait for what the old one has to end.
                swapped()
                if before:
                    await self._loop.uncancelled(before.close)
            finally:
                if plane_before and plane_before is not own:
                    plane_before.close()

    async def _open(
        self, backend: NetBackend, plane: Plane, opened: Callable[[], None], swap: Callable[[], None]
    ) -> End | None:
        try:
            with anyio.CancelScope() as self._opening:
                await backend.open(
                    plane,
                    lambda why: self._on_lost(backend, why),
                    self._name,
                    lambda: self._on_carrier(backend),
                )
        finally:
            self._opening = None
        peer = backend.end
        try:
            self._require_open()
            assert peer is not None
            opened()
            return self._link(plane, peer, swap)
        except BaseException:
            await self._loop.uncancelled(backend.close)
            raise

    def _require_open(self) -> None:
        if self._closing:
            raise StateError(f"{self._name}: the machine has ended")

    def _plane(self, backend: NetBackend) -> Plane:
        """The one that there is, or another if it is not where this backend's frames are to be moved."""
        dataplane = self._dataplane
        if dataplane == "auto" and backend.needs_loop:
            dataplane = "loop"
        plane = self._own_plane
        if plane and bool(plane.tid) == (dataplane != "loop"):
            return plane
        return make_plane(self._loop, self._name, dataplane)

    def _link(self, plane: Plane, peer: End, swap: Callable[[], None]) -> End | None:
        """An end in this plane that has what the one before had, which is given back."""
        error = ffi.new("int *")
        end = plane.adopt(lib.aiokvm_net_nic_new(plane.core, error), error[0], self._on_news)
        try:
            end.link(peer)
        except BaseException:
            end.close()
            raise
        swap()
        end.set_up(self._up)
        old, self._end = self._end, end
        if old:
            # Linked still: what waits would be dropped.
            self._check(lib.aiokvm_net_nic_move(old.core, end.core))
        return old

    # `aiokvm.virtio.net.NetData`.

    def activate(
        self,
        host: VirtioHost,
        features: int,
        queues: Sequence[Virtqueue],
        receive: ReceiveFilter,
        mtu: int | None,
    ) -> None:
        core = self._core
        if not core:
            return
        self._host = host
        self._queues = tuple(queues)
        self._check(lib.aiokvm_net_nic_set_features(core, features, mtu or 0))
        self.set_receive_filter(receive)
        for index, queue in enumerate(queues):
            if queue.ready:
                kick = host.take_queue(index)
                self._check(
                    lib.aiokvm_net_nic_set_queue(core, index, queue.core, queue.size, kick, host.notifier)
                )

    def set_receive_filter(self, receive: ReceiveFilter) -> None:
        if core := self._core:
            self._check(lib.aiokvm_net_nic_set_filter(core, _filter(receive)))

    def set_guest_offloads(self, features: int) -> None:
        if core := self._core:
            self._check(lib.aiokvm_net_nic_set_offloads(core, features))

    def set_pairs(self, pairs: int) -> None:
        if core := self._core:
            self._check(lib.aiokvm_net_nic_set_pairs(core, pairs))

    def reset(self) -> Awaitable[None] | None:
        for index in range(len(self._queues)):
            self.stop_queue(index)
        self._queues = ()
        self._host = None
        return None

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        # When this is over the plane touches it no more: nothing is in flight.
        if core := self._core:
            lib.aiokvm_net_nic_set_queue(core, queue, ffi.NULL, 0, -1, ffi.NULL)
        return None

    @property
    def _core(self) -> Pointer | None:
        return self._end.core if self._end and self._end.is_open else None

    def close(self) -> Awaitable[None] | None:
        if not self._closing:
            self._closing = True
            self.reset()
            # Also when nobody waits any more.
            self._loop.spawn(self._close, f"{self._name}: close")
        return self._closed.wait()

    async def _close(self) -> None:
        if self._opening:
            self._opening.cancel()
        try:
            async with self._connecting:
                if self._backend:
                    await self._backend.close()
        finally:
            if self._end:
                self._end.close()
            if self._own_plane:
                self._own_plane.close()
            self._closed.set()

    def _check(self, code: int) -> None:
        if code:
            raise AiokvmError(f"{self._name}: its queues cannot be served: {os.strerror(-code)}")

    def _on_news(self, news: int, error: int, detail: int) -> None:
        if news & lib.AIOKVM_NET_NEWS_BROKEN and self._host:
            words = _BROKEN.get(error) or ffi.string(lib.aiokvm_vring_strerror(error)).decode()
            self._host.needs_reset(f"queue {detail}: {words}")


def _sum(stats: Sequence[NetStats]) -> NetStats:
    return NetStats(*(sum(getattr(each, name) for each in stats) for name in NetStats.__slots__))


def _filter(receive: ReceiveFilter) -> Any:
    """The ``struct aiokvm_net_nic_filter *`` of what a driver wants."""
    result = ffi.new("struct aiokvm_net_nic_filter *")
    if receive.promiscuous:
        return result
    if receive.macs is not None:
        result.flags = lib.AIOKVM_NET_NIC_MAC_FILTER
        result.flags |= lib.AIOKVM_NET_NIC_ALLUNI if receive.alluni else 0
        result.flags |= lib.AIOKVM_NET_NIC_ALLMULTI if receive.allmulti else 0
        result.macs = len(receive.macs)
        for index, mac in enumerate(receive.macs):
            result.mac[index] = tuple(mac)
    if receive.vlans is not None:
        result.flags |= lib.AIOKVM_NET_NIC_VLAN_FILTER
        for vlan in receive.vlans:
            result.vlans[vlan // 32] |= 1 << vlan % 32
    return result
