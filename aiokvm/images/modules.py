"""Which of a kernel's modules an initramfs holds, and how they are taken out of the kernel's package."""

from __future__ import annotations

import lzma
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

GUEST_MODULES = (
    *("button", "evdev"),
    *("virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng", "virtio_balloon"),
    *("failover", "net_failover", "virtio_net"),
    *("crc16", "mbcache", "jbd2", "crc32c_generic", "ext4"),
)
"""The modules of the guests' initramfs images; their ``init`` loads them, what they depend on first."""

LAB_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_console", "netfs", "fscache", "9pnet", "9pnet_virtio", "9p", "overlay"),
    *("irqbypass", "ccp", "kvm", "kvm-amd"),
    *("failover", "net_failover", "virtio_net", "tun", "tap", "veth", "llc", "stp", "bridge"),
    *("vhost_iotlb", "vhost", "vhost_net", "vsock", "vmw_vsock_virtio_transport_common", "vhost_vsock"),
)
"""The modules of the lab's kernel in the order in which they are loaded."""

INTEL_LAB_MODULES = (
    *("scsi_common", "scsi_mod", "libata", "ata_piix", "sd_mod", "squashfs", "overlay"),
    *("irqbypass", "kvm", "kvm-intel"),
    *("failover", "net_failover", "tun", "tap", "veth", "llc", "stp", "bridge"),
    *("vhost_iotlb", "vhost", "vhost_net", "vsock", "vmw_vsock_virtio_transport_common", "vhost_vsock"),
)
"""The modules of the Intel lab's kernel in the order in which they are loaded."""

_ENDS = (".ko", ".ko.xz")


def is_module(name: str) -> bool:
    """Tell whether a file of a package is a kernel module."""
    return name.endswith(_ENDS)


def wanted(name: str) -> bool:
    """Tell whether a file of a package is one of the modules that are used here."""
    return is_module(name) and _stem(name) in (*GUEST_MODULES, *LAB_MODULES, *INTEL_LAB_MODULES)


def pick(files: Mapping[str, bytes], names: Iterable[str]) -> dict[str, bytes]:
    """Return the named modules that a kernel has (others are built into it, or gone), unpacked, in order."""
    found = {_stem(name): name for name in files if is_module(name)}
    modules = {}
    for name in names:
        if name in found:
            data = files[found[name]]
            modules[f"{name}.ko"] = lzma.decompress(data) if found[name].endswith(".xz") else data
    return modules


def _stem(name: str) -> str:
    return PurePosixPath(name).name.split(".")[0]
