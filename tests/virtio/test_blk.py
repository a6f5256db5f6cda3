"""virtio/blk.py and blk_request.py: the model of a disk, with no loop and no data."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm._core import lib
from aiokvm.errors import ConfigError, VirtqueueError
from aiokvm.virtio.blk import (
    MAX_CLEAR_SECTORS,
    MAX_QUEUES,
    MAX_SEGMENTS,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
    BlkLayout,
    VirtioBlk,
)
from aiokvm.virtio.blk_request import BlkParser, BlkRange, BlkRequest
from aiokvm.virtio.queue import Virtqueue
from tests.virtio.driver import FakeMemory, PackedDriver, SplitDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTORS = 2048


class Data:
    """Records what the model does with its data mover."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def activate(self, host: object, features: int, queues: Sequence[Virtqueue]) -> None:
        self.calls.append(("activate", features))

    def notified(self, queue: int) -> None:
        self.calls.append(("notified", queue))

    def reset(self) -> None:
        self.calls.append(("reset",))

    def stop_queue(self, queue: int) -> None:
        self.calls.append(("stop_queue", queue))

    def set_writeback(self, writeback: bool) -> None:
        self.calls.append(("writeback", writeback))

    def set_capacity(self, sectors: int) -> None:
        self.calls.append(("capacity", sectors))

    def close(self) -> None:
        self.calls.append(("close",))


class Host:
    """Records what the model asks of its transport."""

    def __init__(self) -> None:
        self.changes = 0

    def config_changed(self) -> None:
        self.changes += 1


def make(**layout: Any) -> tuple[VirtioBlk, Data]:
    data = Data()
    device = VirtioBlk(BlkLayout(**{"size_bytes": SECTORS * 512, **layout}), data)
    device._host = Host()  # type: ignore[assignment]
    return device, data


def negotiate(device: VirtioBlk, features: int) -> None:
    assert device.accept_features(features)
    device.features = features
    device.activate(features, ())


def test_features_say_what_the_disk_can() -> None:
    always = (
        VIRTIO_BLK_F_SIZE_MAX
        | VIRTIO_BLK_F_SEG_MAX
        | VIRTIO_BLK_F_BLK_SIZE
        | VIRTIO_BLK_F_FLUSH
        | VIRTIO_BLK_F_TOPOLOGY
        | VIRTIO_BLK_F_CONFIG_WCE
    )
    assert make()[0].device_features == always | VIRTIO_BLK_F_WRITE_ZEROES
    assert make(readonly=True, discard_granularity=4096)[0].device_features == always | VIRTIO_BLK_F_RO
    clears = VIRTIO_BLK_F_WRITE_ZEROES | VIRTIO_BLK_F_DISCARD
    assert make(discard_granularity=4096)[0].device_features == always | clears
    assert make(queues=4)[0].device_features & VIRTIO_BLK_F_MQ
    assert make(queues=4, queue_size=64)[0].queue_size_max == (64,) * 4


def test_the_configuration_space_is_that_of_the_specification() -> None:
    device, _ = make(queues=3, discard_granularity=65536)
    assert len(device.config) == 60
    assert device.read_config(0, 4) == SECTORS
    assert device.read_config(4, 4) == 0
    assert device.read_config(8, 4) == 4 << 20  # size_max
    assert device.read_config(12, 4) == 254  # seg_max
    assert device.read_config(20, 4) == 512  # blk_size
    assert device.read_config(24, 1) == 3  # physical_block_exp: 4096 bytes
    assert device.read_config(25, 1) == 0
    assert device.read_config(26, 2) == 8  # min_io_size
    assert device.read_config(32, 1) == 1  # writeback
    assert device.read_config(33, 1) == 0  # unused0
    assert device.read_config(34, 2) == 3  # num_queues
    assert device.read_config(40, 4) == MAX_SEGMENTS
    assert device.read_config(44, 4) == 128  # discard_sector_alignment
    assert device.read_config(52, 4) == MAX_SEGMENTS
    assert device.read_config(56, 4) == 1  # write_zeroes_may_unmap, unused1
    assert device.read_config(60, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize(
    "layout",
    [
        {"size_bytes": 513},
        {"block_size": 1000},
        {"block_size": 256},
        {"block_size": 4096, "size_bytes": 4096 + 512},
        {"queues": 0},
        {"queues": 17},
        {"queue_size": 100},
        {"queue_size": 2048},
        {"serial": "x" * 21},
        {"serial": "é"},
        {"serial": "\ud800"},
    ],
)
def test_what_no_disk_can_be_is_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(**layout)


def test_the_cache_mode_follows_what_was_negotiated() -> None:
    flush, wce = VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE
    for features, expected in ((flush, True), (0, False), (flush | wce, True), (wce, False)):
        device, data = make()
        negotiate(device, features)
        assert data.calls[0] == ("writeback", expected)
    device, data = make(writeback=False)
    negotiate(device, flush)
    assert data.calls[0] == ("writeback", False)


def test_the_driver_may_change_the_cache_mode_if_it_took_the_feature() -> None:
    device, data = make()
    negotiate(device, VIRTIO_BLK_F_FLUSH)
    device.write_config(32, 1, 0)
    assert device.read_config(32, 1) == 1
    device, data = make()
    negotiate(device, VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_CONFIG_WCE)
    device.write_config(32, 1, 0)
    assert device.read_config(32, 1) == 0
    assert data.calls[-1] == ("writeback", False)
    device.write_config(32, 1, 0xFF)
    assert device.read_config(32, 1) == 1
    assert data.calls[-1] == ("writeback", True)
    # Nothing else can be written, by any width.
    before = bytes(device.config)
    for offset in range(60):
        for size in (1, 2, 4):
            if (offset, size) != (32, 1):
                device.write_config(offset, size, 0x55AA55AA)
    assert device.config == before
    device.write_config(32, 1, 0)
    device.reset()
    assert device.read_config(32, 1) == 1


def test_resize_tells_the_driver() -> None:
    device, data = make()
    device.resize(4096 * 512)
    assert device.read_config(0, 4) == 4096
    assert data.calls == [("capacity", 4096)]
    assert device._host.changes == 1  # type: ignore[union-attr]
    with pytest.raises(ConfigError):
        device.resize(100)


# ---- requests ----


class Rig:
    """A queue, its driver, and a parser."""

    def __init__(self, layout: Any = SplitDriver, **parser: Any) -> None:
        memory = FakeMemory((0, 1 << 20))
        self.driver = layout(memory, 64)
        self.queue = Virtqueue(memory, 64)
        self.driver.start(self.queue)
        features = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
        self.parser = BlkParser(**{"capacity_sectors": SECTORS, "features": features, **parser})

    def take(self, readable: Sequence[bytes], writable: Sequence[int]) -> BlkRequest | None:
        self.driver.add(readable, writable)
        chain = self.queue.pop()
        assert chain
        return self.parser.take(chain, 0)

    def answer(self) -> tuple[int, bytes]:
        """The bytes that the device says it has written, all of them."""
        self.queue.publish()
        [used] = self.driver.used()
        return used.written, used.data


def header(type_: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", type_, 0xDEAD, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def status_of(rig: Rig, readable: Sequence[bytes], writable: Sequence[int]) -> int:
    """The status of a request that is answered at once: the driver's last byte."""
    rig.driver.add(readable, writable)
    chain = rig.queue.pop()
    assert chain
    last = chain.writable[-1]
    assert rig.parser.take(chain, 0) is None
    rig.answer()
    return last[-1]


@pytest.mark.parametrize("layout", [SplitDriver, PackedDriver])
def test_a_request_may_lie_in_any_descriptors(layout: Any) -> None:
    rig = Rig(layout)
    data = bytes(range(256)) * 4
    head = header(VIRTIO_BLK_T_OUT, 7)
    request = rig.take([head[:1], head[1:9], head[9:] + data[:100], data[100:]], [1])
    assert request
    assert (request.type, request.offset, request.length) == (VIRTIO_BLK_T_OUT, 7 * 512, 1024)
    assert bytes(request.read(1000)) + bytes(request.read(24)) == data
    request.complete(VIRTIO_BLK_S_OK)
    assert rig.answer() == (1, b"\0")
    request = rig.take([header(VIRTIO_BLK_T_IN, 3)], [500, 13])  # the status behind the data
    assert request
    request.write(b"x" * 512)
    request.complete(VIRTIO_BLK_S_OK)
    assert rig.answer() == (513, b"x" * 512 + b"\0")


def test_pieces_cover_a_request() -> None:
    rig = Rig()
    request = rig.take([header(VIRTIO_BLK_T_IN, 2)], [512 * 5, 1])
    assert request
    assert list(request.pieces(1024)) == [(1024, 1024), (2048, 1024), (3072, 512)]


def test_what_fails_says_so_in_the_last_byte() -> None:
    rig = Rig()
    request = rig.take([header(VIRTIO_BLK_T_IN)], [512, 1])
    assert request
    request.write(b"x" * 100)
    request.complete(VIRTIO_BLK_S_IOERR)
    written, _ = rig.answer()
    assert written == 1


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([b""], [1]), ([header(0)[:15]], [513]), ([], [16]), ([header(0)], []), ([header(1), bytes(512)], [])],
    ids=["empty", "short", "no header", "no status", "status read-only"],
)
def test_what_is_no_request_breaks_the_queue(readable: list[bytes], writable: list[int]) -> None:
    with pytest.raises(VirtqueueError):
        Rig().take(readable, writable)


@pytest.mark.parametrize(
    ("type_", "sector", "data", "room"),
    [
        (VIRTIO_BLK_T_IN, SECTORS, 0, 512),
        (VIRTIO_BLK_T_IN, SECTORS - 1, 0, 1024),
        (VIRTIO_BLK_T_OUT, SECTORS - 1, 1024, 0),
        (VIRTIO_BLK_T_IN, (1 << 64) - 1, 0, 512),
        (VIRTIO_BLK_T_OUT, 1 << 55, 512, 0),
        (VIRTIO_BLK_T_IN, 0, 0, 511),
        (VIRTIO_BLK_T_OUT, 0, 513, 0),
        (VIRTIO_BLK_T_IN, 0, 0, 0),
        (VIRTIO_BLK_T_OUT, 0, 0, 0),
        (VIRTIO_BLK_T_IN, 0, 512, 0),
        (VIRTIO_BLK_T_OUT, 0, 0, 512),
        (VIRTIO_BLK_T_OUT, 0, 512, 512),
    ],
)
def test_moves_that_cannot_be(type_: int, sector: int, data: int, room: int) -> None:
    readable = [header(type_, sector), bytes(data)]
    assert status_of(Rig(), readable, [room, 1]) == VIRTIO_BLK_S_IOERR


def test_requests_are_whole_blocks() -> None:
    rig = Rig(block_size=4096)
    assert status_of(rig, [header(VIRTIO_BLK_T_IN, 1)], [4096, 1]) == VIRTIO_BLK_S_IOERR
    assert status_of(rig, [header(VIRTIO_BLK_T_IN, 8)], [512, 1]) == VIRTIO_BLK_S_IOERR
    assert rig.take([header(VIRTIO_BLK_T_IN, 8)], [4096, 1])


@pytest.mark.parametrize("type_", [2, 3, 5, 9, 10, 12, 14, 0x8000_0000, 0xFFFF_FFFF])
def test_unknown_types_are_unsupported(type_: int) -> None:
    assert status_of(Rig(), [header(type_), bytes(16)], [1]) == VIRTIO_BLK_S_UNSUPP


def test_what_was_not_negotiated_is_unsupported() -> None:
    rig = Rig(features=0)
    for type_ in (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
        assert status_of(rig, [header(type_), segment(0, 1)], [1]) == VIRTIO_BLK_S_UNSUPP


def test_a_read_only_disk_is_not_written() -> None:
    rig = Rig(readonly=True)
    assert status_of(rig, [header(VIRTIO_BLK_T_OUT), bytes(512)], [1]) == VIRTIO_BLK_S_IOERR
    for type_ in (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
        assert status_of(rig, [header(type_), segment(0, 1)], [1]) == VIRTIO_BLK_S_IOERR
    assert rig.take([header(VIRTIO_BLK_T_FLUSH)], [1])


@pytest.mark.parametrize("room", [0, 1, 5, 19, 20, 21, 100])
def test_the_id_is_cut_to_fit(room: int) -> None:
    rig = Rig(serial="disk-1")
    rig.driver.add([header(VIRTIO_BLK_T_GET_ID)], [room, 1])
    chain = rig.queue.pop()
    assert chain
    assert rig.parser.take(chain, 0) is None
    written, data = rig.answer()
    length = min(room, 20)
    assert written == length + 1
    assert data[:length] == b"disk-1".ljust(20, b"\0")[:length]


@pytest.mark.parametrize(
    ("type_", "segments", "status"),
    [
        (VIRTIO_BLK_T_DISCARD, b"", VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, bytes(15), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, bytes(17), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, bytes(16 * (MAX_SEGMENTS + 1)), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, bytes(16 * MAX_SEGMENTS), VIRTIO_BLK_S_OK),
        (VIRTIO_BLK_T_DISCARD, segment(SECTORS, 1), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, segment((1 << 64) - 1, 2), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 0xFFFF_FFFF), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, segment(0, 1, 1), VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_DISCARD, segment(0, 1) + segment(0, 1, 2), VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1, 2), VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1) + segment(SECTORS, 1), VIRTIO_BLK_S_IOERR),
    ],
)
def test_segments_that_cannot_be(type_: int, segments: bytes, status: int) -> None:
    assert status_of(Rig(), [header(type_), segments], [1]) == status


def test_segments() -> None:
    rig = Rig()
    body = segment(8, 16) + segment(0, 0) + segment(32, 1, 1)
    request = rig.take([header(VIRTIO_BLK_T_WRITE_ZEROES), body], [1])
    assert request
    assert request.ranges == (BlkRange(4096, 8192, False), BlkRange(16384, 512, True))
    assert request.cost_bytes == 8192 + 512


@pytest.mark.parametrize("type_", [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES])
def test_a_range_longer_than_promised_is_refused(type_: int) -> None:
    rig = Rig(capacity_sectors=4 * MAX_CLEAR_SECTORS)
    assert rig.take([header(type_), segment(1, MAX_CLEAR_SECTORS)], [1])
    assert status_of(rig, [header(type_), segment(1, MAX_CLEAR_SECTORS + 1)], [1]) == VIRTIO_BLK_S_IOERR


def test_the_limits_of_both_data_movers_are_the_same() -> None:
    assert MAX_QUEUES == lib.AIOKVM_BLK_QUEUES
    assert MAX_SEGMENTS == lib.AIOKVM_BLK_SEGMENTS
    assert MAX_CLEAR_SECTORS == lib.AIOKVM_BLK_CLEAR_SECTORS


def test_a_request_is_void_once_the_queue_is_stopped() -> None:
    rig = Rig()
    request = rig.take([header(VIRTIO_BLK_T_IN)], [512, 1])
    assert request
    rig.queue.stop()
    assert request.void
    request.write(b"x" * 512)
    request.complete(VIRTIO_BLK_S_OK)
    assert rig.driver.used() == []


@given(
    st.binary(max_size=200),
    st.lists(st.integers(0, 3000), max_size=4),
    st.booleans(),
    st.sampled_from([512, 4096]),
)
def test_any_bytes_are_a_request_or_answered_or_no_request(
    data: bytes, writable: list[int], readonly: bool, block_size: int
) -> None:
    rig = Rig(readonly=readonly, block_size=block_size)
    try:
        request = rig.take([data], writable)
    except VirtqueueError:
        assert len(data) < 16 or not sum(writable)
        return
    if request is None:
        rig.answer()
        return
    end = SECTORS * 512
    assert 0 <= request.offset <= request.offset + request.length <= end
    assert all(0 <= part.offset < part.offset + part.length <= end for part in request.ranges)
    assert not (request.offset | request.length) % block_size
    assert not readonly or request.type in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH)
