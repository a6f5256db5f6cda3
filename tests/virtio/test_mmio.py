"""The registers of virtio-mmio: virtio 1.2, sections 2.1 to 2.5, 3 and 4.2, and hostile drivers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import ConfigError, VirtqueueError
from aiokvm.virtio import mmio
from aiokvm.virtio.constants import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
)
from tests.virtio.driver import SplitDriver
from tests.virtio.guest import FakeHost
from tests.virtio.transport import ALIVE, STARTED, RecordingDevice, Transport

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

RING = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_RING_PACKED | VIRTIO_F_IN_ORDER
FEATURES_OK = STARTED | VIRTIO_CONFIG_S_FEATURES_OK
READABLE = {
    *(0x00, 0x04, 0x08, 0x0C, 0x10, 0x34, 0x44, 0x60, 0x70, 0xFC),
    *(mmio.VIRTIO_MMIO_SHM_LEN_LOW, mmio.VIRTIO_MMIO_SHM_LEN_HIGH),
    *(mmio.VIRTIO_MMIO_SHM_BASE_LOW, mmio.VIRTIO_MMIO_SHM_BASE_HIGH),
}


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def transport(device: RecordingDevice) -> Transport:
    return Transport(device)


class Drain:
    """An awaitable that is over when it is told."""

    def __init__(self) -> None:
        self.over = False
        self.failure: Exception | None = None

    def __await__(self) -> Generator[None, None, None]:
        while not self.over:
            yield
        if self.failure:
            raise self.failure


def step(coroutine: Any) -> bool:
    """Whether it has come to its end."""
    try:
        coroutine.send(None)
    except StopIteration:
        return True
    return False


def started(transport: Transport, register: int, value: int) -> Coroutine[Any, Any, None]:
    """A write whose end has to be waited for."""
    done: Any = transport.registers.write(register, 4, value)
    assert done is not None
    assert not step(done)
    return done  # type: ignore[no-any-return]


# What it is: 4.2.2.


def test_the_device_is_identified(transport: Transport) -> None:
    assert transport.read(mmio.VIRTIO_MMIO_MAGIC_VALUE) == 0x74726976
    assert transport.read(mmio.VIRTIO_MMIO_VERSION) == 2
    assert transport.read(mmio.VIRTIO_MMIO_DEVICE_ID) == 42
    assert transport.read(mmio.VIRTIO_MMIO_VENDOR_ID) == mmio.VENDOR_ID


def test_a_new_device_is_reset(transport: Transport) -> None:
    assert transport.status == 0
    assert transport.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS) == 0
    assert [transport.ready(queue) for queue in range(3)] == [0, 0, 0]


# Features: 2.2, 6.


def test_features_are_offered_in_two_words(transport: Transport) -> None:
    assert transport.offered() == VIRTIO_F_VERSION_1 | 1 << 5 | 1 << 50 | RING
    for select in 2, 3, 0xFFFF_FFFF:
        transport.write(mmio.VIRTIO_MMIO_DEVICE_FEATURES_SEL, select)
        assert transport.read(mmio.VIRTIO_MMIO_DEVICE_FEATURES) == 0


def test_a_device_offers_only_bits_of_its_own_and_rings_that_there_are() -> None:
    device = RecordingDevice()
    device.device_features = (1 << 64) - 1
    device.ring_features = VIRTIO_F_EVENT_IDX | VIRTIO_F_NOTIFICATION_DATA | VIRTIO_F_RING_RESET
    offered = Transport(device).offered()
    assert offered == (1 << 24) - 1 | (1 << 64) - (1 << 50) | VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX


def test_any_subset_with_version_1_is_accepted(transport: Transport, device: RecordingDevice) -> None:
    for features in VIRTIO_F_VERSION_1, VIRTIO_F_VERSION_1 | 1 << 5, transport.offered():
        assert transport.negotiate(features)
    transport.status = ALIVE
    assert device.calls[-1] == ("activate", transport.offered(), [False, False])


@pytest.mark.parametrize("extra", [1 << 6, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_RING_RESET, 1 << 63])
def test_features_that_were_not_offered_leave_features_ok_0(transport: Transport, extra: int) -> None:
    assert not transport.negotiate(VIRTIO_F_VERSION_1 | extra)
    transport.accept(VIRTIO_F_VERSION_1)
    transport.status = FEATURES_OK
    assert transport.status == FEATURES_OK


@pytest.mark.parametrize("select", [2, 3, 1 << 31, 0xFFFF_FFFF])
def test_features_beyond_64_were_not_offered(transport: Transport, select: int) -> None:
    transport.status = STARTED
    transport.accept(VIRTIO_F_VERSION_1)
    transport.write(mmio.VIRTIO_MMIO_DRIVER_FEATURES_SEL, select)
    transport.write(mmio.VIRTIO_MMIO_DRIVER_FEATURES, 1)
    transport.status = FEATURES_OK
    assert transport.status == STARTED


def test_without_version_1_features_ok_stays_0(transport: Transport) -> None:
    assert not transport.negotiate(1 << 5)


def test_a_device_may_refuse_a_subset(device: RecordingDevice) -> None:
    device.accept_features = lambda features: not features & 1 << 5  # type: ignore[method-assign]
    transport = Transport(device)
    assert not transport.negotiate(VIRTIO_F_VERSION_1 | 1 << 5)
    assert transport.negotiate(VIRTIO_F_VERSION_1)


def test_features_stand_once_they_are_ok(transport: Transport, device: RecordingDevice) -> None:
    assert transport.negotiate(VIRTIO_F_VERSION_1)
    transport.accept(VIRTIO_F_VERSION_1 | 1 << 5)
    transport.status = ALIVE
    assert device.calls[-1][:2] == ("activate", VIRTIO_F_VERSION_1)


def test_a_reset_lets_features_be_negotiated_anew(transport: Transport, device: RecordingDevice) -> None:
    transport.start(VIRTIO_F_VERSION_1 | 1 << 5)
    transport.start(VIRTIO_F_VERSION_1)
    assert device.features == VIRTIO_F_VERSION_1


# Status: 2.1, 3.1.


def test_status_follows_the_driver(transport: Transport) -> None:
    transport.accept(VIRTIO_F_VERSION_1)
    for status in VIRTIO_CONFIG_S_ACKNOWLEDGE, STARTED, FEATURES_OK, ALIVE, ALIVE | VIRTIO_CONFIG_S_FAILED:
        transport.status = status
        assert transport.status == status


def test_status_bits_are_never_cleared_but_by_a_reset(transport: Transport, device: RecordingDevice) -> None:
    transport.start()
    calls = list(device.calls)
    transport.status = VIRTIO_CONFIG_S_ACKNOWLEDGE
    assert transport.status == ALIVE
    transport.status = ALIVE
    assert device.calls == calls
    transport.status = 0
    assert transport.status == 0


def test_bits_that_are_not_the_drivers_are_ignored(transport: Transport) -> None:
    transport.status = VIRTIO_CONFIG_S_NEEDS_RESET | 0x30 | VIRTIO_CONFIG_S_DRIVER | 0xFFFF_FF00
    assert transport.status == VIRTIO_CONFIG_S_DRIVER


def test_driver_ok_without_features_ok_is_ignored(transport: Transport, device: RecordingDevice) -> None:
    transport.status = STARTED | VIRTIO_CONFIG_S_DRIVER_OK
    assert transport.status == STARTED
    assert device.calls == []


def test_nothing_is_consumed_before_driver_ok(transport: Transport, device: RecordingDevice) -> None:
    assert transport.negotiate()
    transport.set_up(0, SplitDriver(transport.memory, 8))
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    transport.registers.interrupt()
    transport.registers.config_changed()
    assert device.calls == [("reset",)]
    assert transport.interrupts.raised == []
    assert not transport.registers.queues[0].ready
    assert transport.registers.dropped_notifies == 1


def test_driver_ok_activates_and_looks_at_the_queues(transport: Transport, device: RecordingDevice) -> None:
    assert transport.negotiate()
    transport.set_up(1, SplitDriver(transport.memory, 8))
    transport.status = ALIVE
    assert device.calls[1:] == [("activate", VIRTIO_F_VERSION_1, [False, True]), ("notified", 1)]
    assert [queue.size for queue in device.queues] == [0, 8]


# Queues: 4.2.3.2, and the hostile cases.


def test_queue_sizes_are_told(transport: Transport) -> None:
    sizes = []
    for queue in 0, 1, 2, 0xFFFF_FFFF:
        transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, queue)
        sizes.append(transport.read(mmio.VIRTIO_MMIO_QUEUE_NUM_MAX))
    assert sizes == [16, 8, 0, 0]


def test_a_queue_is_started_where_the_driver_says(transport: Transport) -> None:
    drivers = transport.start()
    assert [transport.ready(queue) for queue in range(3)] == [1, 1, 0]
    token = drivers[1].add([b"hello"], [8])
    chain = transport.registers.queues[1].pop()
    assert chain is not None
    assert chain.read() == b"hello"
    chain.write(b"world")
    chain.push()
    assert transport.registers.queues[1].publish()
    [used] = drivers[1].used()
    assert (used.token, used.data) == (token, b"world")


@pytest.mark.parametrize("packed", [0, VIRTIO_F_RING_PACKED])
@pytest.mark.parametrize("size", [0, 3, 5, 12, 17, 32, 1 << 15, 1 << 16, 0xFFFF_FFFF])
def test_a_queue_of_a_size_that_cannot_be_never_gets_ready(
    transport: Transport, device: RecordingDevice, size: int, packed: int
) -> None:
    transport.negotiate(VIRTIO_F_VERSION_1 | packed)
    transport.set_up(0, SplitDriver(transport.memory, 8))
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 0)
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NUM, size)
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
    # A packed queue may have any size (2.8.10.1).
    possible = bool(packed) and 0 < size <= 16
    assert transport.ready(0) == possible
    transport.status = ALIVE
    assert device.queues[0].ready == possible


def test_a_queue_without_a_size_never_gets_ready(transport: Transport) -> None:
    transport.negotiate()
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
    assert transport.ready(0) == 0


def test_what_is_ready_cannot_be_changed(transport: Transport, device: RecordingDevice) -> None:
    transport.negotiate()
    transport.set_up(0, SplitDriver(transport.memory, 8))
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NUM, 16)
    transport.write(mmio.VIRTIO_MMIO_QUEUE_DESC_LOW, 0xFFFF_FFF0)
    transport.status = ALIVE
    assert device.queues[0].size == 8
    assert transport.reasons == []


def test_nothing_about_a_queue_changes_after_driver_ok(transport: Transport, device: RecordingDevice) -> None:
    transport.negotiate()
    transport.set_up(0, SplitDriver(transport.memory, 8))
    transport.status = ALIVE
    for queue in range(2):
        transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, queue)
        for register in range(mmio.VIRTIO_MMIO_QUEUE_DESC_LOW, mmio.VIRTIO_MMIO_QUEUE_USED_HIGH + 4, 4):
            transport.write(register, 0x1000)
        transport.write(mmio.VIRTIO_MMIO_QUEUE_NUM, 4)
        transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
    assert [transport.ready(queue) for queue in range(2)] == [1, 0]
    assert [queue.size for queue in device.queues] == [8, 0]


def test_registers_of_an_absent_queue_do_nothing(transport: Transport) -> None:
    transport.negotiate()
    transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, 2)
    for register in range(mmio.VIRTIO_MMIO_QUEUE_NUM, mmio.VIRTIO_MMIO_QUEUE_USED_HIGH + 4, 4):
        if register not in (mmio.VIRTIO_MMIO_STATUS, mmio.VIRTIO_MMIO_QUEUE_NOTIFY):
            transport.write(register, 1)
    assert transport.ready(2) == 0


@pytest.mark.parametrize("area", ["desc", "driver", "device"])
@pytest.mark.parametrize("address", [3, 0x10_0000_0000, (1 << 64) - 16])
def test_rings_that_cannot_be_need_a_reset(transport: Transport, area: str, address: int) -> None:
    transport.negotiate()
    driver = SplitDriver(transport.memory, 8)
    setattr(driver, area, address)
    transport.set_up(0, driver)
    transport.status = ALIVE
    assert transport.status == ALIVE | VIRTIO_CONFIG_S_NEEDS_RESET
    assert transport.interrupts.raised == [mmio.VIRTIO_MMIO_INT_CONFIG]
    assert len(transport.reasons) == 1
    assert transport.device.calls == [("reset",)]  # type: ignore[attr-defined]


def test_the_driver_takes_a_queue_back(transport: Transport, device: RecordingDevice) -> None:
    drivers = transport.start()
    drivers[0].add([b"x"])
    transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, 0)
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 0)
    assert device.calls[-1] == ("stop_queue", 0)
    assert [transport.ready(queue) for queue in range(2)] == [0, 1]
    assert device.queues[0].pop() is None
    # It is not to be had back without a reset.
    transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, 0)
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
    assert transport.ready(0) == 0


def test_a_queue_is_taken_back_before_driver_ok(transport: Transport, device: RecordingDevice) -> None:
    transport.negotiate()
    transport.set_up(0, SplitDriver(transport.memory, 8))
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 0)
    assert transport.ready(0) == 0
    assert device.calls == [("reset",)]
    transport.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
    assert transport.ready(0) == 1


def test_a_queue_is_ready_until_nothing_of_it_is_touched(
    transport: Transport, device: RecordingDevice
) -> None:
    transport.start()
    device.drains.append(drain := Drain())
    transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, 1)
    done = started(transport, mmio.VIRTIO_MMIO_QUEUE_READY, 0)
    assert transport.ready(1) == 1
    drain.over = True
    assert step(done)
    assert transport.ready(1) == 0
    assert not device.queues[1].ready


# Notifications: 2.3, 4.2.3.3.


def test_a_notification_reaches_the_device(transport: Transport, device: RecordingDevice) -> None:
    transport.start()
    device.calls.clear()
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 1)
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    assert device.calls == [("notified", 1), ("notified", 0)]


@pytest.mark.parametrize("queue", [2, 3, 0x1_0000, 0xFFFF_FFFF])
def test_a_notification_of_an_absent_queue_is_dropped(
    transport: Transport, device: RecordingDevice, queue: int
) -> None:
    transport.start()
    device.calls.clear()
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, queue)
    assert device.calls == []
    assert transport.registers.dropped_notifies == 1


def test_a_notification_of_a_queue_that_is_not_set_up_is_dropped(
    transport: Transport, device: RecordingDevice
) -> None:
    transport.negotiate()
    transport.set_up(0, SplitDriver(transport.memory, 8))
    transport.status = ALIVE
    device.calls.clear()
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 1)
    assert device.calls == []
    assert transport.registers.dropped_notifies == 1


# Interrupts: 4.2.3.4.


def test_events_stand_in_interrupt_status_until_they_are_acknowledged(transport: Transport) -> None:
    transport.start()
    transport.registers.interrupt()
    transport.registers.config_changed()
    transport.registers.interrupt()
    assert transport.interrupts.raised == [1, 2, 1]
    assert transport.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS) == 3
    transport.write(mmio.VIRTIO_MMIO_INTERRUPT_ACK, 1)
    assert transport.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS) == 2
    transport.write(mmio.VIRTIO_MMIO_INTERRUPT_ACK, 0xFFFF_FFFF)
    assert transport.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS) == 0


# Configuration space: 2.5.


def test_configuration_space_is_read_before_features_ok(transport: Transport) -> None:
    assert transport.registers.read(0x100, 1) == 0x00
    assert transport.registers.read(0x102, 2) == 0x0302
    assert transport.registers.read(0x10C, 4) == 0x0F0E0D0C


def test_configuration_space_is_written(transport: Transport, device: RecordingDevice) -> None:
    for size in 1, 2, 4:
        transport.registers.write(0x108, size, 0x11)
    assert device.calls == [("write_config", 8, size, 0x11) for size in (1, 2, 4)]


@pytest.mark.parametrize(
    ("offset", "size"), [(0x110, 1), (0x110, 4), (0xFFC, 4), (0x100, 8), (0x101, 2), (0x102, 4), (0x103, 3)]
)
def test_configuration_space_past_its_end_or_with_odd_widths(
    transport: Transport, device: RecordingDevice, offset: int, size: int
) -> None:
    assert transport.registers.read(offset, size) == (1 << 8 * size) - 1
    before = bytes(device.config)
    transport.registers.write(offset, size, 0)
    assert device.config == before


def test_a_read_across_the_end_of_configuration_space(transport: Transport, device: RecordingDevice) -> None:
    del device.config[14:]
    assert transport.registers.read(0x10C, 4) == 0xFFFF0D0C


def test_the_config_generation_changes_with_the_configuration(transport: Transport) -> None:
    transport.start()
    first = transport.read(mmio.VIRTIO_MMIO_CONFIG_GENERATION)
    assert transport.read(mmio.VIRTIO_MMIO_CONFIG_GENERATION) == first
    transport.registers.config_changed()
    assert transport.read(mmio.VIRTIO_MMIO_CONFIG_GENERATION) != first
    transport.registers.config_generation = 0xFFFF_FFFF
    transport.registers.config_changed()
    assert transport.read(mmio.VIRTIO_MMIO_CONFIG_GENERATION) == 0


# Shared memory: 2.10.


def test_shared_memory_regions_are_told() -> None:
    transport = Transport(
        RecordingDevice(), shared={1: (0xD010_0000, 0x2000), 7: (0x12_3456_7000, 0x1_0000_1000)}
    )
    found = {}
    for shmid in 1, 7:
        transport.write(mmio.VIRTIO_MMIO_SHM_SEL, shmid)
        registers = range(mmio.VIRTIO_MMIO_SHM_LEN_LOW, mmio.VIRTIO_MMIO_SHM_BASE_HIGH + 4, 4)
        found[shmid] = [transport.read(register) for register in registers]
    assert found == {1: [0x2000, 0, 0xD010_0000, 0], 7: [0x1000, 1, 0x3456_7000, 0x12]}


@pytest.mark.parametrize("shmid", [0, 1, 0xFFFF_FFFF])
def test_a_shared_memory_region_that_is_not_there_has_length_minus_1(
    transport: Transport, shmid: int
) -> None:
    transport.write(mmio.VIRTIO_MMIO_SHM_SEL, shmid)
    for register in range(mmio.VIRTIO_MMIO_SHM_LEN_LOW, mmio.VIRTIO_MMIO_SHM_BASE_HIGH + 4, 4):
        assert transport.read(register) == 0xFFFF_FFFF


# Other accesses.


def test_only_aligned_words_reach_control_registers(transport: Transport) -> None:
    for offset, size in (0, 1), (0, 2), (0, 8), (2, 4), (0x70, 1), (0x71, 4), (0x6E, 4):
        assert transport.registers.read(offset, size) == 0
    for offset, size in (0x70, 1), (0x70, 2), (0x70, 8), (0x6E, 4):
        transport.registers.write(offset, size, 0x0101_0101)
    assert transport.status == 0


def test_what_cannot_be_read_reads_as_zero(transport: Transport) -> None:
    transport.start()
    for register in set(range(0, 0x100, 4)) - READABLE:
        assert transport.read(register) == 0


def test_what_can_only_be_read_is_not_written(transport: Transport) -> None:
    before = {register: transport.read(register) for register in READABLE}
    for register in READABLE - {mmio.VIRTIO_MMIO_QUEUE_READY, mmio.VIRTIO_MMIO_STATUS}:
        transport.write(register, 0xFFFF_FFFF)
    assert {register: transport.read(register) for register in READABLE} == before


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 0x120), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1)
        )
    )
)
def test_no_sequence_of_accesses_raises(accesses: list[tuple[bool, int, int, int]]) -> None:
    transport = Transport(RecordingDevice())
    transport.start()
    for is_write, offset, size, value in accesses:
        if is_write:
            assert transport.registers.write(offset, size, value) is None
        else:
            assert 0 <= transport.registers.read(offset, size) < 1 << 8 * size


# DEVICE_NEEDS_RESET: 2.1.2.


def test_a_broken_queue_needs_a_reset(transport: Transport, device: RecordingDevice) -> None:
    def notified(queue: int) -> None:
        raise VirtqueueError("the index is ahead")

    transport.start()
    device.notified = notified  # type: ignore[method-assign]
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 1)
    assert transport.status == ALIVE | VIRTIO_CONFIG_S_NEEDS_RESET
    assert transport.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS) == mmio.VIRTIO_MMIO_INT_CONFIG
    assert transport.reasons == ["queue 1: the index is ahead"]


def test_a_device_that_needs_a_reset_says_so_once_and_stands_still(
    transport: Transport, device: RecordingDevice
) -> None:
    transport.start()
    device.calls.clear()
    transport.registers.needs_reset("a")
    transport.registers.needs_reset("b")
    transport.registers.interrupt()
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    assert transport.reasons == ["a"]
    assert transport.interrupts.raised == [mmio.VIRTIO_MMIO_INT_CONFIG]
    assert device.calls == []
    transport.start()
    assert transport.status == ALIVE
    transport.registers.needs_reset("c")
    assert transport.reasons == ["a", "c"]


def test_before_driver_ok_there_is_no_interrupt_of_it(transport: Transport) -> None:
    transport.status = STARTED
    transport.registers.needs_reset("a")
    assert transport.status == STARTED | VIRTIO_CONFIG_S_NEEDS_RESET
    assert transport.interrupts.raised == []


def test_a_device_that_fails_to_activate_needs_a_reset(transport: Transport, device: RecordingDevice) -> None:
    def activate(features: int, queues: object) -> None:
        raise ZeroDivisionError

    device.activate = activate  # type: ignore[method-assign]
    transport.negotiate()
    with pytest.raises(ZeroDivisionError):
        transport.status = ALIVE
    assert transport.status & VIRTIO_CONFIG_S_NEEDS_RESET


# Reset: 2.4, 4.2.2.1.


def test_a_reset_leaves_nothing(transport: Transport, device: RecordingDevice) -> None:
    drivers = transport.start(VIRTIO_F_VERSION_1 | 1 << 5)
    drivers[0].add([b"x"])
    chain = device.queues[0].pop()
    assert chain is not None
    transport.registers.interrupt()
    transport.registers.config_changed()
    transport.status = 0
    assert device.calls[-1] == ("reset",)
    assert transport.status == 0
    assert transport.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS) == 0
    assert [transport.ready(queue) for queue in range(2)] == [0, 0]
    assert (device.features, device.queues) == (0, ())
    chain.push()
    assert drivers[0].used() == []
    transport.status = ALIVE
    assert transport.status == STARTED  # no features were accepted


def test_a_reset_waits_until_what_is_in_flight_is_drained(
    transport: Transport, device: RecordingDevice
) -> None:
    drivers = transport.start()
    drivers[0].add([], [4])
    chain = device.queues[0].pop()
    assert chain is not None
    device.drains.append(drain := Drain())
    done = started(transport, mmio.VIRTIO_MMIO_STATUS, 0)
    # Buffers are in use until then, and the driver is told so.
    assert transport.status == ALIVE
    transport.write(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    transport.registers.interrupt()
    transport.registers.needs_reset("meanwhile")
    transport.status = STARTED
    assert device.calls[-1] == ("reset",)
    assert transport.interrupts.raised == []
    assert transport.reasons == []
    drain.over = True
    assert step(done)
    assert transport.status == 0
    chain.push()
    assert drivers[0].used() == []


def test_a_reset_that_fails_has_happened(transport: Transport, device: RecordingDevice) -> None:
    transport.start()
    device.drains.append(drain := Drain())
    done = started(transport, mmio.VIRTIO_MMIO_STATUS, 0)
    drain.over, drain.failure = True, ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        done.send(None)
    assert transport.status == 0


def test_a_reset_whose_wait_is_cancelled_can_be_repeated(
    transport: Transport, device: RecordingDevice
) -> None:
    transport.start()
    device.drains.append(Drain())
    done = started(transport, mmio.VIRTIO_MMIO_STATUS, 0)
    done.close()
    assert transport.status == ALIVE
    transport.status = 0
    assert transport.status == 0
    transport.start()
    assert transport.status == ALIVE


def test_of_two_resets_at_once_the_last_ends_both(transport: Transport, device: RecordingDevice) -> None:
    transport.start()
    drains = Drain(), Drain()
    device.drains += drains
    first, second = (started(transport, mmio.VIRTIO_MMIO_STATUS, 0) for _ in range(2))
    drains[0].over = True
    assert step(first)
    assert transport.status == ALIVE
    drains[1].over = True
    assert step(second)
    assert transport.status == 0


def test_a_queue_that_a_reset_has_stopped_first_is_not_stopped_again(
    transport: Transport, device: RecordingDevice
) -> None:
    transport.start()
    device.drains.append(drain := Drain())
    transport.write(mmio.VIRTIO_MMIO_QUEUE_SEL, 0)
    done = started(transport, mmio.VIRTIO_MMIO_QUEUE_READY, 0)
    transport.start()
    drain.over = True
    assert step(done)
    assert transport.ready(0) == 1
    assert device.queues[0].ready


@pytest.mark.parametrize("size", [0, -1, 3, 2048])
def test_a_device_with_queues_that_cannot_be_is_refused(size: int) -> None:
    device = RecordingDevice()
    device.queue_size_max = (size,)
    with pytest.raises(ConfigError, match="queue"):
        Transport(device)


def test_a_closed_transport_lets_go_of_memory(transport: Transport, device: RecordingDevice) -> None:
    transport.start()
    transport.status = 0
    transport.registers.close()
    assert transport.registers.queues == ()
    assert device.queues == ()


def test_driver_ok_serves_one_queue_and_leaves_the_others_to_later_turns() -> None:
    """Full queues, all at once, do not add up to one long write."""

    class Many(RecordingDevice):
        queue_size_max = (8,) * 16

    device, host = Many(), FakeHost()
    device._host = host
    transport = Transport(device)
    transport.start()
    assert [call for call in device.calls if call[0] == "notified"] == [("notified", 0)]
    assert host.agains == list(range(1, 16))
