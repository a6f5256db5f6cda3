"""What a vCPU tells about itself when it cannot go on: as much as can be had, and no error of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aiokvm import boot
from aiokvm.machine.config import Config
from aiokvm.machine.hardware import Hardware
from aiokvm.machine.postmortem import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm

CODE = bytes(range(1, 33))


@pytest.fixture
def hardware() -> Iterator[Hardware]:
    hardware = Hardware(Config(boot=boot.Flat(b"\xf4"), memory_bytes=2 << 20))
    sregs = hardware.vcpus[0].get_sregs()
    hardware.vcpus[0].set_sregs(replace(sregs, cs=replace(sregs.cs, base=0x1_0000, selector=0x1000)))
    hardware.memory.write(0x1_1000, CODE)
    go(hardware, 0x1000)
    yield hardware
    hardware.close()


def go(hardware: Hardware, rip: int) -> None:
    regs = hardware.vcpus[0].get_regs()
    hardware.vcpus[0].set_regs(replace(regs, rip=rip, rax=0xCAFE, rsp=0x8000))


def test_registers_and_code_are_told(hardware: Hardware) -> None:
    text = describe("it broke", hardware.vcpus[0], hardware.memory)
    assert text.startswith("it broke; rip=0x1000 rflags=0x2 rsp=0x8000 rax=0xcafe rbx=0x0 ")
    assert "; cs=0x1000 base=0x10000; " in text
    assert text.endswith("; code: " + CODE[:15].hex(" "))


def test_code_ends_with_its_page(hardware: Hardware) -> None:
    hardware.memory.write(0x1_1FFE, b"\xaa\xbb\xcc")
    go(hardware, 0x1FFE)
    assert describe("", hardware.vcpus[0], hardware.memory).endswith("code: aa bb")


def test_code_outside_of_ram_is_told_as_such(hardware: Hardware) -> None:
    go(hardware, 0xFFF_F000)
    assert "code: 0xf bytes at 0x1000f000 are not wholly inside the guest's RAM" in describe(
        "", hardware.vcpus[0], hardware.memory
    )


def test_an_address_that_wraps_is_no_error(hardware: Hardware) -> None:
    go(hardware, 0xFFFF_FFFF_FFFF_FFF0)
    assert "code: " in describe("", hardware.vcpus[0], hardware.memory)


def test_registers_that_are_not_of_before_are_told_as_such(hardware: Hardware) -> None:
    vcpu = hardware.vcpus[0]
    assert "was reset" not in describe("", vcpu, hardware.memory)
    sregs = vcpu.get_sregs()
    vcpu.set_sregs(replace(sregs, cs=replace(sregs.cs, base=0xFFFF_0000, selector=0xF000)))
    go(hardware, 0xFFF0)
    told = describe("", vcpu, hardware.memory)
    assert "; these are of a processor that was reset: " in told
    assert "code: " not in told


def test_a_vcpu_without_registers_is_described_all_the_same(hardware: Hardware) -> None:
    vcpu, memory = hardware.vcpus[0], hardware.memory
    vcpu.close()
    assert describe("it broke", vcpu, memory).startswith("it broke; no registers: KVM_GET_REGS: Bad file")
