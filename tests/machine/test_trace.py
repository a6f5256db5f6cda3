"""A trace has every exit that reached the loop, in the guest's order, whatever its sink does."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import Device, Exit, ExitReason, StateError
from aiokvm.kvm import KvmExit
from aiokvm.machine import trace
from aiokvm.proto.trace import POSTED, Decoder, Header, Lost, Record

if TYPE_CHECKING:
    from aiokvm import VM
    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

IO, MMIO = int(KvmExit.KVM_EXIT_IO), int(KvmExit.KVM_EXIT_MMIO)
EXIT = "b0 00 e6 f4 f4"  # mov al, 0; out 0xf4, al; hlt
# Whatever the guests of these tests do, they do it in protected mode.
PORT = "66 ba 00 03"  # mov dx, 0x300
LOOP = "eb fe"  # jmp $


class Lamp(Device):
    """Reads as 5."""

    def read(self, offset: int, size: int) -> int:
        return 5


class Slow(Device):
    """Answers by a coroutine."""

    async def read(self, offset: int, size: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 6


def decode(chunks: list[bytes]) -> tuple[Header | None, list[Record | Lost]]:
    decoder = Decoder()
    found = [record for chunk in chunks for record in decoder.feed(chunk)]
    decoder.close()
    return decoder.header, found


def untimed(items: list[Record | Lost]) -> list[Record | Lost]:
    return [item._replace(time_ns=0) if isinstance(item, Record) else item for item in items]


async def traced(vm: VM) -> tuple[Header | None, list[Record | Lost]]:
    """The trace of a machine from its start to its end."""
    chunks: list[bytes] = []
    async with vm.trace(chunks.append) as recording:
        await vm.start()
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=0)
    assert recording.lost == 0
    return decode(chunks)


async def test_every_exit_is_recorded(guest: Guest) -> None:
    code = bytes.fromhex(
        f"{PORT} b8 21 43 65 87 ef ec"  # mov eax, 0x87654321; out dx, eax; in al, dx
        "a1 04 00 00 d0"  # mov eax, [0xd0000004]
        "66 a3 08 00 00 d0"  # mov [0xd0000008], ax
        "e6 99 e4 98" + EXIT  # out 0x99, al; in al, 0x98
    )
    devices = [Lamp().at(pio=0x300, size=8), Slow().at(mmio=0xD000_0000, size=16)]
    async with guest(code, mode="protected", start=False, devices=devices, name="lit") as vm:
        header, found = await traced(vm)
    assert header is not None
    assert header.machine == "lit"
    times = [item.time_ns for item in found if isinstance(item, Record)]
    assert times == sorted(times)
    assert untimed(found) == [
        Record(0, 0, IO, 0x300, 4, 1, True, True, b"\x21\x43\x65\x87", "Lamp"),
        Record(0, 0, IO, 0x300, 1, 1, False, True, b"", "Lamp"),
        Record(0, 0, MMIO, 0xD000_0004, 4, 1, False, False, b"", "Slow"),
        Record(0, 0, MMIO, 0xD000_0008, 2, 1, True, False, b"\x06\x00", "Slow"),
        Record(0, 0, IO, 0x99, 1, 1, True, True, b"\x06", ""),
        Record(0, 0, IO, 0x98, 1, 1, False, True, b"", ""),
        Record(0, 0, IO, 0xF4, 1, 1, True, True, b"\x00", "DebugExit"),
    ]


async def test_posted_writes_have_no_vcpu(guest: Guest) -> None:
    code = bytes.fromhex(f"{PORT} b0 68 ee b0 69 ee 66 b8 2a 00 66 ef" + EXIT)  # al = "h", "i"; ax = 42
    devices = [Lamp().at(pio=0x300, size=8, mode="posted")]
    async with guest(code, mode="protected", start=False, devices=devices) as vm:
        _, found = await traced(vm)
    posted = [item for item in found if isinstance(item, Record) and item.reason == POSTED]
    assert all((item.vcpu, item.address, item.device) == (None, 0x300, "Lamp") for item in posted)
    # How many come in one piece depends on how fast the loop is.
    assert [value for item in posted for value in item.values] == [0x68, 0x69, 42]


async def test_strings_are_one_record(guest: Guest) -> None:
    code = bytes.fromhex(f"{PORT} bf 00 00 10 00 b9 03 00 00 00 f3 66 6d" + EXIT)  # rep insw
    async with guest(code, mode="protected", start=False, devices=[Lamp().at(pio=0x300)]) as vm:
        _, found = await traced(vm)
    assert untimed(found)[0] == Record(0, 0, IO, 0x300, 2, 3, False, True, b"", "Lamp")


async def test_an_exit_that_is_no_access_is_recorded(guest: Guest) -> None:
    chunks: list[bytes] = []
    code = bytes.fromhex("0f 0b")  # ud2
    async with guest(code, mode="protected", start=False) as vm, vm.trace(chunks.append):
        await vm.start()
        assert (await vm.wait()).reason is ExitReason.RESET
    assert untimed(decode(chunks)[1]) == [Record(0, 0, int(KvmExit.KVM_EXIT_SHUTDOWN))]


async def test_tracing_a_running_machine_begins_and_ends_at_any_time(guest: Guest) -> None:
    code = bytes.fromhex(f"{PORT} ec eb fd")  # again: in al, dx; jmp again
    enough = threading.Event()
    size = 0

    def write(chunk: bytes) -> None:
        nonlocal size
        chunks.append(chunk)
        size += len(chunk)
        if size > 1000:
            enough.set()

    async with guest(code, mode="protected", devices=[Lamp().at(pio=0x300)]) as vm:
        for _ in range(2):
            chunks: list[bytes] = []
            size = 0
            enough.clear()
            async with vm.trace(write):
                while not enough.is_set():
                    await anyio.lowlevel.checkpoint()
            _, found = decode(chunks)
            assert set(untimed(found)) == {Record(0, 0, IO, 0x300, 1, 1, False, True, b"", "Lamp")}


async def test_the_machine_may_end_within_the_trace(guest: Guest) -> None:
    chunks: list[bytes] = []
    async with guest(bytes.fromhex(LOOP), mode="protected") as vm:
        async with vm.trace(chunks.append):
            await vm.aclose()
        with pytest.raises(StateError, match="closed"):
            await vm.trace(chunks.append).__aenter__()
    assert decode(chunks)[1] == []


async def test_a_machine_has_one_trace_at_a_time(guest: Guest) -> None:
    chunks: list[bytes] = []
    async with guest(bytes.fromhex(LOOP), mode="protected") as vm:
        async with vm.trace(chunks.append):
            with pytest.raises(StateError, match="traced already"):
                await vm.trace(chunks.append).__aenter__()
        async with vm.trace(chunks.append):
            pass


async def test_what_a_slow_sink_has_no_room_for_is_counted(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "CHUNK_BYTES", 64)
    monkeypatch.setattr(trace, "BUFFER_BYTES", 256)
    # again: in al, dx; dec ecx; jnz again
    code = bytes.fromhex(f"{PORT} b9 64 00 00 00 ec 49 75 fc" + EXIT)
    ended = threading.Event()
    chunks: list[bytes] = []

    def write(chunk: bytes) -> None:
        assert ended.wait(30)
        chunks.append(chunk)

    devices = [Lamp().at(pio=0x300)]
    async with (
        guest(code, mode="protected", start=False, devices=devices) as vm,
        vm.trace(write) as recording,
    ):
        await vm.start()
        await vm.wait()
        ended.set()
    _, found = decode(chunks)
    lost = [item.count for item in found if isinstance(item, Lost)]
    assert sum(lost) == recording.lost > 0
    assert len(found) - len(lost) + recording.lost == 101


async def test_a_sink_that_fails_ends_the_trace_and_not_the_machine(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    def write(chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with guest(bytes.fromhex(EXIT), mode="protected", start=False, name="full") as vm:
        recording = await vm.trace(write).__aenter__()
        await vm.start()
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=0)
        with pytest.raises(OSError, match="No space left"):
            await recording.__aexit__(None, None, None)
        assert vm._life.exits.tracer is None
    (record,) = caplog.records
    assert (record.name, record.__dict__["machine"]) == ("aiokvm.machine", "full")
    assert "full: the trace ends here" in record.getMessage()


async def test_a_trace_that_is_cancelled_is_written_to_its_end(guest: Guest) -> None:
    chunks: list[bytes] = []
    async with guest(bytes.fromhex(EXIT), mode="protected", start=False) as vm:
        with anyio.CancelScope() as scope:
            async with vm.trace(chunks.append):
                await vm.start()
                await vm.wait()
                scope.cancel()
                await anyio.sleep_forever()
    assert [item.address for item in decode(chunks)[1] if isinstance(item, Record)] == [0xF4]


async def test_unclaimed_accesses_do_not_reach_the_loop_after_a_trace(guest: Guest) -> None:
    chunks: list[bytes] = []
    code = bytes.fromhex(f"e4 99 {PORT} ec" + EXIT)  # in al, 0x99; in al, dx
    async with guest(code, mode="protected", start=False, devices=[Lamp().at(pio=0x300)]) as vm:
        async with vm.trace(chunks.append):
            pass
        await vm.start()
        await vm.wait()
        (stats,) = vm.stats().vcpus
        assert stats.unclaimed == 1
