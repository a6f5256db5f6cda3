"""net/switch.py: who hears whom."""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokvm import ConfigError, Limit, host_limits
from aiokvm.aio import current_loop
from aiokvm.budget import FRAME_BYTES, Share
from aiokvm.errors import StateError
from aiokvm.machine.events import EventHub
from aiokvm.machine.log import machine_logger
from aiokvm.machine.nets import Nets
from aiokvm.net import NetBackend, Port, Switch, SwitchPort
from tests.turns import counted_turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from aiokvm.net.plane import End, Plane

LIMIT_S = 60.0
EVERYBODY = b"\xff" * 6


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 0, number))


def frame(to: bytes, source: bytes, tag: int | None = None) -> bytes:
    tagged = b"" if tag is None else b"\x81\x00" + tag.to_bytes(2, "big")
    return to + source + tagged + b"\x08\x06" + bytes(46)


def taken(port: Port) -> list[bytes]:
    """What has come to it."""
    found: list[bytes] = []
    while batch := port.take_nowait(256):
        found += map(bytes, batch)
    return found


def exists(plane: Plane) -> bool:
    return bool(plane.core)


class Refuses(NetBackend):
    """Cannot be had."""

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        raise OSError(5, "broken")

    async def _close(self) -> None:
        raise AssertionError("was never open")


class Lost(Port):
    """Can be told that it is gone."""

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        self.lose = on_lost
        return await super()._open(plane, on_lost)


@asynccontextmanager
async def adapter(port: SwitchPort, lost: list[str] | None = None) -> AsyncIterator[Port]:
    """What a machine does with an adapter that is connected to a port of a switch."""
    nic = Port()
    plane = port.plane
    end = await port.open(plane, lost.append if lost is not None else lambda why: None)
    try:
        (await nic.open(plane, lambda why: None)).link(end)
        yield nic
    finally:
        with anyio.CancelScope(shield=True):
            await port.close()
            await nic.close()


@pytest.mark.anyio
class TestSwitch:
    @pytest.mark.parametrize("dataplane", ["loop", "thread"])
    async def test_adapters_and_backends_meet(self, dataplane: Any) -> None:
        async with Switch("hub", dataplane=dataplane) as switch:
            left, right = switch.port(), switch.port(name="right")
            async with adapter(left) as one, adapter(right) as two:
                three = Port()
                with anyio.fail_after(LIMIT_S):
                    third = await switch.connect(three)
                    await one.send(frame(EVERYBODY, mac(1)))
                    for port in (two, three):
                        assert bytes(await anext(port)) == frame(EVERYBODY, mac(1))
                    await two.send(frame(mac(1), mac(2)))
                    assert bytes(await anext(one)) == frame(mac(1), mac(2))
                    await three.send(frame(EVERYBODY, mac(3)))
                    for port in (one, two):
                        assert bytes(await anext(port)) == frame(EVERYBODY, mac(3))
                assert taken(three) == []
                table = {entry.mac: entry for entry in switch.table()}
                assert table["02:00:00:00:00:01"].port is left
                assert table["02:00:00:00:00:02"].port is right
                assert table["02:00:00:00:00:03"].port is third
                assert table["02:00:00:00:00:03"].vlan is None
                assert 0 <= table["02:00:00:00:00:01"].age < LIMIT_S
                assert set(switch.ports) == {left, right, third}
                stats = switch.stats()
                assert (stats.forwarded, stats.flooded, stats.learned) == (1, 2, 3)
                await switch.disconnect(third)
                await switch.disconnect(third)
                assert three.end is None
                assert set(switch.ports) == {left, right}
                with pytest.raises(ConfigError, match="was not made by"):
                    await switch.disconnect(left)
                assert left.stats().sent_frames == 2

    async def test_vlans_and_isolation(self) -> None:
        async with Switch() as switch:
            ports = [Port() for _ in range(5)]
            for port, options in zip(
                ports,
                ({"vlan": 10}, {"vlan": 10, "isolated": True}, {"trunk": (10, 20)}, {"vlan": 20}, {}),
                strict=True,
            ):
                await switch.connect(port, **options)  # type: ignore[arg-type]
            ports[0].send_nowait(frame(EVERYBODY, mac(1)))
            heard = [taken(port) for port in ports]
            assert heard == [[], [frame(EVERYBODY, mac(1))], [frame(EVERYBODY, mac(1), 10)], [], []]
            ports[2].send_nowait(frame(EVERYBODY, mac(2), 20))
            assert [len(taken(port)) for port in ports] == [0, 0, 0, 1, 0]
            assert {(entry.mac[-1], entry.vlan) for entry in switch.table()} == {("1", 10), ("2", 20)}

    async def test_switches_are_connected_and_never_in_a_circle(self) -> None:
        async with Switch("a") as a, Switch("b", beside=a) as b, Switch("c", beside=b) as c:
            trunk = await a.connect(b.port(trunk=(10,)), trunk=(10,))
            await b.connect(c.port())
            for one, other in ((a, b), (b, a), (a, a), (a, c), (c, a)):
                with pytest.raises(ConfigError, match="loop"):
                    await one.connect(other.port())
            near, far = Port(), Port()
            await a.connect(near, vlan=10)
            await b.connect(far, vlan=10)
            near.send_nowait(frame(EVERYBODY, mac(1)))
            assert taken(far) == [frame(EVERYBODY, mac(1))]
            await a.disconnect(trunk)
            near.send_nowait(frame(EVERYBODY, mac(1)))
            assert taken(far) == []
            await c.connect(a.port())
            async with Switch("apart") as apart:
                with pytest.raises(ConfigError, match="beside"):
                    await a.connect(apart.port())

    async def test_closing_it_tells_those_who_are_connected(self) -> None:
        lost: list[str] = []
        async with AsyncExitStack() as stack:
            async with Switch("gone") as switch:
                port = switch.port()
                nic = await stack.enter_async_context(adapter(port, lost))
                other = Port()
                await switch.connect(other)
            assert lost == [f"{switch!r} was closed"]
            assert port.lost == lost[0]
            assert other.end is None
            # The adapter still has its end, which nobody hears.
            assert nic.send_nowait(frame(EVERYBODY, mac(1))) == 1
            assert nic.stats().dropped_down == 1
            for call in (switch.table, switch.stats, lambda: port.plane):
                with pytest.raises(StateError, match="not open"):
                    call()
        assert nic.end is None
        # It can be opened anew.
        async with switch, adapter(switch.port()):
            pass
        await switch.close()

    async def test_a_machine_whose_switch_is_closed(self) -> None:
        async with AsyncExitStack() as undo:
            nets = Nets(current_loop(), "vm", EventHub(), machine_logger("vm"))
            async with Switch("gone", dataplane="thread") as switch:
                port = switch.port()
                plane = port.plane
                await nets.open([port], undo)
                [nic] = nets.all
                assert nic.tid == plane.tid
                async with Switch(beside=switch) as other:
                    with pytest.raises(ConfigError, match="in use"):
                        await other.connect(port)
                    assert other.ports == ()
            assert nic.lost == f"{switch!r} was closed"
            assert nic.stats().sent_frames == 0
            # Its end is where the switch was, until it leads somewhere else.
            assert exists(plane)
            await nic.replace(Port())
            assert not exists(plane)
            assert not nic.lost
            async with Switch() as last:
                await nic.replace(last.port())
                assert last.ports[0].end
        assert nic.backend.end is None

    async def test_a_switch_beside_another_is_closed_with_it(self) -> None:
        async with Switch("a") as a:
            b = Switch("b", beside=a)
            await b.open()
            with pytest.raises(StateError, match="is open"):
                await b.open()
            port = Port()
            await b.connect(port)
        assert port.end is None
        with pytest.raises(StateError):
            b.stats()
        with pytest.raises(StateError, match="not open"):
            await b.open()

    async def test_what_cannot_be_connected_leaves_nothing(self) -> None:
        async with Switch() as switch:
            with pytest.raises(OSError, match="broken"):
                await switch.connect(Refuses())
            used = Port()
            await switch.connect(used)
            with pytest.raises(ConfigError, match="in use"):
                await switch.connect(used)
            assert used.end
            assert len(switch.ports) == 1
            for options in ({"vlan": 0}, {"vlan": 4095}, {"trunk": (1, 5000)}):
                with pytest.raises(ConfigError, match="VLAN"):
                    switch.port(**options)
        with pytest.raises(StateError, match="not open"):
            await switch.connect(Port())
        with pytest.raises(StateError, match="not open"):
            switch.table()

    async def test_a_backend_that_is_lost(self) -> None:
        told: list[tuple[SwitchPort, str]] = []
        async with Switch() as switch:
            backend = Lost()
            port = await switch.connect(backend, on_lost=lambda port, why: told.append((port, why)))
            quiet = Lost()
            await switch.connect(quiet)
            for each in (backend, quiet):
                each.lose("deleted")
            assert told == [(port, "deleted")]
            assert port.lost == "deleted"
            await switch.disconnect(port)

    async def test_a_machine_of_another_loop_is_refused(self) -> None:
        refused: list[ConfigError] = []

        async def use() -> None:
            try:
                _ = port.plane
            except ConfigError as error:
                refused.append(error)

        async with Switch("here") as switch:
            port = switch.port()
            for backend in ("asyncio", "trio"):
                thread = threading.Thread(target=lambda name=backend: anyio.run(use, backend=name))
                thread.start()
                await anyio.to_thread.run_sync(thread.join)
        assert [("another event loop" in str(error)) for error in refused] == [True, True]

    async def test_a_flood_of_one_leaves_the_others_their_turn(self) -> None:
        async with Switch() as switch, anyio.create_task_group() as group:
            ports = [Port(on_full="drop") for _ in range(40)]
            for port in ports:
                await switch.connect(port)

            async def flood() -> None:
                while True:
                    await ports[0].send([frame(EVERYBODY, mac(1))] * 100)

            group.start_soon(flood)
            with anyio.fail_after(LIMIT_S):
                for _ in range(20):
                    await ports[1].send(frame(EVERYBODY, mac(2)))
                    while not any(heard[6:12] == mac(2) for heard in taken(ports[2])):
                        await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    async def test_many_ports_are_closed_turn_by_turn(self) -> None:
        switch = Switch()
        await switch.open()
        for _ in range(300):
            await switch.connect(Port())
            await anyio.lowlevel.checkpoint()
        async with counted_turns() as turns:
            await switch.close()
            # One takes some 150 us, less on a fast machine.
            assert turns.count > 2

    async def test_ports_that_are_flooded_leave_what_others_need(self) -> None:
        async def waiting() -> Limit:
            name = "frames that wait in switches and ports"
            limits = await anyio.to_thread.run_sync(host_limits)
            return next(limit for limit in limits if limit.name == name)

        def flooded() -> Port:
            return Port(depth=65536, bytes=16 << 20, on_full="drop")

        before = await waiting()
        others = Share(FRAME_BYTES)
        others.add(before.value - before.used - (8 << 20))
        long = frame(EVERYBODY, mac(1)) + bytes(1440)
        async with Switch() as switch:
            sender, first, second = Port(), flooded(), flooded()
            await switch.connect(sender)
            for flooded_port in (first, second):
                await switch.connect(flooded_port)
                await sender.send([long] * 3000)
                assert flooded_port.stats().dropped_full
            assert before.value - (4 << 20) < (await waiting()).used < before.value
            assert len(taken(first)) > len(taken(second)) > 500
        others.give(1 << 62)
        assert (await waiting()).used == before.used


def test_what_a_switch_cannot_be() -> None:
    with pytest.raises(ConfigError, match="dataplane"):
        Switch(dataplane="process")  # type: ignore[arg-type]
    for ageing in (0, -1, 1e9, float("nan")):
        with pytest.raises(ConfigError, match="ageing"):
            Switch(ageing=ageing)


class Model:
    """A switch as the standard describes it, without haste."""

    def __init__(self, ports: Sequence[tuple[int | None, frozenset[int], bool]]) -> None:
        self.ports = ports
        self.known: dict[tuple[int | None, int], int] = {}

    def vlan(self, port: int, tag: int | None) -> int | Refused | None:
        vlan, trunk, _ = self.ports[port]
        if vlan is None and not trunk:
            return None
        if tag:
            return tag if tag in trunk else REFUSED
        return REFUSED if vlan is None else vlan

    def form(self, port: int, vlan: int | None, to: bytes, source: bytes, tag: int | None) -> bytes | None:
        """As it leaves by this port, or None."""
        native, trunk, _ = self.ports[port]
        if native is None and not trunk:
            return frame(to, source, tag) if vlan is None else None
        if vlan is None:
            return None
        if vlan == native:
            return frame(to, source)
        return frame(to, source, vlan) if vlan in trunk else None

    def send(self, port: int, to: int, source: int, tag: int | None) -> dict[int, bytes]:
        vlan = self.vlan(port, tag)
        if isinstance(vlan, Refused):
            return {}
        before = self.known.get((vlan, source), port)
        if before != port and self.ports[port][2] and not self.ports[before][2]:
            return {}
        self.known[vlan, source] = port
        there = self.known.get((vlan, to))
        found = {}
        for other in range(len(self.ports)):
            if other == port or (self.ports[other][2] and self.ports[port][2]) or there not in (None, other):
                continue
            form = self.form(other, vlan, mac(to) if to else EVERYBODY, mac(source), tag)
            if form:
                found[other] = form
        return found


class Refused:
    """No VLAN."""


REFUSED = Refused()
VLANS = st.sampled_from([1, 2, 4094])
PORTS = st.lists(
    st.tuples(st.none() | VLANS, st.frozensets(VLANS, max_size=2), st.booleans()), min_size=2, max_size=6
)
SENDS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(1, 4), st.none() | VLANS | st.just(0)),
    max_size=30,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ports=PORTS, sends=SENDS)
def test_it_does_what_the_model_does(
    run: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    ports: list[tuple[int | None, frozenset[int], bool]],
    sends: list[tuple[int, int, int, int | None]],
) -> None:
    async def main() -> None:
        model = Model(ports)
        async with Switch() as switch:
            hosts = [Port() for _ in ports]
            for host, (vlan, trunk, isolated) in zip(hosts, ports, strict=True):
                await switch.connect(host, vlan=vlan, trunk=trunk, isolated=isolated)
            for port, to, source, tag in sends:
                port %= len(ports)
                hosts[port].send_nowait(frame(mac(to) if to else EVERYBODY, mac(source), tag))
                heard = {number: got for number, host in enumerate(hosts) if (got := taken(host))}
                assert heard == {number: [form] for number, form in model.send(port, to, source, tag).items()}

    run(main)
