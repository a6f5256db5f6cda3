"""String instructions on the loop's side: a device takes a run of accesses whole, or piece by piece.

A device may answer by a coroutine at any piece, and what takes longer than a slice goes on after the loop has
had a turn; what has still to be awaited is returned.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterator

    from aiokvm.hw.bus import BusDevice

T = TypeVar("T")


class Pacer(Protocol):
    """What bounds a run of pieces."""

    def begin_piece(self) -> None:
        """Others may have been served since the last."""

    def is_over(self) -> bool:
        """Whether the loop is to have a turn now."""

    async def turn(self) -> bool:
        """Give it one; whether the device is still there after it."""


def write_string(
    device: BusDevice, offset: int, size: int, data: bytes, pacer: Pacer
) -> Coroutine[Any, Any, None] | None:
    """Hand data to a device, whole if it takes that, else piece by piece; what has still to be awaited."""
    whole = getattr(device, "write_string", None)
    if whole is not None:
        done: Any = whole(offset, size, data)
        return _last(done) if hasattr(done, "__await__") else None
    pieces = (int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size))
    for value in pieces:
        done = device.write(offset, size, value)  # type: ignore[func-returns-value]
        if hasattr(done, "__await__"):
            return _write_rest(device, offset, size, pieces, done, pacer)
        if pacer.is_over():
            return _write_rest(device, offset, size, pieces, None, pacer)
    return None


async def _write_rest(
    device: BusDevice,
    offset: int,
    size: int,
    pieces: Iterator[int],
    done: Awaitable[None] | None,
    pacer: Pacer,
) -> None:
    if done is not None:
        await done
    for value in pieces:
        if pacer.is_over() and not await pacer.turn():
            return
        pacer.begin_piece()
        again: Any = device.write(offset, size, value)  # type: ignore[func-returns-value]
        if hasattr(again, "__await__"):
            await again


def read_string(
    device: BusDevice, offset: int, size: int, count: int, pacer: Pacer
) -> bytes | Coroutine[Any, Any, bytes]:
    """Get data from a device, whole if it gives that, else piece by piece; less if it is gone meanwhile."""
    whole = getattr(device, "read_string", None)
    if whole is not None:
        data = whole(offset, size, count)
        return _last(data) if hasattr(data, "__await__") else as_bytes(data)
    pieces = bytearray()
    for _ in range(count):
        value: Any = device.read(offset, size)
        if hasattr(value, "__await__"):
            return _read_rest(device, offset, size, count, pieces, value, pacer)
        pieces += _piece(value, size)
        if pacer.is_over():
            return _read_rest(device, offset, size, count, pieces, None, pacer)
    return bytes(pieces)


async def _read_rest(
    device: BusDevice,
    offset: int,
    size: int,
    count: int,
    pieces: bytearray,
    value: Awaitable[int] | None,
    pacer: Pacer,
) -> bytes:
    if value is not None:
        pieces += _piece(await value, size)
    while len(pieces) < size * count:
        if pacer.is_over() and not await pacer.turn():
            break
        pacer.begin_piece()
        again: Any = device.read(offset, size)
        pieces += _piece(await again if hasattr(again, "__await__") else again, size)
    return bytes(pieces)


def _piece(value: int, size: int) -> bytes:
    return (index(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def as_bytes(data: Any) -> bytes:
    """What a device read as, which has to be bytes or a buffer of them."""
    # bytes() alone makes that many zeros of a number.
    return bytes(memoryview(data))


async def _last(work: Awaitable[T]) -> T:
    return await work
