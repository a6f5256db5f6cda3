"""Two ends that are linked, without a machine."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvloop

from aiokvm.aio import current_loop
from aiokvm.net.plane import Plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from aiokvm.net import NetBackend

LIMIT_S = 60.0
LOOPS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


def unexpected(why: str) -> None:
    raise AssertionError(f"lost: {why}")


@asynccontextmanager
async def linked(*backends: NetBackend, thread: str | None = None) -> AsyncIterator[Plane]:
    """Backends in a plane of their own, each linked to the next: the first to the second and so on."""
    plane = Plane(current_loop(), thread)
    try:
        with anyio.fail_after(LIMIT_S):
            ends = [await backend.open(plane, unexpected) for backend in backends]
            for one, other in zip(ends[::2], ends[1::2], strict=True):
                one.link(other)
            yield plane
    finally:
        with anyio.CancelScope(shield=True):
            for backend in backends:
                await backend.close()
        plane.close()


@pytest.fixture(name="linked")
def linked_fixture() -> Any:
    return linked


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    """Runs a coroutine function on a loop of its own: for hypothesis, which wants one for each example."""
    backend, options = request.param

    def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT_S):
                await main()

        anyio.run(limited, backend=backend, backend_options=options)

    return run
