"""The collector shows what the statistics say, in Prometheus' own format."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aiokvm import VM, ConfigError, Device, StateError, boot, metrics
from aiokvm.metrics import MachineCollector

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aiokvm import VmStats

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

# in al, 0x99; mov dx, 0x300; in al, dx; mov al, 0; out 0xf4, al; hlt
CODE = bytes.fromhex("e4 99 ba 00 03 ec b0 00 e6 f4 f4")

LABELS = ("machine", "vcpu", "reason", "device", "bus", "base")


class Lamp(Device):
    """Reads as 5."""

    def read(self, offset: int, size: int) -> int:
        return 5


def machine(name: str) -> Awaitable[VM]:
    devices = [Lamp().at(pio=0x300)]
    return VM.create(boot=boot.Flat(CODE, mode="real"), memory="2M", name=name, devices=devices)


def collected(registry: CollectorRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """Metric to label values to value, as a scraper finds them; all names are checked on the way."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.name.startswith("aiokvm_")
        assert family.documentation
        for sample in family.samples:
            key = tuple(sample.labels[label] for label in LABELS if label in sample.labels)
            assert len(key) == len(sample.labels)
            assert key not in found.setdefault(sample.name, {}), f"{sample.name} {key} is there twice"
            found[sample.name][key] = sample.value
    return found


async def test_what_the_statistics_say_is_shown() -> None:
    collector, registry = MachineCollector(), CollectorRegistry()
    registry.register(collector)
    assert collected(registry) == {}
    with anyio.fail_after(30):
        async with await machine("one") as one, await machine("two") as two:
            collector.add(one)
            collector.add(two)
            await one.start()
            await one.wait()
            found = collected(registry)
            stats = one.stats()
    (vcpu,) = stats.vcpus
    assert found["aiokvm_exits_total"] == {
        ("one", "0", reason): count for reason, count in vcpu.reasons.items()
    }
    assert found["aiokvm_unclaimed_accesses_total"] == {("one", "0"): 1, ("two", "0"): 0}
    assert found["aiokvm_guest_seconds_total"]["one", "0"] == pytest.approx(vcpu.guest_ns / 1e9)
    assert found["aiokvm_wait_seconds_total"]["one", "0"] == pytest.approx(vcpu.wait_ns / 1e9)
    assert found["aiokvm_serving_seconds_total"]["one",] == pytest.approx(stats.serving_ns / 1e9)
    assert found["aiokvm_doorbell_rings_total"]["one",] == stats.rings
    assert found["aiokvm_memory_bytes"] == {("one",): 2 << 20, ("two",): 2 << 20}
    served = found["aiokvm_device_accesses_total"]
    assert {key: value for key, value in served.items() if value} == {
        ("one", "Lamp", "pio", "0x300"): 1,
        ("one", "DebugExit", "pio", "0xf4"): 1,
    }
    assert len(found) == 14


async def test_a_closed_machine_is_forgotten() -> None:
    collector, registry = MachineCollector(), CollectorRegistry()
    registry.register(collector)
    async with await machine("one") as vm:
        collector.add(vm)
        assert collected(registry)["aiokvm_memory_bytes"] == {("one",): 2 << 20}
    assert collected(registry) == {}
    async with await machine("one") as vm:
        collector.add(vm)
        collector.add(vm)
        assert collected(registry)["aiokvm_memory_bytes"] == {("one",): 2 << 20}
        collector.remove(vm)
        collector.remove(vm)
        assert collected(registry) == {}


async def test_two_machines_of_one_name_are_refused() -> None:
    collector = MachineCollector()
    async with await machine("one") as vm, await machine("one") as other:
        collector.add(vm)
        with pytest.raises(ConfigError, match="a machine named one is shown already"):
            collector.add(other)


async def test_a_snapshot_of_many_machines_does_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, registry = MachineCollector(), CollectorRegistry()
    registry.register(collector)
    async with AsyncExitStack() as stack:
        for number in range(12):
            collector.add(await stack.enter_async_context(await machine(f"m{number:02}")))
        now = collected(registry)
        stats = VM.stats

        def slow(vm: VM) -> VmStats:
            end_s = time.thread_time() + 0.006
            while time.thread_time() < end_s:
                pass
            return stats(vm)

        monkeypatch.setattr(VM, "stats", slow)
        snapshot = await collector.snapshot()
        assert await to_thread.run_sync(collected, snapshot) == now


async def test_a_machine_that_is_closed_meanwhile_is_not_in_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_SLICE_NS", 0)
    collector = MachineCollector()
    async with await machine("one") as vm, await machine("two") as other:
        collector.add(vm)
        collector.add(other)
        snapshots: list[CollectorRegistry] = []

        async def take() -> None:
            snapshots.append(await collector.snapshot())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            await anyio.lowlevel.checkpoint()
            collector.remove(other)
        assert ("one",) in collected(snapshots[0])["aiokvm_memory_bytes"]
        await other.aclose()
        assert collected(await collector.snapshot())["aiokvm_memory_bytes"] == {("one",): 2 << 20}


async def test_another_thread_may_not_collect() -> None:
    collector = MachineCollector()
    async with await machine("one") as vm:
        collector.add(vm)
        with pytest.raises(StateError, match="collect there"):
            await to_thread.run_sync(lambda: list(collector.collect()))


async def test_a_machine_is_added_on_its_own_thread() -> None:
    collector = MachineCollector()
    async with await machine("one") as vm:
        with pytest.raises(StateError, match="another event loop"):
            await to_thread.run_sync(collector.add, vm)
        assert not any(family.samples for family in collector.collect())
        collector.add(vm)
        assert any(family.samples for family in collector.collect())


def families() -> list[Any]:
    return list(MachineCollector().describe())


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_names_follow_the_conventions(family: Any) -> None:
    assert not family.name.endswith("_total")
    assert not {"ns", "ms", "kb", "mb"} & set(family.name.split("_"))
    assert (family.type == "counter") == (family.name != "aiokvm_memory_bytes")
