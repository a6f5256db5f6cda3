from __future__ import annotations

import itertools
import os
import pty
import termios
from contextlib import closing
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.cli.console import Console, InitWatch, Output, raw_terminal
from aiokvm.cli.typed import Frames, resized, typed

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT = b"[    0.547103] PCI: no\r\n"
INIT = b"aiokvm: init 1.89\r\n"


def watch(chunks: list[bytes], **options: bool) -> tuple[bytes, bytes, bool]:
    init = InitWatch(**options)
    parts = [init.feed(chunk) for chunk in chunks] + [init.end()]
    return b"".join(boot for boot, _ in parts), b"".join(output for _, output in parts), init.started


@given(
    output=st.lists(st.sampled_from([b"\r", b"\n", b"a", b"aiokvm: init 2.0\n", b"\xff"])).map(b"".join),
    cuts=st.lists(st.integers(0, 80)),
)
def test_command_output_is_what_the_command_wrote(output: bytes, cuts: list[int]) -> None:
    console = BOOT + INIT + output.replace(b"\n", b"\r\n")
    ends = sorted({0, *(cut for cut in cuts if cut < len(console)), len(console)})
    chunks = [console[start:end] for start, end in itertools.pairwise(ends)]
    assert watch(chunks, command=True, undo_onlcr=True) == (BOOT, output, True)
    raw = output.replace(b"\n", b"\r\n")
    assert watch(chunks, command=True) == (BOOT, raw, True)
    assert watch(chunks) == (b"", console, True)


def test_boot_that_reaches_no_init_is_all_boot() -> None:
    assert watch([BOOT, b"panic"], command=True) == (BOOT + b"panic", b"", False)
    assert watch([BOOT, b"panic"]) == (b"", BOOT + b"panic", False)


def test_boot_is_not_held_back_for_long() -> None:
    init = InitWatch(command=True)
    assert init.feed(b"." * 1000) == (b"." * 936, b"")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.anyio
async def test_full_pipe_blocks_neither_the_loop_nor_its_sharers(pipe: tuple[int, int]) -> None:
    data = os.urandom(1 << 20)
    got = bytearray()
    with closing(Output(pipe[1])) as output:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(output.write, data)
            while len(got) < len(data):
                await anyio.wait_readable(pipe[0])
                got += os.read(pipe[0], 1 << 16)
    assert got == data
    assert os.get_blocking(pipe[1])


def test_terminal_is_restored_after_an_error() -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)

    def fail() -> None:
        assert not termios.tcgetattr(theirs)[3] & termios.ICANON
        assert not termios.tcgetattr(theirs)[1] & termios.OPOST
        raise KeyError

    with pytest.raises(KeyError), raw_terminal(theirs):
        fail()
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.anyio
async def test_input_waits_for_init(pipe: tuple[int, int]) -> None:
    sent = anyio.Event()
    got: list[bytes] = []

    async def send(data: bytes) -> None:
        got.append(data)
        sent.set()

    source, sink = os.pipe()
    os.write(sink, b"ls\n")
    with closing(Output(pipe[1])) as output:
        console = Console(source, output, output, None, InitWatch())
        console.open()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(console.keyboard, send)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            await console.show(BOOT + INIT)
            await sent.wait()
            os.close(sink)
    assert got == [b"ls\n"]
    os.close(source)


@pytest.mark.anyio
async def test_escape_is_seen_though_the_guest_does_not_listen(pipe: tuple[int, int]) -> None:
    async def send(_: bytes) -> None:
        raise AssertionError("it does not listen")

    ours, theirs = pty.openpty()
    with closing(Output(pipe[1])) as output, raw_terminal(theirs):
        console = Console(theirs, output, output, None, InitWatch())
        async with anyio.create_task_group() as tasks:

            async def type_() -> None:
                for _ in range(100):
                    os.write(ours, b"x")
                    await anyio.wait_all_tasks_blocked()
                os.write(ours, b"\x1d")

            tasks.start_soon(type_)
            assert await console.keyboard(send)
    os.close(ours)
    os.close(theirs)


@given(
    told=st.lists(st.binary(min_size=1) | st.tuples(st.integers(1, 0xFFFF), st.integers(1, 0xFFFF))),
    size=st.integers(1, 20),
)
def test_what_is_typed_and_the_size_of_the_terminal_are_told_apart(
    told: list[bytes | tuple[int, int]], size: int
) -> None:
    data = b"".join(typed(one) if isinstance(one, bytes) else resized(*one) for one in told)
    frames = Frames()
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    assert [one for chunk in chunks for one in frames.feed(chunk)] == told


def test_a_paste_is_many_frames() -> None:
    data = os.urandom(200_000)
    assert b"".join(one for one in Frames().feed(typed(data)) if isinstance(one, bytes)) == data


@pytest.mark.anyio
async def test_input_in_frames(pipe: tuple[int, int]) -> None:
    got: list[object] = []

    async def send(data: bytes) -> None:
        got.append(data)

    async def resize(rows: int, cols: int) -> None:
        got.append((rows, cols))

    source, sink = os.pipe()
    os.write(sink, resized(50, 132) + typed(b"ls\n"))
    os.close(sink)
    with closing(Output(pipe[1])) as output:
        console = Console(source, output, output, None, None, resize)
        console.open()
        assert not await console.keyboard(send)
    assert got == [(50, 132), b"ls\n"]
    os.close(source)
