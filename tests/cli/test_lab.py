from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from aiokvm import LabError, lab
from aiokvm.cli import cli
from aiokvm.lab import LabConfig

Outcome = Callable[[], Awaitable[int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[str], LabConfig]]:
    """Stand in for the lab: prints "hello", and ends as the command's first word says."""
    made = []

    async def run(
        command: Sequence[str],
        config: LabConfig,
        *,
        output: Callable[[bytes], Awaitable[None]],
        read_input: Callable[[int], Awaitable[bytes]],
        progress: object,
    ) -> int:
        made.append((command, config))
        await output(b"hello\xff\n")
        if command[0] == "input":
            await output(await read_input(5))
            await output(await read_input(100))
            assert await read_input(100) == b""
            return 0
        if command[0] == "timeout":
            raise TimeoutError
        if command[0] == "die":
            raise LabError("the lab died")
        if command[0] == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            await anyio.sleep_forever()
        return int(command[0])

    monkeypatch.setattr(lab, "run", run)
    return made


@pytest.mark.parametrize(
    ("word", "status", "message"),
    [
        ("7", 7, ""),
        ("timeout", 124, "aiokvm: the command did not end within 3 s\n"),
        ("die", 125, "aiokvm: the lab died\n"),
        ("interrupt", 130, ""),
    ],
)
def test_status(
    word: str,
    status: int,
    message: str,
    calls: list[tuple[Sequence[str], LabConfig]],
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    result = CliRunner().invoke(cli, ["lab", "--timeout", "3", "--", word, "-x"])
    assert (result.exit_code, result.stderr) == (status, message)
    assert capfdbinary.readouterr().out == b"hello\xff\n"
    assert [command for command, _ in calls] == [(word, "-x")]


def test_standard_input_is_passed_on(
    calls: list[tuple[Sequence[str], LabConfig]],
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "input").write_bytes(b"first\0and last")
    saved = os.dup(0)
    with (tmp_path / "input").open("rb") as file:
        os.dup2(file.fileno(), 0)
        try:
            assert CliRunner().invoke(cli, ["lab", "--", "input"]).exit_code == 0
        finally:
            os.dup2(saved, 0)
            os.close(saved)
    assert capfdbinary.readouterr().out == b"hello\xff\nfirst\0and last"


def test_options(calls: list[tuple[Sequence[str], LabConfig]], tmp_path: Path) -> None:
    args = ["-m", "2G", "-c", "4", "--writable", str(tmp_path), "--writable", "/tmp", "--", "0"]
    assert CliRunner().invoke(cli, ["lab", *args]).exit_code == 0
    assert [config for _, config in calls] == [
        LabConfig(memory_bytes=2 << 30, cpus=4, timeout=None, writable=(tmp_path, Path("/tmp")))
    ]


def test_options_of_the_processor(calls: list[tuple[Sequence[str], LabConfig]], tmp_path: Path) -> None:
    args = ["--cpu", "intel", "--kvm", "ept=0", "--kvm", "ple_gap=1", "--include", str(tmp_path), "--", "0"]
    assert CliRunner().invoke(cli, ["lab", *args]).exit_code == 0
    config = calls[0][1]
    assert (config.cpu, config.kvm, config.include) == ("intel", {"ept": "0", "ple_gap": "1"}, (tmp_path,))
    result = CliRunner().invoke(cli, ["lab", "--kvm", "ept", "--", "true"])
    assert result.exit_code == 2
    assert "'ept' is not NAME=VALUE, such as ept=0" in result.stderr


def test_command_and_directories_are_required() -> None:
    assert CliRunner().invoke(cli, ["lab"]).exit_code == 2
    result = CliRunner().invoke(cli, ["lab", "--writable", "/nonexistent", "--", "true"])
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
