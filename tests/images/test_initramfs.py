from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import images
from aiokvm.errors import ConfigError
from aiokvm.images.initramfs import base_archive, command_archive, command_line, modules_archive
from aiokvm.proto import cpio

WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.binary(max_size=20).filter(lambda word: b"\0" not in word).map(os.fsdecode),
    st.sampled_from(["", "-n", "A=b", "if", "$HOME", "`id`", "a'b", '"', "\\", "*", "~", "\n", "!", "# c"]),
)


@given(st.lists(WORDS, max_size=6))
def test_shell_passes_every_word_on_unchanged(words: list[str]) -> None:
    script = command_line(["printf", "[%s]", *words])
    shell = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert shell.stdout == (b"".join(b"[%b]" % os.fsencode(word) for word in words) or b"[]")


@pytest.mark.parametrize("word", ["FOO=bar", "if", "{"])
def test_first_word_is_always_a_program(word: str) -> None:
    shell = subprocess.run(["sh", "-c", command_line([word])], capture_output=True, check=False)
    assert shell.returncode == 127


def test_what_cannot_be_a_command() -> None:
    with pytest.raises(ConfigError, match="the command has no words"):
        command_archive([])
    with pytest.raises(ConfigError, match="cannot be passed to a program: surrogates"):
        command_archive(["\ud800"])
    with pytest.raises(ConfigError, match="holds a NUL"):
        command_archive(["a", "b\0c"])


def test_command_archive_replaces_nothing_else() -> None:
    expected = [cpio.directory("aiokvm"), cpio.file("aiokvm/command", b"'echo' 'it'\\''s'\n")]
    assert command_archive(["echo", "it's"]) == cpio.archive(expected)


def test_modules_lie_where_init_looks() -> None:
    archive = modules_archive("6.1-x", {"evdev.ko": b"code"})
    parents = [cpio.directory(name) for name in ("lib", "lib/modules", "lib/modules/6.1-x")]
    assert archive == cpio.archive([*parents, cpio.file("lib/modules/6.1-x/evdev.ko", b"code")])


def test_init_script_is_in_the_archive_and_parses() -> None:
    archive = base_archive(b"busybox", "amd64")
    start = archive.index(b"#!/bin/busybox sh")
    script = archive[start : archive.index(b"poweroff -f\n", start)]
    assert subprocess.run(["sh", "-n"], input=script + b"poweroff -f\n", check=False).returncode == 0


@pytest.mark.lab
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("kernel", ["cloud", "i386"])
@pytest.mark.skipif("LAB" in os.environ, reason="an emulator in the lab is too slow")
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86")
async def test_command_in_a_guest(kernel: str, tmp_path: os.PathLike[str]) -> None:
    image = await images.pull(kernel)
    initramfs = await images.pull(images.find(kernel).initramfs)
    command = command_archive(["sh", "-c", 'echo "[$0]"; lsmod; exit 77', "it's"])
    initrd = os.path.join(tmp_path, "initrd")
    with open(initrd, "wb") as stream:  # noqa: ASYNC230
        stream.write(cpio.join(initramfs.read_bytes(), command))
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-nographic"]
    argv += ["-no-reboot", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
    argv += ["-kernel", str(image), "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1"]
    guest = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)  # noqa: ASYNC221
    console = guest.stdout.decode(errors="replace")
    # QEMU ends with (value << 1) | 1.
    assert guest.returncode == (77 << 1) | 1, console
    assert "aiokvm: init " in console
    assert "[it's]\r\n" in console
    assert "button " in console
    assert "evdev " in console
