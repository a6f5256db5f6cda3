"""Small guests on the real /dev/kvm, and the check that no test leaves anything of theirs behind.

A test writes its guest as bytes with the assembler beside them; only instructions that KVM's emulator knows
are used, for there are hosts whose ring 0 is emulated.
"""

from __future__ import annotations

import asyncio
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.lowlevel
import pytest
import sniffio

from aiokvm import VM, boot
from tests.mappings import secluded_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager

    from aiokvm.hw.bus import BusDevice

# A guest that does not do what it should fails its test after this time, instead of hanging it.
LIMIT_S = 30.0


class Guest(Protocol):
    """Makes a machine and runs it: ``async with guest(code, mode="long", cpus=2) as vm``."""

    def __call__(
        self, code: bytes, *, mode: str = ..., start: bool = ..., memory: int | str = ..., **config: Any
    ) -> AbstractAsyncContextManager[VM]: ...


def kvm_descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if "kvm" in target:
            found.append(target)
    return sorted(found)


def vcpu_threads() -> list[str]:
    """The names of the process's vCPU threads: the only ones that end in a colon and an index."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.rpartition(":")[2].isdigit():
            names.append(name)
    return sorted(names)


def resources() -> dict[str, Any]:
    """What machines take from the host.

    Another thread looks: it takes the longer, the more the process has mapped, and is no step of the test's.
    """
    with ThreadPoolExecutor(1) as looking:
        memory = looking.submit(secluded_bytes)
        return {"descriptors": kvm_descriptors(), "threads": vcpu_threads(), "memory": memory.result()}


@pytest.fixture(name="resources")
def resources_fixture() -> Callable[[], dict[str, Any]]:
    return resources


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = resources()
    yield
    # When the loop is gone as well.
    if "collected" in request.fixturenames and not request.node.get_closest_marker("kvm"):
        gc.collect()
    assert resources() == before


@pytest.fixture
def collected() -> None:
    """For tests with rigs, which hang in cycles, unlike machines: they are collected at the end."""


@pytest.fixture(params=["loop", "thread"])
def dataplane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def guest() -> Guest:
    @asynccontextmanager
    async def make(
        code: bytes, *, mode: Any = "real", start: bool = True, memory: int | str = "2M", **config: Any
    ) -> AsyncIterator[VM]:
        with anyio.fail_after(LIMIT_S):
            async with await VM.create(boot=boot.Flat(code, mode=mode), memory=memory, **config) as vm:
                if start:
                    await vm.start()
                yield vm

    return make


async def progress(vm: VM, gpa: int = 0x2000) -> None:
    """Returns when the guest has changed the byte there: it runs."""
    seen = vm.memory.read(gpa, 1)
    while vm.memory.read(gpa, 1) == seen:
        await anyio.lowlevel.checkpoint()


@pytest.fixture(name="progress")
def progress_fixture() -> Callable[..., Awaitable[None]]:
    return progress


class Recorder:
    """A device that records what reaches it, and reads as ``values`` say, then as zero."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.values = iter(values)
        self.accesses: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        value = next(self.values, 0)
        self.accesses.append(("read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))

    def reset(self) -> None:
        self.accesses.append(("reset", 0, 0, 0))


class Attach(Protocol):
    """Gives a machine that has not started a device: ``attach(vm, device, pio=0x300, size=8)``."""

    def __call__(
        self, vm: VM, device: BusDevice, *, pio: int = ..., mmio: int = ..., size: int = ...
    ) -> None: ...


@pytest.fixture
def attach() -> Attach:
    def attach(vm: VM, device: BusDevice, *, pio: int = -1, mmio: int = -1, size: int = 8) -> None:
        exits = vm._life.exits
        if pio >= 0:
            exits.pio.attach(device, pio, size)
        if mmio >= 0:
            exits.mmio.attach(device, mmio, size)
        exits.publish()

    return attach


@pytest.fixture
def recorder() -> Callable[..., Recorder]:
    return Recorder


class Cancelled(Protocol):
    """Calls, and cancels the call after so many turns of the loop; whether the call returned all the same."""

    async def __call__(self, turns: int, call: Callable[[], Awaitable[object]]) -> bool: ...


async def cancelled_scope(turns: int, call: Callable[[], Awaitable[object]]) -> bool:
    """By a cancel scope."""
    returned = False

    async def run() -> None:
        nonlocal returned
        await call()
        returned = True

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    return returned


async def cancelled_task(turns: int, call: Callable[[], Awaitable[object]]) -> bool:
    """By asyncio's own Task.cancel, which knows no scopes; trio has but scopes."""
    if sniffio.current_async_library() != "asyncio":
        return await cancelled_scope(turns, call)

    async def run() -> None:
        await call()

    task = asyncio.create_task(run())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        return False
    task.result()
    return True


@pytest.fixture(params=[cancelled_scope, cancelled_task])
def cancelled(request: pytest.FixtureRequest) -> Any:
    return request.param


class Program:
    """A guest in protected mode, access by access: what it reads goes to `results`, then it exits with 0."""

    RESULTS = 0x10_0000

    def __init__(self) -> None:
        self._code = ""
        self._reads = 0

    def read(self, address: int, size: int = 1, *, bus: str = "mmio") -> Program:
        self._access(bus, address, size, 0, False)
        self._code += "a3" + _le(self.RESULTS + 4 * self._reads, 4)  # mov [result], eax
        self._reads += 1
        return self

    def write(self, address: int, value: int, size: int = 1, *, bus: str = "mmio") -> Program:
        self._access(bus, address, size, value, True)
        return self

    def _access(self, bus: str, address: int, size: int, value: int, is_write: bool) -> None:
        prefix = "66" if size == 2 else ""
        # The opcode's lowest bit says whether the operand is wider than a byte.
        wide = size != 1
        self._code += "b8" + _le(value, 4)  # mov eax, value
        if bus == "pio":
            opcode = (0xEE if is_write else 0xEC) | wide  # out dx, eax; in eax, dx
            self._code += f"66 ba {_le(address, 2)} {prefix} {opcode:02x}"  # mov dx, address
        else:
            opcode = (0xA2 if is_write else 0xA0) | wide  # mov [moffs], eax; mov eax, [moffs]
            self._code += f"{prefix} {opcode:02x} {_le(address, 4)}"

    def strings(self, address: int, count: int, size: int = 1, *, out: bool) -> Program:
        """Rep outs from, or rep ins to, ``RESULTS``."""
        prefix = "66" if size == 2 else ""
        opcode = (0x6E if out else 0x6C) | (size != 1)
        pointer = "be" if out else "bf"
        self._code += (
            f"66 ba {_le(address, 2)}"  # mov dx, address
            f"{pointer} {_le(self.RESULTS, 4)}"  # mov esi, RESULTS; mov edi, RESULTS
            f"b9 {_le(count, 4)}"  # mov ecx, count
            f"f3 {prefix} {opcode:02x}"
        )
        return self

    def times(self, count: int) -> Program:
        """What there is so far, so many times."""
        body = len(bytes.fromhex(self._code))
        # mov ebp, count; again: ...; dec ebp; jz on; jmp again
        self._code = f"bd {_le(count, 4)} {self._code} 4d 74 05 e9 {_le(-body - 8, 4)}"
        return self

    def for_ever(self) -> bytes:
        body = len(bytes.fromhex(self._code))
        return bytes.fromhex(f"{self._code} e9 {_le(-body - 5, 4)}")

    def halt(self) -> bytes:
        return bytes.fromhex(self._code + "f4 eb fd")  # again: hlt; jmp again

    def end(self) -> bytes:
        return bytes.fromhex(self._code + "b0 00 e6 f4 f4")  # mov al, 0; out 0xf4, al; hlt

    @classmethod
    def results(cls, vm: VM, count: int) -> list[int]:
        data = vm.memory.read(cls.RESULTS, 4 * count)
        return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _le(value: int, size: int) -> str:
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little").hex()


@pytest.fixture
def program() -> type[Program]:
    return Program
