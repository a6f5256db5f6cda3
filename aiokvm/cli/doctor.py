"""``aiokvm doctor``: can machines run here, and what to do if not."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from aiokvm import KvmError, host_limits, kvm
from aiokvm.kvm import Cap
from aiokvm.kvm.probe import HARDWARE_RING0

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a machine cannot do without.
_REQUIRED = (
    Cap.KVM_CAP_USER_MEMORY,
    Cap.KVM_CAP_IRQCHIP,
    Cap.KVM_CAP_PIT2,
    Cap.KVM_CAP_EXT_CPUID,
    Cap.KVM_CAP_MP_STATE,
    Cap.KVM_CAP_IMMEDIATE_EXIT,
    Cap.KVM_CAP_IRQFD,
    Cap.KVM_CAP_IOEVENTFD,
)
_USEFUL = {
    Cap.KVM_CAP_TSC_DEADLINE_TIMER: "precise guest timers",
    Cap.KVM_CAP_ADJUST_CLOCK: "a guest clock that goes on after a pause",
    Cap.KVM_CAP_GET_TSC_KHZ: "telling the guest its TSC's frequency",
    Cap.KVM_CAP_TSC_CONTROL: "moving a guest to a host of another TSC frequency",
    Cap.KVM_CAP_SIGNAL_MSI: "message-signalled interrupts",
    Cap.KVM_CAP_SYNC_REGS: "quick access to registers",
    Cap.KVM_CAP_XSAVE2: "saving AVX-512 and AMX state",
    Cap.KVM_CAP_DIRTY_LOG_RING: "quick tracking of written pages",
    Cap.KVM_CAP_BINARY_STATS_FD: "KVM's own statistics",
    Cap.KVM_CAP_X86_USER_SPACE_MSR: "answering unknown MSRs",
    Cap.KVM_CAP_READONLY_MEM: "read-only memory for firmware",
}
# Descriptors and threads of a program with a few dozen machines.
_ENOUGH_FILES = 1024
_ENOUGH_THREADS = 1024
_ENOUGH_MACHINES = 50
_ENOUGH_MEMORY_BYTES = 1 << 30
# linux/capability.h
_CAP_NET_ADMIN = 12
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and what to do about it if there is anything to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Can machines run here, and what to do if not.

    Exit status: 0 if they can, be it in the lab only; 1 if not.
    """
    checks = [*check_kvm(), *check_host(), *check_limits(), check_machines()]
    native = not any(check.status == "fail" for check in checks)
    lab = check_lab(needed=not native)
    checks.append(lab)
    runs = native or lab.status == "ok"
    if as_json:
        answer = {"runs": runs, "native": native, "lab": lab.status == "ok"}
        click.echo(json.dumps(answer | {"checks": [asdict(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            click.echo(
                f"{click.style(f'{check.status:4}', fg=_COLORS[check.status])}  {check.name}: {check.detail}"
            )
            if check.advice:
                click.echo(f"      -> {check.advice}")
        where = (
            "here"
            if native
            else "in the lab: aiokvm run does it by itself"
            if runs
            else "nowhere on this host"
        )
        click.echo(f"\nLinux machines run {where}.")
    ctx.exit(0 if runs else 1)


def check_kvm() -> Iterator[Check]:
    """Look at /dev/kvm and what is behind it."""
    try:
        system = kvm.System()
    except KvmError as error:
        why = {
            errno.ENOENT: "it is not there",
            errno.ENXIO: "no module serves it",
            errno.ENODEV: "no module serves it",
            errno.EACCES: "no permission",
            errno.EPERM: "the container or sandbox forbids it",
        }.get(error.errno or 0, error.strerror or str(error))
        yield Check("/dev/kvm", "fail", why, error.hint)
        return
    with system:
        yield Check("/dev/kvm", "ok", f"usable, API version {system.get_api_version()}")
        yield from _check_capabilities(system)
        yield _check_speed(system)
        most = system.check_extension(Cap.KVM_CAP_MAX_VCPUS)
        advised = system.check_extension(Cap.KVM_CAP_NR_VCPUS)
        yield Check("vCPUs", "ok", f"up to {most} a machine, {advised} advised; {os.cpu_count()} CPUs here")


def _check_capabilities(system: kvm.System) -> Iterator[Check]:
    missing = [cap.name for cap in _REQUIRED if not system.check_extension(cap)]
    if missing:
        yield Check(
            "capabilities", "fail", f"missing: {', '.join(missing)}", "run a newer kernel on this host"
        )
    else:
        yield Check("capabilities", "ok", f"all {len(_REQUIRED)} that a machine needs")
    lacks = [f"{cap.name} ({use})" for cap, use in _USEFUL.items() if not system.check_extension(cap)]
    if lacks:
        advice = "nothing, if these are not needed; else a newer kernel or another host"
        yield Check("more capabilities", "warn", f"missing: {', '.join(lacks)}", advice)
    else:
        yield Check("more capabilities", "ok", f"all {len(_USEFUL)} that are of use")


def _check_speed(system: kvm.System) -> Check:
    try:
        speed = kvm.ring0_speed(system)
    except KvmError as error:
        return Check("ring 0", "fail", f"a guest does not run: {error}")
    detail = f"{speed / 1e6:.1f} million instructions a second"
    if speed >= HARDWARE_RING0:
        return Check("ring 0", "ok", f"runs on hardware, {detail}")
    advice = (
        "use the lab, or a host with VT-x or AMD-V (inside a VM: nested virtualization); "
        "small flat images run here all the same"
    )
    return Check(
        "ring 0", "fail", f"is emulated instruction by instruction, {detail}: no Linux boots so", advice
    )


def check_host() -> Iterator[Check]:
    """Look at what machines use beside KVM."""
    yield _check_tun()
    yield _check_huge_pages()
    available = _available_memory()
    advice = (
        "" if available >= _ENOUGH_MEMORY_BYTES else "stop other programs, or give machines less RAM (-m)"
    )
    status: Literal["ok", "warn"] = "warn" if advice else "ok"
    yield Check("memory", status, f"{available >> 20} MiB available", advice)


def _check_tun() -> Check:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = {
            errno.ENOENT: "modprobe tun; in a container: --device /dev/net/tun",
            errno.ENODEV: "modprobe tun",
            errno.EACCES: "let the user read and write /dev/net/tun",
            errno.EPERM: "allow the device in the container: --device /dev/net/tun",
        }.get(error.errno or 0, "")
        return Check(
            "TAP", "warn", f"/dev/net/tun: {error.strerror}", f"{advice}; machines need it for TAP only"
        )
    if not _has_capability(_CAP_NET_ADMIN):
        advice = "use one that was made for the user: ip tuntap add tap0 mode tap user $USER"
        return Check("TAP", "warn", "/dev/net/tun is usable, but no new TAP can be made", advice)
    return Check("TAP", "ok", "/dev/net/tun is usable")


def _has_capability(bit: int) -> bool:
    for line in Path("/proc/self/status").read_text(errors="surrogateescape").split("\n"):
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


def _check_huge_pages() -> Check:
    counts = []
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        kib = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
        total, free = (int((folder / f"{name}_hugepages").read_text()) for name in ("nr", "free"))
        if total:
            counts.append(f"{free} of {total} of {kib >> 10} MiB free")
    if counts:
        return Check("huge pages", "ok", ", ".join(counts))
    return Check(
        "huge pages",
        "ok",
        "none reserved; machines need none",
        'for hugepages="2M": sysctl vm.nr_hugepages=256',
    )


def _available_memory() -> int:
    """Return the bytes that can still be had: the host's, or less in a control group with a limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
        if line.startswith("0::"):
            group = Path("/sys/fs/cgroup" + line[3:])
            try:
                limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            except (OSError, ValueError):  # the root group has none; "max" is none
                continue
            available = min(available, max(limit - used, 0))
    return available


def check_limits() -> Iterator[Check]:
    """Look at the process's limits."""
    yield _check_limit("open files", resource.RLIMIT_NOFILE, _ENOUGH_FILES, "ulimit -n 65536")
    yield _check_limit("processes and threads", resource.RLIMIT_NPROC, _ENOUGH_THREADS, "ulimit -u 65536")
    # Nothing is locked unless a program asks for it, so no value is too low.
    yield _check_limit("locked memory", resource.RLIMIT_MEMLOCK, 0, "")


def check_machines() -> Check:
    """Look at how many machines all limits together leave room for."""
    limit = min(host_limits(), key=lambda limit: limit.machines)
    detail = f"the limits allow {limit.machines} of one vCPU in a process; {limit.name} is {limit.value}"
    few = limit.machines < _ENOUGH_MACHINES
    return Check("machines", "warn" if few else "ok", detail, limit.advice if few else "")


def _check_limit(name: str, limit: int, enough: int, advice: str) -> Check:
    soft, hard = resource.getrlimit(limit)
    shown = [("unlimited" if value == resource.RLIM_INFINITY else str(value)) for value in (soft, hard)]
    detail = f"{shown[0]} (at most {shown[1]})"
    if soft != resource.RLIM_INFINITY and soft < enough:
        return Check(name, "warn", f"{detail}, {enough} are enough for dozens of machines", advice)
    return Check(name, "ok", detail)


def check_lab(*, needed: bool) -> Check:
    """Look at what the lab needs; ``needed`` if machines run nowhere else."""
    # Here: it takes long to import.
    from aiokvm import lab

    missing = lab.needed()
    if not missing:
        return Check("lab", "ok", "its packages are installed")
    status: Literal["warn", "fail"] = "fail" if needed else "warn"
    return Check(
        "lab", status, f"packages are missing: {', '.join(missing)}", f"apt-get install {' '.join(missing)}"
    )
