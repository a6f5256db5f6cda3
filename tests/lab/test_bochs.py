from __future__ import annotations

import os
import shutil
from pathlib import Path

import anyio
import pytest

from aiokvm import images, lab
from aiokvm.errors import ConfigError, LabError
from aiokvm.images.bochs import RECIPE
from aiokvm.images.cache import Cache, default_root
from aiokvm.lab import bochs, files
from aiokvm.lab.config import MACHINES, own_archive

pytestmark = pytest.mark.anyio

TOOLS = ("mksquashfs", "grub-mkrescue", "xorriso")
no_tools = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or not bochs.GRUB.is_dir() or not bochs.VGA_BIOS.is_file(),
    reason="lacks the packages of the Intel lab",
)
INTEL = lab.LabConfig(cpu="intel")


def compiled() -> bool:
    record = Cache(default_root()).record("bochs")
    return record is not None and record.source == RECIPE


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for Bochs and what it starts from; return the file that is to become its script.

    The script has its serial ports as ``$console`` and ``$terminal``.
    """
    (tmp_path / "carried").write_text("data")
    for name in ("bochs-bios", "cloud", "busybox", "intel-lab-modules"):
        (tmp_path / name).write_bytes(b"")
    program = tmp_path / "bochs"

    async def pull(name: str, *, progress: object = None) -> Path:
        return tmp_path / name

    def path(name: str) -> Path:
        return tmp_path / name

    def intel_files(workdir: Path, include: object) -> list[Path]:
        return [tmp_path / "carried"]

    monkeypatch.setattr(images, "pull", pull)
    monkeypatch.setattr(images, "path", path)
    monkeypatch.setattr(bochs, "intel_files", intel_files)
    return program


def script(program: Path, text: str) -> None:
    ports = "console=console; terminal=$(sed -n 's/^com2.*dev=//p' config)"
    program.write_text(f"#!/bin/sh\n{ports}\n{text}\n")
    program.chmod(0o755)


@no_tools
async def test_output_begins_after_the_first_zero_and_the_status_comes_by_the_serial_line(fake: Path) -> None:
    script(
        fake,
        r"""
        [ "$*" = "-q -f config" ] && [ -s boot.iso ] && [ -s files ] || exit 9
        [ -e bios ] && [ -e vgabios ] || exit 9
        printf 'Bochs says \n a lot\0out\r\n\377\0'
        sleep 0.1; printf ' more'; echo "status 200" >$terminal; exit 1
        """,
    )
    got = bytearray()
    assert await lab.run(["true"], INTEL, output=got.extend) == 200
    assert got == b"out\r\n\xff\0 more"


@no_tools
async def test_who_takes_the_output_may_wait_or_fail(fake: Path) -> None:
    script(fake, r"printf '\0out'; sleep 1000 & wait")

    async def output(data: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        raise BrokenPipeError(data)

    with pytest.raises(BrokenPipeError, match="out"):
        await lab.run(["true"], INTEL, output=output)


ASK = r"""
ask() {
    echo more >$terminal
    read -r count <$terminal
    [ $count -gt 0 ] && dd bs=1 count=$count status=none <$terminal
}
"""


@no_tools
async def test_without_input_it_is_at_its_end(fake: Path) -> None:
    script(fake, ASK + r"""ask; echo "status $((count + 5))" >$terminal""")
    assert await lab.run(["true"], INTEL, output=lambda _: None) == 5


@no_tools
async def test_input_comes_in_pieces_that_are_asked_for(fake: Path) -> None:
    data = bytes(range(256)) * 10
    script(fake, ASK + r"""printf '\0'; while ask; do :; done; echo "status 3" >$terminal""")
    got, left = bytearray(), bytearray(data)

    async def read_input(size: int) -> bytes:
        await anyio.lowlevel.checkpoint()
        chunk = bytes(left[:size])
        del left[:size]
        return chunk

    assert await lab.run(["true"], INTEL, output=got.extend, read_input=read_input) == 3
    assert got == data


@no_tools
async def test_input_that_does_not_come_keeps_nothing_from_ending(fake: Path) -> None:
    script(fake, r"""echo more >$terminal; sleep 0.1; echo "status 4" >$terminal""")

    async def read_input(_: int) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError

    assert await lab.run(["true"], INTEL, output=lambda _: None, read_input=read_input) == 4


@no_tools
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo abort >&2; exit 3", r"ended with Bochs' status 3 before the command had ended.*:\nabort$"),
        ("seq 30 >$console", r"ended with Bochs' status 0 .*:\n16\n(.*\n)*30$"),
        ("kill -9 $$", r"status -9"),
        (r"printf '\0status 0\n'", r"status 0 before"),
    ],
)
async def test_machine_that_dies(text: str, message: str, fake: Path) -> None:
    script(fake, text)
    with pytest.raises(LabError) as caught:
        await lab.run(["true"], INTEL, output=lambda _: None)
    caught.match(message)


@no_tools
async def test_timeout_ends_it(fake: Path, tmp_path: Path) -> None:
    script(fake, f"echo $$ >{tmp_path}/pid; sleep 1000 & wait")
    with pytest.raises(TimeoutError):
        await lab.run(["true"], lab.LabConfig(cpu="intel", timeout=0.5), output=lambda _: None)
    assert (tmp_path / "pid").read_text().strip() not in os.listdir("/proc")


@no_tools
async def test_what_goes_wrong_while_it_is_made_is_told(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(workdir: Path, include: object) -> list[Path]:
        return [Path("/nonexistent/file")]

    monkeypatch.setattr(bochs, "intel_files", nothing)
    script(fake, "exit 0")
    with pytest.raises(LabError, match="cannot copy the host's files for the Intel lab: mksquashfs failed"):
        await lab.run(["true"], INTEL, output=lambda _: None)


async def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(bochs, "GRUB", Path("/nonexistent"))
    monkeypatch.setattr(bochs, "VGA_BIOS", Path("/nonexistent"))
    monkeypatch.setattr(images, "path", lambda name: None)
    wanted = "apt dpkg build-essential grub-common grub-pc-bin seabios squashfs-tools xorriso"
    assert lab.needed("intel") == wanted.split()
    with pytest.raises(LabError, match=f"apt-get install {wanted}"):
        await lab.run(["true"], INTEL, output=lambda _: None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lab.LabConfig(cpu="intel", cpus=2), "the Intel lab has 1 CPU, not 2"),
        (lab.LabConfig(cpu="intel", network=True), "the Intel lab has no network"),
        (lab.LabConfig(cpu="intel", writable=(Path("/tmp"),)), "the Intel lab cannot write to /tmp"),
        (lab.LabConfig(kvm={"ept": "0 1"}), "ept=0 1 is no parameter that a module can have"),
        (lab.LabConfig(kvm={"e-p": "0"}), "e-p=0 is no parameter"),
    ],
)
async def test_configuration_is_checked_first(config: lab.LabConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await lab.run(["true"], config, output=lambda _: None)


def test_no_other_vendor_is_known() -> None:
    with pytest.raises(ConfigError, match="cpu='via': give 'amd' or 'intel'"):
        lab.LabConfig(cpu="via")  # type: ignore[arg-type]


@pytest.mark.parametrize(("cpu", "module"), [("amd", b"kvm-amd npt=0\n"), ("intel", b"kvm-intel npt=0\n")])
def test_parameters_are_those_of_the_vendors_module(cpu: str, module: bytes) -> None:
    config = lab.LabConfig(cpu=cpu, kvm={"npt": "0"})  # type: ignore[arg-type]
    archive = own_archive(["true"], config)
    assert archive.count(b"npt=0") == 1
    assert module in archive
    assert MACHINES["amd" if cpu == "amd" else "intel"].read_bytes() in archive


def test_files_are_named_once(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    paths = files.intel_files(tmp_path, [inner])
    assert tmp_path in paths
    assert inner not in paths
    assert Path("/usr/bin") in paths
    assert not any(path in other.parents for path in paths for other in paths)


@pytest.mark.parametrize(("path", "message"), [("/", "name directories"), ("/nonexistent", "is not there")])
def test_files_that_cannot_be_had_are_refused(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        files.intel_files(tmp_path, [Path(path)])


@no_tools
async def test_files_are_where_they_are_on_the_host(tmp_path: Path) -> None:
    kept = tmp_path / "with, a space"
    kept.mkdir()
    (kept / "a.py").write_text("a")
    (kept / "lib.a").write_text("left out")
    await files.write_squashfs(tmp_path / "image", [kept])
    listing = await anyio.run_process(["unsquashfs", "-lc", str(tmp_path / "image")])
    assert listing.stdout.decode().split("squashfs-root/")[-1].strip() == str(kept / "a.py").lstrip("/")
    assert "lib.a" not in listing.stdout.decode()


@pytest.mark.lab
@pytest.mark.skipif("LAB" in os.environ or not compiled(), reason="in the lab, or Bochs is not compiled yet")
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_command_runs_in_a_machine_with_kvm_intel(tmp_path: Path) -> None:
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "file").write_text("here\n")
    script = (
        'printf "\\r\\n\\377\\0"; echo hi >&2; test -c /dev/kvm && test "$LAB$x" = "1it\'s" || exit 9; pwd; '
    )
    script += "read -r line; echo $line; read -r line; cat file /sys/module/kvm_intel/parameters/ple_gap; "
    script += "sleep 1000 & exit 200"
    got = bytearray()
    config = lab.LabConfig(
        cpu="intel",
        memory_bytes=1 << 30,
        timeout=600,
        workdir=tmp_path / "carried",
        env={"x": "it's"},
        kvm={"ple_gap": "64"},
    )
    left = [b"word", b"s\n"]

    async def read_input(_: int) -> bytes:
        return left.pop(0) if left else b""

    status = await lab.run(["sh", "-c", script], config, output=got.extend, read_input=read_input)
    assert got == b"\r\n\xff\0hi\n" + os.fsencode(tmp_path) + b"/carried\nwords\nhere\n64\n"
    assert status == 200
