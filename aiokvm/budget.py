"""What the guests of a process share: ``_core/budget.c`` for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib

if TYPE_CHECKING:
    from aiokvm._core import Pointer

DESCRIPTORS = lib.AIOKVM_BUDGET_DESCRIPTORS
FRAME_BYTES = lib.AIOKVM_BUDGET_FRAME_BYTES
BOUNCE_BYTES = lib.AIOKVM_BUDGET_BOUNCE_BYTES
LOG_LINES = lib.AIOKVM_BUDGET_LOG_LINES


class Share:
    """What one of them has of a budget of the process, one of those above.

    It is given back with the object. Raises MemoryError.
    """

    def __init__(self, budget: int, whole: Share | None = None) -> None:
        core = lib.aiokvm_share_new_part(whole.core) if whole else lib.aiokvm_share_new(budget)
        if not core:
            raise MemoryError("no memory for a share of a budget")
        self.core: Pointer = ffi.gc(core, lib.aiokvm_share_free)
        """The ``struct aiokvm_share *``."""
        self._budget = budget

    def part(self) -> Share:
        """For one of several who have this share together: what they take is counted as one."""
        return Share(self._budget, self)

    def take(self, amount: int) -> bool:
        """Take so much more, unless that were more than this share may have now."""
        return bool(lib.aiokvm_share_take(self.core, amount))

    def fits(self, amount: int) -> bool:
        """Whether so much more could be taken now."""
        return bool(lib.aiokvm_share_fits(self.core, amount))

    def add(self, amount: int) -> None:
        """Count what is there already, whether it fits or not."""
        lib.aiokvm_share_add(self.core, amount)

    def give(self, amount: int) -> None:
        """Give so much back."""
        lib.aiokvm_share_give(self.core, amount)


class Descriptors:
    """What a guest's connections have open in the program: of its share of the process's; one in any case."""

    def __init__(self, share: Share | None = None) -> None:
        self._share = share.part() if share else Share(DESCRIPTORS)
        self._held = 0

    def take(self) -> bool:
        """Count one more, unless there may be none now."""
        if not self._share.take(1):
            if self._held:
                return False
            self._share.add(1)
        self._held += 1
        return True

    def give(self) -> None:
        """One has been closed."""
        self._held -= 1
        self._share.give(1)
