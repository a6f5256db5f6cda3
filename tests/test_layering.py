"""Who may import whom: the architecture, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "aiokvm"

# Each part, and the parts that it may import; `text` and `arguments` all of them.
MAY_IMPORT = {
    "text": set(),
    "arguments": {"errors"},
    "errors": set(),
    "size": {"errors"},
    "memory": {"_core", "errors"},
    "ratelimit": {"_core", "errors"},
    "budget": {"_core"},
    "logs": {"budget", "ratelimit"},
    "kvm": {"_core", "errors"},
    "aio": {"errors", "logs"},
    "process": {"aio"},
    "hw": {"errors"},
    "boot": {"errors"},
    "proto": {"errors"},
    "virtio": {"_core", "errors", "hw", "memory"},
    "block": {"_core", "aio", "budget", "errors", "logs", "process", "proto", "ratelimit"},
    "net": {"_core", "aio", "budget", "errors", "logs", "process", "proto", "ratelimit"},
    "machine": {
        *("_core", "aio", "block", "boot", "budget", "errors", "hw", "kvm", "logs", "memory", "net", "proto"),
        *("ratelimit", "size", "virtio"),
    },
    "images": {"boot", "errors", "process", "proto"},
    "lab": {"errors", "images", "process", "proto"},
    "cli": {
        *("", "aio", "block", "boot", "errors", "images", "kvm", "lab", "machine", "net", "process", "proto"),
        "size",
    },
    "__main__": {"cli"},
    "metrics": {""},
    "": {"aio", "block", "boot", "errors", "kvm", "machine", "memory", "net", "virtio"},
}
# Register models and parsers: a test drives them with no loop, no clock and no kernel.
MODELS = {"hw", "boot", "proto", "virtio"}
NOT_IN_MODELS = {
    *(
        "asyncio",
        "trio",
        "anyio",
        "uvloop",
        "socket",
        "selectors",
        "select",
        "threading",
        "subprocess",
        "signal",
    ),
    *("time", "random", "secrets", "ctypes", "fcntl", "mmap", "multiprocessing", "concurrent"),
}
LOOPS = {"asyncio", "trio", "uvloop"}


def part_of(file: Path) -> str:
    name = file.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if name == "__init__" else name


def imports(file: Path) -> set[str]:
    """The modules that a file imports, as full names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            # "from aiokvm import kvm" imports aiokvm.kvm.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(file: Path) -> None:
    part = part_of(file)
    allowed = MAY_IMPORT[part] | {part, "text", "arguments"}
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "aiokvm":
            other = rest.split(".")[0]
            if other not in MAY_IMPORT:
                other = "_core" if other == "_core" else ""
            assert other in allowed, f"{part or 'aiokvm'} may not import {name}"
        if part in MODELS:
            assert top not in NOT_IN_MODELS, f"a model may not import {name}"
        if part != "aio":
            assert top not in LOOPS, f"only aio names the loop, not {name}"


def test_every_part_has_its_rule() -> None:
    assert {part_of(file) for file in FILES} <= set(MAY_IMPORT)


def test_the_public_exports_are_there() -> None:
    import aiokvm

    assert len(set(aiokvm.__all__)) == len(aiokvm.__all__)
    for name in aiokvm.__all__:
        assert getattr(aiokvm, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = aiokvm.no_such_name


def test_importing_aiokvm_has_no_side_effects_and_takes_no_loop() -> None:
    program = (
        "import sys, threading, os, signal\n"
        "before = os.listdir('/proc/self/fd'), [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "import aiokvm\n"
        "after = os.listdir('/proc/self/fd'), [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "assert before == after and threading.active_count() == 1\n"
        "assert not {'trio', 'uvloop', 'anyio', 'rich', 'click'} & set(sys.modules), set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
