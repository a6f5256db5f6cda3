"""A virtio device of one's own: an entropy device whose bytes come from wherever a coroutine gets them.

`Beacon.serve` runs for each queue, from when the guest's driver is ready until it resets the device, and its
requests come as they do from any asynchronous iterator. Linux drives this one as /dev/hwrng:

    await VM.create(boot=boot.Linux(...), virtio=[Beacon()])

    python examples/virtio_device.py

Here the guest is a dozen instructions with a ring of one buffer: it runs wherever there is /dev/kvm.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

from aiokvm import VM, VirtioDevice, boot

if TYPE_CHECKING:
    from aiokvm import VirtioQueue

# What the guest is told by ACPI: the first device's registers (virtio 1.2, section 4.2.2).
REGISTERS = 0xD000_0000
DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_NUM, QUEUE_READY = 0x20, 0x24, 0x38, 0x44
QUEUE_NOTIFY, STATUS, QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x50, 0x70, 0x80, 0x90, 0xA0
# The guest's rings, and the buffer that it wants to be filled.
DESC, AVAIL, USED, BUFFER, SIZE = 0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000, 16


class Beacon(VirtioDevice):
    """virtio 1.2, section 5.4: fills the buffers that it is given."""

    device_id = 4  # VIRTIO_ID_RNG
    queue_size_max = (64,)

    async def serve(self, queue: VirtioQueue) -> None:
        """Fill each buffer; the guest says how long it is, so there is a bound."""
        async for request in queue:
            request.write(await self.random(min(request.writable_bytes, 4096)))
            request.push()

    async def random(self, size: int) -> bytes:
        """Ask a service somewhere; here it is one that likes sevens."""
        await asyncio.sleep(0.01)
        return b"7" * size


def store(register: int, value: int) -> bytes:
    """Encode ``mov dword [register], value``."""
    return b"\xc7\x05" + struct.pack("<II", REGISTERS + register, value)


def guest() -> bytes:
    """What a driver does (3.1.1): features, queue, DRIVER_OK, notify; then it waits for the used ring."""
    code = store(STATUS, 3) + store(DRIVER_FEATURES_SEL, 1) + store(DRIVER_FEATURES, 1) + store(STATUS, 11)
    code += (
        store(QUEUE_NUM, 8) + store(QUEUE_DESC, DESC) + store(QUEUE_DRIVER, AVAIL) + store(QUEUE_DEVICE, USED)
    )
    code += store(QUEUE_READY, 1) + store(STATUS, 15) + store(QUEUE_NOTIFY, 0)
    code += b"\x66\xa1" + struct.pack("<I", USED + 2)  # again: mov ax, [used.idx]
    code += bytes.fromhex("66 3d 01 00 75 f4")  # cmp ax, 1; jne again
    return code + bytes.fromhex("b0 00 e6 f4")  # mov al, 0; out 0xf4, al


async def main() -> None:
    """Run the guest, and show what it got."""
    async with await VM.create(
        boot=boot.Flat(guest(), mode="protected"), memory="2M", name="beacon", virtio=[Beacon()]
    ) as vm:
        vm.memory.write(DESC, struct.pack("<QIHH", BUFFER, SIZE, 2, 0))  # VIRTQ_DESC_F_WRITE
        vm.memory.write(AVAIL, struct.pack("<HHH", 0, 1, 0))
        await vm.start()
        async with asyncio.timeout(30):
            await vm.wait()
        print(f"the guest got {vm.memory.read(BUFFER, SIZE).decode()}")


if __name__ == "__main__":
    asyncio.run(main())
