"""proto/overlay.py: which clusters an overlay has. Its file is tested by tests/block/test_overlay.py."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.proto.overlay import CLUSTER_BYTES, CLUSTERS_MAX, PAGE_BYTES, Bitmap, Layout

if TYPE_CHECKING:
    from tests.holdups import Step

CLUSTER = CLUSTER_BYTES[0]
# More than what is looked at in one go, which is 64 KiB of bits.
CLUSTERS = (1 << 20) + 77
AT = st.one_of(
    st.integers(0, CLUSTERS),
    # Where bytes, pages and what is looked at in one go begin and end.
    st.tuples(st.sampled_from([8, 8 * PAGE_BYTES, 1 << 19]), st.integers(0, 3), st.integers(-9, 9)).map(
        lambda at: min(max(at[0] * at[1] + at[2], 0), CLUSTERS)
    ),
)


@given(st.lists(st.tuples(AT, AT, st.booleans()), max_size=8), AT, AT)
def test_runs_are_what_was_set(changes: list[tuple[int, int, bool]], a: int, b: int) -> None:
    bitmap = Bitmap(Layout(CLUSTERS * CLUSTER, CLUSTER))
    edges = sorted({0, CLUSTERS, *(at for change in changes for at in change[:2])})
    has = dict.fromkeys(edges, False)
    for one, other, value in changes:
        start, end = sorted((one, other))
        bitmap.set(start, end, value)
        for edge in edges:
            if start <= edge < end:
                has[edge] = value
    start, end = sorted((a, b))
    model: list[tuple[int, int, bool]] = []
    for edge, following in pairwise(edges):
        first, last = max(edge, start), min(following, end)
        if first >= last:
            continue
        if model and model[-1][2] == has[edge]:
            model[-1] = (model[-1][0], last, has[edge])
        else:
            model.append((first, last, has[edge]))
    assert list(bitmap.runs(start, end)) == model
    nexts = [max(first, start) for first, last, here in bitmap.runs(0, CLUSTERS) if here and last > start]
    assert bitmap.next(start) == (nexts[0] if nexts else None)


def test_pages_that_have_changed_come_in_runs() -> None:
    bitmap = Bitmap(Layout(CLUSTERS * CLUSTER, CLUSTER))
    page = 8 * PAGE_BYTES
    bitmap.set(page - 1, 3 * page + 1)
    bitmap.set(7 * page, 7 * page + 1)
    runs = bitmap.take_dirty(3)
    assert runs == [range(3), range(3, 4), range(7, 8)]
    assert not bitmap.dirty
    assert bitmap.pages(runs[0]) == (bytes(PAGE_BYTES - 1) + b"\x80" + b"\xff" * (2 * PAGE_BYTES))
    assert bitmap.pages(runs[2]) == b"\1" + bytes(PAGE_BYTES - 1)


@pytest.mark.parametrize("value", [False, True])
def test_the_largest_overlay_is_walked_in_no_time(value: bool, step: Step) -> None:
    bitmap = Bitmap(Layout(CLUSTERS_MAX * CLUSTER, CLUSTER))
    bitmap.set(0, CLUSTERS_MAX, value)
    with step():
        assert list(bitmap.runs(0, CLUSTERS_MAX)) == [(0, CLUSTERS_MAX, value)]
    with step():
        assert bitmap.next(0) == (0 if value else None)
