"""The console device: ports that carry bytes between the guest and the host. Virtio 1.2, section 5.3.

Port 0 has queues 0 and 1, port n the queues 2n + 2 and 2n + 3; queues 2 and 3 carry control messages. Without
VIRTIO_CONSOLE_F_MULTIPORT there is only port 0.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from aiokvm.errors import DeviceError, VirtqueueError
from aiokvm.virtio.constants import VIRTIO_ID_CONSOLE
from aiokvm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokvm.virtio.queue import Chain, Virtqueue

VIRTIO_CONSOLE_F_SIZE = 1 << 0
VIRTIO_CONSOLE_F_MULTIPORT = 1 << 1
VIRTIO_CONSOLE_F_EMERG_WRITE = 1 << 2

VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_REMOVE = 2
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7

CONTROL_RECEIVEQ = 2
CONTROL_TRANSMITQ = 3

# A port's queues: room for a screen of lines, and little memory.
QUEUE_SIZE = 128
# Linux numbers its queues with no more than that, and each takes an eventfd.
MAX_PORTS = 31
# The name's message has to fit a driver's buffer, a page in Linux.
NAME_MAX_BYTES = 256
# Control messages that are read before the loop has a turn: each may be about all ports.
CONTROL_BATCH = 32
# Output that is copied before the loop has a turn.
TRANSMIT_BYTES = 256 << 10

_CONTROL = struct.Struct("<IHH")
_CONFIG = struct.Struct("<HHII")
_EMERG_WR = 8


class PortEnd(Protocol):
    """The host's end of a port."""

    def room(self) -> int:
        """How many bytes of output it takes now; at 0 they wait in the queue until `ConsolePort.resume`."""

    def on_transmit(self, data: bytes) -> None:
        """The guest wrote bytes, no more than there was room."""

    def on_room(self) -> None:
        """The guest may take input: `ConsolePort.receive`."""

    def on_guest_open(self, is_open: bool) -> None:
        """The guest opened or closed the port."""


class ConsolePort:
    """A port. ``name`` is how the guest finds it, of up to 256 bytes in UTF-8.

    ``is_console`` ports are terminals, Linux's hvc0 and so on; others are plain channels.
    """

    def __init__(self, name: str, end: PortEnd, *, is_console: bool = False) -> None:
        if len(name.encode()) > NAME_MAX_BYTES:
            raise DeviceError(f"a port's name has at most {NAME_MAX_BYTES} bytes, not {len(name.encode())}")
        self.name = name
        self.end = end
        self.is_console = is_console
        self.id = -1
        """The port's number; -1 while it belongs to no device."""
        self.cols = self.rows = 0
        """The terminal's size in characters; 0 if it is not known."""
        self.host_open = True
        self.guest_open = False
        """Whether the guest has opened it: it takes no input before."""
        self._console: Console | None = None
        # Whether VIRTIO_CONSOLE_PORT_ADD has reached the driver.
        self._added = False
        # A chain of output that has not wholly fitted the host's end, and the bytes of it that are left.
        self._held: Chain | None = None
        self._left = 0

    def receive(self, data: bytes) -> int:
        """Input for the guest; how many bytes of it fitted the buffers that the driver has given."""
        return self._console._receive(self, data) if self._console else 0

    def resume(self) -> None:
        """The host's end has room again."""
        if self._console:
            self._console.notified(self._transmitq)

    def open(self, is_open: bool) -> None:
        """Tell the guest that somebody listens at the host's end, or nobody."""
        self.host_open = is_open
        if self._console:
            self._console._tell(self, VIRTIO_CONSOLE_PORT_OPEN, int(is_open))

    def resize(self, cols: int, rows: int) -> None:
        """The terminal has a new size, in characters, 0 to 65535 each."""
        if not (0 <= cols <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise DeviceError(f"a terminal has 0 to 65535 columns and rows, not {cols} and {rows}")
        self.cols, self.rows = cols, rows
        if self._console:
            self._console._resized(self)

    @property
    def _receiveq(self) -> int:
        return 2 * self.id + 2 if self.id else 0

    @property
    def _transmitq(self) -> int:
        return self._receiveq + 1


class Console(VirtioDevice):
    """A console with up to ``max_nr_ports`` ports, which come and go at any time.

    ``ports`` has them by number; ``ignored`` counts control messages of the driver that made no sense.
    """

    device_id = VIRTIO_ID_CONSOLE
    device_features = VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_MULTIPORT | VIRTIO_CONSOLE_F_EMERG_WRITE

    def __init__(self, max_nr_ports: int) -> None:
        if not 1 <= max_nr_ports <= MAX_PORTS:
            raise DeviceError(f"a console has 1 to {MAX_PORTS} ports, not {max_nr_ports}")
        self.queue_size_max = (QUEUE_SIZE,) * (2 * max_nr_ports + 2)
        self.ports: list[ConsolePort | None] = [None] * max_nr_ports
        self.ignored = 0
        self._multiport = False
        self._driver_ready = False
        # What the driver tells is being read: what it is told in return is sent after that, all at once.
        self._reading = False
        # Messages that wait for a buffer, by port and event: the newest of each counts, so they are bounded.
        self._messages: dict[tuple[int, int], bytes] = {}
        self._describe()

    def add_port(self, port: ConsolePort) -> None:
        """Give it the lowest free number, and announce it. Raises DeviceError if there is none."""
        if None not in self.ports:
            raise DeviceError(f"the console has no more than its {len(self.ports)} ports")
        port.id = self.ports.index(None)
        port._console = self
        self.ports[port.id] = port
        if self._driver_ready:
            self._send(port, VIRTIO_CONSOLE_PORT_ADD, 1)
        if port.id == 0:
            self._resized(port)

    def remove_port(self, port: ConsolePort) -> None:
        """Take it away from the guest. The port belongs to no device then."""
        self._close(port)
        if port._held:
            queue = self.queues[port._transmitq]
            port._held.push()
            port._held = None
            self._publish(queue, port._transmitq)
        for event in range(VIRTIO_CONSOLE_PORT_ADD, VIRTIO_CONSOLE_PORT_NAME + 1):
            # One that waits belongs to this number's last port, which the driver still has.
            if event != VIRTIO_CONSOLE_PORT_REMOVE:
                self._messages.pop((port.id, event), None)
        if port._added:
            port._added = False
            self._send(port, VIRTIO_CONSOLE_PORT_REMOVE, 1)
        self.ports[port.id] = None
        port._console = None
        port.id = -1

    # The driver's side.

    def write_config(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """Write one character to port 0 (emerg_wr), at any time, also with no driver (5.3.5.1)."""
        port = self.ports[0]
        if offset == _EMERG_WR and port and port.end.room():
            port.end.on_transmit(bytes([value & 0xFF]))

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:  # noqa: ARG002
        """The driver is ready. Without control messages port 0 is open from the start."""
        self._multiport = bool(features & VIRTIO_CONSOLE_F_MULTIPORT)
        if not self._multiport and self.ports[0]:
            self._open(self.ports[0])

    def notified(self, queue: int) -> None:
        """Carry on with what the queue is for; queues of ports that are not there are ignored."""
        if not self._ready(queue):
            return
        try:
            if queue == CONTROL_RECEIVEQ:
                self._send_messages()
            elif queue == CONTROL_TRANSMITQ:
                self._receive_messages()
            elif port := self.ports[max(0, queue // 2 - 1)]:
                if queue % 2:
                    self._transmit(port)
                else:
                    port.end.on_room()
        except VirtqueueError as error:
            self.host.needs_reset(str(error))

    def stop_queue(self, queue: int) -> None:
        """Forget what of it was held."""
        for port in self.ports:
            if port and port._transmitq == queue:
                port._held = None

    def reset(self) -> None:
        """Forget the driver. The ports stay, closed at the guest's end."""
        for port in self.ports:
            if port:
                port._held = None
                port._added = False
                self._close(port)
        self._messages.clear()
        self._driver_ready = self._multiport = False

    # Data.

    def _ready(self, queue: int) -> bool:
        exists = self._multiport or queue < CONTROL_RECEIVEQ
        return exists and queue < len(self.queues) and self.queues[queue].ready

    def _publish(self, queue: Virtqueue, index: int) -> None:
        if queue.publish():
            self.host.interrupt(index)

    def _transmit(self, port: ConsolePort) -> None:
        """Output of a port, as far as its end has room and for a bounded time."""
        index = port._transmitq
        queue = self.queues[index]
        budget = TRANSMIT_BYTES
        chains = queue.size
        while chains and budget and (room := port.end.room()) > 0:
            if not port._held:
                port._held = queue.pop()
                if not port._held:
                    break
                port._left = port._held.readable_bytes
            data = port._held.read(min(room, budget, port._left))
            port._left -= len(data)
            budget -= len(data)
            if not port._left:
                # Before the end hears of it, which may resume or remove the port at once.
                port._held.push()
                port._held = None
                chains -= 1
            if data:
                port.end.on_transmit(data)
        else:
            if not (chains and budget):
                self.host.again(index)
        self._publish(queue, index)

    def _receive(self, port: ConsolePort, data: bytes) -> int:
        """Input for a port: into the driver's buffers, until they or a queue's worth of them are used up."""
        index = port._receiveq
        if not (port.guest_open and self._ready(index)):
            return 0
        queue = self.queues[index]
        view, taken = memoryview(data), 0
        try:
            for _ in range(queue.size):
                if taken == len(data) or (chain := queue.pop()) is None:
                    break
                taken += chain.write(view[taken:])
                chain.push()
            else:
                self.host.again(index)
            self._publish(queue, index)
        except VirtqueueError as error:
            self.host.needs_reset(str(error))
        return taken

    # Control (5.3.6.2).

    def _describe(self) -> None:
        port = self.ports[0]
        cols, rows = (port.cols, port.rows) if port else (0, 0)
        self.config = bytearray(_CONFIG.pack(cols, rows, len(self.ports), 0))

    def _open(self, port: ConsolePort) -> None:
        if not port.guest_open:
            port.guest_open = True
            port.end.on_guest_open(True)
            port.end.on_room()

    def _close(self, port: ConsolePort) -> None:
        if port.guest_open:
            port.guest_open = False
            port.end.on_guest_open(False)

    def _resized(self, port: ConsolePort) -> None:
        if port.id == 0:
            self._describe()
            if self.queues:
                self.host.config_changed()
        if port.is_console:
            self._tell(port, VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", port.cols, port.rows))

    def _tell(self, port: ConsolePort, event: int, value: int, payload: bytes = b"") -> None:
        """Something about a port, if the driver knows it; it is told what then holds when it has made it."""
        if port._added:
            self._send(port, event, value, payload)

    def _send(self, port: ConsolePort, event: int, value: int, payload: bytes = b"") -> None:
        key = port.id, event
        self._messages.pop(key, None)
        self._messages[key] = _CONTROL.pack(port.id, event, value) + payload
        if not self._reading:
            self.notified(CONTROL_RECEIVEQ)

    def _send_messages(self) -> None:
        queue = self.queues[CONTROL_RECEIVEQ]
        for _ in range(queue.size):
            if not self._messages or (chain := queue.pop()) is None:
                break
            key, message = next(iter(self._messages.items()))
            # A buffer that is too small for it comes back empty.
            if chain.writable_bytes >= len(message):
                del self._messages[key]
                chain.write(message)
                number, event = key
                port = self.ports[number]
                if event == VIRTIO_CONSOLE_PORT_ADD and port:
                    port._added = True
            chain.push()
        else:
            self.host.again(CONTROL_RECEIVEQ)
        self._publish(queue, CONTROL_RECEIVEQ)

    def _receive_messages(self) -> None:
        queue = self.queues[CONTROL_TRANSMITQ]
        self._reading = True
        try:
            for _ in range(CONTROL_BATCH):
                if (chain := queue.pop()) is None:
                    break
                message = chain.read(_CONTROL.size)
                chain.push()
                if len(message) < _CONTROL.size or not self._handle(*_CONTROL.unpack(message)):
                    self.ignored += 1
            else:
                self.host.again(CONTROL_TRANSMITQ)
        finally:
            self._reading = False
        self._publish(queue, CONTROL_TRANSMITQ)
        if self._messages:
            self.notified(CONTROL_RECEIVEQ)

    def _handle(self, number: int, event: int, value: int) -> bool:
        """What the driver tells; whether it made sense."""
        if event == VIRTIO_CONSOLE_DEVICE_READY:
            self._driver_ready = value == 1
            for port in self.ports if self._driver_ready else ():
                # A port that exists must not be added again (5.3.6.2.1).
                if port and not port._added:
                    self._send(port, VIRTIO_CONSOLE_PORT_ADD, 1)
            return True
        found = self.ports[number] if number < len(self.ports) else None
        if not found or not found._added:
            return False
        if event == VIRTIO_CONSOLE_PORT_READY:
            if value == 1:
                self._introduce(found)
        elif event == VIRTIO_CONSOLE_PORT_OPEN:
            if value:
                self._open(found)
            else:
                self._close(found)
        else:
            return False
        return True

    def _introduce(self, port: ConsolePort) -> None:
        """All about a port that the driver has made."""
        if port.is_console:
            self._send(port, VIRTIO_CONSOLE_CONSOLE_PORT, 1)
            if port.cols or port.rows:
                self._resized(port)
        if port.name:
            self._send(port, VIRTIO_CONSOLE_PORT_NAME, 1, port.name.encode())
        if port.host_open:
            self._send(port, VIRTIO_CONSOLE_PORT_OPEN, 1)
