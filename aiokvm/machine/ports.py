"""The host's ends of the ports of a virtio console, as a program uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import anyio

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, SerialClosedError
from aiokvm.machine import console as limits
from aiokvm.machine.console import SerialConsole
from aiokvm.virtio.console import MAX_PORTS, NAME_MAX_BYTES, Console, ConsolePort

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiokvm.aio import Loop

# The name of port 0.
FIRST = "hvc0"
# Ports that a machine has queues for at least: some can be added while it runs.
MIN_PORTS = 4
# Handed over at a time.
CHUNK_BYTES = 16 << 10


@owned
class ConsoleStream(SerialConsole):
    """The host's end of a port, read and written as that of a serial port.

    What the guest writes to a terminal, such as hvc0, never waits: output that nobody reads is kept up to
    `OUTPUT_LIMIT` bytes, then the oldest is dropped. Other ports lose nothing: with so much unread, the
    guest's writers wait. (Only an ``expect`` or ``lines`` that needs more than that drops the oldest there.)

    Input waits until the guest has opened the port, and takes it.
    """

    def __init__(self, name: str, *, is_console: bool = False, loop: Loop | None = None) -> None:
        super().__init__(lambda data: self.port.receive(data), loop)
        self.port = ConsolePort(name, self, is_console=is_console)
        self._drops = is_console
        self._opened = anyio.Event()

    def __repr__(self) -> str:
        return f"<ConsoleStream {self.port.name}>"

    # The port's side.

    def room(self) -> int:
        """How much output it takes now."""
        return limits.OUTPUT_LIMIT if self._drops else limits.OUTPUT_LIMIT - len(self._output)

    def on_room(self) -> None:
        """The guest may take input."""
        while chunk := bytes(self._input[:CHUNK_BYTES]):
            taken = self._receive(chunk)
            del self._input[:taken]
            if taken < len(chunk):
                # A driver that gives tiny buffers as fast as they are filled is served in later turns.
                break
        if len(self._input) < limits.INPUT_LIMIT:
            self._wake(self._room)

    def on_guest_open(self, is_open: bool) -> None:
        """The guest opened or closed the port."""
        if is_open:
            self._opened.set()
        else:
            self._opened = anyio.Event()

    def close(self, reason: str = "the machine has ended") -> None:
        """There is no guest behind it any more. Idempotent."""
        super().close(reason)
        self._opened.set()

    # The program's side.

    @property
    def guest_open(self) -> bool:
        """Whether a program in the guest has the port open."""
        return self.port.guest_open

    async def opened(self) -> None:
        """Wait until the guest has opened the port. Raises SerialClosedError if that will not be."""
        while not self.port.guest_open:
            if self._closed:
                raise SerialClosedError(f"{self._closed}: nobody opens port {self.port.name}")
            await self._opened.wait()

    @checked
    def set_open(self, is_open: bool) -> None:
        """Tell the guest that somebody listens here, as it is told first, or nobody: reads end there then."""
        self.port.open(is_open)

    @checked
    def resize(self, cols: int, rows: int) -> None:
        """Tell the guest a terminal's size in characters, 0 to 65535 each. Raises DeviceError."""
        self.port.resize(cols, rows)

    async def _wait_for_output(self, seen: int) -> None:
        drops = self._drops
        # Whoever has seen all of a full buffer and waits needs more than it holds.
        waits = len(self._output) + self.dropped <= seen
        self._drops = drops or (waits and len(self._output) >= limits.OUTPUT_LIMIT)
        try:
            if self._drops is not drops:
                self.port.resume()
            await super()._wait_for_output(seen)
        finally:
            self._drops = drops

    def _take(self, count: int) -> bytes:
        was_full = len(self._output) >= limits.OUTPUT_LIMIT
        data = super()._take(count)
        if was_full and not self._drops:
            self.port.resume()
        return data


@owned
class Consoles(Mapping[str, ConsoleStream]):
    """The ports of a machine's console by name; port 0 is a terminal, "hvc0"."""

    def __init__(self, names: Iterable[str], loop: Loop | None = None) -> None:
        self._owner = loop
        names = (FIRST, *(name for name in names if name != FIRST))
        check_names(names)
        self.device = Console(max(MIN_PORTS, len(names)))
        self._streams: dict[str, ConsoleStream] = {}
        self._closed = False
        for name in names:
            self._add(name)

    def __getitem__(self, name: str) -> ConsoleStream:
        return self._streams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    @checked
    def add(self, name: str) -> ConsoleStream:
        """Give the guest another port. Raises ConfigError for its name, DeviceError if there are too many."""
        check_names((*self._streams, name))
        return self._add(name)

    @checked
    def remove(self, name: str) -> None:
        """Take a port away; readers get what is left. Raises KeyError, and ConfigError for hvc0."""
        if name == FIRST:
            raise ConfigError(f"{FIRST} stays: guests take port 0 for granted")
        stream = self._streams.pop(name)
        self.device.remove_port(stream.port)
        stream.close(f"port {name} was removed")

    def reset(self) -> None:
        """The machine is reset: forget what was sent and not read."""
        for stream in self._streams.values():
            stream.reset()

    def close(self) -> None:
        """The machine has ended. Idempotent."""
        self._owner = None
        for stream in self._streams.values():
            stream.close()

    def _add(self, name: str) -> ConsoleStream:
        stream = ConsoleStream(name, is_console=name == FIRST, loop=self._owner)
        self.device.add_port(stream.port)
        self._streams[name] = stream
        return stream


def check_names(names: tuple[str, ...]) -> None:
    """Raise ConfigError for what the ports of a console cannot be called."""
    if len(names) > MAX_PORTS:
        raise ConfigError(f"{len(names)} console ports: there are at most {MAX_PORTS}, {FIRST} among them")
    for name in names:
        if not name or not name.isprintable() or len(name.encode()) > NAME_MAX_BYTES or "/" in name:
            raise ConfigError(
                f"{name!r} is no name of a console port: 1 to {NAME_MAX_BYTES} printable bytes, no slash"
            )
        if names.count(name) > 1:
            raise ConfigError(f"two console ports are called {name!r}")
