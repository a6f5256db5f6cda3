"""A learning switch in the process: machines, and whatever else takes frames, are connected to its ports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from aiokvm._core import ffi, lib
from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import AiokvmError, ConfigError, StateError
from aiokvm.logs import SeldomLogger
from aiokvm.net.backend import NetBackend
from aiokvm.net.pace import Pace
from aiokvm.net.plane import Plane, check_dataplane, make_plane
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self, Unpack

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop
    from aiokvm.net.backend import Policy
    from aiokvm.net.plane import End

logger = get_logger("aiokvm.net")


class SwitchAddress(NamedTuple):
    """A station that a switch has heard: ``vlan`` is None at ports without any, ``age`` is in seconds."""

    mac: str
    vlan: int | None
    port: SwitchPort
    age: float


@dataclass(frozen=True, slots=True)
class SwitchStats:
    """What a switch has done so far, in frames; the last three count addresses.

    ``forwarded`` went to the one port where their receiver is, ``flooded`` to all, as it was not known or
    they are for many. ``filtered`` need not leave or may not: their receiver is where they came from, both
    ports are isolated, they are of a protocol between neighbours. ``dropped_source``: the source is no
    station, or an isolated port passes itself off as one at a port that is not. ``dropped_vlan``: their port
    is not in their VLAN. Addresses are ``learned``, ``moved`` to another port, and ``forgotten`` to make
    room. What had no room at a port is in the port's own statistics.
    """

    forwarded: int
    flooded: int
    filtered: int
    dropped_source: int
    dropped_vlan: int
    learned: int
    moved: int
    forgotten: int


@owned
class SwitchPort(NetBackend):
    """A port of a switch: `Switch.port` and `Switch.connect` make it.

    ``name`` tells it apart, ``backend`` is what is connected to it if that is no network adapter, and
    ``lost`` why nothing comes from there any more, empty while something may.
    """

    def __init__(
        self,
        switch: Switch,
        name: str,
        *,
        vlan: int | None,
        trunk: Iterable[int],
        isolated: bool,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(**policy)
        self.switch = switch
        self.name = name
        self.vlan = vlan
        self.trunk = tuple(sorted(set(trunk)))
        self.isolated = isolated
        self.backend: NetBackend | None = None
        self.lost = ""
        self._on_lost: Callable[[str], None] | None = None
        for number in (*self.trunk, *(() if vlan is None else (vlan,))):
            if not 1 <= number <= 4094:
                raise ConfigError(f"a VLAN is 1 to 4094, not {number}")

    def __repr__(self) -> str:
        return f"<port {self.name} of {self.switch!r}>"

    @property
    def plane(self) -> Plane:
        """That of the switch."""
        return self.switch._check_loop()

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        if plane is not self.plane:
            raise ConfigError(f"{self!r} can be used in the plane of its switch only: see `NetBackend.plane`")
        self.lost = ""
        self._on_lost = on_lost
        return self._make()

    def _make(self) -> End:
        core = self.switch._core
        trunk = ffi.new("uint16_t[]", self.trunk)
        config = ffi.new(
            "struct aiokvm_net_switch_port_config *",
            {
                "vlan": self.vlan or 0,
                "isolated": self.isolated,
                "trunk": trunk,
                "trunks": len(self.trunk),
            },
        )
        error = ffi.new("int *")
        end = self.plane.adopt(lib.aiokvm_net_switch_port_new(core, config, error), error[0], lambda *_: None)
        self.switch._ports[end.id] = self
        return end

    async def close(self) -> None:
        """Close it, as the machine does whose adapter is connected here."""
        if self.end:
            self.switch._ports.pop(self.end.id, None)
        await super().close()

    async def _close(self) -> None:
        self._on_lost = None

    def _lose(self, why: str) -> None:
        self.lost = self.lost or why
        if self._on_lost:
            self._on_lost(why)


@owned
class Switch:
    """A learning switch, IEEE 802.1Q without spanning tree, whose ports are used by machines of one loop.

    ``dataplane="thread"`` moves frames by a thread of its own, "loop" on the event loop, "auto" by a thread
    if one can be had. An address that is not heard of for ``ageing`` seconds is forgotten. ``beside`` is
    another switch: this one shares its plane, so that the two can be connected, and is closed with it.

    It keeps 8,192 addresses, of which one port may teach it 1,024: no guest can push out others'. Frames wait
    for a port that is blocked, 256 of them or 1 MiB, and its share of what the process has for them
    (`host_limits`); no other port waits for it.

    ``async with`` opens and closes it. Closing it under machines takes the link of their adapters down.
    """

    @checked
    def __init__(
        self,
        name: str = "",
        *,
        dataplane: Literal["auto", "loop", "thread"] = "auto",
        ageing: float = 300.0,
        beside: Switch | None = None,
    ) -> None:
        check_dataplane(dataplane)
        if not 0 < ageing <= 1e6:
            raise ConfigError(f"ageing is more than 0 and up to 1,000,000 seconds, not {ageing}")
        self.name = name
        self.dataplane = dataplane
        self._ageing_ns = int(ageing * 1e9)
        self._beside = beside
        self._log = SeldomLogger(logger)
        self._children: list[Switch] = []
        self._plane: Plane | None = None
        self._core: Pointer = ffi.NULL
        self._ports: dict[int, SwitchPort] = {}
        # Other switches that are connected, each as often as it is.
        self._joined: list[Switch] = []
        self._made = 0

    def __repr__(self) -> str:
        return f"net.Switch({self.name!r})"

    @property
    def _owner(self) -> Loop | None:
        return self._plane.loop if self._plane else None

    async def open(self) -> None:
        """Begin to switch. Raises StateError if it is open, ConfigError if ``beside`` is not, AiokvmError."""
        if self._plane:
            raise StateError(f"{self!r} is open")
        if self._beside:
            plane = self._beside._check_loop()
        else:
            plane = make_plane(current_loop(), f"net-{self.name or 'switch'}", self.dataplane)
        error = ffi.new("int *")
        config = ffi.new("struct aiokvm_net_switch_config *", {"ageing_ns": self._ageing_ns})
        core = lib.aiokvm_net_switch_new(plane.core, config, error)
        if not core:
            if not self._beside:
                plane.close()
            raise AiokvmError(f"no switch: {os.strerror(error[0])}")
        self._core = core
        self._plane = plane
        if self._beside:
            self._beside._children.append(self)

    async def close(self) -> None:
        """Forward nothing any more. Idempotent; to be called where nothing cancels it.

        What was connected by `connect` is closed; machines with adapters here are told.
        """
        for child in tuple(self._children):
            await child.close()
        if not self._plane:
            return
        plane, self._plane = self._plane, None
        pace = Pace(plane.loop)
        for port in tuple(self._ports.values()):
            if port.backend:
                await self._disconnect(port)
            elif port.end:
                port.end.unlink()
                port._lose(f"{self!r} was closed")
            await pace.step()
        self._ports.clear()
        lib.aiokvm_net_switch_free(self._core)
        self._core = ffi.NULL
        if self._beside:
            self._beside._children.remove(self)
        else:
            plane.retire()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await current_loop().uncancelled(self.close)

    @checked
    def port(
        self,
        *,
        name: str = "",
        vlan: int | None = None,
        trunk: Iterable[int] = (),
        isolated: bool = False,
        **policy: Unpack[Policy],
    ) -> SwitchPort:
        """A port for a network adapter: ``VM.create(nets=[switch.port()])``.

        ``vlan`` (1 to 4094): of frames without a tag; ``trunk``: VLANs whose frames have tags. A port with
        neither passes frames, tagged or not, to other such ports only. Frames do not go from one port that
        is ``isolated`` to another, and it cannot pass itself off as a station at a port that is not: not as
        the gateway. Raises ConfigError for a VLAN that cannot be.
        """
        self._made += 1
        name = name or str(self._made)
        return SwitchPort(self, name, vlan=vlan, trunk=trunk, isolated=isolated, **policy)

    @checked
    async def connect(
        self,
        backend: NetBackend,
        *,
        name: str = "",
        vlan: int | None = None,
        trunk: Iterable[int] = (),
        isolated: bool = False,
        on_lost: Callable[[SwitchPort, str], None] | None = None,
    ) -> SwitchPort:
        """Connect a backend (a TAP, NAT, a `Port`...) to a new port; the arguments are those of `port`.

        A port of another switch, which was opened ``beside`` this one, connects the two. Limits, filters and
        captures are the backend's. ``on_lost(port, why)`` is called when nothing comes from it any more; it
        stays connected until `disconnect`.

        Raises ConfigError if it is in use, or a port of a switch that is connected to this one already: a
        frame would go round for ever. StateError if the switch is not open, and what the backend raises.
        """
        plane = self._check_loop()
        port = self.port(name=name, vlan=vlan, trunk=trunk, isolated=isolated)
        if isinstance(backend, SwitchPort):
            self._check_joining(backend.switch, plane)
            self._join(backend.switch)
        try:
            await self._connect(port, backend, plane, on_lost)
        except BaseException:
            if isinstance(backend, SwitchPort):
                self._part(backend.switch)
            raise
        return port

    async def _connect(
        self,
        port: SwitchPort,
        backend: NetBackend,
        plane: Plane,
        on_lost: Callable[[SwitchPort, str], None] | None,
    ) -> None:
        def lose(why: str) -> None:
            self._log.warning("%r: nothing comes from %r any more: %s", self, backend, why)
            port._lose(why)

        report = (lambda why: on_lost(port, why)) if on_lost else (lambda _: None)
        end = await port.open(plane, report)
        try:
            other = await backend.open(plane, lose)
            port.backend = backend
            if self._plane is not plane:
                raise StateError(f"{self!r} was closed while {backend!r} was being connected")
            end.link(other)
        except BaseException:
            await current_loop().uncancelled(lambda: _close_both(port))
            raise

    @checked
    async def disconnect(self, port: SwitchPort) -> None:
        """Close a port that `connect` made, and what is connected there. Idempotent.

        Raises ConfigError for a port of an adapter: replace the adapter's backend instead.
        """
        if port.switch is not self or (port.end and not port.backend):
            raise ConfigError(f"{port!r} was not made by {self!r}.connect")
        await current_loop().uncancelled(lambda: self._disconnect(port))

    async def _disconnect(self, port: SwitchPort) -> None:
        if isinstance(port.backend, SwitchPort):
            self._part(port.backend.switch)
        await _close_both(port)

    def table(self) -> list[SwitchAddress]:
        """The addresses that it knows, port by port, latest first. Raises StateError if it is not open."""
        self._check_open()
        most = lib.AIOKVM_NET_SWITCH_ADDRESSES
        entries = ffi.new("struct aiokvm_net_switch_entry[]", most)
        count = lib.aiokvm_net_switch_table(self._core, entries, most)
        return [
            SwitchAddress(
                bytes(entry.mac).hex(":"), entry.vlan or None, self._ports[entry.port], entry.age_ns / 1e9
            )
            for entry in entries[0 : max(count, 0)]
            if entry.port in self._ports
        ]

    def stats(self) -> SwitchStats:
        """What it has done so far. Raises StateError if it is not open."""
        self._check_open()
        stats = ffi.new("struct aiokvm_net_switch_stats *")
        lib.aiokvm_net_switch_stats(self._core, stats)
        return SwitchStats(**{name: int(getattr(stats, name)) for name in SwitchStats.__slots__})

    @property
    def ports(self) -> tuple[SwitchPort, ...]:
        """Those in use."""
        return tuple(self._ports.values())

    def _check_open(self) -> Plane:
        if not self._plane:
            raise StateError(f"{self!r} is not open: use it within `async with`")
        return self._plane

    def _check_loop(self) -> Plane:
        plane = self._check_open()
        if current_loop() != plane.loop:
            raise ConfigError(f"{self!r} belongs to another event loop: its machines are to run on that one")
        return plane

    # ---- switches that are connected ----

    def _check_joining(self, other: Switch, plane: Plane) -> None:
        if other._check_loop() is not plane:
            raise ConfigError(
                f"{self!r} and {other!r} cannot be connected: make one of them beside the other"
            )
        if other is self:
            raise ConfigError(f"{self!r} cannot be connected to itself: this would be a loop")
        reached, found = {self}, [self]
        while found:
            new = set(found.pop()._joined) - reached
            reached |= new
            found += new
        if other in reached:
            raise ConfigError(f"{self!r} and {other!r} are connected already: this would be a loop")

    def _join(self, other: Switch) -> None:
        self._joined.append(other)
        other._joined.append(self)

    def _part(self, other: Switch) -> None:
        self._joined.remove(other)
        other._joined.remove(self)


async def _close_both(port: SwitchPort) -> None:
    backend, port.backend = port.backend, None
    try:
        if backend:
            await backend.close()
    finally:
        await port.close()
