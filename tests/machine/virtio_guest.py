"""A guest that drives a virtio-mmio device: a program in protected mode, and rings that the test fills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiokvm.machine.virtio import VIRTIO_BASE
from aiokvm.virtio import mmio
from aiokvm.virtio.constants import VIRTIO_F_VERSION_1
from tests.machine.conftest import Program
from tests.virtio.driver import FakeMemory, SplitDriver
from tests.virtio.transport import ALIVE, STARTED

if TYPE_CHECKING:
    from aiokvm import VM

RINGS = 0x18_0000
# The program counts here how far it has come.
STEP = 0x14_0000


class VirtioProgram(Program):
    """What a driver does, access by access, to the device at ``base``."""

    def __init__(self, base: int = VIRTIO_BASE) -> None:
        super().__init__()
        self.base = base
        self._steps = 0

    def get(self, register: int) -> VirtioProgram:
        self.read(self.base + register, 4)
        return self

    def put(self, register: int, value: int) -> VirtioProgram:
        self.write(self.base + register, value, 4)
        return self

    def up(self, queues: int = 1, features: int = 0, size: int = 8) -> VirtioProgram:
        """3.1.1, with the rings of `rings`."""
        features |= VIRTIO_F_VERSION_1
        self.put(mmio.VIRTIO_MMIO_STATUS, STARTED)
        for select in range(2):
            self.put(mmio.VIRTIO_MMIO_DRIVER_FEATURES_SEL, select)
            self.put(mmio.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * select & 0xFFFF_FFFF)
        self.put(mmio.VIRTIO_MMIO_STATUS, STARTED | 8)
        for index in range(queues):
            driver = rings(FakeMemory((0, 2 << 20)), index, features, size)
            self.put(mmio.VIRTIO_MMIO_QUEUE_SEL, index).put(mmio.VIRTIO_MMIO_QUEUE_NUM, size)
            self.put(mmio.VIRTIO_MMIO_QUEUE_DESC_LOW, driver.desc)
            self.put(mmio.VIRTIO_MMIO_QUEUE_AVAIL_LOW, driver.driver)
            self.put(mmio.VIRTIO_MMIO_QUEUE_USED_LOW, driver.device)
            self.put(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
        return self.put(mmio.VIRTIO_MMIO_STATUS, ALIVE)

    def notify(self, queue: int = 0) -> VirtioProgram:
        return self.put(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, queue)

    def await_used(self, count: int, queue: int = 0) -> VirtioProgram:
        """Until the used ring's index is ``count``."""
        return self.await_word(rings(FakeMemory((0, 2 << 20)), queue).device + 2, count)

    def await_word(self, gpa: int, value: int) -> VirtioProgram:
        # again: mov ax, [gpa]; cmp ax, value; jne again
        self._code += (
            f"66 a1 {gpa.to_bytes(4, 'little').hex()} 66 3d {value.to_bytes(2, 'little').hex()} 75 f4"
        )
        return self

    def await_register(self, register: int, value: int) -> VirtioProgram:
        # again: mov eax, [register]; cmp eax, value; jne again
        address = (self.base + register).to_bytes(4, "little").hex()
        self._code += f"a1 {address} 3d {value.to_bytes(4, 'little').hex()} 75 f4"
        return self

    def step(self) -> VirtioProgram:
        """Tell the test how far it is."""
        self._steps += 1
        self.write(STEP, self._steps, 2)
        return self


def rings(memory: Any, queue: int = 0, features: int = 0, size: int = 8) -> SplitDriver:
    """The driver of a queue in a machine's memory, with nothing in its rings yet."""
    return SplitDriver(memory, size, features, RINGS + queue * 0x2_0000)


def steps(vm: VM) -> int:
    return int.from_bytes(vm.memory.read(STEP, 2), "little")
