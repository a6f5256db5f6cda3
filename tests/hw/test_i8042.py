from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import DeviceError
from aiokvm.hw.i8042 import (
    I8042,
    I8042_CTR_AUXDIS,
    I8042_CTR_KBDDIS,
    I8042_CTR_KBDINT,
    I8042_CTR_SYS,
    I8042_CTR_XLATE,
    I8042_STR_AUXDATA,
    I8042_STR_CMDDAT,
    I8042_STR_KEYLOCK,
    I8042_STR_OBF,
    I8042_STR_SYS,
    I8042_STR_TIMEOUT,
)

IDLE = I8042_STR_KEYLOCK | I8042_STR_SYS


class Harness:
    def __init__(self, *, config: int | None = None) -> None:
        self.irq: list[bool] = []
        self.resets = 0
        self.i8042 = I8042(self.irq.append, self.on_reset)
        if config is not None:
            self.command(0x60, config)

    def on_reset(self) -> None:
        self.resets += 1

    def status(self) -> int:
        return self.i8042.command.read(0, 1)

    def data(self) -> int:
        return self.i8042.data.read(0, 1)

    def write(self, value: int) -> None:
        self.i8042.data.write(0, 1, value)

    def command(self, command: int, *parameters: int) -> None:
        self.i8042.command.write(0, 1, command)
        for parameter in parameters:
            self.write(parameter)

    def drain(self) -> bytes:
        data = bytearray()
        while self.status() & I8042_STR_OBF:
            data.append(self.data())
        return bytes(data)

    def ask(self, *values: int) -> bytes:
        """Send bytes to the keyboard and return everything that it says."""
        answer = bytearray()
        for value in values:
            self.write(value)
            answer += self.drain()
        return bytes(answer)


RAW = I8042_CTR_SYS | I8042_CTR_KBDINT  # translation off


def test_after_reset() -> None:
    h = Harness()
    assert h.status() == IDLE
    h.command(0x20)
    assert h.data() == I8042_CTR_KBDINT | I8042_CTR_SYS | I8042_CTR_AUXDIS | I8042_CTR_XLATE
    assert h.irq == [True, False]


def test_status_tells_command_from_data() -> None:
    h = Harness()
    h.command(0xAB)
    assert h.status() == IDLE | I8042_STR_CMDDAT | I8042_STR_OBF
    assert h.data() == 0x00
    assert h.status() == IDLE | I8042_STR_CMDDAT
    h.write(0xEE)
    assert h.status() == IDLE | I8042_STR_OBF


def test_ports_are_one_byte_wide() -> None:
    h = Harness()
    assert h.i8042.command.read(0, 4) == 0xFFFFFF00 | IDLE
    h.i8042.command.write(0, 4, 0xFFFFFFAA)
    assert h.i8042.data.read(0, 2) == 0xFF55
    assert h.resets == 0


@pytest.mark.parametrize(("written", "read"), [(0x00, 0x20), (0xFF, 0x77), (0x65, 0x65), (0x88, 0x20)])
def test_config_byte(written: int, read: int) -> None:
    h = Harness(config=written)
    h.command(0x20)
    assert h.data() == read


@pytest.mark.parametrize(
    ("command", "answer"),
    [(0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x02), (0xC0, 0x80), (0xD0, 0xC3)],
)
def test_commands_that_answer(command: int, answer: int) -> None:
    h = Harness()
    h.command(command)
    assert h.status() & (I8042_STR_OBF | I8042_STR_AUXDATA) == I8042_STR_OBF
    assert h.data() == answer


def test_self_test_sets_the_system_flag() -> None:
    h = Harness(config=0)
    assert h.status() & I8042_STR_SYS == 0
    h.command(0xAA)
    assert h.status() & I8042_STR_SYS


def test_there_is_no_second_port() -> None:
    h = Harness()
    h.command(0xA8)
    h.command(0x20)
    assert h.data() & I8042_CTR_AUXDIS
    h.command(0xA7)
    h.command(0xD4, 0xFF)
    assert h.status() == IDLE | I8042_STR_OBF | I8042_STR_AUXDATA | I8042_STR_TIMEOUT
    assert h.data() == 0xFE
    assert h.status() == IDLE


def test_aux_loop_echoes_without_irq_1() -> None:
    h = Harness()
    h.command(0xD3, 0x5A)
    assert h.status() == IDLE | I8042_STR_OBF | I8042_STR_AUXDATA
    assert h.data() == 0x5A
    assert h.irq == []


def test_keyboard_output_buffer_can_be_written() -> None:
    h = Harness()
    h.command(0xD2, 0x1E)
    assert h.irq == [True]
    assert h.data() == 0x1E
    assert h.irq == [True, False]


def test_output_port() -> None:
    h = Harness()
    h.command(0xD1, 0xDD)
    h.command(0xD0)
    assert h.data() == 0xC1
    h.command(0xD1, 0xDF)
    h.command(0xD2, 0x00)
    h.command(0xD0)
    assert h.data() == 0xD3
    h.command(0xD3, 0x00)
    h.command(0xD0)
    assert h.data() == 0xE3
    assert h.resets == 0
    h.command(0xD1, 0xFE)
    assert h.resets == 1


@pytest.mark.parametrize("command", range(0xF0, 0x100))
def test_pulse(command: int) -> None:
    h = Harness()
    h.command(command)
    assert h.resets == (command & 1 == 0)


def test_a_new_command_cancels_the_parameter() -> None:
    h = Harness()
    h.command(0x60)
    h.command(0xAB)
    assert h.data() == 0
    assert h.ask(0xEE) == b"\xee"
    h.command(0x20)
    assert h.data() == 0x65


def test_unknown_commands_are_ignored() -> None:
    h = Harness()
    for command in (0x00, 0x21, 0x5F, 0x61, 0x90, 0xAC, 0xC1, 0xDE, 0xE0):
        h.command(command)
        assert h.status() == IDLE | I8042_STR_CMDDAT
    assert h.irq == []


def test_an_unread_byte_is_replaced_by_a_command_s_answer() -> None:
    h = Harness()
    h.i8042.press(b"\x1c")
    h.command(0xAA)
    assert h.drain() == b"\x55"
    assert h.irq == [True, False]


def test_data_stays_readable_after_it_was_read() -> None:
    h = Harness()
    h.command(0xAA)
    assert (h.data(), h.data()) == (0x55, 0x55)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ((0xFF,), "fa aa"),
        ((0xF2,), "fa ab 83"),
        ((0xED, 0x07), "fa fa"),
        ((0xF3, 0x20), "fa fa"),
        ((0xF4,), "fa"),
        ((0xF5,), "fa"),
        ((0xF6,), "fa"),
        ((0xF7,), "fa"),
        ((0xFA,), "fa"),
        ((0xEE,), "ee"),
        ((0xF0, 0x00), "fa fa 02"),
        ((0xF0, 0x02), "fa fa"),
        ((0xF0, 0x01, 0xF0, 0x00), "fa fa fa fa 01"),
        ((0xF0, 0x03), "fa fe"),
        ((0xEF,), "fe"),
        ((0xF1,), "fe"),
        ((0xFB,), "fe"),
        ((0x12,), "fe"),
        ((0xF2, 0xFE), "fa ab 83 83"),
        ((0xFE,), "aa"),
        ((0xED, 0xF4), "fa fa"),
    ],
)
def test_keyboard_commands(command: tuple[int, ...], answer: str) -> None:
    h = Harness(config=RAW)
    assert h.ask(*command) == bytes.fromhex(answer)


def test_identify_is_translated() -> None:
    assert Harness().ask(0xF2) == bytes.fromhex("fa ab 41")
    assert Harness().ask(0xF0, 0x00) == bytes.fromhex("fa fa 41")


def test_leds() -> None:
    h = Harness()
    h.ask(0xED, 0xFF & 0x0D)
    assert h.i8042.leds == 5
    h.ask(0xED, 0xF4)  # a command in the place of the parameter
    assert h.i8042.leds == 5
    h.ask(0xFF)
    assert h.i8042.leds == 0


def test_scanning_can_be_disabled() -> None:
    h = Harness(config=RAW)
    h.ask(0xF5)
    h.i8042.press(b"\x1c")
    assert h.drain() == b""
    h.ask(0xF4)
    h.i8042.press(b"\x1c")
    assert h.drain() == b"\x1c"
    h.ask(0xF5)
    h.ask(0xF6)
    h.i8042.press(b"\x1c")
    assert h.drain() == b"\x1c"


def test_answers_go_before_scan_codes() -> None:
    h = Harness(config=RAW)
    h.command(0xAD)
    h.i8042.press(b"\x1c\xf0\x1c")
    assert h.drain() == b""
    h.write(0xED)  # which also enables the keyboard again
    assert h.drain() == b"\xfa\x1c\xf0\x1c"


@pytest.mark.parametrize("command", [0xF4, 0xF5, 0xF6, 0xFF])
def test_commands_that_empty_the_queue(command: int) -> None:
    h = Harness(config=RAW)
    h.command(0xAD)
    h.i8042.press(b"\x1c\x1b")
    h.write(command)
    assert h.drain() == (b"\xfa\xaa" if command == 0xFF else b"\xfa")


def test_translation() -> None:
    h = Harness()
    h.i8042.press(bytes.fromhex("1c f01c e075 e0f075 83 f084"))
    assert h.drain() == bytes.fromhex("1e 9e e048 e0c8 41 d4")


def test_translation_off() -> None:
    h = Harness(config=RAW)
    h.i8042.press(bytes.fromhex("1c f01c e075"))
    assert h.drain() == bytes.fromhex("1c f01c e075")


def test_translation_of_well_known_keys() -> None:
    h = Harness()
    # Esc 1 2 0 Backspace Tab Q P, Enter Ctrl A Shift Z RShift Alt Space, Caps F1 F10 Num Scroll Home Del F11
    for set2, set1 in (
        ("76 16 1e 45 66 0d 15 4d", "01 02 03 0b 0e 0f 10 19"),
        ("5a 14 1c 12 1a 59 11 29", "1c 1d 1e 2a 2c 36 38 39"),
        ("58 05 09 77 7e 6c 71 78", "3a 3b 44 45 46 47 53 57"),
    ):
        h.i8042.press(bytes.fromhex(set2))
        assert h.drain() == bytes.fromhex(set1)


def test_translation_keeps_keys_apart() -> None:
    seen = set()
    for code in range(0x80):
        h = Harness()
        h.i8042.press(bytes([code]))
        seen |= set(h.drain())
    assert len(seen) == 0x80
    assert seen == set(range(1, 0x80)) | {0xFF}


def test_keyboard_in_set_1() -> None:
    h = Harness(config=RAW)
    h.ask(0xF0, 0x01)
    h.i8042.press(bytes.fromhex("1c f01c"))
    assert h.drain() == b"\x1e\x9e"


@pytest.mark.parametrize(("config", "overrun"), [(RAW, 0x00), (RAW | I8042_CTR_XLATE, 0xFF)])
def test_overflow_ends_in_one_overrun_code(config: int, overrun: int) -> None:
    h = Harness(config=config)
    h.command(0xAD)
    h.i8042.press(b"\x29" * 100)
    h.command(0xAE)
    space = 0x39 if config & I8042_CTR_XLATE else 0x29
    assert h.drain() == bytes([space] * 16 + [overrun])
    h.i8042.press(b"\x29")
    assert h.drain() == bytes([space])


def test_irq_drops_with_every_byte_read() -> None:
    h = Harness()
    h.i8042.press(b"\x1c\x1b")
    assert h.irq == [True]
    assert h.data() == 0x1E
    assert h.irq == [True, False, True]
    assert h.data() == 0x1F
    assert h.irq == [True, False, True, False]
    h.data()
    assert h.irq == [True, False, True, False]


def test_irq_needs_its_config_bit() -> None:
    h = Harness(config=I8042_CTR_XLATE)
    h.i8042.press(b"\x1c")
    assert h.status() & I8042_STR_OBF
    assert h.irq == []
    h.command(0x60, I8042_CTR_XLATE | I8042_CTR_KBDINT)
    assert h.irq == [True]
    h.command(0x60, I8042_CTR_XLATE)
    assert h.irq == [True, False]


def test_disabled_keyboard_keeps_its_bytes() -> None:
    h = Harness()
    h.i8042.press(b"\x1c\xf0\x1c")
    h.command(0xAD)
    assert h.drain() == b"\x1e"  # was already in the output buffer
    h.command(0x20)
    assert h.data() & I8042_CTR_KBDDIS
    h.command(0xAE)
    assert h.drain() == b"\x9e"


def test_ctrl_alt_del() -> None:
    h = Harness()
    h.i8042.ctrl_alt_del()
    assert h.drain() == bytes.fromhex("1d 38 e053 e0d3 b8 9d")


@pytest.mark.parametrize("port", ["data", "command"])
def test_reset_by_either_port(port: str) -> None:
    h = Harness(config=0)
    h.ask(0xF5)
    h.ask(0xED, 7)
    h.command(0xD1, 0xDD)
    h.command(0xD2, 0x11)
    h.command(0x60)
    getattr(h.i8042, port).reset()
    assert h.i8042.state() == Harness().i8042.state()
    assert h.status() == IDLE


def test_state_round_trip() -> None:
    h = Harness()
    h.ask(0xED, 2)
    h.i8042.press(bytes.fromhex("1c f01c e0f0"))
    h.command(0x60)
    other = Harness()
    other.i8042.restore(h.i8042.state())
    assert other.i8042.state() == h.i8042.state()
    assert other.irq == [True]
    for x in (h, other):
        x.write(RAW | I8042_CTR_XLATE)
        x.i8042.press(b"\x75")
        assert x.drain() == bytes.fromhex("1e 9e e0 c8")
        assert x.i8042.leds == 2


def test_state_keeps_a_keyboard_parameter() -> None:
    h, other = Harness(), Harness()
    h.write(0xED)
    other.i8042.restore(h.i8042.state())
    other.drain()
    assert other.ask(0x04) == b"\xfa"
    assert other.i8042.leds == 4


def test_state_keeps_a_split_release_in_set_1() -> None:
    h, other = Harness(config=RAW), Harness()
    h.ask(0xF0, 0x01)
    h.i8042.press(b"\xf0")
    other.i8042.restore(h.i8042.state())
    other.i8042.press(b"\x1c")
    assert other.drain() == b"\x9e"


def test_unknown_state_version() -> None:
    h = Harness()
    with pytest.raises(DeviceError, match="i8042: saved state has version 7"):
        h.i8042.restore(dataclasses.replace(h.i8042.state(), version=7))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(("rd", "rc"))),
            st.tuples(st.sampled_from(("wd", "wc")), st.integers(0, 255)),
            st.tuples(st.just("wc"), st.sampled_from((0x20, 0x60, 0xAD, 0xAE, 0xD1, 0xD2, 0xD3, 0xD4))),
            st.tuples(st.just("wd"), st.integers(0xED, 0xFF)),
            st.tuples(st.just("press"), st.binary(max_size=24)),
        ),
        max_size=60,
    )
)
def test_random_accesses(steps: list[tuple[Any, ...]]) -> None:
    h = Harness()
    for step in steps:
        match step:
            case ("rd",):
                assert 0 <= h.data() <= 0xFF
            case ("rc",):
                assert 0 <= h.status() <= 0xFF
            case "wd", value:
                h.write(value)
            case "wc", value:
                h.command(value)
            case _, codes:
                h.i8042.press(codes)
        state = h.i8042.state()
        assert len(state.keyboard.scancodes) <= 17
        assert len(state.keyboard.responses) <= 3
        assert h.irq == [i % 2 == 0 for i in range(len(h.irq))]
        other = Harness()
        other.i8042.restore(state)
        assert other.i8042.state() == state
        assert bool(other.irq) == bool(h.irq and h.irq[-1])
    for _ in range(40):
        h.data()
    assert h.status() & I8042_STR_OBF == 0
