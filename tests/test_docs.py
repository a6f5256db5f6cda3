"""What docs/ says is so: its programs print what it shows, the reference is up to date, the options exist."""

from __future__ import annotations

import doctest
import importlib
import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from aiokvm.cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CLI = (DOCS / "cli.md").read_text()

# Documents whose every program is followed by what it prints.
GUIDES = ("tutorial", "boot", "devices", "networking", "threading", "cancellation", "observability", "hosts")
# Language and content of each fenced block, in order.
BLOCKS = {
    guide: re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / f"{guide}.md").read_text(), re.MULTILINE | re.DOTALL)
    for guide in GUIDES
}
MODULE = re.compile(r"# (\w+)\.py\n")
MODULES = {
    guide: {match[1]: text for _, text in blocks if (match := MODULE.match(text))}
    for guide, blocks in BLOCKS.items()
}


def mark_of(program: str) -> pytest.MarkDecorator:
    """What it needs."""
    if "images.pull" in program:
        return pytest.mark.linux
    return pytest.mark.lab if "lab.run" in program else pytest.mark.kvm


PROGRAMS = [
    pytest.param(
        guide,
        program,
        output,
        marks=mark_of(program),
        id=f"{guide}-{number}",
    )
    for guide, blocks in BLOCKS.items()
    for number, ((language, program), (following, output)) in enumerate(itertools.pairwise(blocks))
    if language == "python" and following == "text"
]


def test_every_program_shows_its_output() -> None:
    there = [language for blocks in BLOCKS.values() for language, _ in blocks if language == "python"]
    assert len(PROGRAMS) + sum(map(len, MODULES.values())) == len(there)


@pytest.mark.parametrize(("guide", "program", "output"), PROGRAMS)
def test_a_program_prints_what_is_shown(guide: str, program: str, output: str, tmp_path: Path) -> None:
    for name, text in MODULES[guide].items():
        (tmp_path / f"{name}.py").write_text(text)
    path = tmp_path / "program.py"
    path.write_text(program)
    # A guest that does not end would hang a program in this process.
    result = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60 if mark_of(program) == pytest.mark.kvm else 300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert doctest.OutputChecker().check_output(output, result.stdout, doctest.ELLIPSIS), result.stdout


def test_the_reference_is_up_to_date() -> None:
    written = subprocess.run([sys.executable, ROOT / "tools/api-reference"], capture_output=True, check=True)
    assert (DOCS / "api.md").read_bytes() == written.stdout, "run make docs"


def test_what_the_reference_hides_is_there() -> None:
    """A name in the list of what is not for programs, and nowhere else, is a mistake."""
    tool = runpy.run_path(str(ROOT / "tools/api-reference"))
    reference = tool["Reference"]()
    for name, hidden in tool["NOT_FOR_PROGRAMS"].items():
        (item,) = (
            item for section in reference.sections.values() for _, item in section if item.name == name
        )
        there = {member.name for member in tool["members"](item)} | {"__init__"}
        assert set(hidden.split()) <= there, name


@pytest.mark.parametrize("document", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_to_a_heading(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
        text = (document.parent / target if target else document).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs or f'<a id="{anchor}">' in text, f"{target}#{anchor}"


ARCHITECTURE = (DOCS / "architecture.md").read_text()
LIMITS = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", ARCHITECTURE.partition("\n## Limits")[2], re.MULTILINE)


@pytest.mark.parametrize(("name", "value"), LIMITS)
def test_a_limit_has_the_value_that_is_told(name: str, value: str) -> None:
    module, _, constant = name.rpartition(".")
    if module:
        assert getattr(importlib.import_module(module), constant) == eval(value)
    else:
        core = "".join(path.read_text() for path in sorted((ROOT / "aiokvm/_core").glob("*.[ch]")))
        assert re.search(rf"\b{constant}\b\s*=?\s*\(?{re.escape(value)}\b", core)


def test_who_may_import_whom_is_what_is_enforced() -> None:
    table = ARCHITECTURE.partition("\n## Who may import whom")[2].partition("\n## ")[0]
    told = {}
    for part, others in re.findall(r"^\| (`.*?) \|(.*?)\|$", table, re.MULTILINE):
        name, *rest = re.findall(r"`(\w+)`", part + others)
        told[name] = set(rest)
    rules = runpy.run_path(str(ROOT / "tests/test_layering.py"))["MAY_IMPORT"]
    assert told == {part or "aiokvm": {other or "aiokvm" for other in may} for part, may in rules.items()}


def test_the_tree_is_there() -> None:
    tree = ARCHITECTURE.partition("\n    aiokvm/\n")[2].partition("\n    tests/")[0]
    parent = ROOT / "aiokvm"
    for indent, name in re.findall(r"^ {6}( *)([\w./]+)", tree, re.MULTILINE):
        path = (parent if indent else ROOT / "aiokvm") / name
        assert path.exists(), path
        parent = path if name.endswith("/") else parent


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands(cli, "aiokvm"))


def documented(command: str) -> str:
    """The section about a command, up to the next heading."""
    match = re.search(rf"^##+ {command}$(.*?)(?=^##|\Z)", CLI, re.MULTILINE | re.DOTALL)
    assert match, f"cli.md has no section about {command}"
    return match[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_the_command(command: str) -> None:
    rows = re.findall(r"^\| (`-.*?) \|", documented(command), re.MULTILINE)
    told = {option for row in rows for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row)}
    there = {
        option
        for parameter in COMMANDS[command].params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for option in parameter.opts
    }
    assert told == there


def test_no_section_is_about_a_command_that_is_not_there() -> None:
    assert set(re.findall(r"^##+ (aiokvm \w.*)$", CLI, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", ["aiokvm run", "aiokvm lab"])
def test_the_exit_statuses_are_those_of_the_help(command: str) -> None:
    shown = COMMANDS[command].get_help(click.Context(COMMANDS[command], info_name=command))
    table = shown.partition("Exit status:")[2]
    there = re.findall(r"^ +([\d-]+|128 \+ N)  ", table, re.MULTILINE)
    assert there
    assert re.findall(r"^\| (\d[\d+N -]*?) \|", documented(command), re.MULTILINE) == there


def test_the_tests_that_virtio_md_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.(?:py|c))::(\w+)`", (DOCS / "virtio.md").read_text())
    assert named
    for file, test in named:
        assert re.search(rf"(?:def |TEST\(){test}\(?\b", (ROOT / file).read_text()), f"{file}::{test}"


def test_every_demand_of_virtio_md_names_a_test() -> None:
    for line in (DOCS / "virtio.md").read_text().splitlines():
        if line.startswith("|") and re.search(r"\bMUST\b", line):
            assert "`tests/" in line, line


def test_the_loggers_are_those_that_are_told() -> None:
    section = (DOCS / "observability.md").read_text().partition("\n## Logging")[2].partition("```")[0]
    there = {
        name
        for path in (ROOT / "aiokvm").rglob("*.py")
        for name in re.findall(r'get_logger\("([\w.]+)"\)', path.read_text())
    }
    assert set(re.findall(r"`(aiokvm\.\w+)`", section)) == there
