"""The host's end of a serial port: nothing lost on the way in, a bound on the way out, and good errors."""

from __future__ import annotations

import re

import anyio
import pytest

from aiokvm import ConfigError
from aiokvm.aio import current_loop
from aiokvm.errors import SerialClosedError
from aiokvm.hw.serial import Serial
from aiokvm.machine import console as module
from aiokvm.machine.console import INPUT_LIMIT, OUTPUT_LIMIT, SerialConsole

pytestmark = pytest.mark.anyio


class Port:
    """A console with a UART behind it, and the guest's driver in the test's hands."""

    def __init__(self) -> None:
        self.console = SerialConsole(lambda data: self.uart.receive(data))
        self.uart = Serial(lambda level: None, self.console.on_transmit, self.console.on_room)
        self.uart.write(2, 1, 1)  # FCR: FIFO on

    def guest_reads(self) -> bytes:
        received = bytearray()
        while self.uart.read(5, 1) & 1:
            received.append(self.uart.read(0, 1))
        return bytes(received)

    def guest_writes(self, data: bytes) -> None:
        for byte in data:
            self.uart.write(0, 1, byte)


@pytest.mark.computes  # the guest's reading, byte by byte
async def test_a_flood_of_input_reaches_the_guest_whole_and_in_order() -> None:
    port = Port()
    data = bytes(range(256)) * 1024
    received = bytearray()

    async with anyio.create_task_group() as group:
        group.start_soon(port.console.send, data)
        with anyio.fail_after(30):
            while len(received) < len(data):
                await anyio.wait_all_tasks_blocked()
                received += port.guest_reads()
    assert received == data


@pytest.mark.computes  # the guest's reading, byte by byte
async def test_send_waits_for_the_guest_and_keeps_a_bound() -> None:
    port = Port()
    with anyio.move_on_after(0.05) as scope:
        await port.console.send(b"x" * (2 * INPUT_LIMIT + 1))
    assert scope.cancelled_caught
    assert len(port.guest_reads()) == INPUT_LIMIT


@pytest.mark.computes  # the guest's reading, byte by byte
async def test_senders_take_turns() -> None:
    port = Port()
    first, second = b"a" * (INPUT_LIMIT + 100), b"b" * 100
    received = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(port.console.send, first)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(port.console.send, second)
        with anyio.fail_after(10):
            while len(received) < len(first) + len(second):
                await anyio.wait_all_tasks_blocked()
                received += port.guest_reads()
    assert received == first + second


async def test_output_that_nobody_reads_is_bounded_and_the_newest_stays() -> None:
    port = Port()
    port.console.on_transmit(b"old" + b"x" * OUTPUT_LIMIT)
    port.guest_writes(b"new")
    assert port.console.dropped == 6
    output = bytearray()
    while len(output) < OUTPUT_LIMIT:
        output += await port.console.read()
    assert output == b"x" * (OUTPUT_LIMIT - 3) + b"new"


async def test_expect_takes_up_to_the_match_and_leaves_the_rest() -> None:
    port = Port()
    port.guest_writes(b"welcome\r\nlogin: and more")
    assert await port.console.expect(b"login: ") == b"welcome\r\nlogin: "
    assert await port.console.read() == b"and more"


async def test_expect_finds_a_pattern_that_comes_in_pieces() -> None:
    port = Port()
    found: list[bytes] = []

    async def wait() -> None:
        found.append(await port.console.expect(b"login: ", timeout=10))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        for piece in (b"some text log", b"i", b"n", b": rest"):
            await anyio.wait_all_tasks_blocked()
            assert found == []
            port.guest_writes(piece)
    assert found == [b"some text login: "]


async def test_expect_takes_a_regular_expression() -> None:
    port = Port()
    port.guest_writes(b"a=12 b=34;")
    assert await port.console.expect(re.compile(rb"b=\d+")) == b"a=12 b=34"


@pytest.mark.parametrize("pattern", [b"missing", re.compile(rb"mis+ing")])
async def test_expect_in_vain_says_what_came_instead_and_loses_nothing(
    pattern: bytes | re.Pattern[bytes],
) -> None:
    port = Port()
    port.guest_writes(b"Kernel panic")
    with pytest.raises(
        TimeoutError, match=r"no b'mis.*ing' within 0 s; the output ends with b'Kernel panic'"
    ):
        await port.console.expect(pattern, timeout=0)
    port.console.close()
    with pytest.raises(
        SerialClosedError, match=r"ended before b'mis.*; the output ends with b'Kernel panic'"
    ):
        await port.console.expect(pattern)
    assert await port.console.read() == b"Kernel panic"
    assert await port.console.read() == b""


async def test_expect_goes_on_over_dropped_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTPUT_LIMIT", 8)
    port = Port()
    found: list[bytes] = []

    async def wait() -> None:
        found.append(await port.console.expect(b"needle", timeout=10))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        for byte in b"a long stack of hay needle":
            await anyio.wait_all_tasks_blocked()
            port.guest_writes(bytes([byte]))
    assert found == [b"y needle"]


async def test_lines_come_without_their_ends_and_the_last_may_be_partial() -> None:
    port = Port()
    port.guest_writes(b"one\r\n\r\ntwo\nthr")
    port.console.close()
    assert [line async for line in port.console.lines()] == [b"one", b"", b"two", b"thr"]


async def test_lines_come_as_they_are_finished() -> None:
    port = Port()
    lines: list[bytes] = []

    async def read() -> None:
        lines.extend([line async for line in port.console.lines()])

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for byte in b"ab\r\ncd\r\n":
            await anyio.wait_all_tasks_blocked()
            port.guest_writes(bytes([byte]))
        await anyio.wait_all_tasks_blocked()
        port.console.close()
    assert lines == [b"ab", b"cd"]


async def test_a_second_reader_is_refused() -> None:
    port = Port()
    async with anyio.create_task_group() as group:
        group.start_soon(port.console.read)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await port.console.expect(b"x", timeout=1)
        port.guest_writes(b"x")


async def test_sending_to_a_machine_that_ended_is_an_error_also_while_waiting() -> None:
    port = Port()
    errors: list[Exception] = []

    async def send() -> None:
        try:
            await port.console.send(b"x" * (2 * INPUT_LIMIT))
        except SerialClosedError as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        port.console.close()
    with pytest.raises(SerialClosedError, match="nobody reads"):
        await port.console.send(b"y")
    assert len(errors) == 1


async def test_a_reset_forgets_what_was_not_read() -> None:
    port = Port()
    await port.console.send(b"x" * 100)
    port.uart.reset()
    port.console.reset()
    port.uart.write(2, 1, 1)
    await port.console.send(b"y")
    assert port.guest_reads().endswith(b"y")
    assert len(port.guest_reads()) == 0


@pytest.mark.parametrize(("reader", "count"), [("lines", 1 << 17), ("read", 1 << 16), ("expect", 1 << 14)])
async def test_a_flood_of_short_lines_does_not_keep_the_loop(reader: str, count: int) -> None:
    """Each is there already, so that nothing has to be waited for."""
    console = SerialConsole(lambda data: 0, current_loop())
    console.on_transmit(b"\n" * count)
    console.close()
    seen = 0
    if reader == "lines":
        async for _ in console.lines():
            seen += 1
    elif reader == "read":
        while await console.read(1):
            seen += 1
    else:
        for _ in range(count):
            seen += len(await console.expect(b"\n"))
    assert seen == count


async def test_what_is_there_is_found_without_waiting() -> None:
    console = SerialConsole(lambda data: 0, current_loop())
    console.on_transmit(b"login: " * 1000)
    for _ in range(1000):
        assert await console.expect(b"login: ", timeout=0) == b"login: "


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_below_one_is_refused_and_nothing_is_lost(limit: int) -> None:
    port = Port()
    port.guest_writes(b"output")
    with pytest.raises(ConfigError, match=f"limit is {limit}: at least 1 byte is read"):
        await port.console.read(limit)
    assert await port.console.read() == b"output"
