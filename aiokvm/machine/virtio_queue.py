"""A virtqueue as an asynchronous iterator of requests, for devices whose handlers are coroutines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from aiokvm.aio.owner import owned

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from typing_extensions import Buffer

    from aiokvm.aio import Loop
    from aiokvm.virtio.queue import Chain, Virtqueue

# That requests are handed out before others on the loop have a turn.
SLICE_NS = 300_000


@owned
class RequestQueue:
    """See `aiokvm.virtio.device.VirtioQueue`; `interrupt` is called when the driver wants to be told.

    Iterating raises VirtqueueError when the driver has broken its queue.
    """

    def __init__(self, loop: Loop, queue: Virtqueue, index: int, interrupt: Callable[[], None]) -> None:
        self.index = index
        self._loop = self._owner = loop
        self._queue = queue
        self._interrupt = interrupt
        self._news = anyio.Event()
        self._turn_ns = loop.now_ns()

    def wake(self) -> None:
        """The driver has notified."""
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Request:
        # A driver that is as fast as the handler must not keep the loop to itself.
        if self._loop.now_ns() - self._turn_ns > SLICE_NS:
            await self._loop.turn()
            self._turn_ns = self._loop.now_ns()
        while self._queue.ready:
            self._news = anyio.Event()
            chain = self._queue.pop()
            if chain is not None:
                self._queue.disable_notify()
                return Request(self._loop, chain, self._on_push)
            if not self._queue.enable_notify():
                await self._news.wait()
                self._turn_ns = self._loop.now_ns()
        raise StopAsyncIteration

    def _on_push(self) -> None:
        if self._queue.ready and self._queue.publish():
            self._interrupt()


@owned
class Request:
    """See `aiokvm.virtio.device.VirtioRequest`."""

    def __init__(self, loop: Loop, chain: Chain, on_push: Callable[[], None]) -> None:
        self._owner = loop
        self._chain = chain
        self._on_push = on_push
        self.readable_bytes = chain.readable_bytes
        self.writable_bytes = chain.writable_bytes

    def read(self, n: int = -1) -> bytes:
        return self._chain.read(n)

    def write(self, data: Buffer) -> int:
        return self._chain.write(data)

    def push(self, written: int | None = None) -> None:
        if not self._chain.void:
            self._chain.push(written)
            self._on_push()
