"""What the ACPI tables describe."""

from __future__ import annotations

from dataclasses import dataclass

from aiokvm.errors import ConfigError

MAX_PROCESSORS = 4096
"""As many vCPUs as KVM can be built for; also what the three hex digits of a processor's name can count."""

IOAPIC_PINS = 24
"""GSIs of KVM's in-kernel I/O APIC."""

MAX_VIRTIO = 256
"""As many virtio devices as the two hex digits of a device's name can count."""

PM_PORTS = 9
"""Ports of the power management block: PM1_STS, PM1_EN, PM1_CNT (two each), two unused, reset register."""

_X2APIC_BROADCAST = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class SerialPort:
    """A 16550A at eight I/O ports from ``port``, raising ``gsi``; ``uid`` tells it from the others."""

    port: int
    gsi: int
    uid: int

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 0x1_0000 - 8:
            raise ConfigError(f"serial port at I/O port {self.port:#x}: its 8 ports must end below 0x10000")
        if not 0 < self.gsi < IOAPIC_PINS or self.gsi == 2:
            raise ConfigError(
                f"serial port on GSI {self.gsi}: use 1 to {IOAPIC_PINS - 1}, but 2, the timer's"
            )


@dataclass(frozen=True, slots=True)
class VirtioMmio:
    """The registers of a virtio device, ``size`` bytes from ``base``, raising ``gsi`` by edges.

    ``shared``: other devices raise the same.
    """

    base: int
    size: int
    gsi: int
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.base < self.base + self.size <= 1 << 32:
            raise ConfigError(f"virtio device of {self.size:#x} bytes at {self.base:#x}: put it below 4 GiB")
        if not 0 < self.gsi < IOAPIC_PINS or self.gsi == 2:
            raise ConfigError(
                f"virtio device on GSI {self.gsi}: use 1 to {IOAPIC_PINS - 1}, but 2, the timer's"
            )


@dataclass(frozen=True, slots=True)
class Platform:
    """A machine with KVM's in-kernel PIC, I/O APIC and PIT, and fixed ACPI power management hardware.

    ``apic_ids`` has the local APIC id of each processor, ascending; a processor's UID is its index.
    ``pm_port`` is the first port of PM1_STS (+0), PM1_EN (+2), PM1_CNT (+4) and the reset register (+8, which
    resets when 1 is written). That device holds ``sci_gsi`` high for as long as an enabled event is pending.
    ``debug_exit_port`` is reserved for the debug-exit device, None where there is no such device. ``virtio``
    are the virtio devices; a device's UID is its index.

    Raises ConfigError for what the tables cannot describe.
    """

    apic_ids: tuple[int, ...]
    serial: tuple[SerialPort, ...] = ()
    pm_port: int = 0x600
    sci_gsi: int = 9
    ioapic_address: int = 0xFEC0_0000
    lapic_address: int = 0xFEE0_0000
    # What the in-kernel I/O APIC's ID register holds at reset. xAPICs do not arbitrate by ids, so an equal
    # local APIC id is no conflict.
    ioapic_id: int = 0
    i8042: bool = True
    rtc: bool = True
    debug_exit_port: int | None = 0xF4
    virtio: tuple[VirtioMmio, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.apic_ids) <= MAX_PROCESSORS:
            raise ConfigError(f"{len(self.apic_ids)} processors: give 1 to {MAX_PROCESSORS} APIC ids")
        # Ascending ids also keep a processor's UID within its xAPIC id, which shares its width of 8 bits.
        if list(self.apic_ids) != sorted(set(self.apic_ids)):
            raise ConfigError("APIC ids must be ascending, each used once")
        if self.apic_ids[0] < 0 or self.apic_ids[-1] >= _X2APIC_BROADCAST:
            raise ConfigError(
                f"APIC ids {self.apic_ids[0]:#x} to {self.apic_ids[-1]:#x}: "
                f"use 0 to {_X2APIC_BROADCAST - 1:#x}, the highest x2APIC id"
            )
        if not 0 < self.pm_port <= 0x1_0000 - PM_PORTS:
            raise ConfigError(f"pm_port {self.pm_port:#x}: its {PM_PORTS} ports must lie in 1 to 0xffff")
        # In PIC mode the SCI is an ISA interrupt; 0 to 2 and 8 are the timer, keyboard, cascade and clock.
        if not 3 <= self.sci_gsi <= 15 or self.sci_gsi == 8:
            raise ConfigError(f"sci_gsi {self.sci_gsi}: use 3 to 15, but not 8")
        for port in self.serial:
            if port.gsi == self.sci_gsi:
                raise ConfigError(
                    f"serial port {port.port:#x} is edge triggered, GSI {port.gsi} of the SCI is not"
                )
        for device in self.virtio:
            if device.gsi == self.sci_gsi:
                raise ConfigError(
                    f"virtio device {device.base:#x} is edge triggered, GSI {device.gsi} of the SCI is not"
                )
        if len(self.virtio) > MAX_VIRTIO:
            raise ConfigError(f"{len(self.virtio)} virtio devices: there are at most {MAX_VIRTIO}")
        if len({port.uid for port in self.serial}) != len(self.serial):
            raise ConfigError(f"serial ports {[port.uid for port in self.serial]}: give each its own uid")
        for what, address in ("ioapic_address", self.ioapic_address), ("lapic_address", self.lapic_address):
            if not 0 <= address <= 0xFFFF_FFFF:
                raise ConfigError(f"{what} {address:#x} must be below 4 GiB")
        if not 0 <= self.ioapic_id <= 15:
            raise ConfigError(
                f"ioapic_id {self.ioapic_id}: the 82093AA's ID register has 4 bits, use 0 to 15"
            )
        if self.debug_exit_port is not None and not 0 <= self.debug_exit_port <= 0xFFFC:
            raise ConfigError(
                f"debug_exit_port {self.debug_exit_port:#x}: its 4 ports must end below 0x10000"
            )
