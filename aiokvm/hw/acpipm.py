"""ACPI fixed hardware: power button, sleep control and the reset register.

ACPI 6.5, section 4.8.3 (PM1 registers) and 4.8.3.6 (reset register). The registers lie in one block of
``PM_SIZE`` ports; the ACPI tables take their layout from the constants here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.hw.bus import ByteRegisters, IrqLine, check_version

if TYPE_CHECKING:
    from collections.abc import Callable

PM1_STS = 0
PM1_EN = 2
PM1_CNT = 4
PM_RESET = 8
PM_SIZE = 9
PM1_EVT_LEN = 4
PM1_CNT_LEN = 2

TMR_EN = 1 << 0
GBL_EN = 1 << 5
PWRBTN_STS = PWRBTN_EN = 1 << 8
SLPBTN_EN = 1 << 9
RTC_EN = 1 << 10

SCI_EN = 1 << 0
BM_RLD = 1 << 1
SLP_TYP_SHIFT = 10
SLP_TYP_MASK = 7 << SLP_TYP_SHIFT
SLP_EN = 1 << 13

SLP_TYP_S5 = 5
RESET_VALUE = 0x01

# An OS enables an event and reads the bit back, also for events that never come.
_EN_WRITABLE = TMR_EN | GBL_EN | PWRBTN_EN | SLPBTN_EN | RTC_EN
_CNT_WRITABLE = BM_RLD | SLP_TYP_MASK


@dataclass(frozen=True)
class AcpiPmState:
    """What an :class:`AcpiPm` remembers: the three PM1 registers."""

    pm1_sts: int
    pm1_en: int
    pm1_cnt: int
    version: int = 1


class AcpiPm(ByteRegisters):
    """The PM1 event and control blocks and the reset register.

    ``irq`` drives the SCI, which is level-triggered. ``on_shutdown`` is called when the guest enters S5,
    ``on_reset`` when it writes ``RESET_VALUE`` to the reset register; other sleep types are ignored.
    """

    registers = PM_SIZE

    def __init__(
        self, irq: Callable[[bool], None], on_shutdown: Callable[[], None], on_reset: Callable[[], None]
    ) -> None:
        self._sci = IrqLine(irq)
        self._on_shutdown = on_shutdown
        self._on_reset = on_reset
        self._sts = 0
        self._en = 0
        self._cnt = 0

    def reset(self) -> None:
        """Clear the registers and drop the SCI."""
        self._sts = self._en = self._cnt = 0
        self._update_sci()

    def power_button(self) -> None:
        """Press the power button."""
        self._sts |= PWRBTN_STS
        self._update_sci()

    def read_byte(self, offset: int) -> int:
        """Return one byte of a register; what is reserved and the reset register read as zero."""
        # The fixed hardware needs no handover from firmware, so ACPI mode is always on.
        block = self._sts | self._en << 16 | (self._cnt | SCI_EN) << 32
        return block >> (8 * offset) & 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        """Write one byte of a register; status bits are cleared by writing ones."""
        bits, mask = value << (8 * (offset & 1)), 0xFF << (8 * (offset & 1))
        match offset & ~1:
            case 0:  # PM1_STS
                self._sts &= ~bits
            case 2:  # PM1_EN
                self._en = (self._en & ~mask) | (bits & _EN_WRITABLE)
            case 4:  # PM1_CNT
                self._cnt = (self._cnt & ~mask) | (bits & _CNT_WRITABLE)
                if bits & SLP_EN and bits & SLP_TYP_MASK == SLP_TYP_S5 << SLP_TYP_SHIFT:
                    self._on_shutdown()
            case 8 if value == RESET_VALUE:
                self._on_reset()
        self._update_sci()

    def state(self) -> AcpiPmState:
        """Return the registers."""
        return AcpiPmState(self._sts, self._en, self._cnt)

    def restore(self, state: AcpiPmState) -> None:
        """Take on a saved state and drive the SCI to match; DeviceError if its version is unknown."""
        check_version("acpipm", state.version, AcpiPmState.version)
        self._sts, self._en, self._cnt = state.pm1_sts, state.pm1_en, state.pm1_cnt
        self._update_sci()

    def _update_sci(self) -> None:
        self._sci.set(bool(self._sts & self._en))
