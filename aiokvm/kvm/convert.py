"""Between the dataclasses of the KVM structures and the C structures themselves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from aiokvm._core import ffi


class Struct:
    """A KVM structure as a frozen dataclass: its fields are those of ``struct c_name``, by name.

    int stands for a number, bytes for an array of bytes, a tuple for any other array, a Struct for a
    structure inside. Reserved fields and padding are left out; they are zero. A number that the C field
    cannot hold raises OverflowError.
    """

    __slots__ = ()
    c_name: ClassVar[str] = ""


T = TypeVar("T", bound=Struct)

_Reader = Callable[[Any], Any] | None
_Plan = tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]], list[_Reader]]


def to_initializer(value: Any) -> Any:
    """Return what cffi initializes a C field with: structures as dicts, tuples as lists."""
    if isinstance(value, Struct):
        names, read, readers = _plan(type(value))
        values = read(value)
        return dict(zip(names, map(to_initializer, values) if readers else values, strict=True))
    if isinstance(value, tuple):
        return [to_initializer(item) for item in value]
    return value


def to_c(value: Struct) -> Any:
    """Return a new C structure that holds ``value``."""
    return ffi.new(f"struct {value.c_name} *", to_initializer(value))


def from_c(struct: type[T], c: Any) -> T:
    """Return the dataclass of the C structure ``c`` (or pointer to one)."""
    _, read, readers = _plan(struct)
    values = read(c)
    if not readers:
        return struct(*values)
    return struct(
        *(reader(value) if reader else value for reader, value in zip(readers, values, strict=True))
    )


def _make_plan(struct: Any) -> _Plan:
    """Return the names of the fields, what reads them all at once, and what turns each into its Python value.

    The last is empty for a structure of nothing but numbers: that is the quick way of Regs.
    """
    names = tuple(field.name for field in dataclasses.fields(struct))
    hints = get_type_hints(struct)
    readers = [_reader(hints[name]) for name in names]
    read = attrgetter(*names) if len(names) > 1 else (lambda c: (getattr(c, names[0]),))
    return names, read, readers if any(readers) else []


_plan: Callable[[Any], _Plan] = functools.cache(_make_plan)


def _reader(hint: Any) -> _Reader:
    if get_origin(hint) is tuple:
        item = _reader(get_args(hint)[0])
        return tuple if item is None else lambda c: tuple(item(element) for element in c)
    if hint is bytes:
        return lambda c: bytes(ffi.buffer(c))
    if issubclass(hint, Struct):
        return functools.partial(from_c, hint)
    return None
