"""The kernels and the initramfs that aiokvm knows how to get: from Debian's packages, verified and cached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio.to_thread

from aiokvm.arguments import checked
from aiokvm.errors import ImageError
from aiokvm.images import bochs, debian, disk, modules
from aiokvm.images.cache import Cache, default_root
from aiokvm.images.disk import DebianDisk
from aiokvm.images.initramfs import base_archive, command_archive, modules_archive
from aiokvm.images.modules import GUEST_MODULES, INTEL_LAB_MODULES, LAB_MODULES
from aiokvm.images.progress import Progress
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from aiokvm.images.cache import Record

__all__ = [
    "INTEL_LAB_MODULES",
    "LAB_MODULES",
    "DebianDisk",
    "Image",
    "Progress",
    "build_debian",
    "catalogue",
    "command_archive",
    "find",
    "find_debian",
    "path",
    "pull",
]


@dataclass(frozen=True)
class Image:
    """Something that can be pulled.

    ``package`` is the Debian package it comes from, ``architecture`` Debian's name of what it runs on,
    ``parts`` the names of the images that it is built from. ``initramfs`` names the image that holds the
    modules of this kernel, and is empty where there is none.
    """

    name: str
    summary: str
    package: str
    architecture: Literal["amd64", "i386"]
    kind: Literal["kernel", "elf", "initramfs", "busybox", "modules", "bios", "emulator", "memtest"]
    parts: tuple[str, ...] = ()
    initramfs: str = ""


_CLOUD, _GENERIC = "linux-image-cloud-amd64", "linux-image-amd64"
_PAE, _686 = "linux-image-686-pae", "linux-image-686"
_BUSYBOX = "busybox-static"

_IMAGES = {
    image.name: image
    for image in (
        Image("cloud", "cloud kernel, bzImage", _CLOUD, "amd64", "kernel", (), "initramfs"),
        Image("cloud-elf", "cloud kernel, ELF", _CLOUD, "amd64", "elf", ("cloud",), "initramfs"),
        Image("generic", "generic kernel, bzImage", _GENERIC, "amd64", "kernel", (), "initramfs-generic"),
        Image(
            "generic-elf", "generic kernel, ELF", _GENERIC, "amd64", "elf", ("generic",), "initramfs-generic"
        ),
        Image(
            "i386-pae", "32-bit kernel with PAE, bzImage", _PAE, "i386", "kernel", (), "initramfs-i386-pae"
        ),
        Image("i386", "32-bit kernel without PAE, bzImage", _686, "i386", "kernel", (), "initramfs-i386"),
        Image(
            "initramfs", "busybox, for cloud", _BUSYBOX, "amd64", "initramfs", ("busybox", "cloud-modules")
        ),
        Image(
            "initramfs-generic",
            "busybox, for generic",
            _BUSYBOX,
            "amd64",
            "initramfs",
            ("busybox", "generic-modules"),
        ),
        Image(
            "initramfs-i386-pae",
            "busybox, for i386-pae",
            _BUSYBOX,
            "i386",
            "initramfs",
            ("busybox-i386", "i386-pae-modules"),
        ),
        Image(
            "initramfs-i386",
            "busybox, for i386",
            _BUSYBOX,
            "i386",
            "initramfs",
            ("busybox-i386", "i386-modules"),
        ),
        Image("busybox", "static busybox", _BUSYBOX, "amd64", "busybox"),
        Image("busybox-i386", "static busybox", _BUSYBOX, "i386", "busybox"),
        Image("cloud-modules", "modules", _CLOUD, "amd64", "modules", ("cloud",)),
        Image("generic-modules", "modules", _GENERIC, "amd64", "modules", ("generic",)),
        Image("i386-pae-modules", "modules", _PAE, "i386", "modules", ("i386-pae",)),
        Image("i386-modules", "modules", _686, "i386", "modules", ("i386",)),
        Image("lab-modules", "modules of the lab", _GENERIC, "amd64", "modules", ("generic",)),
        Image("intel-lab-modules", "modules of the Intel lab", _CLOUD, "amd64", "modules", ("cloud",)),
        Image("bochs", "emulator of the Intel lab", "bochs", "amd64", "emulator"),
        Image("memtest86+", "test of RAM, bzImage", "memtest86+", "amd64", "memtest"),
        Image("bochs-bios", "BIOS for Bochs", "bochsbios", "amd64", "bios"),
    )
}


def catalogue() -> tuple[Image, ...]:
    """Return the images that a machine can be started with."""
    return tuple(image for image in _IMAGES.values() if image.kind in ("kernel", "elf", "initramfs"))


@checked
def find(name: str) -> Image:
    """Return the image, or part of one, of that name; ``ImageError`` if there is none."""
    try:
        return _IMAGES[name]
    except KeyError:
        names = ", ".join(image.name for image in catalogue())
        raise ImageError(f"no image is called {name!r}; there are: {names}") from None


@checked
def path(name: str) -> Path | None:
    """Return where the image is cached, or None if it is not; ``pull`` also verifies it."""
    image, cache = find(name), Cache(default_root())
    return cache.path(image.name) if cache.record(image.name) else None


@checked
async def pull(
    name: str, *, progress: Callable[[Progress], None] | None = None, refresh: bool = False
) -> Path:
    """Return the path of an image, fetching it if it is not cached or not what it was when it was cached.

    ``refresh`` asks Debian for a newer version as well. Safe to call from several processes, and to cancel.
    Raises ``ImageError`` if the package cannot be found, fetched or verified, or a program is missing.
    """
    image, cache = find(name), Cache(default_root())
    if refresh or not await anyio.to_thread.run_sync(_current, cache, image):
        pull_ = _Pull(cache, progress or (lambda _: None), refresh)
        async with cache.locked(lambda: pull_.progress(Progress(name, "wait"))):
            await pull_.make(image)
    return cache.path(name)


@checked
def find_debian(
    *,
    suite: str = "bookworm",
    packages: Sequence[str] = (),
    size_bytes: int = 1 << 30,
    files: Mapping[str, str | bytes | Path] | None = None,
    authorized_keys: Sequence[str] = (),
    enable: Sequence[str] = (),
) -> DebianDisk | None:
    """Return the disk that `build_debian` has cached, or None; `build_debian` also verifies it."""
    recipe = disk.recipe(suite, packages, size_bytes, files or {}, authorized_keys, enable)
    return disk.cached(Cache(default_root()), recipe)


@checked
async def build_debian(
    *,
    suite: str = "bookworm",
    packages: Sequence[str] = (),
    size_bytes: int = 1 << 30,
    files: Mapping[str, str | bytes | Path] | None = None,
    authorized_keys: Sequence[str] = (),
    enable: Sequence[str] = (),
    output: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    refresh: bool = False,
) -> DebianDisk:
    """Return a Debian root file system as a disk image, with the kernel and the initramfs that boot it.

    It has Debian's essential packages, systemd with a login on every serial console, and ``packages``.
    ``files`` are paths in the guest, and what is there: a content, or the path of a file here. They belong to
    root, and may be executed if they begin with ``#!`` or the file here may be. ``authorized_keys`` are lines
    of public keys that let root in by SSH, whose server is then one of the packages; it makes its own keys at
    the first boot. ``enable`` are systemd's units that start with the machine, of a package or of ``files``.
    The image is raw ext4, sparse, ``size_bytes`` large, and the same for the same packages. It is built if it
    is not in the cache, or not what was put there; ``refresh`` builds it anew. What is returned lies in the
    cache and is not to be written to; with ``output`` it is a copy there, the others beside it.

    Needs mmdebstrap and mke2fs, and root or a range of subordinate ids. Safe to call from several processes,
    and to cancel. Raises ``ConfigError`` for an argument, ``ImageError`` for anything that failed.
    """
    recipe = await anyio.to_thread.run_sync(
        disk.recipe, suite, packages, size_bytes, files or {}, authorized_keys, enable
    )
    if output is not None:
        await anyio.to_thread.run_sync(disk.check_output, output)
    cache, tell = Cache(default_root()), progress or (lambda _: None)
    found = None if refresh else await anyio.to_thread.run_sync(disk.verified, cache, recipe)
    if found is None:
        busybox = await pull("busybox", progress=progress, refresh=refresh)
        async with cache.locked(lambda: tell(Progress(recipe.name, "wait"))):
            # Another process may have built it meanwhile.
            found = None if refresh else await anyio.to_thread.run_sync(disk.verified, cache, recipe)
            found = found or await disk.build(cache, recipe, busybox, tell, refresh=refresh)
    return await disk.copy(found, output) if output else found


def _current(cache: Cache, image: Image) -> Record | None:
    """Return the record of an image that is intact and built from the parts and with the code of today."""
    record = cache.verified(image.name)
    if record and (image.parts or image.kind == "emulator") and record.source != _source(cache, image):
        return None
    return record


def _source(cache: Cache, image: Image) -> str | None:
    """Name what an image is to be built from: a digest of its parts and of what the code adds."""
    if image.kind == "emulator":
        return bochs.RECIPE
    if image.kind == "initramfs":
        recipe = base_archive(b"", image.architecture)
    else:
        recipe = " ".join((image.kind, *_module_names(image))).encode()
    digest = hashlib.sha256(recipe)
    for part in image.parts:
        record = cache.record(part)
        if record is None:
            return None
        digest.update(f"{record.source} {record.sha256}".encode())
    return digest.hexdigest()


def _module_names(image: Image) -> tuple[str, ...]:
    if image.kind != "modules":
        return ()
    return {"lab-modules": LAB_MODULES, "intel-lab-modules": INTEL_LAB_MODULES}.get(image.name, GUEST_MODULES)


class _Pull:
    """One pull under the cache's lock."""

    def __init__(self, cache: Cache, progress: Callable[[Progress], None], refresh: bool) -> None:
        self._cache = cache
        self.progress = progress
        self._refresh = refresh

    async def make(self, image: Image) -> None:
        """Bring an image up to date, its parts first."""
        for part in image.parts:
            await self.make(find(part))
        current = await anyio.to_thread.run_sync(_current, self._cache, image)
        if image.kind == "emulator":
            if self._refresh or not current:
                await self._compile(image, current)
        elif not image.parts:
            if self._refresh or not current:
                await self._fetch(image, current)
        elif not current:
            if image.kind == "modules":
                await self._fetch(find(image.parts[0]), None)
            else:
                await self._build(image)

    async def _build(self, image: Image) -> None:
        self.progress(Progress(image.name, "build"))
        parts = [await anyio.to_thread.run_sync(self._cache.path(part).read_bytes) for part in image.parts]
        if image.kind == "elf":
            # Here, for the boot formats are not needed to look up what is cached.
            from aiokvm.images import vmlinux

            data = await vmlinux.extract(parts[0])
        else:
            data = cpio.join(base_archive(parts[0], image.architecture), parts[1])
        await anyio.to_thread.run_sync(self._store_built, image, data)

    async def _compile(self, image: Image, current: Record | None) -> None:
        """Build Bochs from its source package, unless ``current`` is of that version."""
        self.progress(Progress(image.name, "index"))
        machine = debian.Apt(self._cache.root, image.architecture)
        await machine.update(force=False)
        apt = debian.Apt(self._cache.root, image.architecture, await machine.mirror(bochs.SUITE))
        await apt.update(force=True)
        source = await apt.show_source(image.package)
        if current and current.version == source.version:
            return
        with self._cache.work() as folder:
            program = await bochs.build(apt, source, folder, image.name, self.progress)
            fields = {"package": source.name, "version": source.version, "source": bochs.RECIPE}
            await anyio.to_thread.run_sync(partial(self._cache.adopt, image.name, program, **fields))

    async def _fetch(self, image: Image, current: Record | None) -> None:
        """Fetch the package of a kernel or of busybox, unless it is the one that ``current`` came from."""
        apt = debian.Apt(self._cache.root, image.architecture)
        for force in (self._refresh, True):
            self.progress(Progress(image.name, "index"))
            updated = await apt.update(force=force)
            try:
                package = await apt.show(image.package)
                if image.kind == "kernel":
                    package = await apt.show(*debian.kernel_dependency(package))
                if current is None or current.source != package.sha256:
                    await self._fetch_package(image, apt, package)
            except ImageError:
                # An index of yesterday names files that may be gone today.
                if updated:
                    raise
            else:
                return

    async def _fetch_package(self, image: Image, apt: debian.Apt, package: debian.Package) -> None:
        def progress(done_bytes: int) -> None:
            self.progress(Progress(image.name, "download", done_bytes, package.size))

        with self._cache.work() as folder:
            deb = await apt.download(package, folder, progress)
            self.progress(Progress(image.name, "unpack"))
            files = await debian.unpack(deb, _wanted)
        await anyio.to_thread.run_sync(self._store_package, image, package, files)

    def _store_package(self, image: Image, package: debian.Package, files: dict[str, bytes]) -> None:
        start = "boot/vmlinuz-" if image.kind == "kernel" else ""
        found = [name for name in files if name.startswith(start) and not modules.is_module(name)]
        if len(found) != 1:
            raise ImageError(f"{package.name} {package.version} holds {found} where one file was looked for")
        self._cache.store(
            image.name,
            files[found[0]],
            package=package.name,
            version=package.version,
            source=package.sha256,
        )
        for part in _IMAGES.values():
            if part.kind == "modules" and part.parts == (image.name,):
                release = found[0].removeprefix(start)
                self._store_built(part, modules_archive(release, modules.pick(files, _module_names(part))))

    def _store_built(self, image: Image, data: bytes) -> None:
        source = _source(self._cache, image)
        first = self._cache.record(image.parts[0])
        assert source is not None
        assert first is not None
        self._cache.store(image.name, data, package=first.package, version=first.version, source=source)


def _wanted(name: str) -> bool:
    """Tell whether a file of a package is what is booted or run, or one of the modules that are used."""
    ends = ("bin/busybox", "/BIOS-bochs-latest", "/memtest86+x64.bin")
    single = name.startswith("boot/vmlinuz-") or name.endswith(ends)
    return single or modules.wanted(name)
