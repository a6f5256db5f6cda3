"""machine/nets.py: the life of adapters, without KVM and with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError, LinkChanged, NicLost, StateError, net
from aiokvm.aio import current_loop
from aiokvm.net.plane import Plane
from aiokvm.virtio.net_control import (
    VIRTIO_NET_CTRL_ANNOUNCE,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_OK,
)
from tests.machine.net_rig import HDR, Cable, frame, nic, rig

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("collected")]


async def test_the_link_goes_down_and_up(dataplane: str) -> None:
    async with rig(nic(dataplane=dataplane)) as r:
        await r.nic.set_link(False)
        assert not r.nic.is_up
        assert r.host.changes == 1
        assert r.device.config[6] == 0
        assert await anext(r.events) == LinkChanged("test", "test/net0", False)
        r.send(frame())
        while not r.drivers[1].used():
            await anyio.lowlevel.checkpoint()
        assert r.nic.stats().dropped_down == 1
        await r.nic.set_link(False)
        assert r.host.changes == 1
        await r.nic.set_link(True)
        assert await anext(r.events) == LinkChanged("test", "test/net0", True)
        r.send(frame(61))
        assert len((await r.cable.receive()).frame) == 61
        r.nets.stop()
        with pytest.raises(StateError, match="ended"):
            await r.nic.set_link(False)


async def test_an_adapter_without_a_link_at_first() -> None:
    async with rig(nic(up=False)) as r:
        assert not r.nic.is_up
        r.cable.send(frame())
        while not r.cable.drivers[1].used():
            await anyio.lowlevel.checkpoint()
        assert not r.received()
        await r.nic.set_link(True)
        r.cable.send(frame())
        await r.receive()


async def test_a_backend_is_replaced_while_frames_wait(dataplane: str) -> None:
    first = Cable(room=0)
    async with rig(nic(backend=first, dataplane=dataplane)) as r:
        for i in range(5):
            r.send(frame(100, fill=i))
        second = Cable()
        await r.nic.replace(second)
        assert r.nic.backend is second
        assert first.closes == 1
        assert [event.up for _ in range(2) if (event := await anext(r.events))] == [False, True]  # type: ignore[attr-defined]
        # The driver has been asked to tell the network where it is.
        assert r.device.config[6] == 3
        assert r.control(VIRTIO_NET_CTRL_ANNOUNCE, 0) == VIRTIO_NET_OK
        assert r.device.config[6] == 1
        seen: list[int] = []
        while len(seen) < 5:
            seen += [each.frame[14] for each in second.received()]
            await anyio.lowlevel.checkpoint()
        assert seen == list(range(5))
        second.send(frame(62))
        assert len((await r.receive()).frame) == 62
        stats = r.nic.stats()
        assert (stats.sent_frames, stats.received_frames) == (5, 1)


async def test_a_replacement_that_fails_changes_nothing() -> None:
    async with rig(nic(mtu=1400)) as r:
        before = r.cable
        with pytest.raises(OSError, match="gone"):
            await r.nic.replace(Cable(broken="gone"))
        with pytest.raises(ConfigError, match="MTU"):
            await r.nic.replace(Cable(mtu=1280))
        with pytest.raises(ConfigError, match="in use"):
            await r.nic.replace(before)
        with pytest.raises(ConfigError, match="another NetBackend"):
            await r.nic.replace("eth0")  # type: ignore[arg-type]
        assert r.nic.backend is before
        r.send(frame(61))
        await before.receive()
        assert r.host.changes == 0


async def test_a_replacement_by_a_port_of_a_switch_that_fails_leaves_the_switch_alone() -> None:
    async with net.Switch() as switch, rig(nic(mtu=1400)) as r:
        taken = switch.port()
        other = await switch.connect(Cable())
        await taken.open(taken.plane, lambda _: None)
        with pytest.raises(ConfigError, match="in use"):
            await r.nic.replace(taken)
        assert taken.end is not None
        assert taken.end.is_open
        assert other.end is not None
        assert other.end.is_open
        await taken.close()


async def test_a_replacement_that_is_cancelled_changes_nothing(cancelled: Any) -> None:
    async with rig(nic()) as r:
        before = r.cable
        other = Cable()
        other.waits = anyio.Event()
        assert not await cancelled(5, lambda: r.nic.replace(other))
        assert r.nic.backend is before
        other.waits = None
        await r.nic.replace(other)
        r.send(frame(61))
        await other.receive()


async def test_a_replacement_ends_with_the_machine() -> None:
    async with rig(nic()) as r:
        other = Cable()
        other.waits = anyio.Event()

        async def replace() -> None:
            with pytest.raises(StateError, match="ended"):
                await r.nic.replace(other)

        async with anyio.create_task_group() as group:
            group.start_soon(replace)
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            r.host.reset()
            done = r.device.close()
            assert done is not None
            await done
        assert other.end is None


async def test_a_backend_that_is_lost_takes_the_link_down() -> None:
    async with rig(nic()) as r:
        lost = r.cable
        lose = lost.lose
        lose("the device was deleted")
        lose("once more")
        assert await anext(r.events) == NicLost("test", "test/net0", "the device was deleted")
        assert await anext(r.events) == LinkChanged("test", "test/net0", False)
        assert (r.nic.is_up, r.nic.lost) == (False, "the device was deleted")
        with pytest.raises(StateError, match="replace it"):
            await r.nic.set_link(True)
        # No spin: what the guest sends is dropped, and that is all.
        r.send(frame())
        while not r.drivers[1].used():
            await anyio.lowlevel.checkpoint()
        await r.nic.replace(Cable())
        lose("late")
        assert (r.nic.is_up, r.nic.lost) == (True, None)
        r.send(frame(61))
        await r.cable.receive()


async def test_a_backend_whose_peer_is_away_has_no_link() -> None:
    async with rig(nic()) as r:
        r.cable._set_carrier(False)
        assert await anext(r.events) == LinkChanged("test", "test/net0", False)
        assert not r.nic.is_up
        await r.nic.set_link(False)
        await r.nic.set_link(True)
        assert not r.nic.is_up
        r.cable._set_carrier(True)
        assert await anext(r.events) == LinkChanged("test", "test/net0", True)
        await r.nic.set_link(False)
        assert await anext(r.events) == LinkChanged("test", "test/net0", False)
        r.cable._set_carrier(False)
        r.cable._set_carrier(True)
        assert not r.nic.is_up
        before = r.cable
        await r.nic.set_link(True)
        await r.nic.replace(Cable())
        before._set_carrier(False)
        assert r.nic.is_up


@pytest.mark.parametrize("server", [True, False])
async def test_the_guest_sees_that_a_stream_connects_again(tmp_path: Path, server: bool) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    stream = net.Stream(path, server=server, reconnect=0.01)
    async with rig(nic(backend=stream)) as r:
        assert not r.nic.is_up
        assert r.device.config[6] == 0
        for _ in range(3):
            peer = net.Stream(path, server=not server)
            plane = Plane(current_loop())
            # A server is there before its peers.
            await peer.open(plane, lambda _: None)
            assert await anext(r.events) == LinkChanged("test", "test/net0", True)
            assert r.device.config[6] == 1
            await peer.close()
            plane.close()
            assert await anext(r.events) == LinkChanged("test", "test/net0", False)
            assert r.device.config[6] == 0
        await r.nic.replace(net.Stream(other, server=True))
        assert not r.nic.is_up


async def test_an_mtu_that_is_known_when_it_is_open_counts_too() -> None:
    class Tap(Cable):
        async def _open(self, plane: Plane, on_lost: Any) -> Any:
            end = await super()._open(plane, on_lost)
            self.mtu = 1400
            return end

    async with rig(nic(backend=Cable(mtu=1500))) as r:
        before, narrow = r.cable, Tap()
        with pytest.raises(ConfigError, match="was given an MTU of 1500"):
            await r.nic.replace(narrow)
        assert narrow.end is None
        assert r.cable is before
        r.send(frame(61))
        await before.receive()


async def test_the_mtu_is_the_backends_unless_it_is_given() -> None:
    async with rig(nic(backend=Cable(mtu=9000))) as r:
        assert r.device.layout.mtu == 9000
    async with rig(nic(backend=Cable(mtu=9000), mtu=1400)) as r:
        assert r.device.layout.mtu == 1400


async def test_two_adapters_are_not_the_same() -> None:
    cable = Cable()
    with pytest.raises(ConfigError, match="given twice"):
        async with rig(cable, cable):
            pass
    with pytest.raises(ConfigError, match="address"):
        async with rig(nic(), nic()):
            pass
    assert cable.closes == 1
    assert cable.end is None


async def test_nothing_is_left_of_adapters(dataplane: str) -> None:
    def taken() -> tuple[int, list[str]]:
        tasks = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        return len(os.listdir("/proc/self/fd")), [name for name in tasks if "net0" in name]

    counts = []
    for _ in range(10):
        async with rig(nic(dataplane=dataplane)) as r:
            r.send(frame(61))
            await r.cable.receive()
            await r.nic.replace(Cable())
        counts.append(taken())
    # A loop takes descriptors of its own at first.
    assert counts[-1] == counts[1]
    assert counts[-1][1] == []


# ---- in machines ----


def booted() -> bytes:
    """A driver that sets up receiveq1 and transmitq1, says so, and waits for a frame."""
    from tests.machine.virtio_guest import VirtioProgram

    code = VirtioProgram()
    features = VIRTIO_NET_F_MRG_RXBUF
    return code.up(2, features).notify(0).notify(1).await_used(1, 0).step().halt()


def rings(vm: Any, data: bytes) -> list[Any]:
    from tests.machine import virtio_guest

    drivers = [virtio_guest.rings(vm.memory, queue) for queue in range(2)]
    drivers[0].add([], [2048])
    drivers[1].add([HDR.pack(*[0] * 7), data])
    return drivers


@pytest.mark.kvm
async def test_a_guest_sends_and_receives(guest: Any, dataplane: str) -> None:
    from tests.machine.virtio_guest import steps

    cable = Cable()
    nets = [nic(backend=cable, dataplane=dataplane)]
    async with guest(booted(), mode="protected", start=False, memory="4M", nets=nets) as vm:
        drivers = rings(vm, frame(77))
        events = vm.events()
        await vm.start()
        assert (await cable.receive()).frame == frame(77)
        cable.send(frame(88))
        while not steps(vm):
            await anyio.lowlevel.checkpoint()
        [used] = drivers[0].used()
        assert used.data[12:] == frame(88)
        [vm_nic] = vm.nets
        assert vm_nic.stats().sent_frames == 1
        assert vm_nic.name == f"{vm.name}/net0"
        await vm_nic.set_link(False)
        async for event in events:
            if isinstance(event, LinkChanged):
                break
    assert cable.closes == 1
    assert vm_nic.stats().sent_frames == 1
    with pytest.raises(StateError):
        await vm_nic.replace(Cable())


@pytest.mark.kvm
async def test_a_machine_is_reset_and_killed_with_an_adapter(guest: Any, dataplane: str) -> None:
    cable = Cable()
    nets = [nic(backend=cable, dataplane=dataplane)]
    async with guest(booted(), mode="protected", start=False, memory="4M", nets=nets) as vm:
        for _ in range(3):
            rings(vm, frame(77))
            if vm.state.value == "created":
                await vm.start()
            else:
                await vm.reset()
            assert (await cable.receive()).frame == frame(77)
        await vm.kill()


@pytest.mark.kvm
async def test_creation_that_fails_leaves_nothing(guest: Any) -> None:
    cable = Cable()
    with pytest.raises(OSError, match="refused"):
        async with guest(b"\xf4", nets=[cable, Cable(broken="refused")]):
            pass
    assert cable.closes == 1
    assert cable.end is None


@pytest.mark.kvm
async def test_creation_that_is_cancelled_leaves_nothing(guest: Any, cancelled: Any) -> None:
    for turns in range(0, 40, 5):
        cable = Cable()

        async def create(cable: Cable = cable) -> None:
            async with guest(b"\xf4", start=False, nets=[cable]) as vm:
                assert vm.nets

        await cancelled(turns, create)
        assert cable.end is None
