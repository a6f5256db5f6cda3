"""What of this process is in memory."""

from __future__ import annotations

from pathlib import Path


def resident_kib() -> int:
    """Resident KiB beyond guest RAM: that is what neither a fork nor a core dump gets, but for kvm_run."""
    total = resident = 0
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            name = rest
        elif first == "Rss:":
            resident = int(rest.split()[0])
        elif first == "VmFlags:" and ("kvm-vcpu" in name or not {"dc", "dd"} <= set(rest.split())):
            total += resident
    return total
