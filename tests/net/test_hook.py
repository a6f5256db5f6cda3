"""net/hook.py: the program decides about flows."""

from __future__ import annotations

import gc
import ipaddress
import logging
import socket
import sys
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError, net
from tests.net.packets import LAST, ethernet, icmp, pass_last, passing, tcp, udp

pytestmark = pytest.mark.anyio
Linked = Any
A, B, B6 = "10.0.0.1", "192.168.7.9", "fd02::2"


class Gate:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.flows: list[net.Flow] = []
        self.asked = anyio.Event()
        self.open = anyio.Event()
        self.answer = True

    async def __call__(self, flow: net.Flow) -> bool:
        self.flows.append(flow)
        self.asked.set()
        await self.open.wait()
        return self.answer


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"decide": None}, "decide=None: give a function"),
        ({"decide": bool, "direction": "up"}, "direction='up': give 'egress' or 'ingress' or None"),
        ({"decide": bool, "timeout": 0}, "timeout is a number of seconds above 0"),
    ],
)
def test_hooks_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        net.Hook(**arguments)


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_the_first_frame_waits_for_the_answer(linked: Linked, thread: str | None) -> None:
    gate = Gate()
    here = net.Port(filters=[net.Hook(gate, direction="egress"), pass_last, net.deny()])
    guest = net.Port()
    out, back = tcp(A, 1000, B, 80, b"first"), tcp(B, 80, A, 1000)
    async with linked(here, guest, thread=thread):
        assert await passing(guest, here, [out, out, ethernet(0x0806, b"")]) == []
        await gate.asked.wait()
        assert await passing(here, guest, [back]) == []
        gate.open.set()
        assert bytes(await anext(here)) == out
        assert await passing(here, guest, [back]) == [back]
        assert await passing(guest, here, [out]) == [out]
    assert gate.flows == [
        net.Flow("egress", "tcp", ipaddress.ip_address(A), ipaddress.ip_address(B), 1000, 80, out)
    ]
    assert guest.stats().dropped_filtered == 2
    assert guest.stats().sent_frames == 4


# Writes the frames of its standard input to a descriptor, for ever.
FLOOD = """
import socket, sys
frames, peer = sys.stdin.buffer.read(), socket.socket(fileno=int(sys.argv[1]))
try:
    while True:
        peer.sendall(frames)
except OSError:
    pass
"""


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_a_flood_of_flows_does_not_hold_the_loop(linked: Linked, thread: str | None) -> None:
    asked = 0
    enough = anyio.Event()

    def decide(_flow: net.Flow) -> bool:
        nonlocal asked
        asked += 1
        if asked == 5000:
            enough.set()
        return False

    def frames() -> bytes:
        flows = [udp(f"10.1.{host}.1", port, B, 53) for host in range(8) for port in range(1, 8000)]
        return b"".join(len(flow).to_bytes(4) + flow for flow in flows)

    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", FLOOD, str(theirs.fileno())]
    flood = await anyio.open_process(command, pass_fds=[theirs.fileno()])
    with ours, theirs:
        assert flood.stdin
        await flood.stdin.send(await anyio.to_thread.run_sync(frames))
        await flood.stdin.aclose()
        guest, here = net.Stream(ours), net.Port(filters=[net.Hook(decide)])
        async with linked(here, guest, thread=thread):
            await enough.wait()
        flood.kill()
        await flood.aclose()
    assert guest.stats().dropped_filtered > 5000


async def swallow(peer: socket.socket) -> None:
    while True:
        await anyio.wait_readable(peer)
        for _ in range(64):
            try:
                peer.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_first_frames_that_are_cut_do_not_hold_the_loop(linked: Linked, thread: str | None) -> None:
    """What was asked about is sent by the loop, whoever moves the other frames."""
    asked = 0
    enough = anyio.Event()

    def decide(_flow: net.Flow) -> bool:
        nonlocal asked
        asked += 1
        if asked == 500:
            enough.set()
        return True

    def frames(host: int) -> list[net.Frame]:
        flows = [tcp(f"10.1.{host}.1", port, B, 80, bytes(1400)) for port in range(1, 129)]
        return [
            net.Frame(flow, needs_csum=True, csum_start=34, csum_offset=16, gso_type=1, gso_size=10)
            for flow in flows
        ]

    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with ours, theirs:
        here = net.Datagram(fd=ours, filters=[net.Hook(decide)])
        guest = net.Port(offload=True)
        async with linked(guest, here, thread=thread), anyio.create_task_group() as group:
            group.start_soon(swallow, theirs)
            for host in range(200):
                await guest.send(frames(host))
                await anyio.lowlevel.checkpoint()
                if enough.is_set():
                    break
            await enough.wait()
            group.cancel_scope.cancel()


async def test_plain_functions_and_all_kinds_of_flows(linked: Linked) -> None:
    flows: list[net.Flow] = []

    def decide(flow: net.Flow) -> bool:
        flows.append(flow)
        return flow.dst_port != 25

    here, guest = net.Port(filters=[net.Hook(decide)]), net.Port()
    sent = [udp("fd01::1", 1, B6, 53), tcp(A, 1, B, 25), icmp(A, B, 8), tcp(A, 1, B, 26)]
    async with linked(here, guest):
        await guest.send(sent)
        got = [bytes(await anext(here)) for _ in range(3)]
        assert got == [sent[0], sent[2], sent[3]]
        assert await passing(guest, here, [sent[1]]) == []
        # The other side may begin too.
        await here.send(udp(B, 1, A, 2))
        await anext(guest)
    assert [(flow.protocol, flow.src_port, flow.dst_port) for flow in flows] == [
        ("udp", 1, 53),
        ("tcp", 1, 25),
        ("icmp", None, None),
        ("tcp", 1, 26),
        ("udp", 1, 2),
    ]
    assert [flow.direction for flow in flows] == ["egress"] * 4 + ["ingress"]


async def test_who_raises_has_denied(linked: Linked, caplog: pytest.LogCaptureFixture) -> None:
    async def later(flow: net.Flow) -> bool:
        await anyio.lowlevel.checkpoint()
        raise RuntimeError("later")

    def decide(flow: net.Flow) -> Any:
        if flow.dst_port == 1:
            raise RuntimeError("at once")
        if flow.dst_port == 2:
            return later(flow)
        return "yes" if flow.dst_port == 3 else True

    here, guest = net.Port(filters=[net.Hook(decide)]), net.Port()
    async with linked(here, guest):
        await guest.send([tcp(A, 9, B, port) for port in range(1, 5)])
        assert bytes(await anext(here)) == tcp(A, 9, B, 4)
        while len(caplog.records) < 2:
            await anyio.lowlevel.checkpoint()
        assert await passing(guest, here, [tcp(A, 9, B, port) for port in range(1, 4)]) == []
    assert [
        record.exc_info[1].args[0] for record in caplog.records if record.exc_info and record.exc_info[1]
    ] == [
        "at once",
        "later",
    ]
    assert "egress tcp from 10.0.0.1 port 9 to 192.168.7.9 port 1" in caplog.text


async def test_a_flood_of_flows_does_not_fill_the_log(
    linked: Linked, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[net.Flow] = []

    def decide(flow: net.Flow) -> bool:
        asked.append(flow)
        raise RuntimeError("always")

    here, guest = net.Port(filters=[net.Hook(decide)]), net.Port()
    async with linked(here, guest):
        port = 0
        while len(asked) < 2000:
            assert await passing(guest, here, [udp(A, 1, B, port + more) for more in range(50)]) == []
            port = (port + 50) % 60000
    assert 10 <= len(caplog.records) < 100


async def test_who_never_answers_has_denied(linked: Linked, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    here, guest = net.Port(filters=[net.Hook(gate, timeout=0.01)]), net.Port()
    async with linked(here, guest):
        await guest.send(tcp(A, 9, B, 1))
        while not caplog.records:
            await anyio.lowlevel.checkpoint()
        gate.open.set()
        assert await passing(guest, here, [tcp(A, 9, B, 1)]) == []
    assert "no answer in 0.01 s" in caplog.text
    assert len(gate.flows) == 1


async def test_answers_are_taken_back(linked: Linked) -> None:
    allowed = {80}
    hook = net.Hook(lambda flow: flow.dst_port in allowed)
    here, guest = net.Port(filters=[hook]), net.Port()
    frame = tcp(A, 1, B, 80)
    async with linked(here, guest):
        await guest.send(frame)
        assert bytes(await anext(here)) == frame
        allowed.clear()
        assert await passing(guest, here, [frame]) == [frame]
        hook.forget()
        assert await passing(guest, here, [frame]) == []
        allowed.add(80)
        hook.forget()
        await guest.send(frame)
        assert bytes(await anext(here)) == frame
    hook.forget()


async def test_a_flood_of_flows_is_asked_about_in_bounds(linked: Linked) -> None:
    gate = Gate()
    here, guest = net.Port(filters=[net.Hook(gate)]), net.Port()
    async with linked(here, guest):
        for first in range(0, 20000, 500):
            assert (
                await passing(guest, here, [udp(A, 1, B, port) for port in range(first, first + 500)]) == []
            )
        while len(gate.flows) < 64:
            await anyio.lowlevel.checkpoint()
        gate.open.set()
        ports = {int.from_bytes(bytes(await anext(here))[36:38], "big") for _ in range(64)}
        assert ports == {flow.dst_port for flow in gate.flows} == set(range(64))


@pytest.mark.parametrize("asked", [False, True])
async def test_closing_while_somebody_is_asked(linked: Linked, asked: bool) -> None:
    gate = Gate()
    hook = net.Hook(gate)
    here, guest = net.Port(filters=[hook]), net.Port()
    async with linked(here, guest):
        await guest.send(tcp(A, 1, B, 80))
        await guest.send(LAST)
        await anext(here)
        if asked:
            await gate.asked.wait()
    assert not hook._filters
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    gc.collect()  # nothing that was never awaited


async def test_other_filters_while_somebody_is_asked(linked: Linked) -> None:
    gate = Gate()
    here, guest = net.Port(filters=[net.Hook(gate)]), net.Port()
    async with linked(here, guest):
        await guest.send(tcp(A, 1, B, 80))
        await gate.asked.wait()
        await here.set_filters([pass_last, net.deny()])
        gate.open.set()
        assert await passing(guest, here, [tcp(A, 1, B, 80)]) == []
        await here.set_filters([net.Hook(gate)])
        await guest.send(tcp(A, 1, B, 80))
        assert bytes(await anext(here)) == tcp(A, 1, B, 80)
    assert len(gate.flows) == 2


async def test_a_hook_may_close_what_asks(linked: Linked, caplog: pytest.LogCaptureFixture) -> None:
    here = net.Port()

    async def decide(flow: net.Flow) -> bool:
        await here.close()
        return True

    guest = net.Port()
    await here.set_filters([net.Hook(decide)])
    async with linked(here, guest):
        await guest.send(tcp(A, 1, B, 80))
        while here.end is not None:
            await anyio.lowlevel.checkpoint()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
