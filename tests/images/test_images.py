from __future__ import annotations

import fcntl
import json
import lzma
import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import images
from aiokvm.errors import ImageError
from aiokvm.images.initramfs import base_archive, modules_archive
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.images.conftest import Repository

# apt itself runs in these tests; one loop is enough for those that do not wait or cancel.
one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])


def cached() -> set[str]:
    root = Path(os.environ["AIOKVM_CACHE"])
    assert not list(root.glob(".work-*"))
    return {path.name for path in root.glob("images/*")}


def own_children() -> set[str]:
    names = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


def test_catalogue_names_what_can_be_booted() -> None:
    listed = {image.name: image for image in images.catalogue()}
    assert list(listed) == [
        *("cloud", "cloud-elf", "generic", "generic-elf", "i386-pae", "i386"),
        *("initramfs", "initramfs-generic", "initramfs-i386-pae", "initramfs-i386"),
    ]
    for image in listed.values():
        if image.kind in ("kernel", "elf"):
            initramfs = images.find(image.initramfs)
            assert initramfs.architecture == image.architecture
            kernel = image.name.removesuffix("-elf")
            assert images.find(initramfs.parts[1]).parts == (kernel,)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ImageError, match=r"no image is called 'could'; there are: cloud, cloud-elf, generic"):
        images.path("could")


@pytest.mark.anyio
@one_loop
async def test_pull_verifies_and_caches(repository: Repository) -> None:
    assert images.path("cloud") is None
    told: list[images.Progress] = []
    path = await images.pull("cloud", progress=told.append)
    assert path.read_bytes() == b"kernel"
    assert images.path("cloud") == path
    stored = {"cloud", "cloud-modules", "intel-lab-modules"}
    assert cached() == stored | {f"{name}.json" for name in stored}
    record = json.loads(path.with_name("cloud.json").read_text())
    assert record["package"] == "linux-image-6.1-cloud-amd64"
    assert record["version"] == "6.1"
    assert list(dict.fromkeys(progress.stage for progress in told)) == ["index", "download", "unpack"]
    last = [progress for progress in told if progress.stage == "download"][-1]
    assert (
        last.done_bytes
        == last.total_bytes
        == (repository.root / "linux-image-6.1-cloud-amd64_6.1_amd64.deb").stat().st_size
    )
    again: list[images.Progress] = []
    assert await images.pull("cloud", progress=again.append) == path
    assert again == []


@pytest.mark.anyio
@one_loop
async def test_initramfs_is_busybox_and_the_modules_of_its_kernel(repository: Repository) -> None:
    path = await images.pull("initramfs")
    modules = modules_archive("6.1-cloud-amd64", {"button.ko": b"button"})
    assert path.read_bytes() == cpio.join(base_archive(b"busybox", "amd64"), modules)


@pytest.mark.anyio
@one_loop
async def test_modules_are_taken_compressed_too(repository: Repository) -> None:
    packed = {"drivers/input/evdev.ko.xz": lzma.compress(b"evdev"), "drivers/other.ko.xz": b"not looked at"}
    repository.add_kernel("6.2", modules=packed)
    repository.publish()
    path = await images.pull("cloud-modules")
    assert path.read_bytes() == modules_archive("6.2-cloud-amd64", {"evdev.ko": b"evdev"})


@pytest.mark.anyio
@one_loop
async def test_refresh_takes_a_newer_version_and_rebuilds_on_it(repository: Repository) -> None:
    old = (await images.pull("initramfs")).read_bytes()
    repository.add_kernel("6.10", b"newer kernel", {"drivers/acpi/button.ko": b"newer"})
    repository.publish()
    assert (await images.pull("cloud")).read_bytes() == b"kernel"
    assert (await images.pull("cloud", refresh=True)).read_bytes() == b"newer kernel"
    new = (await images.pull("initramfs")).read_bytes()
    assert new != old
    assert b"lib/modules/6.10-cloud-amd64/button.ko" in new
    told: list[images.Progress] = []
    await images.pull("cloud", refresh=True, progress=told.append)
    assert {progress.stage for progress in told} == {"index"}


@pytest.mark.anyio
@one_loop
async def test_a_package_gone_from_the_archive_makes_the_index_new(repository: Repository) -> None:
    await images.pull("busybox")
    for deb in repository.root.glob("linux-image-*"):
        deb.unlink()
    repository.index = {name: text for name, text in repository.index.items() if "linux" not in name}
    repository.add_kernel("6.3", b"of today")
    repository.publish()
    assert (await images.pull("cloud")).read_bytes() == b"of today"


@pytest.mark.anyio
@one_loop
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"kernex"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_name("cloud.json").write_text('{"package": "linu'),
        lambda path: path.with_name("cloud.json").write_text("[]"),
        lambda path: path.with_name("cloud.json").unlink(),
    ],
    ids=["changed", "empty", "missing", "record cut off", "record of another shape", "no record"],
)
async def test_a_damaged_cache_is_fetched_again(
    repository: Repository, damage: Callable[[Path], object]
) -> None:
    damage(await images.pull("cloud"))
    told: list[images.Progress] = []
    path = await images.pull("cloud", progress=told.append)
    assert path.read_bytes() == b"kernel"
    assert "download" in {progress.stage for progress in told}


@pytest.mark.anyio
@one_loop
async def test_damaged_package_is_refused(repository: Repository) -> None:
    deb = repository.root / "linux-image-6.1-cloud-amd64_6.1_amd64.deb"
    content = bytearray(deb.read_bytes())
    content[-1] ^= 1
    deb.write_bytes(content)
    with pytest.raises(ImageError, match="Hash Sum mismatch"):
        await images.pull("cloud")
    assert cached() == set()


@pytest.mark.anyio
@one_loop
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds \[\] where one file was looked for"),
        ({"boot/vmlinuz-1": b"a", "boot/vmlinuz-2": b"b"}, "where one file was looked for"),
    ],
)
async def test_package_without_its_one_kernel_is_refused(
    repository: Repository, files: dict[str, bytes], message: str
) -> None:
    repository.add("linux-image-cloud-amd64", "9", {}, "linux-image-9 (= 9)")
    repository.add("linux-image-9", "9", files)
    repository.publish()
    with pytest.raises(ImageError, match=message):
        await images.pull("cloud")
    assert cached() == set()


@pytest.mark.anyio
@one_loop
async def test_package_that_no_source_has(repository: Repository) -> None:
    with pytest.raises(ImageError, match="no linux-image-amd64 for amd64"):
        await images.pull("generic")


@pytest.mark.anyio
@one_loop
async def test_cache_that_cannot_be_written(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKVM_CACHE", str(repository.root / "Packages"))
    with pytest.raises(ImageError, match="set AIOKVM_CACHE to a directory that you may write to"):
        await images.pull("cloud")


@pytest.mark.anyio
@pytest.mark.parametrize("stage", ["index", "download", "unpack"])
async def test_cancelled_pull_leaves_no_file_and_no_process(repository: Repository, stage: str) -> None:
    before = own_children()
    with anyio.CancelScope() as scope:

        def progress(progress: images.Progress) -> None:
            if progress.stage == stage:
                scope.cancel()

        await images.pull("cloud", progress=progress)
    assert scope.cancelled_caught
    assert cached() == set()
    assert own_children() == before
    assert (await images.pull("cloud")).read_bytes() == b"kernel"


@pytest.mark.anyio
async def test_two_pulls_at_once_fetch_once(repository: Repository) -> None:
    told: list[images.Progress] = []

    async def pull() -> None:
        assert (await images.pull("cloud", progress=told.append)).read_bytes() == b"kernel"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pull)
        tasks.start_soon(pull)
    stages = [progress.stage for progress in told]
    assert stages.count("wait") == 1
    assert stages.count("unpack") == 1


@pytest.mark.anyio
async def test_waiting_for_another_process_can_be_cancelled(repository: Repository) -> None:
    lock = os.path.join(os.environ["AIOKVM_CACHE"], "lock")
    os.mkdir(os.path.dirname(lock))
    with open(lock, "w") as other:  # noqa: ASYNC230
        fcntl.flock(other, fcntl.LOCK_EX)
        with anyio.CancelScope() as scope:
            await images.pull("cloud", progress=lambda _: scope.cancel())
        assert scope.cancelled_caught
    assert (await images.pull("cloud")).read_bytes() == b"kernel"


@pytest.mark.anyio
@one_loop
async def test_what_a_killed_process_left_is_cleared(repository: Repository) -> None:
    leftover = Path(os.environ["AIOKVM_CACHE"]) / ".work-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.deb").write_bytes(b"half")
    await images.pull("cloud")
    assert not leftover.exists()


@pytest.mark.anyio
@one_loop
async def test_unsigned_source_is_refused(
    repository: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = tmp_path / "sources.list"
    sources.write_text(sources.read_text().replace("[trusted=yes] ", ""))
    with pytest.raises(ImageError, match="check the network and the files in /etc/apt"):
        await images.pull("busybox")
    assert "is not signed" in caplog.text or "does not have a Release file" in caplog.text


@pytest.mark.anyio
@one_loop
async def test_hooks_of_the_machine_are_not_run(repository: Repository, tmp_path: Path) -> None:
    trace = tmp_path / "hook-ran"
    with (tmp_path / "apt.conf").open("a") as config:
        for hook in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success"):
            config.write(f'APT::Update::{hook} {{ "touch {trace}"; }};\n')
    await images.pull("busybox")
    assert not trace.exists()
