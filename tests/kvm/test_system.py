from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, MsrEntry, MsrError, System
from aiokvm.kvm.constants import KVM_X86_XCOMP_GUEST_SUPP

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm

IA32_TSC = 0x10


def test_versions_and_sizes(system: System) -> None:
    assert system.get_api_version() == 12
    assert system.get_vcpu_mmap_size() % 4096 == 0
    assert system.check_extension(Cap.KVM_CAP_USER_MEMORY) == 1
    assert system.check_extension(9999) == 0
    assert system.check_extension(Cap.KVM_CAP_NR_MEMSLOTS) >= 32


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(KvmError, match=r"nokvm: load the module") as caught:
        System(tmp_path / "nokvm")
    assert (caught.value.ioctl, caught.value.errno) == ("open", errno.ENOENT)


def test_another_device() -> None:
    with pytest.raises(KvmError, match=r"KVM_GET_API_VERSION.*the file is no KVM"):
        System("/dev/null")


def test_cpuid(system: System) -> None:
    leaves = system.get_supported_cpuid()
    assert leaves[0].function == 0
    assert any(leaf.function == 0x8000_0000 for leaf in leaves)
    assert any(leaf.function == 0x4000_0000 and leaf.ebx == 0x4B4D564B for leaf in leaves)


def test_emulated_cpuid(system: System, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_EXT_EMUL_CPUID)
    movbe = [leaf.ecx >> 22 & 1 for leaf in system.get_emulated_cpuid() if leaf.function == 1]
    assert movbe == [1]


def test_hyperv_cpuid(system: System, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_SYS_HYPERV_CPUID)
    assert system.get_supported_hv_cpuid()[0].function == 0x4000_0000


def test_msr_lists(system: System) -> None:
    assert IA32_TSC in system.get_msr_index_list()


def test_feature_msrs(system: System, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_GET_MSR_FEATURES)
    indices = system.get_msr_feature_index_list()
    assert indices
    readable: list[MsrEntry] = []
    for index in indices:
        try:
            readable += system.get_msrs([index])
        except MsrError as error:
            assert (error.index, error.done) == (index, 0)  # noqa: PT017 - some hosts list what they refuse
    assert readable
    with pytest.raises(MsrError, match="MSR 0xdead was refused after 1"):
        system.get_msrs([readable[0].index, 0xDEAD])


def test_attributes(system: System, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_SYS_ATTRIBUTES)
    assert system.has_device_attr(0, KVM_X86_XCOMP_GUEST_SUPP)
    assert len(system.get_device_attr(0, KVM_X86_XCOMP_GUEST_SUPP, 8)) == 8


def test_machine_checks(system: System, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_MCE)
    assert system.get_mce_cap_supported() != 0


class Interrupted(System):
    """A host where signals keep coming."""

    signals = 0

    def try_ioctl(self, name: str, arg: Any = 0) -> int:
        if name == "KVM_CREATE_VM" and self.signals:
            self.signals -= 1
            return -errno.EINTR
        return super().try_ioctl(name, arg)


def test_create_vm_survives_signals_but_not_for_ever() -> None:
    with Interrupted() as system:
        system.signals = 5
        system.create_vm().close()
        assert system.signals == 0
        system.signals = 1000
        with pytest.raises(KvmError, match="KVM_CREATE_VM: Interrupted") as caught:
            system.create_vm()
        assert caught.value.errno == errno.EINTR
        assert system.signals > 900
