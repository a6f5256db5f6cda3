"""What is typed at a terminal, and its size: how a guest and ``aiokvm run`` in the lab hear of them."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from aiokvm import SerialClosedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokvm import SerialConsole

ASKED = b"aiokvm.tty"
"""The line by which a guest asks on its second serial port; ``aiokvm.tty ROWS COLS`` is each answer."""

_HEAD = struct.Struct("<cH")
_SIZE = struct.Struct("<HH")
_DATA_MAX = 0xFFFF


class WindowSize:
    """Tells a guest how large the terminal is, once it has asked."""

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None
        self._asked = False
        self._news = anyio.Event()

    def set(self, rows: int, cols: int) -> None:
        """The terminal is that large now."""
        self._size = rows, cols
        self._news.set()

    async def tell(self, port: SerialConsole) -> None:
        """Answer what asks at the other end of the port, until the machine has ended."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._answer, port)
            async for line in port.lines():
                if line == ASKED:
                    self._asked = True
                    self._news.set()
            tasks.cancel_scope.cancel()

    async def _answer(self, port: SerialConsole) -> None:
        with suppress(SerialClosedError):
            while True:
                await self._news.wait()
                self._news = anyio.Event()
                if self._asked and self._size:
                    await port.send(b"%b %d %d\n" % (ASKED, *self._size))


def typed(data: bytes) -> bytes:
    """Return frames, for `Frames`, with what was typed."""
    parts = (data[start : start + _DATA_MAX] for start in range(0, len(data), _DATA_MAX))
    return b"".join(_HEAD.pack(b"d", len(part)) + part for part in parts)


def resized(rows: int, cols: int) -> bytes:
    """Return a frame, for `Frames`, that tells the size of the terminal."""
    return _HEAD.pack(b"s", _SIZE.size) + _SIZE.pack(rows, cols)


class Frames:
    """Takes frames apart, however they are cut."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[bytes | tuple[int, int]]:
        """Go through what has been typed, and rows and columns as they are told between."""
        self._held += data
        while len(self._held) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._held)
            end = _HEAD.size + length
            if len(self._held) < end:
                return
            content, self._held = self._held[_HEAD.size : end], self._held[end:]
            if kind == b"s":
                rows, cols = _SIZE.unpack(content)
                yield rows, cols
            else:
                yield content
