from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import ImageError
from aiokvm.images import rootfs

if TYPE_CHECKING:
    from pathlib import Path

SIZE_BYTES = 64 << 20


def archive(*names: str, links: tuple[tuple[str, str], ...] = ()) -> io.BytesIO:
    """A tar archive: a name with a slash at its end is a directory, others hold their name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.mode = 1_800_000_000, 0o755
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("lib", ["./lib", "./usr/lib"])
def test_overlay_has_all_modules_where_the_link_to_usr_stays(lib: str) -> None:
    names = (f"{lib}/modules/6.1-x/kernel/a.ko", f"{lib}/modules/6.1-x/modules.order")
    package = archive(f"{lib}/", f"{lib}/modules/", f"{lib}/modules/6.1-x/", "./boot/vmlinuz-6.1-x", *names)
    overlay = io.BytesIO()
    assert rootfs.write_overlay(package, overlay) == "6.1-x"
    overlay.seek(0)
    with tarfile.open(fileobj=overlay) as tar:
        found = tar.getnames()
        kernel = [name for name in found if "modules/" in name]
        assert kernel == [
            *("usr/lib/modules/6.1-x", "usr/lib/modules/6.1-x/kernel/a.ko"),
            "usr/lib/modules/6.1-x/modules.order",
        ]
        assert not {"lib", "usr", "usr/lib", "boot/vmlinuz-6.1-x"} & set(found)
        module = tar.extractfile("usr/lib/modules/6.1-x/kernel/a.ko")
        assert module is not None
        assert module.read() == names[0].encode()
        assert tar.getmember("usr/local/sbin/aiokvm-getty").mode == 0o755
        assert tar.getmember("etc/systemd/system/fstrim.timer").linkname == "/dev/null"


def test_overlay_has_the_files_of_the_recipe(tmp_path: Path) -> None:
    overlay = io.BytesIO()
    files = [("/etc/motd", b"hi", 0o644), ("/root/.ssh/authorized_keys", b"key\n", 0o600)]
    rootfs.write_overlay(archive("./lib/modules/6/a"), overlay, files)
    overlay.seek(0)
    with tarfile.open(fileobj=overlay) as tar:
        for path, data, mode in files:
            member = tar.getmember(path[1:])
            assert (member.mode, member.uid, member.gid) == (mode, 0, 0)
            content = tar.extractfile(member)
            assert content is not None
            assert content.read() == data


def test_hooks_leave_nothing_that_is_one_machine_s_own(tmp_path: Path) -> None:
    for name in (
        "etc/ssh/ssh_host_rsa_key",
        "etc/ssh/ssh_host_rsa_key.pub",
        "etc/ssl/private/ssl-cert-snakeoil.key",
        "etc/aliases.db",
        "etc/passwd-",
        "var/log/dpkg.log",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "etc/ssh/sshd_config").touch()
    (tmp_path / "etc/passwd").touch()
    (hook,) = (hook for hook in rootfs.hooks("overlay", "6", ["a.service"]) if "ssh_host" in hook)
    subprocess.run(["sh", "-c", hook, "sh", str(tmp_path)], check=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"etc/ssh/sshd_config", "etc/passwd"}


def test_units_are_enabled() -> None:
    hooks = rootfs.hooks("overlay", "6", ["a.service", "b@c.timer"])
    assert [hook for hook in hooks if "enable" in hook] == [
        'chroot "$1" systemctl enable --quiet -- a.service',
        'chroot "$1" systemctl enable --quiet -- b@c.timer',
    ]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (archive("./boot/vmlinuz-6.1-x"), "holds no modules"),
        (archive("./lib/modules/"), "holds no modules"),
        (io.BytesIO(b"x" * 2000), "archive is damaged"),
    ],
)
def test_package_that_is_no_kernel_is_refused(package: io.BytesIO, message: str) -> None:
    package.seek(0)
    with pytest.raises(ImageError, match=message):
        rootfs.write_overlay(package, io.BytesIO())


def make(image: Path, root: io.BytesIO, size_bytes: int = SIZE_BYTES) -> subprocess.CompletedProcess[bytes]:
    if shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip("needs e2fsprogs")
    environment = {"SOURCE_DATE_EPOCH": str(rootfs.EPOCH), "E2FSPROGS_FAKE_TIME": str(rootfs.EPOCH)}
    with image.open("w+b") as stdout:
        return subprocess.run(
            rootfs.image_command(size_bytes),
            input=root.getvalue(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment, "TMPDIR": str(image.parent)},
            check=False,
        )


def debugfs(image: Path, request: str) -> str:
    argv = ["debugfs", "-R", request, str(image)]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "TZ": "UTC", "LC_ALL": "C"}
    return subprocess.run(argv, env=environment, capture_output=True, check=True, text=True).stdout


def test_image_is_sparse_deterministic_and_whole(tmp_path: Path) -> None:
    root = archive("./", "./etc/", "./etc/a b", "./dev/", "./dev/null", links=(("./bin", "usr/bin"),))
    first, second = tmp_path / "first", tmp_path / "second"
    assert make(first, root).returncode == 0
    assert make(second, root).returncode == 0
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    assert first.stat().st_size == SIZE_BYTES
    assert first.stat().st_blocks * 512 < SIZE_BYTES // 4
    assert debugfs(first, 'cat "/etc/a b"') == "./etc/a b"
    assert 'Fast link dest: "usr/bin"' in debugfs(first, "stat /bin")
    # The file is from 2027; the image's own times are not of today, whenever that is.
    times = debugfs(first, 'stat "/etc/a b"')
    assert times.count("Tue Nov 14 22:13:20 2023") == 3
    names = {line.split()[-1] for line in debugfs(first, "ls -l /dev").splitlines() if line.strip()}
    assert names == {".", ".."}
    assert subprocess.run(["/sbin/e2fsck", "-fn", first], capture_output=True, check=False).returncode == 0


def test_image_that_is_too_small_fails(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("./large")
        member.size = SIZE_BYTES
        tar.addfile(member, io.BytesIO(bytes(range(256)) * (SIZE_BYTES // 256)))
    result = make(tmp_path / "image", stream)
    assert result.returncode != 0
    assert b"Could not allocate block" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


@pytest.mark.parametrize(
    ("cmdline", "options"),
    [("root=/dev/vda aiokvm.autologin aiokvm.tty=24x80", "--autologin root "), ("root=/dev/vda", "")],
)
def test_login_asks_unless_told_otherwise(cmdline: str, options: str, tmp_path: Path) -> None:
    overlay = io.BytesIO()
    rootfs.write_overlay(archive("./lib/modules/6/a"), overlay)
    overlay.seek(0)
    with tarfile.open(fileobj=overlay) as tar:
        member = tar.extractfile("usr/local/sbin/aiokvm-getty")
        assert member is not None
        script = member.read().decode()
    (tmp_path / "cmdline").write_text(f"{cmdline}\n")
    script = script.replace("/proc/cmdline", str(tmp_path / "cmdline")).replace("/sbin/agetty", "echo")
    script = script.replace("exec echo", "echo")
    output = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"{options}--keep-baud")
