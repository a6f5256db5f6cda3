from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from aiokvm.errors import ImageError
from aiokvm.images.process import run

pytestmark = pytest.mark.anyio


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_output_comes_whole_and_by_lines() -> None:
    lines: list[bytes] = []
    output = await run(["sh", "-c", "printf 'one\\n\\ntwo\\nthr'; printf 'ee\\nrest'"], line=lines.append)
    assert output == b"one\n\ntwo\nthree\nrest"
    assert lines == [b"one", b"", b"two", b"three"]


async def test_failure_tells_the_end_of_the_complaint() -> None:
    with pytest.raises(ImageError, match=r"^sh failed with status 3: x{990}y{10}$"):
        await run(["sh", "-c", "printf '%02000d' 0 | tr 0 x >&2; printf yyyyyyyyyy >&2; exit 3"])
    with pytest.raises(ImageError, match=r"^false failed with status 1: it gave no reason$"):
        await run(["false"])


async def test_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ImageError, match=r"apt-get is missing: install the Debian package apt$"):
        await run(["apt-get", "update"])


async def test_cancelling_ends_grandchildren_too() -> None:
    pids: list[int] = []
    with anyio.CancelScope() as scope:

        def line(text: bytes) -> None:
            pids.append(int(text))
            if len(pids) == 2:
                scope.cancel()

        await run(["sh", "-c", "echo $$; sleep 1000 & echo $!; wait"], line=line)
    assert scope.cancelled_caught
    with anyio.fail_after(10):
        # A killed grandchild is not ours to wait for.
        while any(map(lives, pids)):  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_a_program_with_grace_may_clean_up(tmp_path: Path) -> None:
    script = "trap 'touch cleaned; exit' TERM; echo ready; while :; do sleep 0.05; done"
    with anyio.CancelScope() as scope:
        await run(["sh", "-c", script], cwd=tmp_path, grace_s=30, line=lambda _: scope.cancel())
    assert scope.cancelled_caught
    assert (tmp_path / "cleaned").exists()


async def test_a_program_that_uses_its_grace_up_is_killed(tmp_path: Path) -> None:
    script = "trap '' TERM; echo $$; while :; do sleep 0.05; done"
    pids: list[int] = []
    with anyio.CancelScope() as scope:

        def line(text: bytes) -> None:
            pids.append(int(text))
            scope.cancel()

        await run(["sh", "-c", script], cwd=tmp_path, grace_s=0.1, line=line)
    assert not lives(pids[0])


async def test_output_goes_into_a_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stdout:
        assert await run(["sh", "-c", 'printf "$WORD"'], stdout=stdout, env={"WORD": "hello"}) == b""
    assert (tmp_path / "file").read_bytes() == b"hello"
