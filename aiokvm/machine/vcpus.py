"""The vCPUs of a machine, which start, pause and stop together; who does not hear it is kicked again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aiokvm.machine.vcpu import VcpuState, VirtualCpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiokvm import kvm
    from aiokvm.aio import Handle, Loop
    from aiokvm.machine.exits import Exits

# A kick is seen within microseconds. Should one get lost all the same, the next follows this much later.
KICK_AGAIN_NS = 20_000_000
# Each further one waits twice as long, up to this: a thousand machines that close at once keep a loop busy.
KICK_AGAIN_MOST_NS = 640_000_000


class Vcpus:
    """``all`` are by index; ``threads`` are the indices of those that have a thread."""

    def __init__(self, loop: Loop, exits: Exits, vcpus: Sequence[kvm.Vcpu], machine: str) -> None:
        self._loop = loop
        self._kicker: Handle | None = None
        self._stopping = False
        self._parked = loop.event()
        self.threads: set[int] = set()
        self.all: tuple[VirtualCpu, ...] = ()
        try:
            for index, vcpu in enumerate(vcpus):
                self.all += (VirtualCpu(exits.core, vcpu, index, machine, loop),)
            exits.serve_vcpus([vcpu.core for vcpu in self.all])
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[VirtualCpu]:
        return iter(self.all)

    def start(self) -> None:
        """Make the threads; the guest runs after `go`. Raises what keeps one from being made."""
        for vcpu in self.all:
            # They wait for each other, standing still, but nobody has to wait for the last.
            if vcpu is self.all[-1]:
                vcpu.resume()
            vcpu.start()
            self.threads.add(vcpu.index)

    def go(self) -> None:
        """All threads are there: let them run."""
        for vcpu in self.all[:-1]:
            vcpu.resume()

    def hold(self) -> None:
        """Have all stand still, with nobody waiting for it: `pause` has to follow."""
        for vcpu in self.all:
            vcpu.pause()

    async def pause(self) -> None:
        """Until all stand still, or `stop` is called. If cancelled, they may: `resume` them."""
        self._parked = self._loop.event()
        self.hold()
        self._kick_again_later(KICK_AGAIN_NS)
        await self._parked.wait()

    def resume(self) -> None:
        """Let them run again."""
        for vcpu in self.all:
            vcpu.resume()

    def stop(self) -> bool:
        """Have the threads end; whether there are any to wait for."""
        self._stopping = True
        self._parked.set()
        for index in self.threads:
            self.all[index].stop()
        if self.threads:
            self._kick_again_later(KICK_AGAIN_NS)
        return bool(self.threads)

    def on_parked(self, index: int) -> None:
        """One stands still."""
        self.all[index].on_parked()
        if all(vcpu.state is VcpuState.PAUSED for vcpu in self.all):
            self._parked.set()

    def on_stopped(self, index: int) -> bool:
        """A thread has ended; whether it was the last."""
        self.all[index].on_stopped()
        self.threads.discard(index)
        if not self.threads and self._kicker:
            self._kicker.cancel()
            self._kicker = None
        return not self.threads

    def close(self) -> None:
        """Give everything back; no thread may be left."""
        for vcpu in reversed(self.all):
            vcpu.close()

    def _kick_again_later(self, after_ns: int) -> None:
        if not self._kicker:
            self._kicker = self._loop.call_at(
                self._loop.now_ns() + after_ns, partial(self._kick_again, after_ns)
            )

    def _kick_again(self, after_ns: int) -> None:
        self._kicker = None
        late = [vcpu for vcpu in self.all if vcpu.index in self.threads and self._is_late(vcpu)]
        for vcpu in late:
            vcpu.kick()
        if late:
            self._kick_again_later(min(2 * after_ns, KICK_AGAIN_MOST_NS))

    def _is_late(self, vcpu: VirtualCpu) -> bool:
        return self._stopping or (vcpu.to_pause and vcpu.state is VcpuState.RUNNING)
