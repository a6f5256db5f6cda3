"""The devices that every machine has, where they lie, and how they are wired.

In the kernel: the two PICs, the I/O APIC, the local APICs and the PIT. Here: serial ports, keyboard
controller, clock, ACPI power management, ports that reset and the debug-exit port, at the addresses of a PC.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from aiokvm.boot import acpi
from aiokvm.hw.acpipm import PM_SIZE, AcpiPm
from aiokvm.hw.cmos import CMOS_SIZE, Cmos
from aiokvm.hw.debugexit import DEBUG_EXIT_PORT, DEBUG_EXIT_SIZE, DebugExit
from aiokvm.hw.i8042 import I8042, I8042_COMMAND_PORT, I8042_DATA_PORT
from aiokvm.hw.resetports import (
    RESET_CONTROL_PORT,
    RESET_VECTOR_PORT,
    SYSTEM_CONTROL_PORT,
    ResetControl,
    ResetVector,
    SystemControl,
)
from aiokvm.hw.serial import SERIAL_SIZE, Serial
from aiokvm.machine.console import SerialConsole

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.aio import Handle, Loop
    from aiokvm.hw.bus import Bus, BusDevice
    from aiokvm.machine.config import Config
    from aiokvm.memory import GuestMemory

# Port and GSI of COM1 to COM4. A PC shares GSIs 4 and 3; edge-triggered lines are better not shared, and ACPI
# tells the guest.
SERIAL_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 5), (0x2E8, 7))
I8042_GSI = 1
CMOS_PORT = 0x70
CMOS_GSI = 8
PM_PORT = 0x600
SCI_GSI = 9
# The shortest and the longest pause between two fillings of a UART's receiver: a PC's needs 1.4 ms for one.
INPUT_PAUSE_NS = (500_000, 50_000_000)


class Guest(Protocol):
    """What the devices do to the machine."""

    def set_irq_line(self, gsi: int, level: bool) -> None:
        """Drive an input of the PICs and the I/O APIC."""

    def on_shutdown(self) -> None:
        """The guest turned itself off."""

    def on_reset_request(self, cause: str) -> None:
        """The guest asked for a reset, by ``cause``."""

    def on_debug_exit(self, code: int) -> None:
        """The guest wrote to the debug-exit port."""


class _Input:
    """Fills a UART's receiver again when the guest has emptied it, after a pause.

    A driver's interrupt handler goes on as long as there is input: without pauses a flood would keep a CPU of
    the guest in there. They are half as long as the guest took to read, so that it has them on any host.
    """

    def __init__(self, loop: Loop, uart: Serial, console: SerialConsole) -> None:
        self._loop = loop
        self._uart = uart
        self._console = console
        self._filled_ns = 0
        self._timer: Handle | None = None

    def fill(self, data: bytes) -> int:
        self._filled_ns = self._loop.now_ns()
        return self._uart.receive(data)

    def on_room(self) -> None:
        now_ns = self._loop.now_ns()
        shortest, longest = INPUT_PAUSE_NS
        pause_ns = min(max((now_ns - self._filled_ns) // 2, shortest), longest)
        # One is on its way if the program has sent more meanwhile, and the guest has read that, too.
        self.close()
        self._timer = self._loop.call_at(now_ns + pause_ns, self._console.on_room)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()


class Platform:
    """The platform devices of one machine, attached to its port bus."""

    def __init__(self, loop: Loop, guest: Guest, config: Config, memory: GuestMemory, pio: Bus) -> None:
        self._loop = loop
        self._guest = guest
        self._pio = pio
        self._timer: Handle | None = None
        self._inputs: list[_Input] = []
        self.devices: list[BusDevice] = []
        self.consoles = tuple(self._serial(*place) for place in SERIAL_PORTS[: config.serial_ports])
        self.i8042 = I8042(self._line(I8042_GSI), self._reset_by("keyboard controller"))
        self._attach(self.i8042.data, I8042_DATA_PORT, 1)
        self._attach(self.i8042.command, I8042_COMMAND_PORT, 1)
        low, *high = (region.size for region in memory.regions)
        self.cmos = Cmos(
            self._line(CMOS_GSI), time.time_ns, low_bytes=low, high_bytes=sum(high), on_deadline=self._arm
        )
        self._attach(self.cmos, CMOS_PORT, CMOS_SIZE)
        self._attach(DebugExit(guest.on_debug_exit), DEBUG_EXIT_PORT, DEBUG_EXIT_SIZE)
        self.pm = AcpiPm(self._line(SCI_GSI), guest.on_shutdown, self._reset_by("ACPI reset register"))
        self._attach(self.pm, PM_PORT, PM_SIZE)
        self._attach(ResetControl(self._reset_by("port 0xcf9")), RESET_CONTROL_PORT, 1)
        self._attach(SystemControl(self._reset_by("port 0x92")), SYSTEM_CONTROL_PORT, 1)
        self._attach(ResetVector(self._reset_by("jump to the reset vector")), RESET_VECTOR_PORT, 1)

    def reset(self) -> None:
        """A system reset of every device."""
        for device in self.devices:
            device.reset()
        for console in self.consoles:
            console.reset()

    def close(self) -> None:
        """End the timers, and tell readers of the serial ports that nothing more will come. Idempotent."""
        self._disarm()
        for source in self._inputs:
            source.close()
        for console in self.consoles:
            console.close()

    def _attach(self, device: BusDevice, port: int, size: int) -> None:
        self._pio.attach(device, port, size)
        self.devices.append(device)

    def _reset_by(self, cause: str) -> Callable[[], None]:
        return lambda: self._guest.on_reset_request(cause)

    def _line(self, gsi: int) -> Callable[[bool], None]:
        def drive(level: bool) -> None:
            self._guest.set_irq_line(gsi, level)

        return drive

    def _serial(self, port: int, gsi: int) -> SerialConsole:
        console = SerialConsole(lambda data: source.fill(data), self._loop)
        uart = Serial(self._line(gsi), console.on_transmit, lambda: source.on_room())
        source = _Input(self._loop, uart, console)
        self._inputs.append(source)
        self._attach(uart, port, SERIAL_SIZE)
        return console

    # The clock's model has no clock: a timer of the loop tells it when its next interrupt is due.

    def _arm(self) -> None:
        self._disarm()
        deadline_ns = self.cmos.deadline_ns()
        if deadline_ns is not None:
            delay_ns = max(0, deadline_ns - time.time_ns())
            self._timer = self._loop.call_at(self._loop.now_ns() + delay_ns, self._due)

    def _due(self) -> None:
        self._timer = None
        self.cmos.poll()
        self._arm()

    def _disarm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def acpi_platform(config: Config, virtio: tuple[acpi.VirtioMmio, ...] = ()) -> acpi.Platform:
    """The machine as its ACPI tables describe it. Raises ConfigError if they cannot."""
    serial = (
        acpi.SerialPort(port, gsi, uid)
        for uid, (port, gsi) in enumerate(SERIAL_PORTS[: config.serial_ports], start=1)
    )
    return acpi.Platform(
        apic_ids=tuple(range(config.cpus)),
        serial=tuple(serial),
        pm_port=PM_PORT,
        sci_gsi=SCI_GSI,
        debug_exit_port=DEBUG_EXIT_PORT,
        virtio=virtio,
    )
