"""Real builds: Debian's packages come from its mirrors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiokvm.errors import ImageError
from aiokvm.images import disk

# Those that make keys or a database when they are installed, too.
PACKAGES = ("openssh-server", "postfix", "python3-minimal", "ssl-cert")
PROGRAM = """
import anyio, json, os, sys
from aiokvm import images

os.umask(int(sys.argv[1], 8))
built = anyio.run(lambda: images.build_debian(packages=sys.argv[2:], files={"/etc/motd": "hello"}))
print(json.dumps([str(file) for file in built.files]))
"""


def why_not() -> str:
    if os.environ.get("LAB"):
        return "the lab has no network"
    try:
        disk.check_host()
    except ImageError as error:
        return str(error)
    return ""


def build(cache: Path, umask: str, **environment: str) -> list[str]:
    argv = [sys.executable, "-c", PROGRAM, umask, *PACKAGES]
    env = os.environ | {"AIOKVM_CACHE": str(cache), **environment}
    result = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    digests = []
    for file in map(Path, json.loads(result.stdout)):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        file.unlink()
    return digests


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_builds_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    first = build(tmp_path / "one", "022")
    # By another user's habits, in another place.
    other = build(
        tmp_path / "another place", "077", TZ="Asia/Tokyo", LANG="de_DE.UTF-8", TMPDIR=str(tmp_path)
    )
    assert other == first
