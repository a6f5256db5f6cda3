from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiokvm.kvm import Cap

HEADER = Path("/usr/include/linux/kvm.h")


@pytest.mark.skipif(not HEADER.exists(), reason="linux/kvm.h is not installed")
def test_every_capability_of_the_header_is_there() -> None:
    header = dict(re.findall(r"^#define (KVM_CAP_\w+)\s+(\d+)", HEADER.read_text(), re.MULTILINE))
    assert len(header) > 200
    assert {name: int(number) for name, number in header.items()}.items() <= {
        c.name: c.value for c in Cap
    }.items()


def test_no_number_stands_for_two() -> None:
    assert len({cap.value for cap in Cap}) == len(Cap.__members__)
    assert Cap["KVM_CAP_GUEST_MEMFD"].value == 234
