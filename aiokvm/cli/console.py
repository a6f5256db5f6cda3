"""The guest's console on the descriptors of this process: raw terminal, pipes, files."""

from __future__ import annotations

import os
import re
import signal
import stat
import termios
import tty
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.lowlevel

from aiokvm.cli.common import ungrouped
from aiokvm.cli.typed import Frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

ESCAPE = b"\x1d"
"""Ctrl-], which leaves."""
_CHUNK_BYTES = 4096
# Chunks that wait for the guest to listen; a terminal's input beyond that is dropped, as on a serial line.
_WAITING_CHUNKS = 64
# The line that the init of our initramfs says before it runs a command.
_INIT = re.compile(rb"aiokvm: init [0-9.]+\r?\n")
_INIT_MAX = 64


class File(Protocol):
    """What a log is written to."""

    async def write(self, data: bytes, /) -> int:
        """Write all."""


def takes_input(fd: int) -> bool:
    """Tell whether the descriptor may be read: in the background, reading a terminal stops the process."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True  # no terminal, or none with job control


async def read(fd: int, size: int) -> bytes:
    """Return what there is to read, ``size`` bytes at most, when there is something; nothing at its end."""
    while True:
        try:
            await anyio.wait_readable(fd)
        except PermissionError:  # a file, which epoll does not take, and which is always readable
            await anyio.lowlevel.checkpoint()
        try:
            return os.read(fd, size)
        except BlockingIOError:
            continue
        except OSError:  # the terminal is gone
            return b""


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Have the terminal pass every key and byte on as it is; it is as before when the block is left."""
    saved = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        # Not when the terminal has drained: one that is stopped never would. Gone altogether is fine, too.
        with suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, saved)


async def follow_size(fd: int, resize: Callable[[int, int], Awaitable[None]]) -> None:
    """Tell the terminal's rows and columns, now and at each change."""
    with anyio.open_signal_receiver(signal.SIGWINCH) as signals:
        await _tell_size(fd, resize)
        async for _ in signals:
            await _tell_size(fd, resize)


async def _tell_size(fd: int, resize: Callable[[int, int], Awaitable[None]]) -> None:
    with suppress(OSError):  # the terminal is gone
        cols, rows = os.get_terminal_size(fd)
        if cols and rows:
            await resize(rows, cols)


class Output:
    """Bytes to a descriptor, without blocking the loop and without changing what other processes share."""

    def __init__(self, fd: int) -> None:
        self._fd = _own_description(fd)

    async def write(self, data: bytes) -> None:
        """Write all of it, when the other side takes it."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                await anyio.wait_writable(self._fd)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OSError(error.errno, f"cannot write the output: {error.strerror}") from None

    def close(self) -> None:
        """Close what was opened."""
        os.close(self._fd)


def _own_description(fd: int) -> int:
    """Return another descriptor of the same terminal or pipe, that does not block; of a file, a duplicate."""
    if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
        with suppress(OSError):  # a terminal of another user
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(fd)


class InitWatch:
    """Finds where the init of our initramfs begins; with ``command``, separates the command's output.

    ``undo_onlcr`` takes out the CR that the guest's terminal put before every LF, which gives back exactly
    the bytes that the command wrote.
    """

    def __init__(self, *, command: bool = False, undo_onlcr: bool = False) -> None:
        self.started = False
        self._command = command
        self._undo_onlcr = undo_onlcr
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what of the console's output is the boot's and what is to be shown as the output."""
        if self.started:
            return b"", self._output(data)
        if not self._command:
            held = self._held + data
            self.started = _INIT.search(held) is not None
            self._held = b"" if self.started else held[-_INIT_MAX:]
            return b"", data
        self._held += data
        if match := _INIT.search(self._held):
            self.started = True
            boot, rest = self._held[: match.start()], self._held[match.end() :]
            self._held = b""
            return boot, self._output(rest)
        # A line that cannot become the one looked for is not held back.
        end = max(self._held.rfind(b"\n") + 1, len(self._held) - _INIT_MAX)
        boot, self._held = self._held[:end], self._held[end:]
        return boot, b""

    def end(self) -> tuple[bytes, bytes]:
        """Return what was held back, at the end of the console's output."""
        held, self._held = self._held, b""
        if not self._command:
            return b"", b""
        return (b"", held) if self.started else (held, b"")

    def _output(self, data: bytes) -> bytes:
        if not self._undo_onlcr:
            return data
        data = self._held + data
        self._held = b"\r" if data.endswith(b"\r") else b""
        return data[: len(data) - len(self._held)].replace(b"\r\n", b"\n")


class Console:
    """Carries the guest's output to ``output`` (and ``boot``, what came before a command) and input back.

    ``watch`` is None for a guest that is not ours; then input is passed on from `open` on, else from where
    init runs: the kernel drops what comes earlier. ``resize`` is given if the input is `Frames`, and is told
    the rows and columns that they have.
    """

    def __init__(
        self,
        stdin: int,
        output: Output,
        boot: Output,
        log: File | None,
        watch: InitWatch | None,
        resize: Callable[[int, int], Awaitable[None]] | None = None,
    ) -> None:
        self._stdin = stdin
        self._terminal = os.isatty(stdin)
        self._output = output
        self._boot = boot
        self._log = log
        self._watch = watch
        self._resize = resize
        self._listening = anyio.Event()

    def open(self) -> None:
        """The machine runs."""
        if self._watch is None:
            self._listening.set()

    async def show(self, data: bytes) -> None:
        """Pass on what the guest wrote. Raises BrokenPipeError if nobody reads it."""
        if self._log:
            await self._log.write(data)
        if self._watch is None:
            await self._output.write(data)
            return
        await self._write(*self._watch.feed(data))
        if self._watch.started:
            self._listening.set()

    async def end(self) -> None:
        """Pass on what was held back."""
        if self._watch:
            await self._write(*self._watch.end())

    async def keyboard(self, send: Callable[[bytes], Awaitable[None]]) -> bool:
        """Pass input to ``send`` until it ends, then return False, or True if Ctrl-] was typed."""
        if not takes_input(self._stdin):
            return False
        left = False
        sink, source = anyio.create_memory_object_stream[bytes](_WAITING_CHUNKS)
        with ungrouped(), source:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._send, source, send)
                left = await self._receive(sink)
                if left:
                    tasks.cancel_scope.cancel()
        return left

    async def _send(
        self, source: MemoryObjectReceiveStream[bytes], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        await self._listening.wait()
        async for chunk in source:
            await send(chunk)

    async def _receive(self, sink: MemoryObjectSendStream[bytes]) -> bool:
        frames = Frames()
        with sink:
            while chunk := await read(self._stdin, _CHUNK_BYTES):
                if self._resize:
                    for content in frames.feed(chunk):
                        if isinstance(content, bytes):
                            await sink.send(content)
                        else:
                            await self._resize(*content)
                elif not self._terminal:
                    await sink.send(chunk)
                elif ESCAPE in chunk:
                    return True
                else:
                    with suppress(anyio.WouldBlock):
                        sink.send_nowait(chunk)
        return False

    async def _write(self, boot: bytes, output: bytes) -> None:
        await self._boot.write(boot)
        await self._output.write(output)
