"""The i8042 keyboard controller of a PC/AT with a keyboard on its first port and no second port.

IBM PC/AT Technical Reference, sections "Keyboard Controller" and "Keyboard". The two ports are not
adjacent, so the controller has two faces, ``data`` (port 0x60) and ``command`` (port 0x64), which are
attached to the bus one by one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.hw.bus import ByteRegisters, IrqLine, check_version

if TYPE_CHECKING:
    from collections.abc import Callable

I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64

I8042_STR_OBF = 0x01
I8042_STR_SYS = 0x04
I8042_STR_CMDDAT = 0x08
I8042_STR_KEYLOCK = 0x10
I8042_STR_AUXDATA = 0x20
I8042_STR_TIMEOUT = 0x40

I8042_CTR_KBDINT = 0x01
I8042_CTR_AUXINT = 0x02
I8042_CTR_SYS = 0x04
I8042_CTR_KBDDIS = 0x10
I8042_CTR_AUXDIS = 0x20
I8042_CTR_XLATE = 0x40

_CTR_WRITABLE = I8042_CTR_KBDINT | I8042_CTR_AUXINT | I8042_CTR_SYS | I8042_CTR_KBDDIS | I8042_CTR_XLATE
# What PC firmware leaves behind, for a directly booted kernel has none.
_CTR_BOOT = I8042_CTR_KBDINT | I8042_CTR_SYS | I8042_CTR_XLATE

_INPUT_PORT = 0x80  # the keyboard is not locked
_OUT_RESET = 0x01  # the CPU's reset line, active low
_OUT_A20 = 0x02
_OUT_KBD_OBF = 0x10
_OUT_AUX_OBF = 0x20
_OUT_KBD_LINES = 0xC0
_WITH_PARAMETER = (0x60, 0xD1, 0xD2, 0xD3, 0xD4)

KEYBOARD_QUEUE_BYTES = 16
KEY_ACK = 0xFA
KEY_BAT_PASSED = 0xAA
KEY_RESEND = 0xFE
_KEY_OVERRUN = 0x00
_KEY_RELEASE = 0xF0
_CTRL_ALT_DEL = bytes.fromhex("14 11 e071 e0f071 f011 f014")

# Scan code set 2 to set 1, for 0x00 to 0x7f; two keys lie above, everything else passes unchanged.
_SET1 = bytes.fromhex(
    "ff43413f3d3b3c58644442403e0f2959"
    "65382a701d10025a66712c1f1e11035b"
    "672e2d201205045c68392f211413065d"
    "693130232215075e6a7232241608095f"
    "6b332517180b0a606c34352627190c61"
    "6d7328741a0d626e3a361c1b752b6376"
    "55567778797a0e7b7c4f7d4b477e7f6f"
    "5253504c4d480145574e514a37494654"
)
_SET1_ABOVE = {0x83: 0x41, 0x84: 0x54}


@dataclass(frozen=True)
class KeyboardState:
    """What a :class:`Keyboard` remembers; ``parameter_of`` is the command that waits for its parameter."""

    scanning: bool
    scancode_set: int
    leds: int
    parameter_of: int | None
    last_sent: int
    release: bool
    responses: bytes
    scancodes: bytes


@dataclass(frozen=True)
class I8042State:
    """What an :class:`I8042` remembers; ``status`` has the OBF, AUX and TIMEOUT bits of ``output``."""

    config: int
    a20: bool
    last_was_command: bool
    parameter_of: int | None
    output: int
    status: int
    release: bool
    keyboard: KeyboardState
    version: int = 1


class _Translator:
    """Turns set 2 into set 1, byte by byte: the release prefix becomes bit 7 of the byte after it."""

    def __init__(self) -> None:
        self.release = False

    def translate(self, code: int) -> int | None:
        if code == _KEY_RELEASE:
            self.release = True
            return None
        translated = _SET1[code] if code < len(_SET1) else _SET1_ABOVE.get(code, code)
        if self.release:
            self.release = False
            translated |= 0x80
        return translated


class Keyboard:
    """A 102-key keyboard that knows scan code sets 2 and 1; it has no clock, so keys do not repeat."""

    def __init__(self) -> None:
        self._translator = _Translator()
        self._responses: deque[int] = deque()
        self._scancodes: deque[int] = deque()
        self.reset()

    def reset(self) -> None:
        """Power on, self-test done."""
        self._responses.clear()
        self._leds = 0
        self._parameter_of: int | None = None
        self._last_sent = KEY_BAT_PASSED
        self._set_defaults()
        self._scanning = True

    @property
    def leds(self) -> int:
        """The lights as the guest set them: bit 0 scroll lock, 1 num lock, 2 caps lock."""
        return self._leds

    def press(self, scancodes: bytes) -> None:
        """Queue set 2 ``scancodes``, makes and breaks; the guest gets them in the set that it chose.

        The queue holds 16 bytes. The byte after them becomes an overrun code, what follows is lost, as is
        everything while the guest has scanning off.
        """
        if not self._scanning:
            return
        for byte in scancodes:
            code = self._translator.translate(byte) if self._set == 1 else byte
            if code is None:
                continue
            if len(self._scancodes) == KEYBOARD_QUEUE_BYTES:
                self._scancodes.append(_SET1[_KEY_OVERRUN] if self._set == 1 else _KEY_OVERRUN)
            elif len(self._scancodes) < KEYBOARD_QUEUE_BYTES:
                self._scancodes.append(code)

    def send(self) -> int | None:
        """Return the next byte for the controller, responses before scan codes."""
        queue = self._responses or self._scancodes
        if not queue:
            return None
        self._last_sent = queue.popleft()
        return self._last_sent

    def command(self, byte: int) -> None:
        """Take a byte from the controller: a command, or the parameter of the one before."""
        self._responses.clear()
        parameter_of, self._parameter_of = self._parameter_of, None
        if parameter_of is not None and byte < 0xED:
            self._responses.extend(self._with_parameter(parameter_of, byte))
        else:
            self._responses.extend(self._respond(byte))

    def state(self) -> KeyboardState:
        """Return settings and queues."""
        return KeyboardState(
            scanning=self._scanning,
            scancode_set=self._set,
            leds=self._leds,
            parameter_of=self._parameter_of,
            last_sent=self._last_sent,
            release=self._translator.release,
            responses=bytes(self._responses),
            scancodes=bytes(self._scancodes),
        )

    def restore(self, state: KeyboardState) -> None:
        """Take on a saved state."""
        self._scanning, self._set, self._leds = state.scanning, state.scancode_set, state.leds
        self._parameter_of, self._last_sent = state.parameter_of, state.last_sent
        self._translator.release = state.release
        self._responses = deque(state.responses)
        self._scancodes = deque(state.scancodes)

    def _set_defaults(self) -> None:
        self._set = 2
        self._translator.release = False
        self._scancodes.clear()

    def _respond(self, command: int) -> tuple[int, ...]:
        match command:
            case 0xED | 0xF0 | 0xF3:  # set LEDs, scan code set, typematic rate
                self._parameter_of = command
            case 0xEE:  # echo
                return (0xEE,)
            case 0xF2:  # identify
                return (KEY_ACK, 0xAB, 0x83)
            case 0xF4:  # enable scanning
                self._scancodes.clear()
                self._scanning = True
            case 0xF5 | 0xF6:  # defaults, with scanning off or on
                self._set_defaults()
                self._scanning = command == 0xF6
            case 0xF7 | 0xF8 | 0xF9 | 0xFA:  # key types, which only set 3 has
                pass
            case 0xFE:  # resend
                return (self._last_sent,)
            case 0xFF:  # reset
                self.reset()
                return (KEY_ACK, KEY_BAT_PASSED)
            case _:
                return (KEY_RESEND,)
        return (KEY_ACK,)

    def _with_parameter(self, command: int, value: int) -> tuple[int, ...]:
        match command, value:
            case 0xED, _:
                self._leds = value & 7
            case 0xF0, 0:
                return (KEY_ACK, self._set)
            case 0xF0, (1 | 2):
                self._set_defaults()
                self._set = value
            case 0xF0, _:
                return (KEY_RESEND,)
        return (KEY_ACK,)


class I8042Port(ByteRegisters):
    """One port of the controller as a device on the bus; resetting either resets the controller."""

    registers = 1

    def __init__(
        self, read: Callable[[], int], write: Callable[[int], None], reset: Callable[[], None]
    ) -> None:
        self._read = read
        self._write = write
        self._reset = reset

    def read_byte(self, offset: int) -> int:  # noqa: ARG002
        """Read the port."""
        return self._read()

    def write_byte(self, offset: int, value: int) -> None:  # noqa: ARG002
        """Write the port."""
        self._write(value)

    def reset(self) -> None:
        """Reset the controller and its keyboard."""
        self._reset()


class I8042:
    """The controller: ``data`` and ``command`` are its ports, ``irq`` is IRQ 1.

    ``reset_line`` is called when the guest pulls the CPU's reset line. The A20 gate is only remembered.
    There is no second port: its disable bit is stuck at one, its test fails and bytes for it time out.
    """

    def __init__(self, irq: Callable[[bool], None], reset_line: Callable[[], None]) -> None:
        self._irq = IrqLine(irq)
        self._reset_line = reset_line
        self._keyboard = Keyboard()
        self._translator = _Translator()
        self.data = I8042Port(self._read_data, self._write_data, self.reset)
        self.command = I8042Port(self._read_status, self._write_command, self.reset)
        self.reset()

    def reset(self) -> None:
        """Return controller and keyboard to what firmware leaves behind."""
        self._keyboard.reset()
        self._translator.release = False
        self._config = _CTR_BOOT
        self._a20 = True
        self._last_was_command = False
        self._parameter_of: int | None = None
        self._output = 0
        self._status = 0
        self._update_irq()

    @property
    def leds(self) -> int:
        """The keyboard's lights: bit 0 scroll lock, 1 num lock, 2 caps lock."""
        return self._keyboard.leds

    def press(self, scancodes: bytes) -> None:
        """Type set 2 ``scancodes``, makes and breaks, as :meth:`Keyboard.press` has it."""
        self._keyboard.press(scancodes)
        self._fill_output()

    def ctrl_alt_del(self) -> None:
        """Press and release Ctrl, Alt and Delete together."""
        self.press(_CTRL_ALT_DEL)

    def state(self) -> I8042State:
        """Return the controller's registers and the keyboard's state."""
        return I8042State(
            config=self._config,
            a20=self._a20,
            last_was_command=self._last_was_command,
            parameter_of=self._parameter_of,
            output=self._output,
            status=self._status,
            release=self._translator.release,
            keyboard=self._keyboard.state(),
        )

    def restore(self, state: I8042State) -> None:
        """Take on a saved state and drive the interrupt to match; DeviceError if its version is unknown."""
        check_version("i8042", state.version, I8042State.version)
        self._config, self._a20 = state.config, state.a20
        self._last_was_command, self._parameter_of = state.last_was_command, state.parameter_of
        self._output, self._status = state.output, state.status
        self._translator.release = state.release
        self._keyboard.restore(state.keyboard)
        self._update_irq()

    def _read_data(self) -> int:
        value = self._output
        self._status = 0
        # The line drops even if another byte follows at once: IRQ 1 is edge-triggered.
        self._update_irq()
        self._fill_output()
        return value

    def _read_status(self) -> int:
        value = self._status | I8042_STR_KEYLOCK
        if self._config & I8042_CTR_SYS:
            value |= I8042_STR_SYS
        if self._last_was_command:
            value |= I8042_STR_CMDDAT
        return value

    def _write_data(self, value: int) -> None:
        self._last_was_command = False
        command, self._parameter_of = self._parameter_of, None
        match command:
            case None:
                # A byte for the keyboard has its clock line released.
                self._config &= ~I8042_CTR_KBDDIS
                self._keyboard.command(value)
            case 0x60:
                self._config = value & _CTR_WRITABLE
            case 0xD1:
                self._write_output_port(value)
            case 0xD2:
                self._put(value)
            case 0xD3:
                self._put(value, I8042_STR_AUXDATA)
            case 0xD4:
                self._put(KEY_RESEND, I8042_STR_AUXDATA | I8042_STR_TIMEOUT)
        self._update_irq()
        self._fill_output()

    def _write_command(self, value: int) -> None:
        self._last_was_command = True
        self._parameter_of = value if value in _WITH_PARAMETER else None
        match value:
            case 0x20:
                self._put(self._config | I8042_CTR_AUXDIS)
            case 0xA9:
                self._put(0x02)  # the second port's clock line is stuck high
            case 0xAA:
                self._config |= I8042_CTR_SYS
                self._put(0x55)
            case 0xAB:
                self._put(0x00)
            case 0xAD:
                self._config |= I8042_CTR_KBDDIS
            case 0xAE:
                self._config &= ~I8042_CTR_KBDDIS
                self._fill_output()
            case 0xC0:
                self._put(_INPUT_PORT)
            case 0xD0:
                self._put(self._output_port())
            case _ if value >= 0xF0 and not value & _OUT_RESET:  # a zero bit pulses its line
                self._reset_line()

    def _output_port(self) -> int:
        value = _OUT_RESET | _OUT_KBD_LINES
        if self._a20:
            value |= _OUT_A20
        if self._status & I8042_STR_OBF:
            value |= _OUT_AUX_OBF if self._status & I8042_STR_AUXDATA else _OUT_KBD_OBF
        return value

    def _write_output_port(self, value: int) -> None:
        self._a20 = bool(value & _OUT_A20)
        if not value & _OUT_RESET:
            self._reset_line()

    def _put(self, value: int, flags: int = 0) -> None:
        """Put a byte into the output buffer; one that was not read yet is lost, as in the hardware."""
        self._output = value
        self._status = I8042_STR_OBF | flags
        self._update_irq()

    def _fill_output(self) -> None:
        """Let the keyboard send, if its clock is not held and the output buffer is free."""
        while not self._status & I8042_STR_OBF and not self._config & I8042_CTR_KBDDIS:
            byte = self._keyboard.send()
            if byte is None:
                return
            code = self._translator.translate(byte) if self._config & I8042_CTR_XLATE else byte
            if code is not None:
                self._put(code)

    def _update_irq(self) -> None:
        full = self._status & (I8042_STR_OBF | I8042_STR_AUXDATA) == I8042_STR_OBF
        self._irq.set(full and bool(self._config & I8042_CTR_KBDINT))
