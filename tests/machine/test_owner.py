"""What belongs to a loop says so on any other loop and thread, and nothing of it changes."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

import aiokvm
from aiokvm import VM, Device, StateError, VirtioDevice, block, boot, net
from aiokvm.aio import current_loop
from aiokvm.aio.owner import is_guarded
from aiokvm.machine.virtio_queue import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Public classes that belong to no loop: values, descriptions of what is to be made, what any thread may use;
# what a device overrides and its machine calls; and watchers that start where they are entered.
FREE = {
    *(
        "GuestMemory",
        "RamRegion",
        "Attachment",
        "Disk",
        "Placement",
        "Watchdog",
        "HoldUp",
        "Limit",
        "RngConfig",
    ),
    *("VirtioDevice", "VirtioQueue", "VirtioRequest", "Irq"),
    *("Nic", "Rule", "Frame", "Batch", "Flow", "Forward"),
}
# Methods that are for any place, for they only describe; and one that looks at several owners by itself.
FREE_METHODS = {"VM.create", "Device.at", "Hook.forget"}


def classes() -> Iterator[type]:
    for module in (aiokvm, block, net):
        for name in module.__all__:
            member = getattr(module, name)
            if inspect.isclass(member) and name not in FREE and not issubclass(member, Exception):
                yield member


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, member in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("_"):
            yield name, member


def is_value(cls: type) -> bool:
    return hasattr(cls, "__dataclass_fields__") or hasattr(cls, "__members__")


def test_every_public_method_is_guarded() -> None:
    found = [cls for cls in classes() if not is_value(cls)]
    assert VM in found
    assert len(found) > 20
    forgotten = [
        f"{cls.__name__}.{name}"
        for cls in found
        for name, method in methods(cls)
        if not is_guarded(method)
        and f"{cls.__name__}.{name}" not in FREE_METHODS
        # Those of a base from elsewhere, as Mapping's.
        and (method.__module__ or "").startswith("aiokvm")
    ]
    assert forgotten == []


class Idle(Device):
    pass


class Plain(VirtioDevice):
    device_id = 42
    queue_size_max = (8,)


async def call(owner: Any, name: str) -> None:
    # The arguments make no sense: it says no before it looks at them.
    done = getattr(owner, name)()
    if hasattr(done, "__await__"):
        await done


async def refuse_all(owners: list[Any]) -> None:
    for owner in owners:
        for name, method in methods(type(owner)):
            if is_guarded(method):
                with pytest.raises(StateError, match="belongs to another event loop"):
                    await call(owner, name)


def in_thread(check: Callable[[], Any]) -> None:
    """Without a loop: coroutines are stepped by hand."""
    coroutine = check()
    with pytest.raises(StopIteration):
        coroutine.send(None)


@pytest.mark.anyio
@pytest.mark.kvm
@pytest.mark.parametrize("where", ["asyncio", "trio", "thread"])
async def test_a_machine_and_all_of_it_is_for_its_own_loop(tmp_path: Path, where: str) -> None:
    path, base = tmp_path / "disk.img", tmp_path / "base.img"
    path.write_bytes(bytes(1 << 20))
    base.write_bytes(bytes(1 << 20))
    device, virtio = Idle(), Plain()
    port, user, spare = net.Port(), net.User(), net.Switch()
    disk = block.Raw(path)
    overlay = block.Overlay(block.Raw(base, readonly=True))
    image = boot.Flat(b"\xeb\xfe")
    options: Any = {"console": ["agent"], "rng": True, "balloon": True, "virtio": [virtio]}
    async with (
        spare as switch,
        await VM.create(
            boot=image,
            memory="4M",
            disks=[disk],
            nets=[port, user, switch.port()],
            devices=[device.at(pio=0x300, irq=5)],
            **options,
        ) as vm,
        overlay,
    ):
        await vm.start()
        timer = device.timer(device.now_ns() + int(1e15), lambda: None)
        owners = [
            *(vm, vm.serial, vm.console, vm.console["agent"], vm.balloon, vm.vcpus[0], *vm.disks, *vm.nets),
            *(device, device.irq, timer, virtio._host, port, user, switch, vm.nets[2].backend),
            *(disk, overlay, overlay.base, vm.events(), vm.trace(lambda data: None)),
        ]
        lines = [vm.serial.lines(), vm.console["agent"].lines()]

        async def check() -> None:
            await refuse_all(owners)
            for iterator in lines:
                await refuse(iterator.__anext__)

        if where == "thread":
            await anyio.to_thread.run_sync(in_thread, check)
        else:
            await anyio.to_thread.run_sync(lambda: anyio.run(check, backend=where))
        # Here all of it works as before.
        await vm.pause()
        await vm.resume()
        assert vm.vcpus[0].stats().exits >= 0
        device.irq.pulse()
        timer.cancel()
        await disk.flush()
        assert vm.exit is None
    # What is left of it is anybody's.
    read = await anyio.to_thread.run_sync(lambda: anyio.run(vm.serial.read))
    assert read == b""
    assert vm.state is aiokvm.VmState.CLOSED


@pytest.mark.anyio
@pytest.mark.kvm
async def test_a_coroutine_that_was_made_elsewhere_runs_on_its_loop() -> None:
    made: list[Any] = []
    async with await VM.create(boot=boot.Flat(b"\xeb\xfe"), memory="2M") as vm:
        await vm.start()
        thread = threading.Thread(target=lambda: made.append(vm.kill()))
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        assert await made[0] == vm.exit


async def refuse(what: Callable[[], Any]) -> None:
    async def use() -> None:
        done = what()
        if hasattr(done, "__await__"):
            await done

    with pytest.raises(StateError, match="belongs to another event loop"):
        await use()


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["asyncio", "trio", "thread"])
async def test_what_a_network_is_given_is_for_its_loop(where: str) -> None:
    """Hooks, applications and iterators of a port: while they are in use, and for all later."""
    hook, asked = net.Hook(lambda _flow: True), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["type"])
        raise ValueError(scope["type"])

    application = net.Asgi(app)
    port = net.Port(filters=[hook])
    user = net.User(services={("10.0.2.100", 80): application})
    async with net.Switch() as switch:
        await switch.connect(port)
        await switch.connect(user)
        batches = port.batches()
        forbidden: list[Callable[[], Any]] = [
            hook.forget,
            lambda: application.start(current_loop()),
            application.stop,
            lambda: application(None),  # type: ignore[arg-type]
            batches.__anext__,
        ]

        async def check() -> None:
            for what in forbidden:
                await refuse(what)

        if where == "thread":
            # Who has no loop has none to give.
            del forbidden[1]
            await anyio.to_thread.run_sync(in_thread, check)
        else:
            await anyio.to_thread.run_sync(lambda: anyio.run(check, backend=where))
        hook.forget()
    hook.forget()
    assert asked == ["lifespan"]
    await anyio.to_thread.run_sync(hook.forget)

    async def use_elsewhere() -> None:
        await application.start(current_loop())
        await application.stop()

    await anyio.to_thread.run_sync(lambda: anyio.run(use_elsewhere, backend="trio"))
    assert asked == ["lifespan", "lifespan"]


class FakeChain:
    readable_bytes = writable_bytes = 0
    void = False

    def __init__(self) -> None:
        self.called: list[str] = []

    def read(self, n: int = -1) -> bytes:
        self.called.append("read")
        return b""

    def write(self, data: bytes) -> int:
        self.called.append("write")
        return 0

    def push(self, written: int | None = None) -> None:
        self.called.append("push")


@pytest.mark.anyio
async def test_a_request_is_completed_on_its_loop() -> None:
    chain: Any = FakeChain()
    request = Request(current_loop(), chain, lambda: None)

    async def elsewhere() -> None:
        for what in (request.read, lambda: request.write(b""), request.push):
            await refuse(what)

    await anyio.to_thread.run_sync(in_thread, elsewhere)
    assert chain.called == []
    request.push()
    assert chain.called == ["push"]
