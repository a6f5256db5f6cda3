"""machine/net_core.py: the frames of adapters against drivers."""

from __future__ import annotations

import struct
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import AiokvmError, ConfigError, net
from aiokvm.aio import current_loop
from aiokvm.net import plane as planes
from aiokvm.net.plane import Plane
from aiokvm.virtio.net_control import (
    MAX_MACS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_ERR,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_OK,
)
from tests.machine.net_rig import MAC, Cable, frame, nic, rig

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("collected")]


async def test_frames_go_both_ways(dataplane: str) -> None:
    async with rig(nic(dataplane=dataplane)) as r:
        assert bool(r.nic.tid) == (dataplane == "thread")
        for size in (14, 60, 1514):
            r.send(frame(size))
            assert (await r.cable.receive()).frame == frame(size)
            r.cable.send(frame(size))
            received = await r.receive()
            assert received.frame == frame(size)
            assert received.hdr == (0, 0, 0, 0, 0, 0, 1)
        stats = r.nic.stats()
        assert (stats.sent_frames, stats.received_frames) == (3, 3)
        assert stats.sent_bytes == stats.received_bytes == 14 + 60 + 1514
        assert stats.interrupts >= 3
        assert r.cable.stats().sent_frames == 3


async def test_a_long_frame_is_merged_from_buffers(dataplane: str) -> None:
    async with rig(nic(dataplane=dataplane)) as r:
        r.cable.send(frame(9000))
        received = await r.receive()
        assert received.frame == frame(9000)
        assert received.hdr[-1] == 5
        r.send(frame(9000))
        received = await r.cable.receive()
        assert received.frame == frame(9000)


async def test_batches_are_in_order_and_complete(dataplane: str) -> None:
    async with rig(nic(dataplane=dataplane)) as r:
        seen: list[int] = []
        for start in range(0, 400, 40):
            r.send(*(frame(80, fill=start + i) for i in range(40)))
            while len(seen) < start + 40:
                found = r.cable.received()
                seen += [each.frame[14] for each in found]
                if not found:
                    await r.cable.irq.happened.wait()
        assert seen == [i & 0xFF for i in range(400)]


async def test_offload_is_passed_on_to_those_who_take_it() -> None:
    async with rig(nic()) as r:
        hdr = (1, 0, 0, 0, 34, 16, 0)
        r.send(frame(200), hdr=hdr)
        received = await r.cable.receive()
        assert received.hdr[:6] == hdr[:6]
        r.cable.send(frame(200), hdr=hdr)
        received = await r.receive()
        assert received.hdr == (*hdr[:6], 1)


@pytest.mark.parametrize(
    "hdr",
    [
        (1, 0, 0, 0, 300, 16, 0),
        (1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
        (1, 1, 0, 0, 34, 16, 0),
        (0, 1, 0, 9, 0, 0, 0),
    ],
    ids=["csum_start", "wraps", "gso_size", "gso without csum"],
)
async def test_headers_outside_of_the_frame_are_dropped(hdr: tuple[int, ...]) -> None:
    async with rig(nic()) as r:
        r.send(frame(200), hdr=hdr)
        r.send(frame(61))
        assert len((await r.cable.receive()).frame) == 61
        assert r.nic.stats().dropped_invalid == 1


async def test_what_is_sent_is_neither_short_nor_long() -> None:
    async with rig(nic()) as r:
        driver = r.drivers[1]
        tokens = [driver.add([bytes(size)]) for size in (0, 1, 11, 12, 25, 70000)]
        tokens.append(driver.add([bytes(100)], [100]))
        tokens.append(driver.add([], [100]))
        r.host.notify(1)
        r.send(frame(61))
        assert len((await r.cable.receive()).frame) == 61
        assert r.nic.stats().dropped_invalid == len(tokens)
        assert not r.host.reasons


async def test_without_buffers_the_backend_is_not_read() -> None:
    async with rig(nic()) as r:
        # 64 buffers; then the peer's queue holds what it sends.
        r.cable.send(*(frame(100, fill=i) for i in range(100)))
        while len(found := r.received()) < 64:
            await r.host.irq.happened.wait()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert r.nic.stats().received_frames == 64
        r.give(36)
        while len(found) < 100:
            found += r.received()
            await anyio.lowlevel.checkpoint()
        assert [each.frame[14] for each in found] == list(range(100))
        assert r.nic.stats().dropped_full == 0


async def test_the_guest_waits_for_a_peer_that_does_not_take() -> None:
    async with rig(nic(backend=Cable(room=2))) as r:
        for i in range(10):
            r.send(frame(100, fill=i))
        seen: list[int] = []
        while len(seen) < 10:
            seen += [each.frame[14] for each in r.cable.received()]
            await anyio.lowlevel.checkpoint()
        assert seen == list(range(10))


@pytest.mark.parametrize("which", ["short", "readable", "outside"])
async def test_a_bad_receive_buffer_needs_a_reset(which: str, dataplane: str) -> None:
    async with rig(nic(dataplane=dataplane)) as r:
        r.stop()
        r.start()
        for _ in range(64):
            r.cable.send(frame(60))
            await r.receive()
        driver = r.drivers[0]
        if which == "outside":
            driver.write_descriptor(0, 1 << 40, 2048, 2)
            driver.make_available(0)
        elif which == "short":
            driver.add([], [11])
        else:
            driver.add([bytes(2048)])
        r.host.notify(0)
        r.cable.send(frame(60))
        assert "queue 0" in await r.host.broken()
        assert len(r.host.reasons) == 1
        r.stop()
        r.start()
        r.cable.send(frame(61))
        assert len((await r.receive()).frame) == 61


async def test_a_broken_transmit_queue_needs_a_reset(dataplane: str) -> None:
    async with rig(nic(dataplane=dataplane)) as r:
        driver = r.drivers[1]
        r.memory.write(driver.driver + 2, (1000).to_bytes(2, "little"))
        r.host.notify(1)
        assert await r.host.broken() == "queue 1: more is available than the queue is long"
        r.stop()
        r.start()
        r.send(frame(61))
        assert len((await r.cable.receive()).frame) == 61


async def test_floods_both_ways_leave_the_loop_its_turns() -> None:
    async with rig(nic()) as r:
        sent = received = turns = 0
        while sent < 3000 or received < 3000:
            for driver, send in ((r.drivers[1], r.send), (r.cable.drivers[1], r.cable.send)):
                driver.used()
                if len(driver.buffers) < 32:
                    send(*(frame(60) for _ in range(32)))
            sent += len(r.cable.received())
            got = len(r.received())
            received += got
            r.give(got)
            turns += 1
            await anyio.lowlevel.checkpoint()
        assert turns > 10


async def test_resets_leave_no_chain_behind() -> None:
    async with rig(nic(backend=Cable(room=0))) as r:
        for _ in range(30):
            for i in range(5):
                r.send(frame(100, fill=i))
            r.cable.send(frame(60))
            await anyio.lowlevel.checkpoint()
            r.stop()
            r.start()


# ---- the control queue ----


async def test_the_filter_follows_the_control_queue() -> None:
    async with rig(nic()) as r:

        async def passes(to: str, vlan: int | None = None) -> bool:
            data = frame(100, to=to)
            if vlan is not None:
                data = data[:12] + struct.pack(">HH", 0x8100, vlan) + data[12:]
            r.cable.send(data, frame(60))
            while not (found := r.received()) or len(found[-1].frame) != 60:
                await r.host.irq.happened.wait()
            return len(found) == 2

        assert await passes(MAC)
        assert not await passes("52:54:00:00:00:09")
        assert not await passes("01:00:5e:00:00:01")
        assert not await passes(MAC, 5)
        assert r.control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, struct.pack("<H", 5)) == 0
        assert await passes(MAC, 5)
        assert r.control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, struct.pack("<H", 5)) == 0
        assert not await passes(MAC, 5)
        assert r.control(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, b"\1") == 0
        assert await passes("01:00:5e:00:00:01")
        assert r.control(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, b"\0") == 0
        table = struct.pack("<I", 1) + bytes.fromhex("525400000009")
        table += struct.pack("<I", 1) + bytes.fromhex("01005e000002")
        assert r.control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, table) == 0
        assert await passes("52:54:00:00:00:09")
        assert await passes("01:00:5e:00:00:02")
        assert not await passes("01:00:5e:00:00:01")
        assert r.control(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\1") == 0
        assert await passes("01:00:5e:00:00:01", 7)
        assert r.control(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0") == 0
        new = bytes.fromhex("525400000077")
        assert r.control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, new) == 0
        assert bytes(r.device.config[:6]) == new
        assert await passes("52:54:00:00:00:77")
        assert not await passes(MAC)
        r.stop()
        r.start(VIRTIO_NET_F_MRG_RXBUF)
        assert bytes(r.device.config[:6]) == bytes.fromhex(MAC.replace(":", ""))
        assert await passes("52:54:00:00:00:09", 5)


async def test_a_huge_mac_table_is_an_error() -> None:
    async with rig(nic()) as r:
        huge = struct.pack("<I", 100_000) + bytes(600_000) + struct.pack("<I", 0)
        for table in (
            huge,
            struct.pack("<I", 0xFFFF_FFFF) + bytes(8),
            struct.pack("<I", MAX_MACS + 1) + bytes(6 * MAX_MACS + 6) + bytes(4),
            b"\1\0",
            b"",
        ):
            status = r.control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, table)
            assert status == VIRTIO_NET_ERR
        # As many as there may be: those beyond the filter's room have all of their kind pass.
        many = b"".join(struct.pack(">HI", 0x5254, i) for i in range(MAX_MACS))
        table = struct.pack("<I", MAX_MACS) + many + struct.pack("<I", 0)
        assert r.control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, table) == VIRTIO_NET_OK
        r.cable.send(frame(64, to="52:54:77:00:00:09"))
        assert len((await r.receive()).frame) == 64
        assert not r.host.reasons


async def test_a_control_command_without_an_acknowledgement_needs_a_reset() -> None:
    async with rig(nic()) as r:
        r.drivers[2].add([bytes(3)])
        r.host.notify(2)
        assert "acknowledgement" in r.host.reasons[0]


async def test_guest_offloads_are_turned_off_and_on() -> None:
    async with rig(nic()) as r:
        hdr = (1, 0, 0, 0, 34, 16, 0)
        end = r.nic._data._core
        for wanted in (0, VIRTIO_NET_F_GUEST_CSUM):
            data = struct.pack("<Q", wanted)
            assert r.control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, data) == VIRTIO_NET_OK
            r.cable.send(frame(200), hdr=hdr)
            received = await r.receive()
            assert received.hdr[0] == (1 if wanted else 0)
        assert end


async def test_queue_pairs_and_steering() -> None:
    async with rig(nic(queues=4, queue_size=64)) as r:
        for pair in range(1, 4):
            r.give(32, pair=pair)

        def flow(port: int, back: bool) -> bytes:
            addresses = [b"\x0a\0\0\1", b"\x0a\0\0\2"]
            ports = [port, 80]
            if back:
                addresses.reverse()
                ports.reverse()
            ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 46, 0, 0, 64, 6, 0, *addresses)
            to = bytes.fromhex(MAC.replace(":", "") if back else "525400000002")
            return to + bytes(6) + b"\x08\0" + ip + struct.pack(">HH", *ports) + bytes(22)

        # One is in use at first.
        r.send(flow(1000, False), pair=2)
        r.cable.send(flow(1000, True))
        await r.receive(0)
        assert not r.cable.received()
        assert r.control(VIRTIO_NET_CTRL_MQ, 0, struct.pack("<H", 4)) == VIRTIO_NET_OK
        assert (await r.cable.receive()).frame == flow(1000, False)
        for port in range(1000, 1016):
            pair = port % 4
            r.send(flow(port, False), pair=pair)
            await r.cable.receive()
            r.cable.send(flow(port, True))
            assert (await r.receive(pair)).frame == flow(port, True)
        for wrong in (0, 5, 0xFFFF):
            assert r.control(VIRTIO_NET_CTRL_MQ, 0, struct.pack("<H", wrong)) == VIRTIO_NET_ERR


# ---- who moves frames ----


async def test_frames_are_moved_where_no_python_stands_in_the_way() -> None:
    async with rig(nic()) as r:
        assert r.nic.tid
        assert not (await moved_to(r, Cable(filters=[net.Hook(lambda _: True)])))
        assert not (await moved_to(r, Cable(filters=[net.Hook(lambda _: True)])))
        assert await moved_to(r, Cable(filters=[net.allow()]))
        await r.nic.replace(net.Port())
        assert not r.nic.tid
    for dataplane in ("loop", "thread"):
        async with rig(nic(dataplane=dataplane)) as r:
            for filters in ([], [net.Hook(lambda _: True)]):
                assert bool(await moved_to(r, Cable(filters=filters))) == (dataplane == "thread")


async def moved_to(r: Any, backend: Cable) -> int:
    """The thread's id, after frames have gone both ways."""
    await r.nic.replace(backend)
    r.send(frame(61))
    assert len((await backend.receive()).frame) == 61
    backend.send(frame(62))
    await r.receive()
    tid: int = r.nic.tid
    return tid


async def test_without_a_thread_the_loop_moves_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(loop: Any, thread: str | None = None) -> Plane:
        if thread:
            raise AiokvmError("no plane for frames: Resource temporarily unavailable")
        return Plane(loop)

    monkeypatch.setattr(planes, "Plane", no_thread)
    async with rig(nic()) as r:
        assert not r.nic.tid
        r.send(frame(61))
        await r.cable.receive()
    with pytest.raises(AiokvmError, match="unavailable"):
        async with rig(nic(dataplane="thread")):
            pass


async def test_an_adapter_goes_where_the_plane_of_its_backend_is(dataplane: str) -> None:
    thread = "switch" if dataplane == "thread" else None
    plane = Plane(current_loop(), thread)

    class Elsewhere(Cable):
        @property
        def plane(self) -> Plane:
            return plane

    try:
        async with rig(net.Nic(Elsewhere(), dataplane="loop")) as r:
            assert r.nic.tid == plane.tid
            r.send(frame(61))
            await r.cable.receive()
            await r.nic.replace(Cable())
            assert r.nic.tid == 0
            r.send(frame(62))
            await r.cable.receive()
            await r.nic.replace(Elsewhere())
            r.cable.send(frame(63))
            await r.receive()
        with pytest.raises(ConfigError, match="data plane"):
            async with rig(net.Nic(Elsewhere(), dataplane="thread")):
                pass
    finally:
        plane.close()
