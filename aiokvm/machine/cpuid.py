"""CPUID: what KVM supports on this host, and which of it depends on the vCPU.

Leaves and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; the kernel's
Documentation/virt/kvm/x86/cpuid.rst. The topology is one package of as many cores as the machine has vCPUs,
one thread each; a vCPU's APIC id is its index.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aiokvm.kvm import CpuidEntry

if TYPE_CHECKING:
    from collections.abc import Iterable

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
# The last hypervisor leaf that is passed on; EAX: the TSC's frequency in kHz, EBX: the local APIC timer's.
HYPERVISOR_TIMING = 0x4000_0010
# KVM's local APIC timer counts nanoseconds.
APIC_BUS_KHZ = 1_000_000

_AUTH = int.from_bytes(b"Auth", "little")  # of AuthenticAMD
_HTT = 1 << 28  # leaf 1 EDX
_TSC_DEADLINE_TIMER = 1 << 24  # leaf 1 ECX
_HYPERVISOR = 1 << 31
_LEVEL_SMT, _LEVEL_CORE = 1, 2


def cpuid(
    supported: Iterable[CpuidEntry], *, index: int, cpus: int, tsc_khz: int, tsc_deadline_timer: bool
) -> tuple[CpuidEntry, ...]:
    """The CPUID entries of vCPU ``index`` of ``cpus``.

    ``supported`` is KVM_GET_SUPPORTED_CPUID, passed on but for the fields that name the vCPU or describe the
    topology. ``tsc_khz`` 0 means that the frequency is not known, and it is not told.
    """
    id_bits = (cpus - 1).bit_length()
    supported = tuple(supported)
    amd = any(entry.function == 0 and entry.ebx == _AUTH for entry in supported)
    entries = []
    levels: dict[int, CpuidEntry] = {}
    for entry in supported:
        match entry.function:
            case 0x0000_0001:
                entries.append(_features(entry, index, cpus, tsc_deadline_timer))
            case 0x0000_0004:
                entries.append(_cache(entry, id_bits, min((1 << id_bits) - 1, 0x3F)))
            case 0x0000_000B | 0x0000_001F:
                # One entry tells that the leaf is there; all its levels are made anew.
                levels.setdefault(entry.function, entry)
            case 0x4000_0000:
                entries.append(replace(entry, eax=max(entry.eax, HYPERVISOR_TIMING)))
            case 0x8000_0008:
                entries.append(replace(entry, ecx=id_bits << 12 | min(cpus - 1, 0xFF) if amd else 0))
            case 0x8000_001D:
                # As leaf 4, but for the cores, whose bits are reserved here.
                entries.append(_cache(entry, id_bits, 0))
            case 0x8000_001E:
                # Extended APIC id, one thread a core, one node.
                entries.append(replace(entry, eax=index, ebx=index & 0xFF, ecx=0))
            case _:
                entries.append(entry)
    for leaf in levels.values():
        entries.extend(_topology(leaf, index, cpus, id_bits))
    if tsc_khz:
        entries.append(CpuidEntry(HYPERVISOR_TIMING, 0, 0, tsc_khz, APIC_BUS_KHZ, 0, 0))
    return tuple(entries)


def _features(entry: CpuidEntry, index: int, cpus: int, tsc_deadline_timer: bool) -> CpuidEntry:
    ecx = entry.ecx | _HYPERVISOR
    # KVM_GET_SUPPORTED_CPUID leaves it to the capability: it needs the in-kernel local APIC.
    if tsc_deadline_timer:
        ecx |= _TSC_DEADLINE_TIMER
    edx = entry.edx | _HTT if cpus > 1 else entry.edx & ~_HTT
    ebx = (entry.ebx & 0xFFFF) | min(cpus, 0xFF) << 16 | (index & 0xFF) << 24
    return replace(entry, ebx=ebx, ecx=ecx, edx=edx)


def _cache(entry: CpuidEntry, id_bits: int, cores: int) -> CpuidEntry:
    if not entry.eax & 0x1F:
        return entry
    # The last-level cache is the package's, the others are a core's.
    sharing = (1 << id_bits) - 1 if (entry.eax >> 5) & 7 >= 3 else 0
    eax = (entry.eax & 0x3FFF) | min(sharing, 0xFFF) << 14 | cores << 26
    return replace(entry, eax=eax)


def _topology(entry: CpuidEntry, index: int, cpus: int, id_bits: int) -> list[CpuidEntry]:
    def level(number: int, kind: int, shift: int, threads: int) -> CpuidEntry:
        return replace(
            entry,
            index=number,
            flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=shift,
            ebx=threads,
            ecx=kind << 8 | number,
            edx=index,
        )

    return [level(0, _LEVEL_SMT, 0, 1), level(1, _LEVEL_CORE, id_bits, cpus), level(2, 0, 0, 0)]
