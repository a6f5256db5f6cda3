"""``aiokvm run`` in the lab: the same command there, its console here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import click
from anyio import to_thread

from aiokvm import AiokvmError, lab
from aiokvm.cli import common, disks, nets
from aiokvm.cli.progress import Fetching
from aiokvm.cli.typed import resized, typed
from aiokvm.process import temporary_folder

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.streams.memory import MemoryObjectSendStream

    from aiokvm.cli.console import Console
    from aiokvm.cli.run import Options, Report

# What the lab's own kernel and Python take beside the guest.
_EXTRA_MEMORY_BYTES = 1 << 30
# Its standard output is what it warns of and the report, a line; they come back in a file.
_SCRIPT = 'exec "$@" >"$0/report"'


class InLab:
    """The machine, in this command run in the lab."""

    def __init__(self, options: Options, kernel: Path, initrd: Path | None, report: Report) -> None:
        self._options = options
        self._kernel = kernel
        self._initrd = initrd
        self._report = report
        self._typed: MemoryObjectSendStream[bytes] | None = None

    async def run(self, console: Console) -> int:
        self._typed, source = anyio.create_memory_object_stream[bytes]()
        rest = b""

        async def read_input(size: int) -> bytes:
            nonlocal rest
            data = rest or await source.receive()
            rest = data[size:]
            return data[:size]

        async with temporary_folder() as temporary, self._typed, source:
            folder = temporary.path
            console.open()
            config = lab.LabConfig(
                memory_bytes=self._options.memory + _EXTRA_MEMORY_BYTES,
                writable=(folder, *disks.lab_directories(self._options.disks)),
                env={key: value for key, value in os.environ.items() if key == "PYTHONPATH"},
                network=bool(self._options.nets),
                forwards=nets.lab_forwards(self._options.nets, self._options.forwards),
            )
            try:
                with self._report.step("lab"), Fetching() as progress:
                    status = await lab.run(
                        ["sh", "-c", _SCRIPT, str(folder), *self._command(folder)],
                        config,
                        output=console.show,
                        read_input=read_input,
                        progress=progress,
                    )
                await console.end()
            finally:
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(self._fetch, folder)
        if status == common.STATUS_FAILED and self._report.reason is None and self._report.detail:
            raise AiokvmError(self._report.detail)
        return status

    async def send(self, data: bytes) -> None:
        await self._send(typed(data))

    async def resize(self, rows: int, cols: int) -> None:
        await self._send(resized(rows, cols))

    async def _send(self, frames: bytes) -> None:
        if self._typed:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._typed.send(frames)

    def _command(self, folder: Path) -> list[str]:
        options = self._options
        # The command line has what --append adds to; the same is added to in there.
        argv = [sys.executable, "-P", "-m", "aiokvm", "run", "--lab", "never", "--json", "--framed"]
        argv += ["--kernel", str(self._kernel), "--append", options.appended]
        argv += ["--cpus", str(options.cpus), "--memory", str(options.memory), "--name", options.name]
        for disk in options.disks:
            argv += ["--disk", disks.text(disk)]
        if self._initrd is not None:
            argv += ["--initrd", str(self._initrd)]
        if options.timeout is not None:
            argv += ["--timeout", str(options.timeout)]
        if options.trace is not None:
            argv += ["--trace", str(folder / "trace")]
        argv += [f"--{name}" for name in ("rng", "balloon", "overcommit", "reboot") if getattr(options, name)]
        argv += nets.lab_arguments(options.nets, options.forwards)
        if options.pcap is not None:
            argv += ["--pcap", str(folder / "pcap")]
        return argv

    def _fetch(self, folder: Path) -> None:
        """Take what the command in the lab has written."""
        for name, target in (("trace", self._options.trace), ("pcap", self._options.pcap)):
            if target is not None and (folder / name).exists():
                shutil.copyfile(folder / name, target)
        with suppress(OSError, ValueError):
            warnings, _, report = (folder / "report").read_text().rstrip("\n").rpartition("\n")
            if warnings:
                click.echo(warnings, err=True)
            self._take_over(json.loads(report))

    def _take_over(self, inner: dict[str, object]) -> None:
        report = self._report
        seconds = inner.pop("seconds")
        for key in ("name", "reason", "code", "detail"):
            setattr(report, key, inner[key])
        if isinstance(seconds, dict):
            report.seconds |= {key: seconds[key] for key in ("create", "run") if key in seconds}
