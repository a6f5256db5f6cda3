from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from aiokvm import ImageError, images
from aiokvm.cli import cli
from aiokvm.images import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIOKVM_CACHE", str(tmp_path))
    return tmp_path


def test_list_shows_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cloud"
    file.write_bytes(bytes(1_500_000))
    monkeypatch.setattr(images, "path", lambda name: file if name == "cloud" else None)
    text = CliRunner().invoke(cli, ["images", "list"]).stdout.splitlines()
    assert len(text) == 1 + len(images.catalogue())
    assert text[1].split()[0] == "cloud"
    assert text[1].endswith("1.5")
    assert text[2].endswith("not pulled")
    rows = json.loads(CliRunner().invoke(cli, ["images", "list", "--json"]).stdout)
    assert [row["name"] for row in rows] == [image.name for image in images.catalogue()]
    assert (rows[0]["path"], rows[0]["bytes"]) == (str(file), 1_500_000)
    assert (rows[1]["path"], rows[1]["bytes"]) == (None, None)


def test_path_of_what_is_not_here_says_how_to_get_it() -> None:
    result = CliRunner().invoke(cli, ["images", "path", "cloud"])
    assert (result.exit_code, result.stdout) == (125, "")
    assert result.stderr == "aiokvm: the image cloud is not here yet: aiokvm images pull cloud\n"


def test_unknown_image_is_refused_before_anything_is_fetched() -> None:
    for command in (["path", "nope"], ["pull", "cloud", "nope"]):
        result = CliRunner().invoke(cli, ["images", *command])
        assert (result.exit_code, result.stdout) == (125, "")
        assert result.stderr.startswith("aiokvm: no image is called 'nope'; there are: cloud,")


def test_pull_prints_paths_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def pull(name: str, *, progress: Callable[[Progress], None], refresh: bool) -> Path:
        if name == "generic":
            raise ImageError("the network is down")
        assert refresh
        progress(Progress(name, "index"))
        for done in (0, 5_000_000, 9_000_000):
            progress(Progress(name, "download", done, 9_000_000))
        return tmp_path / name

    monkeypatch.setattr(images, "pull", pull)
    result = CliRunner().invoke(cli, ["images", "pull", "--refresh", "cloud", "generic"])
    assert result.exit_code == 125
    assert result.stdout == f"{tmp_path / 'cloud'}\n"
    assert result.stderr.splitlines() == [
        "aiokvm: cloud: asking Debian for its package list",
        "aiokvm: cloud: downloading 9.0 MB",
        "aiokvm: the network is down",
    ]


def test_keys_need_not_be_text(tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_bytes(b"\xff\x1b\n")
    result = CliRunner().invoke(cli, ["images", "build", "debian", "--authorized-keys", str(key)])
    assert result.exit_code == 125
    assert "authorized_keys has a line that is no public key" in result.output
