"""The disks of ``aiokvm run``."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aiokvm import ConfigError, block
from aiokvm.block import DiskOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokvm.block import BlockBackend
    from aiokvm.images import DebianDisk


def parse(text: str) -> DiskOption:
    """Return the disk that PATH[,ro][,format=F] names: a parameter type. A usage error for anything else."""
    try:
        option = block.parse_disk(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None
    if option.format == "nbd":
        return option
    return DiskOption(os.path.abspath(option.path), option.format, option.readonly)


def text(option: DiskOption) -> str:
    """Return what `parse` takes for the same disk."""
    words = [option.path, *(["ro"] if option.readonly else [])]
    if option.format != "nbd":
        words.append(f"format={option.format}")
    return ",".join(words)


def backend(option: DiskOption) -> BlockBackend:
    """Return what the machine's disk is connected to."""
    if option.format == "nbd":
        return block.Nbd(option.path, readonly=option.readonly)
    if option.format == "raw":
        return block.Raw(option.path, readonly=option.readonly)
    return block.Image(option.path, format=option.format, readonly=option.readonly)


def root(options: Sequence[DiskOption], append: str) -> str:
    """Return what has the kernel boot from the first disk; nothing if ``append`` names a root itself."""
    if not options or any(word.startswith("root=") for word in append.split()):
        return ""
    return f"root=/dev/vda {'ro' if options[0].readonly else 'rw'}"


def built(options: Sequence[DiskOption]) -> DebianDisk | None:
    """Return the first disk if the kernel and the initramfs that were built with it are beside it."""
    if not options or options[0].format != "raw":
        return None
    from aiokvm import images

    disk = images.DebianDisk.beside(Path(options[0].path))
    return disk if disk.kernel.is_file() and disk.initrd.is_file() else None


def check(options: Sequence[DiskOption]) -> None:
    """Raise ConfigError for a disk that cannot be had, before anything is fetched or started for it."""
    for option in options:
        if option.format == "nbd":
            continue
        path = Path(option.path)
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            raise ConfigError(f"there is no disk {path}") from None
        except OSError as error:
            raise ConfigError(f"the disk {path}: {error.strerror}") from None
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise ConfigError(f"the disk {path} is neither a file nor a block device")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"the disk {path} may not be read by this user")
        if not (option.readonly or os.access(path, os.W_OK)):
            raise ConfigError(f"the disk {path} may not be written to by this user: {path},ro only reads it")


def lab_directories(options: Sequence[DiskOption]) -> tuple[Path, ...]:
    """Return the directories that the lab has to write to. ConfigError for what is out of reach."""
    for option in options:
        if option.format == "nbd":
            raise ConfigError(f"the lab has no network: {option.path} cannot be reached from there")
    return tuple({Path(option.path).resolve().parent for option in options if not option.readonly})
