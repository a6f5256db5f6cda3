"""The 16550A UART (National Semiconductor PC16550D data sheet, section 8)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.hw.bus import ByteRegisters, IrqLine, check_version

if TYPE_CHECKING:
    from collections.abc import Callable

SERIAL_SIZE = 8

UART_RX = UART_TX = UART_DLL = 0
UART_IER = UART_DLM = 1
UART_IIR = UART_FCR = 2
UART_LCR = 3
UART_MCR = 4
UART_LSR = 5
UART_MSR = 6
UART_SCR = 7

UART_IER_RDI = 0x01
UART_IER_THRI = 0x02
UART_IER_RLSI = 0x04
UART_IER_MSI = 0x08

UART_IIR_MSI = 0x00
UART_IIR_NO_INT = 0x01
UART_IIR_THRI = 0x02
UART_IIR_RDI = 0x04
UART_IIR_RLSI = 0x06
UART_IIR_RX_TIMEOUT = 0x0C
UART_IIR_FIFO_ENABLED = 0xC0

UART_FCR_ENABLE_FIFO = 0x01
UART_FCR_CLEAR_RCVR = 0x02
UART_FCR_CLEAR_XMIT = 0x04

UART_LCR_WLEN8 = 0x03
UART_LCR_DLAB = 0x80

UART_MCR_DTR = 0x01
UART_MCR_RTS = 0x02
UART_MCR_OUT1 = 0x04
UART_MCR_OUT2 = 0x08
UART_MCR_LOOP = 0x10

UART_LSR_DR = 0x01
UART_LSR_OE = 0x02
UART_LSR_PE = 0x04
UART_LSR_FE = 0x08
UART_LSR_BI = 0x10
UART_LSR_THRE = 0x20
UART_LSR_TEMT = 0x40
UART_LSR_FIFOE = 0x80

UART_MSR_DCTS = 0x01
UART_MSR_DDSR = 0x02
UART_MSR_TERI = 0x04
UART_MSR_DDCD = 0x08
UART_MSR_ANY_DELTA = 0x0F
UART_MSR_CTS = 0x10
UART_MSR_DSR = 0x20
UART_MSR_RI = 0x40
UART_MSR_DCD = 0x80

FIFO_BYTES = 16
_TRIGGER_BYTES = (1, 4, 8, 14)
_CHARACTER_ERRORS = UART_LSR_PE | UART_LSR_FE | UART_LSR_BI

# The state that PC firmware leaves behind, for a directly booted kernel has none: 9600 8N1. Linux's
# console divides by the divisor that it finds, and the data sheet's LCR of 0 would cut bytes to 5 bits.
_BOOT_DIVISOR = 12
_BOOT_LCR = UART_LCR_WLEN8


@dataclass(frozen=True)
class SerialState:
    """What a :class:`Serial` remembers.

    An element of ``fifo`` is a received byte with its LSR error bits, shifted left by 8. ``modem`` are the
    input lines as MSR bits, ``msr`` what the guest reads: in loopback the two differ.
    """

    divisor: int
    ier: int
    fcr: int
    lcr: int
    mcr: int
    scr: int
    msr: int
    modem: int
    lsr_errors: int
    thre_pending: bool
    fifo: tuple[int, ...]
    version: int = 1


class Serial(ByteRegisters):
    """A 16550A whose transmitter is infinitely fast and whose receiver never overruns.

    ``transmit`` gets each byte that the guest sends, at once. The host offers input with :meth:`receive`;
    what did not fit is to be offered again when ``on_room`` is called. That is when the guest has read all
    that it was given: a driver that reads until nothing is left has to come to an end. A FIFO that holds
    less than its trigger level raises the character timeout at once: without a clock, input that is not
    there yet counts as not coming. The modem inputs start as those of a terminal that is there: CTS, DSR,
    DCD.
    """

    registers = SERIAL_SIZE
    # A guest that prints writes THR and reads LSR for every character: neither has to wait for the loop.
    posted_offsets = (UART_TX,)

    def __init__(
        self,
        irq: Callable[[bool], None],
        transmit: Callable[[bytes], None],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._irq = IrqLine(irq)
        self._transmit = transmit
        self._on_room = on_room
        self._refused = False
        self._fifo: deque[int] = deque()
        self._latch: Callable[[int, int | None], None] = lambda _offset, _value: None
        self._latched: int | None = None
        self._modem = UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD
        self.reset()

    def write_posted(self, offset: int, data: bytes) -> None:
        """Take bytes written to THR (or DLL) one after the other, as :class:`PostedWrites` has it."""
        if self._lcr & UART_LCR_DLAB or self._mcr & UART_MCR_LOOP:
            for byte in data:
                self.write_byte(offset, byte)
        else:
            self._send(data)

    def connect_latch(self, latch: Callable[[int, int | None], None]) -> None:
        """Take the latch that answers reads of the LSR, as :class:`PostedWrites` has it."""
        self._latch = latch
        latch(UART_LSR, self._latched)

    def reset(self) -> None:
        """Return to what firmware leaves behind; the modem inputs stay, they are the other side's."""
        self._divisor = _BOOT_DIVISOR
        self._ier = self._fcr = self._mcr = self._scr = 0
        self._lcr = _BOOT_LCR
        self._msr = self._modem
        self._lsr_errors = 0
        self._thre_pending = False
        self._fifo.clear()
        self._update_irq()
        self._offer_room()

    def receive(self, data: bytes) -> int:
        """Take what fits of ``data`` into the receive FIFO and return how many bytes that were.

        Nothing fits in loopback, where the receiver is cut off from the line. After a short count
        ``on_room`` is called once, when the receiver is empty.
        """
        taken = data[: self._room()]
        for byte in taken:
            self._push(byte & self._word_mask)
        self._refused = self._refused or len(taken) < len(data)
        self._update_irq()
        return len(taken)

    def receive_break(self) -> bool:
        """Put a break into the receive FIFO; False if it did not fit, as with :meth:`receive`."""
        if not self._room():
            self._refused = True
            return False
        self._push(UART_LSR_BI << 8)
        self._update_irq()
        return True

    def set_modem(
        self,
        *,
        cts: bool | None = None,
        dsr: bool | None = None,
        ri: bool | None = None,
        dcd: bool | None = None,
    ) -> None:
        """Drive the modem input lines; None leaves a line as it is."""
        for bit, line in ((UART_MSR_CTS, cts), (UART_MSR_DSR, dsr), (UART_MSR_RI, ri), (UART_MSR_DCD, dcd)):
            if line is not None:
                self._modem = self._modem | bit if line else self._modem & ~bit
        self._update_msr()
        self._update_irq()

    def read_byte(self, offset: int) -> int:
        """Return a register; RBR, IIR, LSR and MSR have the side effects of the data sheet."""
        match offset:
            case 5:
                return self._read_lsr()
            case 0:
                return self._divisor & 0xFF if self._lcr & UART_LCR_DLAB else self._read_rbr()
            case 1:
                return self._divisor >> 8 if self._lcr & UART_LCR_DLAB else self._ier
            case 2:
                return self._read_iir()
            case 3:
                return self._lcr
            case 4:
                return self._mcr
            case 6:
                return self._read_msr()
            case _:
                return self._scr

    def write_byte(self, offset: int, value: int) -> None:
        """Write a register; LSR and MSR are read-only."""
        match offset:
            case 0:
                if self._lcr & UART_LCR_DLAB:
                    self._divisor = (self._divisor & 0xFF00) | value
                else:
                    self._write_thr(value)
            case 1:
                if self._lcr & UART_LCR_DLAB:
                    self._divisor = (self._divisor & 0xFF) | value << 8
                else:
                    self._write_ier(value)
            case 2:
                self._write_fcr(value)
            case 3:
                self._lcr = value
            case 4:
                self._mcr = value & 0x1F
                self._update_msr()
                self._update_irq()
                self._offer_room()
            case 7:
                self._scr = value

    def state(self) -> SerialState:
        """Return registers, received bytes and modem inputs."""
        return SerialState(
            divisor=self._divisor,
            ier=self._ier,
            fcr=self._fcr,
            lcr=self._lcr,
            mcr=self._mcr,
            scr=self._scr,
            msr=self._msr,
            modem=self._modem,
            lsr_errors=self._lsr_errors,
            thre_pending=self._thre_pending,
            fifo=tuple(self._fifo),
        )

    def restore(self, state: SerialState) -> None:
        """Take on a saved state and drive the interrupt to match; DeviceError if its version is unknown."""
        check_version("serial", state.version, SerialState.version)
        self._divisor = state.divisor
        self._ier, self._fcr, self._lcr, self._mcr = state.ier, state.fcr, state.lcr, state.mcr
        self._scr, self._msr, self._modem = state.scr, state.msr, state.modem
        self._lsr_errors = state.lsr_errors
        self._thre_pending = state.thre_pending
        self._fifo = deque(state.fifo)
        self._update_irq()
        self._offer_room()

    @property
    def _word_mask(self) -> int:
        return 0xFF >> (3 - (self._lcr & UART_LCR_WLEN8))

    @property
    def _depth(self) -> int:
        return FIFO_BYTES if self._fcr & UART_FCR_ENABLE_FIFO else 1

    def _room(self) -> int:
        return 0 if self._mcr & UART_MCR_LOOP else self._depth - len(self._fifo)

    def _offer_room(self) -> None:
        if self._refused and not self._fifo and self._room():
            self._refused = False
            self._on_room()

    def _push(self, entry: int) -> None:
        if len(self._fifo) < self._depth:
            self._fifo.append(entry)
            self._expose_errors()
            return
        self._lsr_errors |= UART_LSR_OE
        if not self._fcr & UART_FCR_ENABLE_FIFO:
            self._fifo[0] = entry  # without the FIFO it is the unread byte that is lost, not the new one

    def _expose_errors(self) -> None:
        """Show a byte's errors in the LSR once it is the next to be read."""
        if self._fifo:
            self._lsr_errors |= self._fifo[0] >> 8
            self._fifo[0] &= 0xFF

    def _read_rbr(self) -> int:
        if not self._fifo:
            return 0
        byte = self._fifo.popleft()
        self._expose_errors()
        self._offer_room()
        self._update_irq()
        return byte

    def _write_thr(self, value: int) -> None:
        if self._mcr & UART_MCR_LOOP:
            self._thre_pending = False
            self._update_irq()
            self._push(value & self._word_mask)
            self._thre_pending = True
            self._update_irq()
        else:
            self._send(bytes((value,)))

    def _send(self, data: bytes) -> None:
        self._thre_pending = False
        self._update_irq()
        mask = self._word_mask
        self._transmit(data if mask == 0xFF else bytes(byte & mask for byte in data))
        self._thre_pending = True
        self._update_irq()

    def _write_ier(self, value: int) -> None:
        enabled = value & ~self._ier
        self._ier = value & 0x0F
        if enabled & UART_IER_THRI:
            self._thre_pending = True
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & UART_FCR_ENABLE_FIFO or (
            value & UART_FCR_ENABLE_FIFO and value & UART_FCR_CLEAR_RCVR
        ):
            self._fifo.clear()
        # The other bits are only programmed together with the enable bit; the two clear bits do not stay.
        self._fcr = (
            value & ~(UART_FCR_CLEAR_RCVR | UART_FCR_CLEAR_XMIT) if value & UART_FCR_ENABLE_FIFO else 0
        )
        self._update_irq()
        self._offer_room()

    def _read_iir(self) -> int:
        interrupt = self._interrupt()
        if interrupt == UART_IIR_THRI:
            self._thre_pending = False
            self._update_irq()
        return interrupt | UART_IIR_FIFO_ENABLED if self._fcr & UART_FCR_ENABLE_FIFO else interrupt

    def _read_lsr(self) -> int:
        value = self._lsr()
        if self._lsr_errors:
            self._lsr_errors = 0
            self._update_irq()
        return value

    def _lsr(self) -> int:
        value = UART_LSR_THRE | UART_LSR_TEMT | self._lsr_errors
        if self._fifo:
            value |= UART_LSR_DR
        if self._fcr & UART_FCR_ENABLE_FIFO and (
            self._lsr_errors & _CHARACTER_ERRORS or any(entry > 0xFF for entry in self._fifo)
        ):
            value |= UART_LSR_FIFOE
        return value

    def _read_msr(self) -> int:
        value = self._msr
        self._msr &= ~UART_MSR_ANY_DELTA
        self._update_irq()
        return value

    def _update_msr(self) -> None:
        lines = self._modem
        if self._mcr & UART_MCR_LOOP:
            lines = 0
            for output, line in (
                (UART_MCR_RTS, UART_MSR_CTS),
                (UART_MCR_DTR, UART_MSR_DSR),
                (UART_MCR_OUT1, UART_MSR_RI),
                (UART_MCR_OUT2, UART_MSR_DCD),
            ):
                lines |= line if self._mcr & output else 0
        changed = self._msr ^ lines
        # RI alone has no delta bit: TERI tells of its trailing edge.
        changed &= ~UART_MSR_RI | self._msr
        self._msr = (self._msr & UART_MSR_ANY_DELTA) | lines | (changed & 0xF0) >> 4

    def _interrupt(self) -> int:
        """Return the IIR code of the pending interrupt of the highest priority."""
        if self._ier & UART_IER_RLSI and self._lsr_errors:
            return UART_IIR_RLSI
        if self._ier & UART_IER_RDI and self._fifo:
            trigger = _TRIGGER_BYTES[self._fcr >> 6]
            return UART_IIR_RDI if len(self._fifo) >= trigger else UART_IIR_RX_TIMEOUT
        if self._ier & UART_IER_THRI and self._thre_pending:
            return UART_IIR_THRI
        if self._ier & UART_IER_MSI and self._msr & UART_MSR_ANY_DELTA:
            return UART_IIR_MSI
        return UART_IIR_NO_INT

    def _update_irq(self) -> None:
        # A PC drives the line through the OUT2 pin, which loopback forces off like all modem outputs.
        gate = self._mcr & (UART_MCR_OUT2 | UART_MCR_LOOP) == UART_MCR_OUT2
        self._irq.set(gate and self._interrupt() != UART_IIR_NO_INT)
        # Reading errors clears them, and in loopback a write changes what is read: the device must see both.
        latched = None if self._lsr_errors or self._mcr & UART_MCR_LOOP else self._lsr()
        if latched != self._latched:
            self._latched = latched
            self._latch(UART_LSR, latched)
