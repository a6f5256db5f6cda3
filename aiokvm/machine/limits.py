"""The host's limits: how many machines they leave room for, and errors that name the one that is too low."""

from __future__ import annotations

import errno
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib
from aiokvm.arguments import checked
from aiokvm.errors import AiokvmError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

# A machine's: the VM; a vCPU's: its own and its statistics'.
DESCRIPTORS, DESCRIPTORS_VCPU = 1, 2
# RAM, what the loop and the vCPUs share, and a page for the local APIC, which KVM maps into the process where
# the processor serves the APIC itself; a vCPU's kvm_run, stack and guard.
MAPPINGS, MAPPINGS_VCPU = 3, 3
# What KVM maps for an Intel processor that cannot run real mode by itself: a TSS and page tables.
REAL_MODE_MAPPINGS = 2
_UNRESTRICTED_GUEST = Path("/sys/module/kvm_intel/parameters/unrestricted_guest")
# Newer kernels look after huge pages in a thread of the process, and the PIT has one of the kernel's.
THREADS, KERNEL_THREADS = 1, 1
# What creating and resetting take for a while, the loop's worker threads, and what the allocator maps.
SPARE_DESCRIPTORS, SPARE_THREADS, SPARE_MAPPINGS = 8, 48, 256

# What guests share, by its name, its unit and how there can be more of it.
_BUDGETS = {
    lib.AIOKVM_BUDGET_DESCRIPTORS: (
        "descriptors of guests' connections",
        "descriptors",
        "raise RLIMIT_NOFILE: it is three quarters of that",
    ),
    lib.AIOKVM_BUDGET_NET_BYTES: (
        "buffers of guests' connections",
        "bytes",
        "it is an eighth of the host's memory",
    ),
    lib.AIOKVM_BUDGET_FRAME_BYTES: (
        "frames that wait in switches and ports",
        "bytes",
        "it is an eighth of the host's memory; close switches, ports and adapters that are not needed",
    ),
    lib.AIOKVM_BUDGET_BOUNCE_BYTES: (
        "bounce buffers of disks",
        "bytes",
        "it is an eighth of the host's memory; align what is read and written, or do without direct=True",
    ),
    lib.AIOKVM_BUDGET_LOG_LINES: (
        "lines of the log that guests cause",
        "lines in a second",
        "it is fixed",
    ),
}

# linux/capability.h: who has one of them is not bound by RLIMIT_NPROC.
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that machines come up against.

    ``name`` is what the system calls it, ``unit`` what it counts. Of ``value``, ``used`` are taken now or
    kept back for the program itself, and each machine takes ``each``. ``advice`` says how to raise it.

    Budgets that the guests of the process share are among them, with 0 as ``each``: it is what their guests
    do that takes of these. A guest may have as much as half of what is left, so that others are served.
    """

    name: str
    unit: str
    value: int
    used: int
    each: int
    advice: str

    @property
    def machines(self) -> int:
        """How many more machines there is room for."""
        return max(0, self.value - self.used) // self.each if self.each else sys.maxsize


@checked
def host_limits(cpus: int = 1) -> tuple[Limit, ...]:
    """The limits of this process and host as they stand, for machines of ``cpus`` vCPUs each.

    Devices with an interrupt or a doorbell, and shared memory, take a descriptor each beyond that; a network
    adapter takes some ten, and on a thread of its own a thread and two mappings. Limits that are not set, or
    do not bind this process, are left out. Raises ConfigError for machines without a vCPU.

    Reading /proc takes milliseconds, more where many processes run: on a loop that others wait for, call it
    in a thread.
    """
    if cpus < 1:
        raise ConfigError(f"machines of {cpus} vCPUs: give at least one")
    return tuple(
        limit
        for source in (_descriptors, _open_files, _threads, _mappings, _budgets)
        for limit in source(cpus)
        if limit.value >= 0
    )


@checked
def check_limits(machines: int, cpus: int = 1) -> None:
    """Whether this process may have so many machines more, of ``cpus`` vCPUs each, before any is made.

    Raises ConfigError with the name of the limit that is too low, its value and what to do.
    """
    if machines < 1 or cpus < 1:
        raise ConfigError(f"{machines} machines of {cpus} vCPUs: give at least one of each")
    tightest = min(host_limits(cpus), key=lambda limit: limit.machines)
    if tightest.machines < machines:
        what = f"{machines} machines of {cpus} vCPU{'s' if cpus > 1 else ''}"
        raise ConfigError(
            f"{what} need {machines * tightest.each} {tightest.unit}: {_state(tightest)}, "
            f"which leaves room for {tightest.machines}; {tightest.advice}"
        )


@checked
def check_memory(size_bytes: int) -> None:
    """Whether this host, and the control group of this process, have so much memory at all, swap included.

    Raises ConfigError with the name of the one that has less, and what it has.
    """
    name, most = min(_memory(), key=lambda source: source[1])
    if size_bytes > most:
        raise ConfigError(
            f"memory is {_gib(size_bytes)}, and {name} says that there are {_gib(most)}: give the machine "
            "less, or VM.create(overcommit=True), aiokvm run --overcommit, if it will not use all"
        )


def named(error: Exception, what: str, cpus: int) -> Exception:
    """The error of something that failed, with the limit's name if the host refused because of one.

    Else it is ``error``.
    """
    try:
        full = [limit for limit in _refusing(_errno(error), cpus) if limit.value >= 0 and not limit.machines]
    except OSError:
        return error  # /proc can no longer be read either
    if not full:
        return error
    tightest = min(full, key=lambda limit: limit.value - limit.used)
    told = ConfigError(
        f"{what}: {_state(tightest)}, and a machine takes {tightest.each} {tightest.unit}; {tightest.advice}"
    )
    told.__cause__ = error
    return told


def _refusing(number: int, cpus: int) -> Iterator[Limit]:
    """The limits that the kernel may mean by an errno."""
    match number:
        case errno.EMFILE:
            yield from _descriptors(cpus)
        case errno.ENFILE:
            yield from _open_files(cpus)
        case errno.EAGAIN | errno.ENOMEM:
            yield from _threads(cpus)
            yield from _mappings(cpus)


def _state(limit: Limit) -> str:
    return f"{limit.name} is {limit.value}, of which {min(limit.used, limit.value)} are taken or kept back"


def _errno(error: BaseException | None) -> int:
    """What the kernel said."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno or 0
        if isinstance(error, RuntimeError) and "start new thread" in str(error):
            return errno.EAGAIN
        error = error.__cause__ if isinstance(error, AiokvmError) else None
    return 0


def _rlimit(which: int) -> tuple[int, int]:
    """The soft and the hard limit; -1 is none, as Python 3.15 does not say by itself."""
    soft, hard = (-1 if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return soft, hard


def _descriptors(cpus: int) -> Iterator[Limit]:
    soft, hard = _rlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd")) + SPARE_DESCRIPTORS
    except OSError:  # there is none left to look with
        used = soft
    advice = (
        f"raise it up to {hard} (ulimit -n, or resource.setrlimit in the program)"
        if hard > soft
        else "raise it (ulimit -n as root, LimitNOFILE= in systemd, --ulimit nofile= of a container)"
    )
    yield Limit("RLIMIT_NOFILE", "descriptors", soft, used, _descriptors_each(cpus), advice)


def _open_files(cpus: int) -> Iterator[Limit]:
    if not _is_capable(_CAP_SYS_ADMIN):
        taken, _, most = map(int, Path("/proc/sys/fs/file-nr").read_text().split())
        used = taken + SPARE_DESCRIPTORS
        yield Limit("fs.file-max", "open files", most, used, _descriptors_each(cpus), "sysctl fs.file-max")


def _descriptors_each(cpus: int) -> int:
    return DESCRIPTORS + DESCRIPTORS_VCPU * cpus


def _threads(cpus: int) -> Iterator[Limit]:
    each = cpus + THREADS
    if os.getuid() != 0 and not _is_capable(_CAP_SYS_RESOURCE) and not _is_capable(_CAP_SYS_ADMIN):
        soft, _ = _rlimit(resource.RLIMIT_NPROC)
        advice = "raise it (ulimit -u, LimitNPROC= in systemd), or end other processes of the user"
        yield Limit("RLIMIT_NPROC", "threads", soft, _threads_of_user() + SPARE_THREADS, each, advice)
    for group in _groups("pids"):
        try:
            value, used = (int((group / f"pids.{name}").read_text()) for name in ("max", "current"))
        except (OSError, ValueError):  # the root group has none; "max" is none
            continue
        advice = "raise it (TasksMax= in systemd, --pids-limit of a container)"
        yield Limit(f"{group / 'pids.max'}", "threads", value, used + SPARE_THREADS, each, advice)
    used = int(Path("/proc/loadavg").read_text().split()[3].split("/")[1]) + SPARE_THREADS
    for name in ("threads-max", "pid_max"):
        value = int(Path("/proc/sys/kernel", name).read_text())
        yield Limit(f"kernel.{name}", "threads", value, used, each + KERNEL_THREADS, f"sysctl kernel.{name}")


def _mappings(cpus: int) -> Iterator[Limit]:
    value = int(Path("/proc/sys/vm/max_map_count").read_text())
    with open("/proc/self/maps", "rb") as maps:
        used = sum(1 for _ in maps) + SPARE_MAPPINGS
    each = MAPPINGS + MAPPINGS_VCPU * cpus
    if _UNRESTRICTED_GUEST.exists() and _UNRESTRICTED_GUEST.read_text().strip() == "N":
        each += REAL_MODE_MAPPINGS
    yield Limit("vm.max_map_count", "mappings", value, used, each, "sysctl vm.max_map_count")


def _budgets(_cpus: int) -> Iterator[Limit]:
    state = ffi.new("struct aiokvm_budget_state *")
    for which, (name, unit, advice) in _BUDGETS.items():
        lib.aiokvm_budget_state(lib.aiokvm_budget_of_process(which), state)
        yield Limit(name, unit, int(state.total), int(state.used), 0, advice)


def _memory() -> Iterator[tuple[str, int]]:
    """Who sets how many bytes of memory and swap this process could have at most."""
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name.rstrip(":"): int(value) for name, value, *_ in fields}
    yield "/proc/meminfo", kib["MemTotal"] + kib["SwapTotal"] << 10
    for folder in _groups("memory"):
        # Version 2 of control groups counts swap by itself, version 1 both together, if it counts swap.
        for file, swap_file in (
            ("memory.max", "memory.swap.max"),
            ("memory.limit_in_bytes", ""),
            ("memory.memsw.limit_in_bytes", None),
        ):
            most = _number(folder / file)
            if most is None:
                continue
            if swap_file is not None:
                swap = _number(folder / swap_file) if swap_file else None
                most += (kib["SwapTotal"] << 10) if swap is None else swap
            yield f"{folder / file}", most


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _gib(size_bytes: int) -> str:
    return f"{round(size_bytes / (1 << 30), 2):.15g} GiB"


def _is_capable(bit: int) -> bool:
    return bool(int(_status(Path("/proc/self"))["CapEff"], 16) >> bit & 1)


def _threads_of_user() -> int:
    """Threads of all processes of this process's real user, which is what RLIMIT_NPROC counts."""
    user, count = str(os.getuid()), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = _status(process)
        except OSError:
            continue  # it has ended
        if status["Uid"].split()[0] == user:
            count += int(status["Threads"])
    return count


def _status(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text(errors="surrogateescape").split("\n")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _groups(controller: str) -> Iterator[Path]:
    """The control group that counts for this process, and those above it."""
    for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = Path("/sys/fs/cgroup", controllers)
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
