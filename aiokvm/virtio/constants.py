"""Numbers of virtio 1.2 that all devices share; what is one device's own stands in its file."""

from __future__ import annotations

# Device status field (2.1).
VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
VIRTIO_CONFIG_S_DRIVER = 2
VIRTIO_CONFIG_S_DRIVER_OK = 4
VIRTIO_CONFIG_S_FEATURES_OK = 8
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# Reserved feature bits (6), as masks of the 64-bit feature word.
VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32
VIRTIO_F_ACCESS_PLATFORM = 1 << 33
VIRTIO_F_RING_PACKED = 1 << 34
VIRTIO_F_IN_ORDER = 1 << 35
VIRTIO_F_ORDER_PLATFORM = 1 << 36
VIRTIO_F_SR_IOV = 1 << 37
VIRTIO_F_NOTIFICATION_DATA = 1 << 38
VIRTIO_F_NOTIF_CONFIG_DATA = 1 << 39
VIRTIO_F_RING_RESET = 1 << 40

# Bits 0 to 23 and 50 to 127 are a device type's own (2.2).
DEVICE_FEATURES = (1 << 24) - 1 | ((1 << 64) - (1 << 50))

# Device types (5).
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_RNG = 4
VIRTIO_ID_BALLOON = 5
VIRTIO_ID_SCSI = 8
VIRTIO_ID_GPU = 16
VIRTIO_ID_INPUT = 18
VIRTIO_ID_VSOCK = 19
VIRTIO_ID_FS = 26
VIRTIO_ID_PMEM = 27

# The largest queue, split or packed (2.7, 2.8).
VIRTQUEUE_MAX_SIZE = 32768
