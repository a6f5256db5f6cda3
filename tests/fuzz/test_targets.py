"""What was found before, seeds, and as many mutations of them as there is time for in every run."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from tests.fuzz.targets import TARGETS, found, mutate

pytestmark = pytest.mark.parametrize("name", TARGETS)


def inputs(name: str) -> list[bytes]:
    return [*TARGETS[name].seeds, *found(name)]


def test_what_is_known_does_no_harm(name: str) -> None:
    for data in inputs(name):
        TARGETS[name].check(data)


def test_mutations_do_no_harm(name: str) -> None:
    chance = random.Random(name)
    known = inputs(name)
    for _ in range(TARGETS[name].mutations):
        TARGETS[name].check(mutate(chance.choice(known), chance))


def test_memory_is_bounded(name: str) -> None:
    chance = random.Random(f"{name}, again")
    known = inputs(name)
    for data in (*known, *(mutate(chance.choice(known), chance) for _ in range(20))):
        tracemalloc.start()
        try:
            TARGETS[name].check(data, limit_s=10)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < TARGETS[name].memory_bytes + 4 * len(data)
