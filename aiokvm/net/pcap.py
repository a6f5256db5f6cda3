"""Recording frames: in C as they pass, written to a file by a worker thread."""

from __future__ import annotations

import os
import select
import stat
import time
from typing import TYPE_CHECKING, Protocol

import anyio
from anyio import to_thread

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, shown
from aiokvm.errors import AiokvmError, ConfigError
from aiokvm.logs import SeldomLogger
from aiokvm.proto import pcapng
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from aiokvm._core import Pointer
    from aiokvm.aio import Loop, Task
    from aiokvm.net.plane import End

logger = get_logger("aiokvm.net")

# What was captured is written when it is this old, or when half of the buffer is full.
FLUSH_S = 0.25
# How long a pipe that nobody reads holds back the end of a capture.
STALLED_S = 5.0
MIN_BUFFER_BYTES = 1 << 18


class Writable(Protocol):
    """A binary file."""

    def write(self, data: memoryview, /) -> int | None: ...


@owned
class Pcap:
    """A pcapng file of the frames that pass the backends whose ``tap`` it is: one interface for each.

    ``file`` is a path, which is written anew, or a binary file that stays open; its ``write`` is called in
    a worker thread, and may block for as long as it does not block for ever. A path may be a named pipe that
    has a reader, such as tshark's.

    Of each frame ``snaplen`` bytes are kept. Frames wait in ``buffer_bytes`` of memory until they are
    written; if the disk is slower than the traffic, what finds no room is left out and counted. Recording
    ends at ``limit_bytes`` of packets, or when writing fails: that is logged once and in `error`, and the
    traffic goes on. The file is complete when the last backend has been closed; if one is opened after that
    it goes on with a new section.

    Frames are recorded as they pass: a checksum that is left to be filled in by the receiver is not in
    there, and a frame may be longer than the MTU if segmentation is left to the receiver. "Inbound" goes to
    the guest. Times are the host's, in nanoseconds. Raises ConfigError for sizes that cannot be.
    """

    @checked
    def __init__(
        self,
        file: str | os.PathLike[str] | Writable,
        *,
        snaplen: int = 262144,
        buffer_bytes: int = 8 << 20,
        limit_bytes: int | None = None,
    ) -> None:
        if not isinstance(file, str | os.PathLike) and not callable(getattr(file, "write", None)):
            raise ConfigError(f"Pcap: file={shown(file)}: give a path or a binary file")
        if not 14 <= snaplen <= 262144:
            raise ConfigError(f"snaplen is 14 to 262144 bytes, not {snaplen}")
        if not MIN_BUFFER_BYTES <= buffer_bytes <= 1 << 32:
            raise ConfigError(f"buffer_bytes is {MIN_BUFFER_BYTES} to {1 << 32}, not {buffer_bytes}")
        if limit_bytes is not None and limit_bytes <= 0:
            raise ConfigError(f"limit_bytes is above 0, or None for no limit; not {limit_bytes}")
        self.error: Exception | None = None
        """Why the capture has ended before its time."""
        self._file = file
        self._snaplen = snaplen
        self._buffer_bytes = buffer_bytes
        self._left_bytes = limit_bytes
        self._began = False
        self._loop: Loop | None = None
        self._lock: anyio.Lock | None = None
        self._section: _Section | None = None
        self._frames = self._dropped = 0

    @property
    def _owner(self) -> Loop | None:
        return self._loop if self._section else None

    @property
    def frames(self) -> int:
        """How many frames there were to be recorded, those left out included."""
        return self._frames + (self._section.counts()[0] if self._section else 0)

    @property
    def dropped(self) -> int:
        """How many of them were left out because writing was slower."""
        return self._dropped + (self._section.counts()[1] if self._section else 0)

    async def flush(self) -> None:
        """Write what has been recorded so far. It returns also when writing has failed: see `error`."""
        if self._section:
            await self._section.flush()

    async def _attach(self, end: End, name: str) -> Capture:
        """Record this end from its `set_policy` on. Raises OSError if the file cannot be opened."""
        loop = end.plane.loop
        if self._section is None and not (self._lock and self._lock.locked()):
            # Not in use: what it had of another loop is of no use here.
            self._loop, self._lock = loop, anyio.Lock()
        if self._loop != loop:
            raise ConfigError("a capture belongs to one event loop: take another for the other loop")
        assert self._lock
        async with self._lock:
            if self._section is None:
                self._section = await self._begin(loop)
            try:
                return self._section.add(end, name)
            except BaseException:
                await loop.uncancelled(self._end_if_unused)
                raise

    async def _begin(self, loop: Loop) -> _Section:
        sinks: list[_Sink] = []
        try:
            await loop.uncancelled(
                lambda: to_thread.run_sync(lambda: sinks.append(_Sink(self._file, append=self._began)))
            )
            section = _Section(loop, sinks[0], self)
        except BaseException:
            for sink in sinks:
                sink.close()
            raise
        self._began = True
        self.error = None
        return section

    async def _detach(self, capture: Capture) -> None:
        assert self._lock
        async with self._lock:
            frames, dropped = capture.section.remove(capture)
            self._frames += frames
            self._dropped += dropped
            await self._end_if_unused()

    async def _end_if_unused(self) -> None:
        section = self._section
        if section is None or section.captures:
            return
        await section.close()
        self._section = None
        if self._left_bytes is not None:
            self._left_bytes = max(self._left_bytes - section.recorded_bytes, 1)


class Capture:
    """One interface of a capture; ``core`` is the ``struct aiokvm_net_capture *``."""

    def __init__(self, pcap: Pcap, section: _Section, end: End, index: int) -> None:
        error = ffi.new("int *")
        core = lib.aiokvm_net_capture_new(section.core, index, error)
        if not core:
            raise AiokvmError(f"no capture: {os.strerror(error[0])}")
        self.core: Pointer = ffi.gc(core, lib.aiokvm_net_capture_free)
        self.section = section
        self.end = end
        self.index = index
        self._pcap = pcap

    def counts(self) -> tuple[int, int]:
        """Frames, and those left out."""
        frames, dropped = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.aiokvm_net_capture_counts(self.core, frames, dropped)
        return int(frames[0]), int(dropped[0])

    async def close(self) -> None:
        """Let go; the last one of a file waits until all is written. The end is closed."""
        await self._pcap._detach(self)


class _Section:
    """One opening of the file: what is recorded, and the task that writes it."""

    def __init__(self, loop: Loop, sink: _Sink, pcap: Pcap) -> None:
        error = ffi.new("int *")
        core = lib.aiokvm_net_recording_new(
            min(pcap._snaplen, lib.AIOKVM_NET_MAX_FRAME),
            pcap._buffer_bytes // 2,
            pcap._left_bytes or 0,
            error,
        )
        if not core:
            raise AiokvmError(f"no memory for a capture: {os.strerror(error[0])}")
        self.core: Pointer = ffi.gc(core, lib.aiokvm_net_recording_free)
        self.loop = loop
        self.captures: list[Capture] = []
        self.recorded_bytes = 0
        self._pcap = pcap
        self._log = SeldomLogger(logger)
        self._sink = sink
        self._data = ffi.new("uint8_t **")
        self._count = 0
        self._blocks = [pcapng.section_header("aiokvm")]
        self._begun, self._due = anyio.Event(), anyio.Event()
        self._waiting: list[anyio.Event] = []
        self._closing = self._ended = False
        self._task: Task = loop.spawn(self._write_all, "aiokvm capture")

    def add(self, end: End, name: str) -> Capture:
        capture = Capture(self._pcap, self, end, self._count)
        self._count += 1
        # It is written before the packets that are taken after it.
        self._blocks.append(pcapng.interface_description(pcapng.Interface(name, self._pcap._snaplen)))
        self._begun.set()
        self.captures.append(capture)
        end.subscribe(lib.AIOKVM_NET_NEWS_CAPTURED, self._on_captured)
        return capture

    def remove(self, capture: Capture) -> tuple[int, int]:
        self.captures.remove(capture)
        capture.end.unsubscribe(lib.AIOKVM_NET_NEWS_CAPTURED)
        frames, dropped = capture.counts()
        counted = pcapng.Statistics(capture.index, time.time_ns(), frames, dropped)
        self._blocks.append(pcapng.statistics(counted))
        self._begun.set()
        return frames, dropped

    def counts(self) -> tuple[int, int]:
        all_counts = [capture.counts() for capture in self.captures]
        return sum(frames for frames, _ in all_counts), sum(dropped for _, dropped in all_counts)

    async def flush(self) -> None:
        if self._ended:
            return
        written = anyio.Event()
        self._waiting.append(written)
        self._begun.set()
        self._due.set()
        await written.wait()

    async def close(self) -> None:
        self._closing = self._sink.hurry = True
        self._begun.set()
        self._due.set()
        # What is in the buffer is wanted most when everything is cancelled.
        await self.loop.uncancelled(self._task.wait)

    def _on_captured(self) -> None:
        self._begun.set()
        half = lib.aiokvm_net_recording_pending(self.core) * 4 >= self._pcap._buffer_bytes
        if half or lib.aiokvm_net_recording_ended(self.core):
            self._due.set()

    async def _write_all(self) -> None:
        try:
            while not self._closing or self._blocks or lib.aiokvm_net_recording_pending(self.core):
                await self._begun.wait()
                with anyio.move_on_after(FLUSH_S):
                    await self._due.wait()
                if not self._closing:
                    self._begun, self._due = anyio.Event(), anyio.Event()
                await self._write_once()
        except Exception as error:
            self._pcap.error = error
            self._log.error("the capture to %s ends here, it cannot be written: %s", self._sink.name, error)
        finally:
            lib.aiokvm_net_recording_end(self.core)
            self._ended = True
            for written in self._waiting:
                written.set()
            self._sink.close()

    async def _write_once(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            blocks, self._blocks = self._blocks, []
            # Both are taken without anything between them: a description is before its packets.
            size = lib.aiokvm_net_recording_take(self.core, self._data)
            self.recorded_bytes += size
            parts = [memoryview(b"".join(blocks)), memoryview(ffi.buffer(self._data[0], size))]
            await to_thread.run_sync(self._sink.write, parts)
        finally:
            for written in waiting:
                written.set()


class _Sink:
    """Where the file's bytes go; all but `close` may take its time, in a worker thread."""

    def __init__(self, file: str | os.PathLike[str] | Writable, append: bool) -> None:
        self.hurry = False
        self._fd: int | None = None
        self._file: Writable | None = None
        if not isinstance(file, str | os.PathLike):
            self._file = file
            self.name = str(getattr(file, "name", file))
            return
        self.name = os.fspath(file)
        # A named pipe without a reader is an error, not something to wait for.
        flags = (
            os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_APPEND if append else os.O_TRUNC)
        )
        try:
            self._fd = os.open(file, flags, 0o666)
        except ValueError as error:
            raise ConfigError(f"cannot record in {self.name!r}: no file has such a name ({error})") from None
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.set_blocking(self._fd, True)

    def write(self, parts: list[memoryview]) -> None:
        for part in parts:
            while part:
                part = part[self._write_some(part) :]
        if self._file and (flush := getattr(self._file, "flush", None)):
            flush()

    def _write_some(self, part: memoryview) -> int:
        if self._file:
            written = self._file.write(part)
            # Files of a simple kind do not say.
            return len(part) if written is None else written
        assert self._fd is not None
        stalled_s = 0.0
        while True:
            try:
                return os.write(self._fd, part)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                if not poll.poll(100) and self.hurry:
                    stalled_s += 0.1
                if stalled_s >= STALLED_S:
                    raise TimeoutError(f"nobody has read for {STALLED_S:g} s") from None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
