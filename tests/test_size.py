from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import ConfigError
from aiokvm.size import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("0", 0),
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        ("1.5GiB", 3 << 29),
        ("0.5M", 1 << 19),
        ("1.5K", 1536),
        ("1.3G", 1395863552),  # a multiple of 4096
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
    "text",
    [
        *("", "M", "-1M", "1.5", ".5G", "1.G", "1,5G", "1e3", "0x10", "1P", "1MM", "1 M B", "\u0665M"),
        *("1M\n1", "twelve", "9" * 30),
    ],
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


@pytest.mark.parametrize("size", [None, 1.5, True, b"1M", ["1M"]])
def test_what_is_neither_a_number_nor_a_text(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a size: write bytes, or a number with K, M, G or T"):
        parse_size(size)
