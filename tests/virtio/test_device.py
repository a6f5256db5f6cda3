"""What a device has that overrides nothing, and where it says that it is in no machine."""

from __future__ import annotations

import pytest

from aiokvm.errors import DeviceError
from aiokvm.virtio.constants import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
)
from aiokvm.virtio.device import VirtioDevice
from tests.virtio.transport import ALIVE, Transport


class Plain(VirtioDevice):
    device_id = 42
    queue_size_max = (8,)


def test_defaults() -> None:
    device = Plain()
    assert device.device_features == 0
    assert device.ring_features == (
        VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_RING_PACKED | VIRTIO_F_IN_ORDER
    )
    assert not device.shared_memory
    assert device.accept_features(1 << 5)
    assert (device.features, device.queues) == (0, ())
    assert device.reset() is None
    assert device.stop_queue(0) is None
    assert device.close() is None


def test_without_a_configuration_space_it_reads_as_ones() -> None:
    device = Plain()
    assert [device.read_config(0, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    device.write_config(0, 4, 1)


def test_a_configuration_space_is_little_endian_and_ones_follow_it() -> None:
    device = Plain()
    device.config = bytearray(b"\x01\x02\x03")
    assert device.read_config(0, 2) == 0x0201
    assert device.read_config(2, 2) == 0xFF03
    assert device.read_config(4, 4) == 0xFFFF_FFFF
    device.write_config(0, 1, 9)
    assert device.config == b"\x01\x02\x03"


def test_a_device_that_is_in_no_machine_has_no_host() -> None:
    with pytest.raises(DeviceError, match="Plain is not attached to a machine"):
        _ = Plain().host


def test_a_device_that_does_nothing_survives_its_driver() -> None:
    transport = Transport(Plain())
    [driver] = transport.start()
    driver.add([b"x"])
    transport.registers.notify(0)
    assert transport.status == ALIVE
    assert driver.used() == []
    transport.status = 0
    assert transport.status == 0
