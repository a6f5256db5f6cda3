from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot import BootPlan, GuestInfo, Linux
from aiokvm.boot.elf import Elf
from aiokvm.boot.layout import CMDLINE
from aiokvm.errors import BootError, ConfigError

MIB, GIB = 1 << 20, 1 << 30
GUEST = GuestInfo(((0, 64 * MIB), (4 * GIB, 16 * MIB)), rsdp=0xE_0000)
KERNEL, INITRD = Path("vmlinux"), Path("initrd")
PT_LOAD, PT_NOTE = 1, 4
TEXT, DATA = b"\x90" * 64, b"data"


def note(desc: bytes, kind: int = 18, name: bytes = b"Xen\0", align: int = 4) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % align)

    head = padded(struct.pack("<III", len(name), len(desc), kind) + name)
    return head + padded(desc)


def elf(
    segments: list[dict[str, Any]] | None = None, *, bits: int = 64, pvh: bytes | None = None, **header: int
) -> bytes:
    """Return a kernel of ``segments``, else of code, data with bss, and a note with ``pvh`` if given."""
    if segments is None:
        segments = [
            {"paddr": 16 * MIB, "data": TEXT},
            {"paddr": 18 * MIB, "data": DATA, "memsz": MIB},
            *([{"type": PT_NOTE, "data": note(pvh), "paddr": 0}] if pvh is not None else []),
        ]
    ehsize, phsize = (64, 56) if bits == 64 else (52, 32)
    at = ehsize + phsize * len(segments)
    programs, content = b"", b""
    for segment in segments:
        data = segment["data"]
        offset = segment.get("offset", at + len(content))
        filesz = segment.get("filesz", len(data))
        memsz = segment.get("memsz", filesz)
        kind, paddr, align = segment.get("type", PT_LOAD), segment["paddr"], segment.get("align", 4)
        if bits == 64:
            programs += struct.pack("<IIQQQQQQ", kind, 5, offset, 1 << 63, paddr, filesz, memsz, align)
        else:
            programs += struct.pack("<8I", kind, offset, 1 << 31, paddr, filesz, memsz, 5, align)
        content += data
    h = {
        "class": 2 if bits == 64 else 1, "data": 1, "version": 1, "type": 2,
        "machine": 62 if bits == 64 else 3, "entry": 16 * MIB, "phoff": ehsize, "phentsize": phsize,
        "phnum": len(segments),
    } | header  # fmt: skip
    ident = b"\x7fELF" + bytes([h["class"], h["data"], h["version"]]) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    fields = (
        h["type"],
        h["machine"],
        1,
        h["entry"],
        h["phoff"],
        0,
        0,
        ehsize,
        h["phentsize"],
        h["phnum"],
        0,
        0,
        0,
    )
    return ident + struct.pack(layout, *fields) + programs + content


def plan(kernel: bytes, initrd: bytes | None = None, cmdline: str = "", guest: GuestInfo = GUEST) -> BootPlan:
    linux = Linux(KERNEL, None if initrd is None else INITRD, cmdline)
    return linux.plan({KERNEL: kernel, INITRD: initrd or b""}, guest)


def by_gpa(plan: BootPlan) -> dict[int, bytes]:
    return {segment.gpa: bytes(segment.data) for segment in plan.segments}


def assert_sound(plan: BootPlan, guest: GuestInfo) -> None:
    ranges = [*((s.gpa, s.gpa + len(s.data)) for s in plan.segments), *((g, g + n) for g, n in plan.zero)]
    assert all(any(a <= start and end <= a + n for a, n in guest.ram) for start, end in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(sorted(ranges)))


@pytest.mark.parametrize(("bits", "width"), [(64, 8), (64, 4), (32, 4)])
def test_pvh_entry(bits: int, width: int) -> None:
    result = plan(elf(bits=bits, pvh=(16 * MIB + 8).to_bytes(width, "little")), b"initrd", "quiet")
    segments = by_gpa(result)
    assert (segments[16 * MIB], segments[18 * MIB]) == (TEXT, DATA)
    assert result.zero == ((18 * MIB + 4, MIB - 4),)
    assert segments[0x9_9000] == b"quiet\0"
    initrd_gpa = 64 * MIB - 4096
    assert segments[initrd_gpa] == b"initrd"
    info = segments[0x9_2000]
    assert struct.unpack_from("<IIII", info) == (0x336E_C578, 1, 0, 1)
    assert struct.unpack_from("<QQ", info, 0x38) == (initrd_gpa, 6)
    cpu = result.cpu
    assert (cpu.rip, cpu.rbx, cpu.rsi, cpu.cr0, cpu.cr4, cpu.efer) == (16 * MIB + 8, 0x9_2000, 0, 0x11, 0, 0)
    assert (cpu.cs.db, cpu.cs.l) == (1, 0)
    assert set(segments) == {16 * MIB, 18 * MIB, initrd_gpa, 0x9_9000, 0x9_2000, 0x9_0000}
    assert_sound(result, GUEST)


@pytest.mark.parametrize(("bits", "long"), [(64, 1), (32, 0)])
def test_without_a_note_the_zero_page_and_the_mode_of_the_machine(bits: int, long: int) -> None:
    result = plan(elf(bits=bits, entry=16 * MIB + 4), b"initrd")
    segments = by_gpa(result)
    page = segments[0x9_1000]
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<II", page, 0x218) == (64 * MIB - 4096, 6)
    assert 0x9_2000 not in segments
    cpu = result.cpu
    assert (cpu.rip, cpu.rsi, cpu.rbx, cpu.cs.l) == (16 * MIB + 4, 0x9_1000, 0, long)
    assert (0x9_3000 in segments) == bool(long)
    assert_sound(result, GUEST)


ENTRY = (16 * MIB).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("notes", "align"),
    [
        (note(ENTRY), 4),
        (note(b"12345", kind=1, name=b"GNU\0") + note(ENTRY), 4),
        (note(b"12345", name=b"Linux\0") + note(ENTRY), 4),
        (note(b"", kind=3, name=b"") + note(b"x", kind=17) + note(ENTRY), 4),
        (note(b"12345", kind=1, align=8) + note(ENTRY, align=8), 8),
        (note(ENTRY) + b"\0" * 11, 4),
    ],
)
def test_the_note_is_found_among_others(notes: bytes, align: int) -> None:
    kernel = elf(
        [{"paddr": 16 * MIB, "data": TEXT}, {"type": PT_NOTE, "paddr": 0, "data": notes, "align": align}],
        entry=0,
    )
    assert Elf.parse(kernel).pvh_entry == 16 * MIB


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (note(ENTRY)[:-1], r"the note at 0 ends at 20, the notes at 19"),
        (struct.pack("<III", 0xFFFF_FFFF, 0xFFFF_FFFF, 18), "the note at 0 ends at"),
        (note(b"123"), "the PVH entry has 3 bytes"),
        (note(bytes(16)), "the PVH entry has 16 bytes"),
        (bytes(16385), "16385 bytes of notes"),
        (note((16 * MIB + 64).to_bytes(4, "little")), "the entry 0x1000040 is not the physical address"),
        (note(b"\xff" * 8), "the entry 0xffffffffffffffff is not"),
    ],
)
def test_bad_notes_are_refused(notes: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message):
        plan(elf([{"paddr": 16 * MIB, "data": TEXT}, {"type": PT_NOTE, "paddr": 0, "data": notes}]))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"class": 3}, "not a little-endian ELF file"),
        ({"data": 2}, "not a little-endian ELF file"),
        ({"version": 0}, "not a little-endian ELF file"),
        ({"type": 3}, "type 3, need an executable"),
        ({"machine": 183}, "machine 183 in class 2"),
        ({"machine": 3}, "machine 3 in class 2"),
        ({"phnum": 0}, "0 program headers"),
        ({"phnum": 65}, "65 program headers"),
        ({"phnum": 0xFFFF}, "65535 program headers"),
        ({"phentsize": 32}, "program headers of 32 bytes, need 1 to 64 of 56"),
        ({"phoff": (1 << 64) - 8}, "the file ends at"),
        ({"entry": 0}, "the entry 0x0 is not the physical address"),
        ({"entry": 16 * MIB + 64}, "the entry 0x1000040 is not"),
        ({"entry": 18 * MIB + 4}, "the entry 0x1200004 is not"),
        ({"entry": 0xFFFF_FFFF_8100_0000}, "is not the physical address"),
    ],
)
def test_bad_headers_are_refused(header: dict[str, Any], message: str) -> None:
    with pytest.raises(BootError, match=message):
        plan(elf(**header))


GOOD = {"paddr": 16 * MIB, "data": TEXT}


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"paddr": 18 * MIB, "data": b"", "offset": 1 << 63, "filesz": 8}, "program header 1 has 8 bytes at"),
        ({"paddr": 18 * MIB, "data": b"", "offset": (1 << 64) - 1, "filesz": 2}, "program header 1"),
        ({"paddr": 18 * MIB, "data": DATA, "filesz": (1 << 64) - 1}, "program header 1"),
        ({"paddr": 0, "type": PT_NOTE, "data": b"", "filesz": 1}, "program header 1 has 1 bytes"),
        ({"paddr": 18 * MIB, "data": DATA, "memsz": 3}, "memsz 3 < filesz 4"),
        ({"paddr": MIB - 1, "data": DATA}, "goes to 0xfffff: the first MiB"),
        ({"paddr": 64 * MIB - 3, "data": DATA}, "is not inside RAM"),
        ({"paddr": 64 * MIB - 4, "data": DATA, "memsz": 5}, "is not inside RAM"),
        ({"paddr": (1 << 64) - 1, "data": DATA}, "is not inside RAM"),
        ({"paddr": 18 * MIB, "data": DATA, "memsz": (1 << 64) - 1}, "is not inside RAM"),
        ({"paddr": 16 * MIB + 63, "data": DATA}, "overlaps a segment of the kernel"),
        ({"paddr": 15 * MIB, "data": DATA, "memsz": MIB + 1}, "overlaps a segment of the kernel"),
    ],
)
def test_bad_segments_are_refused(segment: dict[str, Any], message: str) -> None:
    with pytest.raises(BootError, match=message):
        plan(elf([GOOD, segment]))


def test_segments_that_load_nothing_or_are_of_another_type_do_not_count() -> None:
    others = [
        {"paddr": 0, "data": b"", "memsz": 0},
        {"type": 0x6474_E551, "paddr": 0, "data": b"", "filesz": 9**9},
    ]
    kernel = Elf.parse(elf([*others, GOOD]))
    assert [(s.paddr, bytes(s.data), s.memsz) for s in kernel.segments] == [(16 * MIB, TEXT, 64)]


def test_bss_alone_and_neighbouring_segments() -> None:
    result = plan(
        elf([GOOD, {"paddr": 16 * MIB + 64, "data": b"", "memsz": 100}, {"paddr": 4 * GIB, "data": DATA}])
    )
    assert result.zero == ((16 * MIB + 64, 100),)
    assert by_gpa(result)[4 * GIB] == DATA
    assert_sound(result, GUEST)


def test_every_truncation_is_refused() -> None:
    data = elf(pvh=ENTRY)
    for size in range(len(data)):
        with pytest.raises(BootError):
            plan(data[:size])
    plan(data)


def test_the_command_line_is_limited_as_the_kernel_would_cut_it() -> None:
    assert by_gpa(plan(elf(), cmdline="x" * 2047))[0x9_9000] == b"x" * 2047 + b"\0"
    with pytest.raises(ConfigError, match="cmdline has 2048 bytes, this kernel takes at most 2047"):
        plan(elf(), cmdline="x" * 2048)


@pytest.mark.parametrize(("bits", "end"), [(64, 2 * GIB), (32, 0x3800_0000)])
def test_the_initrd_is_where_these_kernels_look_for_it(bits: int, end: int) -> None:
    guest = GuestInfo(((0, 3 * GIB), (4 * GIB, GIB)))
    assert end - 4096 in by_gpa(plan(elf(bits=bits), b"x", guest=guest))


def test_the_initrd_keeps_clear_of_the_kernel() -> None:
    kernel = elf([GOOD, {"paddr": 20 * MIB, "data": DATA, "memsz": 44 * MIB}])
    result = plan(kernel, bytes(3 * MIB))
    assert len(by_gpa(result)[17 * MIB]) == 3 * MIB
    assert_sound(result, GUEST)
    with pytest.raises(BootError, match=r"the initrd .* does not fit"):
        plan(kernel, bytes(15 * MIB + 1))


QUAD = st.sampled_from(
    [
        0,
        1,
        56,
        64,
        120,
        MIB - 1,
        MIB,
        16 * MIB,
        17 * MIB,
        64 * MIB - 4,
        4 * GIB,
        (1 << 63) - 1,
        (1 << 64) - 64,
    ]
) | st.integers(0, (1 << 64) - 1)
SEGMENT = st.fixed_dictionaries(
    {"paddr": QUAD, "data": st.binary(max_size=24)},
    optional={"type": st.sampled_from([0, PT_LOAD, PT_NOTE]), "offset": QUAD, "filesz": QUAD, "memsz": QUAD},
)


@given(st.lists(SEGMENT | st.just(GOOD), max_size=5), QUAD | st.just(16 * MIB), st.booleans())
def test_whatever_the_program_headers_say(
    segments: list[dict[str, Any]], entry: int, with_initrd: bool
) -> None:
    try:
        result = plan(elf(segments, entry=entry), b"x" if with_initrd else None)
    except (BootError, ConfigError):
        return
    assert_sound(result, GUEST)
    assert any(s.gpa <= result.cpu.rip < s.gpa + len(s.data) for s in result.segments)


@given(
    st.sampled_from([32, 64]),
    st.lists(st.tuples(st.integers(4, 300), st.integers(0, 255)), max_size=6),
    st.data(),
)
def test_whatever_the_bytes_are(bits: int, pokes: list[tuple[int, int]], data: Any) -> None:
    kernel = bytearray(elf(bits=bits, pvh=ENTRY))
    for offset, value in pokes:
        kernel[offset % len(kernel)] = value
    cut = data.draw(st.integers(0, len(kernel)) | st.just(len(kernel)))
    try:
        result = plan(bytes(kernel[:cut]), b"initrd")
    except (BootError, ConfigError):
        return
    assert_sound(result, GUEST)


@pytest.mark.parametrize(
    ("wanted", "cmdline", "expected"),
    [
        (False, "quiet", b"quiet"),
        (
            True,
            "quiet -- arg",
            b"virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:5 quiet -- arg",
        ),
        (True, "", b"virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:5"),
    ],
)
def test_virtio_devices_on_the_command_line(wanted: bool, cmdline: str, expected: bytes) -> None:
    guest = GuestInfo(GUEST.ram, virtio_mmio=((0xD000_0000, 0x1000, 16), (0xD000_1000, 0x1000, 5)))
    plan = Linux(KERNEL, cmdline=cmdline, virtio_mmio_cmdline=wanted).plan({KERNEL: elf()}, guest)
    [segment] = [segment for segment in plan.segments if segment.gpa == CMDLINE]
    assert segment.data == expected + b"\0"
