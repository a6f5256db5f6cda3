"""Limits of the host that are too low, found before anything is made, or named when the host refuses."""

from __future__ import annotations

import errno
import inspect
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from aiokvm import VM, AiokvmError, ConfigError, KvmError, Limit, boot, check_limits, host_limits
from aiokvm.machine import limits
from tests import mappings

# What the process of a test holds before and after, whatever its limits are by then.
COMMON = f"""
{inspect.getsource(mappings)}
"""
COMMON += """
import asyncio, contextlib, gc, os, resource, sys, threading
import aiokvm
from aiokvm.aio import current_loop
from aiokvm.aio.asyncio_loop import THREADS_MAX
from aiokvm import VM, Device, boot

HALT = bytes.fromhex("fa f4")

def taken():
    gc.collect()
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
    return sorted(targets), secluded_bytes()

async def create(name="m"):
    return await VM.create(boot=boot.Flat(HALT), memory="2M", name=name)
"""


def run(program: str, *, loop: str = "asyncio") -> str:
    """What the program prints; its ``main`` runs on the loop."""
    runner = f"""
import anyio
backend, options = ("trio", {{}}) if {loop!r} == "trio" else ("asyncio", {{"use_uvloop": {loop == "uvloop"}}})
anyio.run(main, backend=backend, backend_options=options)
"""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program + runner],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.kvm
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_descriptors_that_run_out_are_named_and_nothing_is_left(loop: str) -> None:
    out = run(
        """
async def main():
    async with await create():
        pass
    before = taken()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before[0]) + 30, hard))
    machines, error = [], None
    for i in range(100):
        try:
            machines.append(await create(f"m{i}"))
        except aiokvm.ConfigError as refused:
            error = str(refused)
            break
    print(len(machines), error, sep="\\n")
    for vm in machines:
        await vm.aclose()
    del machines
    print(taken() == before)
    async with await create():
        pass
""",
        loop=loop,
    )
    count, error, same = out.splitlines()
    assert 3 <= int(count) <= 15
    assert error.startswith(f"cannot create machine m{count}: RLIMIT_NOFILE is ")
    assert "ulimit -n" in error
    assert same == "True"


@pytest.mark.kvm
@pytest.mark.parametrize("room", range(8))
def test_wherever_in_a_creation_descriptors_run_out_the_limit_is_named(room: int) -> None:
    out = run(
        f"""
async def main():
    async with await create():
        pass
    before = taken()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    # The numbers below the highest one that are free are taken, too.
    holes = [os.dup(0) for _ in range(used - len(before[0]) + 1)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes, default=used) + 1 + {room}, hard))
    vm = None
    try:
        vm = await VM.create(
            boot=boot.Flat(HALT), memory="2M", name="m", devices=[Device().at(pio=0x500, irq=5)]
        )
        print("created")
    except aiokvm.ConfigError as error:
        print(error)
    if vm is not None:
        await vm.aclose()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in holes:
        os.close(fd)
    print(taken() == before)
"""
    )
    first, same = out.splitlines()
    assert first == "created" or first.startswith("cannot create machine m: RLIMIT_NOFILE is ")
    if room == 0:
        assert first != "created"
    assert same == "True"


def full(name: str, unit: str) -> Limit:
    return Limit(name, unit, 1000, 999, 5, f"raise {name}")


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.EMFILE, "too many"), "RLIMIT_NOFILE"),
        (KvmError("KVM_CREATE_VM", errno.EMFILE), "RLIMIT_NOFILE"),
        (KvmError("KVM_CREATE_VM", errno.ENFILE), "fs.file-max"),
        (KvmError("mmap", errno.ENOMEM), "vm.max_map_count"),
        (KvmError("KVM_CREATE_PIT2", errno.ENOMEM), "kernel.threads-max"),
        (OSError(errno.EAGAIN, "no thread"), "kernel.threads-max"),
        (RuntimeError("can't start new thread"), "kernel.threads-max"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_host_refuses_is_named(error: Exception, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Limit("another", "of them", 1000, 0, 5, "")
    for source, limit in (
        ("_descriptors", full("RLIMIT_NOFILE", "descriptors")),
        ("_open_files", full("fs.file-max", "open files")),
        ("_threads", full("kernel.threads-max", "threads") if "thread" in name else room),
        ("_mappings", full("vm.max_map_count", "mappings") if "map" in name else room),
    ):
        monkeypatch.setattr(limits, source, lambda _, limit=limit: iter((limit,)))
    told = limits.named(error, "cannot create machine m", 1)
    assert isinstance(told, ConfigError)
    assert told.__cause__ is error
    assert str(told).startswith(f"cannot create machine m: {name} is 1000, of which 999 are taken")
    assert str(told).endswith(f"raise {name}")
    # As it arrives through a layer that has its own words for it.
    outer = AiokvmError("no")
    outer.__cause__ = error
    if isinstance(error, OSError):
        assert str(limits.named(outer, "cannot create machine m", 1)) == str(told)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "not there"),
        KvmError("KVM_SET_CPUID2", errno.EINVAL),
        AiokvmError("of ours"),
        RuntimeError("of another's"),
        # There is room: the host refused for a reason of its own.
        OSError(errno.ENOMEM, "no memory"),
    ],
    ids=lambda value: repr(value),
)
def test_what_is_no_limit_stays_as_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Limit("a limit", "mappings", 1000, 0, 5, "")
    for source in ("_threads", "_mappings"):
        monkeypatch.setattr(limits, source, lambda _: iter((room,)))
    assert limits.named(error, "cannot create machine m", 1) is error


def test_machines_have_a_vcpu() -> None:
    with pytest.raises(ConfigError, match="0 vCPUs"):
        host_limits(0)


@pytest.mark.parametrize("cpus", [1, 4])
def test_a_lack_is_told_before_anything_is_made(cpus: int) -> None:
    check_limits(1, cpus)
    tightest = min(host_limits(cpus), key=lambda limit: limit.machines)
    check_limits(tightest.machines // 2 + 1, cpus)
    with pytest.raises(ConfigError) as caught:
        check_limits(10 * tightest.machines + 10, cpus)
    assert f"{tightest.name} is {tightest.value}" in str(caught.value)
    assert tightest.advice in str(caught.value)


@pytest.mark.parametrize(("machines", "cpus"), [(0, 1), (-1, 1), (1, 0)])
def test_numbers_that_make_no_sense_are_refused(machines: int, cpus: int) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        check_limits(machines, cpus)


def test_a_soft_limit_of_descriptors_may_be_raised_and_a_hard_one_needs_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for hard, advice in ((9000, "raise it up to 9000"), (200, "LimitNOFILE=")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (200, hard))
        with pytest.raises(ConfigError, match=rf"1000 machines of 1 vCPU need 3000 descriptors: .*{advice}"):
            check_limits(1000)


def test_no_limit_is_no_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "RLIMIT_NOFILE" not in [limit.name for limit in host_limits()]


def test_processes_count_for_users_that_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100_000, 100_000))
    monkeypatch.setattr(limits, "_is_capable", lambda _: True)
    assert "RLIMIT_NPROC" not in [limit.name for limit in host_limits()]
    here = limits._threads_of_user()
    assert here >= len(os.listdir("/proc/self/task"))
    monkeypatch.setattr(limits, "_is_capable", lambda _: False)
    monkeypatch.setattr(limits, "_threads_of_user", lambda: here)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    (found,) = [limit for limit in host_limits(2) if limit.name == "RLIMIT_NPROC"]
    assert (found.value, found.used, found.each) == (100_000, here + limits.SPARE_THREADS, 3)


def test_names_of_programs_are_no_text() -> None:
    # A name is cut after 15 bytes, which may be within a character.
    name = "x" * 14 + "ä"
    text = f"import ctypes; ctypes.CDLL(None).prctl(15, {name.encode()!r}); print(flush=True); input()"
    command = [sys.executable, "-c", text]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout
        assert program.stdout.readline() == b"\n"
        assert limits._status(Path(f"/proc/{program.pid}"))["Name"].startswith("x" * 14)
        assert limits._threads_of_user() > 0
        program.communicate(b"\n")


def test_a_control_group_counts_the_threads_of_those_below_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, most, current in ((outer, "300", "120"), (inner, "max", "20")):
        (group / "pids.max").write_text(f"{most}\n")
        (group / "pids.current").write_text(f"{current}\n")
    monkeypatch.setattr(limits, "_groups", lambda _: iter((inner, outer, tmp_path)))
    (found,) = [limit for limit in host_limits() if limit.name.endswith("pids.max")]
    assert found.name == str(outer / "pids.max")
    assert found.machines == (300 - 120 - limits.SPARE_THREADS) // 2


@pytest.mark.kvm
def test_a_machine_takes_no_more_than_is_counted() -> None:
    out = run(
        """
def counts():
    gc.collect()
    return [len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")),
            len(open("/proc/self/maps").read().splitlines())]

async def main():
    async with contextlib.AsyncExitStack() as stack:
        async def more(count):
            for _ in range(count):
                vm = await stack.enter_async_context(
                    await VM.create(boot=boot.Flat(HALT), memory="2M", cpus=2)
                )
                await vm.start()
        # All workers that the loop can come to have.
        loop, barrier = current_loop(), threading.Barrier(THREADS_MAX)
        await asyncio.gather(*(loop.in_thread(barrier.wait) for _ in range(THREADS_MAX)))
        await more(4)
        before = counts()
        await more(20)
        print(*[(b - a) / 20 for a, b in zip(before, counts())])
"""
    )
    each = [float(number) for number in out.split()]
    descriptors, mappings = (
        next(limit.each for limit in host_limits(2) if limit.name == name)
        for name in ("RLIMIT_NOFILE", "vm.max_map_count")
    )
    assert each[0] <= descriptors
    assert each[1] <= 2 + limits.THREADS
    # Neighbours with the same rights may be one mapping; what the allocator maps is in the reserve.
    assert each[2] <= mappings + 0.5


def test_memory_that_the_host_does_not_have_is_told_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits.check_memory(1 << 20)
    with pytest.raises(ConfigError, match=r"memory is 65536 GiB, and .* --overcommit"):
        limits.check_memory(64 << 40)
    monkeypatch.setattr(limits, "_groups", lambda _: iter((tmp_path,)))
    swap = 7 << 20
    for files in (
        {"memory.max": 500 << 20, "memory.swap.max": swap},
        {"memory.memsw.limit_in_bytes": (500 << 20) + swap, "memory.limit_in_bytes": 1 << 40},
    ):
        for file in tmp_path.iterdir():
            file.unlink()
        for name, value in files.items():
            (tmp_path / name).write_text(f"{value}\n")
        limits.check_memory((500 << 20) + swap)
        with pytest.raises(ConfigError, match=str(tmp_path / next(iter(files)))):
            limits.check_memory((500 << 20) + swap + 1)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.memsw.limit_in_bytes").unlink()
    limits.check_memory(1 << 30)


@pytest.mark.anyio
@pytest.mark.parametrize("memory", ["100G", "64T"])
async def test_a_machine_larger_than_the_host_is_refused_before_anything_is_read(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_memory", lambda: iter([("/proc/meminfo", 23 << 30)]))
    with pytest.raises(ConfigError, match=r"/proc/meminfo says that there are 23 GiB: .*overcommit=True"):
        await VM.create(boot=boot.Linux("/nonexistent"), memory=memory)


@pytest.mark.kvm
@pytest.mark.anyio
async def test_overcommit_allows_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_memory", lambda: iter([("/proc/meminfo", 1 << 20)]))
    async with await VM.create(boot=boot.Flat(b"\xf4"), memory="100G", overcommit=True) as vm:
        assert vm.memory.size_bytes == 100 << 30


def test_what_kvm_maps_for_a_processor_without_real_mode_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parameter = tmp_path / "unrestricted_guest"
    monkeypatch.setattr(limits, "_UNRESTRICTED_GUEST", parameter)

    def each() -> int:
        return next(limit.each for limit in host_limits() if limit.name == "vm.max_map_count")

    with_real_mode = each()
    parameter.write_text("Y\n")
    assert each() == with_real_mode
    parameter.write_text("N\n")
    assert each() == with_real_mode + limits.REAL_MODE_MAPPINGS


def test_what_guests_share_limits_no_machines() -> None:
    shared = [limit for limit in host_limits() if not limit.each]
    assert {limit.unit for limit in shared} == {"descriptors", "bytes", "lines in a second"}
    for limit in shared:
        assert limit.value > limit.used >= 0
        assert limit.machines > 10**9
        assert limit.advice


@pytest.mark.kvm
@pytest.mark.anyio
@pytest.mark.parametrize("memory", ["64T", "99999999999T", 1 << 70])
async def test_what_kvm_cannot_map_is_refused_with_overcommit_too(memory: int | str) -> None:
    with pytest.raises(ConfigError, match="a machine has at most 8192 GiB"):
        await VM.create(boot=boot.Flat(b"\xf4"), memory=memory, overcommit=True)
