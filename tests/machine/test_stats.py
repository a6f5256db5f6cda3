"""The numbers of a machine add up."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from aiokvm import ConfigError, Device, Exit, ExitReason, StateError

if TYPE_CHECKING:
    from tests.machine.conftest import Guest, Program

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

DONE = Exit(ExitReason.DEBUG_EXIT, code=0)
MMIO = 0xD000_0000


class Answering(Device):
    def read(self, offset: int, size: int) -> int:
        return 0x5A


class Posted(Answering):
    """Takes what is posted."""


async def test_exits_add_up(guest: Guest, program: type[Program]) -> None:
    code = (
        program()
        .read(0x300, bus="pio")
        .write(0x301, 1, bus="pio")
        .read(MMIO, 4)
        .write(MMIO + 0x1000, 1)  # posted
        .write(MMIO + 0x1001, 1)  # posted
        .read(0x310, bus="pio")  # nothing
        .read(MMIO + 0x2000)  # nothing
        .write(MMIO + 0x2000, 1)  # nothing
        .times(20)
    )
    async with guest(code.end(), mode="protected", start=False) as vm:
        vm.attach(Answering(), pio=0x300, size=2)
        vm.attach(Answering(), mmio=MMIO, size=4)
        vm.attach(Posted(), mmio=MMIO + 0x1000, size=2, mode="posted")
        before = vm.stats()
        assert (before.vcpus[0].exits, before.rings, before.serving_ns) == (0, 0, 0)
        await vm.start()
        assert await vm.wait() == DONE
        stats = vm.stats()
        vcpu = stats.vcpus[0]
        # The debug exit is one more.
        assert vcpu.reasons == {"KVM_EXIT_IO": 3 * 20 + 1, "KVM_EXIT_MMIO": 5 * 20}
        assert vcpu.exits == sum(vcpu.reasons.values())
        assert vcpu.posted == 2 * 20
        assert vcpu.unclaimed == 3 * 20
        served = {(device.bus, device.base): device.exits for device in stats.devices}
        assert served[("pio", 0x300)] == 2 * 20
        assert served[("mmio", MMIO)] == 20
        assert served[("mmio", MMIO + 0x1000)] == 2 * 20
        assert served[("pio", 0xF4)] == 1
        # What waited for the loop, and what did not.
        assert sum(served.values()) + vcpu.unclaimed == vcpu.exits
        names = {device.base: device.device for device in stats.devices}
        assert (names[MMIO], names[MMIO + 0x1000]) == ("Answering", "Posted")
        assert {device.base: device.size for device in stats.devices}[0x300] == 2
        assert vcpu.poll_hits <= vcpu.exits
        assert min(vcpu.guest_ns, vcpu.wait_ns, stats.rings, stats.serving_ns) > 0
        assert stats.device_errors == 0
        # KVM counts, too.
        assert set(stats.kvm) | set(vcpu.kvm)
        assert vcpu.kvm.get("exits", vcpu.exits) != 0
    with pytest.raises(StateError, match="is closed"):
        vm.stats()
    with pytest.raises(StateError, match="vCPU 0 is closed"):
        vm.vcpus[0].stats()


async def test_a_detached_region_is_no_longer_listed(guest: Guest) -> None:
    async with guest(b"\xeb\xfe") as vm:
        before = vm.stats().devices
        attachment = vm.attach(Answering(), pio=0x300)
        added = [device for device in vm.stats().devices if device not in before]
        assert [(device.device, device.exits) for device in added] == [("Answering", 0)]
        vm.detach(attachment)
        assert vm.stats().devices == before


async def test_kicks_are_counted(guest: Guest) -> None:
    async with guest(b"\xeb\xfe") as vm:
        seen = vm.vcpus[0].stats().kicks
        for _ in range(3):
            await vm.pause()
            await vm.resume()
        assert vm.vcpus[0].stats().kicks >= seen
        assert vm.vcpus[0].stats().reasons == {}


@pytest.mark.parametrize("log", [False, True])
async def test_accesses_that_nothing_claims_are_counted_and_logged_if_asked_for(
    guest: Guest, program: type[Program], caplog: pytest.LogCaptureFixture, log: bool
) -> None:
    caplog.set_level(logging.INFO, "aiokvm")
    code = (
        program()
        .read(0x310, 2, bus="pio")
        .write(0x311, 0x1234, 1, bus="pio")
        .read(MMIO, 4)
        .write(MMIO + 4, 0x1234, 4)
        .strings(0x312, 3, out=False)
    )
    async with guest(code.end(), mode="protected", start=False, log_unclaimed=log) as vm:
        await vm.start()
        assert await vm.wait() == DONE
        assert vm.memory.read(program.RESULTS, 3) == b"\xff\xff\xff"
        assert program.results(vm, 2)[1] == 0xFFFF_FFFF
        assert vm.stats().vcpus[0].unclaimed == 5
        nothing = [record.getMessage() for record in caplog.records if "nothing is there" in record.message]
    expected = [
        "read of 2 bytes at port 0x310",
        "write of 0x34 (1 bytes) at port 0x311",
        f"read of 4 bytes at address {MMIO:#x}",
        f"write of 0x1234 (4 bytes) at address {MMIO + 4:#x}",
        "read of 1 bytes at port 0x312",
    ]
    assert nothing == [f"{vm.name}: vCPU 0: {what}: nothing is there" for what in expected if log]


@pytest.mark.parametrize("poll_ns", [-1, 1 << 40, "fast", 1.5, None])
async def test_a_polling_budget_that_cannot_be_is_refused(guest: Guest, poll_ns: Any) -> None:
    with pytest.raises(ConfigError, match="poll_ns"):
        async with guest(b"\xeb\xfe", poll_ns=poll_ns):
            pass
