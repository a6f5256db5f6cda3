"""Comparing ways to do one job on a machine whose speed drifts.

A lab, or a rented machine, is twice as fast in one minute as in the next. So the contenders of a job take
turns, A B A B, and what counts is the ratio within each pair, not that of two averages: whatever was slow for
one was slow for the other. A figure is the median of the pairs' ratios, with the quartiles that say how far
to believe it. The drift, how much one contender's own figures differ, says what the machine did meanwhile.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    Measure = Callable[[], Awaitable[Mapping[str, float]]]
    # By contender, by figure, a value a pair.
    Measured = dict[str, dict[str, list[float]]]

PAIRS = 5


async def alternate(contenders: Mapping[str, Measure], pairs: int = PAIRS) -> Measured:
    """Let the contenders do one job in turns, ``pairs`` times each.

    A contender is a function that does the job once and gives its figures by name.
    """
    measured: Measured = {name: {} for name in contenders}
    for _ in range(pairs):
        for name, measure in contenders.items():
            for figure, value in (await measure()).items():
                measured[name].setdefault(figure, []).append(value)
    return measured


@dataclass(frozen=True)
class Ratio:
    """The ratios of pairs: their median, their quartiles, and how many there are."""

    median: float
    low: float
    high: float
    pairs: int

    def __format__(self, spec: str) -> str:
        median, low, high = (format(value, spec or ".2f") for value in (self.median, self.low, self.high))
        return f"{median} ({low}-{high})"

    def __str__(self) -> str:
        return format(self)


def compare(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """``a`` divided by ``b``, pair by pair."""
    ratios = [one / other for one, other in zip(a, b, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0], 1)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high, len(ratios))


def drift(values: Sequence[float]) -> float:
    """The largest by the smallest of one contender's figures: 1 on a machine of steady speed."""
    return max(values) / min(values)


def caption(pairs: int) -> str:
    """What stands beneath a table of ratios."""
    text = f"medians of {pairs} pairs, in turns; in brackets the quartiles of the pairs' ratios"
    return text if pairs >= PAIRS else f"{text}; fewer than {PAIRS} pairs say nothing"
