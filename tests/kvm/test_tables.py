from __future__ import annotations

import errno
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import CpuidEntry, MsrEntry, MsrError, System, Vcpu

if TYPE_CHECKING:
    from aiokvm.kvm import Vm

pytestmark = pytest.mark.kvm

IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
NO_MSR = 0xDEAD


def test_cpuid(system: System, vcpu: Vcpu) -> None:
    leaves = system.get_supported_cpuid()
    vcpu.set_cpuid2(leaves)
    names = {(leaf.function, leaf.index) for leaf in vcpu.get_cpuid2()}
    assert {(0, 0), (1, 0), (0x8000_0000, 0)} <= names <= {(leaf.function, leaf.index) for leaf in leaves}
    vcpu.set_cpuid2([replace(leaves[0], ebx=0x41414141)])
    assert vcpu.get_cpuid2()[0].ebx == 0x41414141


def test_a_table_longer_than_the_first_guess(vcpu: Vcpu) -> None:
    leaves = tuple(CpuidEntry(0x4000_0000 + n, eax=n) for n in range(200))
    vcpu.set_cpuid2(leaves)
    assert vcpu.get_cpuid2() == leaves


def test_too_many_cpuid_entries(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError) as caught:
        vcpu.set_cpuid2([CpuidEntry(0)] * 300)
    assert caught.value.errno == errno.E2BIG


def test_msrs(vcpu: Vcpu) -> None:
    values = (MsrEntry(IA32_SYSENTER_CS, 8), MsrEntry(IA32_SYSENTER_ESP, 0x1234))
    vcpu.set_msrs(values)
    assert vcpu.get_msrs([IA32_SYSENTER_CS, IA32_SYSENTER_ESP]) == values
    assert vcpu.get_msrs([]) == ()


def test_more_msrs_than_kvm_takes_at_once(vcpu: Vcpu) -> None:
    vcpu.set_msrs([MsrEntry(IA32_SYSENTER_CS, n) for n in range(600)])
    assert vcpu.get_msrs([IA32_SYSENTER_CS] * 600) == (MsrEntry(IA32_SYSENTER_CS, 599),) * 600


def test_the_msr_that_was_refused(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(MsrError, match=r"KVM_SET_MSRS: .*MSR 0xdead was refused after 1 were done") as caught:
        vcpu.set_msrs([MsrEntry(IA32_SYSENTER_CS, 3), MsrEntry(NO_MSR, 1), MsrEntry(IA32_SYSENTER_ESP, 5)])
    assert (caught.value.index, caught.value.done) == (NO_MSR, 1)
    assert vcpu.get_msrs([IA32_SYSENTER_CS])[0].data == 3
    with pytest.raises(MsrError) as caught:
        vcpu.get_msrs([IA32_SYSENTER_CS] * 300 + [NO_MSR])
    assert (caught.value.index, caught.value.done) == (NO_MSR, 300)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
