from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import ConfigError
from aiokvm.block import DiskOption, parse_disk


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("root.img", DiskOption("root.img")),
        ("root.img,ro", DiskOption("root.img", "raw", True)),
        ("a,b,ro,format=qcow2", DiskOption("a,b", "qcow2", True)),
        ("a.qcow2,format=raw,ro", DiskOption("a.qcow2", "raw", True)),
        ("/d/A.QCOW2", DiskOption("/d/A.QCOW2", "qcow2")),
        ("a.vmdk", DiskOption("a.vmdk", "vmdk")),
        ("ro", DiskOption("ro")),
        ("disk,rw", DiskOption("disk,rw")),
        ("nbd://host/export,ro", DiskOption("nbd://host/export", "nbd", True)),
        ("nbd+unix:///?socket=/s", DiskOption("nbd+unix:///?socket=/s", "nbd")),
    ],
)
def test_disks(text: str, option: DiskOption) -> None:
    assert parse_disk(text) == option


@pytest.mark.parametrize(
    "text",
    [
        *("", ",ro", "a,ro,ro", "a,format=raw,format=raw", "a,format=qcow", "a,format=", "a\0b"),
        *("nbd:///x", "nbd://host/,format=qcow2"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_disk(text)


@given(st.text())
def test_any_text_is_a_disk_or_refused(text: str) -> None:
    try:
        option = parse_disk(text)
    except ConfigError:
        return
    assert text.startswith(option.path)
