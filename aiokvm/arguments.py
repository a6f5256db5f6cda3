"""Arguments of public functions, checked against their annotations."""

from __future__ import annotations

import builtins
import collections.abc as abc
import inspect
import os
import re
import types
import typing
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast

from aiokvm.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# What to pass in words, and whether a value is that.
Rule = tuple[str, Callable[[Any], bool]]

_SHOWN = 80
# Nothing here has numbers of more; Python does not show or divide those that have very many.
_BITS = 128
# What arguments of a wrong type end in where nothing looks at them, or another function does.
_MISFITS = (TypeError, AttributeError, LookupError, ValueError, OverflowError, BufferError)
# What annotations name that a module imports for the type checker alone.
_NAMES: dict[str, Any] = {
    **{
        name: getattr(abc, name)
        for name in ("Awaitable", "Callable", "Collection", "Iterable", "Mapping", "Sequence")
    },
    "Any": Any,
    "Literal": Literal,
    "Path": Path,
    "PathLike": os.PathLike,
    "os": os,
    "re": re,
}
_CLASSES = {
    *("BlockBackend", "CpuState", "Disk", "Hook", "Limit", "NetBackend", "Nic", "Pcap", "Rule", "VM"),
    *("Attachment", "VirtioDevice"),
}
# How what is to be passed is called, by the name of its class, where that alone says too little.
_WORDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "BlockBackend": "block.Raw(path) or another BlockBackend",
    "NetBackend": "net.User() or another NetBackend",
    "Asgi": "net.Asgi(app)",
    "Callable": "a function",
    "CpuState": "boot.CpuState(rip=...)",
    "Limit": "a Limit",
    "VirtioDevice": "a VirtioDevice",
    "Placement": "what device.at(mmio=0xd0000000, size=4) gives",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function or method raise ConfigError for an argument that its annotation does not allow.

    What an annotation says that cannot be known at runtime is not checked.
    """
    check = _check(function)

    if function.__code__.co_flags & inspect.CO_COROUTINE:
        later = cast("Callable[P, Awaitable[Any]]", function)

        async def call_later(*args: P.args, **kwargs: P.kwargs) -> Any:
            check(args, kwargs)
            return await later(*args, **kwargs)

        return cast("Callable[P, R]", _like(function, call_later))

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check(args, kwargs)
        return function(*args, **kwargs)

    return _like(function, call)


def checked_late(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function do so once it has failed: it costs nothing where every microsecond counts."""
    check = _check(function)

    if function.__code__.co_flags & inspect.CO_COROUTINE:
        later = cast("Callable[P, Awaitable[Any]]", function)

        async def call_later(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                return await later(*args, **kwargs)
            except _MISFITS:
                check(args, kwargs)
                raise

        return cast("Callable[P, R]", _like(function, call_later))

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except _MISFITS:
            check(args, kwargs)
            raise

    return _like(function, call)


def checked_init(cls: type[T]) -> type[T]:
    """Have a class's constructor do so; above ``@dataclass``, too."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]
    return cls


def _like(function: Callable[..., object], call: T) -> T:
    """Have ``call`` look as the function; `functools.wraps` would take most of the time of an import."""
    made: Any = call
    made.__name__, made.__qualname__, made.__module__ = (
        function.__name__,
        function.__qualname__,
        function.__module__,
    )
    made.__doc__, made.__wrapped__, made.is_checked = function.__doc__, function, True
    return call


def _check(function: Callable[..., object]) -> Callable[[tuple[object, ...], dict[str, object]], None]:
    """Return what raises for arguments that do not fit. Annotations are looked at when it is called first."""
    rules: dict[str, Rule] | None = None
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    def check(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal rules
        if rules is None:
            rules = _rules(function)
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if (rule := rules.get(name)) and not rule[1](value):
                raise ConfigError(f"{_title(function)}: {name}={shown(value)}: give {rule[0]}")

    return check


def shown(value: object) -> str:
    """Return a value as a message shows it, be it one that cannot tell what it is."""
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _title(function: Callable[..., object]) -> str:
    return function.__qualname__.removesuffix(".__init__")


class _Named(type):
    """Stands for a class that a module imports for the type checker alone: it is known by its name."""

    def __instancecheck__(cls, value: object) -> bool:
        return any(base.__name__ == cls.__name__ for base in type(value).__mro__)


class _Bytes(type):
    """Stands for whatever has the buffer protocol."""

    def __instancecheck__(cls, value: object) -> bool:
        try:
            return memoryview(value).c_contiguous  # type: ignore[arg-type]
        except (TypeError, ValueError):  # the latter of a view that was released
            return False


class _Scope(dict[str, Any]):
    """Any other name that is only there for the type checker may be anything."""

    def __missing__(self, name: str) -> Any:
        if name == "Buffer":
            return _Bytes("bytes", (), {})
        if name == "Responder":
            return _Named("Asgi", (), {}) | abc.Callable
        return _Named(name, (), {}) if name in _CLASSES else Any


def _rules(function: Callable[..., object]) -> dict[str, Rule]:
    scope = _Scope(vars(builtins) | _NAMES | function.__globals__)
    found = {}
    for name, hint in function.__annotations__.items():
        try:
            rule = _rule(eval(hint, {}, scope) if isinstance(hint, str) else hint)  # our own annotations
        except TypeError:
            continue
        if rule:
            found[name] = rule
    return found


def _rule(hint: Any) -> Rule | None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        rules = [_rule(arg) for arg in args]
        if None in rules:
            return None
        known = cast("list[Rule]", rules)
        return " or ".join(text for text, _ in known), lambda value: any(test(value) for _, test in known)
    if origin is Literal:
        values = [(type(arg), arg) for arg in args]
        return " or ".join(map(repr, args)), lambda value: (type(value), value) in values
    if origin is not None:
        return _generic(origin, args)
    if hint is None or hint is type(None):
        return "None", lambda value: value is None
    return _class(hint) if isinstance(hint, type) else None


def _class(hint: type) -> Rule | None:
    if hint is object or hint is Any or getattr(hint, "_is_protocol", False):
        return None
    if hint is int:
        return _WORDS["int"], _is_whole
    if hint is float:
        return _WORDS["float"], _is_number
    if hint is bytes:
        return "bytes", lambda value: isinstance(value, (bytes, bytearray)) or _is_view_of_bytes(value)
    return _WORDS.get(hint.__name__, hint.__name__), lambda value: isinstance(value, hint)


def _is_view_of_bytes(value: object) -> bool:
    try:
        return isinstance(value, memoryview) and value.c_contiguous and value.nbytes == len(value)
    except (TypeError, ValueError):
        return False


def _is_whole(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if not isinstance(value, int):
        from numbers import Integral

        return isinstance(value, Integral)
    return value.bit_length() <= _BITS


def _is_number(value: object) -> bool:
    # NaN, which is none, equals nothing.
    return _is_whole(value) or (isinstance(value, float) and value == value)


def _generic(origin: Any, args: tuple[Any, ...]) -> Rule | None:
    if origin is os.PathLike:
        return "a path", _is_path
    if origin is abc.Callable:
        return "a function", callable
    if origin is re.Pattern:
        return f"a compiled pattern of {args[0].__name__}", lambda value: _is_pattern(value, args[0])
    if not isinstance(origin, type):
        return None
    if issubclass(origin, abc.Mapping):
        return _mapping(*map(_rule, args))
    if issubclass(origin, tuple) and args[-1:] != (...,):
        return _tuple([_rule(arg) for arg in args])
    if issubclass(origin, abc.Iterable) and not issubclass(origin, abc.Iterator):
        item = _rule(args[0]) if args else None
        # What can be walked but once is enough for who asks for no more.
        kind = abc.Collection if issubclass(origin, abc.Collection) else abc.Iterable
        return f"a list of {item[0]}" if item else "a list", lambda value: _is_list(value, item, kind)
    return origin.__name__, lambda value: isinstance(value, origin)


def _is_pattern(value: object, kind: type) -> bool:
    return isinstance(value, re.Pattern) and isinstance(value.pattern, kind)


def _is_path(value: object) -> bool:
    try:
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    except TypeError:
        return False


def _mapping(key: Rule | None, item: Rule | None) -> Rule:
    def fits(value: object) -> bool:
        return isinstance(value, abc.Mapping) and _all_fit(key, value) and _all_fit(item, value.values())

    words = [rule[0] if rule else "anything" for rule in (key, item)]
    return f"a dict of {' to '.join(words)}" if key or item else "a dict", fits


def _tuple(rules: list[Rule | None]) -> Rule:
    def fits(value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == len(rules)
            and all(rule is None or rule[1](item) for rule, item in zip(rules, value, strict=True))
        )

    words = [rule[0] if rule else "anything" for rule in rules]
    return f"a tuple of {len(rules)} ({', '.join(words)})", fits


def _is_list(value: object, item: Rule | None, kind: type) -> bool:
    if isinstance(value, (str, bytes)) or not isinstance(value, kind):
        return False
    # What can be walked but once is left to who uses it.
    return not isinstance(value, abc.Collection) or _all_fit(item, value)


def _all_fit(rule: Rule | None, values: Iterable[object]) -> bool:
    return rule is None or all(map(rule[1], values))
