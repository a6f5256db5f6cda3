"""The description of a machine is checked before anything is made of it."""

from __future__ import annotations

from typing import Any

import pytest

from aiokvm import ConfigError, boot
from aiokvm.machine.config import NAME_MAX, Config

FLAT = boot.Flat(b"\xf4")


def test_what_is_not_given_has_a_default() -> None:
    config = Config(boot=FLAT)
    assert (config.cpus, config.memory_bytes, config.serial_ports) == (1, 512 << 20, 2)
    assert config.name.startswith("vm-")
    assert config.name != Config(boot=FLAT).name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cpus": 0}, "cpus is 0: a machine has at least one"),
        ({"cpus": -1}, "cpus is -1"),
        ({"cpus": 4097}, "cpus is 4097: a machine has at most 4096"),
        # A list of as many would take all memory.
        ({"cpus": 1 << 60}, "at most 4096"),
        ({"memory_bytes": 0}, "memory is 0 bytes: .* multiple of 4096, at least 2M"),
        ({"memory_bytes": (2 << 20) - 4096}, "at least 2M"),
        ({"memory_bytes": (2 << 20) + 1}, "multiple of 4096"),
        ({"memory_bytes": -4096}, "memory is -4096 bytes"),
        ({"serial_ports": 0}, "serial_ports is 0: a machine has 1 to 4"),
        ({"serial_ports": 5}, "serial_ports is 5"),
        ({"hugepage_bytes": 4096}, "hugepages of 4096 bytes do not exist on x86: use 2M or 1G"),
        ({"hugepage_bytes": 0}, "hugepages of 0 bytes do not exist"),
        ({"memory_bytes": 3 << 20, "hugepage_bytes": 2 << 20}, "3145728 bytes, not a multiple of huge pages"),
        ({"name": "x" * (NAME_MAX + 1)}, "is not 1 to 64 printable characters"),
        ({"name": "tab\there"}, "printable"),
    ],
)
def test_what_no_host_could_build_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(boot=FLAT, **wrong)


def test_what_any_host_could_build_is_not() -> None:
    Config(boot=FLAT, cpus=1, memory_bytes=2 << 20, serial_ports=1, name="x" * NAME_MAX)
    Config(boot=FLAT, memory_bytes=4 << 30, hugepage_bytes=1 << 30, serial_ports=4)
