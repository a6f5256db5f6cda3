from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from aiokvm import images, lab
from aiokvm.errors import ConfigError, LabError
from aiokvm.lab.config import INIT, own_archive

pytestmark = pytest.mark.anyio

no_lab = pytest.mark.skipif(
    "LAB" in os.environ or bool(lab.needed()), reason="in the lab, or lacks its packages"
)


def ignore(_: bytes) -> None:
    pass


def emulators() -> list[str]:
    """Return the names of this process's children that are a QEMU."""
    pids = [
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    names = [Path(f"/proc/{pid}/comm").read_text() for pid in pids]
    return [name for name in names if "qemu" in name]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the kernel, so that only a QEMU of the test's own is started."""

    async def pull(name: str, *, progress: object = None) -> Path:
        path = tmp_path / name
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(images, "pull", pull)


def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make a QEMU of shell: ``$console`` and ``$status`` are its files."""
    program = tmp_path / "qemu"
    cases = "*id=console,*) console=${word#*path=};; *id=status,*) status=${word#*path=};;"
    program.write_text(f"#!/bin/sh\nfor word; do case $word in {cases} esac; done\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("AIOKVM_QEMU", str(program))


@pytest.mark.lab
@no_lab
async def test_command_runs_in_a_machine_with_kvm(tmp_path: Path) -> None:
    kept, lost = tmp_path / "kept, here", tmp_path / "lost"
    kept.mkdir()
    lost.mkdir()
    script = 'printf "\\r\\n\\377"; echo hi >&2; test -c /dev/kvm && test "$LAB$x" = "1it\'s" || exit 9; '
    script += f'pwd; echo a > "{kept}/file"; echo b > "{lost}/file"; exit 200'
    got = bytearray()
    config = lab.LabConfig(
        memory_bytes=1 << 30, timeout=180, writable=(kept,), workdir=tmp_path, env={"x": "it's"}
    )
    status = await lab.run(["sh", "-c", script], config, output=got.extend)
    assert got == b"\r\n\xffhi\n" + os.fsencode(tmp_path) + b"\n"
    assert status == 200
    assert (kept / "file").read_text() == "a\n"
    assert list(lost.iterdir()) == []


@pytest.mark.lab
@no_lab
async def test_kvm_is_loaded_when_the_frequency_of_the_tsc_is_known() -> None:
    got = bytearray()
    config = lab.LabConfig(memory_bytes=1 << 30, timeout=180)
    # The kernel measures it in its second second.
    status = await lab.run(["sh", "-c", "sleep 2; dmesg"], config, output=got.extend)
    assert status == 0
    measured, loaded = got.rfind(b"Switched to clocksource"), got.find(b"Nested Virtualization")
    assert 0 < measured < loaded


@pytest.mark.lab
@no_lab
async def test_cancelling_ends_the_machine() -> None:
    with anyio.fail_after(180), anyio.CancelScope() as scope:

        def output(_: bytes) -> None:
            scope.cancel()

        await lab.run(
            ["sh", "-c", "echo ready; sleep 1000"], lab.LabConfig(memory_bytes=1 << 30), output=output
        )
    assert scope.cancelled_caught
    assert emulators() == []


@pytest.mark.lab
@no_lab
async def test_input_is_passed_on_and_has_an_end() -> None:
    data = bytes(range(256)) * 2000
    got, left = bytearray(), bytearray(data)

    async def read_input(size: int) -> bytes:
        await anyio.lowlevel.checkpoint()
        chunk = bytes(left[:size])
        del left[:size]
        return chunk

    config = lab.LabConfig(memory_bytes=1 << 30, timeout=180)
    # What is sent before the command reads is not lost, nor is what follows a pause.
    status = await lab.run(
        ["sh", "-c", "sleep 1; head -c 100; sleep 0.2; cat"], config, output=got.extend, read_input=read_input
    )
    assert status == 0
    assert got == data


async def test_what_reads_the_input_may_fail(
    cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = "import socket, time; s = socket.socket(socket.AF_UNIX); s.connect('input'); time.sleep(1000)"
    fake_qemu(tmp_path, monkeypatch, f'{sys.executable} -c "{connect}"')

    async def read_input(_: int) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await lab.run(["true"], output=ignore, read_input=read_input)
    assert emulators() == []


async def test_output_may_be_awaited(cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_qemu(tmp_path, monkeypatch, "printf out; echo 7 >$status")
    got = bytearray()

    async def output(data: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        got.extend(data)

    assert await lab.run(["true"], output=output) == 7
    assert got == b"out"


async def test_the_kernel_does_not_doubt_its_timer(
    cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it panics now and then where the host is busy: IO-APIC + timer doesn't work!"""
    fake_qemu(tmp_path, monkeypatch, 'case "$*" in *" no_timer_check"*) echo 7 >$status;; esac')
    assert await lab.run(["true"], output=ignore) == 7


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("seq 30 >$console; echo abort >&2; exit 3", r"died: QEMU ended with status 3 .*:\n16\n(.*\n)*30$"),
        ("echo abort >&2; kill -9 $$", r"died: QEMU ended with status -9 .*:\nabort$"),
        ("echo Kernel panic >$console", r"was switched off before the command had ended.*:\nKernel panic$"),
        ("echo >$status", "was switched off before"),
        ("echo 0 >$status; exit 1", "died: QEMU ended with status 1 .*; it has said nothing$"),
    ],
)
async def test_machine_that_dies(
    script: str, message: str, cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu(tmp_path, monkeypatch, script)
    with pytest.raises(LabError, match=message):
        await lab.run(["true"], output=ignore)


async def test_timeout_ends_the_machine(
    cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu(tmp_path, monkeypatch, "sleep 1000 & wait")
    with pytest.raises(TimeoutError):
        await lab.run(["true"], lab.LabConfig(timeout=0.3), output=ignore)
    assert emulators() == []


async def test_missing_qemu_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKVM_QEMU", "/nonexistent/qemu")
    assert lab.needed() == ["qemu-system-x86"]
    with pytest.raises(LabError, match="apt-get install qemu-system-x86"):
        await lab.run(["true"], output=ignore)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lab.LabConfig(cpus=0), "1 CPU at least, not 0"),
        (lab.LabConfig(memory_bytes=1 << 20), "needs 268435456 bytes of memory at least, not 1048576"),
        (lab.LabConfig(workdir=Path("/nonexistent")), "/nonexistent is not a directory"),
        (lab.LabConfig(writable=(Path("/nonexistent"),)), "/nonexistent cannot be writable"),
        (lab.LabConfig(writable=(Path("/"),)), "the root directory cannot be writable"),
        (lab.LabConfig(env={"A-B": "c"}), "'A-B' is not a name"),
    ],
)
async def test_configuration_is_checked_first(config: lab.LabConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await lab.run(["true"], config, output=ignore)


async def test_empty_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="the command has no words"):
        await lab.run([], output=ignore)


def test_the_cache_of_the_caller_is_that_of_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKVM_CACHE", "/srv/a cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/srv/caches")
    archive = own_archive(["true"], lab.LabConfig())
    assert b"export AIOKVM_CACHE='/srv/a cache'" in archive
    assert b"export XDG_CACHE_HOME='/srv/caches'" in archive


def test_init_script_parses() -> None:
    assert subprocess.run(["sh", "-n", INIT], check=False).returncode == 0


@pytest.mark.lab
@no_lab
async def test_the_lab_reaches_the_host_and_is_reached_if_asked_for() -> None:
    """A server of the host answers a command in the lab, and one in the lab a client of the host."""
    probe = socket.create_server(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    seen = b""
    config = lab.LabConfig(network=True, forwards=(f"tcp:127.0.0.1:{port}-:8000",), memory_bytes=1 << 30)
    server = await anyio.create_tcp_listener(local_host="127.0.0.1")
    at = server.extra(anyio.abc.SocketAttribute.local_port)

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(b"from the host\n")

    async def ask() -> None:
        nonlocal seen
        # QEMU accepts before there is a server in the lab, and closes.
        while not seen:
            try:
                async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                    seen = await stream.receive()
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
                await anyio.sleep(0.2)

    output = bytearray()
    script = (
        f"import socket; print(socket.create_connection(('10.77.0.2', {at})).recv(99).decode(), end='');"
        "print(open('/etc/resolv.conf').read(), end='', flush=True);"
        "socket.create_server(('', 8000)).accept()[0].sendall(b'from the lab')"
    )
    async with server, anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, answer)
        tasks.start_soon(ask)
        assert await lab.run([sys.executable, "-c", script], config, output=output.extend) == 0
        tasks.cancel_scope.cancel()
    assert output == b"from the host\nnameserver 10.77.0.3\n"
    assert seen == b"from the lab"
