"""net/plane.py: who has how much of the loop's time."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio.lowlevel
import pytest

from aiokvm._core import lib
from aiokvm.net import Port
from aiokvm.net import plane as planes

pytestmark = pytest.mark.anyio
Linked = Any


class EndlessWork:
    """The C core, in which every plane always has more to do."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.budgets: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def aiokvm_net_serve(self, core: Any, budget_ns: int) -> int:
        self.budgets.append(budget_ns)
        self._lib.aiokvm_net_serve(core, budget_ns)
        return 1


async def test_planes_that_are_busy_share_the_time(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        used = [await stack.enter_async_context(linked(Port(), Port())) for _ in range(20)]
        work = EndlessWork(lib)
        monkeypatch.setattr(planes, "lib", work)
        for plane in used:
            plane._serve()
        assert work.budgets[:3] == [planes.BUDGET_NS, planes.BUDGET_NS // 2, planes.BUDGET_NS // 3]
        work.budgets.clear()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert set(work.budgets) == {planes.LEAST_NS}
        monkeypatch.undo()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert {plane._busy.planes for plane in used} == {0}
