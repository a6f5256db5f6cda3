"""Whatever a program may call says what to pass: all of the public API, as it is today."""

from __future__ import annotations

import enum
import inspect
from typing import TYPE_CHECKING, Any

import pytest

import aiokvm
from aiokvm import block, boot, images, lab, metrics, net

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = (aiokvm, block, boot, net, images, lab, metrics)
# Made by aiokvm alone: what happened, figures, and the parts of a machine.
MADE = {
    *(
        "VM",
        "Attachment",
        "ConsoleStream",
        "Consoles",
        "GuestMemory",
        "Irq",
        "MemoryBalloon",
        "SerialConsole",
    ),
    *("Timer", "Trace", "VirtioAttachment", "VirtualCpu", "VmDisk", "VmNic"),
    *("DeviceFailed", "DeviceNeedsReset", "DiskFailed", "Event", "Exit", "Exited", "LinkChanged", "NicLost"),
    *("Paused", "Resumed", "Started", "WasReset", "HoldUp", "Placement", "RamRegion"),
    *("DeviceStats", "DiskStats", "VcpuStats", "VmStats", "aiokvm.Limit"),
    *("Batch", "Connection", "Flow", "Forward", "NetStats", "Rule", "SwitchPort", "SwitchStats"),
    *("Image", "Progress"),
}
# Called by aiokvm alone, some of them as methods that a program has written.
CALLED = {
    *("SerialConsole.close", "SerialConsole.on_transmit"),
    *("ConsoleStream.close", "ConsoleStream.on_guest_open", "ConsoleStream.on_transmit"),
    *("Device.read", "Device.write"),
    *(f"VirtioDevice.{name}" for name in ("accept_features", "activate", "notified", "read_config", "serve")),
    *("VirtioDevice.stop_queue", "VirtioDevice.write_config"),
    *(f"VirtioAttachment.{name}" for name in ("activate", "notified", "stop_queue", "take_queue")),
    *(
        f"{backend}.{name}"
        for backend in ("BlockBackend", "Raw", "Nbd", "Overlay", "Image")
        for name in ("check", "read", "write", "write_zeroes", "discard")
    ),
    *(f"{protocol}.plan" for protocol in ("BootProtocol", "Linux", "Flat", "Multiboot")),
    *("Asgi.start", "block.Limit.take"),
    *(
        f"{backend}.open"
        for backend in ("NetBackend", "Tap", "User", "Stream", "Datagram", "Port", "SwitchPort")
    ),
}


class Wrong:
    """What nobody takes."""

    def __repr__(self) -> str:
        return "<wrong>"


def excused(names: set[str], module: str, name: str) -> bool:
    short = module.removeprefix("aiokvm.")
    return bool({name, f"{short}.{name}"} & names)


def public() -> Iterator[tuple[str, Any]]:
    """Each public function, constructor, method and setter, with its name."""
    seen: set[int] = set()
    for module in MODULES:
        for name in module.__all__:
            found = getattr(module, name)
            if id(found) in seen:
                continue
            seen.add(id(found))
            if inspect.isclass(found):
                if issubclass(found, (BaseException, enum.Enum)) or getattr(found, "_is_protocol", False):
                    continue
                for member, function in members(found):
                    if member == "__init__" and excused(MADE, module.__name__, name):
                        continue
                    if not excused(CALLED, module.__name__, f"{name}.{member}"):
                        yield f"{module.__name__}.{name}.{member}", function
            elif inspect.isfunction(found):
                yield f"{module.__name__}.{name}", found


def members(cls: type) -> Iterator[tuple[str, Any]]:
    for name in dir(cls):
        if name.startswith("_") and name != "__init__":
            continue
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            member = member.fset
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if inspect.isfunction(member) and member.__module__.startswith("aiokvm"):
            yield name, member


def parameters(function: Any) -> list[str]:
    return [
        parameter.name
        for number, parameter in enumerate(inspect.signature(function).parameters.values())
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and not (number == 0 and parameter.name in ("self", "cls"))
    ]


PUBLIC = {name: function for name, function in public() if parameters(function)}


def test_there_is_a_public_api() -> None:
    assert len(PUBLIC) > 90
    assert {"aiokvm.VM.create", "aiokvm.block.Raw.__init__", "aiokvm.lab.run"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_wrong_arguments_are_told(name: str) -> None:
    function = PUBLIC[name]
    # What guards the loop is outside of it.
    while getattr(getattr(function, "__wrapped__", None), "is_checked", False):
        function = function.__wrapped__
    assert getattr(function, "is_checked", False), f"{name} is not checked: see aiokvm.arguments"
    first = next(iter(inspect.signature(function).parameters))
    itself = (object(),) if first in ("self", "cls") else ()

    def call(parameter: str) -> None:
        result = function(*itself, **{parameter: Wrong()})
        if inspect.iscoroutine(result):
            result.send(None)

    for parameter in parameters(function):
        with pytest.raises(aiokvm.ConfigError, match=f"{parameter}=<wrong>: give "):
            call(parameter)
