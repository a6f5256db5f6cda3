"""What the README shows works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def programs(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.linux
def test_the_first_program_runs() -> None:
    program, *_ = programs(ROOT / "README.md")
    assert len([line for line in program.splitlines() if line]) <= 15
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Linux (none) 6.")  # no escape sequence of its shell
    assert "\n2\n" in result.stdout
    assert "ExitReason.SHUTDOWN" in result.stdout


def test_a_program_that_finds_the_sources_is_told_what_to_do() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import aiokvm"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last == (
        f"ImportError: {ROOT / 'aiokvm'} has aiokvm's sources, which are not compiled: "
        "run the program from another folder, or by python -P"
    )


@pytest.mark.kvm
def test_the_device_answers() -> None:
    _, program, *_ = programs(ROOT / "README.md")
    assert len([line for line in program.splitlines() if line]) <= 12
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "21\n", "")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_programs_compile(document: Path) -> None:
    for program in programs(document):
        compile(program, str(document), "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT
