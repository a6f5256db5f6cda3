"""The lines of HTTP/1.1 messages, looked at before h11 does.

h11's patterns for a header and for the beginning of a chunk go through a line again and again if it has many
blanks and something behind them that does not fit: a guest's 64 KiB took 10 s. What makes them fail there is
found here, in one pass, and refused.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h11

# Of a request line with its headers, and of the trailers of a body.
HEAD_BYTES = 16 << 10

# RFC 9112, section 2.2: a line ends with LF, with or without CR.
_END = re.compile(rb"\n\r?\n")
# RFC 9110, section 5.5: what a header's value cannot have; h11 leaves further control characters to others.
_WRONG = re.compile(rb"[\x00\v\f]|\r(?!\n)")


class _Next(enum.Enum):
    """What the next bytes are."""

    HEAD = enum.auto()
    CHUNK = enum.auto()
    TRAILERS = enum.auto()
    DATA = enum.auto()


class Lines:
    """The events of ``http``, a connection of a server, whose lines are looked at."""

    def __init__(self, library: Any, http: h11.Connection) -> None:
        self._h11 = library
        self._http = http
        self._next = _Next.HEAD

    def next_event(self) -> Any:
        """As `h11.Connection.next_event`. Raises its RemoteProtocolError also for lines that are too long."""
        if self._next is not _Next.DATA:
            self._look(self._http.trailing_data[0])
        event = self._http.next_event()
        if isinstance(event, self._h11.Request):
            chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            self._next = _Next.CHUNK if chunked else _Next.DATA
        elif isinstance(event, self._h11.Data) and event.chunk_end:
            self._next = _Next.CHUNK
        elif isinstance(event, self._h11.EndOfMessage):
            self._next = _Next.HEAD
        return event

    def _look(self, data: bytes) -> None:
        if self._next is _Next.CHUNK:
            # What h11 has left of the CRLF of the chunk before, and RFC 9112, section 7.1.
            line, end, data = data.removeprefix(b"\r").removeprefix(b"\n").partition(b"\r\n")
            if not end:
                return
            if b"\n" in line:
                self._refuse("the beginning of a chunk is two lines")
            is_last = not line.partition(b";")[0].strip(b"0 \t")
            self._next = _Next.TRAILERS if is_last else _Next.DATA
        if self._next is _Next.DATA or data.startswith((b"\n", b"\r\n")):
            return  # there are no lines
        if end_of_lines := _END.search(data):
            if end_of_lines.start() > HEAD_BYTES:
                self._refuse("the headers are too long", 431)
            if wrong := _WRONG.search(data, 0, end_of_lines.end()):
                self._refuse(f"a header has {wrong[0]!r} in it")

    def _refuse(self, why: str, status: int = 400) -> None:
        raise self._h11.RemoteProtocolError(why, error_status_hint=status)
