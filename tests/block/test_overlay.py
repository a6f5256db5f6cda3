from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokvm import ConfigError, ImageError
from aiokvm.aio import current_loop
from aiokvm.block import Overlay
from aiokvm.block import overlay as module
from aiokvm.block.file import File
from aiokvm.proto import overlay as proto

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.block.backend import Data

CLUSTER = 4096
# The last cluster is partial.
SIZE = 9 * CLUSTER + 1024
BLOCKS = SIZE // 512
BASE = bytes(random.Random(1).randbytes(SIZE))

pytestmark = pytest.mark.anyio

RANGES = st.integers(0, BLOCKS - 1).flatmap(
    lambda at: st.tuples(st.just(at * 512), st.integers(1, BLOCKS - at).map(lambda n: n * 512))
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["read", "write", "zeroes", "unmap", "discard"]), RANGES),
        st.tuples(st.sampled_from(["flush", "reopen", "commit", "drop"]), st.just((0, 0))),
    ),
    max_size=25,
)
SAME_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def pattern(number: int, length: int) -> bytes:
    return (number % 255 + 1).to_bytes(2, "little") * (length // 2)


class Model:
    """What a disk holds after each step; a discarded block may hold zeroes or what it held."""

    def __init__(self) -> None:
        self.base = bytearray(BASE)
        self.now = bytearray(BASE)

    def check(self, data: Any, offset: int) -> None:
        assert bytes(data) == self.now[offset : offset + len(data)]


async def step(overlay: Overlay, model: Model, number: int, what: str, offset: int, length: int) -> None:
    end = offset + length
    if what == "read":
        model.check(await overlay.read(offset, length), offset)
    elif what == "write":
        model.now[offset:end] = pattern(number, length)
        await overlay.write(offset, memoryview(pattern(number, length)))
    elif what in ("zeroes", "unmap"):
        model.now[offset:end] = bytes(length)
        await overlay.write_zeroes(offset, length, unmap=what == "unmap")
    elif what == "discard":
        await overlay.discard(offset, length)
        data = bytes(await overlay.read(offset, length))
        for at in range(0, length, 512):
            block = data[at : at + 512]
            assert block in (bytes(512), model.now[offset + at : offset + at + 512])
        model.now[offset:end] = data
    elif what == "flush":
        await overlay.flush()
    elif what == "commit":
        await overlay.commit()
        model.base[:] = model.now
    elif what == "drop":
        await overlay.discard_changes()
        model.now[:] = model.base


@pytest.mark.parametrize("in_file", [True, False])
def test_any_sequence_of_requests_is_as_on_a_disk_of_bytes(
    in_file: bool, memory_disk: Any, run: Callable[..., None]
) -> None:
    @SAME_FIXTURE
    @given(STEPS)
    def check(steps: list[tuple[str, tuple[int, int]]]) -> None:
        async def main() -> None:
            base, model = memory_disk(BASE), Model()
            overlay = Overlay(base, Path(directory) / "overlay" if in_file else None, cluster_bytes=CLUSTER)
            await overlay.open()
            for number, (what, (offset, length)) in enumerate(steps):
                if what != "reopen":
                    await step(overlay, model, number, what, offset, length)
                elif in_file:
                    await overlay.flush()
                    await overlay.close()
                    overlay = Overlay(base, Path(directory) / "overlay")
                    await overlay.open()
                assert base.data == model.base
            model.check(await overlay.read(0, SIZE), 0)
            await overlay.close()
            assert not base.opened

        with TemporaryDirectory() as directory:
            run(main)

    check()


class Recorder(File):
    """Records what reaches the file, so that a crash can forget what no sync has covered."""

    log: list[tuple[str, int, bytes]]

    async def write(self, offset: int, *parts: Data) -> None:
        self.log.append(("write", offset, b"".join(parts)))
        await super().write(offset, *parts)

    async def zero(self, offset: int, length: int) -> None:
        self.log.append(("write", offset, bytes(length)))
        await super().zero(offset, length)

    async def free(self, offset: int, length: int) -> None:
        await self.zero(offset, length)

    async def sync(self) -> None:
        await super().sync()
        self.log.append(("sync", 0, b""))


@given(STEPS, st.randoms(use_true_random=False))
@settings(SAME_FIXTURE, max_examples=40)
def test_a_crash_loses_only_what_no_flush_has_covered(
    memory_disk: Any,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[str, tuple[int, int]]],
    chance: random.Random,
) -> None:
    log: list[tuple[str, int, bytes]] = []
    # For each length of the log, what each block may hold from there on.
    may: list[tuple[int, list[set[bytes]]]] = []
    monkeypatch.setattr(Recorder, "log", log, raising=False)
    monkeypatch.setattr(module, "File", Recorder)
    bases: list[tuple[int, bytes]] = []

    def blocks(content: bytes | bytearray) -> list[bytes]:
        return [bytes(content[at : at + 512]) for at in range(0, SIZE, 512)]

    async def main() -> None:
        base, model = memory_disk(BASE), Model()
        allowed = [{block} for block in blocks(model.now)]
        overlay = Overlay(base, path, cluster_bytes=CLUSTER)
        async with overlay:
            begin.append(path.read_bytes())
            may.append((0, [set(one) for one in allowed]))
            bases.append((0, bytes(base.data)))
            for number, (what, (offset, length)) in enumerate(steps):
                if what == "reopen":
                    continue
                before = len(log)
                await step(overlay, model, number, what, offset, length)
                for held, block in zip(allowed, blocks(model.now), strict=True):
                    held.add(block)
                # During the step anything before or after it is right; a base is not forgotten here.
                may.append((before, [set(one) for one in allowed]))
                bases.append((before, bytes(base.data)))
                if what in ("flush", "commit", "drop"):
                    allowed = [{block} for block in blocks(model.now)]
                    may.append((len(log), [set(one) for one in allowed]))

    with TemporaryDirectory() as directory:
        path = Path(directory) / "overlay"
        begin: list[bytes] = []
        anyio.run(main)

        async def crash_at(crash: int) -> None:
            synced = max((at for at in range(crash) if log[at][0] == "sync"), default=-1)
            file = bytearray(begin[0])
            for at, (what, offset, written) in enumerate(log[:crash]):
                if what == "write" and (at < synced or chance.random() < 0.5):
                    file[offset : offset + len(written)] = written
            path.write_bytes(file)
            # The step that was under way when it crashed, and the base that it may have moved on.
            allowed = [one for at, one in may if at <= crash][-1]
            held = memory_disk([content for at, content in bases if at <= crash][-1])
            async with Overlay(held, path) as overlay:
                for block, ok in zip(blocks(bytes(await overlay.read(0, SIZE))), allowed, strict=True):
                    assert block in ok

        async def crashes() -> None:
            points = range(len(log) + 1)
            for crash in chance.sample(points, min(len(points), 30)):
                await crash_at(crash)

        anyio.run(crashes)


async def test_writes_to_one_cluster_at_once_copy_it_once(memory_disk: Any) -> None:
    base = memory_disk(BASE)
    async with Overlay(base, cluster_bytes=1 << 16) as overlay:
        async with anyio.create_task_group() as tasks:
            for at in range(0, SIZE, 1024):
                tasks.start_soon(overlay.write, at, memoryview(pattern(at, 512)))
        expected = bytearray(BASE)
        for at in range(0, SIZE, 1024):
            expected[at : at + 512] = pattern(at, 512)
        assert bytes(await overlay.read(0, SIZE)) == expected
        # One cluster: what is before and behind the first write, once, is all that was read.
        assert [what for what, _, _ in base.asked].count("read") <= 2
    assert base.data == BASE


async def test_a_write_whose_base_fails_leaves_the_old_contents(memory_disk: Any, raises_errno: Any) -> None:
    base = memory_disk(BASE)
    async with Overlay(base, cluster_bytes=CLUSTER) as overlay:
        base.fail = {"read"}
        with raises_errno(errno.EIO):
            await overlay.write(512, memoryview(bytes(512)))
        await overlay.write(CLUSTER, memoryview(bytes(CLUSTER)))  # needs nothing of the base
        base.fail = set()
        assert await overlay.read(0, CLUSTER) == BASE[:CLUSTER]
        await overlay.write(512, memoryview(bytes(512)))
        assert await overlay.read(512, 512) == bytes(512)


async def test_a_cancelled_write_lets_others_have_its_cluster(memory_disk: Any) -> None:
    base = memory_disk(BASE)
    async with Overlay(base, cluster_bytes=CLUSTER) as overlay:
        base.hold["read"] = anyio.Event()
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as first:
                first.start_soon(overlay.write, 512, memoryview(pattern(1, 512)))
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(overlay.write, 1024, memoryview(pattern(2, 512)))
                await anyio.wait_all_tasks_blocked()
                first.cancel_scope.cancel()
            base.hold.pop("read").set()
        assert await overlay.read(0, 2048) == BASE[:1024] + pattern(2, 512) + BASE[1536:2048]


async def test_commit_goes_on_beside_writes_and_empties_the_overlay(
    memory_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMIT_BYTES", CLUSTER)
    base = memory_disk(BASE)
    async with Overlay(base, tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        await overlay.write(0, memoryview(pattern(1, SIZE)))
        base.hold["flush"] = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(overlay.commit)
            while ("flush", 0, 0) not in base.asked:
                await anyio.wait_all_tasks_blocked()
            # All is moved, nothing yet durable: a write in between is a change again, and stays one.
            await overlay.write(512, memoryview(pattern(2, 512)))
            base.hold.pop("flush").set()
        assert base.data == pattern(1, SIZE)
        assert bytes(await overlay.read(0, 2048)) == (pattern(1, 512) + pattern(2, 512) + pattern(1, 1024))
        await overlay.commit()
        await overlay.flush()
        assert bytes(base.data[512:1024]) == pattern(2, 512)
        assert overlay._bitmap.next(0) is None


async def test_the_base_is_flushed_before_the_file_forgets_what_it_has(
    memory_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int, bytes]] = []
    monkeypatch.setattr(Recorder, "log", log, raising=False)
    monkeypatch.setattr(module, "File", Recorder)
    base = memory_disk(BASE)
    flush = base.flush

    async def recorded_flush() -> None:
        await flush()
        log.append(("base", 0, b""))

    monkeypatch.setattr(base, "flush", recorded_flush)
    async with Overlay(base, tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        await overlay.write(0, memoryview(pattern(1, CLUSTER)))
        await overlay.flush()
        log.clear()
        await overlay.commit()
    # The base, the data, the bitmap, and only then the space is given back.
    assert [what for what, _, _ in log] == ["base", "sync", "write", "sync", "write"]


async def test_dropped_changes_are_forgotten_by_an_empty_bitmap_that_is_safe_first(
    memory_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int, bytes]] = []
    monkeypatch.setattr(Recorder, "log", log, raising=False)
    monkeypatch.setattr(module, "File", Recorder)
    async with Overlay(memory_disk(BASE), tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        await overlay.discard_changes()
    data = proto.Layout(SIZE, CLUSTER).data_offset
    assert [(what, offset) for what, offset, _ in log] == [
        *(("write", 8192), ("sync", 0), ("write", 0), ("sync", 0), ("write", data))
    ]


async def test_a_base_that_cannot_be_written_takes_no_commit(memory_disk: Any, raises_errno: Any) -> None:
    base = memory_disk(BASE)
    async with Overlay(base) as overlay:
        base.readonly = True
        await overlay.write(0, memoryview(pattern(1, 512)))
        with raises_errno(errno.EROFS):
            await overlay.commit()
        await overlay.discard_changes()
        assert await overlay.read(0, 512) == BASE[:512]


async def test_a_commit_that_fails_loses_nothing(memory_disk: Any, tmp_path: Path, raises_errno: Any) -> None:
    base = memory_disk(BASE)
    async with Overlay(base, tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        await overlay.write(0, memoryview(pattern(1, SIZE)))
        for what in ("write", "flush"):
            base.fail = {what}
            with raises_errno(errno.EIO):
                await overlay.commit()
            assert bytes(await overlay.read(0, SIZE)) == pattern(1, SIZE)
        base.fail = set()
        await overlay.commit()
    assert base.data == pattern(1, SIZE)


async def test_memory_is_bounded_and_what_is_discarded_given_back(
    memory_disk: Any, raises_errno: Any
) -> None:
    base = memory_disk(bytes(64 * CLUSTER))
    async with Overlay(base, cluster_bytes=CLUSTER, memory_bytes=8 * CLUSTER) as overlay:
        await overlay.write(0, memoryview(pattern(1, 8 * CLUSTER)))
        with raises_errno(errno.ENOSPC):
            await overlay.write(8 * CLUSTER, memoryview(pattern(2, CLUSTER)))
        assert await overlay.read(8 * CLUSTER, CLUSTER) == bytes(CLUSTER)
        await overlay.discard(0, 4 * CLUSTER)
        await overlay.write(8 * CLUSTER, memoryview(pattern(2, CLUSTER)))
        await overlay.discard(0, 64 * CLUSTER)  # holes take nothing
        await overlay.write(0, memoryview(pattern(3, 8 * CLUSTER)))


async def test_a_failed_sync_is_never_forgotten(
    memory_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises_errno: Any
) -> None:
    async with Overlay(memory_disk(BASE), tmp_path / "overlay") as overlay:
        await overlay.write(0, memoryview(pattern(1, 512)))

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "the disk is gone")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fail)
            with raises_errno(errno.EIO):
                await overlay.flush()
        with raises_errno(errno.EIO):
            await overlay.flush()
        assert await overlay.read(0, 512) == pattern(1, 512)


async def test_two_cannot_have_one_file(memory_disk: Any, tmp_path: Path) -> None:
    async with Overlay(memory_disk(BASE), tmp_path / "overlay"):
        other = memory_disk(BASE)
        with pytest.raises(ImageError, match="locked"):
            await Overlay(other, tmp_path / "overlay").open()
        assert not other.opened
    async with Overlay(memory_disk(BASE), tmp_path / "overlay"):
        pass


async def test_a_file_that_was_being_made_when_its_maker_was_stopped_is_made(
    memory_disk: Any, tmp_path: Path
) -> None:
    path = tmp_path / "overlay"
    path.write_bytes(proto.Layout(SIZE, 1 << 16).pack())
    async with Overlay(memory_disk(BASE), path) as overlay:
        assert bytes(await overlay.read(0, SIZE)) == BASE
    assert path.stat().st_size == proto.Layout(SIZE, 1 << 16).file_bytes
    path.write_bytes(b"")
    async with Overlay(memory_disk(BASE), path, cluster_bytes=8192):
        pass
    # It keeps its clusters' size.
    async with Overlay(memory_disk(BASE), path) as overlay:
        assert overlay.discard_granularity_bytes == 8192


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: b"\0" * 4096, "no overlay"),
        (lambda file: b"QFI\xfb" + file[4:], "no overlay"),
        (lambda file: file[:100], "no overlay"),
        (lambda file: file[:8] + b"\x02" + file[9:], "version 2"),
        (lambda file: file[:12] + b"\x01" + file[13:], "checksum"),
        (lambda file: file[:100] + b"\x01" + file[101:], "checksum"),
        (lambda file: file[:-512], "bytes instead of"),
        (lambda file: file + bytes(512), "bytes instead of"),
        (lambda file: file[:4097] + b"\xff" + file[4098:], "behind the disk's end"),
        (lambda file: proto.Layout(SIZE + 512, 4096).pack() + file[4096:], "its base has"),
    ],
)
async def test_a_file_that_is_no_overlay_of_this_base_is_refused_and_left_alone(
    damage: Callable[[bytes], bytes], message: str, memory_disk: Any, tmp_path: Path
) -> None:
    path = tmp_path / "overlay"
    async with Overlay(memory_disk(BASE), path, cluster_bytes=CLUSTER):
        pass
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    base = memory_disk(BASE)
    with pytest.raises(ImageError, match=message):
        await Overlay(base, path).open()
    assert path.read_bytes() == damaged
    assert not base.opened


async def test_a_file_that_is_cut_short_under_it_gives_errors(
    memory_disk: Any, tmp_path: Path, raises_errno: Any
) -> None:
    async with Overlay(memory_disk(BASE), tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        await overlay.write(0, memoryview(pattern(1, SIZE)))
        os.truncate(tmp_path / "overlay", 4096)
        with raises_errno(errno.EIO):
            await overlay.read(0, 512)


async def test_closing_waits_for_what_runs_and_refuses_what_comes(
    memory_disk: Any, raises_errno: Any
) -> None:
    base = memory_disk(BASE)
    overlay = Overlay(base)
    await overlay.open()
    with raises_errno(errno.EBUSY):
        await overlay.open()
    base.hold["read"] = anyio.Event()
    read: list[Any] = []

    async def reads() -> None:
        read.append(await overlay.read(0, 512))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reads)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(overlay.close)
        await anyio.wait_all_tasks_blocked()
        assert not read
        assert base.opened
        base.hold.pop("read").set()
    assert read == [BASE[:512]]
    assert not base.opened
    with raises_errno(errno.EBADF):
        await overlay.read(0, 512)
    await overlay.close()


async def test_requests_that_are_not_whole_blocks_inside_are_refused(
    memory_disk: Any, raises_errno: Any
) -> None:
    async with Overlay(memory_disk(BASE)) as overlay:
        for offset, length in ((0, 0), (1, 512), (0, 100), (SIZE, 512), (-512, 512), (0, SIZE + 512)):
            with raises_errno(errno.EINVAL):
                await overlay.read(offset, length)


def test_arguments_that_make_no_sense_are_refused(memory_disk: Any) -> None:
    for cluster_bytes in (512, 5000, 4 << 20):
        with pytest.raises(ConfigError):
            Overlay(memory_disk(BASE), cluster_bytes=cluster_bytes)
    with pytest.raises(ConfigError):
        Overlay(memory_disk(BASE), memory_bytes=100)


async def test_overlays_stand_on_each_other(memory_disk: Any, tmp_path: Path) -> None:
    base = memory_disk(BASE)
    lower = Overlay(base, tmp_path / "lower", cluster_bytes=CLUSTER)
    async with Overlay(lower) as upper:
        await upper.write(512, memoryview(pattern(1, 512)))
        await upper.commit()
        assert base.data == BASE
        await lower.commit()
    assert bytes(base.data[512:1024]) == pattern(1, 512)


async def test_memory_is_not_exceeded_by_writes_at_once(memory_disk: Any) -> None:
    most, each = 4 << 20, 1 << 20
    written: list[int] = []
    failed: list[int | None] = []
    async with Overlay(memory_disk(bytes(16 << 20)), memory_bytes=most) as overlay:

        async def write(at: int) -> None:
            try:
                await overlay.write(at, memoryview(b"x" * each))
            except OSError as error:
                failed.append(error.errno)
            else:
                written.append(at)

        async with anyio.create_task_group() as tasks:
            for at in range(0, 16 << 20, each):
                tasks.start_soon(write, at)
        assert (len(written), failed) == (4, [errno.ENOSPC] * 12)
        for at in range(0, 16 << 20, each):
            assert await overlay.read(at, 512) == (b"x" if at in written else b"\0") * 512


async def test_changes_are_dropped_wholly_or_not_at_all_when_that_is_cancelled(
    memory_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, reached, go_on = File.write, anyio.Event(), anyio.Event()

    async def held(file: File, offset: int, *parts: bytes) -> None:
        await write(file, offset, *parts)
        if offset == 0:
            reached.set()
            await go_on.wait()

    base = memory_disk(BASE)
    async with Overlay(base, tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        await overlay.write(0, memoryview(pattern(1, CLUSTER)))
        await overlay.flush()
        with monkeypatch.context() as patch:
            patch.setattr(File, "write", held)
            dropping = current_loop().spawn(overlay.discard_changes, "dropping")
            await reached.wait()
            dropping.cancel()
            for _ in range(5):
                await current_loop().turn()
            go_on.set()
            await dropping.wait()
        await overlay.write(CLUSTER, memoryview(pattern(2, CLUSTER)))
        await overlay.flush()
        now = bytes(await overlay.read(0, SIZE))
    async with Overlay(base, tmp_path / "overlay", cluster_bytes=CLUSTER) as overlay:
        assert bytes(await overlay.read(0, SIZE)) == now
        assert now == BASE[:CLUSTER] + pattern(2, CLUSTER) + BASE[2 * CLUSTER :]
