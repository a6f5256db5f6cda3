"""How far a fetch or a build is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """How far a pull or a build is.

    ``name`` is the image or the part of it being worked on. In the stage "download" ``done_bytes`` of
    ``total_bytes`` have come; in the stage "build" ``done_files`` of a program's ``total_files``
    are compiled.
    The other stages ("wait" is for another process's pull) count nothing.
    """

    name: str
    stage: Literal["wait", "index", "download", "unpack", "install", "build"]
    done_bytes: int = 0
    total_bytes: int | None = None
    done_files: int = 0
    total_files: int | None = None
