from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from aiokvm import images
from aiokvm.errors import ImageError
from aiokvm.images import bochs, debian

if TYPE_CHECKING:
    from pathlib import Path

    from tests.images.conftest import Repository

# apt and a compiler's stand-in run in these tests; nothing in them waits.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

CONFIGURE = "#!/bin/sh\necho $* >options\n"
MAKEFILE = "bochs:\n\t@echo g++ -c a.cc\n\t@echo g++ -c b.cc\n\tcat cpu/vmx.cc >$@\n"


def tree(**changed: str) -> dict[str, str]:
    """Return the files of a source that is like Bochs' where it is corrected."""
    files: dict[str, str] = {}
    for path, old, _ in bochs.CORRECTIONS:
        files[path] = files.get(path, "// \u00e9\n") + old + "\n"
    return files | {"configure": CONFIGURE, "Makefile": MAKEFILE} | changed


@pytest.fixture
def sources(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Give the archive with packages the source package of Bochs, on this machine's mirror."""

    async def mirror(apt: debian.Apt, suite: str) -> list[str]:
        assert suite == bochs.SUITE
        return [f"deb-src [trusted=yes] copy:{repository.root} ./"]

    monkeypatch.setattr(debian.Apt, "mirror", mirror)
    return repository


def publish(sources: Repository, files: dict[str, str], version: str = "3.0") -> Path:
    tarball = sources.add_source("bochs", version, files)
    sources.publish()
    return tarball


async def test_it_is_fetched_corrected_and_compiled_once(sources: Repository) -> None:
    publish(sources, tree())
    told: list[images.Progress] = []
    program = await images.pull("bochs", progress=told.append)
    assert program.stat().st_mode & stat.S_IXUSR
    text = program.read_text()
    for path, old, new in bochs.CORRECTIONS:
        if path == "cpu/vmx.cc":
            assert new in text
            assert old not in text.replace(new, "")
    assert "\u00e9" in text
    stages = list(dict.fromkeys(progress.stage for progress in told))
    assert stages == ["index", "download", "unpack", "build"]
    assert [(p.done_files, p.total_files) for p in told if p.total_files] == [(1, 2), (2, 2)]
    again: list[images.Progress] = []
    assert await images.pull("bochs", progress=again.append) == program
    assert again == []


async def test_refresh_builds_a_newer_version_only(sources: Repository) -> None:
    publish(sources, tree())
    await images.pull("bochs")
    told: list[images.Progress] = []
    await images.pull("bochs", refresh=True, progress=told.append)
    assert {progress.stage for progress in told} == {"index"}
    sources.sources.clear()
    publish(sources, tree(Makefile=MAKEFILE + "\techo newer >>$@\n"), "3.1")
    assert (await images.pull("bochs", refresh=True)).read_text().endswith("newer\n")


async def test_one_of_another_recipe_is_built_anew(
    sources: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(sources, tree())
    await images.pull("bochs")
    monkeypatch.setattr(bochs, "RECIPE", "of tomorrow")
    told: list[images.Progress] = []
    await images.pull("bochs", progress=told.append)
    assert "build" in {progress.stage for progress in told}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"configure": "echo no compiler >&2; exit 1"}, r"sh failed with status 1: no compiler$"),
        (
            {"Makefile": "bochs:\n\techo vmx.cc:7: error >&2; exit 1\n"},
            r"make failed with status 2: vmx.cc:7: error",
        ),
        ({"cpu/vmx.cc": "other"}, r"Bochs 3.0-1 is not what the corrections are for: cpu/vmx.cc lacks 'if"),
        ({"Makefile": "bochs:\n\ttrue\n"}, "no program"),
    ],
)
async def test_a_build_that_fails_says_why(
    changed: dict[str, str], message: str, sources: Repository, tmp_path: Path
) -> None:
    publish(sources, tree(**changed))
    with pytest.raises(ImageError) as caught:
        await images.pull("bochs")
    caught.match(message)
    assert images.path("bochs") is None
    assert not list((tmp_path / "cache").glob(".work-*"))


async def test_a_build_that_takes_too_long_is_ended(
    sources: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(sources, tree(configure="sleep 1000"))
    monkeypatch.setattr(bochs, "LIMIT_S", 0.2)
    with pytest.raises(ImageError, match="was not built within 0 s"):
        await images.pull("bochs")


async def test_a_damaged_tarball_is_refused(sources: Repository) -> None:
    tarball = publish(sources, tree())
    content = bytearray(tarball.read_bytes())
    content[-1] ^= 1
    tarball.write_bytes(content)
    with pytest.raises(ImageError, match="Hash Sum mismatch"):
        await images.pull("bochs")


async def test_a_suite_without_it(sources: Repository) -> None:
    sources.publish()
    with pytest.raises(ImageError, match="there is no source package bochs"):
        await images.pull("bochs")


async def test_a_machine_without_a_mirror_of_debian(repository: Repository) -> None:
    with pytest.raises(ImageError, match="no mirror of Debian, where trixie would be"):
        await images.pull("bochs")


async def test_the_tarball_is_checked_against_the_index(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    source = debian.Source("bochs", "3", "f", 3, "1234")
    with pytest.raises(ImageError, match="the signed index says 1234"):
        debian.check_digest(tmp_path / "f", source)
    with pytest.raises(ImageError, match="bochs 3 was not downloaded"):
        debian.check_digest(tmp_path / "g", source)
