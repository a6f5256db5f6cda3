"""The machine of device_http.py on trio: the same device, its coroutine written with trio's own streams.

aiokvm finds out which loop runs. What a device awaits is that loop's: nurseries, cancel scopes and channels
of trio work in `read`, `write` and `run` as anywhere.

    python examples/on_trio.py
"""

from __future__ import annotations

import json
from functools import partial

import trio

from aiokvm import VM, Device, boot

REGISTER = 0xD000_0000
GUEST = bytes.fromhex(
    "a1 00 00 00 d0"  # mov eax, [0xd0000000]  the device's register
    "e7 f4"  # out 0xf4, eax           the debug-exit port: the machine ends with this code
)


class Thermometer(Device):
    """A register of 4 bytes that reads the temperature in millidegrees Celsius."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        """Ask the server, in plain HTTP."""
        with trio.fail_after(5):
            async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
                await stream.send_all(b"GET /temperature HTTP/1.0\r\nHost: localhost\r\n\r\n")
                response = b"".join([part async for part in stream])
        _, _, body = response.partition(b"\r\n\r\n")
        celsius: float = json.loads(body)["celsius"]
        return round(celsius * 1000)


async def answer(stream: trio.SocketStream) -> None:
    """Serve one request with JSON."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += await stream.receive_some()
    body = json.dumps({"celsius": 21.5}).encode()
    await stream.send_all(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


async def main() -> None:
    """Start the server and a machine with the device, and show what its guest has read."""
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        _, port = listener.socket.getsockname()
        async with await VM.create(boot=boot.Flat(GUEST, mode="protected"), memory="2M", name="trio") as vm:
            vm.attach(Thermometer(port), mmio=REGISTER, size=4)
            await vm.start()
            with trio.fail_after(30):
                end = await vm.wait()
            print(f"the guest read {end.code} from its register at {REGISTER:#x}")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
