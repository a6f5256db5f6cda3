from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, ClockData, KvmExit, MsrFilterRange, System, Vm
from aiokvm.kvm.constants import (
    KVM_DEV_TYPE_VFIO,
    KVM_MSR_FILTER_READ,
    KVM_PMU_EVENT_ALLOW,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kvm.conftest import Guest

pytestmark = pytest.mark.kvm


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def signalled(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_addresses(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFEFF_C000)
    vm.set_tss_addr(0xFEFF_D000)


def test_boot_cpu(vm: Vm) -> None:
    vm.set_boot_cpu_id(1)
    with vm.create_vcpu(0), pytest.raises(KvmError, match="before the first vCPU"):
        vm.set_boot_cpu_id(0)


def test_the_vm_outlives_its_system() -> None:
    with System() as system:
        vm = system.create_vm()
    with vm, vm.create_vcpu(0) as vcpu:
        assert vcpu.get_regs().rip == 0xFFF0


def test_clock(vm: Vm) -> None:
    vm.set_clock(ClockData(10**15))
    clock = vm.get_clock()
    assert 10**15 <= clock.clock < 10**15 + 10**12


def test_tsc_khz(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_VM_TSC_CONTROL)
    khz = vm.get_tsc_khz()
    vm.set_tsc_khz(khz)
    assert vm.get_tsc_khz() == khz


def test_ioeventfd_on_a_port(guest: Callable[..., Guest], eventfd: int) -> None:
    g = guest(
        bytes.fromhex("b001 e650 b007 e650 f4")
    )  # mov al, 1; out 0x50, al; mov al, 7; out 0x50, al; hlt
    g.vm.ioeventfd(0x50, eventfd, 1, datamatch=7, pio=True)
    with pytest.raises(KvmError, match="another ioeventfd"):
        g.vm.ioeventfd(0x50, eventfd, 1, datamatch=7, pio=True)
    assert g.run() == KvmExit.KVM_EXIT_IO
    assert g.vcpu.run_state.io.data == b"\x01"
    assert signalled(eventfd) == 0
    g.run_to_hlt()
    assert signalled(eventfd) == 1
    g.vm.ioeventfd(0x50, eventfd, 1, datamatch=7, pio=True, deassign=True)
    with pytest.raises(KvmError, match="no ioeventfd"):
        g.vm.ioeventfd(0x50, eventfd, 1, datamatch=7, pio=True, deassign=True)


def test_ioeventfd_on_memory(
    guest: Callable[..., Guest], requires: Callable[[Cap], int], eventfd: int
) -> None:
    requires(Cap.KVM_CAP_IOEVENTFD_ANY_LENGTH)
    # mov ax, 0x2000; mov ds, ax; mov [0], ax; mov [0], al; hlt
    g = guest(bytes.fromhex("b80020 8ed8 a30000 a20000 f4"))
    g.vm.ioeventfd(0x20000, eventfd)
    g.run_to_hlt()
    assert signalled(eventfd) == 2


def test_ioeventfd_needs_an_eventfd(vm: Vm) -> None:
    with open("/dev/null", "rb") as null, pytest.raises(KvmError, match="eventfd") as caught:
        vm.ioeventfd(0x50, null.fileno(), 1, pio=True)
    assert caught.value.errno == errno.EINVAL


def test_devices(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_DEVICE_CTRL)
    with pytest.raises(KvmError, match="no device of that type"):
        vm.test_device(4711)
    try:
        vm.test_device(KVM_DEV_TYPE_VFIO)
    except KvmError:
        pytest.skip("this host has no VFIO device")
    with vm.create_device(KVM_DEV_TYPE_VFIO) as device:
        assert device.fd > 2
        assert not device.has_device_attr(4711, 0)


def test_msr_filter(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_X86_MSR_FILTER)
    denied = MsrFilterRange(KVM_MSR_FILTER_READ, base=0x174, nmsrs=100, bitmap=bytes(13))
    vm.set_msr_filter([denied], default_deny=True)
    vm.set_msr_filter([])
    with pytest.raises(ValueError, match="a bitmap of 13 bytes for 8 MSRs from 0x174"):
        vm.set_msr_filter([MsrFilterRange(KVM_MSR_FILTER_READ, base=0x174, nmsrs=8, bitmap=bytes(13))])
    with pytest.raises(ValueError, match="17 ranges"):
        vm.set_msr_filter([denied] * 17)
    with pytest.raises(KvmError, match=r"KVM_X86_SET_MSR_FILTER: .*unknown flags"):
        vm.set_msr_filter([MsrFilterRange(0x80, base=0, nmsrs=8, bitmap=bytes(1))])


def test_pmu_filter(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_PMU_EVENT_FILTER)
    vm.set_pmu_event_filter(KVM_PMU_EVENT_ALLOW, [0xC0, 0x3C])
    with pytest.raises(KvmError):
        vm.set_pmu_event_filter(77, [])


def test_capabilities(vm: Vm) -> None:
    assert vm.check_extension(Cap.KVM_CAP_USER_MEMORY) == 1
    vm.enable_cap(Cap.KVM_CAP_HALT_POLL, 0)
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP: Invalid argument"):
        vm.enable_cap(9999)
