"""String instructions on the loop's side: a device takes a run of accesses whole, or piece by piece.

A device may answer by a coroutine at any piece; what has still to be awaited is returned.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterator

    from aiokvm.hw.bus import BusDevice

T = TypeVar("T")


def write_string(device: BusDevice, offset: int, size: int, data: bytes) -> Coroutine[Any, Any, None] | None:
    """Hand data to a device, whole if it takes that, else piece by piece; what has still to be awaited."""
    whole = getattr(device, "write_string", None)
    if whole is not None:
        done: Any = whole(offset, size, data)
        return _last(done) if hasattr(done, "__await__") else None
    pieces = (int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size))
    for value in pieces:
        done = device.write(offset, size, value)  # type: ignore[func-returns-value]
        if hasattr(done, "__await__"):
            return _write_rest(device, offset, size, pieces, done)
    return None


async def _write_rest(
    device: BusDevice, offset: int, size: int, pieces: Iterator[int], done: Awaitable[None]
) -> None:
    await done
    for value in pieces:
        again: Any = device.write(offset, size, value)  # type: ignore[func-returns-value]
        if hasattr(again, "__await__"):
            await again


def read_string(device: BusDevice, offset: int, size: int, count: int) -> bytes | Coroutine[Any, Any, bytes]:
    """Get data from a device, whole if it gives that, else piece by piece."""
    whole = getattr(device, "read_string", None)
    if whole is not None:
        data = whole(offset, size, count)
        return _last(data) if hasattr(data, "__await__") else as_bytes(data)
    pieces = bytearray()
    for _ in range(count):
        value: Any = device.read(offset, size)
        if hasattr(value, "__await__"):
            return _read_rest(device, offset, size, count, pieces, value)
        pieces += _piece(value, size)
    return bytes(pieces)


async def _read_rest(
    device: BusDevice, offset: int, size: int, count: int, pieces: bytearray, value: Awaitable[int]
) -> bytes:
    pieces += _piece(await value, size)
    while len(pieces) < size * count:
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
