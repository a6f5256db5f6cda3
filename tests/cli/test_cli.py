from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

from click.testing import CliRunner

from aiokvm.cli import cli


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


def test_closed_standard_input_is_an_empty_one() -> None:
    argv = ["sh", "-c", f'exec "{sys.executable}" -P -m aiokvm run --lab never --kernel nope <&-']
    result = subprocess.run(argv, capture_output=True, check=False)
    assert result.returncode == 125
    assert b"neither a file" in result.stderr
