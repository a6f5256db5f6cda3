"""Ports by which software resets a PC: the reset control register, system control port A, and one of our own.

Intel 82371AB (PIIX4) datasheet, section 4.2.1.2 (RC, port 0xcf9), and IBM PS/2 Technical Reference, "System
Control Port A" (port 0x92).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.hw.bus import ByteRegisters, check_version

if TYPE_CHECKING:
    from collections.abc import Callable

RESET_CONTROL_PORT = 0xCF9
SYSTEM_CONTROL_PORT = 0x92
# One that nothing of a PC has.
RESET_VECTOR_PORT = 0x60F

# The reset control register: whether a reset is a hard one, and the reset itself.
_SRST, _RCPU = 1 << 1, 1 << 2
# System control port A: a reset of the CPU, and the gate of address line 20.
_FAST_RESET, _FAST_A20 = 1 << 0, 1 << 1


@dataclass(frozen=True)
class ResetPortState:
    """What a :class:`ResetControl` or a :class:`SystemControl` remembers: its bits that read as written."""

    value: int
    version: int = 1


class _ResetPort(ByteRegisters):
    """One register, of which one bit resets the machine and ``kept`` read as they were written."""

    registers = 1
    _resets: int
    _kept: int
    _initial: int

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = self._initial

    def reset(self) -> None:
        """Return to the value after power-on."""
        self._value = self._initial

    def read_byte(self, offset: int) -> int:  # noqa: ARG002
        """Return the bits that are kept."""
        return self._value

    def write_byte(self, offset: int, value: int) -> None:  # noqa: ARG002
        """Keep bits, and reset the machine if that one is set: it never reads as set, so each one sets it."""
        self._value = value & self._kept
        if value & self._resets:
            self._on_reset()

    def state(self) -> ResetPortState:
        """Return the bits that are kept."""
        return ResetPortState(self._value)

    def restore(self, state: ResetPortState) -> None:
        """Take on a saved state; DeviceError if its version is unknown."""
        check_version(type(self).__name__, state.version, ResetPortState.version)
        self._value = state.value & self._kept


class ResetControl(_ResetPort):
    """The reset control register. ``on_reset`` is called for a hard and for a soft reset alike."""

    _resets, _kept, _initial = _RCPU, _SRST, 0


class ResetVector(_ResetPort):
    """The port that the code at the reset vector writes to: whatever it writes resets the machine.

    A PC has no such port, it has firmware there.
    """

    _resets, _kept, _initial = 0xFF, 0, 0


class SystemControl(_ResetPort):
    """System control port A. Address line 20 is always open, whatever its gate says, as in all of KVM."""

    _resets, _kept, _initial = _FAST_RESET, _FAST_A20, _FAST_A20
