"""The debug-exit port: a guest ends its machine by writing a code to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DEBUG_EXIT_PORT = 0xF4
DEBUG_EXIT_SIZE = 4


class DebugExit:
    """Calls ``on_exit`` with what was written, whatever its width; reads give ones. Has no state to save."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        """Return ones."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """End the machine with ``value`` as its code."""
        self._on_exit(value)

    def reset(self) -> None:
        """Do nothing: there is no state."""
