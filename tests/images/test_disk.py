"""mmdebstrap is a script of a few lines here; apt, dpkg and mke2fs are themselves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import images
from aiokvm.errors import ConfigError, ImageError
from aiokvm.images import disk, rootfs
from aiokvm.images.cache import Cache
from aiokvm.images.initramfs import base_archive, modules_archive
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.images.conftest import Repository

one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA"
MMDEBSTRAP = """#!/bin/sh
echo "$@" >"$HOME/arguments"
for word; do
    case $word in */root.tar) target=$word ;; esac
done
echo "I: running apt-get update..."
echo "I: installing essential packages..." >&2
[ -e "$HOME/missing" ] && { echo "E: Unable to locate package nosuchpkg"; echo "E: apt failed"; exit 25; }
[ -e "$HOME/complaint" ] && { cat "$HOME/complaint"; exit 25; }
[ -e "$HOME/fail" ] && { echo "E: it cannot" >&2; exit 25; }
mkdir "$TMPDIR/root"
echo content >"$TMPDIR/root/file"
touch -d @1 "$TMPDIR/root/file" "$TMPDIR/root"
exec tar -C "$TMPDIR/root" -cf "$target" .
"""


@pytest.fixture
def home(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What builds need. mmdebstrap leaves its arguments in ``arguments``, and fails if there is ``fail``."""
    if os.geteuid():
        pytest.skip("ordinary users build in a namespace, which the script of this test has not")
    if shutil.which("mke2fs") is None:
        pytest.skip("needs e2fsprogs")
    repository.publish()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mmdebstrap").write_text(MMDEBSTRAP)
    (programs / "mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def cached() -> set[str]:
    root = Path(os.environ["AIOKVM_CACHE"])
    assert not list(root.glob(".work-*"))
    return {path.name for path in root.glob("images/debian-*")}


async def build(
    *,
    packages: tuple[str, ...] = (),
    output: Path | None = None,
    progress: Callable[[images.Progress], None] | None = None,
    refresh: bool = False,
) -> images.DebianDisk:
    return await images.build_debian(
        packages=packages, size_bytes=64 << 20, output=output, progress=progress, refresh=refresh
    )


@pytest.mark.parametrize(
    ("suite", "packages", "size_bytes", "message"),
    [
        ("", (), 1 << 30, "suite='' is no name of a suite"),
        ("--help", (), 1 << 30, "is no name of a suite"),
        ("bookworm", ("a,b",), 1 << 30, "'a,b' is no name of a package"),
        ("bookworm", ("-x",), 1 << 30, "is no name of a package"),
        ("bookworm", (), 1 << 20, "at least 67108864"),
        ("bookworm", (), (1 << 30) + 512, "multiple of 4096"),
    ],
)
def test_what_is_no_recipe(suite: str, packages: tuple[str, ...], size_bytes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        images.find_debian(suite=suite, packages=packages, size_bytes=size_bytes)


def test_name_tells_what_goes_in() -> None:
    name = disk.Recipe("bookworm", ("fio", "gdb"), 1 << 30).name
    assert name.startswith("debian-bookworm-")
    assert disk.Recipe("bookworm", ("gdb", "fio", "gdb"), 1 << 30).name == name
    others = [("trixie", ("fio", "gdb"), 1 << 30), ("bookworm", ("fio",), 1 << 30)]
    others.append(("bookworm", ("fio", "gdb"), 2 << 30))
    assert name not in {disk.Recipe(*other).name for other in others}


def test_what_is_put_in_is_checked(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for arguments, message in (
        ({"files": {"etc/motd": "x"}}, "'etc/motd' is no path of a file in the guest"),
        ({"files": {"/etc/../motd": "x"}}, "is no path of a file"),
        ({"files": {"/etc/": "x"}}, "is no path of a file"),
        ({"files": {"/etc/motd": 5}}, "give a dict of str to str or bytes or Path"),
        ({"files": {5: "x"}}, "give a dict of str to str or bytes or Path"),
        ({"files": {"/etc/\ud800": "x"}}, "is no path of a file"),
        ({"files": {"/etc/motd": "\ud800"}}, "cannot be encoded as UTF-8"),
        ({"files": {"/etc/motd": Path("a\0b")}}, "no file has the name"),
        ({"files": {"/etc/motd": tmp_path}}, "cannot read .*: Is a directory"),
        ({"files": {"/etc/motd": Path("/dev/zero")}}, "^files.*motd'.: /dev/zero is not a regular file"),
        ({"files": {"/etc/motd": fifo}}, "fifo is not a regular file"),
        ({"files": {"/etc/motd": tmp_path / "nope"}}, "cannot read .*nope: No such file"),
        ({"enable": ["a b"]}, "'a b' is no name of a unit"),
        ({"enable": "ssh.service"}, "enable='ssh.service': give a list of str"),
        ({"packages": "fio"}, "packages='fio': give a list of str"),
        ({"authorized_keys": [5]}, "give a list of str"),
        ({"authorized_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n"]}, "is no public key"),
        ({"authorized_keys": [f"# mine\n{KEY}\nmistake"]}, "is no public key"),
        ({"authorized_keys": [f"{KEY} \ud800"]}, "is no public key"),
    ):
        with pytest.raises(ConfigError, match=message):
            images.find_debian(**arguments)


def test_what_is_put_in_belongs_to_the_name(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)

    def recipe(files: dict[str, str | bytes | Path], keys: list[str], enable: list[str]) -> disk.Recipe:
        return disk.recipe("bookworm", [], 1 << 30, files, keys, enable)

    plain = recipe({}, [], [])
    assert plain.name == disk.Recipe("bookworm", (), 1 << 30).name
    made = recipe(
        {"/a": "text", "/b": b"#!/bin/sh", "/c": program},
        [f"{KEY}\n", f'from="10.0.2.2" {KEY} me'],
        ["ssh.service"],
    )
    assert made.packages == ("openssh-server",)
    assert made.enable == ("ssh.service",)
    assert made.files == (
        ("/a", b"text", 0o644),
        ("/b", b"#!/bin/sh", 0o755),
        ("/c", b"\x7fELF", 0o755),
        ("/root/.ssh/authorized_keys", f'{KEY}\nfrom="10.0.2.2" {KEY} me\n'.encode(), 0o600),
    )
    others = [recipe({"/a": "text"}, [], []), recipe({"/a": "other"}, [], []), recipe({}, [], ["a.service"])]
    assert len({one.name for one in (plain, made, *others)}) == 5


@pytest.mark.anyio
@one_loop
async def test_the_kernel_is_fetched_once(home: Path) -> None:
    (home / "missing").touch()
    told: list[images.Progress] = []
    with pytest.raises(ImageError, match=r"^bookworm has no package nosuchpkg$"):
        await build(packages=("nosuchpkg",), progress=told.append)
    assert "download" in {progress.stage for progress in told}
    (home / "missing").unlink()
    told.clear()
    await build(progress=told.append)
    # Nor is it fetched again for another recipe.
    await build(packages=("fio",), progress=told.append)
    assert "download" not in {progress.stage for progress in told}


@pytest.mark.anyio
@one_loop
async def test_build_makes_a_disk_with_what_boots_it(home: Path) -> None:
    assert images.find_debian(size_bytes=64 << 20) is None
    told: list[images.Progress] = []
    built = await build(packages=("fio",), progress=told.append)
    assert cached() == {f"{file.name}{end}" for file in built.files for end in ("", ".json")}
    assert built.disk.stat().st_size == 64 << 20
    assert built.disk.stat().st_mode & 0o777 == 0o444
    assert built.kernel.read_bytes() == b"kernel"
    modules = modules_archive("6.1-cloud-amd64", {"button.ko": b"button"})
    assert built.initrd.read_bytes() == cpio.join(base_archive(b"busybox", "amd64"), modules)
    stages = list(dict.fromkeys(progress.stage for progress in told if progress.name == built.disk.name))
    assert stages == ["index", "install", "build"]
    arguments = (home / "arguments").read_text().split()
    assert "--mode=root" in arguments
    assert f"--include={','.join((*rootfs.PACKAGES, 'fio'))}" in arguments
    assert images.find_debian(packages=("fio",), size_bytes=64 << 20) == built
    told.clear()
    assert await build(packages=("fio",), progress=told.append) == built
    assert told == []


@pytest.mark.anyio
@one_loop
@pytest.mark.parametrize("part", ["disk", "kernel", "initrd"])
async def test_a_disk_that_was_written_to_or_has_lost_something_is_built_again(home: Path, part: str) -> None:
    built = await build()
    file: Path = getattr(built, part)
    before = file.read_bytes()  # noqa: ASYNC240
    file.chmod(0o644)  # noqa: ASYNC240
    file.write_bytes(bytes(4096) + before[4096:] + b"x")  # noqa: ASYNC240
    (home / "arguments").unlink()
    assert await build() == built
    assert file.read_bytes() == before  # noqa: ASYNC240
    assert (home / "arguments").exists()


@pytest.mark.usefixtures("home")
@pytest.mark.anyio
@one_loop
async def test_parts_of_two_builds_are_no_disk() -> None:
    built = await build()
    cache = Cache(Path(os.environ["AIOKVM_CACHE"]))
    source = disk.Recipe("bookworm", (), 64 << 20).source
    cache.store(built.kernel.name, b"newer", package="linux", version="6.2", source=source)
    assert images.find_debian(size_bytes=64 << 20) is None
    assert await build() == built
    assert built.kernel.read_bytes() == b"kernel"


@pytest.mark.usefixtures("home")
@pytest.mark.anyio
@one_loop
async def test_refresh_takes_the_newer_kernel(repository: Repository) -> None:
    await build()
    repository.add_kernel("6.10", b"newer kernel")
    repository.publish()
    assert (await build()).kernel.read_bytes() == b"kernel"
    built = await build(refresh=True)
    assert built.kernel.read_bytes() == b"newer kernel"


@pytest.mark.anyio
@one_loop
async def test_output_is_a_copy_of_ones_own(home: Path) -> None:
    built = await build(output=home / "my.img")
    assert built == images.DebianDisk(home / "my.img", home / "my.img.vmlinuz", home / "my.img.initrd")
    found = images.find_debian(size_bytes=64 << 20)
    assert found is not None
    assert built.disk.read_bytes() == found.disk.read_bytes()
    assert built.disk.stat().st_mode & 0o777 == 0o644
    assert built.disk.stat().st_blocks * 512 < 32 << 20
    (home / "taken.vmlinuz").mkdir()
    told: list[images.Progress] = []
    for output, message in (("nowhere/my.img", "nowhere is no directory"), ("taken", "taken.* is a dir")):
        # Before minutes go into a build.
        with pytest.raises(ImageError, match=message):
            await build(packages=("fio",), output=home / output, progress=told.append)
    assert told == []
    assert not list(home.glob(".*.tmp"))  # noqa: ASYNC240


@pytest.mark.anyio
@one_loop
@pytest.mark.parametrize(
    ("complaint", "message"),
    [
        ("Failed to enable unit, unit nope.service does not exist.", "^there is no unit nope.service"),
        ("E: The repository 'http://h/debian nope Release' does not have a Release file.", "no suite nope,"),
    ],
)
async def test_an_argument_that_makes_mmdebstrap_fail_is_named(
    complaint: str, message: str, home: Path
) -> None:
    (home / "complaint").write_text(f"{complaint}\nE: setup failed\nI: a\nI: b\nI: c\nI: d\n")
    with pytest.raises(ImageError, match=message) as raised:
        await build()
    assert "\n" not in str(raised.value)


@pytest.mark.anyio
@one_loop
async def test_mmdebstrap_that_fails_is_quoted(home: Path) -> None:
    (home / "fail").touch()
    with pytest.raises(ImageError, match=r"(?s)mmdebstrap failed with status 25: .*E: it cannot$"):
        await build()
    assert cached() == set()


@pytest.mark.usefixtures("home")
@pytest.mark.anyio
@one_loop
async def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(rootfs, "write_overlay", full)
        with pytest.raises(ImageError, match=r"cannot build debian-bookworm-.*: No space left on device"):
            await build()
    assert cached() == set()


@pytest.mark.usefixtures("home")
@pytest.mark.anyio
@pytest.mark.parametrize("stage", ["index", "install", "build"])
async def test_a_cancelled_build_leaves_nothing(stage: str) -> None:
    with anyio.CancelScope() as scope:

        def progress(progress: images.Progress) -> None:
            if progress.name.startswith("debian-") and progress.stage == stage:
                scope.cancel()

        await build(progress=progress)
    assert scope.cancelled_caught
    assert cached() == set()
    assert (await build()).disk.exists()


def test_host_without_a_program_or_a_privilege(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def which(program: str, path: str = "") -> str | None:
        return None if program == missing else f"/bin/{program}"

    monkeypatch.setattr(shutil, "which", which)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    missing = "mke2fs"
    with pytest.raises(ImageError, match="mke2fs is missing: install the Debian package e2fsprogs"):
        disk.check_host()
    missing = "newuidmap"
    with pytest.raises(ImageError, match="newuidmap is missing: install the Debian package uidmap"):
        disk.check_host()
    missing = ""
    ranges = tmp_path / "subuid"
    ranges.write_text("somebody:100000:65536\n")
    monkeypatch.setattr(disk, "RANGES", (ranges, ranges))
    monkeypatch.setenv("LOGNAME", "me")
    with pytest.raises(ImageError, match=r"me has no range of user ids .* usermod --add-subuids"):
        disk.check_host()
    for line in ("me:100000:65536\n", "1000:100000:65536\n"):
        ranges.write_text(line)
        assert disk.check_host() == "unshare"
