"""CPUID of a vCPU: what KVM supports, with the topology and the hypervisor's leaves of this machine."""

from __future__ import annotations

import pytest

from aiokvm import kvm
from aiokvm.kvm import CpuidEntry
from aiokvm.machine.cpuid import APIC_BUS_KHZ, HYPERVISOR_TIMING, cpuid

HTT = 1 << 28
HYPERVISOR = 1 << 31
TSC_DEADLINE = 1 << 24
SIGNIFICANT_INDEX = 1


def vendor(name: bytes, most: int) -> CpuidEntry:
    ebx, edx, ecx = (int.from_bytes(name[i : i + 4], "little") for i in (0, 4, 8))
    return CpuidEntry(0, 0, 0, most, ebx, ecx, edx)


def cache(index: int, level: int, kind: int, function: int = 4) -> CpuidEntry:
    # A host whose caches are shared by many, in a package of many cores.
    eax = 0x3F << 26 | 0xFFF << 14 | 1 << 8 | level << 5 | kind
    return CpuidEntry(function, index, SIGNIFICANT_INDEX, eax, 0x1C0_003F, 0x3F, 2)


INTEL = (
    vendor(b"GenuineIntel", 0x1F),
    CpuidEntry(1, 0, 0, 0x306F2, 0x1234_0800, 0x1, 0x0FAB_FBFF),
    cache(0, 1, 1),
    cache(1, 1, 2),
    cache(2, 2, 3),
    cache(3, 3, 3),
    CpuidEntry(4, 4, SIGNIFICANT_INDEX, 0, 0, 0, 0),
    CpuidEntry(7, 0, SIGNIFICANT_INDEX, 0, 0x20, 0, 0),
    CpuidEntry(0xB, 0, SIGNIFICANT_INDEX, 9, 9, 9, 9),
    CpuidEntry(0xB, 1, SIGNIFICANT_INDEX, 9, 9, 9, 9),
    CpuidEntry(0x1F, 0, SIGNIFICANT_INDEX, 0, 0, 0, 0),
    CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
    CpuidEntry(0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
    CpuidEntry(0x8000_0008, 0, 0, 0x3027, 0, 0x9999, 0),
)
AMD = (
    vendor(b"AuthenticAMD", 0xD),
    CpuidEntry(1, 0, 0, 0x80_0F12, 0x1234_0800, 0x1, 0x178B_FBFF),
    CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
    CpuidEntry(0x8000_0008, 0, 0, 0x3030, 0x1000, 0x9999, 0),
    cache(0, 1, 1, 0x8000_001D),
    cache(3, 3, 3, 0x8000_001D),
    CpuidEntry(0x8000_001E, 0, 0, 77, 0x0177, 0x0377, 0),
)


def leaves(
    supported: tuple[CpuidEntry, ...], index: int = 0, cpus: int = 1, tsc_khz: int = 0, timer: bool = False
) -> dict[tuple[int, int], CpuidEntry]:
    entries = cpuid(supported, index=index, cpus=cpus, tsc_khz=tsc_khz, tsc_deadline_timer=timer)
    found = {(entry.function, entry.index): entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.parametrize("supported", [INTEL, AMD], ids=["Intel", "AMD"])
@pytest.mark.parametrize(("index", "cpus"), [(0, 1), (0, 2), (1, 2), (5, 6), (7, 8), (200, 201), (300, 301)])
def test_leaf_1_names_the_vcpu(supported: tuple[CpuidEntry, ...], index: int, cpus: int) -> None:
    host = next(entry for entry in supported if entry.function == 1)
    leaf = leaves(supported, index, cpus)[1, 0]
    assert leaf.eax == host.eax
    assert leaf.ebx == 0x0800 | min(cpus, 255) << 16 | (index & 0xFF) << 24
    assert leaf.ecx == host.ecx | HYPERVISOR
    assert leaf.edx == host.edx & ~HTT | (HTT if cpus > 1 else 0)


def test_the_tsc_deadline_timer_is_there_where_kvm_has_it() -> None:
    assert leaves(INTEL, timer=True)[1, 0].ecx == 1 | HYPERVISOR | TSC_DEADLINE
    assert leaves(INTEL, timer=False)[1, 0].ecx == 1 | HYPERVISOR


@pytest.mark.parametrize(
    ("cpus", "id_space"),
    # As many APIC ids as are set aside for the cores of a package, less one.
    [(1, 0), (2, 1), (3, 3), (4, 3), (5, 7), (8, 7), (64, 63), (65, 63)],
)
def test_leaf_4_shares_the_last_cache_only(cpus: int, id_space: int) -> None:
    found = leaves(INTEL, 0, cpus)
    for index, level, kind in ((0, 1, 1), (1, 1, 2), (2, 2, 3)):
        assert found[4, index].eax == id_space << 26 | 1 << 8 | level << 5 | kind
    sharing = 127 if cpus == 65 else id_space
    assert found[4, 3].eax == id_space << 26 | sharing << 14 | 1 << 8 | 3 << 5 | 3
    assert (found[4, 3].ebx, found[4, 3].ecx, found[4, 3].edx) == (0x1C0_003F, 0x3F, 2)
    assert found[4, 4] == CpuidEntry(4, 4, SIGNIFICANT_INDEX, 0, 0, 0, 0)


@pytest.mark.parametrize(("cpus", "sharing"), [(1, 0), (2, 1), (3, 3), (8, 7)])
def test_amds_cache_leaf_shares_the_last_cache_only(cpus: int, sharing: int) -> None:
    found = leaves(AMD, 0, cpus)
    # Bits 31 to 26 are reserved here.
    assert found[0x8000_001D, 0].eax == 1 << 8 | 1 << 5 | 1
    assert found[0x8000_001D, 3].eax == sharing << 14 | 1 << 8 | 3 << 5 | 3


@pytest.mark.parametrize("function", [0xB, 0x1F])
@pytest.mark.parametrize(
    ("index", "cpus", "shift"), [(0, 1, 0), (1, 2, 1), (2, 3, 2), (7, 8, 3), (8, 9, 4), (299, 300, 9)]
)
def test_the_topology_leaves_count_cores_of_one_thread(
    function: int, index: int, cpus: int, shift: int
) -> None:
    found = leaves(INTEL, index, cpus)

    def level(number: int) -> tuple[int, ...]:
        entry = found[function, number]
        assert entry.flags == SIGNIFICANT_INDEX
        return entry.eax, entry.ebx, entry.ecx, entry.edx

    assert level(0) == (0, 1, 1 << 8 | 0, index)
    assert level(1) == (shift, cpus, 2 << 8 | 1, index)
    assert level(2) == (0, 0, 2, index)
    assert (function, 3) not in found


def test_a_host_without_topology_leaves_gets_none() -> None:
    assert not [key for key in leaves(AMD, 0, 4) if key[0] in (0xB, 0x1F)]


@pytest.mark.parametrize(
    ("cpus", "ecx"), [(1, 0), (2, 1 << 12 | 1), (3, 2 << 12 | 2), (8, 3 << 12 | 7), (300, 9 << 12 | 255)]
)
def test_amds_leaves_count_cores(cpus: int, ecx: int) -> None:
    found = leaves(AMD, cpus - 1, cpus)
    size = found[0x8000_0008, 0]
    assert (size.eax, size.ebx, size.ecx) == (0x3030, 0x1000, ecx)
    ids = found[0x8000_001E, 0]
    assert (ids.eax, ids.ebx, ids.ecx) == (cpus - 1, (cpus - 1) & 0xFF, 0)


def test_amds_core_count_is_reserved_on_intel() -> None:
    size = leaves(INTEL, 0, 8)[0x8000_0008, 0]
    assert (size.eax, size.ecx) == (0x3027, 0)


def test_the_hypervisors_leaves_reach_to_the_frequencies() -> None:
    found = leaves(INTEL, tsc_khz=2_500_000)
    signature = found[0x4000_0000, 0]
    assert signature.eax == HYPERVISOR_TIMING
    assert (signature.ebx, signature.ecx, signature.edx) == (0x4B4D_564B, 0x564B_4D56, 0x4D)
    assert found[0x4000_0001, 0] == next(entry for entry in INTEL if entry.function == 0x4000_0001)
    timing = found[HYPERVISOR_TIMING, 0]
    assert (timing.eax, timing.ebx, timing.ecx, timing.edx) == (2_500_000, APIC_BUS_KHZ, 0, 0)


def test_an_unknown_frequency_is_not_told() -> None:
    assert (HYPERVISOR_TIMING, 0) not in leaves(INTEL, tsc_khz=0)


def test_what_names_no_vcpu_is_passed_on() -> None:
    found = leaves(INTEL, 3, 8)
    assert found[7, 0] in INTEL
    assert found[0, 0] in INTEL


@pytest.mark.kvm
def test_this_hosts_kvm_takes_it() -> None:
    with kvm.System() as system, system.create_vm() as vm:
        vm.create_irqchip()
        supported = system.get_supported_cpuid()
        for index in range(4):
            with vm.create_vcpu(index) as vcpu:
                entries = cpuid(
                    supported, index=index, cpus=4, tsc_khz=vcpu.get_tsc_khz(), tsc_deadline_timer=True
                )
                vcpu.set_cpuid2(entries)
                kept = {(entry.function, entry.index): entry for entry in vcpu.get_cpuid2()}
                assert kept[1, 0].ebx >> 24 == index
                assert kept[1, 0].ebx >> 16 & 0xFF == 4
                assert kept[HYPERVISOR_TIMING, 0].eax == vcpu.get_tsc_khz()
                assert kept[0x4000_0000, 0].eax == HYPERVISOR_TIMING
