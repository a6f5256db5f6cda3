"""What belongs to one event loop, and says so to all others.

A class that is `owned` has an attribute ``_owner``, the loop that it belongs to, or None while it belongs to
none: before it is opened, after it is closed. Its public methods raise StateError on any other loop
or thread.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, TypeVar

from aiokvm.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.aio.loop import Loop

C = TypeVar("C", bound=type)

# Beside what has a public name: how one is entered or called, and what iterates over it.
_ENTERED = ("__aenter__", "__anext__", "__call__")


def owned(cls: C) -> C:
    """Guard the methods that a class defines, and the setters of its properties. Reading is free.

    A coroutine is checked when it runs, for it may have been made elsewhere and be handed to its loop.
    """
    for name, member in tuple(vars(cls).items()):
        if name.startswith("_") and name not in _ENTERED:
            continue
        if isinstance(member, property) and member.fset is not None:
            setattr(cls, name, member.setter(_guarded(member.fset)))
        elif inspect.isfunction(member):
            setattr(cls, name, _guarded(member))
    return cls


def is_guarded(member: object) -> bool:
    """Whether a method checks where it is called."""
    return hasattr(member, "_is_guarded")


def check_loop(owner: Any) -> None:
    """Raise StateError unless the caller is where the owner belongs."""
    loop: Loop | None = owner._owner
    if loop is not None:
        check_here(loop, owner)


def check_here(loop: Loop, owner: object) -> None:
    """The same for one that belongs to several loops, of which this is meant."""
    if loop.is_here():
        return
    if loop.pid != os.getpid():
        raise StateError(f"{owner!r} belongs to the process that created it: a fork does not inherit it")
    raise StateError(
        f"{owner!r} belongs to another event loop: from other threads use asyncio.run_coroutine_threadsafe, "
        "loop.call_soon_threadsafe or trio.from_thread"
    )


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def call(self: Any, *args: Any, **named: Any) -> Any:
            check_loop(self)
            return await method(self, *args, **named)

    else:

        @functools.wraps(method)
        def call(self: Any, *args: Any, **named: Any) -> Any:
            check_loop(self)
            return method(self, *args, **named)

    call._is_guarded = True  # type: ignore[attr-defined]
    return call
