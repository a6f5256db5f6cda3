"""The network adapters of one machine: a backend each, a virtio network device, and what moves the frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, StateError
from aiokvm.machine import events
from aiokvm.machine.net_core import NicData
from aiokvm.net.backend import NetBackend
from aiokvm.net.nic import Nic
from aiokvm.virtio.net import NetLayout, VirtioNet

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AsyncExitStack

    from aiokvm.aio import Handle, Loop
    from aiokvm.logs import SeldomLogger
    from aiokvm.net.plane import NetStats

# When a guest is asked again to tell a new network where it is; QEMU does it about so.
ANNOUNCE_MS = (50, 200, 450, 800, 1250)


@owned
class VmNic:
    """A network adapter of a machine, in ``vm.nets``; ``mac`` is what its guest was given."""

    def __init__(self, nets: Nets, name: str, config: Nic) -> None:
        self.name = name
        self.config = config
        self.backend = config.backend
        """Where it leads."""
        self.mac = str(config.mac)
        self.lost: str | None = None
        """Why nothing comes from the backend any more; None while it is there."""
        self._nets = nets
        self._up = config.up
        self._rounds: list[Handle] = []
        self._data = NicData(nets.loop, name, config.dataplane, self._on_lost, self._on_carrier)
        self._data.set_up(config.up)
        self.device: VirtioNet
        """What its driver sees, from `open` on."""

    def __repr__(self) -> str:
        return f"<VmNic {self.name} {self.mac} {self.backend!r} {'up' if self.is_up else 'down'}>"

    def _layout(self) -> NetLayout:
        config = self.config
        return NetLayout(
            mac=config.mac_bytes,
            pairs=config.queues,
            queue_size=config.queue_size,
            mtu=self.backend.mtu if config.mtu is None else config.mtu,
            up=self._has_link,
            offload=config.offload,
            speed_mbps=config.speed_mbps,
        )

    @property
    def _owner(self) -> Loop | None:
        return None if self._nets.ended else self._nets.loop

    @property
    def is_up(self) -> bool:
        """Whether the guest sees a link. What is sent over one that is down is dropped."""
        return self.device.is_up

    @property
    def tid(self) -> int:
        """The id of the thread that moves its frames; 0 if the loop does."""
        return self._data.tid

    def stats(self) -> NetStats:
        """Frames and bytes since the machine was made: "sent" is what the guest has sent."""
        return self._data.stats()

    @checked
    async def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it; the guest is told. A backend whose peer is not there has no link.

        Raises StateError if the backend is lost, or the machine has ended.
        """
        self._require_open()
        if up and self.lost is not None:
            raise StateError(f"{self.name} has lost {self.backend!r} ({self.lost}): replace it first")
        self._up = up
        self._follow()

    @checked
    async def replace(self, backend: NetBackend) -> None:
        """Lead somewhere else while the guest runs: its link goes down and up, and it is to announce itself.

        The backend that it had is closed last. Nothing has changed if opening the new one raises or is
        cancelled: StateError if the machine has ended, ConfigError if it cannot be used, and what it raises.
        """
        self._require_open()
        if not isinstance(backend, NetBackend):
            raise ConfigError(f"{backend!r} is no network: give a net.User or another NetBackend")

        def check_mtu() -> None:
            mtu = self.device.layout.mtu
            if mtu is not None and backend.mtu is not None and backend.mtu < mtu:
                raise ConfigError(
                    f"{self.name} was given an MTU of {mtu}, and {backend!r} carries {backend.mtu}"
                )

        def swap() -> None:
            # The guest alone is told: what it sends meanwhile waits for the new one.
            if self.is_up:
                self._tell_link(False)
            self.backend = backend
            self.lost = None

        def swapped() -> None:
            # It may be lost already.
            self._follow()
            if self.is_up:
                self._announce()

        check_mtu()
        # Of a TAP it is known when it is open.
        await self._data.connect(backend, check_mtu, swap, swapped)

    async def open(self) -> None:
        """Open the backend, and make the device, which may have its MTU."""
        await self._data.connect(self.backend)
        self.device = VirtioNet(self._layout(), self._data)
        self._data.set_up(self.is_up)

    async def close(self) -> None:
        """Of a machine that was never made: there is nothing to drain."""
        closed = self._data.close()
        if closed is not None:
            await closed

    def _require_open(self) -> None:
        if self._nets.ended:
            raise StateError(f"{self.name}: the machine has ended")

    @property
    def _has_link(self) -> bool:
        return self._up and self.lost is None and self.backend.carrier

    def _follow(self) -> None:
        self._set_link(self._has_link)

    def _on_carrier(self, backend: NetBackend) -> None:
        if backend is self.backend and not self._nets.ended:
            self._follow()

    def _set_link(self, up: bool) -> None:
        if self not in self._nets.all or up == self.is_up:
            return
        self._data.set_up(up)
        self._tell_link(up)

    def _tell_link(self, up: bool) -> None:
        self.device.set_link(up)
        self._nets.hub.emit(events.LinkChanged(self._nets.machine, self.name, up))

    def _announce(self) -> None:
        # Linux sends what it has to say before it takes the link for up, and then it goes nowhere.
        self.stop()
        self.device.announce()
        now_ns = self._nets.loop.now_ns()
        for wait_ms in ANNOUNCE_MS:
            at_ns = now_ns + wait_ms * 1_000_000
            self._rounds.append(self._nets.loop.call_at(at_ns, self.device.announce))

    def stop(self) -> None:
        """The machine has ended. Idempotent."""
        while self._rounds:
            self._rounds.pop().cancel()

    def _on_lost(self, backend: NetBackend, why: str) -> None:
        if backend is not self.backend or self.lost is not None or self._nets.ended:
            return
        self.lost = why
        self._nets.lost.warning("%s: %r is lost: %s", self.name, backend, why)
        self._nets.hub.emit(events.NicLost(self._nets.machine, self.name, why))
        self._follow()


class Nets:
    """All of one machine."""

    def __init__(self, loop: Loop, machine: str, hub: events.EventHub, logger: SeldomLogger) -> None:
        self.loop = loop
        self.machine = machine
        self.hub = hub
        self.logger = logger
        self.lost = logger.kind()
        self.ended = False
        self.all: tuple[VmNic, ...] = ()

    async def open(self, nets: Iterable[Nic | NetBackend], undo: AsyncExitStack) -> None:
        """Open the backends; ``undo`` closes them. Raises what they raise, and ConfigError."""
        for index, item in enumerate(nets):
            config = item if isinstance(item, Nic) else Nic(item)
            if any(config.backend is other.backend for other in self.all):
                raise ConfigError(f"{config.backend!r} is given twice")
            if any(config.mac == other.mac for other in self.all):
                raise ConfigError(f"two adapters of a machine have the address {config.mac}")
            nic = VmNic(self, f"{self.machine}/net{index}", config)
            undo.push_async_callback(self.loop.uncancelled, nic.close)
            await nic.open()
            self.all += (nic,)
            nic._follow()
            self.logger.always.info("%s: %r, %s", nic.name, nic.backend, nic.mac)

    def stop(self) -> None:
        """The machine has ended. Idempotent."""
        self.ended = True
        for nic in self.all:
            nic.stop()
