"""The description of a machine is checked before anything is made of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import ConfigError, boot
from aiokvm.machine.config import NAME_MAX, Config, parse_size

FLAT = boot.Flat(b"\xf4")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("0", 0),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("2K", 2 << 10),
        ("3G", 3 << 30),
        ("1T", 1 << 40),
        ("1GiB", 1 << 30),
        ("1GB", 1 << 30),
        (" 5 M ", 5 << 20),
        ("12B", 12),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1.5G", "0x10", "1P", "1MM", "1 M B", "\u0665M", "1M\n1", "twelve"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: write bytes, or a number with K, M, G or T"):
        parse_size(text)


@given(st.text(max_size=20).filter(lambda text: not any(c in "0123456789" for c in text)))
def test_text_without_digits_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_size(text)


@given(st.integers(0, 1 << 64), st.sampled_from(["", "K", "m", "GB", "tib"]))
def test_any_number_with_a_unit_is_a_size(number: int, unit: str) -> None:
    power = " KMGT".index(unit[0].upper()) if unit else 0
    assert parse_size(f"{number}{unit}") == number << 10 * power


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
