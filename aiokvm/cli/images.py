"""``aiokvm images``: the kernels and initramfs images that aiokvm knows how to get."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from aiokvm.cli import common

if TYPE_CHECKING:
    from aiokvm.cli.common import Interrupts


_EPILOG = """\b
aiokvm images list
aiokvm images pull generic initramfs-generic
aiokvm run --kernel generic
file "$(aiokvm images path generic)"
"""


@click.group(epilog=_EPILOG)
def images() -> None:
    """List and fetch kernels and initramfs images.

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
