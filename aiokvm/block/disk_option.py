"""How a disk is written on a command line: PATH[,ro][,format=FORMAT], or an NBD URI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from aiokvm.arguments import checked, checked_init
from aiokvm.errors import ConfigError
from aiokvm.proto.image import FORMATS
from aiokvm.proto.nbd import parse_uri


@checked_init
@dataclass(frozen=True, slots=True)
class DiskOption:
    """A disk as it was asked for: ``format`` is "raw", "nbd", or one that `Image` serves."""

    path: str
    format: str = "raw"
    readonly: bool = False


@checked
def parse_disk(text: str) -> DiskOption:
    """What PATH[,ro][,format=FORMAT] or URI[,ro] says; raises ConfigError.

    A path may have commas: options are taken from the end. Without a format the name decides, and never what
    the file holds, which a guest may have written: nbd: and nbd+unix: are NBD, .qcow2, .vmdk, .vdi and .vhdx
    what they say, and everything else is raw.
    """
    path, readonly, wanted = text, False, ""
    while True:
        before, comma, option = path.rpartition(",")
        if not comma or not (option == "ro" or option.startswith("format=")):
            break
        if option == "ro":
            if readonly:
                raise ConfigError(f"disk {text!r}: ro is there twice")
            readonly = True
        else:
            if wanted:
                raise ConfigError(f"disk {text!r}: format= is there twice")
            wanted = option.removeprefix("format=")
            if wanted not in ("raw", *FORMATS):
                raise ConfigError(f"disk {text!r}: format {wanted!r} is not one of raw, {', '.join(FORMATS)}")
        path = before
    if not path or "\0" in path:
        raise ConfigError(f"disk {text!r} names no file: PATH[,ro][,format=raw|{'|'.join(FORMATS)}]")
    if path.startswith(("nbd:", "nbd+unix:")):
        if wanted:
            raise ConfigError(f"disk {text!r}: what an NBD server has is raw, and has no format")
        parse_uri(path)
        return DiskOption(path, "nbd", readonly)
    suffix = PurePath(path).suffix.lower().removeprefix(".")
    return DiskOption(path, wanted or (suffix if suffix in FORMATS else "raw"), readonly)
