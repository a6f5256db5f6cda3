"""A machine of a program without privileges has every network but a TAP device that has to be made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from aiokvm._core import lib

pytestmark = pytest.mark.kvm

PROGRAM = """
import re, socket, sys
import anyio
from aiokvm import VM, ConfigError, boot, net

EXIT_42 = boot.Flat(bytes.fromhex("b0 2a e6 f4 f4"))  # mov al, 42; out 0xf4, al; hlt
with open("/proc/self/status") as status:
    assert int(re.search(r"CapEff:\\s*(\\w+)", status.read())[1], 16) == 0

async def answer(stream):
    await stream.send(b"hello")

async def main():
    stream, _there = socket.socketpair()
    datagram, _peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with net.Switch("lan") as switch:
        await switch.connect(net.User())
        user = net.User(forward={"127.0.0.1:0": 80}, services={("10.0.2.100", 80): answer})
        filters = [*net.essentials(), net.deny()]
        nets = [
            user,
            net.Stream(stream, filters=filters),
            net.Datagram(fd=datagram),
            net.Nic(net.Port(), dataplane="thread"),
            switch.port(),
        ]
        async with await VM.create(boot=EXIT_42, memory="2M", nets=nets) as vm:
            port = user.forwards[0].port
            (await anyio.to_thread.run_sync(socket.create_connection, ("127.0.0.1", port))).close()
            assert all(nic.is_up for nic in vm.nets)
            await vm.start()
            assert (await vm.wait()).code == 42
        try:
            await VM.create(boot=EXIT_42, memory="2M", nets=[net.Tap()])
        except ConfigError as error:
            print(error)
    for one in (stream, _there, datagram, _peer):
        one.close()

options = {"use_uvloop": True} if sys.argv[1] == "uvloop" else {}
anyio.run(main, backend="trio" if sys.argv[1] == "trio" else "asyncio", backend_options=options)
"""


@pytest.mark.skipif(not lib.aiokvm_net_slirp_built(), reason="built without libslirp")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_all_networks_but_a_tap_to_be_made(loop: str) -> None:
    argv = [sys.executable, "-W", "error", "-c", PROGRAM, loop]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv: util-linux has it")
        # Else root would have its capabilities back as soon as it runs a program.
        argv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *argv]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "ip tuntap add" in result.stdout
