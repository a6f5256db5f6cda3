"""``aiokvm images``: the kernels and initramfs images that aiokvm knows how to get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from aiokvm.cli import common

if TYPE_CHECKING:
    from aiokvm.cli.common import Interrupts


_EPILOG = """\b
aiokvm images list
aiokvm images pull generic initramfs-generic
aiokvm run --kernel generic
file "$(aiokvm images path generic)"
aiokvm images build debian --packages fio,python3 --output debian.img
"""


@click.group(epilog=_EPILOG)
def images() -> None:
    """List, fetch and build kernels, initramfs images and disks.

    They come from Debian's packages, are verified against the packages' checksums, and are kept in
    $AIOKVM_CACHE, else $XDG_CACHE_HOME/aiokvm, else ~/.cache/aiokvm.
    """


@images.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def list_images(as_json: bool) -> None:
    """Show all images, and which of them are here."""
    from aiokvm import images

    found = [(image, images.path(image.name)) for image in images.catalogue()]
    if as_json:
        rows = [
            {
                "name": image.name,
                "summary": image.summary,
                "kind": image.kind,
                "architecture": image.architecture,
                "package": image.package,
                "path": None if path is None else str(path),
                "bytes": None if path is None else path.stat().st_size,
            }
            for image, path in found
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("NAME", "left"), ("IMAGE", "left"), ("FOR", "left"), ("MB", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    for image, path in found:
        size = "not pulled" if path is None else f"{path.stat().st_size / 1e6:.1f}"
        table.add_row(image.name, image.summary, image.architecture, size)
    Console().print(table)


@images.command
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--refresh", is_flag=True, help="Ask Debian for newer versions.")
@click.pass_context
def pull(ctx: click.Context, names: tuple[str, ...], refresh: bool) -> None:
    """Fetch images that are missing or damaged."""

    async def work(_: Interrupts) -> int:
        from aiokvm import images
        from aiokvm.cli.progress import Fetching

        for name in names:
            images.find(name)
        for name in names:
            with Fetching() as progress:
                path = await images.pull(name, progress=progress, refresh=refresh)
            click.echo(path)
        return 0

    ctx.exit(common.execute(work))


@images.group
def build() -> None:
    """Build disk images."""


@build.command
@click.option("--packages", metavar="P,...", default="", help="More packages, with commas or spaces between.")
@click.option(
    "--file",
    "files",
    metavar="GUEST=HERE",
    multiple=True,
    help="Put the file HERE at the path GUEST; may be repeated.",
)
@click.option(
    "--authorized-keys",
    metavar="FILE",
    multiple=True,
    type=click.File("r", errors="surrogateescape"),
    help="Let root in by SSH with these public keys; may be repeated.",
)
@click.option(
    "--enable", metavar="UNIT", multiple=True, help="Start this unit of systemd's; may be repeated."
)
@click.option("--size", type=common.size, default="1G", show_default=True, help="The file system's; sparse.")
@click.option("--suite", default="bookworm", show_default=True, help="Which Debian.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Copy it there, to be written to; the kernel and initrd go beside it.",
)
@click.option("--refresh", is_flag=True, help="Build it anew, of Debian's packages of today.")
@click.pass_context
def debian(
    ctx: click.Context,
    packages: str,
    files: tuple[str, ...],
    authorized_keys: tuple[IO[str], ...],
    enable: tuple[str, ...],
    size: int,
    suite: str,
    output: Path | None,
    refresh: bool,
) -> None:
    """Build a Debian root file system, as a disk, and print its path.

    It is cached; --output makes a copy of one's own of it. FILE.vmlinuz and FILE.initrd boot it: aiokvm run
    --disk FILE finds them. Log in as root, there is no password.
    """
    placed: dict[str, str | bytes | Path] = {}
    for text in files:
        guest, equals, here = text.partition("=")
        if not equals:
            raise click.BadParameter(f"--file {text!r}: write GUEST=HERE, such as /etc/motd=motd")
        placed[guest] = Path(here)
    keys = [file.read() for file in authorized_keys]

    async def work(_: Interrupts) -> int:
        from aiokvm import images
        from aiokvm.cli.progress import Fetching

        with Fetching() as progress:
            built = await images.build_debian(
                suite=suite,
                packages=packages.replace(",", " ").split(),
                size_bytes=size,
                files=placed,
                authorized_keys=keys,
                enable=enable,
                output=output,
                progress=progress,
                refresh=refresh,
            )
        click.echo(built.disk)
        return 0

    ctx.exit(common.execute(work))


@images.command
@click.argument("name")
@click.pass_context
def path(ctx: click.Context, name: str) -> None:
    """Print where an image is; an error if it has not been pulled."""
    from aiokvm import AiokvmError, images

    try:
        found = images.path(name)
    except AiokvmError as error:
        common.say(str(error))
        ctx.exit(common.STATUS_FAILED)
    if found is None:
        common.say(f"the image {name} is not here yet: aiokvm images pull {name}")
        ctx.exit(common.STATUS_FAILED)
    click.echo(found)
