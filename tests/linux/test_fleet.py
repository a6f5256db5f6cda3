"""Several Linux guests on one switch, as examples/fleet.py has them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

EXAMPLE = Path(__file__).parents[2] / "examples/fleet.py"


async def test_a_fleet_gets_what_it_may_and_the_proxy_knows_who_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    log = await example["main"]()
    allowed, refused = example["wanted"](example["ALLOWED"])
    guests = [f"guest{index}" for index in range(1, example["GUESTS"] + 1)]
    expected = [*((guest, allowed, 200) for guest in guests), *((guest, refused, 403) for guest in guests)]
    assert sorted(log) == sorted(expected)
    output = capsys.readouterr().out
    for guest in guests:
        assert f"{guest}: this is news.example" in output
        assert f"{guest}: {refused}: refused" in output
