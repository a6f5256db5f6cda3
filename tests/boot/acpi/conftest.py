from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

Iasl = Callable[[bytes], str]


@pytest.fixture
def iasl(tmp_path: Path) -> Iasl:
    """Disassembles a table, compiles the result, expects the same bytes back, returns the ASL."""
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed (Debian package acpica-tools)")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["iasl", *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def roundtrip(table: bytes) -> str:
        (tmp_path / "table.aml").write_bytes(table)
        output = run("-d", "table.aml")
        source = (tmp_path / "table.dsl").read_text()
        for text in output, source:
            assert "error" not in text.lower()
            assert "warning" not in text.lower()
            assert "invalid" not in text.lower()
            assert "unknown" not in text.lower()

        output = run("-oa", "-p", "again", "table.dsl")
        assert "Compilation successful. 0 Errors, 0 Warnings, 0 Remarks" in output
        again = (tmp_path / "again.aml").read_bytes()
        if table[:4] == b"FACS":
            assert again == table
        else:
            # The compiler puts its own name into the header: creator id and revision, and so the checksum.
            assert again[:9] == table[:9]
            assert again[10:28] == table[10:28]
            assert again[36:] == table[36:]
        return source

    return roundtrip
