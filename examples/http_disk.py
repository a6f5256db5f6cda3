"""A disk that an HTTP server has: a backend of the program's own reads it by range requests, and caches it.

Nothing is read twice, nor before a guest wants it. The disk is read-only; what a guest writes goes into an
overlay above it:

    disk = block.Overlay(HttpDisk("https://example.org/root.img", "root.cache"), "root.changes")
    vm = await VM.create(boot=..., disks=[disk])

Here a few lines on loopback serve a disk of 1 MiB, and requests are made as a guest's would be:

    python examples/http_disk.py
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
import zlib
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import httpx
from anyio import to_thread

from aiokvm import block

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE_BYTES = 256 << 10
"""What is fetched at a time."""


class HttpDisk(block.BlockBackend):
    """The file at ``url``, whose server has to know ranges, cached in the file ``cache`` while it is open.

    A file that changes on the server is noticed by its ETag, and gives EIO.
    """

    readonly = True

    def __init__(self, url: str, cache: str | os.PathLike[str]) -> None:
        self.url = url
        self.cache = Path(cache)

    async def open(self) -> None:
        """Ask for the size, and that ranges will be served."""
        self._client = httpx.AsyncClient(timeout=10, trust_env=False)
        try:
            response = await self._client.head(self.url)
            response.raise_for_status()
            if response.headers.get("accept-ranges") != "bytes":
                raise OSError(errno.EOPNOTSUPP, f"{self.url} is not served by ranges")
            self.size_bytes = int(response.headers["content-length"]) // self.block_size * self.block_size
            self._etag = response.headers.get("etag")
            self._fd = os.open(self.cache, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except BaseException as error:
            await self._client.aclose()
            if isinstance(error, httpx.HTTPError):
                raise OSError(errno.EIO, f"{self.url}: {error}") from error
            raise
        self._have: set[int] = set()
        self._locks: dict[int, anyio.Lock] = {}

    async def close(self) -> None:
        """The machine has no more requests: nothing is to be waited for."""
        os.close(self._fd)
        with anyio.CancelScope(shield=True):
            await self._client.aclose()

    async def read(self, offset: int, length: int) -> bytes:
        """Fetch what is not here yet, then read the cache."""
        for piece in range(offset // PIECE_BYTES, -(-(offset + length) // PIECE_BYTES)):
            if piece not in self._have:
                await self._fetch(piece)
        data = await to_thread.run_sync(os.pread, self._fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, "the cache has been cut short")
        return data

    async def write(self, offset: int, data: memoryview) -> None:  # noqa: ARG002
        """Never called: the disk is read-only."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async def flush(self) -> None:
        """There is nothing to flush."""

    async def _fetch(self, piece: int) -> None:
        # Several requests may want one piece at once.
        async with self._locks.setdefault(piece, anyio.Lock()):
            if piece in self._have:
                return
            start = piece * PIECE_BYTES
            end = min(start + PIECE_BYTES, self.size_bytes)
            try:
                response = await self._client.get(self.url, headers={"Range": f"bytes={start}-{end - 1}"})
            except httpx.HTTPError as error:
                raise OSError(errno.EIO, f"{self.url}: {error}") from error
            same = response.headers.get("etag") == self._etag
            if response.status_code != 206 or len(response.content) != end - start or not same:
                raise OSError(errno.EIO, f"{self.url}: bytes {start} to {end}: status {response.status_code}")
            await to_thread.run_sync(os.pwrite, self._fd, response.content, start)
            self._have.add(piece)
            del self._locks[piece]


class RangeServer(BaseHTTPRequestHandler):
    """Serves one file by ranges."""

    protocol_version = "HTTP/1.1"

    def __init__(self, content: bytes | bytearray, ranges: list[str], *arguments: object) -> None:
        self.content, self.ranges = content, ranges
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        """How large it is."""
        self._answer(200, len(self.content))

    def do_GET(self) -> None:
        """One range of it."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert wanted
        self.ranges.append(wanted[0])
        part = self.content[int(wanted[1]) : int(wanted[2]) + 1]
        self._answer(206, len(part))
        self.wfile.write(part)

    def _answer(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{zlib.crc32(self.content):x}"')
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(content: bytes | bytearray, ranges: list[str]) -> Iterator[str]:
    """Serve the content in threads; ``ranges`` records what was asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeServer, content, ranges)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/disk.img"
        finally:
            server.shutdown()
            thread.join()


async def main() -> None:
    """Read and write the disk as a guest would, and show what of it was fetched."""
    content = bytes(range(256)) * 4096
    ranges: list[str] = []
    with tempfile.TemporaryDirectory() as directory, serving(content, ranges) as url:
        async with block.Overlay(HttpDisk(url, Path(directory, "cache"))) as disk:
            print(f"a disk of {disk.size_bytes} bytes")
            for offset in (0, 4096, 700_416):
                assert bytes(await disk.read(offset, 4096)) == content[offset : offset + 4096]
            await disk.write(0, memoryview(b"changed!" * 512))
            assert bytes(await disk.read(0, 8192)) == b"changed!" * 512 + content[4096:8192]
        for wanted in ranges:
            print("fetched", wanted)


if __name__ == "__main__":
    anyio.run(main)
