"""Recording the exits of a machine: taken on the loop, written by a worker thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from aiokvm._core import lib
from aiokvm.aio.owner import owned
from aiokvm.hw.bus import device_name
from aiokvm.kvm import KvmExit
from aiokvm.machine.log import machine_logger
from aiokvm.proto.trace import POSTED, Encoder, Header, Record

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from aiokvm.aio import Loop, Task
    from aiokvm.hw.bus import Region
    from aiokvm.machine.exits import Exits
    from aiokvm.machine.turn import News

# A chunk is handed over when it has this size, or when its first record is this old.
CHUNK_BYTES = 256 << 10
FLUSH_S = 0.5
# What may wait for a sink that is slow; exits beyond are lost.
BUFFER_BYTES = 4 << 20
# In the place of a name, for an exit that was on its way to a device when that was detached.
DETACHED = "(detached)"

_ACCESSES = (int(KvmExit.KVM_EXIT_IO), int(KvmExit.KVM_EXIT_MMIO))


@owned
class Trace:
    """Records a machine's exits while it is entered; made by `VM.trace`.

    ``lost`` counts the exits that it had no room for. Entering raises StateError if the machine is being
    traced, or is closed; leaving writes what is left and raises what the sink has raised.
    """

    def __init__(self, loop: Loop, exits: Exits, machine: str, write: Callable[[bytes], object]) -> None:
        self.lost = 0
        self._loop = self._owner = loop
        self._exits = exits
        self._machine = machine
        self._write = write
        self._encoder = Encoder()
        self._buffer = bytearray()
        self._untold = 0
        self._names: dict[Region, str] = {}
        self._start_ns = 0
        self._begun = anyio.Event()
        self._full = anyio.Event()
        self._ended = False
        self._error: Exception | None = None
        self._task: Task | None = None

    async def __aenter__(self) -> Self:
        self._exits.trace(self._record)
        self._start_ns = lib.aiokvm_now_ns()
        self._buffer += self._encoder.header(Header(self._machine, time.time_ns()))
        self._begun.set()
        self._task = self._loop.spawn(self._write_all, f"aiokvm trace {self._machine}")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._end()
        # A trace that a cancellation had cut off would be worth little just when it is wanted.
        await self._loop.uncancelled(self._task.wait)
        if self._error is not None and exc_value is None:
            raise self._error

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._exits.trace(None)
            self._tell_lost()
            self._begun.set()
            self._full.set()

    def _record(self, item: News, region: Region | None, data: bytes) -> None:
        time_ns = lib.aiokvm_now_ns() - self._start_ns
        buffer = self._buffer
        if len(buffer) >= BUFFER_BYTES:
            self.lost += 1
            self._untold += 1
            return
        self._tell_lost()
        posted = item.state == lib.AIOKVM_POSTED
        if not posted and (item.error or item.reason not in _ACCESSES):
            record = Record(time_ns, item.vcpu, item.reason, error=item.error)
        else:
            record = Record(
                time_ns,
                None if posted else item.vcpu,
                POSTED if posted else item.reason,
                item.offset + (region.base if region else 0),
                item.size,
                item.count,
                posted or bool(item.is_write),
                item.bus == lib.AIOKVM_BUS_PIO,
                data,
                self._name(item, region),
            )
        buffer += self._encoder.record(record)
        self._begun.set()
        if len(buffer) >= CHUNK_BYTES:
            self._full.set()

    def _name(self, item: News, region: Region | None) -> str:
        if region is None:
            return "" if item.region == lib.AIOKVM_NO_REGION else DETACHED
        name = self._names.get(region)
        if name is None:
            name = self._names[region] = device_name(region.device)
        return name

    def _tell_lost(self) -> None:
        if self._untold:
            self._buffer += self._encoder.lost(self._untold)
            self._untold = 0

    async def _write_all(self) -> None:
        try:
            while self._buffer or not self._ended:
                await self._begun.wait()
                with anyio.move_on_after(FLUSH_S):
                    await self._full.wait()
                if not self._ended:
                    self._begun, self._full = anyio.Event(), anyio.Event()
                chunk, self._buffer = self._buffer, bytearray()
                await to_thread.run_sync(self._write, bytes(chunk))
        except Exception as error:
            machine_logger(self._machine).error(
                "%s: the trace ends here, it cannot be written: %s", self._machine, error
            )
            self._error = error
            self._end()
            self._buffer.clear()
