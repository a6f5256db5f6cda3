"""Posted writes and latched reads: the vCPU runs on, and the device still sees all in the guest's order."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import pytest

from aiokvm import Exit, ExitReason
from aiokvm.kvm import MpState

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm import VM
    from tests.machine.conftest import Attach, Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
EXIT = (
    "b0 00"  # mov al, 0
    "e6 f4"  # out 0xf4, al
    "f4"  # hlt
)
PIO = 0x300
# Where the guests of these tests find what they write.
SOURCE = 0x10_0000


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
    code = bytes.fromhex(
        "ba 00 03"  # mov dx, 0x300
        "b8 34 12"  # mov ax, 0x1234
        "ef"  # out dx, ax
        "ba 07 03"  # mov dx, 0x307
        "ed"  # in ax, dx
        "a3 00 20" + EXIT  # mov [0x2000], ax
    )
    device = Posting()
    async with guest(code, start=False) as vm:
        attach(vm, device, pio=PIO, size=16)
        device.latch(7, 0x5A)
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(0x2000, 2) == b"\2\0"
    assert device.seen == [("write", 0x1234), ("read", 7)]


async def test_a_device_that_fails_at_posts_is_logged(
    guest: Guest, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    device = Posting()
    device.fails = True
    code = bytes.fromhex(
        "ba 00 03"  # mov dx, 0x300
        "b0 12"  # mov al, 0x12
        "ee"  # out dx, al
        "42"  # inc dx
        "b0 34"  # mov al, 0x34
        "ee" + EXIT  # out dx, al
    )
    async with guest(code, start=False) as vm:
        attach(vm, device, pio=PIO)
        await vm.start()
        assert await vm.wait() == DONE
    assert device.seen == [("write", 0x34)]
    assert "Posting: posted write of 1 bytes at offset 0x0 of the region at 0x300-" in caplog.text


RING = 4096
FLOOD = 10_000


@pytest.mark.computes  # the loop is held on purpose
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
        vm.memory.write(SOURCE, data)
        await vm.start()
        # The loop stands here, and the guest fills the ring and then waits for it.
        enough = SOURCE + (RING - RING % 100 if string else RING)
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
