from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import click
import pytest
from click.testing import CliRunner

from aiokvm import ConfigError, block, images, lab
from aiokvm.block import DiskOption
from aiokvm.cli import cli, disks, inlab, run
from aiokvm.cli.console import Console, Output
from aiokvm.images import DebianDisk, Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Aiokvm, Kernel

HERE = ("run", "--lab", "never", "-m", "64M")
EXIT_42 = "b02a e6f4 f4"


def options(
    *given: DiskOption, kernel: str | None = None, append: str = "", command: str = ""
) -> run.Options:
    return run.Options(
        kernel=kernel,
        initrd=None,
        append=append,
        cpus=1,
        memory=64 << 20,
        name="",
        as_json=False,
        timeout=None,
        lab="always",
        log=None,
        trace=None,
        command=(command,) if command else (),
        disks=given,
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("/a,b.img,ro", block.Raw),
        ("/a.img", block.Raw),
        ("/a.qcow2", block.Image),
        ("/a.qcow2,format=raw", block.Raw),
        ("/a,ro,ro,format=vmdk,ro", None),
        ("nbd://localhost/x,ro", block.Nbd),
    ],
)
def test_a_disk_reads_as_it_is_written(text: str, kind: type[block.BlockBackend] | None) -> None:
    if kind is None:
        with pytest.raises(click.BadParameter, match="ro is there twice"):
            disks.parse(text)
        return
    option = disks.parse(text)
    assert option.readonly == text.endswith(",ro")
    assert disks.parse(disks.text(option)) == option
    backend = disks.backend(option)
    assert type(backend) is kind
    # Of an NBD export the server has a say.
    assert kind is block.Nbd or backend.readonly == option.readonly


def test_a_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert disks.parse("x.img").path == str(tmp_path / "x.img")


@pytest.mark.parametrize(
    ("given", "append", "cmdline"),
    [
        ((), "debug", "debug"),
        ((DiskOption("/a"), DiskOption("/b", readonly=True)), "", "root=/dev/vda rw"),
        ((DiskOption("/a", readonly=True),), "debug", "root=/dev/vda ro debug"),
        ((DiskOption("/a"),), "root=/dev/vdb ro", "root=/dev/vdb ro"),
    ],
)
def test_the_first_disk_is_the_root(given: tuple[DiskOption, ...], append: str, cmdline: str) -> None:
    assert options(*given, append=append).cmdline == f"{run.CMDLINE} {cmdline}"


def test_kernel_and_initramfs_beside_the_disk_are_taken(tmp_path: Path) -> None:
    built = DebianDisk.beside(tmp_path / "x.img")
    disk = DiskOption(str(built.disk))
    built.kernel.touch()
    assert disks.built([disk]) is None
    built.initrd.touch()
    assert disks.built([disk, DiskOption("/other")]) == built
    assert disks.built([DiskOption("/other"), disk]) is None
    assert disks.built([DiskOption(str(built.disk), "qcow2")]) is None
    # It is one of ours, which can be told a command; a kernel of one's own comes with its own.
    run.check_command(options(disk, command="ls"))
    with pytest.raises(click.UsageError, match="cannot be told a command"):
        run.check_command(options(disk, kernel=str(built.kernel), command="ls"))


@pytest.mark.kvm
def test_a_machine_has_its_disks(kernel: Kernel, aiokvm: Aiokvm, tmp_path: Path) -> None:
    disk = tmp_path / "x.img"
    disk.write_bytes(bytes(1 << 20))
    path = kernel(EXIT_42)
    for given in (str(disk), f"{disk},ro"):
        result = aiokvm(*HERE, "--kernel", path, "--disk", given)
        # Where ring 0 is emulated a kernel is warned of.
        others = [line for line in result.stderr.splitlines() if b"KVM emulates ring 0" not in line]
        assert (result.returncode, others) == (42, [])
    result = aiokvm(*HERE, "--kernel", path, "--disk", disk, "--disk", disk)
    assert result.returncode == 125
    assert str(disk).encode() in result.stderr
    assert b"Traceback" not in result.stderr
    result = aiokvm(*HERE, "--kernel", path, "--disk", tmp_path / "none")
    assert result.returncode == 125
    assert result.stderr == f"aiokvm: there is no disk {tmp_path / 'none'}\n".encode()


def test_usage_errors(aiokvm: Aiokvm) -> None:
    result = aiokvm("run", "--disk", "x,format=ext4")
    assert result.returncode == 2
    assert b"format 'ext4' is not one of raw, qcow2" in result.stderr


def test_the_lab_can_write_where_the_disks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[lab.LabConfig] = []
    commands: list[list[str]] = []

    async def stand_in(command: list[str], config: lab.LabConfig, **_: object) -> int:
        configs.append(config)
        commands.append(command)
        return 0

    monkeypatch.setattr(lab, "run", stand_in)
    (tmp_path / "read").mkdir()
    writable, readonly = tmp_path / "x.img", tmp_path / "read/y.qcow2"
    writable.touch()
    readonly.touch()
    given = options(DiskOption(str(writable)), DiskOption(str(readonly), "qcow2", readonly=True))

    async def main() -> None:
        output = Output(1)
        try:
            machine = inlab.InLab(given, tmp_path, None, run.Report())
            await machine.run(Console(0, output, output, None, None))
        finally:
            output.close()

    anyio.run(main)
    assert tmp_path in configs[0].writable
    assert readonly.parent not in configs[0].writable
    words = commands[0]
    found = [words[index + 1] for index, word in enumerate(words) if word == "--disk"]
    assert found == [f"{writable},format=raw", f"{readonly},ro,format=qcow2"]
    with pytest.raises(ConfigError, match="the lab has no network"):
        disks.lab_directories([DiskOption("nbd://localhost/x", "nbd")])


def test_what_cannot_be_had_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(images, "pull", never)
    monkeypatch.setattr(lab, "run", never)
    disk = tmp_path / "x.img"
    disk.touch()
    for argv, message in (
        (("--disk", tmp_path / "none"), f"there is no disk {tmp_path / 'none'}"),
        (("--disk", disk, "--disk", f"{tmp_path / 'none.qcow2'},ro"), "there is no disk"),
        (("--disk", tmp_path), f"the disk {tmp_path} is neither a file nor a block device"),
        (("--disk", disk / "x"), f"the disk {disk / 'x'}: Not a directory"),
        (("--disk", "nbd://localhost/x"), "the lab has no network: nbd://localhost/x"),
        (("--net", "tap:tap0"), "--net tap:tap0: the lab has no way to this machine's devices"),
    ):
        result = CliRunner().invoke(cli, ["run", "--lab", "always", *map(str, argv)])
        assert result.exit_code == 125
        assert result.stderr.startswith(f"aiokvm: {message}")
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv: util-linux has it")
def test_a_disk_that_this_user_may_not_use(tmp_path: Path) -> None:
    disk = tmp_path / "x.img"
    argv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]  # root may do anything
    argv += [sys.executable, "-m", "aiokvm", "run", "--disk", str(disk)]
    for mode, message in (
        (0o400, f"may not be written to by this user: {disk},ro only reads it"),
        (0, "may not be read by this user"),
    ):
        disk.touch()
        disk.chmod(mode)
        result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert (result.returncode, result.stderr) == (125, f"aiokvm: the disk {disk} {message}\n")


def test_build_debian_prints_the_path_and_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    async def build(*, progress: Callable[[Progress], None], **rest: object) -> DebianDisk:
        given.update(rest)
        for stage in ("index", "install", "install"):
            progress(Progress("debian-x", stage))
        return DebianDisk.beside(tmp_path / "debian-x")

    monkeypatch.setattr(images, "build_debian", build)
    argv = ["images", "build", "debian", "--packages", "fio,gdb python3", "--size", "2G", "--refresh"]
    result = CliRunner().invoke(cli, [*argv, "--output", str(tmp_path / "o.img")])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'debian-x'}\n")
    assert given == {
        "suite": "bookworm",
        "packages": ["fio", "gdb", "python3"],
        "size_bytes": 2 << 30,
        "files": {},
        "authorized_keys": [],
        "enable": (),
        "output": tmp_path / "o.img",
        "refresh": True,
    }
    assert result.stderr.splitlines() == [
        "aiokvm: debian-x: asking Debian for its package list",
        "aiokvm: debian-x: installing packages",
    ]
