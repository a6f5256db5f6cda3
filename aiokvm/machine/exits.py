"""The way of an exit on the loop's side: mailbox, bus, reply.

The vCPU threads of the C core look an address up in the table that is published here, put what needs Python
into their mailbox and ring the doorbell. `Turn` takes what has come; `Exits.serve` asks the device on the bus
and replies, or gives the coroutine that will. What is not an access to a device is handed to the machine.
"""

from __future__ import annotations

import os
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiokvm._core import ffi, lib
from aiokvm.errors import AiokvmError, DeviceError, StateError
from aiokvm.hw.bus import MMIO_LIMIT, PIO_LIMIT, Bus, PostedWrites
from aiokvm.kvm import KvmExit
from aiokvm.machine.strings import as_bytes, read_string, write_string
from aiokvm.machine.turn import UNFINISHED, News, Slice, Turn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop, Task
    from aiokvm.hw.bus import BusDevice, Region
    from aiokvm.machine.device import Device
    from aiokvm.machine.turn import Unfinished, Work

# As plain integers: an enum's members cost a look-up each, on every exit.
_KVM_EXIT_IO = int(KvmExit.KVM_EXIT_IO)
_KVM_EXIT_MMIO = int(KvmExit.KVM_EXIT_MMIO)
_EXIT = lib.AIOKVM_VCPU_EXIT
_POSTED = lib.AIOKVM_POSTED
_NO_REGION = lib.AIOKVM_NO_REGION
# By the size of an access in bytes: any up to 8, for KVM splits what crosses a page.
_ONES = tuple((1 << 8 * size) - 1 for size in range(9))
_reply = lib.aiokvm_vcpu_reply
_skip = lib.aiokvm_vcpu_skip

_LATCH = f"uint32_t[{lib.AIOKVM_FAST_OFFSETS}]"


class Listener(Protocol):
    """Who is told what is not an access to a device."""

    def on_parked(self, index: int) -> None:
        """The vCPU stands still."""

    def on_stopped(self, index: int) -> None:
        """The vCPU's thread has ended."""

    def on_exit(self, index: int, reason: int, error: int) -> None:
        """KVM_RUN returned with an exit_reason that no device answers, or failed with errno ``error``.

        The vCPU runs on when this returns, unless it was told to stop.
        """

    def on_unclaimed(self, index: int, bus: int, address: int, size: int, value: int | None) -> None:
        """The guest read, or wrote ``value``, where nothing is; told only if it was asked for."""

    def on_failed(self, device: BusDevice, access: str, error: Exception) -> None:
        """A device raised ``error`` while serving ``access``, which says what the guest did."""


class Tracer(Protocol):
    """Who is shown every exit that reaches the loop, before it is answered."""

    def __call__(self, item: News, region: Region | None, data: bytes) -> None:
        """``data`` is what was written, empty for a read.

        ``region`` is None where nothing is, and for what is not an access.
        """


def check(result: int, what: str) -> int:
    """The result of a call into the core; a negative one is an errno, and raised."""
    if result >= 0:
        return result
    error = -result
    if error == _EOWNERDEAD:
        raise StateError(NOT_INHERITED)
    # The cause has the number, for who wants to know.
    raise AiokvmError(f"{what}: {os.strerror(error)} (errno {error})") from OSError(error, os.strerror(error))


_EOWNERDEAD = 130
NOT_INHERITED = "the machine belongs to the process that created it: a fork does not inherit it"


class _Latch:
    """What reads of a device's first offsets give without the loop."""

    def __init__(self, words: Pointer) -> None:
        self._words = words

    def __call__(self, offset: int, value: int | None) -> None:
        lib.aiokvm_latch_set(self._words, offset, -1 if value is None else value)


class _Target:
    """A region of a bus as an exit finds it."""

    __slots__ = ("device", "exits", "owner", "posts", "read", "region", "write")

    def __init__(self, region: Region) -> None:
        self.region = region
        self.device = region.device
        # By a name, not isinstance: that of a protocol takes a hundred times as long.
        posts = hasattr(region.device, "posted_offsets")
        self.posts = cast("PostedWrites", region.device) if posts else None
        self.read = region.device.read
        self.write = region.device.write
        self.exits = 0
        # A device of the program's own is told which vCPU asks.
        attachment = getattr(region.device, "attachment", None)
        self.owner: Device | None = attachment.device if attachment is not None else None


class _Pacer:
    """Of one string instruction: the slice of the turn that began it, then slices of its own."""

    def __init__(
        self, loop: Loop, turn: Turn, owner: Device | None, vcpu: int, is_there: Callable[[], bool]
    ) -> None:
        self._loop = loop
        self._owner = owner
        self._vcpu = vcpu
        self._slice = turn.slice
        self._is_there = is_there

    def begin_piece(self) -> None:
        if self._owner is not None:
            self._owner.vcpu = self._vcpu

    def is_over(self) -> bool:
        return self._slice.is_over()

    async def turn(self) -> bool:
        await self._loop.turn()
        self._slice = Slice()
        return self._is_there()


class Exits:
    """The exits of one machine.

    ``pio`` and ``mmio`` are its buses; a change to them takes effect with `publish`. ``poll_ns`` is how
    long at most the loop and the vCPUs poll for each other before they sleep.
    """

    def __init__(self, loop: Loop, listener: Listener, name: str, poll_ns: int = 0) -> None:
        self._loop = loop
        self._turn = Turn.of(loop)
        self._id, turn = self._turn.add(self)
        code = ffi.new("int *")
        core = lib.aiokvm_machine_new(turn, self._id, code)
        if not core:
            self._turn.forget(self._id)
            check(-code[0], f"cannot create machine {name}")
        self.core = core
        self.pio = Bus(PIO_LIMIT)
        self.mmio = Bus(MMIO_LIMIT)
        self.tracer: Tracer | None = None
        check(lib.aiokvm_machine_set_poll(core, poll_ns), "setting the polling budget")
        self._targets: dict[tuple[int, int], _Target] = {}
        # What the vCPU threads read belongs to cffi objects: they must live as long as the machine.
        self._latches: dict[PostedWrites, Pointer] = {}
        self._words: dict[Region, tuple[Pointer, int, int]] = {}
        self._vcpus: Sequence[Pointer] = ()
        self._tell_unclaimed = False
        self._listener = listener
        self._suspended: set[Task] = set()
        # How many bytes of the run of posted writes that is being served have been served.
        self._posted = 0
        self.is_open = True
        self._cancelled = False

    def publish(self) -> None:
        """Tell the vCPU threads which addresses the buses claim."""
        targets: dict[tuple[int, int], _Target] = {}
        for number, bus in ((lib.AIOKVM_BUS_PIO, self.pio), (lib.AIOKVM_BUS_MMIO, self.mmio)):
            regions: list[Region] = list(bus)
            table = ffi.new("struct aiokvm_region[]", len(regions))
            for entry, region in zip(table, regions, strict=True):
                key = number, region.id
                target = targets[key] = self._targets.get(key) or _Target(region)
                device = target.posts
                entry.base, entry.size, entry.id = region.base, region.size, region.id
                if device is not None:
                    entry.posted = sum(1 << offset for offset in device.posted_offsets)
                    entry.latch = self._latches.setdefault(device, ffi.new(_LATCH))
                    device.connect_latch(_Latch(entry.latch))
                elif region.posted:
                    entry.posted = lib.AIOKVM_POSTED_ALL
                if region in self._words:
                    entry.status, entry.status_offset, entry.clear_offset = self._words[region]
            check(lib.aiokvm_machine_publish(self.core, number, table, len(regions)), "publishing the bus")
        self._targets = targets

    def withdraw(self, bus: Bus, region: Region) -> None:
        """Take a region off its bus, and publish that."""
        bus.detach(region)
        self.publish()
        self._words.pop(region, None)

    def share_word(self, region: Region, word: Pointer, status_offset: int, clear_offset: int) -> None:
        """Have a ``uint32_t`` of events read and cleared at two offsets of a region, 4 bytes each.

        What the guest does there does not reach the device, from the next `publish` on; the word is the
        machine's then.
        """
        self._words[region] = word, status_offset, clear_offset

    def serve_vcpus(self, vcpus: Sequence[Pointer]) -> None:
        """The core's vCPUs, by index."""
        self._vcpus = vcpus

    def ask_unclaimed(self, ask: bool) -> None:
        """Whether the listener is told of accesses that no device claims: each then waits for the loop."""
        self._tell_unclaimed = ask
        self._ask_unclaimed()

    def trace(self, tracer: Tracer | None) -> None:
        """Show all exits to ``tracer`` from now on, accesses that no device claims too; None ends it.

        Raises StateError if there is one already, or the machine is closed.
        """
        if tracer is not None and (self.tracer is not None or not self.is_open):
            raise StateError("the machine is " + ("traced already" if self.is_open else "closed"))
        self.tracer = tracer
        if self.is_open:
            self._ask_unclaimed()

    def _ask_unclaimed(self) -> None:
        ask = self._tell_unclaimed or self.tracer is not None
        check(lib.aiokvm_machine_ask_unclaimed(self.core, ask), "asking for unclaimed accesses")

    def counts(self) -> list[tuple[str, Region, int]]:
        """Bus and region, for all that are attached, and how many accesses the loop has served."""
        names = {lib.AIOKVM_BUS_PIO: "pio", lib.AIOKVM_BUS_MMIO: "mmio"}
        return [(names[bus], target.region, target.exits) for (bus, _), target in self._targets.items()]

    def stats(self) -> Pointer:
        """The machine's ``struct aiokvm_machine_stats``."""
        raw = ffi.new("struct aiokvm_machine_stats *")
        check(lib.aiokvm_machine_get_stats(self.core, raw), "reading the machine's counters")
        return cast("Pointer", raw)

    def check_owner(self) -> None:
        """Raises StateError in a child of fork, which shares descriptors with its parent, the loop's too."""
        if self.is_open and not lib.aiokvm_machine_alive(self.core):
            raise StateError(NOT_INHERITED)

    def cancel(self) -> None:
        """Cancel the handlers that have not answered: nobody waits for their answers any more."""
        self._cancelled = True
        for task in self._suspended:
            task.cancel()

    async def finished(self) -> None:
        """Waits until the handlers that were cancelled have ended."""
        for task in tuple(self._suspended):
            await task.wait()

    def close(self) -> None:
        """No vCPU thread may be left. Idempotent."""
        if self.is_open:
            self.is_open = False
            lib.aiokvm_machine_free(self.core)
            self._turn.forget(self._id)

    # The turn's.

    def on_suspended(self, task: Task) -> None:
        """A handler of a device goes on in this task."""
        self._suspended.add(task)
        # Of an exit that was on its way when the machine ended.
        if self._cancelled:
            task.cancel()

    def on_finished(self, task: Task | None) -> None:
        """It has ended."""
        if task is not None:
            self._suspended.discard(task)

    def serve(self, news: tuple[int, ...]) -> Work | Unfinished | None:
        """Serve one of the news, the fields of `News`; what has still to be awaited, if anything.

        UNFINISHED: the slice is over, and the same news is to be served again to go on with it.
        """
        state = news[1]
        if state == _EXIT:
            return self._on_exit(news)
        if state == _POSTED:
            return self._on_posted(News(*news))
        if state == lib.AIOKVM_VCPU_PARKED:
            self._listener.on_parked(news[0])
        elif state == lib.AIOKVM_VCPU_STOPPED:
            self._listener.on_stopped(news[0])
        return None

    def _on_exit(self, news: tuple[int, ...]) -> Work | None:
        # The fast way: nothing is made here that an access of a plain device does not need.
        number, _, seq, error, reason, region, offset, value, size, count, is_write, bus = news
        vcpu = self._vcpus[number]
        if error or (reason != _KVM_EXIT_IO and reason != _KVM_EXIT_MMIO):
            if self.tracer is not None:
                self.tracer(News(*news), None, b"")
            self._listener.on_exit(number, reason, error)
            _skip(vcpu, seq)
            return None
        target = self._targets.get((bus, region))
        if self.tracer is not None:
            written = bytes(ffi.buffer(lib.aiokvm_vcpu_data(vcpu), size * count)) if is_write else b""
            self.tracer(News(*news), target.region if target else None, written)
        if target is None:
            self._nothing_there(vcpu, News(*news))
            return None
        target.exits += 1
        if target.owner is not None:
            target.owner.vcpu = number
        if count != 1:
            return self._string(target, vcpu, News(*news))
        try:
            if is_write:
                done: Any = target.write(offset, size, value)
                if done is not None and hasattr(done, "__await__"):
                    return self._finish_write(target, vcpu, seq, offset, size, done)
                _skip(vcpu, seq)
            else:
                answer: Any = target.read(offset, size)
                if type(answer) is not int:
                    if hasattr(answer, "__await__"):
                        return self._finish_read(target, vcpu, seq, offset, size, answer)
                    answer = index(answer)
                _reply(vcpu, seq, answer & _ONES[size])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:
            # A plain function cannot be cancelled: what it raises is about something else.
            failure = problem if isinstance(problem, Exception) else _lost(problem)
            self._failed(target, _describe(is_write, size, offset), failure)
            self._no_answer(vcpu, seq, size, is_write)
        return None

    def _nothing_there(self, vcpu: Pointer, item: News) -> None:
        """A device was detached while the exit was on its way, or there is none and that is to be told."""
        if item.region == _NO_REGION and self._tell_unclaimed:
            value = item.value if item.is_write else None
            self._listener.on_unclaimed(item.vcpu, item.bus, item.offset, item.size, value)
        if not item.is_write:
            ffi.memmove(lib.aiokvm_vcpu_data(vcpu), b"\xff" * item.size * item.count, item.size * item.count)
        _skip(vcpu, item.seq)

    @staticmethod
    def _no_answer(vcpu: Pointer, seq: int, size: int, is_write: int) -> None:
        if is_write:
            _skip(vcpu, seq)
        else:
            _reply(vcpu, seq, (1 << 8 * size) - 1)

    async def _finish_read(
        self, target: _Target, vcpu: Pointer, seq: int, offset: int, size: int, value: Awaitable[int]
    ) -> None:
        ones = answer = (1 << 8 * size) - 1
        try:
            answer = index(await value) & ones
        except Exception as error:
            self._failed(target, _describe(False, size, offset), error)
        except self._loop.cancelled as error:
            self._cut_off(target, _describe(False, size, offset), error)
        finally:
            if self.is_open:
                _reply(vcpu, seq, answer)

    async def _finish_write(
        self, target: _Target, vcpu: Pointer, seq: int, offset: int, size: int, done: Awaitable[None]
    ) -> None:
        try:
            await done
        except Exception as error:
            self._failed(target, _describe(True, size, offset), error)
        except self._loop.cancelled as error:
            self._cut_off(target, _describe(True, size, offset), error)
        finally:
            if self.is_open:
                _skip(vcpu, seq)

    def _on_posted(self, item: News) -> Unfinished | None:
        target = self._targets.get((item.bus, item.region))
        end = item.value + item.count * item.size
        data = bytes(memoryview(ffi.buffer(lib.aiokvm_machine_posted(self.core), end))[item.value :])
        begin, self._posted = self._posted, 0
        if self.tracer is not None and not begin:
            self.tracer(item, target.region if target else None, data)
        if target is None:
            return None  # detached meanwhile
        offset, size = item.offset, item.size
        if target.owner is not None:
            target.owner.vcpu = None
        if not begin:
            target.exits += item.count
            whole = getattr(target.device, "write_string", None)
            try:
                if target.posts is not None:
                    target.posts.write_posted(offset, data)
                    return None
                if whole is not None:
                    _refuse_coroutine(whole(offset, size, data))
                    return None
            except Exception as error:
                self._failed(target, f"posted {_describe(True, size, offset)}", error)
                return None
        for at in range(begin, len(data), size):
            if at > begin and self._turn.slice.is_over():
                self._posted = at
                return UNFINISHED
            try:
                done: Any = target.write(offset, size, int.from_bytes(data[at : at + size], "little"))
                if done is not None:
                    _refuse_coroutine(done)
            except Exception as error:
                # Each is an access of its own: the next ones follow, unless the device has been detached.
                self._failed(target, f"posted {_describe(True, size, offset)}", error)
                if self._targets.get((item.bus, item.region)) is not target:
                    return None
        return None

    def _string(self, target: _Target, vcpu: Pointer, item: News) -> Work | None:
        """Rep ins or outs: count accesses to one address."""
        offset, size, count = item.offset, item.size, item.count
        what = f"string {_describe(item.is_write, size, offset)}, {count} times"
        answer: bytes | Awaitable[bytes | None] | None
        key = item.bus, item.region
        pacer = _Pacer(
            self._loop, self._turn, target.owner, item.vcpu, lambda: self._targets.get(key) is target
        )
        try:
            if item.is_write:
                data = bytes(ffi.buffer(lib.aiokvm_vcpu_data(vcpu), size * count))
                answer = write_string(target.device, offset, size, data, pacer)
            else:
                answer = read_string(target.device, offset, size, count, pacer)
        except Exception as error:
            self._failed(target, what, error)
            answer = None if item.is_write else b"\xff" * size * count
        if answer is None or isinstance(answer, bytes):
            self._answer_string(vcpu, item.seq, size * count, answer)
            return None
        return self._finish_string(target, vcpu, item.seq, size * count, what, bool(item.is_write), answer)

    async def _finish_string(
        self,
        target: _Target,
        vcpu: Pointer,
        seq: int,
        length: int,
        what: str,
        is_write: bool,
        answer: Awaitable[bytes | None],
    ) -> None:
        data = None if is_write else b"\xff" * length
        try:
            data = as_bytes(await answer) if not is_write else await answer
        except Exception as error:
            self._failed(target, what, error)
        except self._loop.cancelled as error:
            self._cut_off(target, what, error)
        finally:
            if self.is_open:
                self._answer_string(vcpu, seq, length, data)

    @staticmethod
    def _answer_string(vcpu: Pointer, seq: int, length: int, data: bytes | None) -> None:
        if data is not None:
            ffi.memmove(lib.aiokvm_vcpu_data(vcpu), data.ljust(length, b"\xff")[:length], length)
        _skip(vcpu, seq)

    def _cut_off(self, target: _Target, access: str, error: BaseException) -> None:
        """A handler was cancelled, or what it awaited was: then the guest has still to be answered."""
        if self._loop.being_cancelled():
            raise error
        self._failed(target, access, _lost(error))

    def _failed(self, target: _Target, access: str, error: Exception) -> None:
        self._listener.on_failed(target.device, f"{access} of the region at {target.region}", error)


def _lost(error: BaseException) -> DeviceError:
    lost = DeviceError("what the device waited for was cancelled")
    lost.__cause__ = error
    return lost


def _describe(is_write: int, size: int, offset: int) -> str:
    return f"{'write' if is_write else 'read'} of {size} bytes at offset {offset:#x}"


def _refuse_coroutine(done: Any) -> None:
    if hasattr(done, "__await__"):
        if hasattr(done, "close"):
            done.close()
        raise TypeError("a posted write cannot be served by a coroutine")
