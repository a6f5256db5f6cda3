"""A virtio device in a machine: its registers on the bus, and what they need of KVM and of the loop."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, checked_late
from aiokvm.errors import VirtqueueError
from aiokvm.machine.device import Timer
from aiokvm.machine.irq import GsiIrq
from aiokvm.machine.share import LoopShare
from aiokvm.machine.virtio_queue import RequestQueue
from aiokvm.virtio.device import VirtioDevice
from aiokvm.virtio.mmio import (
    VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_SIZE,
    VirtioMmio,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from aiokvm import kvm
    from aiokvm._core import Pointer
    from aiokvm.aio import Handle, Loop, Task
    from aiokvm.hw.bus import BusDevice
    from aiokvm.machine.exits import Exits
    from aiokvm.memory import GuestMemory
    from aiokvm.virtio.queue import Virtqueue


class _Interrupts:
    """A word that vCPUs, the loop and data movers share, and an irqfd: `aiokvm.virtio.mmio.Interrupts`."""

    def __init__(self, irqfd: int) -> None:
        self.word: Pointer = ffi.new("uint32_t *")
        self.notifier: Pointer = ffi.new("struct aiokvm_notifier *", {"irqfd": irqfd, "status": self.word})

    def status(self) -> int:
        return lib.aiokvm_status_read(self.word)

    def notify(self, bits: int) -> None:
        lib.aiokvm_notify(self.notifier, bits)

    def acknowledge(self, bits: int) -> None:
        lib.aiokvm_status_clear(self.word, bits)

    def close(self) -> None:
        """The irqfd's number is about to be somebody else's."""
        self.notifier[0].irqfd = -1


class _Kick:
    """The eventfd that notifications of one queue count up (an ioeventfd), and the loop's watch of it."""

    def __init__(self, loop: Loop, vm: kvm.Vm, base: int, queue: int, on_kick: Callable[[int], None]) -> None:
        self._loop = loop
        self._vm = vm
        self._queue = queue
        self._on_kick = on_kick
        self._address = base + VIRTIO_MMIO_QUEUE_NOTIFY
        self._watched: Handle | None = None
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            vm.ioeventfd(self._address, self.fd, 4, datamatch=queue)
        except BaseException:
            os.close(self.fd)
            raise
        self.watch()

    def watch(self) -> None:
        # A device may come to its end after its machine: the descriptor's number is another's then.
        if self._watched is None and self.fd >= 0:
            self._watched = self._loop.watch(self.fd, self._on_readable)

    def unwatch(self) -> None:
        if self._watched is not None:
            self._watched.cancel()
            self._watched = None

    def close(self) -> None:
        self.unwatch()
        self._vm.ioeventfd(self._address, self.fd, 4, datamatch=self._queue, deassign=True)
        os.close(self.fd)
        self.fd = -1

    def _on_readable(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return
        self._on_kick(self._queue)


@owned
class VirtioAttachment:
    """A virtio device in a machine, made by `VM.attach_virtio`; to the device it is its ``host``.

    Its registers lie at guest physical address ``base``; it interrupts by ``gsi``.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        base: int,
        gsi: int,
        loop: Loop,
        exits: Exits,
        vm: kvm.Vm,
        memory: GuestMemory,
        shared: Mapping[int, tuple[int, memoryview]],
        on_failed: Callable[[str, Exception], None],
        on_needs_reset: Callable[[str], None],
    ) -> None:
        self.device = device
        self.base = base
        self.gsi = gsi
        self._name = type(device).__name__
        self._loop = self._owner = loop
        self._shared = shared
        self._on_failed = on_failed
        self._again: set[int] = set()
        self._share = LoopShare.of(loop)
        self._served: dict[int, tuple[RequestQueue, Task]] = {}
        self._spawned: set[Task] = set()
        self._run: Task | None = None
        # What `Timer` asks of a device.
        self._timers: set[Timer] | None = set()
        self._failed: Callable[[str, Exception], None] | None = self._tell
        with ExitStack() as undo:
            irq = GsiIrq(vm, gsi)
            undo.callback(irq.close)
            self._interrupts = _Interrupts(irq.fd)
            undo.callback(self._interrupts.close)
            self.registers = VirtioMmio(
                device,
                memory,
                self._interrupts,
                shared={shmid: (gpa, len(view)) for shmid, (gpa, view) in shared.items()},
                on_needs_reset=on_needs_reset,
                calls=self,
            )
            # What its write returns may have to be awaited, which no device of a bus of ours needs.
            region = exits.mmio.attach(cast("BusDevice", self.registers), base, VIRTIO_MMIO_SIZE)
            undo.callback(exits.withdraw, exits.mmio, region)
            self._kicks: list[_Kick] = []
            for index in range(len(device.queue_size_max)):
                self._kicks.append(_Kick(loop, vm, base, index, self._kicked))
                undo.callback(self._kicks[-1].close)
            exits.share_word(
                region, self._interrupts.word, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_INTERRUPT_ACK
            )
            exits.publish()
            self._undo = undo.pop_all()
        device._host = self

    def __repr__(self) -> str:
        return f"<VirtioAttachment {type(self.device).__name__} at {self.base:#x}, GSI {self.gsi}>"

    @property
    def dropped_notifies(self) -> int:
        """Notifications of queues that are not there or not in use."""
        return self.registers.dropped_notifies

    # The machine's.

    def start(self) -> None:
        """The guest runs."""
        if type(self.device).run is not VirtioDevice.run:
            self._run = self._loop.spawn(self._guarded("run", self.device.run), f"{self._name}.run")

    async def system_reset(self) -> None:
        """The machine is reset; no vCPU runs."""
        done = self.registers.reset()
        if done is not None:
            await done

    def stop(self) -> None:
        """The machine has ended: tasks are cancelled, timers gone. Idempotent."""
        if self._run:
            self._run.cancel()
        for _, task in self._served.values():
            task.cancel()
        for timer in tuple(self._timers or ()):
            timer.cancel()

    async def finished(self) -> None:
        """After `stop`: the device touches no buffer any more, and has given back what it holds.

        That comes about as soon as it can, also when nobody waits any more.
        """
        await self._loop.spawn(self._finish, f"{self._name}: close").wait()

    async def _finish(self) -> None:
        if self._run:
            await self._run.wait()
        try:
            await self.system_reset()
            done = self.device.close()
            if done is not None:
                await done
        except Exception as error:
            self._tell("close", error)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for task in self._spawned:
            task.cancel()
        self._undo.close()
        self.registers.close()
        if self.device._host is self:
            self.device._host = None

    # The device's: `aiokvm.virtio.device.VirtioHost`.

    @checked_late
    def interrupt(self, queue: int) -> None:  # noqa: ARG002
        self.registers.interrupt()

    def config_changed(self) -> None:
        self.registers.config_changed()

    @checked
    def needs_reset(self, reason: str) -> None:
        self.registers.needs_reset(reason)

    @checked_late
    def again(self, queue: int) -> None:
        if queue not in self._again:
            self._again.add(queue)
            self._share.later(partial(self._notify_again, queue))

    def now_ns(self) -> int:
        return self._loop.now_ns()

    @checked
    def timer(self, deadline_ns: int, callback: Callable[[], object], period_ns: int = 0) -> Timer:
        return Timer(self._loop, self, deadline_ns, callback, period_ns)

    @checked
    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Task:
        async def run() -> None:
            try:
                await self._guarded(name, work)()
            finally:
                self._spawned.discard(task)

        task = self._loop.spawn(run, f"{self._name} {name}")
        self._spawned.add(task)
        return task

    def take_queue(self, queue: int) -> int:
        self._kicks[queue].unwatch()
        return self._kicks[queue].fd

    @property
    def notifier(self) -> Any:
        return self._interrupts.notifier

    @checked
    def shared_memory(self, shmid: int) -> memoryview:
        return self._shared[shmid][1]

    # The registers': `aiokvm.virtio.mmio.Calls`.

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        self.device.activate(features, queues)
        if type(self.device).serve is not VirtioDevice.serve:
            for index, queue in enumerate(queues):
                if queue.ready:
                    self._serve(index, queue)

    def notified(self, queue: int) -> None:
        served = self._served.get(queue)
        if served:
            served[0].wake()
        else:
            self.device.notified(queue)

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        served = self._served.pop(queue, None)
        if served:
            served[1].cancel()
        done = self.device.stop_queue(queue)
        if done is None and served is None:
            return None
        return self._drained(done, [served[1]] if served else [], lambda: None)

    def reset(self) -> Awaitable[None] | None:
        served, self._served = self._served, {}
        for _, task in served.values():
            task.cancel()
        done = self.device.reset()
        tasks = [*self._spawned, *(task for _, task in served.values())]
        if done is None and not tasks:
            self._look_again()
            return None
        return self._drained(done, tasks, self._look_again)

    async def _drained(
        self, done: Awaitable[None] | None, tasks: Sequence[Task], then: Callable[[], None]
    ) -> None:
        failure: Exception | None = None
        try:
            if done is not None:
                await done
        except Exception as error:
            failure = error
        for task in tasks:
            await task.wait()
        then()
        if failure is not None:
            raise failure

    def _look_again(self) -> None:
        """No data mover looks at the queues any more."""
        for kick in self._kicks:
            kick.watch()

    def _serve(self, index: int, queue: Virtqueue) -> None:
        requests = RequestQueue(self._loop, queue, index, self.registers.interrupt)

        async def serve() -> None:
            try:
                await self.device.serve(requests)
            except Exception as error:
                self._tell("serve", error)
                self.registers.needs_reset(f"queue {index} is not served any more: {error!r}")

        self._served[index] = requests, self._loop.spawn(serve, f"{self._name}.serve")

    def _kicked(self, queue: int) -> None:
        self._share.serve(partial(self._notify, queue))

    def _notify(self, queue: int) -> None:
        try:
            self.registers.notify(queue)
        except Exception as error:
            self._tell("notified", error)

    def _notify_again(self, queue: int) -> None:
        self._again.discard(queue)
        if self.registers.active and self.registers.queues[queue].ready:
            self._notify(queue)

    def _guarded(self, what: str, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            try:
                await work()
            except Exception as error:
                self._tell(what, error)

        return run

    def _tell(self, access: str, error: Exception) -> None:
        """The device raised; what a broken queue raises is the driver's fault."""
        if isinstance(error, VirtqueueError):
            self.registers.needs_reset(str(error))
        else:
            self._on_failed(access, error)
