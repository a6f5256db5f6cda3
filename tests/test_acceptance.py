from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

TOOL: dict[str, Any] = runpy.run_path(str(Path(__file__).parent.parent / "tools/acceptance"))
A, B, C = "tests/a.py::test_a[x]", "tests/a.py::test_a[x y]", "tests/a.py::test_c"
SAID = f"""\
collecting ... collected 3 items

{A} PASSED [ 33%]
{B} FAILED [ 66%]
{C} SKIPPED (no such thing) [100%]
FAILED {B} - assert 0
""".encode()


@pytest.mark.parametrize("size", [1, 7, len(SAID)])
def test_outcomes_are_read_from_what_pytest_writes(size: int) -> None:
    report = TOOL["Report"]([A, B, C])
    for start in range(0, len(SAID), size):
        report.feed(SAID[start : start + size])
    assert report.outcomes == {A: "passed", B: "failed", C: "skipped"}
    assert report.running is None


@pytest.mark.parametrize("after", ["", "Timeout (0:10:00)!\nThread 1 (most recent call first):\n"])
def test_the_test_that_was_running_when_the_lab_ended_is_known(after: str) -> None:
    report = TOOL["Report"]([A, B, C])
    report.feed(f"{A} PASSED [ 33%]\n{B} {after}".encode())
    assert report.outcomes == {A: "passed"}
    assert report.running == B


def test_what_a_test_writes_itself_does_not_hide_its_outcome() -> None:
    report = TOOL["Report"]([A, B, C])
    report.feed(f"{A} a word\nanother PASSED [ 33%]\r\n".encode())
    assert report.outcomes == {A: "passed"}


def test_a_test_that_fails_when_it_is_taken_down_has_failed() -> None:
    report = TOOL["Report"]([A, B, C])
    report.feed(f"{A} PASSED [ 33%]\n{A} ERROR [ 33%]\n{B} ERROR [ 66%]\n".encode())
    assert report.outcomes == {A: "failed", B: "failed"}


def test_what_has_passed_is_kept_for_the_same_state(tmp_path: Path) -> None:
    file = tmp_path / "acceptance.json"
    record = TOOL["Record"](file, "state")
    result = record.rounds["amd"] = TOOL["Results"]({A: "passed", B: "failed"}, 2.0)
    record.save()
    assert TOOL["Record"](file, "another").rounds == {}
    assert TOOL["Record"](file, "state", again=["amd"]).rounds == {}
    assert TOOL["Record"](file, "state", again=["intel"]).rounds == {"amd": result}


def test_a_round_has_the_tests_that_are_there_now() -> None:
    result = TOOL["Results"]({A: "passed", "tests/gone.py::test": "failed"})
    result.expect([A, B, C], ["tests/a.py::test_c"])
    assert result.tests == {A: "passed", B: "left", C: "excluded"}
    assert result.named("left", "excluded") == [B, C]


def test_the_table_tells_of_each_round_what_did_not_pass(tmp_path: Path) -> None:
    record = TOOL["Record"](tmp_path / "acceptance.json", "state")
    record.rounds["amd-linux"] = TOOL["Results"]({A: "passed"}, 1.6)
    record.rounds["amd"] = TOOL["Results"]({A: "passed", B: "failed", C: "hung"}, 12.0)
    head, amd, linux, *below = record.table().splitlines()
    assert head.split() == ["round", "passed", "failed", "hung", "skipped", "excluded", "left", "CPU", "s"]
    assert amd.split() == ["amd", "1", "1", "1", "0", "0", "0", "12"]
    assert linux.split() == ["amd-linux", "1", "0", "0", "0", "0", "0", "2"]
    assert below == [f"amd: failed: {B}", f"amd: hung: {C}"]


def test_what_is_excluded_is_there() -> None:
    """An exclusion of nothing is a mistake."""
    for name, this in TOOL["ROUNDS"].items():
        if this.excluded:
            tests = TOOL["collected"](this.tests)
            for beginning in this.excluded:
                assert any(test.startswith(beginning) for test in tests), f"{name}: {beginning}"
