"""The host's end of a serial port, as a program uses it: send, expect, lines."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

from aiokvm.aio import current_loop
from aiokvm.aio.owner import check_loop, owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, SerialClosedError
from aiokvm.machine.turn import Slice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from aiokvm.aio import Event, Loop

# What the guest has written and nobody has read: room for a whole boot log, a bound for a hostile guest.
OUTPUT_LIMIT = 1 << 20
# What was sent and the guest has not read: `send` waits beyond that.
INPUT_LIMIT = 64 << 10
# What a regular expression is looked for in again when more has come: longer than what people look for.
OVERLAP = 4096
# How much of the output an error message shows.
TAIL = 400


@owned
class SerialConsole:
    """The other end of a guest's serial port.

    Output that nobody reads is kept up to `OUTPUT_LIMIT` bytes; then the oldest is dropped and counted in
    ``dropped``. Input waits until the guest has taken it; nothing of it is lost. One task reads at a time
    (anyio.BusyResourceError otherwise).

    ``receive`` hands bytes to the UART and says how many it took. ``loop`` is the one that it belongs to.
    """

    def __init__(self, receive: Callable[[bytes], int], loop: Loop | None = None) -> None:
        self._receive = receive
        self._owner = loop
        self._output = bytearray()
        self._input = bytearray()
        self._closed = ""
        self._is_read = False
        # What a reader or a sender waits for.
        self._news: Event | None = None
        self._room: Event | None = None
        self._slice = Slice()
        self.dropped = 0
        """Bytes of output that were dropped because nobody read them."""

    # The UART's side.

    def on_transmit(self, data: bytes) -> None:
        """The guest wrote bytes."""
        self._output += data
        excess = len(self._output) - OUTPUT_LIMIT
        if excess > 0:
            del self._output[:excess]
            self.dropped += excess
        self._wake(self._news)

    def on_room(self) -> None:
        """The UART can take more."""
        if self._input:
            del self._input[: self._receive(bytes(self._input[:64]))]
            if len(self._input) < INPUT_LIMIT:
                self._wake(self._room)

    def close(self, reason: str = "the machine has ended") -> None:
        """There is no guest behind it any more: readers get what is left and then the end. Idempotent."""
        self._closed = self._closed or reason
        # What is left may be read anywhere.
        self._owner = None
        self._wake(self._news)
        self._wake(self._room)

    def reset(self) -> None:
        """Forget what was sent and not read: the UART that was to take it has been reset."""
        self._input.clear()
        self._wake(self._room)

    # The program's side.

    @checked
    async def send(self, data: bytes) -> None:
        """Type ``data``. Returns when all of it is on its way, which may take until the guest reads.

        Senders take turns. A cancelled send has sent a part of the data. Raises SerialClosedError if the
        machine has ended.
        """
        async with self._sending:
            await self._let_others()
            for start in range(0, len(data), INPUT_LIMIT):
                part = data[start : start + INPUT_LIMIT]
                while len(self._input) + len(part) > INPUT_LIMIT and not self._closed:
                    self._room = current_loop().event()
                    await self._room.wait()
                if self._closed:
                    raise SerialClosedError(f"{self._closed}: nobody reads what is sent")
                self._input += part
                self.on_room()

    @checked
    async def read(self, limit: int = 65536) -> bytes:
        """At least one and at most ``limit`` bytes of output; b"" when the machine has ended.

        Raises ConfigError for a ``limit`` below 1.
        """
        if limit < 1:
            raise ConfigError(f"limit is {limit}: at least 1 byte is read")
        with self._reading():
            await self._let_others()
            await self._wait_for_output(self.dropped)
            return self._take(min(limit, len(self._output)))

    @checked
    async def expect(
        self, pattern: bytes | re.Pattern[bytes], timeout: float | None = None, *, overlap: int = OVERLAP
    ) -> bytes:
        """Output up to and including the first match of ``pattern``: bytes, or a compiled regular expression.

        What is behind the match stays for the next reader. On TimeoutError (after ``timeout`` seconds),
        SerialClosedError (the machine ended without a match) and cancellation all output stays; the first
        two show its end. A match is looked for in the newest `OUTPUT_LIMIT` bytes.

        Output is searched once, as it comes, and of what was searched only the last ``overlap`` bytes again:
        a regular expression that matches more bytes than that may not be found. Raises ConfigError for one
        that backtracks for seconds on twice as many bytes, and for an ``overlap`` below 1.
        """
        if overlap < 1:
            raise ConfigError(f"overlap is {overlap}: at least 1 byte is searched again")
        shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        with self._reading():
            # Not in the time that it has: what is there already is found whatever that is.
            await self._let_others()
            if isinstance(pattern, re.Pattern):
                place = partial(self._match, pattern, overlap, shown)
            else:
                place = partial(self._find, pattern, shown)
            try:
                end = await current_loop().within(timeout, place)
            except TimeoutError:
                raise TimeoutError(f"no {shown!r} within {timeout} s{self._tail()}") from None
            return self._take(max(0, end - self.dropped))

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of the output, without their CR and LF, until the machine has ended."""
        while True:
            check_loop(self)
            with self._reading():
                await self._let_others()
                searched = self.dropped
                while (end := self._output.find(b"\n", max(0, searched - self.dropped))) < 0:
                    if self._closed:
                        break
                    searched = self._end
                    await self._wait_for_output(searched)
                line = self._take(end + 1 if end >= 0 else len(self._output))
            if not line:
                return
            yield line.rstrip(b"\r\n")

    # Places in the output are counted with what was dropped: they stay what they are when more is.

    @property
    def _end(self) -> int:
        return self.dropped + len(self._output)

    async def _find(self, pattern: bytes, shown: bytes) -> int:
        """The place where the first match ends."""
        searched = self.dropped
        while (found := self._output.find(pattern, max(0, searched - self.dropped))) < 0:
            # A part of it may be there.
            searched = self._end - len(pattern) + 1
            await self._more(self._end, shown)
        return self.dropped + found + len(pattern)

    async def _match(self, pattern: re.Pattern[bytes], overlap: int, shown: bytes) -> int:
        """The same for a regular expression: piece by piece, each with what is before and behind it."""
        from aiokvm.machine.search import compiled, search

        matcher = compiled(pattern)
        begin = self.dropped
        while True:
            size = 2 * overlap
            while True:
                begin = max(begin, self.dropped)
                first = max(begin - overlap, self.dropped)
                text = bytes(self._output[first - self.dropped : begin - self.dropped + size])
                is_last = first + len(text) >= self._end
                match = await search(matcher, text, begin - first)
                if is_last or not match or match.end() < len(text):
                    break
                # It ends where the piece does: it may be longer.
                size *= 2
            if match and (is_last or first + match.start() < begin + overlap):
                return first + match.end()
            if is_last:
                begin = max(begin, first + len(text) - overlap)
                await self._more(first + len(text), shown)
            else:
                begin += overlap
                await current_loop().turn()

    @cached_property
    def _sending(self) -> AbstractAsyncContextManager[object]:
        return current_loop().lock()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        if self._is_read:
            import anyio

            raise anyio.BusyResourceError("reading from")
        self._is_read = True
        try:
            yield
        finally:
            self._is_read = False

    @staticmethod
    def _wake(event: Event | None) -> None:
        if event is not None:
            event.set()

    async def _more(self, seen: int, shown: bytes) -> None:
        """Wait for output behind a place. Raises SerialClosedError when there will be none."""
        if self._closed and self._end <= seen:
            raise SerialClosedError(f"{self._closed} before {shown!r}{self._tail()}")
        await self._wait_for_output(seen)

    async def _let_others(self) -> None:
        """One that never has to wait would never let the loop go on."""
        if self._slice.is_over():
            await current_loop().turn()
            self._slice.begin()

    async def _wait_for_output(self, seen: int) -> None:
        """Wait until more than ``seen`` bytes have come in all, or the end."""
        while self._end <= seen and not self._closed:
            self._news = current_loop().event()
            await self._news.wait()
            self._slice.begin()

    def _take(self, count: int) -> bytes:
        data = bytes(self._output[:count])
        del self._output[:count]
        return data

    def _tail(self) -> str:
        if not self._output:
            return "; there was no further output"
        return f"; the output ends with {bytes(self._output[-TAIL:])!r}"
