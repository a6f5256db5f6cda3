"""Every example runs, and shows what it is there to show."""

from __future__ import annotations

import errno
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWN = {
    "device_http": r"the guest read 21500 from its register at 0xd0000000\n",
    "on_trio": r"the guest read 21500 from its register at 0xd0000000\n",
    "http_disk": r"a disk of 1048576 bytes\nfetched bytes=0-262143\nfetched bytes=524288-786431\n",
    "virtio_device": r"the guest got 7{16}\n",
    "asgi_service": r"(hello from a guest\n){3}",
    # Which flags an instruction leaves is not the point.
    "debugger": (
        r"0x1000  31 c0( +rflags=\w+)?\n"
        r"0x1002  b9 03 00 +rcx=0x3\n"
        r"0x1005  01 c8 +rax=0x3( rflags=\w+)?\n"
        r"0x1007  e2 fc +rcx=0x2 -> 0x1005\n"
        r"0x1005  01 c8 +rax=0x5( rflags=\w+)?\n"
        r"0x1007  e2 fc +rcx=0x1 -> 0x1005\n"
        r"0x1005  01 c8 +rax=0x6( rflags=\w+)?\n"
        r"0x1007  e2 fc +rcx=0x0\n"
        r" +out 0xf4 06\n"
    ),
}
LIMIT_S = 60


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.kvm
@pytest.mark.parametrize("name", SHOWN)
def test_an_example_shows_what_it_is_for(name: str) -> None:
    output = run(name)
    assert re.fullmatch(SHOWN[name], output), output


def test_every_example_is_run() -> None:
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    assert there == SHOWN.keys() | {"demo", "fleet"}  # which boot Linux: make demo, tests/linux/test_fleet.py


@pytest.mark.kvm
def test_the_debugger_steps_through_a_file_up_to_its_halt(tmp_path: Path) -> None:
    image = tmp_path / "image.bin"
    image.write_bytes(bytes.fromhex("eb 00 f4"))  # jmp 0x1002; hlt
    assert re.fullmatch(r"0x1000  eb 00\n0x1002  the guest halts\n", run("debugger", str(image)))


def test_the_fleet_asks_for_the_hosts_that_are_given() -> None:
    example = runpy.run_path(str(EXAMPLES / "fleet.py"))
    assert example["wanted"](("deb.debian.org",)) == ["http://deb.debian.org/", "http://secret.example/"]


def vcpu_threads() -> set[str]:
    """Names of the process's threads that end in a colon and an index."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return {name for name in names if name.rpartition(":")[2].isdigit()}


@pytest.fixture
def create_app() -> Callable[[], Any]:
    create: Callable[[], Any] = runpy.run_path(str(EXAMPLES / "asgi_service.py"))["create_app"]
    return create


@pytest.mark.anyio
@pytest.mark.kvm
async def test_the_service_answers_each_request_by_a_machine_of_its_own(
    create_app: Callable[[], Any],
) -> None:
    answers: dict[int, str] = {}

    async def ask(client: httpx.AsyncClient, lines: int) -> None:
        answers[lines] = (await client.get("/", params={"lines": lines})).text

    with anyio.fail_after(LIMIT_S):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app()), base_url="http://test"
        ) as client:
            async with anyio.create_task_group() as tasks:
                for lines in (1, 2, 5):
                    tasks.start_soon(ask, client, lines)
            assert (await client.get("/?lines=many")).status_code == 400
    assert answers == {lines: "hello from a guest\n" * lines for lines in (1, 2, 5)}


@pytest.mark.anyio
@pytest.mark.kvm
async def test_the_service_ends_the_machine_of_a_client_that_disconnects(
    create_app: Callable[[], Any],
) -> None:
    before = vcpu_threads()
    gone = anyio.Event()
    seen: list[MutableMapping[str, Any]] = []
    body = b""
    requests = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> MutableMapping[str, Any]:
        for request in requests:
            return request
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal body
        await anyio.lowlevel.checkpoint()
        seen.append(message)
        body += message.get("body", b"")
        if body.startswith(b"hello from a guest\n"):
            assert vcpu_threads() > before
            gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"lines=0",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    with anyio.fail_after(LIMIT_S):
        await create_app()(scope, receive, send)
    assert gone.is_set()
    assert [message["type"] for message in seen[:2]] == ["http.response.start", "http.response.body"]
    # The guest prints without end, and so did the response.
    assert all(message["more_body"] for message in seen[1:])
    assert vcpu_threads() == before


@pytest.mark.anyio
async def test_the_http_disk_fetches_each_piece_once_and_no_piece_of_another_file(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "http_disk.py"))
    content, ranges = bytearray(random.Random(1).randbytes(1 << 20)), list[str]()
    read: dict[int, bytes] = {}
    with anyio.fail_after(LIMIT_S), example["serving"](content, ranges) as url:

        async def take(offset: int) -> None:
            read[offset] = await disk.read(offset, 65536)

        async with example["HttpDisk"](url, tmp_path / "cache") as disk:
            async with anyio.create_task_group() as tasks:
                for offset in range(0, 1 << 19, 65536):
                    tasks.start_soon(take, offset)
            assert b"".join(read[offset] for offset in sorted(read)) == content[: 1 << 19]
            assert sorted(ranges) == ["bytes=0-262143", "bytes=262144-524287"]
            before = bytes(content[:512])
            content[0] ^= 1  # another file is there now
            assert await disk.read(0, 512) == before
            with pytest.raises(OSError, match="status 206") as caught:
                await disk.read(1 << 19, 512)
            assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        await example["HttpDisk"]("http://127.0.0.1:1/", tmp_path / "cache").open()
