"""Many small things, one after the other, that would hold the loop together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aiokvm.net.plane import BUDGET_NS

if TYPE_CHECKING:
    from aiokvm.aio import Loop


class Pace:
    """``await pace.step()`` after each of them: the loop has a turn when they have taken `BUDGET_NS`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._until_ns = time.monotonic_ns() + BUDGET_NS

    async def step(self) -> None:
        """One of them is done."""
        if time.monotonic_ns() >= self._until_ns:
            await self._loop.turn()
            self._until_ns = time.monotonic_ns() + BUDGET_NS
