"""The command line: ``aiokvm run``, ``trace``, ``doctor``, ``lab`` and ``images``."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import contextmanager, suppress
from errno import ENOENT
from typing import TYPE_CHECKING, Any, NoReturn

import click

from aiokvm.errors import AiokvmError
from aiokvm.text import printable_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

# Modules of this package. Each is imported when it is used: an import costs seconds on an emulated CPU.
_COMMANDS = ("run", "trace", "doctor", "lab", "images")


class _Group(click.Group):
    """Loads commands when they are used, and answers for all of them what no reader or disk takes."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command and exit."""
        from aiokvm.cli import common

        try:
            try:
                super().main(*args, **kwargs)
            finally:
                # Not left to the interpreter, which would show a traceback.
                if sys.stdout:  # None if it was closed when this process was started
                    sys.stdout.flush()
        except BrokenPipeError:
            status = common.STATUS_BROKEN_PIPE
        except (AiokvmError, OSError) as error:
            with suppress(OSError):
                is_output = not (isinstance(error, AiokvmError) or error.filename or error.errno == ENOENT)
                common.say(("cannot write the output: " if is_output else "") + common.describe(error))
            status = common.STATUS_FAILED
        _drop_output()
        sys.exit(status)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Take the options, --help and --version among them."""
        with _fit_for_a_terminal():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _fit_for_a_terminal():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(f"aiokvm.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


@contextmanager
def _fit_for_a_terminal() -> Iterator[None]:
    """End as SIGPIPE and SIGINT end a program: click would make it status 1. Names in errors are text."""
    from aiokvm.cli import common

    try:
        yield
    except BrokenPipeError:
        raise click.exceptions.Exit(common.STATUS_BROKEN_PIPE) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(common.STATUS_INTERRUPTED) from None
    except click.ClickException as error:
        # Final to a type checker; all that click shows is made of it, for each kind of error in its way.
        vars(error)["message"] = printable_lines(error.message)
        raise
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise click.exceptions.Exit(common.STATUS_BROKEN_PIPE) from None
        raise


def _drop_output() -> None:
    """Have the interpreter write what is left of the output to nowhere."""
    # Standard output of a test has no descriptor, and there may be none at all.
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


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
