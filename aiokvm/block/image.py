"""A disk image of another format than raw: a private qemu-nbd serves it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aiokvm import process
from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.block.file import in_thread, open_file, opening
from aiokvm.block.nbd_client import CONNECTIONS_MAX, NbdClient
from aiokvm.errors import ConfigError, ImageError
from aiokvm.process import Folder
from aiokvm.proto import image as proto
from aiokvm.proto.nbd import Address

if TYPE_CHECKING:
    from aiokvm.process import Process

PROGRAM = "qemu-nbd"
PACKAGE = "qemu-utils"
CHAIN_MAX = 64
"""Images that back each other."""
END_TIMEOUT_S = 10.0
"""For the server to write out what it has; then it is killed."""
_STDERR_BYTES = 1000  # what of the server's complaints an error shows: the end of them

# The listening socket comes as standard input and becomes what systemd's socket activation would give.
_LAUNCH = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


@owned
class Image(NbdClient):
    """A disk image in qcow2, VMDK, VDI or VHDX, found by how the file begins.

    A qemu-nbd of its own serves it, on a Unix socket in a temporary directory; it ends with ``close``, or by
    itself when this process does. If it ends before, it is started again, and what no flush had covered is
    written again, as `Nbd` does. It is told the format and never looks for one. ``format`` says which one it
    has to be. A raw image is never guessed: that is ``block.Raw``, by declaration.

    An image may name other files, and so make its reader read them. ``backing=True`` allows that for the
    backing files of qcow2: each a regular file on this host, named with its format in the image. Anything
    else that names files is refused: a VMDK of several files or with a parent, a qcow2 with external data.

    ``open`` raises ImageError for what is no such image, is damaged or not allowed, if the file is not there
    or cannot be read, and if qemu-nbd is missing.
    """

    @checked
    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,  # noqa: A002
        readonly: bool = False,
        backing: bool = False,
        connections: int = 4,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(str(path), readonly, connections, timeout)
        if format is not None and format not in proto.FORMATS:
            raise ConfigError(f"format {format!r}: {', '.join(proto.FORMATS)} are known; raw is block.Raw")
        self.path = Path(path)
        self.format = format
        self._backing = backing
        self._directory: Folder | None = None
        self._servers = 0
        self._process: Process | None = None
        self._stderr: IO[bytes] | None = None
        self._failure: ImageError | None = None

    async def open(self) -> None:
        if self._directory is not None:
            raise OSError(errno.EBUSY, f"{self.path} is open")
        if shutil.which(PROGRAM) is None:
            raise ImageError(f"the program {PROGRAM} is missing: install the Debian package {PACKAGE}")
        self._failure = None
        try:
            await in_thread(self._make_directory)
            await super().open()
        except BaseException as error:
            await current_loop().uncancelled(self._end)
            # The server's own words say more than a connection that broke.
            if isinstance(error, OSError) and self._failure is not None:
                raise self._failure from error
            raise

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            await current_loop().uncancelled(self._end)

    def _make_directory(self) -> None:
        """Blocks: what killed processes have left is removed, too."""
        self._directory = Folder()

    async def _locate(self) -> Address:
        """Starts a server; one that is there has lost its clients, or was given up."""
        await current_loop().uncancelled(self._end_process)
        assert self._directory is not None
        options = await in_thread(self._options)
        self._servers += 1
        folder = self._directory.path
        path = self._directory.socket_path(f"nbd{self._servers}.sock")
        arguments = [f"--shared={CONNECTIONS_MAX}", "--discard=unmap", "--cache=writeback"]
        if self._wanted_readonly:
            arguments.append("--read-only")

        async def start() -> None:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(path)
                listener.listen(CONNECTIONS_MAX)
                self._process = await process.start(
                    ["sh", "-c", _LAUNCH, "sh", PROGRAM, *arguments, f"json:{json.dumps(options)}"],
                    stdin=listener.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    cwd=folder,
                    env={"LC_ALL": "C"},
                    grace_s=END_TIMEOUT_S,
                )

        await current_loop().uncancelled(start)
        return Address("", 0, path, "")

    # The server.

    async def _end(self) -> None:
        try:
            await self._end_process()
        finally:
            directory, self._directory = self._directory, None
            if directory is not None:
                await in_thread(directory.close)

    async def _end_process(self) -> None:
        server, self._process = self._process, None
        if server is None:
            return
        status = await process.end(server)
        if self._stderr is not None:
            with self._stderr as stderr:
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
                words = stderr.read().decode(errors="replace").strip()
            self._stderr = None
            if status > 0:
                self._failure = ImageError(
                    f"{self.path}: {words or f'{PROGRAM} failed with status {status}'}"
                )

    # The image.

    def _options(self) -> dict[str, Any]:
        """What qemu-nbd is told about the image and all that it is made of."""
        with opening(self.path):
            return self._node(self.path.absolute(), self.format, not self._wanted_readonly, 0)

    def _node(self, path: Path, wanted: str | None, writes: bool, depth: int) -> dict[str, Any]:
        fd = open_file(path, os.O_RDONLY)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise ImageError("neither a file nor a block device")
            head = os.pread(fd, proto.HEAD_BYTES, 0)
        finally:
            os.close(fd)
        driver = "host_device" if stat.S_ISBLK(mode) else "file"
        file: dict[str, Any] = {"driver": driver, "filename": self._name_for_qemu(path)}
        discard = {"discard": "unmap"} if writes else {}
        if wanted == "raw":  # only ever a backing file, by its image's word
            return {"driver": "raw", "file": file, "read-only": True}
        header = proto.inspect(head)
        if header is None:
            raise ImageError(
                "it begins as no qcow2, VMDK, VDI or VHDX does: if it is a raw image, say so with block.Raw"
            )
        if wanted not in (None, header.format):
            raise ImageError(f"it is a {header.format} image, not {wanted}")
        node = {"driver": header.format, "file": file | discard, "read-only": not writes} | discard
        node["backing"] = self._backing_node(path, header, depth) if header.backing else None
        return node

    def _name_for_qemu(self, path: Path) -> str:
        """The path, or, as JSON is UTF-8, another name of it, in the directory that qemu-nbd runs in."""
        try:
            str(path).encode()
        except UnicodeEncodeError:
            assert self._directory is not None
            folder = self._directory.path
            other = folder / f"image{len(list(folder.iterdir()))}"
            other.symlink_to(path)
            return other.name
        return str(path)

    def _backing_node(self, path: Path, header: proto.Header, depth: int) -> dict[str, Any]:
        name = header.backing
        if not self._backing:
            raise ImageError(
                f"it has the backing file {name!r}: backing=True lets the image name files, if you trust it"
            )
        if depth >= CHAIN_MAX:
            raise ImageError(f"more than {CHAIN_MAX} images that back each other")
        if ":" in name.partition("/")[0]:
            raise ImageError(f"the backing file {name!r} is no file: only those on this host can be used")
        if header.backing_format not in ("raw", *proto.FORMATS):
            raise ImageError(
                f"the format {header.backing_format!r} of the backing file {name!r} is not known: "
                "qemu-img rebase -u -F FORMAT writes it into the image"
            )
        with opening(f"backing file {name!r}"):
            return self._node(path.parent / name, header.backing_format, False, depth + 1)
