from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import DeviceError
from aiokvm.hw.serial import (
    FIFO_BYTES,
    SERIAL_SIZE,
    UART_DLL,
    UART_DLM,
    UART_FCR,
    UART_FCR_CLEAR_RCVR,
    UART_FCR_CLEAR_XMIT,
    UART_FCR_ENABLE_FIFO,
    UART_IER,
    UART_IER_MSI,
    UART_IER_RDI,
    UART_IER_RLSI,
    UART_IER_THRI,
    UART_IIR,
    UART_LCR,
    UART_LCR_DLAB,
    UART_LSR,
    UART_LSR_BI,
    UART_LSR_DR,
    UART_LSR_FIFOE,
    UART_LSR_OE,
    UART_LSR_TEMT,
    UART_LSR_THRE,
    UART_MCR,
    UART_MCR_DTR,
    UART_MCR_LOOP,
    UART_MCR_OUT1,
    UART_MCR_OUT2,
    UART_MCR_RTS,
    UART_MSR,
    UART_MSR_CTS,
    UART_MSR_DCD,
    UART_MSR_DCTS,
    UART_MSR_DDCD,
    UART_MSR_DDSR,
    UART_MSR_DSR,
    UART_MSR_RI,
    UART_MSR_TERI,
    UART_RX,
    UART_SCR,
    UART_TX,
    Serial,
)

EMPTY = UART_LSR_THRE | UART_LSR_TEMT
FIFO = 0xC0
NO_INT, MSI, THRI, RDI, RLSI, TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C


class Harness:
    def __init__(self, *, fifo: bool = False, ier: int = 0, out2: bool = True, trigger: int = 0) -> None:
        self.irq: list[bool] = []
        self.sent = bytearray()
        self.rooms = 0
        self.uart = Serial(self.irq.append, self.sent.extend, self.on_room)
        if fifo:
            self[UART_FCR] = UART_FCR_ENABLE_FIFO | trigger << 6
        if out2:
            self[UART_MCR] = UART_MCR_OUT2
        if ier:
            self[UART_IER] = ier

    def on_room(self) -> None:
        self.rooms += 1

    def __getitem__(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def __setitem__(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    @property
    def level(self) -> bool:
        return bool(self.irq and self.irq[-1])


def test_registers_after_reset() -> None:
    h = Harness(out2=False)
    assert h[UART_RX] == 0
    assert h[UART_IER] == 0
    assert h[UART_IIR] == NO_INT
    assert h[UART_LCR] == 0x03
    assert h[UART_MCR] == 0
    assert h[UART_LSR] == EMPTY
    assert h[UART_MSR] == UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD
    assert h[UART_SCR] == 0
    h[UART_LCR] = UART_LCR_DLAB
    assert (h[UART_DLL], h[UART_DLM]) == (12, 0)
    assert h.irq == []


@pytest.mark.parametrize(
    ("offset", "written", "read"),
    [
        (UART_IER, 0xFF, 0x0F),
        (UART_LCR, 0xFF, 0xFF),
        (UART_MCR, 0xFF, 0x1F),
        (UART_SCR, 0xA5, 0xA5),
        (UART_LSR, 0xFF, EMPTY),
        (UART_MSR, 0xFF, 0xB0),
    ],
)
def test_register_bits(offset: int, written: int, read: int) -> None:
    h = Harness(out2=False)
    h[offset] = written
    assert h[offset] == read


def test_divisor_latch() -> None:
    h = Harness()
    h[UART_IER] = 0x05
    h[UART_LCR] = UART_LCR_DLAB | 0x03
    h[UART_DLL] = 0x34
    h[UART_DLM] = 0x12
    assert (h[UART_DLL], h[UART_DLM]) == (0x34, 0x12)
    assert h.uart.state().divisor == 0x1234
    h[UART_LCR] = 0x03
    assert h[UART_IER] == 0x05
    assert h.sent == b""


def test_wide_access_is_split() -> None:
    h = Harness()
    assert h.uart.read(UART_LCR, 4) == 0xB0 << 24 | EMPTY << 16 | UART_MCR_OUT2 << 8 | 0x03
    h.uart.write(UART_SCR, 4, 0xFFFFFF5A)
    assert h[UART_SCR] == 0x5A
    assert h.uart.read(SERIAL_SIZE, 2) == 0xFFFF


def test_transmit_at_once() -> None:
    h = Harness()
    for byte in b"hello":
        h[UART_TX] = byte
        assert h[UART_LSR] == EMPTY
    assert h.sent == b"hello"


@pytest.mark.parametrize(("lcr", "mask"), [(0, 0x1F), (1, 0x3F), (2, 0x7F), (3, 0xFF)])
def test_word_length_masks_both_ways(lcr: int, mask: int) -> None:
    h = Harness()
    h[UART_LCR] = lcr
    h[UART_TX] = 0xFF
    assert h.sent == bytes([mask])
    assert h.uart.receive(b"\xff") == 1
    assert h[UART_RX] == mask


def test_receive_without_fifo_takes_one_byte() -> None:
    h = Harness(ier=UART_IER_RDI)
    assert h.uart.receive(b"ab") == 1
    assert h.uart.receive(b"b") == 0
    assert h[UART_LSR] == EMPTY | UART_LSR_DR
    assert h[UART_IIR] == RDI
    assert h.rooms == 0
    assert h[UART_RX] == ord("a")
    assert h.rooms == 1
    assert h[UART_LSR] == EMPTY
    assert h[UART_IIR] == NO_INT
    assert h.irq == [True, False]


def test_receive_with_fifo_takes_sixteen_and_never_overruns() -> None:
    h = Harness(fifo=True)
    data = bytes(range(0x40, 0x60))
    assert h.uart.receive(data) == FIFO_BYTES
    assert h.uart.receive(data[16:]) == 0
    assert bytes(h[UART_RX] for _ in range(16)) == data[:16]
    assert h[UART_LSR] == EMPTY
    assert h.uart.receive(b"") == 0


def test_on_room_is_called_once_when_all_is_read_and_only_if_something_was_refused() -> None:
    h = Harness(fifo=True)
    assert h.uart.receive(bytes(16)) == 16
    h[UART_RX]
    assert h.rooms == 0
    assert h.uart.receive(b"ab") == 1
    for _ in range(FIFO_BYTES):
        assert h.rooms == 0
        h[UART_RX]
    assert h.rooms == 1


def test_flood_through_on_room_loses_nothing() -> None:
    data = bytes(i % 251 for i in range(1000))
    at = 0
    irq: list[bool] = []

    def feed() -> None:
        nonlocal at
        at += uart.receive(data[at:])

    uart = Serial(irq.append, lambda _: None, feed)
    uart.write(UART_FCR, 1, UART_FCR_ENABLE_FIFO)
    uart.write(UART_MCR, 1, UART_MCR_OUT2)
    uart.write(UART_IER, 1, UART_IER_RDI)
    feed()
    got = bytearray()
    while uart.read(UART_LSR, 1) & UART_LSR_DR:
        got.append(uart.read(UART_RX, 1))
    assert got == data
    assert irq == [True, False]


@pytest.mark.parametrize("release", ["fcr", "reset", "loop", "restore", "fifo"])
def test_on_room_whatever_makes_the_room(release: str) -> None:
    h = Harness(fifo=release != "fifo")
    empty = h.uart.state()
    if release == "loop":
        h[UART_MCR] = UART_MCR_LOOP
    assert h.uart.receive(bytes(17)) < 17
    assert h.rooms == 0
    match release:
        case "fcr":
            h[UART_FCR] = UART_FCR_ENABLE_FIFO | UART_FCR_CLEAR_RCVR
        case "fifo":
            h[UART_FCR] = UART_FCR_ENABLE_FIFO
        case "reset":
            h.uart.reset()
        case "loop":
            h[UART_MCR] = 0
        case _:
            h.uart.restore(empty)
    assert h.rooms == 1


@pytest.mark.parametrize(("trigger", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_fifo_trigger_levels(trigger: int, level: int) -> None:
    h = Harness(fifo=True, ier=UART_IER_RDI, trigger=trigger)
    for count in range(1, 17):
        assert h.uart.receive(b"x") == 1
        assert h[UART_IIR] == FIFO | (RDI if count >= level else TIMEOUT)
    for count in range(15, 0, -1):
        h[UART_RX]
        assert h[UART_IIR] == FIFO | (RDI if count >= level else TIMEOUT)
    h[UART_RX]
    assert h[UART_IIR] == FIFO | NO_INT
    assert h.irq == [True, False]


def test_fcr_enable_toggle_clears_the_fifo() -> None:
    h = Harness()
    h.uart.receive(b"a")
    h[UART_FCR] = UART_FCR_ENABLE_FIFO
    assert h[UART_LSR] == EMPTY
    assert h[UART_IIR] == FIFO | NO_INT
    h.uart.receive(b"abc")
    h[UART_FCR] = UART_FCR_ENABLE_FIFO
    assert h[UART_LSR] == EMPTY | UART_LSR_DR
    h[UART_FCR] = 0
    assert h[UART_LSR] == EMPTY
    assert h[UART_IIR] == NO_INT


def test_fcr_clear_bits() -> None:
    h = Harness(fifo=True, ier=UART_IER_RDI)
    h.uart.receive(b"abc")
    h[UART_FCR] = UART_FCR_ENABLE_FIFO | UART_FCR_CLEAR_XMIT
    assert h[UART_LSR] == EMPTY | UART_LSR_DR
    h[UART_FCR] = UART_FCR_ENABLE_FIFO | UART_FCR_CLEAR_RCVR
    assert h[UART_LSR] == EMPTY
    assert h.irq == [True, False]
    h.uart.receive(b"d")
    assert h[UART_RX] == ord("d")


def test_fcr_bits_without_enable_are_not_programmed() -> None:
    h = Harness(ier=UART_IER_RDI)
    h.uart.receive(b"a")
    h[UART_FCR] = 0xC0 | UART_FCR_CLEAR_RCVR
    assert h[UART_IIR] == RDI
    assert h[UART_RX] == ord("a")


def test_interrupt_priorities() -> None:
    h = Harness(fifo=True, ier=UART_IER_RDI | UART_IER_THRI | UART_IER_RLSI | UART_IER_MSI, trigger=1)
    h.uart.set_modem(cts=False)
    h.uart.receive_break()
    h.uart.receive(b"abc")
    assert h[UART_IIR] == FIFO | RLSI
    assert h[UART_LSR] == EMPTY | UART_LSR_DR | UART_LSR_BI | UART_LSR_FIFOE
    assert h[UART_IIR] == FIFO | RDI
    h[UART_RX]
    assert h[UART_IIR] == FIFO | TIMEOUT
    for _ in range(3):
        h[UART_RX]
    assert h[UART_IIR] == FIFO | THRI
    assert h[UART_IIR] == FIFO | MSI
    assert h.irq == [True]
    assert h[UART_MSR] & UART_MSR_DCTS
    assert h[UART_IIR] == FIFO | NO_INT
    assert h.irq == [True, False]


def test_disabled_sources_stay_silent() -> None:
    h = Harness(fifo=True)
    h.uart.receive(b"a")
    h.uart.receive_break()
    h.uart.set_modem(dcd=False)
    h[UART_TX] = 0
    assert h[UART_IIR] == FIFO | NO_INT
    assert h.irq == []


def test_thre_is_raised_by_enabling_and_cleared_by_reading_iir() -> None:
    h = Harness()
    h[UART_IER] = UART_IER_THRI
    assert h.irq == [True]
    assert h[UART_IIR] == THRI
    assert h.irq == [True, False]
    assert h[UART_IIR] == NO_INT
    h[UART_IER] = UART_IER_THRI
    assert h.irq == [True, False]
    h[UART_IER] = 0
    h[UART_IER] = UART_IER_THRI
    assert h[UART_IIR] == THRI


def test_thre_write_makes_a_new_edge() -> None:
    h = Harness(ier=UART_IER_THRI)
    h[UART_TX] = 0x41
    assert h.irq == [True, False, True]
    assert h[UART_IIR] == THRI
    h[UART_TX] = 0x42
    assert h.irq == [True, False, True, False, True]


def test_iir_read_clears_thre_only_when_it_reports_it() -> None:
    h = Harness(ier=UART_IER_THRI | UART_IER_RDI)
    h.uart.receive(b"a")
    assert h[UART_IIR] == RDI
    h[UART_RX]
    assert h[UART_IIR] == THRI
    assert h[UART_IIR] == NO_INT


def test_out2_gates_the_interrupt() -> None:
    h = Harness(ier=UART_IER_RDI, out2=False)
    h.uart.receive(b"a")
    assert h[UART_IIR] == RDI
    assert h.irq == []
    h[UART_MCR] = UART_MCR_OUT2
    assert h.irq == [True]
    h[UART_MCR] = UART_MCR_OUT2 | UART_MCR_LOOP
    assert h.irq == [True, False]
    h[UART_MCR] = UART_MCR_OUT2
    h[UART_MCR] = 0
    assert h.irq == [True, False, True, False]


@pytest.mark.parametrize("fifo", [False, True])
def test_break(fifo: bool) -> None:
    h = Harness(fifo=fifo, ier=UART_IER_RLSI)
    assert h.uart.receive_break()
    assert h[UART_IIR] & 0x0F == RLSI
    assert h[UART_LSR] == EMPTY | UART_LSR_DR | UART_LSR_BI | (UART_LSR_FIFOE if fifo else 0)
    assert h[UART_LSR] == EMPTY | UART_LSR_DR
    assert h[UART_RX] == 0
    assert h.irq == [True, False]


def test_break_shows_when_its_byte_is_next() -> None:
    h = Harness(fifo=True, ier=UART_IER_RLSI)
    h.uart.receive(b"a")
    assert h.uart.receive_break()
    h.uart.receive(b"b")
    assert h[UART_LSR] == EMPTY | UART_LSR_DR | UART_LSR_FIFOE
    assert h.irq == []
    assert h[UART_RX] == ord("a")
    assert h.irq == [True]
    assert h[UART_LSR] == EMPTY | UART_LSR_DR | UART_LSR_FIFOE | UART_LSR_BI
    assert (h[UART_RX], h[UART_RX]) == (0, ord("b"))
    assert h[UART_LSR] == EMPTY


def test_break_that_does_not_fit() -> None:
    h = Harness()
    h.uart.receive(b"a")
    assert not h.uart.receive_break()
    assert h[UART_RX] == ord("a")
    assert h.rooms == 1
    assert h.uart.receive_break()


@pytest.mark.parametrize(
    ("line", "bit", "delta"),
    [
        ("cts", UART_MSR_CTS, UART_MSR_DCTS),
        ("dsr", UART_MSR_DSR, UART_MSR_DDSR),
        ("dcd", UART_MSR_DCD, UART_MSR_DDCD),
    ],
)
def test_modem_lines(line: str, bit: int, delta: int) -> None:
    h = Harness(ier=UART_IER_MSI)
    h.uart.set_modem(**{line: True})
    assert h.irq == []
    h.uart.set_modem(**{line: False})
    assert h[UART_IIR] == MSI
    assert h[UART_MSR] == 0xB0 & ~bit | delta
    assert h[UART_MSR] == 0xB0 & ~bit
    h.uart.set_modem(**{line: True})
    assert h[UART_MSR] == 0xB0 | delta
    assert h.irq == [True, False, True, False]


def test_ring_tells_of_its_trailing_edge_only() -> None:
    h = Harness(ier=UART_IER_MSI)
    h.uart.set_modem(ri=True)
    assert h.irq == []
    assert h[UART_MSR] == 0xB0 | UART_MSR_RI
    h.uart.set_modem(ri=False)
    assert h.irq == [True]
    assert h[UART_MSR] == 0xB0 | UART_MSR_TERI


def test_deltas_accumulate_until_read() -> None:
    h = Harness()
    h.uart.set_modem(cts=False, dsr=False)
    h.uart.set_modem(cts=True, dcd=False)
    assert h[UART_MSR] == UART_MSR_CTS | UART_MSR_DCTS | UART_MSR_DDSR | UART_MSR_DDCD


@pytest.mark.parametrize(
    ("mcr", "msr"),
    [
        (0, 0),
        (UART_MCR_DTR, UART_MSR_DSR),
        (UART_MCR_RTS, UART_MSR_CTS),
        (UART_MCR_OUT1, UART_MSR_RI),
        (UART_MCR_OUT2, UART_MSR_DCD),
        (0x0A, 0x90),  # what Linux's autoconfig expects
        (0x0F, 0xF0),
    ],
)
def test_loopback_modem_lines(mcr: int, msr: int) -> None:
    h = Harness()
    h[UART_MCR] = UART_MCR_LOOP | mcr
    assert h[UART_MSR] & 0xF0 == msr
    h.uart.set_modem(ri=True, cts=False)
    assert h[UART_MSR] == msr
    h[UART_MCR] = UART_MCR_OUT2
    assert h[UART_MSR] & 0xF0 == UART_MSR_DSR | UART_MSR_RI | UART_MSR_DCD


def test_loopback_deltas() -> None:
    h = Harness()
    h[UART_MCR] = UART_MCR_LOOP | UART_MCR_OUT1
    h[UART_MSR]
    h[UART_MCR] = UART_MCR_LOOP | UART_MCR_RTS
    assert h[UART_MSR] == UART_MSR_CTS | UART_MSR_DCTS | UART_MSR_TERI


def test_loopback_data_stays_inside() -> None:
    h = Harness(fifo=True)
    h[UART_MCR] = UART_MCR_LOOP
    for byte in b"ab":
        h[UART_TX] = byte
    assert h.uart.receive(b"x") == 0
    assert not h.uart.receive_break()
    assert (h[UART_RX], h[UART_RX]) == (ord("a"), ord("b"))
    assert h[UART_LSR] == EMPTY
    assert h.sent == b""


@pytest.mark.parametrize("fifo", [False, True])
def test_loopback_overrun(fifo: bool) -> None:
    h = Harness(fifo=fifo, ier=UART_IER_RLSI)
    h[UART_MCR] = UART_MCR_LOOP
    depth = 16 if fifo else 1
    for byte in range(depth + 1):
        h[UART_TX] = byte
    assert h[UART_IIR] & 0x0F == RLSI
    assert h[UART_LSR] == EMPTY | UART_LSR_DR | UART_LSR_OE
    assert h[UART_LSR] == EMPTY | UART_LSR_DR
    # the FIFO keeps what it has; without it the new byte takes the old one's place
    assert [h[UART_RX] for _ in range(depth)] == (list(range(16)) if fifo else [1])


def test_linux_autoconfig_finds_a_16550a() -> None:
    h = Harness(out2=False)
    h[UART_IER] = 0
    assert h[UART_IER] & 0x0F == 0
    h[UART_IER] = 0x0F
    assert h[UART_IER] & 0x0F == 0x0F
    h[UART_IER] = 0
    h[UART_MCR] = UART_MCR_LOOP | 0x0A
    assert h[UART_MSR] & 0xF0 == 0x90
    h[UART_MCR] = 0
    h[UART_LCR] = 0xBF
    h[UART_FCR] = 0
    h[UART_LCR] = 0
    h[UART_FCR] = UART_FCR_ENABLE_FIFO
    assert h[UART_IIR] >> 6 == 3
    h[UART_LCR] = 0x80  # a 16650 has an EFR that reads as zero here
    assert h[UART_IIR] != 0
    h[UART_LCR] = 0xE0  # a NatSemi chip has a loop bit here that follows the MCR's
    assert h[UART_IIR] & UART_MCR_LOOP == 0
    for lcr in (0, 0x80):  # a 16750 has a 64-byte FIFO bit that reads back
        h[UART_LCR] = lcr
        h[UART_FCR] = UART_FCR_ENABLE_FIFO | 0x20
        assert h[UART_IIR] >> 5 == 6
    h[UART_LCR] = 0
    h[UART_IER] = 0x40  # an XScale has a unit enable bit
    assert h[UART_IER] == 0


def test_reset_keeps_the_other_side() -> None:
    h = Harness(fifo=True, ier=UART_IER_RDI | UART_IER_THRI)
    h.uart.set_modem(dcd=False)
    h.uart.receive(b"abc")
    h.uart.reset()
    assert h.irq == [True, False]
    fresh = Harness(out2=False)
    fresh.uart.set_modem(dcd=False)
    fresh[UART_MSR]
    assert h.uart.state() == fresh.uart.state()


def test_state_round_trip() -> None:
    h = Harness(fifo=True, ier=UART_IER_RDI | UART_IER_RLSI, trigger=2)
    h[UART_LCR] = UART_LCR_DLAB
    h[UART_DLL] = 1
    h[UART_LCR] = 0x03
    h[UART_SCR] = 0x77
    h.uart.receive(b"ab")
    h.uart.receive_break()
    h.uart.set_modem(ri=True, cts=False)
    other = Harness(out2=False)
    other.uart.restore(h.uart.state())
    assert other.uart.state() == h.uart.state()
    assert other.irq == [True]
    offsets = (
        UART_IIR,
        UART_RX,
        UART_RX,
        UART_LSR,
        UART_RX,
        UART_LSR,
        UART_MSR,
        UART_MSR,
        UART_SCR,
        UART_IIR,
    )
    assert [other[i] for i in offsets] == [h[i] for i in offsets]
    assert other.level == h.level


def test_unknown_state_version() -> None:
    h = Harness()
    with pytest.raises(DeviceError, match="serial: saved state has version 0"):
        h.uart.restore(dataclasses.replace(h.uart.state(), version=0))


_sizes = st.sampled_from((1, 1, 1, 2, 4, 8))
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("r"), st.integers(0, 9), _sizes),
        st.tuples(st.just("w"), st.integers(0, 9), _sizes, st.integers(0, 2**64 - 1)),
        st.tuples(st.just("receive"), st.binary(max_size=20)),
        st.tuples(st.just("break")),
        st.tuples(st.just("modem"), st.tuples(*[st.sampled_from((None, False, True))] * 4)),
        st.tuples(st.just("reset")),
    ),
    max_size=60,
)


@given(_steps)
def test_random_accesses(steps: list[tuple[Any, ...]]) -> None:
    h = Harness()
    for step in steps:
        match step:
            case "r", offset, size:
                assert 0 <= h.uart.read(offset, size) < 1 << (8 * size)
            case "w", offset, size, value:
                h.uart.write(offset, size, value & ((1 << (8 * size)) - 1))
            case "receive", data:
                before = h.uart.state()
                depth = FIFO_BYTES if before.fcr & UART_FCR_ENABLE_FIFO else 1
                room = 0 if before.mcr & UART_MCR_LOOP else depth - len(before.fifo)
                assert h.uart.receive(data) == min(len(data), room)
            case ("break",):
                h.uart.receive_break()
            case "modem", (cts, dsr, ri, dcd):
                h.uart.set_modem(cts=cts, dsr=dsr, ri=ri, dcd=dcd)
            case _:
                h.uart.reset()
        state = h.uart.state()
        assert len(state.fifo) <= 16
        assert h.irq == [i % 2 == 0 for i in range(len(h.irq))]
        other = Harness(out2=False)
        other.uart.restore(state)
        assert other.uart.state() == state
        assert other.level == h.level
        gate = h[UART_MCR] & (UART_MCR_OUT2 | UART_MCR_LOOP) == UART_MCR_OUT2
        assert other[UART_IIR] & 1 == (0 if h.level else 1) or not gate
