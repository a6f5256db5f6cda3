"""Boot protocols of a program's own, and Multiboot: what they set is there, also after a reset."""

from __future__ import annotations

import struct
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import VM, BootError, Exit, ExitReason, boot
from aiokvm.boot.entry import long_mode
from aiokvm.boot.layout import ACPI, PAGE_TABLES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
VALUES = {name: 0x1111_0000_0000_0000 + number for number, name in enumerate(GENERAL)}
REGISTERS: dict[str, Any] = {**VALUES}
TOLD = 0x3000
# mov [TOLD + 8 * number], register, of each; then jmp to itself.
TELLS = b"".join(
    bytes((0x48 | (number >> 3) << 2, 0x89, (number & 7) << 3 | 4, 0x25)) + struct.pack("<I", address)
    for number, address in enumerate(range(TOLD, TOLD + 128, 8))
)
TELLS += b"\xeb\xfe"


class Own:
    """A protocol that sets every register, and puts segments where it is told."""

    def __init__(self, *more: boot.Segment) -> None:
        self.more = more

    def files(self) -> tuple[Path, ...]:
        return ()

    def plan(self, files: Mapping[Path, bytes], guest: boot.GuestInfo) -> boot.BootPlan:
        builder = boot.PlanBuilder(guest)
        builder.copy("the image", 0x1000, TELLS)
        plan = builder.build(replace(long_mode(builder, 0x1000), **REGISTERS))
        return replace(plan, segments=(*plan.segments, *self.more))


async def told(vm: VM) -> dict[str, int]:
    """What the guest tells: its last register comes last."""
    while not vm.memory.read(TOLD + 120, 8)[0]:
        await anyio.lowlevel.checkpoint()
    return dict(zip(GENERAL, struct.unpack("<16Q", vm.memory.read(TOLD, 128)), strict=True))


async def test_every_general_register_is_what_the_protocol_says_also_after_a_reset() -> None:
    with anyio.fail_after(30):
        async with await VM.create(boot=Own(), memory="2M") as vm:
            await vm.start()
            assert await told(vm) == VALUES
            await vm.pause()
            for name in GENERAL:
                vm.vcpus[0].write_register(name, 5)
            vm.memory.fill(TOLD, 128)
            await vm.reset()
            assert {name: vm.vcpus[0].read_register(name) for name in GENERAL} == VALUES
            await vm.resume()
            assert await told(vm) == VALUES


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (boot.Segment(ACPI, b"x"), "overlaps the ACPI tables"),
        (boot.Segment(0xF_FFF0, b"x"), "overlaps the ACPI tables"),
        (boot.Segment((2 << 20) - 1, b"xy"), "is not inside RAM"),
        (boot.Segment(1 << 40, b"x"), "is not inside RAM"),
        (boot.Segment(PAGE_TABLES, b"x"), "overlaps segment"),
    ],
)
async def test_a_plan_that_cannot_be_carried_out_makes_no_machine(
    segment: boot.Segment, message: str
) -> None:
    with pytest.raises(BootError, match=message):
        await VM.create(boot=Own(segment), memory="2M")


async def test_a_multiboot_kernel_finds_what_it_is_promised(tmp_path: Path) -> None:
    code = bytes.fromhex(
        "3d 02 b0 ad 2b"  # cmp eax, 0x2badb002
        "75 0c"  # jne out
        "8b 4b 18"  # mov ecx, [ebx + 24]: mods_addr
        "8b 09"  # mov ecx, [ecx]: mod_start
        "8a 01"  # mov al, [ecx]
        "e6 f4"  # out 0xf4, al
        "f4"  # hlt
        "90 90"
        "b0 ff e6 f4 f4"  # out: no loader of ours
    )
    flags = 3 | 1 << 16
    header = struct.pack("<3I", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF)
    addresses = struct.pack("<5I", 0x10_0000, 0x10_0000, 0, 0, 0x10_0020)
    kernel, module = tmp_path / "kernel", tmp_path / "module"
    kernel.write_bytes(header + addresses + code)
    module.write_bytes(b"\x2a")
    protocol = boot.Multiboot(kernel, cmdline="hello", modules=[module])
    async with await VM.create(boot=protocol, memory="4M") as vm:
        await vm.start()
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=42)


async def test_what_was_booted_is_freed_where_no_loop_runs() -> None:
    """Gigabytes of an initramfs take the kernel a while, at each of a guest's resets, too."""
    freed_in: list[int] = []

    class Data(bytes):
        def __del__(self) -> None:
            freed_in.append(threading.get_ident())

    class Freed(Own):
        def plan(self, files: Mapping[Path, bytes], guest: boot.GuestInfo) -> boot.BootPlan:
            plan = super().plan(files, guest)
            return replace(plan, segments=(boot.Segment(0x10_0000, Data(b"x" * 4096)), *plan.segments))

    with anyio.fail_after(30):
        async with await VM.create(boot=Freed(), memory="2M") as vm:
            assert len(freed_in) == 1
            await vm.start()
            await vm.reset()
            assert len(freed_in) == 2
    assert threading.get_ident() not in freed_in
