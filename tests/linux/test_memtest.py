"""memtest86+: no Linux, but Linux's boot protocol, and a file that ends within its last paragraph."""

from __future__ import annotations

import pytest

from aiokvm import VM, boot
from tests.linux.conftest import BOOT_S, image

pytestmark = [pytest.mark.linux, pytest.mark.anyio]


async def test_memtest86_tests_the_machines_memory() -> None:
    linux = boot.Linux(await image("memtest86+"), cmdline="console=ttyS0,115200")
    async with await VM.create(boot=linux, memory="64M") as vm:
        await vm.start()
        seen = await vm.serial.expect(b"Memtest86+ v", BOOT_S)
        # It has found RAM, and tests it.
        seen += await vm.serial.expect(b"[Address test", BOOT_S)
        assert b"Unexpected" not in seen
        assert vm.exit is None
