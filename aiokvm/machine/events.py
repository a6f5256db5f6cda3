"""What happens to a machine, as values that a program can await."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiokvm import aio

# A subscriber that never looks must not make the process grow.
BACKLOG = 1024


class ExitReason(enum.Enum):
    """Why a machine ended."""

    SHUTDOWN = "shutdown"
    """The guest turned the machine off."""
    RESET = "reset"
    """The guest reset the machine; ``detail`` says by what: a device's register, or a triple fault."""
    DEBUG_EXIT = "debug-exit"
    """The guest wrote a code to the debug-exit port."""
    CRASH = "crash"
    """The guest said that it cannot go on (KVM_SYSTEM_EVENT_CRASH)."""
    KILLED = "killed"
    """The program ended it."""
    ERROR = "error"
    """KVM could not run the guest any further."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a machine ended.

    ``code`` is what the guest wrote to the debug-exit port, None for all other reasons. ``detail`` is for
    people: for RESET what caused it; for ERROR, CRASH and a triple fault it has the registers and the
    instruction bytes, as far as the host can tell them.
    """

    reason: ExitReason
    code: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the machine ``machine``."""

    machine: str


class Started(Event):
    """The vCPUs began to run."""

    __slots__ = ()


class Paused(Event):
    """All vCPUs stand still."""

    __slots__ = ()


class Resumed(Event):
    """The vCPUs run again."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class WasReset(Event):
    """The machine began anew, with `VM.reset`, or because its guest reset it: ``cause`` says by what."""

    cause: str = ""


@dataclass(frozen=True, slots=True)
class DeviceFailed(Event):
    """A device raised ``error``. ``device`` is its class, ``access`` what it was doing; a read gave ones."""

    device: str
    access: str
    error: Exception


@dataclass(frozen=True, slots=True)
class DeviceNeedsReset(Event):
    """A virtio device stands still until its driver resets it: ``reason`` says what is wrong.

    Mostly the driver has put something into a queue that no device can work with. ``device`` is the class.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class DiskFailed(Event):
    """The host failed a request of disk ``disk``: ``length`` bytes at ``offset``. ``error`` has the errno.

    ``operation`` is read, write, flush, discard or write_zeroes. ``paused``: the machine is paused for it.
    """

    disk: str
    operation: str
    offset: int
    length: int
    error: OSError
    paused: bool


@dataclass(frozen=True, slots=True)
class LinkChanged(Event):
    """The link of network adapter ``nic`` went up or down."""

    nic: str
    up: bool


@dataclass(frozen=True, slots=True)
class NicLost(Event):
    """Nothing comes from the backend of network adapter ``nic`` any more, and ``reason`` says why.

    Its link is down until `VmNic.replace` gives it another.
    """

    nic: str
    reason: str


@dataclass(frozen=True, slots=True)
class Exited(Event):
    """The machine ended; no event follows."""

    exit: Exit


class EventHub:
    """Hands every event to every subscriber; one that falls behind loses its oldest, one that is gone all."""

    def __init__(self, loop: aio.Loop | None = None) -> None:
        self._loop = loop
        self._subscribers: WeakSet[_Subscriber] = WeakSet()
        self._closed = False

    def emit(self, event: Event) -> None:
        """Hand the event on."""
        for subscriber in self._subscribers:
            subscriber.events.append(event)
            subscriber.wake()

    def close(self) -> None:
        """End all iterators once they have given what came before. Idempotent."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.closed = True
            subscriber._owner = None
            subscriber.wake()

    def subscribe(self) -> AsyncIterator[Event]:
        """All events from now on, until the hub is closed."""
        subscriber = _Subscriber(self._closed, None if self._closed else self._loop)
        self._subscribers.add(subscriber)
        return subscriber


@owned
class _Subscriber:
    """No generator: one that is left in the middle would need its loop to be finished."""

    def __init__(self, closed: bool, loop: aio.Loop | None) -> None:
        self._owner = loop
        self.closed = closed
        self.events: deque[Event] = deque(maxlen=BACKLOG)
        self.news: aio.Event | None = None

    def wake(self) -> None:
        """There is something new."""
        if self.news is not None:
            self.news.set()

    def __aiter__(self) -> _Subscriber:
        return self

    async def __anext__(self) -> Event:
        while not self.events:
            if self.closed:
                raise StopAsyncIteration
            self.news = current_loop().event()
            await self.news.wait()
        return self.events.popleft()
