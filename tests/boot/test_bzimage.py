from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot import BootPlan, GuestInfo, Linux, Segment
from aiokvm.boot.bzimage import BzImage
from aiokvm.errors import BootError, ConfigError

MIB, GIB = 1 << 20, 1 << 30
GUEST = GuestInfo(((0, 64 * MIB),), rsdp=0xE_0000)
KERNEL, INITRD = Path("vmlinuz"), Path("initrd")
CODE = bytes(range(256)) * 16

# name: (offset, format, value)
FIELDS: dict[str, tuple[int, str, int]] = {
    "setup_sects": (0x1F1, "B", 1),
    "syssize": (0x1F4, "I", len(CODE) // 16),
    "boot_flag": (0x1FE, "H", 0xAA55),
    "jump": (0x201, "B", 0x6A),
    "version": (0x206, "H", 0x020F),
    "loadflags": (0x211, "B", 0x81),
    "code32_start": (0x214, "I", 0x10_0000),
    "initrd_addr_max": (0x22C, "I", 0x7FFF_FFFF),
    "kernel_alignment": (0x230, "I", 2 * MIB),
    "relocatable_kernel": (0x234, "B", 1),
    "xloadflags": (0x236, "H", 1),
    "cmdline_size": (0x238, "I", 2047),
    "payload_offset": (0x248, "I", 16),
    "payload_length": (0x24C, "I", 4000),
    "pref_address": (0x258, "Q", 16 * MIB),
    "init_size": (0x260, "I", 8 * MIB),
}


def bzimage(code: bytes = CODE, /, **changes: int) -> bytes:
    sectors = changes.get("setup_sects", 1) or 4
    data = bytearray((sectors + 1) * 512)
    data[0x202:0x206] = b"HdrS"
    for name, (offset, fmt, value) in FIELDS.items():
        struct.pack_into("<" + fmt, data, offset, changes.get(name, value))
    return bytes(data) + code


def plan(kernel: bytes, initrd: bytes | None = None, cmdline: str = "", guest: GuestInfo = GUEST) -> BootPlan:
    linux = Linux(KERNEL, None if initrd is None else INITRD, cmdline)
    return linux.plan({KERNEL: kernel, INITRD: initrd or b""}, guest)


def by_gpa(plan: BootPlan) -> dict[int, bytes]:
    return {segment.gpa: bytes(segment.data) for segment in plan.segments}


def assert_sound(plan: BootPlan, guest: GuestInfo) -> None:
    ranges = [*((s.gpa, s.gpa + len(s.data)) for s in plan.segments), *((g, g + n) for g, n in plan.zero)]
    assert all(any(a <= start and end <= a + n for a, n in guest.ram) for start, end in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(sorted(ranges)))


def test_64_bit_entry() -> None:
    result = plan(bzimage(), b"initrd", "console=ttyS0")
    segments = by_gpa(result)
    assert segments[16 * MIB] == CODE
    assert segments[64 * MIB - 4096] == b"initrd"
    assert segments[0x9_9000] == b"console=ttyS0\0"
    page = segments[0x9_1000]
    assert page[0x1F1:0x1F5] == bzimage()[0x1F1:0x1F5]
    assert page[0x22C:0x26C] == bzimage()[0x22C:0x26C]
    assert not any(page[0x26C:0x2D0])
    assert struct.unpack_from("<III", page, 0x214) == (16 * MIB, 64 * MIB - 4096, 6)
    assert struct.unpack_from("<Q", page, 0x70) == (0xE_0000,)
    cpu = result.cpu
    assert (cpu.rip, cpu.rsi, cpu.rbx, cpu.cs.l, cpu.efer) == (16 * MIB + 0x200, 0x9_1000, 0, 1, 0x500)
    assert set(segments) == {16 * MIB, 64 * MIB - 4096, 0x9_9000, 0x9_1000, 0x9_0000, 0x9_3000}
    assert result.zero == ()
    assert_sound(result, GUEST)


@pytest.mark.parametrize("changes", [{"xloadflags": 0}, {"version": 0x020B}])
def test_32_bit_entry_where_there_is_no_64_bit_one(changes: dict[str, int]) -> None:
    result = plan(bzimage(**changes))
    cpu = result.cpu
    assert (cpu.rip, cpu.rsi, cpu.rbx) == (16 * MIB, 0x9_1000, 0)
    assert (cpu.cs.l, cpu.cs.db, cpu.cr0, cpu.efer) == (0, 1, 0x11, 0)
    assert 0x9_3000 not in by_gpa(result)
    assert_sound(result, GUEST)


@pytest.mark.parametrize(
    ("changes", "load", "span"),
    [
        ({}, 16 * MIB, (16 * MIB, 8 * MIB)),
        ({"kernel_alignment": 32 * MIB}, 32 * MIB, (32 * MIB, 8 * MIB)),
        ({"pref_address": 16 * MIB + 1}, 18 * MIB, (18 * MIB, 8 * MIB)),
        ({"init_size": 16}, 16 * MIB, (16 * MIB, len(CODE))),
        ({"relocatable_kernel": 0}, MIB, (MIB, 23 * MIB)),
        ({"relocatable_kernel": 0, "pref_address": MIB}, MIB, (MIB, 8 * MIB)),
        ({"version": 0x0209, "relocatable_kernel": 0}, MIB, (MIB, len(CODE))),
        ({"version": 0x0209}, 2 * MIB, (2 * MIB, len(CODE))),
    ],
)
def test_load_address_and_the_range_that_the_kernel_needs(
    changes: dict[str, int], load: int, span: tuple[int, int]
) -> None:
    image = BzImage.parse(bzimage(**changes))
    assert (image.load, image.span) == (load, span)
    result = plan(bzimage(**changes))
    assert by_gpa(result)[load] == CODE
    assert result.cpu.rip == image.entry == load + (0x200 if image.is_64bit else 0)


@pytest.mark.parametrize(
    ("version", "jump"), [(0x0206, 0x3A), (0x0207, 0x3A), (0x0208, 0x4E), (0x020A, 0x62)]
)
def test_the_shortest_header_of_each_version(version: int, jump: int) -> None:
    plan(bzimage(version=version, jump=jump))
    with pytest.raises(BootError, match="the setup header ends at"):
        plan(bzimage(version=version, jump=jump - 1))


def test_setup_sects_0_means_4() -> None:
    image = BzImage.parse(bzimage(setup_sects=0))
    assert bytes(image.code) == CODE
    assert image.setup[0] == 0


def test_what_follows_the_kernel_in_the_file_is_left_out() -> None:
    assert bytes(BzImage.parse(bzimage(CODE + b"a signature")).code) == CODE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boot_flag": 0}, "boot_flag is 0x0000, not 0xaa55"),
        ({"version": 0x0205}, "boot protocol 2.05, need 2.06"),
        ({"loadflags": 0}, "zImage"),
        ({"jump": 0}, "the setup header ends at 0x202"),
        ({"jump": 0xFF}, "the setup header ends at 0x301"),
        ({"syssize": 0}, "syssize is 0"),
        ({"syssize": 257}, r"truncated: setup_sects and syssize say 1024 \+ 4112 bytes, the file has 5120"),
        ({"syssize": 0xFFFF_FFFF}, "truncated"),
        ({"payload_offset": 97}, "the payload .4000 bytes at 97. goes beyond the kernel's 4096 bytes"),
        ({"payload_offset": 0xFFFF_FFFF, "payload_length": 2}, "goes beyond"),
        ({"kernel_alignment": 0}, "kernel_alignment 0x0 is not a power of two"),
        ({"kernel_alignment": 0x30_0000}, "kernel_alignment 0x300000 is not a power of two"),
        ({"pref_address": 0, "relocatable_kernel": 0}, "wants to run at 0x0 with init_size 0x800000"),
        ({"pref_address": (1 << 64) - 1}, "not between 1 MiB and 4 GiB"),
        ({"init_size": 0xFFFF_FFFF}, "not between 1 MiB and 4 GiB"),
        ({"init_size": 48 * MIB + 1}, r"the kernel \(0x1000000 to 0x4000001\) is not inside RAM"),
    ],
)
def test_lying_headers_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(BootError, match=message):
        plan(bzimage(**changes))


def test_setup_sects_beyond_the_file() -> None:
    data = bytearray(bzimage())
    data[0x1F1] = 255
    with pytest.raises(BootError, match="truncated"):
        plan(bytes(data))


def test_code_too_short_for_the_64_bit_entry() -> None:
    changes = {"syssize": 32, "payload_length": 0}
    with pytest.raises(BootError, match="512 bytes of code end before the 64-bit entry"):
        plan(bzimage(CODE[:512], **changes))
    assert plan(bzimage(CODE[:512], xloadflags=0, **changes)).cpu.rip == 16 * MIB


def test_every_truncation_is_refused() -> None:
    data = bzimage()
    for size in [*range(0x300), *range(0x300, len(data) - 16, 101), len(data) - 16]:
        with pytest.raises(BootError):
            plan(data[:size])
    plan(data)


def test_the_last_paragraph_may_be_short() -> None:
    data = bzimage()
    for missing in range(16):
        assert by_gpa(plan(data[: len(data) - missing]))[16 * MIB] == CODE[: len(CODE) - missing] + bytes(
            missing
        )
    with pytest.raises(BootError, match="truncated"):
        plan(data[:-16])
    # What is compressed in it has to be there.
    with pytest.raises(BootError, match="the payload"):
        plan(bzimage(payload_offset=0, payload_length=len(CODE))[:-1])


@pytest.mark.parametrize(("size", "limit"), [(2047, 2047), (100, 100), (1 << 20, 4095), (0, 0)])
def test_the_command_line_is_limited_by_the_kernel_and_by_the_page(size: int, limit: int) -> None:
    kernel = bzimage(cmdline_size=size)
    assert by_gpa(plan(kernel, cmdline="x" * limit))[0x9_9000] == b"x" * limit + b"\0"
    with pytest.raises(
        ConfigError, match=f"cmdline has {limit + 1} bytes, this kernel takes at most {limit}"
    ):
        plan(kernel, cmdline="x" * (limit + 1))


def test_the_limit_counts_bytes_not_characters() -> None:
    with pytest.raises(ConfigError, match="cmdline has 12 bytes, this kernel takes at most 10"):
        plan(bzimage(cmdline_size=10), cmdline="\u00e9" * 6)


@pytest.mark.parametrize(
    ("changes", "size", "gpa"),
    [
        ({}, 40 * MIB, 24 * MIB),
        ({}, 4097, 64 * MIB - 8192),
        ({"initrd_addr_max": 50 * MIB - 1}, 4096, 50 * MIB - 4096),
        ({"initrd_addr_max": 50 * MIB - 2}, 4096, 50 * MIB - 8192),
        # Where there is no room above the kernel, there may be below.
        ({"init_size": 47 * MIB}, 2 * MIB, 14 * MIB),
        ({"initrd_addr_max": 20 * MIB}, MIB, 15 * MIB),
        ({"init_size": 48 * MIB}, 15 * MIB, MIB),
    ],
)
def test_the_initrd_is_as_high_as_may_be(changes: dict[str, int], size: int, gpa: int) -> None:
    result = plan(bzimage(**changes), bytes(size))
    segments = by_gpa(result)
    assert len(segments[gpa]) == size
    assert struct.unpack_from("<II", segments[0x9_1000], 0x218) == (gpa, size)
    assert_sound(result, GUEST)


def test_the_initrd_stays_in_low_ram() -> None:
    guest = GuestInfo(((0, 64 * MIB), (4 * GIB, 64 * MIB)))
    assert 64 * MIB - 4096 in by_gpa(plan(bzimage(initrd_addr_max=0xFFFF_FFFF), b"x", guest=guest))


@pytest.mark.parametrize("changes", [{}, {"initrd_addr_max": 0}, {"initrd_addr_max": MIB}])
def test_an_initrd_that_does_not_fit(changes: dict[str, int]) -> None:
    with pytest.raises(BootError, match=r"the initrd .* does not fit into RAM"):
        plan(bzimage(**changes), bytes(40 * MIB + 1))


def test_an_empty_initrd_is_refused() -> None:
    with pytest.raises(BootError, match="the initrd initrd is empty"):
        plan(bzimage(), b"")


def values(fmt: str) -> st.SearchStrategy[int]:
    top = (1 << 8 * struct.calcsize("<" + fmt)) - 1
    near = [
        0,
        1,
        15,
        16,
        4096,
        MIB,
        16 * MIB,
        48 * MIB,
        63 * MIB,
        64 * MIB,
        GIB,
        4 * GIB - 1,
        4 * GIB,
        top - 4096,
        top,
    ]
    return st.sampled_from([value for value in near if 0 <= value <= top]) | st.integers(0, top)


@given(
    st.fixed_dictionaries({}, optional={name: values(fmt) for name, (_, fmt, _) in FIELDS.items()}),
    st.sampled_from([None, 1, 4097, 5 * MIB]),
    st.sampled_from(
        [GUEST, GuestInfo(((0, 3 * GIB), (4 * GIB, GIB))), GuestInfo(((0, 2 * MIB),)), GuestInfo(())]
    ),
)
def test_whatever_the_header_says(changes: dict[str, int], initrd: int | None, guest: GuestInfo) -> None:
    try:
        result = plan(bzimage(**changes), None if initrd is None else bytes(initrd), "quiet", guest)
    except (BootError, ConfigError):
        return
    assert_sound(result, guest)
    kernel = result.segments[0]
    assert kernel.gpa <= result.cpu.rip < kernel.gpa + len(kernel.data)


@given(st.lists(st.tuples(st.integers(0x1F1, 0x290), st.integers(0, 255)), max_size=8), st.data())
def test_whatever_the_bytes_are(pokes: list[tuple[int, int]], data: Any) -> None:
    kernel = bytearray(bzimage())
    for offset, value in pokes:
        kernel[offset] = value
    cut = data.draw(st.integers(0, len(kernel)) | st.just(len(kernel)))
    try:
        result = plan(bytes(kernel[:cut]), b"initrd")
    except (BootError, ConfigError):
        return
    assert_sound(result, GUEST)
    assert all(isinstance(segment, Segment) for segment in result.segments)
