"""Wrong arguments of public functions: a typed error that says what to pass."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal

import pytest

from aiokvm import VM, ConfigError, Device, block, boot
from aiokvm.arguments import checked, checked_late, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

FLAT = boot.Flat(b"\xf4")


class Wrong:
    """What nobody takes."""

    def __repr__(self) -> str:
        return "<wrong>"


class Silent:
    """Cannot tell what it is."""

    def __repr__(self) -> str:
        raise RuntimeError


class Index:
    """May stand for a number, and is none."""

    def __index__(self) -> int:
        return 1


class Named:
    """A path of bytes, or of what no path is."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def __fspath__(self) -> Any:
        return self.name


@checked
def function(
    number: int = 1,
    real: float = 1.0,
    text: str | None = None,
    mode: Literal["a", "b"] = "a",
    flag: bool = False,
    data: bytes = b"",
    words: list[str] | tuple[str, ...] = (),
    pattern: re.Pattern[bytes] | None = None,
    what: Unknown = None,  # type: ignore[name-defined]  # noqa: F821
    *,
    pair: tuple[int, int] = (1, 2),
    path: str | os.PathLike[str] = "",
    sizes: Mapping[str, int | None] = {},
    many: Iterable[int] = (),
) -> str:
    return "done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": "2"}, "function: number='2': give a whole number"),
        ({"number": True}, "number=True: give a whole number"),
        ({"number": 1.5}, "number=1.5: give a whole number"),
        ({"real": "1"}, "real='1': give a number"),
        ({"real": math.nan}, "real=nan: give a number"),
        ({"text": 5}, "text=5: give str or None"),
        ({"mode": "c"}, "mode='c': give 'a' or 'b'"),
        ({"flag": 1}, "flag=1: give True or False"),
        ({"data": "text"}, "data='text': give bytes"),
        ({"words": "text"}, "words='text': give a list of str"),
        ({"words": [1]}, r"words=\[1\]: give a list of str"),
        ({"pattern": re.compile("text")}, r"pattern=re.compile\('text'\): give a compiled pattern of bytes"),
        ({"pair": (1,)}, r"pair=\(1,\): give a tuple of 2 \(a whole number, a whole number\)"),
        ({"pair": (1, "2")}, r"pair=\(1, '2'\): give a tuple of 2"),
        ({"number": int}, "number=<class 'int'>: give a whole number"),
        ({"number": Index()}, "number=<.*Index.*>: give a whole number"),
        ({"number": 1 << 128}, "number=34028236692.*: give a whole number"),
        ({"number": 10**5000}, "number=<int object at .*>: give a whole number"),
        ({"real": 10**5000}, "real=<int object at .*>: give a number"),
        ({"number": Silent()}, "number=<.*Silent object at .*>: give a whole number"),
        ({"path": b"x"}, "path=b'x': give str or a path"),
        ({"path": Named(b"x")}, "path=.*: give str or a path"),
        ({"path": Named(5)}, "path=.*: give str or a path"),
        ({"words": iter(["x"])}, "words=.*: give a list of str"),
        ({"many": ["x"]}, r"many=\['x'\]: give a list of a whole number"),
        ({"data": memoryview(b"abcd")[::2]}, "data=<memory at .*: give bytes"),
        ({"data": memoryview(b"abcd").cast("I")}, "data=<memory at .*: give bytes"),
        ({"sizes": ["x"]}, r"sizes=\['x'\]: give a dict of str to a whole number or None"),
        ({"sizes": {1: 1}}, r"sizes={1: 1}: give a dict of str to a whole number or None"),
        ({"sizes": {"a": "b"}}, r"sizes={'a': 'b'}: give a dict of str to a whole number or None"),
    ],
)
def test_an_argument_that_the_annotation_does_not_allow(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        function(**arguments)


def test_what_fits_passes() -> None:
    fitting = (2, 1, "x", "b", True, bytearray(b""), ["x"], re.compile(b""), Wrong())
    assert function(*fitting, pair=(1, 2)) == "done"  # type: ignore[arg-type]
    assert function((1 << 128) - 1, 10**30, path=Named("x"), sizes={"a": None, "b": 2}) == "done"
    assert function(many=iter([1])) == "done"
    with pytest.raises(ConfigError, match="mode='c'"):
        function(2, 1, "x", "c")  # type: ignore[arg-type]


def test_what_is_shown_is_short() -> None:
    assert len(shown("x" * 1000)) < 100


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boot": "vmlinuz"}, r"boot='vmlinuz': give boot.Linux\(kernel, ...\)"),
        ({"boot": boot.Linux}, "give boot.Linux"),
        ({"devices": [Device()]}, r"devices=\[<.*Device.*: give a list of what device.at\("),
        ({"cpus": "2"}, "VM.create: cpus='2': give a whole number"),
        ({"name": 5}, "name=5: give str"),
        ({"memory": 1.5}, "memory=1.5: give a whole number or str"),
        ({"serial_ports": None}, "serial_ports=None: give a whole number"),
        (
            {"disks": ["disk.img"]},
            r"disks=\['disk.img'\]: give a list of block.Raw\(path\) or another BlockBackend or Disk",
        ),
        ({"disks": block.Raw("x")}, "disks=.*: give a list"),
        ({"nets": ["user"]}, r"nets=\['user'\]: give a list of net.User\(\) or another NetBackend or"),
        ({"on_reset": "restart"}, "on_reset='restart': give 'exit' or 'reboot'"),
        ({"balloon": "yes"}, "balloon='yes': give True or False"),
        ({"poll_ns": "fast"}, "poll_ns='fast': give a whole number"),
        ({"console": 5}, "console=5: give"),
    ],
)
async def test_a_machine_that_is_described_wrongly(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await VM.create(**{"boot": FLAT, "memory": "2M"} | arguments)


@pytest.mark.anyio
@pytest.mark.kvm
async def test_methods_that_are_called_wrongly() -> None:
    async with await VM.create(boot=FLAT, memory="2M") as vm:
        with pytest.raises(ConfigError, match="send: data='text': give bytes"):
            await vm.serial.send("text")  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match="expect: pattern='# ': give bytes or a compiled pattern of bytes"
        ):
            await vm.serial.expect("# ")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="mode='postd': give RegionMode or 'exit' or 'posted'"):
            vm.attach(Device(), mmio=0xD000_0000, mode="postd")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="stop: timeout='5': give a number"):
            await vm.stop("5")  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_what_is_checked_late_costs_nothing_and_says_the_same() -> None:
    @checked_late
    def add(number: int, *, other: int = 0) -> int:
        return number + other

    @checked_late
    async def later(number: int) -> int:
        return number + 1

    assert add(1, other=2) == 3
    assert await later(1) == 2
    with pytest.raises(ConfigError, match="add: number='1': give a whole number"):
        add("1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="add: other=None: give a whole number"):
        add(1, other=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"later: number=\[\]: give a whole number"):
        await later([])  # type: ignore[arg-type]

    @checked_late
    def fails(number: int) -> None:
        raise TypeError(number)

    # What else has failed is told as it is.
    with pytest.raises(TypeError, match="5"):
        fails(5)


@pytest.mark.anyio
@pytest.mark.kvm
async def test_what_is_told_of_a_guest_s_memory_and_interrupts() -> None:
    device = Device()
    async with await VM.create(boot=FLAT, memory="2M", devices=[device.at(mmio=0xD000_0000, irq=5)]) as vm:
        with pytest.raises(ConfigError, match=r"GuestMemory\.read: gpa='0x1000': give a whole number"):
            vm.memory.read("0x1000", 2)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="write: data='text': give bytes"):
            vm.memory.write(0x1000, "text")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"write: data=<memory at .*: give bytes"):
            vm.memory.write(0x1000, memoryview(b"abcd")[::2])
        with pytest.raises(ConfigError, match=r"read: gpa=-1\.0: give a whole number"):
            vm.memory.read(-1.0, 2)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="level='high': give True or False"):
            device.irq.set("high")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="timer: callback=5: give a function"):
            device.timer(1, 5)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="read_register: name=0: give str"):
            vm.vcpus[0].read_register(0)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"detach: attachment=.*: give"):
            vm.detach(device)  # type: ignore[arg-type]
