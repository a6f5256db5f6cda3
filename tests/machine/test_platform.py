"""The platform as a guest sees it: each device at its port, and its interrupt where a PC has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest

from aiokvm import Exit, ExitReason, boot
from aiokvm.hw.serial import UART_LSR, UART_LSR_DR, UART_RX, Serial
from aiokvm.machine.config import Config
from aiokvm.machine.console import SerialConsole
from aiokvm.machine.platform import PM_PORT, SERIAL_PORTS, _Input, acpi_platform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm import VM
    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

HANDLER = 0x1800
COUNT = 0x2000  # where the handler counts
SEEN = 0x2001  # where it leaves what the device said

ECHO = bytes.fromhex(
    "ba fd 03"  # again: mov dx, 0x3fd: LSR
    "ec"  # in al, dx
    "a8 01"  # test al, 1
    "74 f8"  # jz again
    "ba f8 03"  # mov dx, 0x3f8
    "ec"  # in al, dx
    "ee"  # out dx, al
    "eb f1"  # jmp again
)


def interrupt_guest(irq: int, setup: str, acknowledge: str) -> bytes:
    """A guest in real mode that sleeps, and counts the interrupts of one line of its PICs."""
    vector = 0x20 + irq
    master = 0xFF & ~(1 << irq) if irq < 8 else 0xFB
    slave = 0xFF if irq < 8 else 0xFF & ~(1 << (irq - 8))
    entry = (4 * vector).to_bytes(2, "little").hex()
    code = bytes.fromhex(
        "b0 11 e6 20 e6 a0"  # ICW1 to both PICs: initialize, ICW4 follows
        "b0 20 e6 21"  # ICW2: vectors from 0x20
        "b0 28 e6 a1"  # and from 0x28
        "b0 04 e6 21"  # ICW3: the slave is on input 2
        "b0 02 e6 a1"
        "b0 01 e6 21 e6 a1"  # ICW4: 8086 mode
        f"b0 {master:02x} e6 21"  # OCW1: all but one masked
        f"b0 {slave:02x} e6 a1"
        f"c7 06 {entry} 00 18"  # mov word [4 * vector], HANDLER
        f"{setup}"
        "fb"  # sti
        "f4"  # again: hlt
        "eb fd"  # jmp again
    )
    handler = bytes.fromhex(
        "fe 06 00 20"  # inc byte [COUNT]
        f"{acknowledge}"
        "b0 20 e6 a0 e6 20"  # OCW2: end of interrupt
        "cf"  # iret
    )
    return code.ljust(HANDLER - 0x1000, b"\0") + handler


async def until(vm: VM, count: int) -> None:
    while vm.memory.read(COUNT, 1)[0] < count:
        await anyio.lowlevel.checkpoint()


def serial_interrupt(base: int) -> tuple[str, str]:
    def port(offset: int) -> str:
        return (base + offset).to_bytes(2, "little").hex()

    setup = (
        f"ba {port(4)} b0 08 ee"  # MCR: OUT2
        f"ba {port(1)} b0 01 ee"  # IER: received data
    )
    return setup, f"ba {port(0)} ec a2 01 20"  # in al, dx; mov [SEEN], al


@pytest.mark.parametrize("number", [0, 1, 2, 3])
async def test_serial_input_interrupts_the_guest(guest: Guest, number: int) -> None:
    base, irq = SERIAL_PORTS[number]
    async with guest(interrupt_guest(irq, *serial_interrupt(base)), serial_ports=4) as vm:
        for count, byte in enumerate(b"xyz", start=1):
            await vm.serial_ports[number].send(bytes([byte]))
            await until(vm, count)
        while vm.memory.read(SEEN, 1) != b"z":
            await anyio.lowlevel.checkpoint()
        assert vm.memory.read(COUNT, 1) == b"\3"


INTERRUPTS = [
    pytest.param(
        0,
        "b0 34 e6 43"  # PIT: channel 0, rate generator
        "b0 00 e6 40"  # divided by 0x1000
        "b0 10 e6 40",
        "",
        id="PIT",
    ),
    pytest.param(
        8,
        "b0 0b e6 70"  # register B
        "b0 42 e6 71",  # periodic interrupt, 24 hours
        "b0 0c e6 70"  # register C
        "e4 71",
        id="clock",
    ),
]


@pytest.mark.parametrize(("irq", "setup", "acknowledge"), INTERRUPTS)
async def test_a_timer_keeps_interrupting_the_guest(
    guest: Guest, irq: int, setup: str, acknowledge: str
) -> None:
    async with guest(interrupt_guest(irq, setup, acknowledge)) as vm:
        await until(vm, 5)
        await vm.pause()
        await vm.resume()
        await until(vm, vm.memory.read(COUNT, 1)[0] + 3)


async def test_a_paused_and_a_closed_machine_are_not_interrupted(guest: Guest) -> None:
    """The clock's timer belongs to the loop; it does not outlive the machine."""
    clock = INTERRUPTS[1].values
    async with guest(interrupt_guest(*clock)) as vm:  # type: ignore[arg-type]
        await until(vm, 1)
        await vm.kill()
        assert vm._life.platform._timer is None


async def test_the_power_button_interrupts_the_guest(guest: Guest) -> None:
    setup = "ba 02 06 b8 00 01 ef"  # mov dx, 0x602: PM1_EN; mov ax, PWRBTN_EN; out dx, ax
    acknowledge = "ba 00 06 b8 00 01 ef"  # mov dx, 0x600: PM1_STS; mov ax, PWRBTN_STS; out dx, ax
    async with guest(interrupt_guest(9, setup, acknowledge)) as vm:
        for count in (1, 2, 3):
            vm.power_button()
            await until(vm, count)
            # Its acknowledgement is on its way to the loop.
            while vm._life.platform.pm.state().pm1_sts:
                await anyio.lowlevel.checkpoint()


async def test_the_keyboard_controller_interrupts_the_guest(guest: Guest) -> None:
    setup = (
        "b0 60 e6 64"  # write the command byte
        "b0 01 e6 60"  # KBDINT
        "b0 d2 e6 64"  # write the output buffer
        "b0 5a e6 60"
    )
    acknowledge = "e4 60 a2 01 20"  # in al, 0x60; mov [SEEN], al
    async with guest(interrupt_guest(1, setup, acknowledge)) as vm:
        while vm.memory.read(SEEN, 1) != b"\x5a":
            await anyio.lowlevel.checkpoint()
        assert vm.memory.read(COUNT, 1) == b"\1"


async def test_the_guest_echoes_what_is_typed(guest: Guest) -> None:
    text = bytes(range(1, 256)) * 3
    async with guest(ECHO) as vm:
        async with anyio.create_task_group() as group:
            group.start_soon(vm.serial.send, text)
            output = b""
            while len(output) < len(text):
                output += await vm.serial.read()
        assert output == text


async def test_each_serial_port_is_its_own(guest: Guest) -> None:
    # mov dx, port; mov al, number; out dx, al
    code = "".join(
        f"ba {port.to_bytes(2, 'little').hex()} b0 {number:02x} ee"
        for number, (port, _) in enumerate(SERIAL_PORTS)
    )
    async with guest(bytes.fromhex(code + "b0 00 e6 f4 f4"), serial_ports=4) as vm:
        await vm.wait()
        assert [await port.read() for port in vm.serial_ports] == [b"\0", b"\1", b"\2", b"\3"]
        assert vm.serial is vm.serial_ports[0]


async def test_a_port_that_was_not_asked_for_is_not_there(guest: Guest) -> None:
    code = bytes.fromhex(
        "ba fd 02"  # mov dx, 0x2fd: COM2's LSR
        "ec"  # in al, dx
        "e6 f4"  # out 0xf4, al
        "f4"  # hlt
    )
    async with guest(code, serial_ports=1) as vm:
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=0xFF)
        assert len(vm.serial_ports) == 1


@pytest.mark.parametrize(
    ("memory", "registers"),
    [
        # 0x15: base memory, 0x17: above 1 MiB, in KiB; 0x34: above 16 MiB, 0x5b: above 4 GiB, in 64 KiB.
        ("8M", {0x15: 640, 0x17: 7 << 10, 0x34: 0, 0x5B: 0}),
        ("64M", {0x15: 640, 0x17: 63 << 10, 0x34: 48 << 4, 0x5B: 0}),
        ("5G", {0x15: 640, 0x17: 0xFFFF, 0x34: (3072 - 16) << 4, 0x5B: 2 << 14}),
    ],
)
async def test_the_cmos_tells_how_much_memory_there_is(
    guest: Guest, memory: str, registers: dict[int, int]
) -> None:
    # mov al, register; out 0x70, al; in al, 0x71; mov [0x2000 + ...], al
    code = "".join(
        f"b0 {register + i:02x} e6 70 e4 71 a2 {2 * number + i:02x} 20"
        for number, register in enumerate(registers)
        for i in range(2)
    )
    async with guest(bytes.fromhex(code + "b0 00 e6 f4 f4"), memory=memory) as vm:
        await vm.wait()
        told = vm.memory.read(0x2000, 2 * len(registers))
    assert [int.from_bytes(told[i : i + 2], "little") for i in range(0, len(told), 2)] == list(
        registers.values()
    )


# What happens in a reset.

COUNTS_BOOTS = bytes.fromhex(
    "fe 06 00 30"  # inc byte [0x3000]: RAM that the image does not cover
    "fe 06 1f 10"  # inc byte [0x101f]: the image's last byte
    "a0 00 30"  # mov al, [0x3000]
    "ba ff 03"  # mov dx, 0x3ff
    "ee"  # out dx, al: SCR keeps it
    "a0 1f 10"  # mov al, [0x101f]
    "ba f8 03"  # mov dx, 0x3f8
    "ee"  # out dx, al: 1 at every boot, if the image is as new
    "ba ff 03"  # mov dx, 0x3ff
    "ec"  # in al, dx
    "ba f8 03"  # mov dx, 0x3f8
    "ee"  # out dx, al: the boots
    "f4"  # hlt
    "00"
)


async def read(vm: VM, count: int) -> bytes:
    output = b""
    while len(output) < count:
        output += await vm.serial.read()
    return output


@pytest.mark.parametrize("pause_at", ["never", "before", "after"])
async def test_a_reset_boots_anew_and_ram_beyond_the_image_stays(guest: Guest, pause_at: str) -> None:
    async with guest(COUNTS_BOOTS) as vm:
        for boots in range(1, 5):
            assert await read(vm, 2) == bytes([1, boots])
            if pause_at == "before":
                await vm.pause()
                await vm.reset()
                assert vm.vcpus[0].read_register("rip") == 0x1000
                await vm.resume()
            else:
                await vm.reset()
                if pause_at == "after":
                    await vm.pause()
                    await vm.resume()
        assert await read(vm, 2) == bytes([1, 5])


async def test_a_reset_resets_every_device(guest: Guest) -> None:
    def states(vm: VM) -> list[Any]:
        platform = vm._life.platform
        uarts = [device.state() for device in platform.devices if isinstance(device, Serial)]
        return [uarts, platform.i8042.state(), platform.pm.state()]

    code = bytes.fromhex(
        "ba fb 03 b0 80 ee"  # LCR: DLAB
        "ba f9 03 b0 07 ee"  # DLM
        "ba fc 03 b0 1b ee"  # MCR
        "ba fa 03 b0 c7 ee"  # FCR
        "b0 60 e6 64 b0 00 e6 60"  # i8042 command byte
        "ba 02 06 b8 00 01 ef"  # PM1_EN
        "b0 00 e6 80"  # a port where nothing is
        "c6 06 00 20 01"  # mov byte [0x2000], 1
        "f4"
    )
    async with guest(code, start=False) as vm:
        fresh = states(vm)
        await vm.start()
        while vm.memory.read(0x2000, 1) != b"\1":
            await anyio.lowlevel.checkpoint()
        await vm.pause()
        vm.power_button()
        changed = states(vm)
        assert all(one != other for one, other in zip(fresh, changed, strict=True))
        await vm.reset()
        assert states(vm) == fresh


async def test_what_was_typed_before_a_reset_is_forgotten(
    guest: Guest, progress: Callable[..., Awaitable[None]]
) -> None:
    async with guest(ECHO) as vm:
        await vm.pause()
        await vm.serial.send(b"old" * 100)
        await vm.reset()
        await vm.serial.send(b"new")
        await vm.resume()
        output = b""
        while not output.endswith(b"new"):
            output += await vm.serial.read()
        assert output == b"new"


class Timers:
    """A loop whose time stands still."""

    def __init__(self) -> None:
        self.waiting: list[Timers.Handle] = []

    class Handle:
        def __init__(self, timers: Timers) -> None:
            self.timers = timers

        def cancel(self) -> None:
            if self in self.timers.waiting:
                self.timers.waiting.remove(self)

    def now_ns(self) -> int:
        return 0

    def call_at(self, deadline_ns: int, callback: Callable[[], object]) -> Handle:
        self.waiting.append(self.Handle(self))
        return self.waiting[-1]


async def test_a_closed_uart_is_not_filled_again_whatever_was_sent_meanwhile() -> None:
    timers: Any = Timers()
    console = SerialConsole(lambda data: source.fill(data))
    uart = Serial(lambda _level: None, console.on_transmit, lambda: source.on_room())
    source = _Input(timers, uart, console)
    for _ in range(3):
        # More is sent than fits, the guest reads it, and the next is to come after a pause.
        await console.send(b"more than one")
        while uart.read(UART_LSR, 1) & UART_LSR_DR:
            uart.read(UART_RX, 1)
        assert len(timers.waiting) == 1
    source.close()
    assert not timers.waiting


async def test_acpi_describes_what_is_there() -> None:
    described = acpi_platform(Config(boot=boot.Flat(b"\xf4"), cpus=3, serial_ports=2))
    assert described.apic_ids == (0, 1, 2)
    assert [(port.port, port.gsi, port.uid) for port in described.serial] == [(0x3F8, 4, 1), (0x2F8, 3, 2)]
    assert (described.pm_port, described.sci_gsi, described.debug_exit_port) == (PM_PORT, 9, 0xF4)
