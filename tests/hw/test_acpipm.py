from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import DeviceError
from aiokvm.hw.acpipm import (
    PM1_CNT,
    PM1_EN,
    PM1_STS,
    PM_RESET,
    PM_SIZE,
    PWRBTN_EN,
    PWRBTN_STS,
    RESET_VALUE,
    SCI_EN,
    SLP_EN,
    SLP_TYP_S5,
    SLP_TYP_SHIFT,
    AcpiPm,
)


class Harness:
    def __init__(self) -> None:
        self.sci: list[bool] = []
        self.events: list[str] = []
        self.pm = AcpiPm(
            self.sci.append, lambda: self.events.append("shutdown"), lambda: self.events.append("reset")
        )


def test_registers_after_reset() -> None:
    pm = Harness().pm
    assert pm.read(PM1_STS, 2) == 0
    assert pm.read(PM1_EN, 2) == 0
    assert pm.read(PM1_CNT, 2) == SCI_EN
    assert pm.read(6, 2) == 0
    assert pm.read(PM_RESET, 1) == 0
    assert pm.read(PM_SIZE, 1) == 0xFF


def test_enabled_power_button_raises_sci_until_status_is_cleared() -> None:
    h = Harness()
    h.pm.write(PM1_EN, 2, PWRBTN_EN)
    h.pm.power_button()
    h.pm.power_button()
    assert h.pm.read(PM1_STS, 2) == PWRBTN_STS
    assert h.sci == [True]
    h.pm.write(PM1_STS, 2, 0)
    h.pm.write(PM1_STS, 2, 0xFFFF & ~PWRBTN_STS)
    assert h.pm.read(PM1_STS, 2) == PWRBTN_STS
    h.pm.write(PM1_STS, 2, PWRBTN_STS)
    assert h.pm.read(PM1_STS, 2) == 0
    assert h.sci == [True, False]


def test_power_button_waits_for_its_enable_bit() -> None:
    h = Harness()
    h.pm.power_button()
    assert h.sci == []
    h.pm.write(PM1_EN, 2, PWRBTN_EN)
    assert h.sci == [True]
    h.pm.write(PM1_EN, 2, 0)
    assert h.sci == [True, False]


def test_enable_bits_read_back_and_reserved_ones_do_not() -> None:
    pm = Harness().pm
    pm.write(PM1_EN, 2, 0xFFFF)
    assert pm.read(PM1_EN, 2) == 0x0721


def test_byte_and_dword_access() -> None:
    h = Harness()
    h.pm.write(PM1_EN + 1, 1, PWRBTN_EN >> 8)
    h.pm.power_button()
    assert h.pm.read(PM1_STS + 1, 1) == 0x01
    assert h.pm.read(PM1_STS, 4) == PWRBTN_STS | PWRBTN_EN << 16
    h.pm.write(PM1_EN, 1, 0x20)
    assert h.pm.read(PM1_EN, 2) == 0x0120
    h.pm.write(PM1_STS, 4, PWRBTN_STS)
    assert h.pm.read(PM1_STS, 4) == 0
    assert h.sci == [True, False]


def test_control_keeps_sci_en_and_the_sleep_type() -> None:
    pm = Harness().pm
    pm.write(PM1_CNT, 2, 0)
    assert pm.read(PM1_CNT, 2) == SCI_EN
    pm.write(PM1_CNT, 2, 0xFFFF & ~SLP_EN)
    assert pm.read(PM1_CNT, 2) == 0x1C03


@pytest.mark.parametrize("sleep_type", range(8))
def test_only_s5_shuts_down(sleep_type: int) -> None:
    h = Harness()
    h.pm.write(PM1_CNT, 2, sleep_type << SLP_TYP_SHIFT)
    assert h.events == []
    h.pm.write(PM1_CNT, 2, sleep_type << SLP_TYP_SHIFT | SLP_EN)
    assert h.events == (["shutdown"] if sleep_type == SLP_TYP_S5 else [])
    assert h.pm.read(PM1_CNT, 2) == sleep_type << SLP_TYP_SHIFT | SCI_EN


def test_shutdown_by_byte_and_dword() -> None:
    h = Harness()
    h.pm.write(PM1_CNT + 1, 1, (SLP_TYP_S5 << SLP_TYP_SHIFT | SLP_EN) >> 8)
    h.pm.write(PM1_CNT, 4, SLP_TYP_S5 << SLP_TYP_SHIFT | SLP_EN)
    assert h.events == ["shutdown", "shutdown"]


@pytest.mark.parametrize("value", [0x00, 0x01, 0x02, 0x06, 0xFF])
def test_reset_register(value: int) -> None:
    h = Harness()
    h.pm.write(PM_RESET, 1, value)
    assert h.events == (["reset"] if value == RESET_VALUE else [])


def test_reset_clears_and_drops_the_sci() -> None:
    h = Harness()
    h.pm.write(PM1_EN, 2, PWRBTN_EN)
    h.pm.write(PM1_CNT, 2, 0x1C00)
    h.pm.power_button()
    h.pm.reset()
    assert h.sci == [True, False]
    assert [h.pm.read(offset, 2) for offset in (PM1_STS, PM1_EN, PM1_CNT)] == [0, 0, SCI_EN]


def test_state_round_trip_drives_the_sci() -> None:
    h, other = Harness(), Harness()
    h.pm.write(PM1_EN, 2, PWRBTN_EN)
    h.pm.write(PM1_CNT, 2, 0x0402)
    h.pm.power_button()
    other.pm.restore(h.pm.state())
    assert other.pm.state() == h.pm.state()
    assert other.pm.read(0, 8) == h.pm.read(0, 8)
    assert other.sci == [True]
    assert other.events == []


def test_unknown_state_version() -> None:
    h = Harness()
    with pytest.raises(DeviceError, match="acpipm: saved state has version 2"):
        h.pm.restore(dataclasses.replace(h.pm.state(), version=2))


@given(
    st.lists(
        st.tuples(
            st.sampled_from("rwb"),
            st.integers(0, 12),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, 2**64 - 1),
        )
    )
)
def test_random_accesses(steps: list[tuple[str, int, int, int]]) -> None:
    h = Harness()
    for what, offset, size, value in steps:
        match what:
            case "r":
                assert 0 <= h.pm.read(offset, size) < 1 << (8 * size)
            case "w":
                h.pm.write(offset, size, value & ((1 << (8 * size)) - 1))
            case _:
                h.pm.power_button()
        pending = h.pm.read(PM1_STS, 2) & h.pm.read(PM1_EN, 2) != 0
        assert h.sci == [i % 2 == 0 for i in range(len(h.sci))]
        assert bool(h.sci and h.sci[-1]) == pending
