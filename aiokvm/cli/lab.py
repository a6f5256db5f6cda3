"""``aiokvm lab``: a command in a throwaway machine that has a real KVM."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from aiokvm.cli import common, nets

if TYPE_CHECKING:
    from aiokvm.cli.common import Interrupts


_EPILOG = """\b
aiokvm lab -- ls -l /dev/kvm
aiokvm lab --timeout 300 --writable . -- pytest -m kvm
aiokvm lab -- sh -c 'grep -c svm /proc/cpuinfo && uname -r'
aiokvm lab --cpu intel --kvm ept=0 -- grep . /sys/module/kvm_intel/parameters/ept

\b
Exit status:
  0-255    the command's, 128 + N if signal N ended it there
  124      the timeout
  125      aiokvm failed; standard error says why
  128 + N  ended by signal N: 130 at Ctrl-C
"""


def _parameters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return what --kvm names, by name."""
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise click.BadParameter(f"{text!r} is not NAME=VALUE, such as ept=0")
        found[name] = value
    return found


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=_EPILOG,
    short_help="Run a command where there is a real KVM.",
)
@click.option("-m", "--memory", type=common.size, default="3G", show_default=True, help="RAM.")
@click.option("-c", "--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="CPUs.")
@click.option(
    "--timeout",
    metavar="S",
    type=common.seconds,
    help="End the lab that many seconds after its start.",
)
@click.option(
    "--writable",
    metavar="DIR",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Let writes to this directory through; may be repeated.",
)
@click.option(
    "--cpu",
    type=click.Choice(["amd", "intel"]),
    default="amd",
    show_default=True,
    help="Whose virtualization: AMD-V by QEMU, or VT-x by Bochs.",
)
@click.option(
    "--kvm",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_parameters,
    help="Set a parameter of kvm_amd or kvm_intel; may be repeated.",
)
@click.option(
    "--include",
    metavar="PATH",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Have a copy of it in the Intel lab, too; may be repeated.",
)
@click.option("--network", is_flag=True, help="Let it reach what this machine reaches, by a NAT.")
@click.option(
    "-p",
    "--publish",
    "forwards",
    metavar="[ADDR:]PORT:PORT[/udp]",
    type=nets.parse_forward,
    multiple=True,
    help="Lead a port of this host (of 127.0.0.1 unless ADDR says) to one of the lab, by that NAT.",
)
@click.argument("command", metavar="-- CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def lab(
    ctx: click.Context,
    memory: int,
    cpus: int,
    timeout: float | None,
    writable: tuple[Path, ...],
    network: bool,
    forwards: tuple[nets.Forward, ...],
    cpu: Literal["amd", "intel"],
    kvm: dict[str, str],
    include: tuple[Path, ...],
    command: tuple[str, ...],
) -> None:
    """Run a command where there is a real KVM, on any machine and without privileges.

    QEMU emulates a processor with virtualization, and Debian's kernel runs on it. The command runs as root
    in the current directory and sees this machine's files; what it writes is gone at the end, but for
    --writable. It reads this command's standard input; its output, standard output and error as one, comes
    as it is written.

    With --cpu intel it is Bochs, which is compiled the first time. That lab has one CPU and no network, and
    of this machine's files copies: the system's programs, this Python, the current directory and --include.
    """

    async def work(_: Interrupts) -> int:
        # Here, for --help needs neither.
        from aiokvm import lab
        from aiokvm.cli.console import Output, read, takes_input
        from aiokvm.cli.progress import Fetching

        config = lab.LabConfig(
            memory_bytes=memory,
            cpus=cpus,
            timeout=timeout,
            writable=writable,
            network=network or bool(forwards),
            forwards=nets.hostfwd(forwards),
            cpu=cpu,
            kvm=kvm,
            include=include,
        )
        try:
            with closing(Output(1)) as output, Fetching() as progress:
                return await lab.run(
                    command,
                    config,
                    output=output.write,
                    read_input=partial(read, 0) if takes_input(0) else None,
                    progress=progress,
                )
        except TimeoutError:
            common.say(f"the command did not end within {timeout:g} s")
            return common.STATUS_TIMEOUT
        except BrokenPipeError:
            return common.STATUS_BROKEN_PIPE

    ctx.exit(common.execute(work))
