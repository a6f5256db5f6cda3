"""The way of an exit: what the guest does reaches the device exactly, and what the device says the guest."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, ClassVar

import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokvm import Exit, ExitReason
from aiokvm.kvm import MpState

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
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "Broken: write of 2 bytes at offset 0x1 failed",
        "Broken: read of 4 bytes at offset 0x3 failed",
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
    what = "string access" if opcode == "6c" else "write"
    assert f"Broken: {what} of 1 bytes at offset 0x0 failed" in caplog.text


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
            region = vm._exits.pio.attach(device, PIO, 8)
            vm._exits.publish()
            await until_byte(vm, value)
            vm._exits.pio.detach(region)
            vm._exits.publish()
            await until_byte(vm, 0xFF)
        assert device.accesses


async def until_byte(vm: VM, value: int) -> None:
    while vm.memory.read(0x2000, 1) != bytes([value]):
        await anyio.lowlevel.checkpoint()


# Posted writes.


class Posting:
    """A device whose first register is posted and whose last is latched."""

    posted_offsets: ClassVar[tuple[int, ...]] = (0,)

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.fails = False

    def write_posted(self, offset: int, data: bytes) -> None:
        assert offset == 0
        if self.fails:
            raise RuntimeError("no posts today")
        self.seen.extend(("posted", byte) for byte in data)

    def connect_latch(self, latch: Callable[[int, int | None], None]) -> None:
        self.latch = latch

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset))
        return len(self.seen) & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", value))

    def reset(self) -> None: ...


async def test_posted_bytes_come_before_what_the_guest_does_after_them(guest: Guest, attach: Attach) -> None:
    code = bytes.fromhex(
        "31 c9"  # xor cx, cx
        "ba 00 03"  # again: mov dx, 0x300: posted
        "88 c8"  # mov al, cl
        "ee"  # out dx, al
        "40"  # inc ax
        "ee"  # out dx, al
        "42"  # inc dx: asks the loop
        "ec"  # in al, dx
        "ee"  # out dx, al
        "fe c1"  # inc cl
        "75 f1" + EXIT  # jnz again
    )
    device = Posting()
    async with guest(code, start=False) as vm:
        attach(vm, device, pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
    expected: list[tuple[str, int]] = []
    for i in range(256):
        expected += [("posted", i), ("posted", (i + 1) & 0xFF), ("read", 1)]
        expected.append(("write", len(expected) & 0xFF))
    assert device.seen == expected


async def test_the_latch_answers_without_the_device_until_it_is_lifted(guest: Guest, attach: Attach) -> None:
    code = bytes.fromhex(
        "ba 07 03"  # mov dx, 0x307
        "ec"  # in al, dx
        "a2 00 20"  # mov [0x2000], al
        "ba 01 03"  # mov dx, 0x301
        "ee"  # out dx, al: the device lifts the latch
        "ba 07 03"  # mov dx, 0x307
        "ec"  # in al, dx
        "a2 01 20" + EXIT  # mov [0x2001], al
    )

    class Lifting(Posting):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            self.latch(7, None)

    device = Lifting()
    async with guest(code, start=False) as vm:
        attach(vm, device, pio=PIO)
        device.latch(7, 0x5A)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(0x2000, 2) == b"\x5a\x02"
    assert device.seen == [("write", 0x5A), ("read", 7)]


async def test_wide_accesses_to_posted_and_latched_registers_ask_the_device(
    guest: Guest, attach: Attach
) -> None:
    code = access_code("pio", True, 0, 2, 0x1234, 0) + access_code("pio", False, 7, 2, 0, 0)
    device = Posting()
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, pio=PIO, size=16)
        device.latch(7, 0x5A)
        await vm.start()
        assert await vm.wait() == DONE
        assert results(vm, 1) == [2]
    assert device.seen == [("write", 0x1234), ("read", 7)]


async def test_a_device_that_fails_at_posts_is_logged(
    guest: Guest, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    device = Posting()
    device.fails = True
    code = access_code("pio", True, 0, 1, 0x12, 0) + access_code("pio", True, 1, 1, 0x34, 0)
    async with guest(bytes.fromhex(code + EXIT), mode="protected", start=False) as vm:
        attach(vm, device, pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
    assert device.seen == [("write", 0x34)]
    assert "Posting: posted write of 1 bytes at offset 0x0 failed" in caplog.text


RING = 4096
FLOOD = 10_000


@pytest.mark.parametrize("string", [False, True])
async def test_a_flood_while_the_loop_is_busy_elsewhere_is_neither_lost_nor_doubled(
    guest: Guest, string: bool
) -> None:
    data = bytes((i ^ i >> 8) & 0xFF for i in range(FLOOD))
    bytewise = (
        "66 ba f8 03"  # mov dx, 0x3f8
        "be 00 00 10 00"  # mov esi, 0x100000
        "ac"  # again: lodsb
        "ee"  # out dx, al
        "89 35 00 20 00 00"  # mov [0x2000], esi
        "81 fe 10 27 10 00"  # cmp esi, 0x100000 + 10000
        "75 f0"  # jnz again
    )
    in_strings = (
        "66 ba f8 03"  # mov dx, 0x3f8
        "be 00 00 10 00"  # mov esi, 0x100000
        "b9 64 00 00 00"  # again: mov ecx, 100
        "f3 6e"  # rep outsb
        "89 35 00 20 00 00"  # mov [0x2000], esi
        "81 fe 10 27 10 00"  # cmp esi, 0x100000 + 10000
        "75 eb"  # jnz again
    )
    code = bytes.fromhex((in_strings if string else bytewise) + EXIT)
    async with guest(code, mode="protected", start=False) as vm:
        vm.memory.write(RESULTS, data)
        await vm.start()
        # The loop stands here, and the guest fills the ring and then waits for it.
        enough = RESULTS + (RING - RING % 100 if string else RING)
        deadline = time.monotonic() + 10
        while int.from_bytes(vm.memory.read(0x2000, 4), "little") < enough and time.monotonic() < deadline:
            pass
        assert int.from_bytes(vm.memory.read(0x2000, 4), "little") == enough
        assert await vm.wait() == DONE
        assert await all_output(vm) == data
        assert vm.serial.dropped == 0


async def all_output(vm: VM) -> bytes:
    output = b""
    while chunk := await vm.serial.read():
        output += chunk
    return output


async def test_posts_of_two_vcpus_keep_their_order(guest: Guest) -> None:
    code = bytes.fromhex(
        "66 ba f8 03"  # mov dx, 0x3f8
        "31 c9"  # xor ecx, ecx
        "88 c8"  # again: mov al, cl
        "24 7f"  # and al, 0x7f
        "08 d8"  # or al, bl
        "ee"  # out dx, al
        "41"  # inc ecx
        "81 f9 88 13 00 00"  # cmp ecx, 5000
        "75 f0"  # jnz again
        "fa"  # cli
        "f4"  # hlt
    )
    async with guest(code, mode="protected", cpus=2, start=False) as vm:
        first, second = vm.vcpus
        second.kvm_vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)
        second.kvm_vcpu.set_sregs(first.kvm_vcpu.get_sregs())
        second.kvm_vcpu.set_regs(first.kvm_vcpu.get_regs())
        second.write_register("rbx", 0x80)
        await vm.start()
        output = b""
        while len(output) < 10_000:
            output += await vm.serial.read()
        await vm.pause()
    for high in (0, 0x80):
        assert [byte & 0x7F for byte in output if byte & 0x80 == high] == [i & 0x7F for i in range(5000)]
