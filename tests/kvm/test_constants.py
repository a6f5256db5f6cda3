from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiokvm.kvm import KvmExit, MpState, StatType, StatUnit, constants

HEADERS = [Path("/usr/include/linux/kvm.h"), Path("/usr/include/x86_64-linux-gnu/asm/kvm.h")]


def header_numbers() -> dict[str, int]:
    """The constants that are a number, or a number shifted."""
    numbers = {}
    for path in HEADERS:
        for name, value, shift in re.findall(
            r"^\s*#\s*define\s+(\w+)\s+\(?(0x[0-9a-fA-F]+|\d+)(?:U?L?L?)(?:\s*<<\s*(\d+))?\)?\s*(?:/\*.*)?$",
            path.read_text(),
            re.MULTILINE,
        ):
            numbers[name] = int(value, 0) << int(shift or 0)
    return numbers


@pytest.mark.skipif(not all(path.exists() for path in HEADERS), reason="the headers are not installed")
def test_constants_are_the_headers() -> None:
    numbers = header_numbers()
    mine = {name: value for name, value in vars(constants).items() if name.startswith("KVM_")}
    mine |= {member.name: member.value for enum in (KvmExit, MpState) for member in enum}
    shared = mine.keys() & numbers.keys()
    assert len(shared) > 130
    assert {name: mine[name] for name in shared} == {name: numbers[name] for name in shared}


def test_statistics_numbers() -> None:
    assert [member.value for member in StatType] == [0, 1, 2, 3, 4]
    assert StatUnit["KVM_STATS_UNIT_SECONDS"].value == 2
