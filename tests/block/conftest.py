"""A disk in memory that can fail and be held up, and real NBD servers."""

from __future__ import annotations

import errno
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import uvloop

from aiokvm.block import BlockBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

LIMIT_S = 60.0
LOOPS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


class MemoryDisk(BlockBackend):
    """Records what is asked of it; ``fail`` names requests that fail with EIO, ``hold`` those that wait."""

    def __init__(self, data: bytes, *, block_size: int = 512) -> None:
        self.data = bytearray(data)
        self.size_bytes = len(data)
        self.block_size = block_size
        self.discard_granularity_bytes = block_size
        self.asked: list[tuple[str, int, int]] = []
        self.fail: set[str] = set()
        self.hold: dict[str, anyio.Event] = {}
        self.opened = 0

    async def _ask(self, what: str, offset: int = 0, length: int = 0) -> None:
        assert self.opened == 1, "not open"
        if length:
            self.check(offset, length, writes=what not in ("read", "flush"))
        self.asked.append((what, offset, length))
        await anyio.lowlevel.checkpoint()
        if what in self.hold:
            await self.hold[what].wait()
        if what in self.fail:
            raise OSError(errno.EIO, f"{what} fails")

    async def open(self) -> None:
        assert not self.opened, "open twice"
        await anyio.lowlevel.checkpoint()
        self.opened += 1

    async def close(self) -> None:
        self.opened -= 1

    async def read(self, offset: int, length: int) -> bytes:
        await self._ask("read", offset, length)
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: memoryview) -> None:
        await self._ask("write", offset, len(data))
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await self._ask("flush")

    async def discard(self, offset: int, length: int) -> None:
        await self._ask("discard", offset, length)

    async def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:
        await self._ask("write_zeroes", offset, length)
        self.data[offset : offset + length] = bytes(length)


@pytest.fixture
def memory_disk() -> type[MemoryDisk]:
    return MemoryDisk


class Servers:
    """NBD servers on Unix sockets in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def socket(self) -> Path:
        return self._directory / "nbd.sock"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def start(self, *argv: str | Path) -> subprocess.Popen[bytes]:
        """Start one that forks when it listens, as both servers can, and keeps a pid file."""
        self.socket.unlink(missing_ok=True)
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        self._processes.append(process)
        return process

    def nbdkit(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        # -f: in the foreground; it writes the pid file when it is ready to serve.
        ready = self._directory / "ready"
        ready.unlink(missing_ok=True)
        process = self.start("nbdkit", "-f", "-P", ready, "-U", self.socket, *arguments)
        self._until(process, ready)
        return process

    def qemu_nbd(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        ready = self._directory / "ready"
        ready.unlink(missing_ok=True)
        process = self.start(
            "qemu-nbd", "--persistent", "--shared=8", f"--pid-file={ready}", "-k", self.socket, *arguments
        )
        self._until(process, ready)
        return process

    def storage_daemon(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        ready = self._directory / "ready"
        ready.unlink(missing_ok=True)
        process = self.start(
            *("qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={self.socket}"),
            *(*arguments, "--pidfile", ready),
        )
        self._until(process, ready)
        return process

    @staticmethod
    def _until(process: subprocess.Popen[bytes], ready: Path) -> None:
        while not ready.exists() or not ready.read_text().strip():
            assert process.poll() is None, f"{process.args!r} has ended"

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                self.end(process)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def raises_errno(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        yield
    assert caught.value.errno == code, caught.value


@pytest.fixture(name="raises_errno")
def raises_errno_fixture() -> Any:
    return raises_errno


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    """Runs a coroutine function on a loop of its own: for hypothesis, which wants one for each example."""
    backend, options = request.param

    def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT_S):
                await main()

        anyio.run(limited, backend=backend, backend_options=options)

    return run
