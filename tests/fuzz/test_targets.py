"""What was found before, seeds, and as many mutations of them as there is time for in every run."""

from __future__ import annotations

import logging
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from tests import holdups
from tests.fuzz.targets import ASGI_SEEDS, TARGETS, Meter, answered, found, mutate

if TYPE_CHECKING:
    from collections.abc import Iterator

each = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(autouse=True)
def own_garbage() -> Iterator[None]:
    """Each call is measured: what thousands of other tests have left is not collected in one of them."""
    with holdups.own_garbage():
        yield


def inputs(name: str) -> list[bytes]:
    return [*TARGETS[name].seeds, *found(name)]


@each
def test_what_is_known_does_no_harm(name: str) -> None:
    for data in inputs(name):
        TARGETS[name].check(data)


@each
def test_mutations_do_no_harm(name: str) -> None:
    chance = random.Random(name)
    known = inputs(name)
    for _ in range(TARGETS[name].mutations):
        TARGETS[name].check(mutate(chance.choice(known), chance))


@each
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


def test_the_application_is_reached() -> None:
    before = logging.getLogger("aiokvm.net").level
    statuses = [answered(seed, Meter()).split(b" ", 2)[1] for seed in ASGI_SEEDS[:4]]
    assert statuses == [b"200", b"200", b"200", b"501"]
    assert answered(ASGI_SEEDS[0], Meter()).endswith(b"\r\n\r\nabc")
    assert logging.getLogger("aiokvm.net").level == before
