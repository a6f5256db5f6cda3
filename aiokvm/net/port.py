"""The program as the peer: it gets a guest's frames in batches, and sends its own."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, Final, Literal, cast, overload

import anyio

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, checked_late
from aiokvm.errors import ConfigError, StateError
from aiokvm.net.backend import NetBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Unpack

    from typing_extensions import Buffer

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop
    from aiokvm.net.backend import Policy
    from aiokvm.net.plane import End, Plane

# virtio 1.2, section 5.1.6.
VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80

# How long a task may take or send frames before the loop looks at everything else.
_TURN_NS = 500_000
# How much is copied of what it sends before the clock is looked at.
_PIECE_BYTES = 1 << 20
_OFFLOADS = (
    lib.AIOKVM_NET_OFFLOAD_CSUM
    | lib.AIOKVM_NET_OFFLOAD_TSO4
    | lib.AIOKVM_NET_OFFLOAD_TSO6
    | lib.AIOKVM_NET_OFFLOAD_USO
    | lib.AIOKVM_NET_OFFLOAD_ECN
)


class Frame:
    """An Ethernet frame, without its check sequence, and what remains to be done to it.

    ``data`` is the frame from the destination address on. ``needs_csum``: the checksum of TCP or UDP at
    ``csum_start`` + ``csum_offset`` holds that of the pseudo header only, and is to be made over all from
    ``csum_start`` on. ``gso_type`` other than VIRTIO_NET_HDR_GSO_NONE: it is to be cut into segments with
    ``gso_size`` bytes of payload each. virtio 1.2, section 5.1.6.
    """

    __slots__ = ("csum_offset", "csum_start", "data", "gso_size", "gso_type", "needs_csum")

    @checked
    def __init__(
        self,
        data: Buffer,
        *,
        needs_csum: bool = False,
        csum_start: int = 0,
        csum_offset: int = 0,
        gso_type: int = VIRTIO_NET_HDR_GSO_NONE,
        gso_size: int = 0,
    ) -> None:
        self.data = data if isinstance(data, memoryview) else memoryview(data)
        self.needs_csum = needs_csum
        self.csum_start = csum_start
        self.csum_offset = csum_offset
        self.gso_type = gso_type
        self.gso_size = gso_size

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def __len__(self) -> int:
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"<Frame of {len(self)} bytes: {self.data[:16].hex(' ', 2)}>"


class Batch(Sequence[memoryview]):
    """Frames that have come together, each a read-only memoryview of memory that nobody changes any more.

    They are valid for as long as they are kept; one that is kept keeps the memory of its whole batch.
    """

    __slots__ = ("_ends", "_headers", "_view")

    def __init__(
        self, view: memoryview, ends: list[int], headers: list[tuple[int, int, int, int, int]] | None
    ) -> None:
        self._view = view
        self._ends = ends
        self._headers = headers

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return list(self)[index]
        place = range(len(self))[index]
        return self._view[self._ends[place] : self._ends[place + 1]]

    def __iter__(self) -> Iterator[memoryview]:
        view = self._view
        return iter([view[begin:end] for begin, end in pairwise(self._ends)])

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return self._ends[-1] - self._ends[0]

    @checked_late
    def frame(self, index: int) -> Frame:
        """One of them with what the guest left to be done to it."""
        data = self[index]
        if self._headers is None:
            return Frame(data)
        flags, gso_type, gso_size, csum_start, csum_offset = self._headers[index]
        return Frame(
            data,
            needs_csum=bool(flags & VIRTIO_NET_HDR_F_NEEDS_CSUM),
            csum_start=csum_start,
            csum_offset=csum_offset,
            gso_type=gso_type,
            gso_size=gso_size,
        )

    def frames(self) -> Iterator[Frame]:
        """All of them, so."""
        return map(self.frame, range(len(self)))

    def _part(self, begin: int, end: int | None = None) -> Batch:
        stop = len(self) if end is None else min(end, len(self))
        headers = self._headers and self._headers[begin:stop]
        return Batch(self._view, self._ends[begin : stop + 1], headers)


@owned
class _Batches:
    def __init__(self, port: Port, most: int) -> None:
        self._port = port
        self._most = most

    @property
    def _owner(self) -> Loop | None:
        return self._port._owner

    def __aiter__(self) -> _Batches:
        return self

    async def __anext__(self) -> Batch:
        return await self._port._next_batch(self._most)


@owned
class Port(NetBackend):
    """The program itself is connected here.

    Frames from the guest wait in memory of the port's own, up to ``depth`` of them and ``bytes`` bytes,
    until the program takes them: guest memory is never handed out, as the guest could change it meanwhile,
    and would wait for its buffers. When that is full the guest waits (``on_full="block"``, its own queue
    then fills), or frames are dropped and counted (``"drop"``). As many may wait in the other direction. All
    ports and switches of the process share what memory it has for that (`host_limits`).

    Without ``offload`` all frames are whole and have their checksums. With it they come as the guest gave
    them, up to 64 KiB long, and `Frame` says what remains to be done.

    ``async for frame in port`` gives each as a `Frame`; ``async for batch in port.batches()`` is the fast
    way. Both wait while the port is not connected, and end after it is closed and all is taken. Several
    tasks may take: each frame goes to one. Cancelling loses nothing.

    Raises ConfigError for sizes that cannot be.
    """

    @checked
    def __init__(
        self,
        *,
        offload: bool = False,
        depth: int = 1024,
        bytes: int = 2 << 20,  # noqa: A002
        on_full: Literal["block", "drop"] = "block",
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(**policy)
        if not 1 <= depth <= lib.AIOKVM_NET_PORT_MAX_DEPTH:
            raise ConfigError(f"depth is 1 to {lib.AIOKVM_NET_PORT_MAX_DEPTH} frames, not {depth}")
        if not lib.AIOKVM_NET_MAX_FRAME <= bytes < 1 << 31:
            raise ConfigError(
                f"bytes is {lib.AIOKVM_NET_MAX_FRAME}, the longest frame, to 2 GiB, not {bytes}"
            )
        if on_full not in ("block", "drop"):
            raise ConfigError(f"on_full is 'block' or 'drop', not {on_full!r}")
        self._config = ffi.new(
            "struct aiokvm_net_port_config *",
            {
                "depth": depth,
                "bytes": bytes,
                "offloads": _OFFLOADS if offload else 0,
                "drop": on_full == "drop",
            },
        )
        self._batch = ffi.new("struct aiokvm_net_port_batch *")
        # What was taken from the core and given to nobody: `_at` of the first have been.
        self._left: deque[Batch] = deque()
        self._at = 0
        self._closed = False
        self._was_open = False
        self._news = anyio.Event()
        self._turn_ns = 0
        self._sending = anyio.Lock(fast_acquire=True)

    def __repr__(self) -> str:
        return f"<net.Port {'open' if self.end else 'closed' if self._closed else 'not connected'}>"

    @property
    def needs_loop(self) -> bool:
        """The program takes all frames."""
        return True

    # ---- from the guest ----

    def __aiter__(self) -> Port:
        return self

    async def __anext__(self) -> Frame:
        while not self._left:
            self._left.append(await self._next_batch(lib.AIOKVM_NET_PORT_BATCH))
        batch = self._left[0]
        frame = batch.frame(self._at)
        self._at += 1
        if self._at == len(batch):
            self._left.popleft()
            self._at = 0
        return frame

    @checked
    def batches(self, max: int = 64) -> _Batches:  # noqa: A002
        """Frames as they come, at most ``max`` (1 to 256) at a time. Raises ConfigError for other numbers."""
        if not 1 <= max <= lib.AIOKVM_NET_PORT_BATCH:
            raise ConfigError(f"a batch is 1 to {lib.AIOKVM_NET_PORT_BATCH} frames, not {max}")
        return _Batches(self, max)

    @checked_late
    def take_nowait(self, max: int = 64) -> Batch | None:  # noqa: A002
        """The next batch if something has come; None: not now. Raises ConfigError for a ``max`` below 1."""
        if max < 1:
            raise ConfigError(f"a batch is at least 1 frame, not {max}")
        if not self._left:
            return self._take(min(max, lib.AIOKVM_NET_PORT_BATCH))
        batch = self._left.popleft()
        begin, self._at = self._at, 0
        if len(batch) - begin > max:
            self._left.appendleft(batch._part(begin + max))
        return batch._part(begin, begin + max)

    def _take(self, most: int) -> Batch | None:
        end, given = self.end, self._batch
        if end is None:
            return None
        count = lib.aiokvm_net_port_take(end.core, most, given)
        if count <= 0:
            return None
        ends = ffi.unpack(given.ends, count)
        data = bytes(ffi.buffer(given.data, ends[-1]))
        headers = None
        if given.special:
            headers = [
                (each.flags, each.gso_type, each.gso_size, each.csum_start, each.csum_offset)
                for each in given.headers[0:count]
            ]
        lib.aiokvm_net_port_release(end.core, count)
        return Batch(memoryview(data), [0, *ends], headers)

    async def _next_batch(self, most: int) -> Batch:
        await self._let_others()
        while True:
            news = self._news
            if batch := self.take_nowait(most):
                return batch
            if self._closed:
                raise StopAsyncIteration
            await news.wait()
            self._turn_ns = 0

    async def _let_others(self) -> None:
        """A program that always finds something to do would never let the loop go on."""
        if self.end is None:
            return
        loop = self.end.plane.loop
        now_ns = loop.now_ns()
        if not self._turn_ns:
            self._turn_ns = now_ns
        elif now_ns - self._turn_ns > _TURN_NS:
            self._turn_ns = 0
            await loop.turn()

    # ---- to the guest ----

    @checked_late
    def send_nowait(self, frames: Iterable[Buffer | Frame] | Buffer | Frame) -> int:
        """Send frames, or one; returns how many were taken, from the first on.

        The others have no room now, or there is no time for them, as the loop does nothing else meanwhile:
        256 of them, or a MiB, are taken in any case if there is room. A frame is 14 to 65,550 bytes:
        addresses, type, payload. Frames that the guest has no buffers for wait in the port. Raises
        ConfigError for one that cannot be, those before it may have been sent then; StateError if the port is
        not connected.
        """
        outgoing = _outgoing(frames)
        until_ns = 0
        while self._send(outgoing) and not outgoing.is_done:
            now_ns = time.monotonic_ns()
            until_ns = until_ns or now_ns + _TURN_NS
            if outgoing.is_new and now_ns >= until_ns:
                break
        return outgoing.sent

    @checked_late
    async def send(self, frames: Iterable[Buffer | Frame] | Buffer | Frame) -> None:
        """Send all of them, or one, waiting for room where there is none; the loop has turns in between.

        One call's frames are not mixed with another's. Cancelled, it has sent those before some one of them.
        Before the port is first connected it waits. Raises as `send_nowait`; StateError also if the port is
        closed meanwhile.
        """
        outgoing = _outgoing(frames)
        async with self._sending:
            while True:
                await self._let_others()
                news = self._news
                if (self.end or self._closed) and self._send(outgoing):
                    if outgoing.is_done:
                        return
                else:
                    await news.wait()
                    self._turn_ns = 0

    def _send(self, outgoing: _Outgoing) -> bool:
        """Send a batch of them. False: there is no room."""
        if self.end is None:
            raise StateError(f"{self!r}: frames can be sent while a guest is connected to it")
        if outgoing.is_done:
            return True
        taken = lib.aiokvm_net_port_send(self.end.core, *outgoing.next())
        if taken < 0:
            raise ConfigError(f"frame {outgoing.sent} has a header that contradicts it")
        outgoing.advance(taken)
        return bool(taken)

    # ---- its life ----

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:  # noqa: ARG002
        error = ffi.new("int *")
        core = lib.aiokvm_net_port_new(plane.core, self._config, error)
        end = plane.adopt(core, error[0], self._on_news)
        self._closed = False
        # `end` is set by our caller before anyone who waits runs.
        self._tell()
        return end

    async def close(self) -> None:
        """Close it. What has come and was not taken can be taken still."""
        if self.end:
            # Nothing more comes.
            self.end.set_up(False)
        while batch := self._take(lib.AIOKVM_NET_PORT_BATCH):
            self._left.append(batch)
            await self._let_others()
        await super().close()

    async def _wind_down(self, end: End) -> None:
        while end.is_open and lib.aiokvm_net_port_clear_some(end.core) == 1:
            await end.plane.loop.turn()

    async def _close(self) -> None:
        self._closed = True
        self._tell()

    def _on_news(self, news: int, error: int, detail: int) -> None:  # noqa: ARG002
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()


class _Outgoing:
    """Frames of one call. A piece at a time is copied, into one buffer, and has pointers to its frames."""

    __slots__ = (
        "_ahead",
        "_core_sizes",
        "_data",
        "_done",
        "_headers",
        "_offset",
        "_sizes",
        "_source",
        "sent",
    )

    def __init__(self, frames: Iterable[Buffer | Frame]) -> None:
        self.sent = 0
        self._ahead: Sequence[Buffer | Frame] = ()
        self._source: Iterator[Buffer | Frame] | None = None
        if not isinstance(frames, Sequence) or len(frames) > lib.AIOKVM_NET_PORT_BATCH:
            self._source = iter(frames)
            frames = list(islice(self._source, lib.AIOKVM_NET_PORT_BATCH))
        self._copy(frames)

    def _copy(self, frames: Sequence[Buffer | Frame]) -> None:
        pieces = [frame.data if isinstance(frame, Frame) else frame for frame in frames]
        sizes = array("I", map(len, pieces))  # type: ignore[arg-type]
        total = sum(sizes)
        if total > _PIECE_BYTES and len(sizes) > 1:
            count = max(bisect_right(list(accumulate(sizes)), _PIECE_BYTES), 1)
            total = sum(sizes[:count])
            self._ahead = frames[count:]
            frames, pieces, sizes = frames[:count], pieces[:count], sizes[:count]
        joined = b"".join(pieces)
        if total != len(joined):  # a buffer of items that are not bytes
            sizes = array("I", (memoryview(piece).nbytes for piece in pieces))
        if sizes and not (min(sizes) >= lib.AIOKVM_NET_MIN_FRAME and max(sizes) <= lib.AIOKVM_NET_MAX_FRAME):
            wrong = next(number for number, size in enumerate(sizes) if not _can_be(size))
            raise ConfigError(
                f"frame {self.sent + wrong} has {sizes[wrong]} bytes: {lib.AIOKVM_NET_MIN_FRAME}"
                f" to {lib.AIOKVM_NET_MAX_FRAME} are possible"
            )
        self._sizes = sizes
        self._done = self._offset = 0
        self._data = ffi.from_buffer("uint8_t[]", joined)
        self._core_sizes = ffi.from_buffer("uint32_t[]", sizes)
        self._headers: Pointer | None = None
        if any(isinstance(frame, Frame) and frame.needs_csum for frame in frames):
            self._headers = ffi.new("struct aiokvm_net_port_header[]", [_header(frame) for frame in frames])

    @property
    def is_done(self) -> bool:
        """Whether all of them have been sent."""
        return self._done == len(self._sizes)

    @property
    def is_new(self) -> bool:
        """Whether nothing of this piece has been sent."""
        return not self._done

    def next(self) -> tuple[Pointer, Pointer, Pointer, int]:
        """Data, sizes, headers and number of those that are to be sent next."""
        return (
            self._data + self._offset,
            self._core_sizes + self._done,
            self._headers + self._done if self._headers else ffi.NULL,
            len(self._sizes) - self._done,
        )

    def advance(self, count: int) -> None:
        """So many of them have been sent. Raises ConfigError for one that follows and cannot be."""
        self._offset += sum(self._sizes[self._done : self._done + count])
        self._done += count
        self.sent += count
        if self.is_done and (self._ahead or self._source):
            ahead, self._ahead = self._ahead, ()
            self._copy(ahead or list(islice(self._source or (), lib.AIOKVM_NET_PORT_BATCH)))


def _can_be(size: int) -> bool:
    return bool(lib.AIOKVM_NET_MIN_FRAME <= size <= lib.AIOKVM_NET_MAX_FRAME)


def _header(frame: Buffer | Frame) -> tuple[int, int, int, int, int]:
    if not isinstance(frame, Frame) or not frame.needs_csum:
        return (0, 0, 0, 0, 0)
    flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    return (flags, frame.gso_type, frame.gso_size, frame.csum_start, frame.csum_offset)


def _outgoing(frames: Iterable[Buffer | Frame] | Buffer | Frame) -> _Outgoing:
    if isinstance(frames, Frame | bytes | bytearray | memoryview):
        return _Outgoing([frames])
    return _Outgoing(cast("Iterable[Buffer | Frame]", frames))
