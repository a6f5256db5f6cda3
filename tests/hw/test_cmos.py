from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import DeviceError
from aiokvm.hw.cmos import (
    RTC_24H,
    RTC_AF,
    RTC_AIE,
    RTC_CENTURY,
    RTC_DAY_OF_MONTH,
    RTC_DAY_OF_WEEK,
    RTC_DM_BINARY,
    RTC_HOURS,
    RTC_HOURS_ALARM,
    RTC_IRQF,
    RTC_MINUTES,
    RTC_MINUTES_ALARM,
    RTC_MONTH,
    RTC_PF,
    RTC_PIE,
    RTC_REG_A,
    RTC_REG_B,
    RTC_REG_C,
    RTC_REG_D,
    RTC_SECONDS,
    RTC_SECONDS_ALARM,
    RTC_SET,
    RTC_SQWE,
    RTC_UF,
    RTC_UIE,
    RTC_UIP,
    RTC_YEAR,
    Cmos,
)

S = 1_000_000_000
MIB = 1 << 20
GIB = 1 << 30
CLOCK = (RTC_CENTURY, RTC_YEAR, RTC_MONTH, RTC_DAY_OF_MONTH, RTC_HOURS, RTC_MINUTES, RTC_SECONDS)


def unix_ns(*fields: int) -> int:
    return int(datetime(*fields, tzinfo=UTC).timestamp()) * S  # type: ignore[arg-type,misc]


# A Thursday, 250 ms into its second.
START = unix_ns(2024, 2, 29, 23, 58, 59) + S // 4


class Harness:
    def __init__(self, now_ns: int = START, low_bytes: int = 0, high_bytes: int = 0) -> None:
        self.now = now_ns
        self.irq: list[bool] = []
        self.rearmed = 0
        self.cmos = Cmos(
            self.irq.append,
            lambda: self.now,
            low_bytes=low_bytes,
            high_bytes=high_bytes,
            on_deadline=self.on_deadline,
        )

    def on_deadline(self) -> None:
        self.rearmed += 1

    def __getitem__(self, index: int) -> int:
        self.cmos.write(0, 1, index)
        return self.cmos.read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.cmos.write(0, 1, index)
        self.cmos.write(1, 1, value)

    def clock(self) -> str:
        """Century, year, month, day, hours, minutes, seconds as bytes in hexadecimal."""
        return " ".join(f"{self[index]:02x}" for index in CLOCK)

    def advance(self, ns: int) -> None:
        self.now += ns
        self.cmos.poll()


def test_registers_after_power_on() -> None:
    h = Harness()
    assert (h[RTC_REG_A], h[RTC_REG_B], h[RTC_REG_C], h[RTC_REG_D]) == (0x26, 0x02, 0x00, 0x80)
    assert h.clock() == "20 24 02 29 23 58 59"
    assert h[RTC_DAY_OF_WEEK] == 5
    assert h.irq == []
    assert h.cmos.deadline_ns() is None


def test_index_port() -> None:
    h = Harness()
    h.cmos.write(0, 1, 0x80 | RTC_REG_D)
    assert h.cmos.read(0, 1) == 0xFF
    assert h.cmos.read(1, 1) == 0x80
    assert h.cmos.read(0, 4) == 0xFFFF80FF
    h.cmos.write(0, 2, 0x5A40)
    assert h[0x40] == 0x5A
    assert h[0xC0] == 0x5A


def test_nmi_mask() -> None:
    h = Harness()
    masked = []
    for index in (0x80, 0x00, 0x8D, 0x7F):
        h.cmos.write(0, 1, index)
        masked.append(h.cmos.nmi_masked)
    assert masked == [True, False, True, False]


def test_ram_bytes_hold_what_is_written() -> None:
    h = Harness()
    free = [i for i in range(0x0E, 128) if i != RTC_CENTURY]
    for i in free:
        h[i] = i ^ 0xA5
    assert [h[i] for i in free] == [i ^ 0xA5 for i in free]


def test_read_only_registers() -> None:
    h = Harness()
    h[RTC_REG_C] = 0xFF
    h[RTC_REG_D] = 0x00
    assert (h[RTC_REG_C], h[RTC_REG_D]) == (0x00, 0x80)
    h[RTC_REG_A] = 0xFF
    assert h[RTC_REG_A] == 0x7F


@pytest.mark.parametrize(
    ("low", "high", "base_k", "extended_k", "above_16m", "above_4g"),
    [
        (512 << 10, 0, 512, 0, 0, 0),
        (1 * MIB, 0, 640, 0, 0, 0),
        (16 * MIB, 0, 640, 15 * 1024, 0, 0),
        (64 * MIB, 0, 640, 63 * 1024, 48 * 16, 0),
        (128 * MIB, 0, 640, 0xFFFF, 112 * 16, 0),
        (3 * GIB, 2 * GIB, 640, 0xFFFF, 3056 * 16, 2048 * 16),
        (4 * GIB, 1 << 50, 640, 0xFFFF, 4080 * 16, 0xFFFFFF),
        (8 * GIB, 0, 640, 0xFFFF, 0xFFFF, 0),
    ],
)
def test_memory_sizes(
    low: int, high: int, base_k: int, extended_k: int, above_16m: int, above_4g: int
) -> None:
    h = Harness(low_bytes=low, high_bytes=high)
    assert h[0x15] | h[0x16] << 8 == base_k
    assert h[0x17] | h[0x18] << 8 == extended_k
    assert h[0x30] | h[0x31] << 8 == extended_k
    assert h[0x34] | h[0x35] << 8 == above_16m
    assert h[0x5B] | h[0x5C] << 8 | h[0x5D] << 16 == above_4g


@pytest.mark.parametrize(
    ("register_b", "clock"),
    [
        (RTC_24H, "20 24 02 29 23 58 59"),
        (0, "20 24 02 29 91 58 59"),
        (RTC_24H | RTC_DM_BINARY, "14 18 02 1d 17 3a 3b"),
        (RTC_DM_BINARY, "14 18 02 1d 8b 3a 3b"),
    ],
)
def test_formats(register_b: int, clock: str) -> None:
    h = Harness()
    h[RTC_REG_B] = register_b
    assert h.clock() == clock


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hours(hour: int, shown: int) -> None:
    h = Harness(unix_ns(2024, 1, 1, hour, 0, 0))
    h[RTC_REG_B] = 0
    assert h[RTC_HOURS] == shown
    h[RTC_HOURS] = shown
    h[RTC_REG_B] = RTC_24H | RTC_DM_BINARY
    assert h[RTC_HOURS] == hour


def test_time_runs() -> None:
    h = Harness()
    h.advance(3 * S // 4 - 1)
    assert h.clock() == "20 24 02 29 23 58 59"
    h.advance(1)
    assert h.clock() == "20 24 02 29 23 59 00"
    h.advance(60 * S)
    assert h.clock() == "20 24 03 01 00 00 00"
    assert h[RTC_DAY_OF_WEEK] == 6


def test_update_in_progress() -> None:
    h = Harness(START - S // 4)
    h.now += S - 2_228_001
    assert h[RTC_REG_A] == 0x26
    h.now += 1
    assert h[RTC_REG_A] == RTC_UIP | 0x26
    h[RTC_REG_B] = RTC_SET | RTC_24H
    assert h[RTC_REG_A] == 0x26
    h[RTC_REG_B] = RTC_24H
    h.now += 2_227_999
    assert h[RTC_REG_A] == RTC_UIP | 0x26
    h.now += 1
    assert h[RTC_REG_A] == 0x26


def test_set_freezes_and_loads() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_SET | RTC_24H
    h.advance(10 * S)
    assert h.clock() == "20 24 02 29 23 58 59"
    for index, value in zip(CLOCK, (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58), strict=True):
        h[index] = value
    h[RTC_DAY_OF_WEEK] = 1
    assert h.clock() == "19 99 12 31 23 59 58"
    h[RTC_REG_B] = RTC_24H
    assert h.clock() == "19 99 12 31 23 59 58"
    h.advance(3 * S // 4)  # the phase within the second went on
    assert h.clock() == "19 99 12 31 23 59 59"
    h.advance(S)
    assert h.clock() == "20 00 01 01 00 00 00"
    assert h[RTC_DAY_OF_WEEK] == 7


def test_divider_reset_starts_with_half_a_second() -> None:
    """Set the time as Linux does: SET, divider in reset, time, SET off, divider on."""
    h = Harness()
    h[RTC_REG_B] = RTC_SET | RTC_24H
    h[RTC_REG_A] = 0x76
    h[RTC_SECONDS] = 0x10
    h[RTC_REG_B] = RTC_24H
    h.advance(5 * S)
    assert h[RTC_SECONDS] == 0x10
    h[RTC_REG_A] = 0x26
    h.advance(S // 2 - 1)
    assert h.clock() == "20 24 02 29 23 58 10"
    h.advance(1)
    assert h.clock() == "20 24 02 29 23 58 11"


def test_writes_to_the_running_clock_apply_at_once() -> None:
    h = Harness()
    h[RTC_YEAR] = 0x30
    h[RTC_CENTURY] = 0x21
    h[RTC_MONTH] = 0x04
    h[RTC_DAY_OF_MONTH] = 0x05
    h[RTC_HOURS] = 0x06
    h[RTC_MINUTES] = 0x07
    h[RTC_SECONDS] = 0x08
    assert h.clock() == "21 30 04 05 06 07 08"
    h.advance(3 * S // 4)
    assert h[RTC_SECONDS] == 0x09


@pytest.mark.parametrize(
    ("index", "value", "shown"),
    [
        (RTC_SECONDS, 0xFF, "20 24 02 29 23 58 59"),
        (RTC_MINUTES, 0x7A, "20 24 02 29 23 59 59"),
        (RTC_HOURS, 0xFF, "20 24 02 29 23 58 59"),
        (RTC_DAY_OF_MONTH, 0x00, "20 24 02 01 23 58 59"),
        (RTC_DAY_OF_MONTH, 0x31, "20 24 02 29 23 58 59"),
        (RTC_MONTH, 0x00, "20 24 01 29 23 58 59"),
        (RTC_MONTH, 0xFF, "20 24 12 29 23 58 59"),
        (RTC_YEAR, 0xFF, "20 65 02 28 23 58 59"),
        (RTC_CENTURY, 0xFF, "65 24 02 29 23 58 59"),
        (RTC_CENTURY, 0x00, "00 24 02 29 23 58 59"),
    ],
)
def test_time_out_of_range_is_masked(index: int, value: int, shown: str) -> None:
    h = Harness()
    h[index] = value
    assert h.clock() == shown


def test_update_ended_interrupt() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_UIE | RTC_24H
    assert h.cmos.deadline_ns() == START + 3 * S // 4
    h.advance(3 * S // 4 - 1)
    assert h.irq == []
    h.advance(1)
    assert h.irq == [True]
    assert h.cmos.deadline_ns() is None
    h.advance(5 * S)
    assert h.irq == [True]
    assert h[RTC_REG_C] == RTC_IRQF | RTC_UF | RTC_PF
    assert h.irq == [True, False]
    assert h[RTC_REG_C] == 0
    assert h.cmos.deadline_ns() == h.now + S


@pytest.mark.parametrize(
    ("rate", "hz"),
    list(enumerate((256, 128, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2), 1)),
)
def test_periodic_interrupt(rate: int, hz: int) -> None:
    h = Harness(START - S // 4)
    h[RTC_REG_A] = 0x20 | rate
    h[RTC_REG_B] = RTC_PIE | RTC_24H
    ticks = 0
    deadlines = []
    while (deadline := h.cmos.deadline_ns()) is not None and deadline <= START - S // 4 + S // 2:
        assert deadline > h.now
        deadlines.append(deadline)
        h.now = deadline - 1
        h.cmos.poll()
        assert len(h.irq) == 2 * ticks
        h.advance(1)
        ticks += 1
        assert len(h.irq) == 2 * ticks - 1
        assert h[RTC_REG_C] & (RTC_IRQF | RTC_PF) == RTC_IRQF | RTC_PF
    assert ticks == hz // 2
    assert deadlines[-1] == START - S // 4 + S // 2


def test_rate_zero_and_a_held_divider_have_no_ticks() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_PIE | RTC_24H
    for register_a in (0x20, 0x66, 0x76):
        h[RTC_REG_A] = register_a
        h[RTC_REG_C]
        h.advance(10 * S)
        assert h[RTC_REG_C] & RTC_PF == 0
        assert h.cmos.deadline_ns() is None


def test_flags_are_latched_without_their_interrupts() -> None:
    h = Harness()
    h.advance(S)
    assert h.irq == []
    h[RTC_REG_B] = RTC_UIE | RTC_24H
    assert h.irq == [True]
    h[RTC_REG_B] = RTC_24H
    assert h.irq == [True, False]
    assert h[RTC_REG_C] == RTC_UF | RTC_PF


def test_set_disables_update_interrupts() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_SET | RTC_UIE | RTC_AIE | RTC_24H
    assert h[RTC_REG_B] == RTC_SET | RTC_AIE | RTC_24H
    for index in (RTC_SECONDS_ALARM, RTC_MINUTES_ALARM, RTC_HOURS_ALARM):
        h[index] = 0xFF
    assert h.cmos.deadline_ns() is None
    h.advance(5 * S)
    assert h[RTC_REG_C] == RTC_PF
    assert h.irq == []


@pytest.mark.parametrize(
    ("register_b", "hour", "minute", "second", "due"),
    [
        (RTC_24H, 0xFF, 0xFF, 0xFF, (2024, 2, 29, 23, 59, 0)),
        (RTC_24H, 0xC0, 0xFF, 0x30, (2024, 2, 29, 23, 59, 30)),
        (RTC_24H, 0xFF, 0x58, 0xFF, (2024, 3, 1, 0, 58, 0)),
        (RTC_24H, 0xFF, 0x58, 0x59, (2024, 3, 1, 0, 58, 59)),
        (RTC_24H, 0x23, 0xFF, 0x10, (2024, 2, 29, 23, 59, 10)),
        (RTC_24H, 0x23, 0x58, 0x59, (2024, 3, 1, 23, 58, 59)),
        (RTC_24H, 0x00, 0x00, 0x00, (2024, 3, 1, 0, 0, 0)),
        (RTC_24H, 0x22, 0xFF, 0xFF, (2024, 3, 1, 22, 0, 0)),
        (0, 0x91, 0x59, 0x01, (2024, 2, 29, 23, 59, 1)),
        (0, 0x12, 0x00, 0x05, (2024, 3, 1, 0, 0, 5)),
        (RTC_24H | RTC_DM_BINARY, 23, 59, 59, (2024, 2, 29, 23, 59, 59)),
    ],
)
def test_alarm(register_b: int, hour: int, minute: int, second: int, due: tuple[int, ...]) -> None:
    h = Harness()
    h[RTC_REG_B] = register_b | RTC_AIE
    h[RTC_HOURS_ALARM] = hour
    h[RTC_MINUTES_ALARM] = minute
    h[RTC_SECONDS_ALARM] = second
    deadline = h.cmos.deadline_ns()
    assert deadline == unix_ns(*due)
    h.now = deadline - 1
    h.cmos.poll()
    assert h.irq == []
    h.advance(1)
    assert h.irq == [True]
    assert h[RTC_REG_C] & RTC_AF
    assert h.irq == [True, False]


@pytest.mark.parametrize(
    ("hour", "minute", "second"),
    [(0x24, 0xFF, 0xFF), (0xFF, 0x60, 0xFF), (0xFF, 0xFF, 0x1F), (0x81, 0xFF, 0xFF)],
)
def test_alarm_that_the_clock_never_shows(hour: int, minute: int, second: int) -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_AIE | RTC_24H
    h[RTC_HOURS_ALARM], h[RTC_MINUTES_ALARM], h[RTC_SECONDS_ALARM] = hour, minute, second
    assert h.cmos.deadline_ns() is None
    h.advance(200_000 * S)
    assert h[RTC_REG_C] & RTC_AF == 0


def test_alarm_follows_the_guest_s_clock() -> None:
    h = Harness()
    h[RTC_HOURS] = 0x05
    h[RTC_HOURS_ALARM], h[RTC_MINUTES_ALARM], h[RTC_SECONDS_ALARM] = 0x06, 0x00, 0x00
    h[RTC_REG_B] = RTC_AIE | RTC_24H
    assert h.cmos.deadline_ns() == START - S // 4 + 61 * S
    h.advance(61 * S)
    assert h.clock() == "20 24 02 29 06 00 00"
    assert h.irq == [True]


def test_the_earliest_deadline_counts() -> None:
    h = Harness()
    h[RTC_REG_A] = 0x2F
    h[RTC_REG_B] = RTC_PIE | RTC_UIE | RTC_AIE | RTC_24H
    assert h.cmos.deadline_ns() == START + S // 4
    h.advance(S // 4)
    assert h[RTC_REG_C] == RTC_IRQF | RTC_PF
    h[RTC_REG_A] = 0x20
    assert h.cmos.deadline_ns() == START + 3 * S // 4


def test_on_deadline() -> None:
    h = Harness()
    for index in (RTC_REG_A, RTC_REG_B, RTC_SECONDS_ALARM, RTC_MINUTES_ALARM, RTC_HOURS_ALARM, RTC_SECONDS):
        before = h.rearmed
        h[index] = h[index]
        assert h.rearmed == before + 1
    before = h.rearmed
    h[RTC_REG_C]
    assert h.rearmed == before + 1
    h.cmos.reset()
    assert h.rearmed == before + 2
    h[RTC_SECONDS], h[RTC_REG_D], h[0x40]
    h[0x40] = 1
    assert h.rearmed == before + 2


def test_host_clock_that_steps_back() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_UIE | RTC_24H
    h.advance(-3600 * S)
    assert h.irq == []
    assert h.clock() == "20 24 02 29 22 58 59"
    assert h.cmos.deadline_ns() == h.now + 3 * S // 4


def test_reset_keeps_time_and_ram() -> None:
    h = Harness(low_bytes=64 * MIB)
    h[RTC_HOURS] = 0x03
    h[0x40] = 0x99
    h[RTC_REG_B] = RTC_PIE | RTC_AIE | RTC_UIE | RTC_SQWE | RTC_24H
    h.advance(S)
    assert h.irq == [True]
    h.cmos.reset()
    assert h.irq == [True, False]
    assert h[RTC_REG_B] == RTC_24H
    assert h[RTC_REG_C] == 0
    assert h.clock() == "20 24 02 29 03 59 00"
    assert h[0x40] == 0x99
    assert h[0x35] == 48 * 16 >> 8


def test_reset_does_what_firmware_does() -> None:
    fresh, h = Harness(low_bytes=64 * MIB, high_bytes=GIB), Harness(low_bytes=64 * MIB, high_bytes=GIB)
    h[RTC_REG_B] = RTC_DM_BINARY | RTC_24H
    h[RTC_REG_B] = RTC_SET | RTC_DM_BINARY | RTC_24H
    h[RTC_HOURS] = 13
    h[RTC_REG_A] = 0x60 | 0x03
    for index in (0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D):
        h[index] = 0xA5
    h.cmos.write(0, 1, 0x80 | 0x40)
    h.advance(10 * S)
    h.cmos.reset()
    assert not h.cmos.nmi_masked
    for index in (RTC_REG_A, RTC_REG_B, 0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D):
        assert h[index] == fresh[index]
    # It stood still, and goes on.
    assert h.clock() == "20 24 02 29 13 58 59"
    h.advance(S)
    assert h.clock() == "20 24 02 29 13 59 00"


def test_state_round_trip() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_UIE | RTC_24H
    h[RTC_HOURS] = 0x03
    h[0x40] = 0x99
    h.advance(S)
    h.cmos.write(0, 1, 0x80 | 0x40)
    other = Harness(0)
    other.now = h.now
    other.cmos.restore(h.cmos.state())
    assert other.cmos.state() == h.cmos.state()
    assert other.rearmed == 1
    assert other.irq == [True]
    assert other.cmos.nmi_masked
    assert other.cmos.read(1, 1) == 0x99
    assert other.clock() == "20 24 02 29 03 59 00"
    assert other[RTC_REG_C] == RTC_IRQF | RTC_UF | RTC_PF
    assert h.cmos.state().ram[0x40] == 0x99


def test_alarm_that_passed_while_saved_rings_when_polled() -> None:
    h = Harness()
    h[RTC_REG_B] = RTC_AIE | RTC_24H
    h[RTC_HOURS_ALARM], h[RTC_MINUTES_ALARM], h[RTC_SECONDS_ALARM] = 0x01, 0x00, 0x00
    other = Harness(START + 86_400 * S)
    other.cmos.restore(h.cmos.state())
    deadline = other.cmos.deadline_ns()
    assert deadline is not None
    assert deadline < other.now
    other.cmos.poll()
    assert other.irq == [True]


def test_unknown_state_version() -> None:
    h = Harness()
    with pytest.raises(DeviceError, match="cmos: saved state has version 2"):
        h.cmos.restore(dataclasses.replace(h.cmos.state(), version=2))


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.sampled_from((0, 2, 4, 6)))
def test_any_time_can_be_set_and_runs_on(moment: datetime, register_b: int) -> None:
    moment = moment.replace(microsecond=0)
    h = Harness(int((moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * S)
    h[RTC_REG_B] = register_b
    shown = [h[index] for index in CLOCK]
    other = Harness()
    other[RTC_REG_B] = register_b | RTC_SET
    for index, value in zip(CLOCK, shown, strict=True):
        other[index] = value
    other[RTC_REG_B] = register_b
    assert [other[index] for index in CLOCK] == shown
    assert other[RTC_DAY_OF_WEEK] == h[RTC_DAY_OF_WEEK] == moment.isoweekday() % 7 + 1
    h.now += 86_400 * S
    other.now += 86_400 * S
    assert [other[index] for index in CLOCK] == [h[index] for index in CLOCK]
    h[RTC_REG_B] = RTC_24H
    if moment.year < 9999:
        assert h.clock().replace(" ", "") == (moment + timedelta(days=1)).strftime("%Y%m%d%H%M%S").zfill(14)


@given(
    st.integers(0, 86_399),
    st.one_of(st.integers(0, 23), st.just(0xFF)),
    st.one_of(st.integers(0, 59), st.just(0xFF)),
    st.one_of(st.integers(0, 59), st.just(0xFF)),
)
def test_alarm_is_the_next_match(now_s: int, hour: int, minute: int, second: int) -> None:
    h = Harness(now_s * S)
    h[RTC_REG_B] = RTC_24H | RTC_DM_BINARY | RTC_AIE
    h[RTC_HOURS_ALARM], h[RTC_MINUTES_ALARM], h[RTC_SECONDS_ALARM] = hour, minute, second
    # A match is the first second of a minute that matches, or the very next second within such a minute.
    hours = range(24) if hour == 0xFF else (hour,)
    minutes = range(60) if minute == 0xFF else (minute,)
    seconds = range(60) if second == 0xFF else (second,)
    ends = {(a * 60 + b) * 60 + c for a in hours for b in minutes for c in seconds[:1]}
    if second == 0xFF:
        ends |= (
            {now_s + 1} if (now_s + 1) // 3600 % 24 in hours and (now_s + 1) // 60 % 60 in minutes else set()
        )
    expected = min(at if at > now_s else at + 86_400 for at in ends)
    assert h.cmos.deadline_ns() == expected * S


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("r"), st.integers(0, 3), st.sampled_from((1, 1, 2, 4, 8))),
            st.tuples(st.just("index"), st.integers(0, 0x0D)),
            st.tuples(
                st.just("w"), st.integers(0, 2), st.sampled_from((1, 1, 2, 4, 8)), st.integers(0, 2**64 - 1)
            ),
            st.tuples(st.just("set"), st.integers(0, 0x0D) | st.just(RTC_CENTURY), st.integers(0, 255)),
            st.tuples(st.just("advance"), st.integers(-(10**14), 10**14)),
            st.tuples(st.just("deadline")),
        ),
        max_size=50,
    )
)
def test_random_accesses(steps: list[tuple[Any, ...]]) -> None:
    h = Harness()
    for step in steps:
        match step:
            case "r", offset, size:
                assert 0 <= h.cmos.read(offset, size) < 1 << (8 * size)
            case "index", index:
                h.cmos.write(0, 1, index)
            case "w", offset, size, value:
                h.cmos.write(offset, size, value & ((1 << (8 * size)) - 1))
            case "set", index, value:
                h[index] = value
            case "advance", ns:
                h.advance(ns)
            case _:
                deadline = h.cmos.deadline_ns()
                if deadline is not None:
                    assert deadline > h.cmos.state().polled_ns
                    h.now = deadline
                    h.cmos.poll()
                    assert h.irq[-1]
                    assert h.cmos.deadline_ns() is None
        assert h.irq == [i % 2 == 0 for i in range(len(h.irq))]
        state = h.cmos.state()
        other = Harness()
        other.cmos.restore(state)
        assert other.cmos.state() == state
        assert bool(other.irq) == bool(h.irq and h.irq[-1])
    assert h[RTC_REG_D] == 0x80
