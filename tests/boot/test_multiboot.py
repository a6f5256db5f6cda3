"""Multiboot kernels: headers of both kinds, what the kernel is told, and files that lie."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot import BootPlan, GuestInfo, Multiboot, check_plan
from aiokvm.boot.cpu import CR0_PE
from aiokvm.boot.layout import ACPI, CMDLINE, HIGH_MEMORY, START_INFO
from aiokvm.errors import BootError, ConfigError

MIB = 1 << 20
GUEST = GuestInfo(((0, 64 * MIB),), rsdp=ACPI)
MAGIC = 0x1BAD_B002
CODE = b"\xf4" * 64


def kernel(
    *, flags: int = 3 | 1 << 16, at: int = 16, addresses: dict[str, int] | None = None, code: bytes = CODE
) -> bytes:
    """A kernel with a header of addresses, loaded to 1 MiB from the file's beginning."""
    where = {
        "header": MIB + at,
        "load": MIB,
        "load_end": 0,
        "bss_end": 0,
        "entry": MIB + at + 32,
        **(addresses or {}),
    }
    header = struct.pack("<3I5I", MAGIC, flags, -(MAGIC + flags) & 0xFFFF_FFFF, *where.values())
    return bytes(at) + header + code


def plan(data: bytes, guest: GuestInfo = GUEST, **options: Any) -> BootPlan:
    modules = {Path(name): content for name, content in options.pop("content", {}).items()}
    result = Multiboot("kernel", **options).plan({Path("kernel"): data, **modules}, guest)
    check_plan(result, guest)
    return result


def memory(found: BootPlan, gpa: int, size: int) -> bytes:
    for segment in found.segments:
        if segment.gpa <= gpa < segment.gpa + len(segment.data):
            return bytes(segment.data)[gpa - segment.gpa :][:size]
    raise AssertionError(f"nothing is at {gpa:#x}")


def words(found: BootPlan, gpa: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", memory(found, gpa, 4 * count))


def text(found: BootPlan, gpa: int) -> bytes:
    return memory(found, gpa, 4096).split(b"\0")[0]


def test_registers_are_those_of_the_specification() -> None:
    cpu = plan(kernel()).cpu
    assert (cpu.rip, cpu.rax, cpu.rbx) == (MIB + 48, 0x2BAD_B002, START_INFO)
    assert cpu.cr0 & CR0_PE
    assert cpu.cs.limit == cpu.ds.limit == 0xFFFF_FFFF


def test_a_header_of_addresses_says_what_goes_where() -> None:
    data = kernel(addresses={"load_end": MIB + 64, "bss_end": 2 * MIB})
    found = plan(data)
    assert memory(found, MIB, 4096) == data[:64]
    assert (MIB + 64, MIB - 64) in found.zero


def test_an_elf_file_needs_no_addresses() -> None:
    content = struct.pack("<3I", MAGIC, 0, -MAGIC & 0xFFFF_FFFF) + CODE
    header = b"\x7fELF\x01\x01\x01" + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 3 * MIB + 12, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    program = struct.pack("<8I", 1, 84, 3 * MIB, 3 * MIB, len(content), len(content) + 100, 7, 4)
    found = plan(header + program + content)
    assert found.cpu.rip == 3 * MIB + 12
    assert memory(found, 3 * MIB, 4096) == content
    assert (3 * MIB + len(content), 100) in found.zero


def test_the_kernel_is_told_of_memory_command_line_and_modules() -> None:
    found = plan(
        kernel(),
        cmdline="root=grün",
        modules=["one.bin", ("dir/two", "second module")],
        content={"one.bin": b"1" * 5000, "dir/two": b"2"},
    )
    flags, lower, upper, _, cmdline, count, mods = words(found, START_INFO, 7)
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (lower, upper) == (640, 63 << 10)
    assert text(found, cmdline) == "root=grün".encode()
    assert count == 2
    told = [words(found, mods + 16 * i, 4) for i in range(count)]
    assert [memory(found, start, end - start) for start, end, _, _ in told] == [b"1" * 5000, b"2"]
    assert all(start % 4096 == 0 for start, *_ in told)
    assert [text(found, string) for _, _, string, _ in told] == [b"one.bin", b"second module"]
    length, mmap = words(found, START_INFO + 44, 2)
    entries = []
    while length:
        entries.append(struct.unpack("<IQQI", memory(found, mmap, 24)))
        mmap, length = mmap + 24, length - 24
    assert (20, HIGH_MEMORY, 63 * MIB, 1) in entries
    (name,) = words(found, START_INFO + 64, 1)
    assert text(found, name) == b"aiokvm"
    assert text(plan(kernel()), CMDLINE) == b""


def test_files_are_the_kernel_and_the_modules() -> None:
    assert Multiboot("k", modules=["a", ("b", "x")]).files() == (Path("k"), Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no header in the first 8192"),
        (bytes(9000) + kernel(), "no header"),
        (kernel(at=18), "no header"),
        (kernel().replace(b"\x03\x00\x01\x00", b"\x02\x00\x01\x00"), "no header"),
        (kernel(flags=7 | 1 << 16), "flags 0x4 stand for"),
        (kernel(flags=3), "ELF: not a little-endian ELF file"),
        (kernel()[:40], "ends inside its header"),
        (kernel(addresses={"load_end": 2 * MIB}), "the header says that"),
        (kernel(addresses={"header": MIB + 17}), "the header says that"),
        (kernel(addresses={"load_end": MIB - 1}), "the header says that"),
        (kernel(addresses={"bss_end": MIB + 1}), "the header says that"),
        (kernel(addresses={"entry": 2 * MIB}), "the entry 0x200000 is not in what is loaded"),
        (kernel(addresses={"bss_end": 65 * MIB}), "part 0 of the kernel .* is not inside RAM"),
        (
            kernel(addresses={"header": ACPI + 16, "load": ACPI, "entry": ACPI + 48}),
            "part 0 of the kernel .* overlaps the ACPI tables",
        ),
    ],
)
def test_a_kernel_that_is_none_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message):
        plan(data)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BootError, match="cmdline has 4097 bytes"):
        plan(kernel(), cmdline="x" * 4096)
    with pytest.raises(BootError, match=r"the module big .* does not fit"):
        plan(kernel(), modules=["big"], content={"big": bytes(64 * MIB)})
    with pytest.raises(BootError, match="300 modules with their strings"):
        plan(kernel(), modules=["m"] * 300, content={"m": b"m"})


@pytest.mark.parametrize("words", [{"cmdline": "a\0"}, {"cmdline": "\ud800"}, {"modules": [("m", "a\0")]}])
def test_text_that_cannot_be_passed_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Multiboot("kernel", **words)


@given(
    st.integers(0, 0xFFFF_FFFF),
    st.dictionaries(
        st.sampled_from(["header", "load", "load_end", "bss_end", "entry"]),
        st.sampled_from([0, 1, MIB - 1, MIB, MIB + 48, 63 * MIB, 0xFFFF_FFFF]) | st.integers(0, 0xFFFF_FFFF),
    ),
    st.integers(0, 120),
)
def test_whatever_the_header_says(flags: int, addresses: dict[str, int], cut: int) -> None:
    with contextlib.suppress(BootError):
        plan(kernel(flags=flags | 1 << 16, addresses=addresses)[: 120 - cut])
