"""The kernels and the initramfs that aiokvm knows how to get: from Debian's packages, verified and cached."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

import anyio.to_thread

from aiokvm.errors import ImageError
from aiokvm.images import debian
from aiokvm.images.cache import Cache, default_root
from aiokvm.images.initramfs import base_archive, command_archive, modules_archive
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiokvm.images.cache import Record

__all__ = ["LAB_MODULES", "Image", "Progress", "catalogue", "command_archive", "find", "path", "pull"]

GUEST_MODULES = (
    *("button", "evdev"),
    *("virtio_ring", "virtio", "virtio_mmio", "virtio_console", "virtio-rng", "virtio_balloon"),
)
"""The modules that the small guest's init loads, in this order."""
LAB_MODULES = (
    *(
        "virtio_ring",
        "virtio",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "virtio_pci",
        "virtio_console",
    ),
    *(
        "netfs",
        "fscache",
        "9pnet",
        "9pnet_virtio",
        "9p",
        "overlay",
        "irqbypass",
        "ccp",
        "kvm",
        "kvm-amd",
        "tun",
        "tap",
    ),
    *("vhost_iotlb", "vhost", "vhost_net", "vsock", "vmw_vsock_virtio_transport_common", "vhost_vsock"),
)
"""The modules of the lab's kernel in the order in which they are loaded."""


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
    kind: Literal["kernel", "elf", "initramfs", "busybox", "modules"]
    parts: tuple[str, ...] = ()
    initramfs: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a pull is.

    ``name`` is the image or the part of it being worked on. In the stage "download" ``done_bytes`` of
    ``total_bytes`` have come; the other stages ("wait" is for another process's pull) count nothing.
    """

    name: str
    stage: Literal["wait", "index", "download", "unpack", "build"]
    done_bytes: int = 0
    total_bytes: int | None = None


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
    )
}


def catalogue() -> tuple[Image, ...]:
    """Return the images that a machine can be started with."""
    return tuple(image for image in _IMAGES.values() if image.kind in ("kernel", "elf", "initramfs"))


def find(name: str) -> Image:
    """Return the image, or part of one, of that name; ``ImageError`` if there is none."""
    try:
        return _IMAGES[name]
    except KeyError:
        names = ", ".join(image.name for image in catalogue())
        raise ImageError(f"no image is called {name!r}; there are: {names}") from None


def path(name: str) -> Path | None:
    """Return where the image is cached, or None if it is not; ``pull`` also verifies it."""
    image, cache = find(name), Cache(default_root())
    return cache.path(image.name) if cache.record(image.name) else None


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


def _current(cache: Cache, image: Image) -> Record | None:
    """Return the record of an image that is intact and built from the parts and with the code of today."""
    record = cache.verified(image.name)
    if record and image.parts and record.source != _source(cache, image):
        return None
    return record


def _source(cache: Cache, image: Image) -> str | None:
    """Name what an image is to be built from: a digest of its parts and of what the code adds."""
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
    return LAB_MODULES if image.name == "lab-modules" else GUEST_MODULES


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
        if not image.parts:
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
        found = [name for name in files if name.startswith(start) and not name.endswith(_MODULE_ENDS)]
        if len(found) != 1:
            raise ImageError(f"{package.name} {package.version} holds {found} where one file was looked for")
        self._cache.store(
            image.name,
            files[found[0]],
            package=package.name,
            version=package.version,
            source=package.sha256,
        )
        for modules in _IMAGES.values():
            if modules.kind == "modules" and modules.parts == (image.name,):
                release = found[0].removeprefix(start)
                self._store_built(modules, modules_archive(release, _modules(files, _module_names(modules))))

    def _store_built(self, image: Image, data: bytes) -> None:
        source = _source(self._cache, image)
        first = self._cache.record(image.parts[0])
        assert source is not None
        assert first is not None
        self._cache.store(image.name, data, package=first.package, version=first.version, source=source)


_MODULE_ENDS = (".ko", ".ko.xz")


def _wanted(name: str) -> bool:
    """Tell whether a file of a package is a kernel, busybox or one of the modules that are used."""
    if name.startswith("boot/vmlinuz-") or name.endswith("bin/busybox"):
        return True
    stem = PurePosixPath(name).name.split(".")[0]
    return name.endswith(_MODULE_ENDS) and stem in (*GUEST_MODULES, *LAB_MODULES)


def _modules(files: dict[str, bytes], names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the named modules that a kernel has (others are built into it, or gone), unpacked, in order."""
    found = {PurePosixPath(name).name.split(".")[0]: name for name in files if name.endswith(_MODULE_ENDS)}
    modules = {}
    for name in names:
        if name in found:
            data = files[found[name]]
            modules[f"{name}.ko"] = lzma.decompress(data) if found[name].endswith(".xz") else data
    return modules
