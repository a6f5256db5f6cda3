"""A web service that starts a machine for each request and streams its serial console as the response.

The machine is one more resource of the request: it ends with its guest, with its time, or when the client
disconnects. Any ASGI server runs it, for instance uvicorn:

    uvicorn --app-dir examples --factory asgi_service:create_app
    curl -N 'localhost:8000/?lines=5'

By default the guest is a few bytes of code that print a line as often as asked, 0: without end. With
AIOKVM_KERNEL, and AIOKVM_INITRD if wanted, in the environment it is a real Linux. Without a server,

    python examples/asgi_service.py

makes one request inside the program and prints the response.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from aiokvm import VM, boot

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

MACHINES_AT_ONCE = 16
SECONDS_A_MACHINE = 60


def payload(lines: int) -> bytes:
    """Code that prints a line so many times and ends the machine."""
    code = bytes.fromhex(
        "ba f8 03"  # 0x1003:    mov dx, 0x3f8  the first serial port
        "be 19 10"  # 0x1006: 1: mov si, text
        "ac"  # 0x1009: 2: lodsb
        "84 c0"  # 0x100a:    test al, al
        "74 03"  # 0x100c:    jz 3f
        "ee"  # 0x100e:    out dx, al
        "eb f8"  # 0x100f:    jmp 2b
        "e3 f3"  # 0x1011: 3: jcxz 1b
        "e2 f1"  # 0x1013:    loop 1b
        "b0 00"  # 0x1015:    mov al, 0
        "e6 f4"  # 0x1017:    out 0xf4, al   the debug-exit port
    )
    return b"\xb9" + lines.to_bytes(2, "little") + code + b"hello from a guest\n\0"  # 0x1000: mov cx, lines


class Console(Response):
    """A response that is what a machine prints."""

    def __init__(self, protocol: boot.BootProtocol, memory: str, slots: anyio.CapacityLimiter) -> None:
        self.protocol = protocol
        self.memory = memory
        self.slots = slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Run the machine while the client listens."""
        async with anyio.create_task_group() as tasks:

            async def end_at_disconnect() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(end_at_disconnect)
            # A cancellation gets through when the machine is gone.
            async with self.slots, await VM.create(boot=self.protocol, memory=self.memory) as vm:
                await vm.start()
                await self._stream(vm, send)
            tasks.cancel_scope.cancel()

    async def _stream(self, vm: VM, send: Send) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with anyio.move_on_after(SECONDS_A_MACHINE):
            while text := await vm.serial.read():
                await send({"type": "http.response.body", "body": text, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def create_app() -> Starlette:
    """The service."""
    slots = anyio.CapacityLimiter(MACHINES_AT_ONCE)
    kernel, initrd = os.environ.get("AIOKVM_KERNEL"), os.environ.get("AIOKVM_INITRD")

    async def console(request: Request) -> Response:
        if kernel:
            return Console(boot.Linux(kernel, initrd, "console=ttyS0 panic=-1"), "512M", slots)
        lines = request.query_params.get("lines", "3")
        if not (lines.isascii() and lines.isdigit() and int(lines) < 1 << 16):
            return PlainTextResponse("lines is a number from 0 to 65535\n", status_code=400)
        return Console(boot.Flat(payload(int(lines))), "2M", slots)

    return Starlette(routes=[Route("/", console)])


async def main() -> None:
    """Make one request and print the response."""
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        response = await client.get("/")
        print(response.text, end="")


if __name__ == "__main__":
    anyio.run(main)
