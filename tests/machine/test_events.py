"""Events: every subscriber gets every event, and one that does not look costs a bound."""

from __future__ import annotations

import gc

import anyio
import anyio.lowlevel
import pytest

from aiokvm.machine.events import BACKLOG, Event, EventHub

pytestmark = pytest.mark.anyio


async def test_each_subscriber_gets_what_comes_after_it_subscribed() -> None:
    hub = EventHub()
    first = hub.subscribe()
    hub.emit(Event("a"))
    second = hub.subscribe()
    hub.emit(Event("b"))
    hub.close()
    assert [event.machine async for event in first] == ["a", "b"]
    assert [event.machine async for event in second] == ["b"]
    assert [event.machine async for event in hub.subscribe()] == []


async def test_a_subscriber_waits_for_the_next_event() -> None:
    hub = EventHub()
    seen: list[str] = []

    async def listen() -> None:
        seen.extend([event.machine async for event in hub.subscribe()])
        seen.append("end")

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        hub.emit(Event("a"))
        await anyio.wait_all_tasks_blocked()
        hub.emit(Event("b"))
        hub.emit(Event("c"))
        await anyio.wait_all_tasks_blocked()
        hub.close()
    assert seen == ["a", "b", "c", "end"]


async def test_a_subscriber_that_falls_behind_loses_its_oldest() -> None:
    hub = EventHub()
    events = hub.subscribe()
    for number in range(BACKLOG + 3):
        hub.emit(Event(str(number)))
    hub.close()
    assert [event.machine async for event in events] == [str(number) for number in range(3, BACKLOG + 3)]


async def test_a_subscriber_that_left_in_the_middle_leaves_nothing_to_finish() -> None:
    hub = EventHub()
    hub.emit(Event("nobody's"))
    events = hub.subscribe()
    hub.emit(Event("a"))
    async for event in events:
        assert event.machine == "a"
        break
    del events
    gc.collect()
    hub.emit(Event("b"))
    assert len(hub._subscribers) == 0
    hub.close()
    hub.close()


async def test_a_cancelled_wait_loses_no_event() -> None:
    hub = EventHub()
    events = hub.subscribe()
    with anyio.move_on_after(0):
        await anext(events)
    hub.emit(Event("a"))
    assert (await anext(events)).machine == "a"
