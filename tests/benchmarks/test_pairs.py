"""Comparisons in turns."""

from __future__ import annotations

import pytest

from bench import pairs

pytestmark = pytest.mark.anyio


async def test_contenders_take_turns_and_each_figure_is_kept_pair_by_pair() -> None:
    ran: list[str] = []

    def contender(name: str) -> pairs.Measure:
        async def measure() -> dict[str, float]:
            ran.append(name)
            return {"rate": float(len(ran)), "lag": 1.0}

        return measure

    measured = await pairs.alternate({"A": contender("A"), "B": contender("B")})
    assert ran == ["A", "B"] * 5
    assert measured["A"] == {"rate": [1, 3, 5, 7, 9], "lag": [1] * 5}
    assert measured["B"]["rate"] == [2, 4, 6, 8, 10]


def test_a_machine_that_grows_slower_changes_the_drift_and_not_the_ratio() -> None:
    theirs = [10.0, 11.0, 14.0, 20.0, 20.0]
    ratio = pairs.compare([value / 2 for value in theirs], theirs)
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (0.5, 0.5, 0.5, 5)
    assert pairs.drift(theirs) == 2.0


def test_the_spread_is_told_with_the_median() -> None:
    assert str(pairs.compare([1, 2, 3, 4, 5], [2, 2, 2, 2, 2])) == "1.50 (1.00-2.00)"
    assert str(pairs.compare([3], [2])) == "1.50 (1.50-1.50)"


def test_too_few_pairs_are_called_so() -> None:
    assert "say nothing" in pairs.caption(4)
    assert "say nothing" not in pairs.caption(5)
