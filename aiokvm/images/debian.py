"""Debian packages by name, through apt with a state of its own.

apt reads the machine's sources and trusts the machine's keys; its indexes and downloads lie in a directory of
ours, one for each architecture, so nothing of the machine changes and no privilege is needed. An index that
is not signed by a trusted key is refused by apt itself.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import anyio
import anyio.to_thread

from aiokvm.errors import ImageError
from aiokvm.images.cache import sha256_file
from aiokvm.images.process import child, run
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INDEX_MAX_AGE_S = 24 * 3600
_CONFIG = Path(__file__).with_name("apt.conf")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# The index of source packages, which is looked into only where one is asked for.
_SOURCES = {
    f"Acquire::IndexTargets::deb-src::Sources::{key}": value
    for key, value in (
        ("MetaKey", "$(COMPONENT)/source/Sources"),
        ("flatMetaKey", "Sources"),
        ("ShortDescription", "Sources"),
        ("Description", "$(RELEASE)/$(COMPONENT) Sources"),
        ("flatDescription", "$(RELEASE) Sources"),
        ("Optional", "false"),
    )
}
_PROGRESS = re.compile(rb"dlstatus:\d+:([0-9.]+):")
MISSING = re.compile(r"E: (?:Unable to locate package |Package ')([^\s']+)")
"""The name in apt's complaint about a package that there is not."""
# No package of interest has a file near it: a damaged archive shall not fill the memory.
_MEMBER_MAX_BYTES = 256 << 20

_log = get_logger("aiokvm.images")


@dataclass(frozen=True)
class Package:
    """A package version as the signed index describes it; ``size`` in bytes, ``sha256`` in hexadecimal."""

    name: str
    version: str
    size: int
    sha256: str
    depends: str


@dataclass(frozen=True)
class Source:
    """A source package's upstream tarball as the signed index describes it; as `Package`."""

    name: str
    version: str
    file: str
    size: int
    sha256: str


class Apt:
    """apt for one architecture (``amd64``, ``i386``) with its state under ``root``.

    With ``lines`` of a sources.list it looks there and not at the machine's own.
    """

    def __init__(self, root: Path, architecture: str, lines: Sequence[str] = ()) -> None:
        self.architecture = architecture
        self._lines = "".join(f"{line}\n" for line in lines)
        # What belongs to other lines is in another place: an index is as old as its stamp says.
        digest = hashlib.sha256(self._lines.encode()).hexdigest()[:12]
        self._root = root / "apt" / (f"{architecture}-{digest}" if lines else architecture)

    async def update(self, *, force: bool) -> bool:
        """Fetch the indexes if they are older than a day, or anyway with ``force``; tell whether it was done.

        As in apt itself, an index that cannot be fetched is left out, with a warning.
        """
        stamp = self._root / "updated"
        if not force and _age_s(stamp) < INDEX_MAX_AGE_S:
            return False
        self._make_state()
        try:
            await run(self._command("apt-get", "-qq", "update"))
        except ImageError as error:
            _log.warning("some package indexes could not be fetched: %s", str(error).splitlines()[0])
        else:
            stamp.touch()
        return True

    async def show(self, name: str, version: str | None = None) -> Package:
        """Look a package up: the version that apt would install, or the one given.

        Raises ``ImageError`` if the machine's sources do not have it.
        """
        wanted = f"{name}={version}" if version else name
        try:
            text = await run(self._command("apt-cache", "show", "--no-all-versions", wanted))
            return parse_package(text.decode())
        except ImageError as error:
            raise ImageError(
                f"the package sources of this machine have no {wanted} for {self.architecture}: "
                "check the network and the files in /etc/apt",
                *str(error).splitlines(),
            ) from error

    async def sources(self, suite: str) -> list[str]:
        """Return the sources.list lines of this machine for a suite of Debian's and its updates.

        Empty if it has none: its own packages are of another suite.
        """
        return source_lines(await self._targets(), suite)

    async def mirror(self, suite: str) -> list[str]:
        """Return the sources.list lines for a suite's source packages, on the mirror that this machine uses.

        Raises ``ImageError`` if it uses no mirror of Debian.
        """
        text = await self._targets()
        if lines := mirror_lines(text, suite):
            return lines
        raise ImageError(
            f"the package sources of this machine name no mirror of Debian, where {suite} would be"
        )

    async def show_source(self, name: str) -> Source:
        """Look a source package up; ``ImageError`` if the sources do not have it."""
        try:
            text = await run(self._command("apt-cache", "showsrc", "--only-source", name))
            return parse_source(text.decode())
        except ImageError as error:
            raise ImageError(f"there is no source package {name} ({error}); check the network") from error

    async def missing(self, suite: str, names: Sequence[str]) -> list[str]:
        """Return those of the packages that cannot be had from a suite of which this machine has sources.

        It is the installation that is tried, so a name may be that of what several packages provide.
        """
        command = self._command("apt-get", "-qq", "--simulate", "--no-install-recommends", "-t", suite)
        try:
            await run([*command, "install", *names])
        except ImageError as error:
            return list(dict.fromkeys(MISSING.findall(str(error))))
        return []

    async def download(self, package: Package, folder: Path, progress: Callable[[int], None]) -> Path:
        """Fetch the .deb into the empty ``folder`` and verify it; ``progress`` is told the bytes so far.

        Raises ``ImageError`` if it cannot be fetched or is not what the index says.
        """

        def line(text: bytes) -> None:
            if match := _PROGRESS.match(text):
                progress(round(float(match[1]) / 100 * package.size))

        wanted = f"{package.name}={package.version}"
        await run(
            self._command("apt-get", "-qq", "-o", "APT::Status-Fd=1", "download", wanted),
            cwd=folder,
            line=line,
        )
        deb = await anyio.to_thread.run_sync(verify, folder, package)
        progress(package.size)
        return deb

    async def download_source(self, source: Source, folder: Path) -> Path:
        """Fetch the tarball into ``folder`` and verify it; ``ImageError`` as `download`."""
        wanted = f"{source.name}={source.version}"
        options = ("--download-only", "--tar-only", "--only-source")
        await run(self._command("apt-get", "-qq", "source", *options, wanted), cwd=folder)
        await anyio.to_thread.run_sync(check_digest, folder / source.file, source)
        return folder / source.file

    async def _targets(self) -> str:
        """Return codename, URI, release and component of each index of Debian's that this machine uses."""
        columns = "$(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)"
        command = self._command("apt-get", "indextargets", "--format", columns)
        return (await run([*command, "Created-By: Packages", "Origin: Debian"])).decode()

    def _make_state(self) -> None:
        for folder in ("lists/partial", "archives/partial"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        if self._lines:
            (self._root / "sources.list").write_text(self._lines)

    def _command(self, program: str, *arguments: str) -> list[str]:
        options: dict[str, str | Path] = {
            "APT::Architecture": self.architecture,
            "APT::Architectures::": self.architecture,
            "Dir::State": self._root,
            "Dir::State::lists": self._root / "lists",
            "Dir::State::status": self._root / "status",
            "Dir::State::extended_states": self._root / "extended_states",
            "Dir::Cache": self._root,
            "Dir::Cache::archives": self._root / "archives",
            # Binary caches save no time for a handful of look-ups, and are larger than the indexes.
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
        }
        if self._lines:
            options["Dir::Etc::sourcelist"] = self._root / "sources.list"
            options["Dir::Etc::sourceparts"] = "/dev/null"
            options |= _SOURCES
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return [program, "-c", str(_CONFIG), *flags, *arguments]


def parse_package(text: str) -> Package:
    """Parse the first stanza that ``apt-cache show`` printed; ``ImageError`` if it lacks what is needed."""
    stanza = text.strip().split("\n\n")[0]
    fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", stanza, re.MULTILINE))
    try:
        return Package(
            fields["Package"],
            fields["Version"],
            int(fields["Size"]),
            fields["SHA256"].lower(),
            fields.get("Depends", ""),
        )
    except (KeyError, ValueError) as error:
        raise ImageError(f"the package index entry has no usable {error}") from None


def parse_source(text: str) -> Source:
    """Parse the first stanza that ``apt-cache showsrc`` printed; ``ImageError`` if it lacks something."""
    stanza = text.strip().split("\n\n")[0]
    fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", stanza, re.MULTILINE))
    listed = re.search(r"^Checksums-Sha256: *\n((?: .*(?:\n|$))*)", stanza, re.MULTILINE)
    rows = [line.split() for line in listed[1].splitlines()] if listed else []
    tarballs = [row for row in rows if len(row) == 3 and re.search(r"\.orig\.tar\.[a-z0-9]+$", row[2])]
    try:
        [[sha256, size, file]] = tarballs
        if "/" in file:
            raise ValueError(file)
        return Source(fields["Package"], fields["Version"], file, int(size), sha256.lower())
    except (KeyError, ValueError) as error:
        raise ImageError(f"the source index entry does not name one upstream tarball: {error}") from None


def mirror_lines(text: str, suite: str) -> list[str]:
    """Make from lines of codename, URI, release and component the one for a suite's source packages."""
    rows = [line.split() for line in text.splitlines()]
    # A codename with a hyphen is that of updates, which may have a place of their own.
    uris = [row[1] for row in rows if len(row) == 4 and "-" not in row[0] and row[3] == "main"]
    return [f"deb-src {_signed_by()}{uri} {suite} main" for uri in uris[:1]]


def source_lines(text: str, suite: str) -> list[str]:
    """Choose from lines of codename, URI, release and component those of a suite and its updates."""
    rows = [line.split() for line in text.splitlines()]
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    rows = [row for row in rows if len(row) == 4 and row[0] in wanted and row[3] == "main"]
    if suite not in (row[0] for row in rows):
        return []
    keys = _signed_by()
    return list(dict.fromkeys(f"deb {keys}{uri} {release} main" for _, uri, release, _ in rows))


def _signed_by() -> str:
    return f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""


def kernel_dependency(package: Package) -> tuple[str, str]:
    """Return name and version of the kernel that a meta package such as linux-image-amd64 stands for."""
    match = re.search(r"(?:^|[ ,])(linux-image-[a-z0-9.+-]+) \(= ([^)\s]+)\)", package.depends)
    if match is None:
        raise ImageError(f"{package.name} {package.version} depends on no kernel: {package.depends!r}")
    return match[1], match[2]


def verify(folder: Path, package: Package) -> Path:
    """Return the .deb in a folder; ``ImageError`` unless it is the one that the index describes."""
    files = list(folder.glob("*.deb"))
    if len(files) != 1:
        raise ImageError(
            f"downloading {package.name} {package.version} left {len(files)} packages instead of one"
        )
    check_digest(files[0], package)
    return files[0]


def check_digest(file: Path, package: Package | Source) -> None:
    """Raise ``ImageError`` unless the file is the one that the index describes."""
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise ImageError(f"{package.name} {package.version} was not downloaded: {error}") from error
    if digest != package.sha256:
        raise ImageError(
            f"{package.name} {package.version}: the package's SHA-256 is {digest}, the signed index says "
            f"{package.sha256}; it was damaged or changed on its way: try again"
        )


async def unpack(deb: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the regular files of a .deb whose path (without a leading ``./``) is wanted."""
    with (deb.parent / "files.tar").open("w+b") as tar:
        await unpack_tar(deb, tar)
        return await anyio.to_thread.run_sync(pick, tar, wanted)


async def unpack_tar(deb: Path, tar: IO[bytes]) -> None:
    """Write the archive of a .deb's files into ``tar``, and go to its start."""
    async with child(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=tar) as process:
        if status := await process.wait():
            raise ImageError(f"dpkg-deb cannot unpack {deb.name}: it failed with status {status}")
    tar.seek(0)


def pick(tar: IO[bytes], wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the wanted regular files out of a tar archive; ``ImageError`` if it is damaged."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if not member.isfile() or not wanted(name):
                    continue
                if member.size > _MEMBER_MAX_BYTES:
                    raise ImageError(f"{name} in the package claims {member.size} bytes")
                stream = archive.extractfile(member)
                found[name] = stream.read() if stream else b""
    except tarfile.TarError as error:
        raise ImageError(f"the package's archive is damaged: {error}") from error
    return found


def _age_s(path: Path) -> float:
    try:
        return abs(time.time() - path.stat().st_mtime)
    except OSError:
        return float("inf")
