from __future__ import annotations

import base64
import hashlib
import random
import time
from typing import TYPE_CHECKING

import anyio
import pytest

if TYPE_CHECKING:
    from tests.linux.conftest import Guest

pytestmark = [pytest.mark.linux, pytest.mark.anyio]


async def test_a_paste_loses_nothing(guest: Guest) -> None:
    text = base64.encodebytes(random.Random(2).randbytes(18 << 10))
    await guest.vm.serial.send(b"cat >/tmp/paste\n" + text + b"\x04")
    await guest.finished(600)
    assert (await guest.run("md5sum </tmp/paste")).split()[0] == hashlib.md5(text).hexdigest()


async def test_output_is_what_was_written(guest: Guest, blob: bytes) -> None:
    serial = guest.vm.serial
    await serial.send(b"stty raw; cat /blob; stty -raw\n")
    output = bytearray()
    with anyio.fail_after(600):
        while len(output) < len(blob):
            output += await serial.read(len(blob) - len(output))
    assert output == blob
    assert await guest.finished() == ""
    assert serial.dropped == 0


async def test_second_port(guest: Guest) -> None:
    await guest.run("stty -F /dev/ttyS1 raw -echo; exec 3<>/dev/ttyS1")
    port = guest.vm.serial_ports[1]
    await port.send(b"ping\n")
    await guest.run('read -r x <&3; echo "$x pong" >&3')
    assert await port.expect(b"\n", 60) == b"ping pong\n"
    await guest.run("exec 3>&-")


async def test_pause(guest: Guest) -> None:
    vm = guest.vm
    await vm.serial.send(b"while :; do echo tick; usleep 10000; done & sleep 1; true\n")
    await guest.finished()
    await vm.serial.expect(b"tick\n", 60)
    await vm.pause()
    while True:
        with anyio.move_on_after(1) as scope:
            await vm.serial.read()
        if scope.cancelled_caught:
            break
    before = time.time()
    await vm.resume()
    await vm.serial.expect(b"tick\n", 60)
    await vm.serial.send(b"kill $!; wait\n")
    await guest.finished()
    assert abs(int(await guest.run("date +%s")) - before) < 60
    assert await guest.troubles() == []
