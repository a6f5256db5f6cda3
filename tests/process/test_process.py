"""Programs end with this process, and by `end`; whatever they do."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from aiokvm import process
from tests.holdups import WANTED_S

if TYPE_CHECKING:
    from aiokvm.process import Process

pytestmark = pytest.mark.anyio

# Starts a program from a thread that ends at once, and then waits to be killed.
PARENT = """
import sys, threading, anyio
from aiokvm import process

async def start():
    await process.start(["sh", "-c", sys.argv[1]], stdout=1, grace_s=float(sys.argv[2]))

thread = threading.Thread(target=anyio.run, args=(start,), kwargs={"backend": sys.argv[3]})
thread.start()
thread.join()
threading.Event().wait()
"""


async def lines(started: Process, count: int) -> list[int]:
    assert started.stdout is not None
    data = b""
    while data.count(b"\n") < count:
        data += await started.stdout.receive()
    return [int(line) for line in data.split()]


def gone(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 30)[0])


async def test_a_program_has_its_streams_and_its_status(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    with (tmp_path / "in").open("rb") as stdin:
        started = await process.start(
            ["sh", "-c", 'cat; printf "$WORD"; pwd; exit 7'], stdin=stdin, cwd=tmp_path, env={"WORD": "d"}
        )
    assert started.stdout is not None
    assert b"".join([chunk async for chunk in started.stdout]) == b"abcd" + os.fsencode(tmp_path) + b"\n"
    assert await started.wait() == 7
    assert await process.end(started) == 7


async def test_starting_a_program_does_not_hold_the_loop_of_a_large_process() -> None:
    held = [await anyio.to_thread.run_sync(lambda: b"x" * (256 << 20))]
    took_s = []
    for _ in range(3):
        begun_s = time.thread_time()
        started = await process.start(["true"])
        took_s.append(time.thread_time() - begun_s)
        await process.end(started)
    await anyio.to_thread.run_sync(held.clear)
    assert min(took_s) < WANTED_S


async def test_the_signal_that_ended_a_program_is_told() -> None:
    started = await process.start(["sh", "-c", "kill -SEGV $$"])
    assert await started.wait() == -signal.SIGSEGV
    await started.aclose()


async def test_a_program_that_has_ended_when_it_is_to_end_keeps_its_status(
    caplog: pytest.LogCaptureFixture,
) -> None:
    statuses = set()
    for _ in range(100):
        started = await process.start(["sh", "-c", "exit 7"])
        assert started.stdout is not None
        with pytest.raises(anyio.EndOfStream):
            await started.stdout.receive()
        statuses.add(await process.end(started))
    assert statuses == {7}
    assert caplog.text == ""


async def test_a_missing_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        await process.start(["no-such-program"])
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        await process.start(["sh"])


async def test_a_program_and_what_it_started_end_at_once() -> None:
    started = await process.start(["sh", "-c", "trap '' TERM; sleep 1000 & echo $$; echo $!; wait"])
    fds = [os.pidfd_open(pid) for pid in await lines(started, 2)]
    assert await process.end(started) == -signal.SIGKILL
    assert all(map(gone, fds))
    for fd in fds:
        os.close(fd)


async def test_a_program_with_grace_ends_by_itself() -> None:
    script = "trap 'echo 2; exit 3' TERM; echo 1; while :; do sleep 0.05; done"
    started = await process.start(["sh", "-c", script], grace_s=30)
    await lines(started, 1)
    assert await process.end(started) == 3


async def test_a_program_that_uses_its_grace_up_is_killed() -> None:
    started = await process.start(
        ["sh", "-c", "trap '' TERM; echo 1; while :; do sleep 0.05; done"], grace_s=0.1
    )
    await lines(started, 1)
    assert await process.end(started) == -signal.SIGKILL


async def test_a_program_whose_output_nobody_reads_can_be_ended() -> None:
    started = await process.start(["yes"])
    assert started.stdout is not None
    await started.stdout.receive()
    with anyio.fail_after(30):
        assert await process.end(started) == -signal.SIGKILL


async def test_what_a_program_leaves_running_ends_with_it() -> None:
    started = await process.start(["sh", "-c", "sleep 1000 >/dev/null & echo $!"])
    (pid,) = await lines(started, 1)
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert gone(fd)
    os.close(fd)
    await started.aclose()


async def test_a_keeper_that_is_killed_takes_the_program_along() -> None:
    started = await process.start(["sh", "-c", "echo $$; exec sleep 1000"])
    fd = os.pidfd_open((await lines(started, 1))[0])
    os.kill(started.pid, signal.SIGKILL)
    assert gone(fd)
    os.close(fd)
    await started.aclose()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("script", "grace_s"),
    [
        ("sleep 1000 & echo $$ $!; wait", 0.0),
        ("trap '' TERM; sleep 1000 & echo $$ $!; while :; do wait; done", 0.1),
    ],
    ids=["at once", "with grace"],
)
def test_programs_end_with_a_process_that_is_killed(script: str, grace_s: float, backend: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, script, str(grace_s), backend], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        fds = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(fds) == 2
        try:
            assert len(fds) == 2
            # They do not end with the thread that started them.
            assert not select.select(fds, [], [], 0.2)[0]
            parent.kill()
            assert all(map(gone, fds))
        finally:
            parent.kill()
            for fd in fds:
                os.close(fd)


def has_children(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())


async def test_a_program_that_has_hardly_begun_gets_its_signal() -> None:
    # Whether it has a group of its own by then is a matter of microseconds.
    for turns in range(100):
        program = await process.start(["sleep", "1000"], grace_s=10)
        while not has_children(program.pid):
            pass
        for _ in range(10 * turns):
            pass
        assert await process.end(program) == -signal.SIGTERM
