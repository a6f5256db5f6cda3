"""The command line: ``aiokvm run``, ``trace``, ``doctor``, ``lab`` and ``images``."""

from __future__ import annotations

import importlib
import os

import click

# Modules of this package. Each is imported when it is used: an import costs seconds on an emulated CPU.
_COMMANDS = ("run", "trace", "doctor", "lab", "images")


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(f"aiokvm.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


_EPILOG = """\b
aiokvm doctor             can machines run here, and what to do if not
aiokvm run                boot Linux on this terminal
aiokvm run -- uname -a    boot Linux, run one command in it, end with its status
"""


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(package_name="aiokvm", message="%(prog)s %(version)s")
def cli() -> None:
    """Virtual machines on Linux KVM.

    Statuses of aiokvm's own: 2 wrong usage, 125 an error that one line on standard error explains,
    128 + N ended by signal N. COMMAND --help has the others.
    """


def main() -> None:
    """Run the command line of this process, and exit."""
    # A closed standard stream would give its number to the next file that is opened.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    cli(prog_name="aiokvm")
