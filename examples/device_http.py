"""A device whose register reads what an HTTP server answers: a coroutine serves the guest's access.

The vCPU that reads the register waits for the answer, and nothing else does: the loop, other vCPUs and other
machines go on. Any library for the loop that runs will do; here it is httpx, on asyncio.

    python examples/device_http.py

The server is a few lines on loopback, and the guest two instructions: it runs wherever there is /dev/kvm.
"""

from __future__ import annotations

import asyncio
import json

import httpx

from aiokvm import VM, Device, boot

REGISTER = 0xD000_0000
GUEST = bytes.fromhex(
    "a1 00 00 00 d0"  # mov eax, [0xd0000000]  the device's register
    "e7 f4"  # out 0xf4, eax           the debug-exit port: the machine ends with this code
)


class Thermometer(Device):
    """A register of 4 bytes that reads the temperature in millidegrees Celsius."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        """Ask the server. If this raises, the guest reads ones, and the machine emits `DeviceFailed`."""
        response = await self.client.get("/temperature", timeout=5)
        celsius: float = response.raise_for_status().json()["celsius"]
        return round(celsius * 1000)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one request with JSON."""
    await reader.readuntil(b"\r\n\r\n")
    body = json.dumps({"celsius": 21.5}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    writer.close()


async def main() -> None:
    """Start the server and a machine with the device, and show what its guest has read."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with (
        server,
        # Loopback: no proxy that the environment may name.
        httpx.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False) as client,
        await VM.create(boot=boot.Flat(GUEST, mode="protected"), memory="2M", name="http") as vm,
    ):
        vm.attach(Thermometer(client), mmio=REGISTER, size=4)
        await vm.start()
        async with asyncio.timeout(30):
            end = await vm.wait()
        print(f"the guest read {end.code} from its register at {REGISTER:#x}")


if __name__ == "__main__":
    asyncio.run(main())
