"""What this process has mapped, as the kernel tells it."""

from __future__ import annotations

from pathlib import Path


def secluded_bytes() -> int:
    """Bytes of mappings that neither a fork nor a core dump gets: RAM of guests, and vCPUs' kvm_run."""
    total = start = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if first == "VmFlags:":
            if {"dc", "dd"} <= set(rest.split()):
                total += end - start
        elif not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
    return total


def resident_bytes(address: int) -> int:
    """Bytes in memory of the mapping that begins at the address, and of what the kernel has joined to it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return int(rest.split()[0]) << 10
    raise AssertionError(f"nothing is mapped at {address:#x}")
