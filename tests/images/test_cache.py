from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiokvm import ImageError
from aiokvm.images.cache import default_root


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("AIOKVM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path("/home/u/.cache/aiokvm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_root() == Path("/x/aiokvm")
    monkeypatch.setenv("AIOKVM_CACHE", "/a")
    assert default_root() == Path("/a")


def test_a_user_without_a_home_has_no_cache_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "AIOKVM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # Nobody has named this one.
    monkeypatch.setattr(os, "getuid", lambda: 0x7FFF_FFFE)
    with pytest.raises(ImageError, match="no home directory for the cache: set AIOKVM_CACHE"):
        default_root()
