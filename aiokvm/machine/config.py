"""What a machine is made of, checked before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from aiokvm.arguments import checked_init
from aiokvm.boot.acpi import MAX_PROCESSORS
from aiokvm.errors import ConfigError
from aiokvm.memory import PAGE_SIZE

if TYPE_CHECKING:
    from aiokvm.boot import BootProtocol

# Four ports is what a PC has addresses and Linux names for without being told.
MAX_SERIAL_PORTS = 4
# The low memory that boot structures and ACPI tables take, and a little more.
MIN_MEMORY_BYTES = 2 << 20
# KVM's slots have fewer than 2^31 pages (KVM_MEM_MAX_NR_PAGES); all but the lowest RAM is in one.
MAX_MEMORY_BYTES = 8 << 40
NAME_MAX = 64
# About what a sleep and a wake-up take on either side: polling for longer wins nothing.
POLL_NS = 50_000
MAX_POLL_NS = 1_000_000


@checked_init
@dataclass(frozen=True, slots=True)
class RngConfig:
    """How much randomness a guest gets: in a second, if there is a limit, and at once after a pause."""

    bytes_per_second: int | None = None
    burst_bytes: int = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A machine's description. Raises ConfigError for what no host could build."""

    boot: BootProtocol
    cpus: int = 1
    memory_bytes: int = 512 << 20
    name: str = ""
    serial_ports: int = 2
    hugepage_bytes: int | None = None
    shared_memory: bool = False
    overcommit: bool = False
    on_reset: Literal["exit", "reboot"] = "exit"
    poll_ns: int = POLL_NS
    console: tuple[str, ...] | None = None
    rng: RngConfig | None = None
    balloon: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"vm-{os.urandom(3).hex()}")
        if len(self.name) > NAME_MAX or not self.name.isprintable():
            raise ConfigError(f"name {self.name!r} is not 1 to {NAME_MAX} printable characters")
        if self.cpus < 1:
            raise ConfigError(f"cpus is {self.cpus}: a machine has at least one")
        if self.cpus > MAX_PROCESSORS:
            raise ConfigError(f"cpus is {self.cpus}: a machine has at most {MAX_PROCESSORS}")
        if self.memory_bytes < MIN_MEMORY_BYTES or self.memory_bytes % PAGE_SIZE:
            raise ConfigError(
                f"memory is {self.memory_bytes} bytes: it has to be a multiple of {PAGE_SIZE}, "
                f"at least {MIN_MEMORY_BYTES >> 20}M"
            )
        if not isinstance(self.poll_ns, int) or not 0 <= self.poll_ns <= MAX_POLL_NS:
            raise ConfigError(f"poll_ns is {self.poll_ns!r}: 0 to {MAX_POLL_NS} nanoseconds")
        if not 1 <= self.serial_ports <= MAX_SERIAL_PORTS:
            raise ConfigError(f"serial_ports is {self.serial_ports}: a machine has 1 to {MAX_SERIAL_PORTS}")
        if self.hugepage_bytes not in (None, 2 << 20, 1 << 30):
            raise ConfigError(f"hugepages of {self.hugepage_bytes} bytes do not exist on x86: use 2M or 1G")
        if self.hugepage_bytes and self.memory_bytes % self.hugepage_bytes:
            raise ConfigError(
                f"memory is {self.memory_bytes} bytes, not a multiple of huge pages of {self.hugepage_bytes}"
            )
