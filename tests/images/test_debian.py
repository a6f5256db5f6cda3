from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import ImageError
from aiokvm.images import debian
from aiokvm.images.debian import (
    Package,
    Source,
    kernel_dependency,
    mirror_lines,
    parse_package,
    parse_source,
    pick,
    verify,
)

if TYPE_CHECKING:
    from pathlib import Path

STANZA = """\
Package: linux-image-cloud-amd64
Version: 6.1.9-1
Depends: linux-image-6.1.0-5-cloud-amd64 (= 6.1.9-1), other (>= 1)
Description: Linux
 Size: 7 is not a field here
Size: 1504
SHA256: 00BE

Package: next
Version: 1
"""


def package(depends: str = "", sha256: str = "") -> Package:
    return Package("p", "1", 1, sha256, depends)


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_first_stanza_is_parsed() -> None:
    depends = "linux-image-6.1.0-5-cloud-amd64 (= 6.1.9-1), other (>= 1)"
    assert parse_package(STANZA) == Package("linux-image-cloud-amd64", "6.1.9-1", 1504, "00be", depends)


@pytest.mark.parametrize("without", ["Package", "Version", "Size", "SHA256"])
def test_stanza_without_a_field_is_refused(without: str) -> None:
    with pytest.raises(ImageError, match=without):
        parse_package(STANZA.split("\n\n")[0].replace(f"{without}:", "X:"))


@given(st.text())
def test_any_text_is_a_package_or_a_typed_error(text: str) -> None:
    with pytest.raises(ImageError):
        parse_package(text)


@pytest.mark.parametrize(
    ("depends", "kernel"),
    [
        ("linux-image-6.1.0-5-686-pae (= 6.1.9-1)", ("linux-image-6.1.0-5-686-pae", "6.1.9-1")),
        (
            "linux-base (>= 4), linux-image-6.12+deb13-amd64 (= 6.12~1)",
            ("linux-image-6.12+deb13-amd64", "6.12~1"),
        ),
    ],
)
def test_kernel_of_a_meta_package(depends: str, kernel: tuple[str, str]) -> None:
    assert kernel_dependency(package(depends)) == kernel


@pytest.mark.parametrize(
    "depends", ["", "libc6 (>= 2)", "linux-image-6.1", "old-linux-image-6 (= 1)", "linux-image-6 (= )"]
)
def test_meta_package_without_kernel_is_refused(depends: str) -> None:
    with pytest.raises(ImageError, match="p 1 depends on no kernel"):
        kernel_dependency(package(depends))


def test_package_is_verified(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="left 0 packages instead of one"):
        verify(tmp_path, package())
    (tmp_path / "p.deb").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert verify(tmp_path, package(sha256=digest)) == tmp_path / "p.deb"
    with pytest.raises(ImageError, match=f"SHA-256 is {digest}, the signed index says 1234"):
        verify(tmp_path, package(sha256="1234"))


def test_pick_takes_regular_files_that_are_wanted() -> None:
    data = tar({"./boot/vmlinuz-6": b"kernel", "./boot/config": b"c", "lib/x": b"x"})
    assert pick(io.BytesIO(data), lambda name: name in ("boot/vmlinuz-6", "lib/x")) == {
        "boot/vmlinuz-6": b"kernel",
        "lib/x": b"x",
    }


def test_file_that_claims_to_be_huge_is_refused() -> None:
    member = tarfile.TarInfo("boot/vmlinuz-6")
    member.size = 1 << 40
    with pytest.raises(ImageError, match="boot/vmlinuz-6 in the package claims 1099511627776 bytes"):
        pick(io.BytesIO(member.tobuf() + bytes(1024)), lambda _: True)


@given(st.data())
def test_damaged_tar_is_a_typed_error_or_less_than_there_was(data: st.DataObject) -> None:
    content = bytearray(tar({"a": b"1" * 600, "b": b"2" * 600}))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 3 * 512))] = data.draw(st.integers(0, 255))
    try:
        found = pick(io.BytesIO(content), lambda _: True)
    except ImageError:
        return
    assert sum(map(len, found.values())) <= len(content)


def test_sources_are_those_of_the_suite_and_its_updates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = """
bookworm http://mirror/debian/ stable main
bookworm http://mirror/debian/ stable contrib
bookworm-updates http://mirror/debian/ bookworm-updates main
bookworm-security http://mirror/security/ bookworm-security main
trixie http://mirror/debian/ trixie main
bookworm-backports http://mirror/debian/ bookworm-backports main
"""
    monkeypatch.setattr(debian, "_KEYRING", tmp_path / "keys")
    expected = [
        "deb http://mirror/debian/ stable main",
        "deb http://mirror/debian/ bookworm-updates main",
        "deb http://mirror/security/ bookworm-security main",
    ]
    assert debian.source_lines(text, "bookworm") == expected
    (tmp_path / "keys").touch()
    assert debian.source_lines(text, "trixie") == [
        f"deb [signed-by={tmp_path}/keys] http://mirror/debian/ trixie main"
    ]
    assert debian.source_lines("bookworm-updates http://x bookworm-updates main\n", "bookworm") == []
    assert debian.source_lines("", "sid") == []


SOURCE = """\
Package: bochs
Binary: bochs, bochsbios
Version: 3.0+dfsg-1
Files:
 aa 2554 bochs_3.0+dfsg-1.dsc
 bb 38 bochs_3.0+dfsg.orig.tar.xz
Checksums-Sha256:
 01 2554 bochs_3.0+dfsg-1.dsc
 0A 38 bochs_3.0+dfsg.orig.tar.xz
 03 30 bochs_3.0+dfsg-1.debian.tar.xz
Homepage: x

Package: bochs
Version: 2
"""


def test_source_is_parsed() -> None:
    assert parse_source(SOURCE) == Source("bochs", "3.0+dfsg-1", "bochs_3.0+dfsg.orig.tar.xz", 38, "0a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        SOURCE.replace("Checksums-Sha256", "Checksums-Sha1"),
        SOURCE.replace("Version", "X"),
        SOURCE.replace(".orig.tar.xz", ".tar.xz"),
        SOURCE.replace("bochs_3.0+dfsg.orig", "../bochs_3.0+dfsg.orig"),
        SOURCE.replace("0A 38", "0A many"),
        SOURCE.replace(" 03 30 bochs_3.0+dfsg-1.debian.tar.xz", " 03 30 bochs_3.0.orig.tar.xz"),
    ],
)
def test_source_without_its_one_tarball_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="does not name one upstream tarball"):
        parse_source(text)


@given(st.text())
def test_any_text_is_a_source_or_a_typed_error(text: str) -> None:
    with pytest.raises(ImageError):
        parse_source(text)


def test_a_suites_sources_are_looked_for_on_the_mirror_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = """
bookworm-security http://mirror/security/ bookworm-security main
bookworm http://mirror/debian/ stable contrib
bookworm http://mirror/debian/ stable main
"""
    monkeypatch.setattr(debian, "_KEYRING", tmp_path / "keys")
    assert mirror_lines(text, "trixie") == ["deb-src http://mirror/debian/ trixie main"]
    (tmp_path / "keys").touch()
    assert mirror_lines(text, "trixie") == [
        f"deb-src [signed-by={tmp_path}/keys] http://mirror/debian/ trixie main"
    ]
    assert mirror_lines("bookworm-updates http://x bookworm-updates main\n", "trixie") == []
