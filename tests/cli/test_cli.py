from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from aiokvm.cli import cli

if TYPE_CHECKING:
    from pathlib import Path

# Such names may come out of a shell's *.
NASTY = "\x1b]0;owned\x07\x9b31m\u202e"


def test_help_names_all_commands() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    commands = result.stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in commands] == ["run", "trace", "doctor", "lab", "images"]
    assert not any(line.endswith("...") for line in commands)


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"], prog_name="aiokvm")
    assert result.stdout == f"aiokvm {version('aiokvm')}\n"


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli, ["walk"])
    assert result.exit_code == 2
    assert "No such command 'walk'" in result.stderr


@pytest.mark.parametrize("command", [["trace", NASTY], ["doctor", NASTY], [NASTY], ["run", "-m", NASTY]])
def test_what_was_given_is_shown_as_text(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "aiokvm", *command],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 2
    assert all(char == "\n" or char.isprintable() for char in done.stderr.decode())
    assert r"\x1b]0;owned\x07" in done.stderr.decode()


def test_closed_standard_input_is_an_empty_one() -> None:
    argv = ["sh", "-c", f'exec "{sys.executable}" -P -m aiokvm run --lab never --kernel nope <&-']
    result = subprocess.run(argv, capture_output=True, check=False)
    assert result.returncode == 125
    assert b"neither a file" in result.stderr


COMMANDS = [
    ["--help"],
    ["--version"],
    ["doctor"],
    ["doctor", "--json"],
    ["images", "list"],
    ["images", "list", "--json"],
    ["images", "pull", "--help"],
    ["run", "--help"],
    ["lab", "--help"],
]


def run_into(stdout: int, command: list[str], cache: object) -> tuple[int, list[str]]:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "aiokvm", *command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"AIOKVM_CACHE": str(cache)},
        check=False,
    )
    return result.returncode, result.stderr.splitlines()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_output_onto_a_full_file_system_is_one_line(command: list[str], tmp_path: object) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        status, lines = run_into(full, command, tmp_path)
    finally:
        os.close(full)
    assert (status, lines) == (125, ["aiokvm: cannot write the output: No space left on device"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_output_that_nobody_reads_ends_as_by_sigpipe(command: list[str], tmp_path: object) -> None:
    source, sink = os.pipe()
    os.close(source)
    try:
        assert run_into(sink, command, tmp_path) == (141, [])
    finally:
        os.close(sink)


def test_ctrl_c_ends_as_by_sigint(tmp_path: Path) -> None:
    fifo = tmp_path / "trace"
    os.mkfifo(fifo)
    argv = [sys.executable, "-P", "-m", "aiokvm", "trace", str(fifo)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with fifo.open("wb"):  # it has opened it, too, and reads
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 130


def test_output_may_be_closed(tmp_path: Path) -> None:
    script = 'exec "$@" >&-'
    argv = ["sh", "-c", script, "sh", sys.executable, "-P", "-m", "aiokvm", "images", "list"]
    done = subprocess.run(
        argv, stderr=subprocess.PIPE, env=os.environ | {"AIOKVM_CACHE": str(tmp_path)}, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", [["run", "--disk", "x"], ["lab", "--", "true"]], ids=" ".join)
def test_a_current_directory_that_is_gone_is_told(command: list[str], tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    argv = ["sh", "-c", script, "sh", sys.executable, "-P", "-m", "aiokvm", *command]
    done = subprocess.run(argv, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 125
    assert done.stderr == b"aiokvm: the current directory does not exist any more\n"
