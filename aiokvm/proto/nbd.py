"""The client's side of the NBD protocol: bytes in, bytes and replies out.

Follows https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: the fixed newstyle negotiation
with NBD_OPT_STRUCTURED_REPLY and NBD_OPT_GO, then requests with simple and structured replies. Neither TLS
nor block status nor extended headers. The server is not trusted: every length is checked before anything is
stored, and `NbdError` ends the connection. All numbers are big-endian.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from aiokvm.errors import ConfigError, NbdError
from aiokvm.text import printable

if TYPE_CHECKING:
    from collections.abc import Generator

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
CLISERV_MAGIC = 0x00420281861253  # of the oldstyle negotiation
NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES = 1, 2
NBD_OPT_ABORT, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY = 2, 7, 8
NBD_OPT_REPLY_MAGIC = 0x3E889045565A9
NBD_REP_ACK, NBD_REP_INFO = 1, 3
NBD_REP_FLAG_ERROR = 1 << 31
NBD_REP_ERR_UNSUP, NBD_REP_ERR_POLICY, NBD_REP_ERR_INVALID, NBD_REP_ERR_PLATFORM, NBD_REP_ERR_TLS_REQD = (
    NBD_REP_FLAG_ERROR | number for number in range(1, 6)
)
NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_BLOCK_SIZE_REQD, NBD_REP_ERR_TOO_BIG = (
    NBD_REP_FLAG_ERROR | number for number in range(6, 10)
)
NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE = 0, 3
NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA = 1, 2, 4, 8
NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, NBD_FLAG_CAN_MULTI_CONN = 1 << 5, 1 << 6, 1 << 8
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES = (
    0,
    1,
    2,
    3,
    4,
    6,
)
NBD_CMD_FLAG_NO_HOLE = 1 << 1
NBD_REPLY_FLAG_DONE = 1
NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE = 0, 1, 2
NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET = 1 << 15 | 1, 1 << 15 | 2
NBD_REPLY_FLAG_ERROR = 1 << 15

DEFAULT_PORT = 10809
STRING_MAX_BYTES = 4096
"""Of an export's name and of an error message; the protocol's own limit."""
OPTION_REPLY_MAX_BYTES = 1 << 16
OPTION_REPLIES_MAX = 64
"""A server that tells more about one export than this is not asked on."""
PIECES_MAX = 1024
"""Of a read's reply, how many pieces may lie apart from each other before the gaps are filled."""
ERRORS_MAX = 64
"""Of one reply: other chunks bring some of the data, and so come to an end."""
STEPS_AT_ONCE = 1024
"""Headers, messages and pieces of what a server has sent that are looked at in one go: a millisecond."""
STEP_CHARACTERS = 16
"""Of a message whose escaping takes as long as a step."""
STEP_BYTES = 2048
"""Of memory for what is read that take as long to make as a step."""
DEFAULT_MAX_REQUEST_BYTES = 32 << 20
"""What a server takes that does not say what it takes."""

_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_REQUEST = struct.Struct(">IHHQQI")
_MAGIC = struct.Struct(">I")
_SIMPLE_REPLY = struct.Struct(">IQ")  # after its magic
_CHUNK = struct.Struct(">HHQI")  # after its magic
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")

# The protocol's error numbers are Linux's. Any other counts as EIO.
_ERRORS = {
    *(errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW),
    *(errno.ENOTSUP, errno.ESHUTDOWN),
}
_REFUSALS = {
    NBD_REP_ERR_UNSUP: (errno.EPROTO, "does not know NBD_OPT_GO: it is too old"),
    NBD_REP_ERR_POLICY: (errno.EACCES, "is configured not to allow it"),
    NBD_REP_ERR_INVALID: (errno.EPROTO, "takes the request for invalid"),
    NBD_REP_ERR_PLATFORM: (errno.ENOTSUP, "cannot do that on its platform"),
    NBD_REP_ERR_TLS_REQD: (errno.ENOTSUP, "wants TLS, which aiokvm does not speak"),
    NBD_REP_ERR_UNKNOWN: (errno.ENOENT, "has no such export"),
    NBD_REP_ERR_SHUTDOWN: (errno.ESHUTDOWN, "is shutting down"),
    NBD_REP_ERR_BLOCK_SIZE_REQD: (errno.EPROTO, "wants to be asked for block sizes, and was"),
    NBD_REP_ERR_TOO_BIG: (errno.EPROTO, "finds the request too big"),
}

# A generator that yields how many bytes it wants next, or memory that is to be filled with what comes next.
Steps: TypeAlias = "Generator[int | memoryview, bytes, None]"


def _broken(what: str) -> NbdError:
    return NbdError(errno.EPROTO, f"the NBD server broke the protocol: {what}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, by ``host`` and ``port`` or by a Unix socket's path, and which export is wanted."""

    host: str
    port: int
    socket: str
    export: str


def parse_uri(uri: str) -> Address:
    """An NBD URI: nbd://host[:port]/export or nbd+unix:///export?socket=path.

    Follows https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md. Raises ConfigError.
    """

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"{uri!r} {why}: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")

    try:
        uri.encode()
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port
        query = parse_qs(parts.query, strict_parsing=True, errors="surrogateescape") if parts.query else {}
    except ValueError:
        raise wrong("is no URI") from None
    if parts.scheme not in ("nbd", "nbd+unix"):
        tls = " with TLS, which aiokvm does not speak" if parts.scheme.startswith("nbds") else ""
        raise wrong(f"is no NBD URI that can be used{tls}")
    sockets = query.pop("socket", [])
    if query or parts.fragment or parts.username is not None:
        raise wrong("says something that means nothing here")
    export = unquote(parts.path[1:])
    if len(export.encode()) > STRING_MAX_BYTES or "\0" in export:
        raise wrong("names an export that cannot be")
    if parts.scheme == "nbd":
        if sockets or not host:
            raise wrong("has a socket" if sockets else "names no host")
        return Address(host, DEFAULT_PORT if port is None else port, "", export)
    if len(sockets) != 1 or parts.netloc:
        raise wrong("has a host" if parts.netloc else "names no socket, or several")
    return Address("", 0, sockets[0], export)


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says about an export: its size, flags (NBD_FLAG_*), and what requests it takes."""

    size_bytes: int
    flags: int
    min_block_bytes: int = 1
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    structured: bool = False


class _Parser:
    """Feeds a generator of `Steps`, so many of them at a time; ``more``: what was fed has more to look at."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._pending = bytearray()
        self._want: int | memoryview = next(steps)
        self._rest: bytes | memoryview = b""
        self.more = False
        self.done = False
        self.left = 0
        """Steps until the end of this go; what takes long takes some more of them."""

    def feed(self, data: bytes | memoryview) -> None:
        if self._rest:
            data = b"".join((self._rest, data)) if data else self._rest
        view = memoryview(data)
        self._rest, self.more = b"", False
        self.left = STEPS_AT_ONCE
        while not self.done:
            if self.left <= 0:
                self._rest, self.more = view, True
                return
            self.left -= 1
            want = self._want
            if isinstance(want, memoryview):
                count = min(len(want), len(view))
                want[:count] = view[:count]
                self._want = want[count:]
                complete = count == len(want)
            else:
                count = min(want - len(self._pending), len(view))
                self._pending += view[:count]
                complete = len(self._pending) == want
            view = view[count:]
            if not complete:
                return
            got = bytes(self._pending)
            self._pending.clear()
            try:
                self._want = self._steps.send(got)
            except StopIteration:
                self.done = True
        if view:
            raise _broken("it sends what it was not asked for")


class Handshake:
    """The negotiation of one export.

    `feed` takes what the server sends and returns what to send next; ``result`` is None until the server has
    agreed. NbdError if it refuses, or breaks the protocol.
    """

    def __init__(self, export: str) -> None:
        self.result: Export | None = None
        self._export = export.encode()
        self._out = bytearray()
        self._parser = _Parser(self._run())

    def feed(self, data: bytes) -> bytes:
        """What the server has sent, in pieces of any size; returns what is to be sent."""
        self._parser.feed(data)
        out = bytes(self._out)
        self._out.clear()
        return out

    def _run(self) -> Steps:
        magic, kind, flags = _GREETING.unpack((yield _GREETING.size))
        if magic != NBDMAGIC:
            raise _broken("it does not greet as an NBD server does")
        if kind == CLISERV_MAGIC or (kind == IHAVEOPT and not flags & NBD_FLAG_FIXED_NEWSTYLE):
            raise NbdError(errno.EPROTO, "the NBD server is too old: it cannot negotiate (fixed newstyle)")
        if kind != IHAVEOPT:
            raise _broken("it does not greet as an NBD server does")
        self._out += struct.pack(">I", flags & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))
        self._option(NBD_OPT_STRUCTURED_REPLY, b"")
        reply, data = yield from self._reply(NBD_OPT_STRUCTURED_REPLY)
        if reply == NBD_REP_ACK and data:
            raise _broken("an NBD_REP_ACK with data")
        structured = reply == NBD_REP_ACK
        if not structured and not reply & NBD_REP_FLAG_ERROR:
            raise _broken(f"reply {reply:#x} to NBD_OPT_STRUCTURED_REPLY")
        wanted = struct.pack(">HH", 1, NBD_INFO_BLOCK_SIZE)
        self._option(NBD_OPT_GO, struct.pack(">I", len(self._export)) + self._export + wanted)
        size_bytes, transmission_flags = -1, 0
        smallest, largest = 1, DEFAULT_MAX_REQUEST_BYTES
        for _ in range(OPTION_REPLIES_MAX):
            reply, data = yield from self._reply(NBD_OPT_GO)
            if reply == NBD_REP_ACK:
                if data or size_bytes < 0:
                    raise _broken("it agrees without saying how large the export is")
                self.result = Export(size_bytes, transmission_flags, smallest, largest, structured)
                return
            if reply & NBD_REP_FLAG_ERROR:
                raise self._refusal(reply, data)
            if reply != NBD_REP_INFO or len(data) < 2:
                raise _broken(f"reply {reply:#x} to NBD_OPT_GO")
            info = int.from_bytes(data[:2], "big")
            if info == NBD_INFO_EXPORT:
                size_bytes, transmission_flags = self._info_export(data)
            elif info == NBD_INFO_BLOCK_SIZE:
                smallest, largest = self._info_block_size(data)
        raise _broken(f"more than {OPTION_REPLIES_MAX} replies to one option")

    def _option(self, option: int, data: bytes) -> None:
        self._out += _OPTION.pack(IHAVEOPT, option, len(data)) + data

    def _reply(self, option: int) -> Generator[int | memoryview, bytes, tuple[int, bytes]]:
        magic, echo, reply, length = _OPTION_REPLY.unpack((yield _OPTION_REPLY.size))
        if magic != NBD_OPT_REPLY_MAGIC or echo != option:
            raise _broken(f"no reply to option {option}")
        if length > OPTION_REPLY_MAX_BYTES:
            raise _broken(f"a reply of {length} bytes to option {option}")
        return reply, (yield length)

    def _refusal(self, reply: int, data: bytes) -> NbdError:
        code, why = _REFUSALS.get(reply, (errno.EPROTO, f"refuses with {reply:#x}"))
        said = f" ({_text(data)})" if data else ""
        return NbdError(code, f"the NBD server of export {self._export.decode()!r} {why}{said}")

    @staticmethod
    def _info_export(data: bytes) -> tuple[int, int]:
        if len(data) != _INFO_EXPORT.size:
            raise _broken("NBD_INFO_EXPORT of a wrong length")
        _, size_bytes, flags = _INFO_EXPORT.unpack(data)
        if not flags & NBD_FLAG_HAS_FLAGS or size_bytes >= 1 << 63:
            raise _broken(f"an export of {size_bytes} bytes with flags {flags:#x}")
        return size_bytes, flags

    @staticmethod
    def _info_block_size(data: bytes) -> tuple[int, int]:
        if len(data) != _INFO_BLOCK_SIZE.size:
            raise _broken("NBD_INFO_BLOCK_SIZE of a wrong length")
        _, smallest, preferred, largest = _INFO_BLOCK_SIZE.unpack(data)
        # The protocol's own bounds.
        if (
            smallest & (smallest - 1)
            or not 1 <= smallest <= 1 << 16
            or not max(smallest, 512) <= preferred <= largest
        ):
            raise _broken(f"block sizes {smallest}, {preferred} and {largest}")
        return smallest, largest


class Reply(NamedTuple):
    """A request has ended: with its data, if it was a read, or with an errno and perhaps words about it."""

    cookie: int
    error: int = 0
    message: str = ""
    data: bytearray | None = None


@dataclass(slots=True)
class _Request:
    command: int
    offset: int
    length: int
    data: bytearray | None = None
    error: int = 0
    message: str = ""
    errors: int = 0
    # The ranges that have come, apart from each other and sorted: their starts, and their ends.
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def cover(self, start: int, end: int) -> None:
        """A piece has come, from start to end within the request; NbdError if it cannot be."""
        if not 0 <= start < end <= self.length:
            raise _broken(f"a piece of {end - start} bytes outside of a read of {self.length} bytes")
        at = bisect_left(self.starts, start)
        if (at < len(self.starts) and self.starts[at] < end) or (at and self.ends[at - 1] > start):
            raise _broken("it sends a part of a read twice")
        after = at < len(self.starts) and self.starts[at] == end
        before = at > 0 and self.ends[at - 1] == start
        if before and after:
            self.ends[at - 1] = self.ends.pop(at)
            del self.starts[at]
        elif before:
            self.ends[at - 1] = end
        elif after:
            self.starts[at] = start
        else:
            self.starts.insert(at, start)
            self.ends.insert(at, end)
            if len(self.starts) > PIECES_MAX:
                raise _broken("a read in too many pieces")


class Transmission:
    """The requests of one connection, after its `Handshake`, and their replies."""

    def __init__(self, *, structured: bool) -> None:
        self._structured = structured
        self._requests: dict[int, _Request] = {}
        self._replies: deque[Reply] = deque()
        self._cookies = 0
        self._parser = _Parser(self._run())

    def request(self, command: int, offset: int = 0, length: int = 0, flags: int = 0) -> tuple[int, bytes]:
        """The number of a new request, and its header, which is to be sent, before the data of a write."""
        self._cookies += 1
        cookie = self._cookies
        if command != NBD_CMD_DISC:  # which has no reply
            self._requests[cookie] = _Request(command, offset, length)
        return cookie, _REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)

    def feed(self, data: bytes) -> list[Reply]:
        """What the server has sent, in pieces of any size; returns which requests have ended.

        A server may send many tiny chunks: when enough of them have been looked at, `more` says so, and the
        next call goes on, with nothing new if need be.

        NbdError if the server breaks the protocol: what had ended before is lost with the connection.
        """
        self._parser.feed(data)
        replies = list(self._replies)
        self._replies.clear()
        return replies

    @property
    def more(self) -> bool:
        """Whether `feed` has not looked at all of what it was given yet."""
        return self._parser.more

    def _run(self) -> Steps:
        while True:
            (magic,) = _MAGIC.unpack((yield _MAGIC.size))
            if magic == NBD_SIMPLE_REPLY_MAGIC:
                yield from self._simple()
            elif magic == NBD_STRUCTURED_REPLY_MAGIC and self._structured:
                yield from self._chunk()
            else:
                raise _broken(f"a reply that begins with {magic:#x}")

    def _find(self, cookie: int) -> _Request:
        request = self._requests.get(cookie)
        if request is None:
            raise _broken(f"a reply to request {cookie}, which is not waiting for one")
        return request

    def _memory(self, request: _Request) -> memoryview:
        """Where its data goes."""
        if request.data is None:
            request.data = bytearray(request.length)
            self._parser.left -= request.length // STEP_BYTES
        return memoryview(request.data)

    def _end(self, cookie: int, request: _Request) -> None:
        del self._requests[cookie]
        data = request.data if request.command == NBD_CMD_READ and not request.error else None
        self._replies.append(Reply(cookie, request.error, request.message, data))

    def _simple(self) -> Steps:
        error, cookie = _SIMPLE_REPLY.unpack((yield _SIMPLE_REPLY.size))
        request = self._find(cookie)
        if request.command == NBD_CMD_READ:
            if self._structured:
                raise _broken("a simple reply to a read after it had agreed to structured ones")
            if not error:
                yield self._memory(request)
        request.error = _errno(error)
        self._end(cookie, request)

    def _chunk(self) -> Steps:
        flags, kind, cookie, length = _CHUNK.unpack((yield _CHUNK.size))
        request = self._find(cookie)
        done = bool(flags & NBD_REPLY_FLAG_DONE)
        if kind & NBD_REPLY_FLAG_ERROR:
            yield from self._error(kind, length, request)
        elif kind == NBD_REPLY_TYPE_NONE:
            if length or not done:
                raise _broken("an NBD_REPLY_TYPE_NONE that says something, or is not the last one")
        elif request.command != NBD_CMD_READ:
            raise _broken(f"a chunk of type {kind} in the reply to command {request.command}")
        elif kind == NBD_REPLY_TYPE_OFFSET_DATA:
            if not _OFFSET.size < length <= _OFFSET.size + request.length:
                raise _broken(f"{length} bytes in the reply to a read of {request.length} bytes")
            start = _OFFSET.unpack((yield _OFFSET.size))[0] - request.offset
            end = start + length - _OFFSET.size
            request.cover(start, end)
            yield self._memory(request)[start:end]
        elif kind == NBD_REPLY_TYPE_OFFSET_HOLE:
            if length != _HOLE.size:
                raise _broken(f"a hole described by {length} bytes")
            offset, hole = _HOLE.unpack((yield _HOLE.size))
            request.cover(offset - request.offset, offset - request.offset + hole)
            self._memory(request)
        else:
            raise _broken(f"a chunk of type {kind}")
        if done:
            whole = (request.starts, request.ends) == ([0], [request.length])
            if request.command == NBD_CMD_READ and not request.error and not whole:
                raise _broken("it ends a read before all of it has come")
            self._end(cookie, request)

    def _error(self, kind: int, length: int, request: _Request) -> Steps:
        request.errors += 1
        if request.errors > ERRORS_MAX:
            raise _broken(f"more than {ERRORS_MAX} errors in one reply")
        at_offset = _OFFSET.size if kind == NBD_REPLY_TYPE_ERROR_OFFSET else 0
        if not _ERROR.size + at_offset <= length <= _ERROR.size + STRING_MAX_BYTES + _OFFSET.size:
            raise _broken(f"an error described by {length} bytes")
        error, size = _ERROR.unpack((yield _ERROR.size))
        # Types that are not known yet are errors as well, with anything behind the message.
        rest = length - _ERROR.size - size - at_offset
        if not error or rest < 0 or (rest and kind in (NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET)):
            raise _broken(f"error {error} with a message of {size} bytes in {length} bytes")
        message = yield size
        yield rest + at_offset
        if not request.error:  # the first one says it
            self._parser.left -= size // STEP_CHARACTERS
            request.error, request.message = _errno(error), _text(message)


def _errno(error: int) -> int:
    return error if not error or error in _ERRORS else errno.EIO


def _text(data: bytes) -> str:
    """What a server says, fit for an error of any kind."""
    return printable(data[:STRING_MAX_BYTES].decode(errors="replace"))
