"""What a Linux guest finds on its platform, in one machine that all these tests share."""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.linux.conftest import Guest

pytestmark = [pytest.mark.linux, pytest.mark.anyio]


async def test_no_trouble(guest: Guest) -> None:
    print(await guest.run("dmesg -r | grep '^<[0-4]>'"))
    assert await guest.troubles() == []


async def test_initrd(guest: Guest, blob: bytes) -> None:
    assert (await guest.run("sha256sum /blob")).split() == [hashlib.sha256(blob).hexdigest(), "/blob"]


async def test_acpi_tables(guest: Guest) -> None:
    names = (await guest.run("cd /sys/firmware/acpi/tables; echo *; cd")).split()
    assert sorted(names) == ["APIC", "DSDT", "FACP", "FACS", "data", "dynamic"]
    # ACPI specification, section 5.2.6: the header has a table's length; Linux has checked its sum.
    for name in ("APIC", "DSDT", "FACP"):
        dump = await guest.run(f"od -An -v -tx1 /sys/firmware/acpi/tables/{name}")
        table = bytes.fromhex(dump)
        assert table[:4] == name.encode()
        assert int.from_bytes(table[4:8], "little") == len(table)


async def test_devices(guest: Guest) -> None:
    ports = await guest.run("cat /proc/tty/driver/serial")
    lines = [line for line in ports.splitlines() if "16550A" in line]
    assert [re.findall(r"^(\d): .* port:(\w+) irq:(\d+)", line) for line in lines] == [
        [("0", "000003F8", "4")],
        [("1", "000002F8", "3")],
    ]
    names = (await guest.run("cat /sys/class/input/input*/name")).splitlines()
    assert sorted(names) == ["AT Translated Set 2 keyboard", "Power Button"]


async def test_clock(guest: Guest) -> None:
    assert (
        await guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock"
    )
    before = time.monotonic()
    ticks = [float((await guest.run("cat /proc/uptime")).split()[0])]
    await guest.run("sleep 2")
    ticks.append(float((await guest.run("cat /proc/uptime")).split()[0]))
    assert 2 <= ticks[1] - ticks[0] <= time.monotonic() - before


async def test_rtc(guest: Guest) -> None:
    before = int(time.time())
    rtc = int(await guest.run("cat /sys/class/rtc/rtc0/since_epoch"))
    assert before - 1 <= rtc <= time.time()


async def test_rtc_alarm(guest: Guest) -> None:
    async def interrupts() -> int:
        return sum(map(int, (await guest.run("grep rtc0 /proc/interrupts")).split()[1:3]))

    before = await interrupts()
    await guest.run('cd /sys/class/rtc/rtc0; echo +2 >wakealarm; test -n "$(cat wakealarm)"; cd')
    await guest.run('while [ -n "$(cat /sys/class/rtc/rtc0/wakealarm)" ]; do usleep 100000; done')
    assert await interrupts() == before + 1
