"""The way of an exit: what the guest does reaches the device exactly, and what the device says the guest."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokvm import Exit, ExitReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm import VM
    from tests.machine.conftest import Attach, Guest, Recorder

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
EXIT = (
    "b0 00"  # mov al, 0
    "e6 f4"  # out 0xf4, al
    "f4"  # hlt
)
PIO = 0x300
MMIO = 0xD000_0000
# Where a guest of these tests leaves what it read.
RESULTS = 0x10_0000


def le32(value: int) -> str:
    return value.to_bytes(4, "little").hex()


def access_code(bus: str, is_write: bool, offset: int, size: int, value: int, result: int) -> str:
    """One access in protected mode; a read's result goes to a slot of four bytes."""
    prefix = "66" if size == 2 else ""
    # The opcode's lowest bit says whether the operand is wider than a byte.
    wide = size != 1
    load = "b8" + le32(value if is_write else 0)  # mov eax, value
    store = "" if is_write else "a3" + le32(RESULTS + 4 * result)  # mov [result], eax
    if bus == "pio":
        opcode = (0xEE if is_write else 0xEC) | wide  # out dx, eax; in eax, dx
        middle = "66 ba" + (PIO + offset).to_bytes(2, "little").hex() + f"{prefix}{opcode:02x}"
    else:
        opcode = (0xA2 if is_write else 0xA0) | wide  # mov [moffs], eax; mov eax, [moffs]
        middle = f"{prefix}{opcode:02x}" + le32(MMIO + offset)
    return load + middle + store


def results(vm: VM, count: int) -> list[int]:
    data = vm.memory.read(RESULTS, 4 * count)
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


@pytest.mark.parametrize("bus", ["pio", "mmio"])
async def test_accesses_of_every_width_reach_the_device(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder], bus: str
) -> None:
    code = "".join(
        access_code(bus, is_write, offset, size, 0x8765_4321, result)
        for result, (is_write, offset, size) in enumerate(
            [(False, 0, 1), (False, 2, 2), (False, 4, 4), (True, 7, 1), (True, 6, 2), (True, 0, 4)]
        )
    )
    device = recorder([0xAA, 0xBBBB, 0xCCCC_CCCC])
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, **{bus: PIO if bus == "pio" else MMIO})
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 3) == [0xAA, 0xBBBB, 0xCCCC_CCCC]
    assert device.accesses == [
        ("read", 0, 1, 0xAA),
        ("read", 2, 2, 0xBBBB),
        ("read", 4, 4, 0xCCCC_CCCC),
        ("write", 7, 1, 0x21),
        ("write", 6, 2, 0x4321),
        ("write", 0, 4, 0x8765_4321),
    ]


async def test_mmio_of_eight_bytes_is_one_access(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder]
) -> None:
    code = bytes.fromhex(
        "bb 00 00 00 d0"  # mov ebx, 0xd0000000
        "48 8b 03"  # mov rax, [rbx]
        "48 ff c0"  # inc rax
        "48 89 43 08" + EXIT  # mov [rbx + 8], rax
    )
    device = recorder([0x0123_4567_89AB_CDEE])
    async with guest(code, mode="long", start=False) as vm:
        attach(vm, device, mmio=MMIO, size=16)
        await vm.start()
        assert await vm.wait() == DONE
    assert device.accesses == [("read", 0, 8, 0x0123_4567_89AB_CDEE), ("write", 8, 8, 0x0123_4567_89AB_CDEF)]


@pytest.mark.parametrize("bus", ["pio", "mmio"])
@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
async def test_what_nothing_claims_reads_as_ones_and_swallows_writes(
    guest: Guest, bus: str, size: int, ones: int
) -> None:
    code = access_code(bus, True, 0, size, 0, 0) + access_code(bus, False, 0, size, 0, 0)
    async with guest(bytes.fromhex(code + EXIT), mode="protected") as vm:
        assert await vm.wait() == DONE
        assert results(vm, 1) == [ones]


async def test_the_neighbours_of_a_device_are_not_the_device(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder]
) -> None:
    code = "".join(
        access_code("pio", False, offset, 1, 0, i) for i, offset in enumerate([15, 16, 17, 18, 19])
    )
    device, next_but_one = recorder([1, 2]), recorder([3])
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, pio=PIO + 16, size=2)
        attach(vm, next_but_one, pio=PIO + 19, size=1)
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 5) == [0xFF, 1, 2, 0xFF, 3]
    assert device.accesses == [("read", 0, 1, 1), ("read", 1, 1, 2)]
    assert next_but_one.accesses == [("read", 0, 1, 3)]


@pytest.mark.parametrize(("opcode", "size"), [("6e", 1), ("66 6f", 2), ("6f", 4)])
async def test_an_outs_string_arrives_byte_for_byte(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder], opcode: str, size: int
) -> None:
    count = 5000 // size
    code = bytes.fromhex(
        "66 ba 02 03"  # mov dx, 0x302
        "be 00 00 10 00"  # mov esi, 0x100000
        "b9" + le32(count) + f"f3 {opcode}" + EXIT  # mov ecx, count; rep outs
    )
    data = bytes(i * 7 % 251 for i in range(count * size))
    device = recorder()
    async with guest(code, mode="protected", start=False) as vm:
        vm.memory.write(RESULTS, data)
        attach(vm, device, pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
    assert {access[:3] for access in device.accesses} == {("write", 2, size)}
    assert b"".join(access[3].to_bytes(size, "little") for access in device.accesses) == data


@pytest.mark.parametrize(("opcode", "size"), [("6c", 1), ("66 6d", 2), ("6d", 4)])
async def test_an_ins_string_arrives_byte_for_byte(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder], opcode: str, size: int
) -> None:
    count = 5000 // size
    code = bytes.fromhex(
        "66 ba 02 03"  # mov dx, 0x302
        "bf 00 00 10 00"  # mov edi, 0x100000
        "b9" + le32(count) + f"f3 {opcode}" + EXIT  # mov ecx, count; rep ins
    )
    data = bytes(i * 7 % 251 for i in range(count * size))
    values = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    device = recorder(values)
    async with guest(code, mode="protected", start=False) as vm:
        attach(vm, device, pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(RESULTS, len(data) + 1) == data + b"\0"
    # KVM reads ahead, so the device may be asked for more than the guest takes, but in order and never less.
    assert device.accesses[: len(values)] == [("read", 2, size, value) for value in values]


async def test_an_ins_string_from_nothing_is_ones(guest: Guest) -> None:
    code = bytes.fromhex(
        "66 ba 00 03"  # mov dx, 0x300
        "bf 00 00 10 00"  # mov edi, 0x100000
        "b9 00 10 00 00"  # mov ecx, 0x1000
        "f3 6c" + EXIT  # rep insb
    )
    async with guest(code, mode="protected") as vm:
        assert await vm.wait() == DONE
        assert vm.memory.read(RESULTS, 0x1001) == b"\xff" * 0x1000 + b"\0"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pio", "mmio"]),
            st.booleans(),
            st.integers(0, 7),
            st.sampled_from([1, 2, 4]),
            st.integers(0, 0xFFFF_FFFF),
        ),
        max_size=25,
    )
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_sequence_of_accesses_is_seen_as_it_was_made(
    guest: Guest,
    attach: Attach,
    recorder: Callable[..., Recorder],
    accesses: list[tuple[str, bool, int, int, int]],
) -> None:
    code = ""
    read: list[int] = []
    expected = []
    for bus, is_write, offset, size, value in accesses:
        seen = value & (1 << 8 * size) - 1
        code += access_code(bus, is_write, offset, size, value, len(read))
        expected.append(("write" if is_write else "read", offset + 0x10 * (bus == "mmio"), size, seen))
        if not is_write:
            read.append(seen)
    device = recorder(read)

    class OnMmio:
        """The same device, seen at offset 0x10."""

        def read(self, offset: int, size: int) -> int:
            return device.read(offset + 0x10, size)

        def write(self, offset: int, size: int, value: int) -> None:
            device.write(offset + 0x10, size, value)

        def reset(self) -> None: ...

    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, pio=PIO, size=16)
        attach(vm, OnMmio(), mmio=MMIO, size=16)
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, len(read)) == read
    assert device.accesses == expected


# Devices that misbehave.


class Broken:
    """Fails at everything."""

    def read(self, offset: int, size: int) -> int:
        raise RuntimeError("no read today")

    def write(self, offset: int, size: int, value: int) -> None:
        raise RuntimeError("no write today")

    def reset(self) -> None: ...


@pytest.mark.parametrize("bus", ["pio", "mmio"])
async def test_a_device_that_fails_is_logged_and_reads_as_ones(
    guest: Guest, attach: Attach, caplog: pytest.LogCaptureFixture, bus: str
) -> None:
    code = access_code(bus, True, 1, 2, 0, 0) + access_code(bus, False, 3, 4, 0, 0)
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, Broken(), **{bus: PIO if bus == "pio" else MMIO})
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 1) == [0xFFFF_FFFF]
    place = "0x300-0x307" if bus == "pio" else f"{MMIO:#x}-{MMIO + 7:#x}"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        f"Broken: write of 2 bytes at offset 0x1 of the region at {place} failed",
        f"Broken: read of 4 bytes at offset 0x3 of the region at {place} failed",
    ]


@pytest.mark.parametrize("opcode", ["6c", "6e"])
async def test_a_device_that_fails_in_a_string_is_logged_and_reads_as_ones(
    guest: Guest, attach: Attach, caplog: pytest.LogCaptureFixture, opcode: str
) -> None:
    code = bytes.fromhex(
        "66 ba 00 03"  # mov dx, 0x300
        "bf 00 00 10 00"  # mov edi, 0x100000
        "be 00 00 10 00"  # mov esi, 0x100000
        "b9 04 00 00 00"  # mov ecx, 4
        f"f3 {opcode}" + EXIT  # rep insb, rep outsb
    )
    async with guest(code, mode="protected", start=False) as vm:
        attach(vm, Broken(), pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(RESULTS, 5) == (b"\xff\xff\xff\xff\0" if opcode == "6c" else bytes(5))
    # KVM hands an outs on byte by byte.
    what, times = ("string read", ", 4 times") if opcode == "6c" else ("write", "")
    assert f"Broken: {what} of 1 bytes at offset 0x0{times} of the region at 0x300-" in caplog.text


async def test_what_a_device_reads_as_is_cut_to_the_access(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder]
) -> None:
    code = access_code("pio", False, 0, 1, 0, 0) + access_code("pio", False, 0, 2, 0, 1)
    code += (
        "66 ba 00 03"  # mov dx, 0x300
        "bf 08 00 10 00"  # mov edi, 0x100008
        "b9 02 00 00 00"  # mov ecx, 2
        "f3 6c"  # rep insb
    )
    device = recorder([0x1_FF12, -1, 0x1_2334, -2])
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 3) == [0x12, 0xFFFF, 0xFE34]


async def test_an_access_that_crosses_a_page_comes_in_pieces_of_any_size(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder]
) -> None:
    code = access_code("mmio", True, 0xFFD, 4, 0x4433_2211, 0) + access_code("mmio", False, 0xFFD, 4, 0, 0)
    device = recorder([0x77_6655, 0x88])
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, mmio=MMIO, size=0x2000)
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 1) == [0x8877_6655]
    assert device.accesses == [
        ("write", 0xFFD, 3, 0x33_2211),
        ("write", 0x1000, 1, 0x44),
        ("read", 0xFFD, 3, 0x77_6655),
        ("read", 0x1000, 1, 0x88),
    ]


async def test_a_plain_device_that_lets_a_cancellation_of_something_else_through_has_failed(
    guest: Guest, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    class CutOff(Broken):
        def read(self, offset: int, size: int) -> int:
            raise asyncio.CancelledError

        def write(self, offset: int, size: int, value: int) -> None:
            raise asyncio.CancelledError

    code = access_code("pio", True, 0, 1, 0, 0) + access_code("pio", False, 0, 2, 0, 0)
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, CutOff(), pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 1) == [0xFFFF]
    assert "CutOff: write of 1 bytes at offset 0x0 of the region at 0x300-" in caplog.text
    assert "CutOff: read of 2 bytes at offset 0x0 of the region at 0x300-" in caplog.text


# What a machine is attached to may change while it runs.


async def test_devices_come_and_go_while_the_guest_runs(
    guest: Guest, attach: Attach, recorder: Callable[..., Recorder]
) -> None:
    code = bytes.fromhex(
        "ba 00 03"  # mov dx, 0x300
        "ec"  # again: in al, dx
        "a2 00 20"  # mov [0x2000], al
        "eb fa"  # jmp again
    )
    async with guest(code) as vm:
        for value in (0x11, 0x22, 0x33):
            device = recorder([value] * 1_000_000)
            region = vm._life.exits.pio.attach(device, PIO, 8)
            vm._life.exits.publish()
            await until_byte(vm, value)
            vm._life.exits.pio.detach(region)
            vm._life.exits.publish()
            await until_byte(vm, 0xFF)
        assert device.accesses


async def until_byte(vm: VM, value: int) -> None:
    while vm.memory.read(0x2000, 1) != bytes([value]):
        await anyio.lowlevel.checkpoint()
