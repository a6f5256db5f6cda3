"""The MC146818 real-time clock with 128 bytes of CMOS RAM (Motorola MC146818A data sheet), as a PC has it.

Time is injected and there is no timer: :meth:`Cmos.deadline_ns` says when :meth:`Cmos.poll` is next due.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

from aiokvm.hw.bus import ByteRegisters, IrqLine, check_version

if TYPE_CHECKING:
    from collections.abc import Callable

CMOS_SIZE = 2
CMOS_BYTES = 128

RTC_SECONDS = 0x00
RTC_SECONDS_ALARM = 0x01
RTC_MINUTES = 0x02
RTC_MINUTES_ALARM = 0x03
RTC_HOURS = 0x04
RTC_HOURS_ALARM = 0x05
RTC_DAY_OF_WEEK = 0x06
RTC_DAY_OF_MONTH = 0x07
RTC_MONTH = 0x08
RTC_YEAR = 0x09
RTC_REG_A = 0x0A
RTC_REG_B = 0x0B
RTC_REG_C = 0x0C
RTC_REG_D = 0x0D
RTC_CENTURY = 0x32  # the FADT names this index

RTC_UIP = 0x80
RTC_DIV_CTL = 0x70
RTC_DIV_RESET = 0x60
RTC_RATE_SELECT = 0x0F
RTC_SET = 0x80
RTC_PIE = 0x40
RTC_AIE = 0x20
RTC_UIE = 0x10
RTC_SQWE = 0x08
RTC_DM_BINARY = 0x04
RTC_24H = 0x02
RTC_IRQF = 0x80
RTC_PF = 0x40
RTC_AF = 0x20
RTC_UF = 0x10
RTC_VRT = 0x80
RTC_PM = 0x80

_FLAGS = RTC_PF | RTC_AF | RTC_UF
_CLOCK = frozenset(
    (RTC_SECONDS, RTC_MINUTES, RTC_HOURS, RTC_DAY_OF_WEEK, RTC_DAY_OF_MONTH, RTC_MONTH, RTC_YEAR, RTC_CENTURY)
)
_ALARM = frozenset((RTC_SECONDS_ALARM, RTC_MINUTES_ALARM, RTC_HOURS_ALARM))

_SECOND_NS = 1_000_000_000
# An update takes 1984 us, UIP rises 244 us before it (table 5); here time steps at the end of both.
_UIP_NS = 2_228_000
# The first update comes half a second after the divider leaves reset.
_DIVIDER_RESET_NS = _SECOND_NS // 2

_KIB = 1 << 10
_MIB = 1 << 20
_BASE_MEMORY = 640 * _KIB

# The Gregorian calendar repeats after 400 years, so any count of seconds fits into datetime's range.
_CYCLE_DAYS = 146_097
_CYCLE_SECONDS = _CYCLE_DAYS * 86_400
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class CmosState:
    """What a :class:`Cmos` remembers.

    ``offset_ns`` is what the guest's clock is ahead of the host's; ``polled_ns`` is the host time up to which
    events were latched, so that an alarm that passed while the machine was saved rings when it is restored.
    """

    index: int
    ram: bytes
    offset_ns: int
    polled_ns: int
    version: int = 1


class Cmos(ByteRegisters):
    """The clock at offsets 0 (index) and 1 (data); ``irq`` is IRQ 8.

    ``now_ns`` gives UTC in nanoseconds since 1970; what the guest sets is kept as an offset to it. The day
    of the week always follows from the date. ``low_bytes`` is the RAM below 4 GiB, ``high_bytes`` that above,
    which firmware finds in the CMOS RAM. ``on_deadline`` is called when :meth:`deadline_ns` may have changed.
    """

    registers = CMOS_SIZE

    def __init__(
        self,
        irq: Callable[[bool], None],
        now_ns: Callable[[], int],
        *,
        low_bytes: int,
        high_bytes: int = 0,
        on_deadline: Callable[[], None] = lambda: None,
    ) -> None:
        self._irq = IrqLine(irq)
        self._now_ns = now_ns
        self._on_deadline = on_deadline
        self._low_bytes, self._high_bytes = low_bytes, high_bytes
        self._offset_ns = 0
        self._polled_ns = now_ns()
        self._ram = bytearray(CMOS_BYTES)
        self._ram[RTC_REG_D] = RTC_VRT
        self._start()

    def reset(self) -> None:
        """Do what firmware does at each start, for there is none; the time and all other RAM have a battery.

        A clock that the guest has stopped goes on from the time that it shows.
        """
        self.poll()
        if self._frozen:
            self._load()
        self._start()
        self._update_irq()
        self._on_deadline()

    def _start(self) -> None:
        ram, low_bytes = self._ram, self._low_bytes
        self._index = 0
        ram[RTC_REG_A] = 0x26  # 32,768 Hz crystal, 1,024 Hz periodic rate: what PC firmware sets
        ram[RTC_REG_B] = RTC_24H
        ram[RTC_REG_C] = 0
        self._store(0x15, 2, min(low_bytes, _BASE_MEMORY) // _KIB)
        extended = max(low_bytes - _MIB, 0) // _KIB
        self._store(0x17, 2, extended)
        self._store(0x30, 2, extended)
        self._store(0x34, 2, max(low_bytes - 16 * _MIB, 0) // (64 * _KIB))
        self._store(0x5B, 3, self._high_bytes // (64 * _KIB))

    @property
    def nmi_masked(self) -> bool:
        """Whether the guest masks NMI by bit 7 of the index port."""
        return bool(self._index & 0x80)

    def deadline_ns(self) -> int | None:
        """Return the host time of the next interrupt, None if none will come by itself.

        While an interrupt waits for the guest to read register C, none will.
        """
        ram = self._ram
        if self._irq.level:
            return None
        local = self._polled_ns + self._offset_ns
        deadlines = []
        rate = self._rate_hz()
        if ram[RTC_REG_B] & RTC_PIE and rate:
            ticks = local * rate // _SECOND_NS + 1
            deadlines.append(-(-ticks * _SECOND_NS // rate))
        if not self._frozen:
            seconds = local // _SECOND_NS
            if ram[RTC_REG_B] & RTC_UIE:
                deadlines.append((seconds + 1) * _SECOND_NS)
            alarm = self._next_alarm(seconds) if ram[RTC_REG_B] & RTC_AIE else None
            if alarm is not None:
                deadlines.append(alarm * _SECOND_NS)
        return min(deadlines) - self._offset_ns if deadlines else None

    def poll(self) -> None:
        """Latch what has happened until now and drive the interrupt."""
        now_ns = self._now_ns()
        before, after = self._polled_ns + self._offset_ns, now_ns + self._offset_ns
        self._polled_ns = now_ns
        rate = self._rate_hz()
        if after * rate // _SECOND_NS > before * rate // _SECOND_NS:
            self._ram[RTC_REG_C] |= RTC_PF
        second = after // _SECOND_NS
        if not self._frozen and second > before // _SECOND_NS:
            self._ram[RTC_REG_C] |= RTC_UF
            alarm = self._next_alarm(before // _SECOND_NS)
            if alarm is not None and alarm <= second:
                self._ram[RTC_REG_C] |= RTC_AF
        self._update_irq()

    def read_byte(self, offset: int) -> int:
        """Read the register that the index selects; the index itself reads as ones."""
        if offset == 0:
            return 0xFF
        index = self._index & 0x7F
        if index == RTC_REG_C:
            return self._read_c()
        if index in _CLOCK and not self._frozen:
            self._show()
        if index == RTC_REG_A and self._updating():
            return self._ram[index] | RTC_UIP
        return self._ram[index]

    def write_byte(self, offset: int, value: int) -> None:
        """Write the index or the register that it selects; registers C and D are read-only."""
        if offset == 0:
            self._index = value
            return
        index = self._index & 0x7F
        if index == RTC_REG_A:
            self._control(index, value & ~RTC_UIP)
        elif index == RTC_REG_B:
            self._control(index, value & ~RTC_UIE if value & RTC_SET else value)
        elif index in _CLOCK and not self._frozen:
            self.poll()
            self._show()
            self._ram[index] = value
            self._load()
            self._on_deadline()
        elif index in _ALARM:
            self.poll()
            self._ram[index] = value
            self._on_deadline()
        elif index not in (RTC_REG_C, RTC_REG_D):
            self._ram[index] = value

    def state(self) -> CmosState:
        """Return the RAM with all registers, and the guest's clock."""
        return CmosState(self._index, bytes(self._ram), self._offset_ns, self._polled_ns)

    def restore(self, state: CmosState) -> None:
        """Take on a saved state and drive the interrupt to match; DeviceError if its version is unknown."""
        check_version("cmos", state.version, CmosState.version)
        self._index, self._ram = state.index, bytearray(state.ram)
        self._offset_ns, self._polled_ns = state.offset_ns, state.polled_ns
        self._update_irq()
        self._on_deadline()

    @property
    def _held(self) -> bool:
        """Whether the divider is held in reset."""
        return self._ram[RTC_REG_A] & RTC_DIV_RESET == RTC_DIV_RESET

    @property
    def _frozen(self) -> bool:
        """Whether the time stands still; only then its bytes in RAM count."""
        return self._held or bool(self._ram[RTC_REG_B] & RTC_SET)

    def _rate_hz(self) -> int:
        select = self._ram[RTC_REG_A] & RTC_RATE_SELECT
        if select == 0 or self._held:
            return 0
        # The two fastest rates of a 32,768 Hz crystal would repeat: they select 256 and 128 Hz.
        return 32_768 >> (select + 6 if select <= 2 else select - 1)

    def _updating(self) -> bool:
        if self._frozen:
            return False
        return (self._now_ns() + self._offset_ns) % _SECOND_NS >= _SECOND_NS - _UIP_NS

    def _control(self, register: int, value: int) -> None:
        """Write register A or B, which may stop or start the clock or change how it shows."""
        self.poll()
        was_held, was_frozen = self._held, self._frozen
        if not was_frozen:
            self._show()
        self._ram[register] = value
        if was_held and not self._held:
            phase_ns = (self._polled_ns + self._offset_ns) % _SECOND_NS
            self._offset_ns += _DIVIDER_RESET_NS - phase_ns
        if was_frozen and not self._frozen:
            self._load()
        self._update_irq()
        self._on_deadline()

    def _read_c(self) -> int:
        self.poll()
        value = self._ram[RTC_REG_C] | (RTC_IRQF if self._irq.level else 0)
        self._ram[RTC_REG_C] = 0
        self._update_irq()
        self._on_deadline()
        return value

    def _update_irq(self) -> None:
        self._irq.set(bool(self._ram[RTC_REG_B] & self._ram[RTC_REG_C] & _FLAGS))

    def _show(self) -> None:
        """Write the running time into the RAM."""
        cycles, rest = divmod((self._now_ns() + self._offset_ns) // _SECOND_NS, _CYCLE_SECONDS)
        moment = _EPOCH + timedelta(seconds=rest)
        year = moment.year + 400 * cycles
        ram = self._ram
        ram[RTC_SECONDS] = self._encode(moment.second)
        ram[RTC_MINUTES] = self._encode(moment.minute)
        ram[RTC_HOURS] = self._encode_hour(moment.hour)
        ram[RTC_DAY_OF_WEEK] = self._encode(moment.isoweekday() % 7 + 1)
        ram[RTC_DAY_OF_MONTH] = self._encode(moment.day)
        ram[RTC_MONTH] = self._encode(moment.month)
        ram[RTC_YEAR] = self._encode(year % 100)
        ram[RTC_CENTURY] = self._encode(year // 100 % 100)

    def _load(self) -> None:
        """Let the time run on from what the RAM shows, within the second as before."""
        ram = self._ram
        year = self._decode(ram[RTC_CENTURY]) % 100 * 100 + self._decode(ram[RTC_YEAR]) % 100
        cycles, year_of_cycle = divmod(year - 1970, 400)
        month = min(max(self._decode(ram[RTC_MONTH]), 1), 12)
        first = date(1970 + year_of_cycle, month, 1)
        days_in_month = ((first + timedelta(days=31)).replace(day=1) - first).days
        day = min(max(self._decode(ram[RTC_DAY_OF_MONTH]), 1), days_in_month)
        days = (first - _EPOCH.date()).days + day - 1 + cycles * _CYCLE_DAYS
        hours = days * 24 + min(self._decode_hour(ram[RTC_HOURS]), 23)
        minutes = hours * 60 + min(self._decode(ram[RTC_MINUTES]), 59)
        seconds = minutes * 60 + min(self._decode(ram[RTC_SECONDS]), 59)
        self._offset_ns += (seconds - (self._polled_ns + self._offset_ns) // _SECOND_NS) * _SECOND_NS

    def _next_alarm(self, after: int) -> int | None:
        """Return the first second past ``after`` that the alarm bytes match, None if they match none."""
        fields: list[int | None] = []
        for index, limit, decode, encode in (
            (RTC_HOURS_ALARM, 24, self._decode_hour, self._encode_hour),
            (RTC_MINUTES_ALARM, 60, self._decode, self._encode),
            (RTC_SECONDS_ALARM, 60, self._decode, self._encode),
        ):
            byte = self._ram[index]
            value = decode(byte)
            if byte & 0xC0 == 0xC0:
                fields.append(None)  # any value matches
            elif value < limit and encode(value) == byte:
                fields.append(value)
            else:
                return None  # the chip compares bytes, and the clock never shows this one
        hour, minute, second = fields
        at = after + 1
        # Each step goes to the start of the next hour or minute that matches, so there are few.
        while True:
            if hour is not None and at // 3600 % 24 != hour:
                at += (hour - at // 3600) % 24 * 3600 - at % 3600
            elif minute is not None and at // 60 % 60 != minute:
                at += (minute - at // 60) % 60 * 60 - at % 60
            elif second is not None and at % 60 != second:
                at += (second - at) % 60
            else:
                return at

    def _encode(self, value: int) -> int:
        return value if self._ram[RTC_REG_B] & RTC_DM_BINARY else value // 10 << 4 | value % 10

    def _decode(self, byte: int) -> int:
        return byte if self._ram[RTC_REG_B] & RTC_DM_BINARY else (byte >> 4) * 10 + (byte & 0x0F)

    def _encode_hour(self, hour: int) -> int:
        if self._ram[RTC_REG_B] & RTC_24H:
            return self._encode(hour)
        return self._encode((hour - 1) % 12 + 1) | (RTC_PM if hour >= 12 else 0)

    def _decode_hour(self, byte: int) -> int:
        if self._ram[RTC_REG_B] & RTC_24H:
            return self._decode(byte)
        return self._decode(byte & ~RTC_PM) % 12 + (12 if byte & RTC_PM else 0)

    def _store(self, index: int, size: int, value: int) -> None:
        """Store a memory size, little-endian, at most what fits."""
        limit = (1 << (8 * size)) - 1
        self._ram[index : index + size] = min(value, limit).to_bytes(size, "little")
