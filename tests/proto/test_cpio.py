from __future__ import annotations

import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.proto import cpio


def parse(data: bytes) -> list[tuple[str, int, bytes]]:
    """Read archives the way Linux does: aligned headers, zeros between archives skipped."""
    members, at = [], 0
    while at < len(data):
        if data[at] == 0:
            at += 1
            continue
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        field = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_end = at + 110 + field[11]
        name = data[at + 110 : name_end - 1].decode()
        assert data[name_end - 1] == 0
        start = (name_end + 3) & ~3
        assert start + field[6] <= len(data)
        if name != "TRAILER!!!":
            members.append((name, field[1], data[start : start + field[6]]))
        at = (start + field[6] + 3) & ~3
    return members


def test_one_file_is_written_byte_for_byte() -> None:
    assert cpio.archive([cpio.file("ab", b"hello", 0o755)]) == (
        b"070701" b"00000001" b"000081ED" b"00000000" b"00000000" b"00000001" b"00000000" b"00000005"
        b"00000000" b"00000000" b"00000000" b"00000000" b"00000003" b"00000000" b"ab\0" b"\0\0\0"
        b"hello" b"\0\0\0"
        b"070701" b"00000000" b"00000000" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
        b"00000000" b"00000000" b"00000000" b"00000000" b"0000000B" b"00000000" b"TRAILER!!!\0" b"\0\0\0"
    )  # fmt: skip


def test_kinds_of_entries() -> None:
    data = cpio.archive([cpio.directory("d"), cpio.file("d/f", b"x", 0o600), cpio.symlink("d/l", "f")])
    assert parse(data) == [
        ("d", stat.S_IFDIR | 0o755, b""),
        ("d/f", stat.S_IFREG | 0o600, b"x"),
        ("d/l", stat.S_IFLNK | 0o777, b"f"),
    ]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda name: name != cpio.TRAILER
)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=40))), st.lists(st.tuples(NAMES, st.binary(max_size=40))))
def test_joined_archives_read_back(first: list[tuple[str, bytes]], second: list[tuple[str, bytes]]) -> None:
    parts = [cpio.archive(cpio.file(name, data) for name, data in part) for part in (first, second)]
    assert all(len(part) % 4 == 0 for part in parts)
    expected = [(name, stat.S_IFREG | 0o644, data) for name, data in first + second]
    assert parse(cpio.join(*parts)) == expected


def test_join_aligns_what_follows_an_odd_length() -> None:
    assert cpio.join(b"\x1f\x8bodd", b"next", b"n") == b"\x1f\x8bodd\0\0\0nextn"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the cpio program")
def test_gnu_cpio_lists_it() -> None:
    data = cpio.archive([cpio.directory("bin"), cpio.file("bin/busybox", b"\x7fELF" * 300, 0o755)])
    listing = subprocess.run(["cpio", "-t", "--quiet"], input=data, capture_output=True, check=True)
    assert listing.stdout == b"bin\nbin/busybox\n"
    assert listing.stderr == b""
