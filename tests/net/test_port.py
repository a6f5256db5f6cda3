"""net/port.py: the program as the peer."""

from __future__ import annotations

from array import array
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError
from aiokvm.errors import StateError
from aiokvm.net import Batch, Frame, Limit, Port
from aiokvm.net.port import VIRTIO_NET_HDR_GSO_TCPV4
from tests.turns import counted_turns

pytestmark = pytest.mark.anyio
Linked = Any
HEAD = bytes.fromhex("020000000001 020000000002 0800")


def frames(count: int, size: int = 60) -> list[bytes]:
    return [HEAD + number.to_bytes(4, "big") + bytes(size - 18) for number in range(count)]


def number_of(frame: memoryview) -> int:
    return int.from_bytes(frame[14:18], "big")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"depth": 0}, "depth"),
        ({"depth": 1 << 20}, "depth"),
        ({"bytes": 1000}, "bytes"),
        ({"bytes": 1 << 40}, "bytes"),
        ({"on_full": "wait"}, "on_full"),
    ],
)
def test_sizes_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Port(**arguments)


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_frames_go_both_ways(linked: Linked, thread: str | None) -> None:
    one, other = Port(), Port()
    async with linked(one, other, thread=thread):
        await one.send(frames(3))
        await other.send([Frame(frame) for frame in frames(2, 1514)])
        for sent in frames(3):
            assert bytes(await anext(other)) == sent
        for sent in frames(2, 1514):
            frame = await anext(one)
            assert bytes(frame) == sent
            assert (len(frame), frame.needs_csum, frame.gso_size) == (1514, False, 0)
    stats = one.stats()
    assert (stats.sent_frames, stats.received_frames, stats.received_bytes) == (3, 2, 3028)


async def test_batches(linked: Linked) -> None:
    one, other = Port(), Port()
    async with linked(one, other):
        await one.send(frames(100))
        batches = other.batches(max=64)
        batch = await anext(batches)
        assert (len(batch), batch.nbytes) == (64, 64 * 60)
        assert [number_of(frame) for frame in batch] == list(range(64))
        assert bytes(batch[63]) == frames(64)[63]
        assert batch[-1] == batch[63]
        assert batch[1:3] == frames(3)[1:]
        assert batch.frame(5).data == batch[5]
        assert [bytes(frame) for frame in batch.frames()] == frames(64)
        with pytest.raises(IndexError):
            batch[64]
        assert batch[0].readonly
        rest = await anext(batches)
        assert len(rest) == 36
        # What comes later does not change what is kept.
        await one.send([bytes(14) + b"\xff" * 46] * 1000)
        while other.take_nowait(256):
            pass
        assert [number_of(frame) for frame in (*batch, *rest)] == list(range(100))
        for most in (0, 257):
            with pytest.raises(ConfigError, match="batch"):
                other.batches(max=most)
        for most in (0, -1):
            with pytest.raises(ConfigError):
                other.take_nowait(most)


async def test_one_at_a_time_and_in_batches_may_be_mixed(linked: Linked) -> None:
    one, other = Port(), Port()
    async with linked(one, other):
        await one.send(frames(200))
        taken = [number_of((await anext(other)).data) for _ in range(10)]
        taken += map(number_of, await anext(other.batches(max=50)))
        taken += [number_of((await anext(other)).data) for _ in range(3)]
    # All the rest is there after the close too.
    async for batch in other.batches(max=9):
        assert len(batch) <= 9
        taken += map(number_of, batch)
    assert taken == list(range(200))
    assert [frame async for frame in other] == []


async def test_who_takes_waits_for_the_port_and_its_frames(linked: Linked) -> None:
    one, other = Port(), Port()
    taken: list[int] = []

    async def take() -> None:
        async for batch in other.batches(max=1):
            taken.extend(number_of(frame) for frame in batch)

    async def send() -> None:
        await one.send(frames(10))

    async with anyio.create_task_group() as group:
        group.start_soon(take)
        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        assert taken == []
        async with linked(one, other):
            while len(taken) < 10:
                await anyio.wait_all_tasks_blocked()
        # The iteration ends with the port, and so does the group.
    assert taken == list(range(10))


async def test_the_guest_waits_for_the_program(linked: Linked) -> None:
    one, other = Port(depth=32), Port(depth=16)
    async with linked(one, other):
        assert one.send_nowait(frames(100)) == 48
        assert one.send_nowait(frames(1)) == 0
        assert [number_of((await anext(other)).data) for _ in range(48)] == list(range(48))
    assert other.stats().dropped_full == 0


async def test_or_frames_are_dropped(linked: Linked) -> None:
    one, other = Port(), Port(depth=16, on_full="drop")
    async with linked(one, other):
        await one.send(frames(100))
        assert [number_of(frame) for frame in await anext(other.batches())] == list(range(16))
    assert other.stats().dropped_full == 84


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_nothing_is_lost_on_the_way(linked: Linked, thread: str | None) -> None:
    one, other = Port(depth=100), Port(depth=64, bytes=70_000)
    taken: list[int] = []

    async def send() -> None:
        numbered = frames(30_000)
        for begin in range(0, len(numbered), 1000):
            await one.send(numbered[begin : begin + 1000])

    async with linked(one, other, thread=thread), anyio.create_task_group() as group:
        group.start_soon(send)
        async for batch in other.batches():
            taken += [number_of(frame) for frame in batch]
            if len(taken) == 30_000:
                break
    assert taken == list(range(30_000))


async def test_cancelling_loses_nothing(linked: Linked) -> None:
    one, other = Port(depth=8), Port(depth=8)
    async with linked(one, other):
        for taking in (other.__anext__, other.batches().__anext__):
            with anyio.move_on_after(0) as scope:
                await taking()
            assert scope.cancelled_caught
        sending = frames(20)
        with anyio.CancelScope() as sends:
            async with anyio.create_task_group() as group:
                group.start_soon(one.send, sending)
                await anyio.wait_all_tasks_blocked()
                sends.cancel()
        # What has gone is the beginning, and who comes next can send.
        taken = [number_of((await anext(other)).data) for _ in range(16)]
        assert taken == list(range(16))
        await one.send(frames(1))
        assert number_of((await anext(other)).data) == 0


async def test_calls_are_not_mixed(linked: Linked) -> None:
    one, other = Port(depth=4), Port(depth=4)
    taken: list[bytes] = []
    async with linked(one, other), anyio.create_task_group() as group:
        for kind in b"abc":
            group.start_soon(one.send, [HEAD + bytes([kind]) * 46] * 50)
        async for frame in other:
            taken.append(bytes(frame.data[14:15]))
            if len(taken) == 150:
                break
    assert b"".join(taken) in {
        b"".join(bytes([kind]) * 50 for kind in order)
        for order in (b"abc", b"acb", b"bac", b"bca", b"cab", b"cba")
    }


async def test_what_may_be_sent(linked: Linked) -> None:
    one, other = Port(), Port()
    async with linked(one, other):
        whole = frames(1)[0]
        words = array("I", whole)
        for given in (
            whole,
            bytearray(whole),
            memoryview(whole),
            Frame(whole),
            [words],
            (whole,),
            iter([whole]),
        ):
            await one.send(given)
            assert bytes(await anext(other)) == whole
        await one.send(frames(5))
        await one.send(await anext(other.batches()))  # a batch as it came
        assert len(await anext(other.batches())) == 5
        await one.send([])
        assert one.send_nowait([]) == 0
        for wrong in (b"", bytes(13), bytes(65551)):
            with pytest.raises(ConfigError, match=f"frame 1 has {len(wrong)} bytes"):
                await one.send([whole, wrong])
        with pytest.raises(ConfigError, match="frames='frame': give a list of bytes or Frame"):
            await one.send("frame")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"frames=\['frame'\]: give a list of bytes or Frame"):
            one.send_nowait(["frame"])  # type: ignore[list-item]
        assert other.take_nowait() is None
        await one.send(HEAD + bytes(65536))
        assert len(await anext(other)) == 65550


async def test_offload_metadata(linked: Linked) -> None:
    one, other = Port(), Port(offload=True)
    tcp = bytearray(HEAD + bytes(20 + 20 + 3000))
    tcp[14], tcp[23], tcp[34 + 12] = 0x45, 6, 0x50
    async with linked(one, other):
        big = Frame(
            *(tcp,),
            needs_csum=True,
            csum_start=34,
            csum_offset=16,
            gso_type=VIRTIO_NET_HDR_GSO_TCPV4,
            gso_size=1448,
        )
        await one.send([frames(1)[0], big])
        plain, frame = await anext(other), await anext(other)
        assert not plain.needs_csum
        assert bytes(frame) == tcp
        assert (frame.needs_csum, frame.csum_start, frame.csum_offset) == (True, 34, 16)
        assert (frame.gso_type, frame.gso_size) == (VIRTIO_NET_HDR_GSO_TCPV4, 1448)
        with pytest.raises(ConfigError, match="header"):
            await one.send(Frame(tcp, needs_csum=True, csum_start=4000))
        await one.send([frame])
        assert (await anext(other)).gso_size == 1448


async def test_a_port_that_is_not_connected(linked: Linked) -> None:
    port = Port()
    with pytest.raises(StateError, match="never"):
        port.stats()
    with pytest.raises(StateError, match="not connected"):
        port.send_nowait(frames(1))
    assert port.take_nowait() is None
    async with linked(port, Port()):
        pass
    with pytest.raises(StateError, match="closed"):
        await port.send(frames(1))
    # It can be connected anew.
    other = Port()
    async with linked(port, other):
        await port.send(frames(1))
        await anext(other)


async def test_a_sender_is_told_that_the_port_is_closed(linked: Linked) -> None:
    one, other = Port(depth=1), Port(depth=1)

    async def send() -> None:
        with pytest.raises(StateError, match="closed"):
            await one.send(frames(10))

    async with anyio.create_task_group() as group, linked(one, other):
        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()


async def test_a_program_that_never_waits_lets_the_loop_go_on(linked: Linked) -> None:
    one, other = Port(on_full="drop"), Port(on_full="drop")
    async with linked(one, other), anyio.create_task_group() as group:

        async def flood() -> None:
            while True:
                await one.send(frames(10))

        async def echo() -> None:
            async for batch in other.batches():
                await one.send(batch)

        group.start_soon(flood)
        group.start_soon(echo)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()


async def test_large_frames_are_taken_in_batches_of_bounded_size(linked: Linked) -> None:
    one, other = Port(offload=True), Port(offload=True, bytes=64 << 20)
    sent = await anyio.to_thread.run_sync(lambda: frames(600, 65000))
    taken = 0
    async with linked(one, other):
        for at in range(0, len(sent), 50):
            await one.send(sent[at : at + 50])
        while batch := other.take_nowait(256):
            assert batch.nbytes <= 256 << 10
            taken += len(batch)
            await anyio.lowlevel.checkpoint()
            if taken > 200:
                break
    while batch := other.take_nowait(256):
        taken += len(batch)
    assert taken == 600


async def test_a_call_of_many_frames_lets_the_loop_go_on(linked: Linked) -> None:
    one, other = Port(), Port(on_full="drop")
    sent = await anyio.to_thread.run_sync(lambda: frames(100_000))
    async with linked(one, other), counted_turns() as turns:
        await one.send(sent)
        assert turns.count > 1
    assert one.stats().sent_frames == 100_000


async def test_frames_are_looked_at_when_it_is_their_turn(linked: Linked) -> None:
    one, other = Port(depth=300), Port(depth=300)
    looked = 0

    def look(frame: bytes) -> bytes:
        nonlocal looked
        looked += 1
        return frame

    async with linked(one, other), anyio.create_task_group() as group:
        group.start_soon(one.send, map(look, frames(2000)))
        await anext(other)
        assert looked < 1000
        for _ in range(1999):
            await anext(other)
    assert looked == 2000
    assert one.stats().sent_frames == 2000


async def test_what_is_sent_at_once_is_bounded_by_time(linked: Linked) -> None:
    one, other = Port(), Port(offload=True, bytes=64 << 20)
    sent = await anyio.to_thread.run_sync(lambda: frames(500, 60000))
    async with linked(one, other):
        count = one.send_nowait(sent)
        assert 17 <= count < 500
        for size in (60, 1500):
            with pytest.raises(ConfigError, match="frame 300 has 13 bytes"):
                await one.send([*frames(300, size), bytes(13), *frames(1)])
        assert one.stats().sent_frames >= count


async def test_a_port_with_much_in_it_lets_the_loop_go_on_while_it_closes(linked: Linked) -> None:
    one, other = Port(bytes=64 << 20), Port(bytes=64 << 20, offload=True)
    sent = await anyio.to_thread.run_sync(lambda: frames(1000, 60000))
    async with linked(one, other):
        await one.send(sent)
        while other.take_nowait(256):
            await anyio.lowlevel.checkpoint()
        async with counted_turns() as turns:
            await other.close()
            # Two on a fast machine; one, if all went at once.
            assert turns.count >= 2


async def test_a_rate_limit_holds_frames_back(linked: Linked) -> None:
    one, other = Port(ingress=Limit(operations_per_second=1000, burst_operations=5)), Port()
    async with linked(one, other):
        await one.send(frames(30))
        taken = [number_of((await anext(other)).data) for _ in range(30)]
        assert taken == list(range(30))
        assert one.stats().throttled


def test_a_batch_is_a_sequence() -> None:
    batch = Batch(memoryview(b"aabbb"), [0, 2, 5], None)
    assert list(reversed(batch)) == [b"bbb", b"aa"]
    assert b"aa" in batch
    assert "2 bytes" in repr(batch.frame(0))


def test_a_port_may_be_made_before_there_is_a_loop_and_outlive_it(run: Any, linked: Linked) -> None:
    one, other = Port(depth=4), Port(depth=4)

    async def main() -> None:
        async with linked(one, other), anyio.create_task_group() as group:
            group.start_soon(one.send, frames(20))
            for number in range(20):
                assert number_of((await anext(other)).data) == number

    run(main)
    run(main)
