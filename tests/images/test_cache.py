from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aiokvm.images.cache import default_root

if TYPE_CHECKING:
    import pytest


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("AIOKVM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path("/home/u/.cache/aiokvm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_root() == Path("/x/aiokvm")
    monkeypatch.setenv("AIOKVM_CACHE", "/a")
    assert default_root() == Path("/a")
