"""The directory of fetched and built images, safe for any number of processes at once.

An image is one file, and beside it a record of what it came from and its SHA-256. Both are written under
another name and renamed, the record last: a reader finds the old image, the new one, or none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from aiokvm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

_LOCK_POLL_S = 0.1  # flock cannot be awaited, and a thread blocked in it could not be cancelled
_WORK_PREFIX = ".work-"


def default_root() -> Path:
    """Return ``$AIOKVM_CACHE``, else ``$XDG_CACHE_HOME/aiokvm``, else ``~/.cache/aiokvm``.

    Raises ImageError if there is no home.
    """
    if path := os.environ.get("AIOKVM_CACHE"):
        return Path(path).absolute()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).absolute() / "aiokvm"
    try:
        return Path.home() / ".cache" / "aiokvm"
    except RuntimeError:
        raise ImageError("this user has no home directory for the cache: set AIOKVM_CACHE") from None


@dataclass(frozen=True)
class Record:
    """Where a cached file came from.

    ``package`` and ``version`` are Debian's; ``source`` is the SHA-256 of the .deb, or of what the file was
    built from; ``sha256`` is the file's own.
    """

    package: str
    version: str
    source: str
    sha256: str


class Cache:
    """The images under one root directory, which is made when something is stored."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Return where the image of that name is or would be."""
        return self.root / "images" / name

    def record(self, name: str) -> Record | None:
        """Return the record of an image whose file is there, without reading that file."""
        try:
            fields = json.loads(self._record_path(name).read_bytes())
            record = Record(**fields)
        except (OSError, ValueError, TypeError):
            return None
        return record if self.path(name).is_file() else None

    def verified(self, name: str) -> Record | None:
        """Return the record of an image whose content is what the record says."""
        record = self.record(name)
        if record is None:
            return None
        try:
            digest = sha256_file(self.path(name))
        except OSError:
            return None
        return record if digest == record.sha256 else None

    def store(self, name: str, data: bytes, *, package: str, version: str, source: str) -> Record:
        """Put an image in; the caller holds the lock. Returns its record."""
        with self.work() as folder:
            _write(folder / name, data)
            return self.adopt(name, folder / name, package=package, version=version, source=source)

    def adopt(self, name: str, file: Path, *, package: str, version: str, source: str) -> Record:
        """Put a file of the same file system in by renaming it; else as `store`."""
        record = Record(package, version, source, sha256_file(file))
        text = json.dumps(asdict(record), indent=1) + "\n"
        with self.work() as folder, file.open("rb") as stream:
            # Without it a power cut can leave a renamed file that is empty.
            os.fsync(stream.fileno())
            fresh = folder / "record"
            _write(fresh, text.encode())
            self.path(name).parent.mkdir(exist_ok=True)
            file.replace(self.path(name))
            fresh.replace(self._record_path(name))
        return record

    @contextmanager
    def work(self) -> Iterator[Path]:
        """Make a directory on the cache's file system for unfinished files, gone when the block is left."""
        folder = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @asynccontextmanager
    async def locked(self, waiting: Callable[[], None]) -> AsyncIterator[None]:
        """Be the only process that changes the cache; ``waiting`` is called once if another one is.

        Also clears what a killed process left half done. Raises ``ImageError`` if the root cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            hint = "set AIOKVM_CACHE to a directory that you may write to"
            raise ImageError(
                f"cannot use the cache directory {self.root}: {error.strerror}; {hint}"
            ) from error
        try:
            told = False
            while not _try_lock(descriptor):
                if not told:
                    waiting()
                    told = True
                await anyio.sleep(_LOCK_POLL_S)
            for leftover in self.root.glob(_WORK_PREFIX + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            os.close(descriptor)

    def _record_path(self, name: str) -> Path:
        return self.root / "images" / f"{name}.json"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
