"""The virtio devices that a machine has if it is asked for: console, entropy, memory balloon."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokvm.aio import Loop
    from aiokvm.logs import SeldomLogger
    from aiokvm.machine.balloon import MemoryBalloon
    from aiokvm.machine.config import Config
    from aiokvm.machine.ports import Consoles
    from aiokvm.memory import GuestMemory
    from aiokvm.virtio.device import VirtioDevice


def port_names(console: bool | str | Iterable[str]) -> tuple[str, ...] | None:
    """The further ports of a console, as `VM.create` is told; None if there is no console."""
    if isinstance(console, bool):
        return () if console else None
    return (console,) if isinstance(console, str) else tuple(console)


def count(config: Config) -> int:
    """How many devices they are."""
    return (config.console is not None) + (config.rng is not None) + config.balloon


class Peripherals:
    """Those of one machine; ``devices`` has them as they are to be attached. Raises ConfigError."""

    def __init__(self, loop: Loop, config: Config, memory: GuestMemory, logger: SeldomLogger) -> None:
        self.console: Consoles | None = None
        self.balloon: MemoryBalloon | None = None
        self.devices: list[VirtioDevice] = []
        # What a machine does not have, its program need not load.
        if config.console is not None:
            from aiokvm.machine.ports import Consoles

            self.console = Consoles(config.console, loop)
            self.devices.append(self.console.device)
        if config.rng is not None:
            from aiokvm.virtio.rng import Rng

            limit = config.rng
            rng = Rng(os.getrandom, bytes_per_second=limit.bytes_per_second, burst_bytes=limit.burst_bytes)
            self.devices.append(rng)
        if config.balloon:
            from aiokvm.machine.balloon import MemoryBalloon

            self.balloon = MemoryBalloon(memory, config.name, logger, loop)
            self.devices.append(self.balloon.device)

    def reset(self) -> None:
        """The machine is reset."""
        if self.console:
            self.console.reset()

    def close(self) -> None:
        """The machine has ended. Idempotent."""
        if self.console:
            self.console.close()
        if self.balloon:
            self.balloon.close()
