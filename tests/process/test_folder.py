from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from aiokvm.process import Folder, temporary_folder

OTHER = """
import sys
from aiokvm.process import Folder

folder = Folder()
(folder.path / "file").write_text("content")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.delenv("LAB", raising=False)
    return path


def other(place: Path) -> subprocess.Popen[str]:
    """Another process that has a folder."""
    return subprocess.Popen(
        [sys.executable, "-c", OTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    )


def told(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_a_folder_goes_with_its_block(place: Path) -> None:
    with Folder() as folder:
        assert folder.path.parent == place
        assert folder.path.stat().st_mode & 0o777 == 0o700
        (folder.path / "file").touch()
    assert list(place.iterdir()) == []
    folder.close()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(place: Path) -> None:
    (place / ".aiokvm-file").touch()
    with other(place) as living, other(place) as killed:
        paths = told(living), told(killed)
        killed.kill()
        killed.wait()
        assert all((path / "file").exists() for path in paths)
        with Folder() as folder:
            assert set(place.iterdir()) == {paths[0], folder.path, place / ".aiokvm-file"}
        living.kill()


def test_in_the_lab_nothing_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be one that the host has in use: the lab does not see its locks."""
    monkeypatch.setenv("LAB", "1")
    hosts = place / ".aiokvm-host"
    hosts.mkdir()
    with Folder():
        assert hosts.exists()


def test_a_folder_can_lie_elsewhere(tmp_path: Path, place: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with Folder(elsewhere) as folder:
        assert folder.path.parent == elsewhere
        assert list(place.iterdir()) == []


def test_a_socket_in_a_folder_of_a_long_name(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200)
    deep.mkdir()
    with (
        Folder(deep) as folder,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as one,
    ):
        listener.bind(folder.socket_path("socket"))
        listener.listen()
        assert (folder.path / "socket").is_socket()
        one.connect(folder.socket_path("socket"))


def test_a_folder_that_cannot_be_had_leaves_nothing_behind(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_descriptor)
        with pytest.raises(OSError, match="Too many open files"):
            Folder()
    assert list(place.iterdir()) == []


def test_a_place_that_may_not_be_listed_is_no_hindrance(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        made = Folder()
    made.close()
    assert list(place.iterdir()) == []


@pytest.mark.anyio
async def test_a_worker_makes_and_removes_the_folder_of_a_program_on_a_loop(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    class Seen(Folder):
        def __init__(self, parent: Path | None = None) -> None:
            threads.append(threading.get_ident())
            super().__init__(parent)

        def close(self) -> None:
            threads.append(threading.get_ident())
            super().close()

    monkeypatch.setattr("aiokvm.process.folder.Folder", Seen)
    async with temporary_folder() as folder:
        assert folder.path.parent == place
    with pytest.raises(ZeroDivisionError):
        async with temporary_folder():
            raise ZeroDivisionError
    with anyio.CancelScope() as scope:
        async with temporary_folder():
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with temporary_folder():
            await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert list(place.iterdir()) == []  # noqa: ASYNC240
    assert len(threads) == 8
    assert threading.get_ident() not in threads
