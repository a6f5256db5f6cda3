from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, System, Vcpu, Vm
from aiokvm.kvm.constants import KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm


def test_close_is_idempotent_and_final(system: System) -> None:
    vm = system.create_vm()
    fd = vm.fd
    vm.close()
    vm.close()
    assert vm.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for use in (lambda: vm.fd, vm.create_irqchip, lambda: vm.create_vcpu(0)):
        with pytest.raises(KvmError, match="the Vm is closed") as caught:
            use()
        assert caught.value.errno == errno.EBADF


def test_a_dropped_object_closes_its_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    vcpu = System().create_vm().create_vcpu(0)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 3
    vcpu.get_regs()
    del vcpu
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_context_closes(system: System) -> None:
    with system.create_vm() as vm:
        assert repr(vm) == f"<Vm fd={vm.fd}>"
    assert repr(vm) == "<Vm closed>"


def test_the_descriptors_are_not_inherited(vm: Vm, vcpu: Vcpu) -> None:
    assert not any(os.get_inheritable(handle.fd) for handle in (vm.system, vm, vcpu))


def test_a_failure_names_the_request_and_the_cure(chips: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_CREATE_IRQCHIP: File exists .*already") as caught:
        chips.create_irqchip()
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_CREATE_IRQCHIP", errno.EEXIST)


def test_attributes(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_VCPU_ATTRIBUTES)
    assert not vcpu.has_device_attr(77, 0)
    if not vcpu.has_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET):
        pytest.skip("this host has no KVM_VCPU_TSC_OFFSET")
    if Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text() != "tsc\n":
        pytest.skip("this host's TSC is not stable: KVM moves the offset on")
    if vcpu.get_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, 8) == bytes(8):
        pytest.skip("this host's guests see the host's TSC")
    offset = (1 << 40).to_bytes(8, "little")
    vcpu.set_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, offset)
    assert vcpu.get_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, 8) == offset


def test_a_child_of_fork_does_not_unmap_what_is_its_own(vm: Vm, vcpu: Vcpu) -> None:
    vcpu.run_state.immediate_exit = True
    pid = os.fork()
    if pid == 0:
        try:
            vcpu.get_regs()
            code = 1
        except KvmError as error:
            code = 0 if error.errno == errno.EIO else 2
        vcpu.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert vcpu.run_state.immediate_exit
    vcpu.get_regs()
