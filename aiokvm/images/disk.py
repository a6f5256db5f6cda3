"""A Debian root file system as a disk, with the kernel and the initramfs that boot it."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import anyio.to_thread

from aiokvm.arguments import checked, checked_init
from aiokvm.errors import ConfigError, ImageError
from aiokvm.images import debian, modules, rootfs
from aiokvm.images.cache import sha256_file
from aiokvm.images.initramfs import base_archive, modules_archive
from aiokvm.images.process import PACKAGES, child, failed, run
from aiokvm.images.progress import Progress
from aiokvm.process import temporary_folder
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aiokvm.images.cache import Cache, Record

KERNEL = "linux-image-cloud-amd64"
MIN_SIZE_BYTES = 64 << 20
RANGES = (Path("/etc/subuid"), Path("/etc/subgid"))
_ALIGNMENT = 4096  # ext4's block

# mmdebstrap's messages, and what they begin.
_STAGES: tuple[tuple[bytes, Literal["index", "download", "unpack", "install", "build"]], ...] = (
    (b"I: running apt-get update", "index"),
    (b"I: downloading packages", "download"),
    (b"I: extracting archives", "unpack"),
    (b"I: installing", "install"),
    (b"I: creating tarball", "build"),
)
_COMPLAINT_LINES = 5
# Complaints whose cause is an argument, and what to say of them.
_CAUSES = (
    (
        re.compile(r"Failed to enable unit, unit (\S+) does not exist"),
        "there is no unit {} to enable: a package has to have it, or a file put at /etc/systemd/system",
    ),
    (
        re.compile(r"The repository '(\S+) (\S+) Release' does not have a Release file"),
        "{} has no suite {}, or cannot be reached",
    ),
)
# As sshd has them, options before the type included.
_PUBLIC_KEY = re.compile(r"(?:^|\s)(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+\s+AAAA[A-Za-z0-9+/]+=*(?:\s|$)")
# An unshared mmdebstrap has to remove its directory itself: the files are not this user's.
_GRACE_S = 20.0


@checked_init
@dataclass(frozen=True)
class DebianDisk:
    """A Debian root file system: paths of the raw ext4 ``disk`` and of the ``kernel`` and ``initrd`` for it.

    Boot with ``root=/dev/vda rw`` (or ``ro``) on the kernel's command line. ``root`` has no password;
    ``aiokvm.autologin`` on the command line logs it in. ``/lib/modules`` has all of the kernel's modules.
    """

    disk: Path
    kernel: Path
    initrd: Path

    @classmethod
    @checked
    def beside(cls, disk: Path) -> DebianDisk:
        """Return the paths that belong to a disk."""
        return cls(disk, disk.with_name(f"{disk.name}.vmlinuz"), disk.with_name(f"{disk.name}.initrd"))

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """All three, the disk last."""
        return self.kernel, self.initrd, self.disk


@dataclass(frozen=True)
class Recipe:
    """What goes into a disk. Raises ``ConfigError`` for what cannot."""

    suite: str
    packages: tuple[str, ...]
    size_bytes: int
    files: tuple[tuple[str, bytes, int], ...] = ()
    enable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path, _, _ in self.files:
            parts = path.split("/")
            if parts[0] or not all(parts[1:]) or {".", ".."} & set(parts) or not _is_bytes(path):
                raise ConfigError(
                    f"{path!r} is no path of a file in the guest: it is absolute, such as /etc/motd"
                )
        for unit in self.enable:
            if not re.fullmatch(r"[A-Za-z0-9:_.@\\-]+", unit):
                raise ConfigError(f"{unit!r} is no name of a unit of systemd's, such as nginx.service")
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", self.suite):
            raise ConfigError(f"suite={self.suite!r} is no name of a suite of Debian's, such as bookworm")
        for package in self.packages:
            if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):
                raise ConfigError(f"{package!r} is no name of a package: it has a-z, 0-9, and inside + - .")
        if self.size_bytes < MIN_SIZE_BYTES or self.size_bytes % _ALIGNMENT:
            raise ConfigError(
                f"size_bytes={self.size_bytes}: it has to be at least {MIN_SIZE_BYTES} (64M) "
                f"and a multiple of {_ALIGNMENT}"
            )

    @property
    def name(self) -> str:
        """The disk's name in the cache."""
        content = json.dumps([self.suite, sorted(set(self.packages)), self.size_bytes])
        if self.files or self.enable:
            files = [(path, hashlib.sha256(data).hexdigest(), mode) for path, data, mode in self.files]
            content += json.dumps([sorted(files), sorted(set(self.enable))])
        return f"debian-{self.suite}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def source(self) -> str:
        """A digest of what the code adds: a disk of an older one is built anew."""
        code = Path(rootfs.__file__).read_bytes() + base_archive(b"", "amd64")
        return hashlib.sha256(code + " ".join(modules.GUEST_MODULES).encode()).hexdigest()


def recipe(
    suite: str,
    packages: Sequence[str],
    size_bytes: int,
    files: Mapping[str, str | bytes | Path],
    authorized_keys: Sequence[str],
    enable: Sequence[str],
) -> Recipe:
    """Return the recipe of `build_debian`'s arguments. Raises ``ConfigError``."""
    for name, words in (("packages", packages), ("authorized_keys", authorized_keys), ("enable", enable)):
        if isinstance(words, (str, bytes)) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{name}={words!r}: give a list of str")
    found = [(path, *_file(path, content)) for path, content in files.items()]
    if authorized_keys:
        lines = [line.strip() for key in authorized_keys for line in key.splitlines()]
        # The line is not shown: it may be of a private key.
        if not all(_is_key(line) for line in lines if line and not line.startswith("#")):
            raise ConfigError(
                "authorized_keys has a line that is no public key, such as a file whose name ends in .pub has"
            )
        keys = "".join(f"{line}\n" for line in lines)
        found.append(("/root/.ssh/authorized_keys", os.fsencode(keys), 0o600))
        packages = (*packages, rootfs.SSH_SERVER)
    return Recipe(suite, tuple(packages), size_bytes, tuple(found), tuple(enable))


def _is_key(line: str) -> bool:
    return _is_bytes(line) and _PUBLIC_KEY.search(line) is not None


def _is_bytes(text: str) -> bool:
    """Whether it stands for bytes, as names of files do, be they UTF-8 or not; there is no NUL."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _file(path: str, content: str | bytes | Path) -> tuple[bytes, int]:
    """Return content and mode of a file for the guest."""
    if isinstance(content, str):
        try:
            content = content.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"files[{path!r}] cannot be encoded as UTF-8: {error.reason}") from None
    if isinstance(content, bytes):
        return content, 0o755 if content.startswith(b"#!") else 0o644
    try:
        # One that is no regular file may have no end, or nobody who writes it.
        with open(content, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read() if stat.S_ISREG(mode) else None
    except OSError as error:
        raise ConfigError(f"files[{path!r}]: cannot read {content}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"files[{path!r}]: no file has the name {str(content)!r}: {error}") from None
    if data is None:
        raise ConfigError(f"files[{path!r}]: {content} is not a regular file")
    return data, 0o755 if mode & 0o100 or data.startswith(b"#!") else 0o644


def cached(cache: Cache, recipe: Recipe) -> DebianDisk | None:
    """Return the disk in the cache, not verified."""
    return _found(cache, recipe, cache.record)


def verified(cache: Cache, recipe: Recipe) -> DebianDisk | None:
    """Return the disk in the cache if it is what was put there, by the code of today."""
    return _found(cache, recipe, cache.verified)


def _found(cache: Cache, recipe: Recipe, record: Callable[[str], Record | None]) -> DebianDisk | None:
    disk = DebianDisk.beside(cache.path(recipe.name))
    records = [record(file.name) for file in disk.files]
    first = records[0]
    if first is None or first.source != recipe.source:
        return None
    # A kernel and modules of different versions are what a build leaves that was killed between them.
    same = all(other and (other.source, other.version) == (first.source, first.version) for other in records)
    return disk if same else None


async def build(
    cache: Cache, recipe: Recipe, busybox: Path, progress: Callable[[Progress], None], *, refresh: bool
) -> DebianDisk:
    """Build a disk into the cache, whose lock the caller holds. Raises ``ImageError``."""
    mode = check_host()
    if shutil.disk_usage(cache.root).free < MIN_SIZE_BYTES:
        raise ImageError(f"{cache.root} has no room for a disk image: set AIOKVM_CACHE to a larger place")
    try:
        with cache.work() as folder:
            return await _Build(cache, recipe, mode, folder, progress).run(busybox, refresh=refresh)
    except OSError as error:
        raise ImageError(f"cannot build {recipe.name} in {cache.root}: {error.strerror}") from error


def check_output(output: Path) -> None:
    """Raise ``ImageError`` if nothing can be copied there, before minutes go into a build."""
    folder = output.parent
    if not folder.is_dir():
        raise ImageError(f"cannot write {output}: {folder} is no directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ImageError(f"cannot write {output}: {folder} is not for this user to write to")
    for file in DebianDisk.beside(output).files:
        if file.is_dir():
            raise ImageError(f"cannot write {output}: {file} is a directory")


async def copy(disk: DebianDisk, output: Path) -> DebianDisk:
    """Copy a disk and what is beside it, sparse. Raises ``ImageError``, and then leaves what was there."""
    target = DebianDisk.beside(output)
    try:
        async with temporary_folder(output.parent) as folder:
            fresh = [folder.path / file.name for file in target.files]
            for source, copied in zip(disk.files, fresh, strict=True):
                await run(["cp", "--sparse=always", "--reflink=auto", str(source), str(copied)])
                copied.chmod(0o644)
            for copied, file in zip(fresh, target.files, strict=True):
                copied.replace(file)
    except OSError as error:
        raise ImageError(f"cannot write {output}: {error.strerror}") from error
    return target


def check_host() -> Literal["root", "unshare"]:
    """Return mmdebstrap's mode for this user; ``ImageError`` if a program or a privilege is missing."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    for program in ("mmdebstrap", "mke2fs", *(() if os.geteuid() == 0 else ("newuidmap",))):
        if shutil.which(program, path=path) is None:
            package = PACKAGES.get(program, program)
            raise ImageError(f"the program {program} is missing: install the Debian package {package}")
    if os.geteuid() == 0:
        return "root"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody has named it
        user = str(os.geteuid())
    if not all(_has_range(file, user, os.geteuid()) for file in RANGES):
        raise ImageError(
            f"{user} has no range of user ids for the owners of Debian's files: build as root, "
            f"or let root run usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
        )
    return "unshare"


def _has_range(file: Path, user: str, uid: int) -> bool:
    try:
        lines = file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(line.split(":")[0] in (user, str(uid)) for line in lines)


def _is(file: Path, sha256: str) -> bool:
    try:
        return sha256_file(file) == sha256
    except OSError:
        return False


class _Build:
    """One build, in a folder that is removed after it."""

    def __init__(
        self, cache: Cache, recipe: Recipe, mode: str, folder: Path, progress: Callable[[Progress], None]
    ) -> None:
        self._cache = cache
        self._recipe = recipe
        self._mode = mode
        self._folder = folder
        self._progress = progress
        # As root temporary files go where they are removed if this process is killed; others cannot let a
        # user of a namespace into their directories.
        self._env = {"SOURCE_DATE_EPOCH": str(rootfs.EPOCH), "E2FSPROGS_FAKE_TIME": str(rootfs.EPOCH)}
        if mode == "root":
            self._env["TMPDIR"] = str(folder)

    async def run(self, busybox: Path, *, refresh: bool) -> DebianDisk:
        apt = debian.Apt(self._cache.root, "amd64")
        self._tell("index")
        await apt.update(force=refresh)
        package = await apt.show(*debian.kernel_dependency(await apt.show(KERNEL)))
        sources = await apt.sources(self._recipe.suite)
        if sources and self._recipe.packages:
            self._check(await apt.missing(self._recipe.suite, self._recipe.packages))
        release = await self._kernel(apt, package, busybox)
        await self._debootstrap(sources, release)
        self._tell("build")
        await self._image()
        return await anyio.to_thread.run_sync(self._store, package)

    def _tell(self, stage: Literal["index", "download", "unpack", "install", "build"]) -> None:
        self._progress(Progress(self._recipe.name, stage))

    async def _kernel(self, apt: debian.Apt, package: debian.Package, busybox: Path) -> str:
        """Fetch the kernel; write it, its initramfs and its modules; return its release."""

        def progress(done_bytes: int) -> None:
            self._progress(Progress(KERNEL, "download", done_bytes, package.size))

        # Kept until there is a newer one: it is the same for every recipe, and for what failed after this.
        kept = self._cache.root / "kernel.deb"
        if not await anyio.to_thread.run_sync(_is, kept, package.sha256):
            (await apt.download(package, self._folder, progress)).replace(kept)
        deb = self._folder / "kernel.deb"
        os.link(kept, deb)
        self._progress(Progress(KERNEL, "unpack"))
        with (self._folder / "kernel.tar").open("w+b") as tar:
            await debian.unpack_tar(deb, tar)
            return await anyio.to_thread.run_sync(self._unpack_kernel, tar, busybox)

    def _unpack_kernel(self, tar: IO[bytes], busybox: Path) -> str:
        with (self._folder / "overlay.tar").open("wb") as overlay:
            release = rootfs.write_overlay(tar, overlay, self._recipe.files)
        tar.seek(0)
        kernel = f"boot/vmlinuz-{release}"
        files = debian.pick(tar, lambda name: name == kernel or modules.wanted(name))
        if kernel not in files:
            raise ImageError(f"the kernel's package holds no {kernel}")
        picked = modules_archive(release, modules.pick(files, modules.GUEST_MODULES))
        initrd = cpio.join(base_archive(busybox.read_bytes(), "amd64"), picked)
        (self._folder / "kernel").write_bytes(files[kernel])
        (self._folder / "initrd").write_bytes(initrd)
        return release

    async def _debootstrap(self, sources: Sequence[str], release: str) -> None:
        """Have mmdebstrap write root.tar."""
        options = [f"--dpkgopt={option}" for option in rootfs.DPKG_OPTIONS]
        overlay = shlex.quote(str(self._folder / "overlay.tar"))
        options += [
            f"--customize-hook={hook}" for hook in rootfs.hooks(overlay, release, self._recipe.enable)
        ]
        packages = ",".join((*rootfs.PACKAGES, *self._recipe.packages))
        argv = ["mmdebstrap", f"--mode={self._mode}", "--variant=essential", "--architectures=amd64"]
        argv += ["--format=tar", f"--include={packages}", *options]
        argv += [self._recipe.suite, str(self._folder / "root.tar"), *sources]
        missing: list[str] = []
        causes: list[str] = []
        last: deque[bytes] = deque(maxlen=_COMPLAINT_LINES)
        async with child(argv, stderr=subprocess.STDOUT, env=self._env, grace_s=_GRACE_S) as process:
            assert process.stdout is not None
            rest = b""
            async for chunk in process.stdout:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._line(line)
                    text = line.decode(errors="replace")
                    missing += debian.MISSING.findall(text)
                    causes += [
                        words.format(*match.groups())
                        for cause, words in _CAUSES
                        if (match := cause.search(text))
                    ]
                    last.append(line)
            status = await process.wait()
        if status:
            self._check(missing)
            if causes:
                raise ImageError(causes[0])
            raise failed("mmdebstrap", status, b"\n".join([*last, rest]))

    def _check(self, missing: list[str]) -> None:
        if missing:
            raise ImageError(f"{self._recipe.suite} has no package {', '.join(dict.fromkeys(missing))}")

    def _line(self, line: bytes) -> None:
        for start, stage in _STAGES:
            if line.startswith(start):
                self._tell(stage)

    async def _image(self) -> None:
        command = rootfs.image_command(self._recipe.size_bytes)
        if self._mode == "unshare":
            command = ["mmdebstrap", "--unshare-helper", *command]
        disk = self._folder / "disk"
        disk.touch()
        # Only who has the descriptor gets at it, in a directory of this user's alone; the command is another.
        disk.chmod(0o666)
        with (self._folder / "root.tar").open("rb") as tar, disk.open("r+b") as image:
            await run(command, stdin=tar, stdout=image, env=self._env, grace_s=_GRACE_S)
        disk.chmod(0o444)

    def _store(self, package: debian.Package) -> DebianDisk:
        target = DebianDisk.beside(self._cache.path(self._recipe.name))
        for name, file in zip(("kernel", "initrd", "disk"), target.files, strict=True):
            self._cache.adopt(
                file.name,
                self._folder / name,
                package=package.name,
                version=package.version,
                source=self._recipe.source,
            )
        return target
