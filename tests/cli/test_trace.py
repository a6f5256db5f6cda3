"""``aiokvm trace``: what it shows, filters and sums up, and what it says of files that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from aiokvm.cli import cli, inlab, run
from aiokvm.cli.trace import address_range
from aiokvm.proto.trace import POSTED, Encoder, Header, Lost, Record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Kernel = Callable[[str], Path]
    Aiokvm = Callable[..., "subprocess.CompletedProcess[bytes]"]

IO, MMIO, SHUTDOWN = 2, 6, 8
RECORDS: list[Record | Lost] = [
    Record(1_000, 0, IO, 0x3FD, 1, 1, False, True, b"", "Uart"),
    Record(2_000, None, POSTED, 0x3F8, 1, 20, True, True, b"abcdefghijklmnopqrst", "Uart"),
    Lost(3),
    Record(3_000, 1, MMIO, 0xD000_0000, 4, 1, True, False, b"\x78\x56\x34\x12", "Lamp"),
    Record(4_000, 1, MMIO, 0x3FD, 2, 3, False, False, b"", ""),
    Record(1_500_000_000, 0, SHUTDOWN),
    Record(1_500_000_001, 0, 17, error=14),
]


def encode(items: list[Record | Lost]) -> bytes:
    encoder = Encoder()
    parts = [encoder.record(item) if isinstance(item, Record) else encoder.lost(item.count) for item in items]
    return encoder.header(Header("web", 1_700_000_000 * 10**9)) + b"".join(parts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(encode(RECORDS))
    return path


def show(*args: object) -> Result:
    return CliRunner().invoke(cli, ["trace", *map(str, args)])


def shown(*args: object) -> list[int]:
    """Which of the records the options let through."""
    result = show("--json", *args)
    assert result.exit_code == 0, result.stderr
    times = [json.loads(line).get("time_ns") for line in result.stdout.splitlines()[1:]]
    return [index for index, item in enumerate(RECORDS) if isinstance(item, Record) and item.time_ns in times]


def test_a_line_for_each_exit(file: Path) -> None:
    assert show(file).stdout.splitlines() == [
        "web, 2023-11-14 22:13:20 UTC",
        "     0.000001    0 IO       port 0x3fd         read  1       Uart",
        "     0.000002    - POSTED   port 0x3f8         write 1x20    Uart             "
        "61 62 63 64 65 66 67 68 69 6a 6b 6c 6d 6e 6f 70 ...",
        "3 exits are missing here",
        "     0.000003    1 MMIO     addr 0xd0000000    write 4       Lamp             12345678",
        "     0.000004    1 MMIO     addr 0x3fd         read  2x3     -",
        "     1.500000    0 SHUTDOWN",
        "     1.500000    0 INTERNAL_ERROR Bad address",
    ]


def test_an_object_for_each_exit(file: Path) -> None:
    lines = [json.loads(line) for line in show(file, "--json").stdout.splitlines()]
    assert lines[0] == {"machine": "web", "start_ns": 1_700_000_000 * 10**9}
    assert lines[2] == {
        "time_ns": 2000,
        "vcpu": None,
        "reason": "POSTED",
        "bus": "pio",
        "address": 0x3F8,
        "size": 1,
        "count": 20,
        "is_write": True,
        "values": list(b"abcdefghijklmnopqrst"),
        "device": "Uart",
        "error": 0,
    }
    assert lines[3] == {"lost": 3}
    assert (lines[6]["reason"], lines[6]["bus"], lines[6]["address"]) == ("SHUTDOWN", None, None)


@pytest.mark.parametrize(
    ("options", "records"),
    [
        ("", [0, 1, 3, 4, 5, 6]),
        ("--device Uart", [0, 1]),
        ("--device Uart --device Lamp", [0, 1, 3]),
        ("--device -", [4, 5, 6]),
        ("--vcpu 1", [3, 4]),
        ("--vcpu 1 --device Lamp", [3]),
        ("--reason posted", [1]),
        ("--reason IO --reason KVM_EXIT_SHUTDOWN", [0, 5]),
        ("--port 0x3f8", [1]),
        ("--port 0x3f8-0x3FD", [0, 1]),
        ("--port 1016", [1]),
        ("--address 0x3fd", [4]),
        ("--address 0-0xffffffffffffffff", [3, 4]),
        ("--address 0xd0000000 --port 0x3fd", [0, 3]),
    ],
)
def test_options_filter(file: Path, options: str, records: list[int]) -> None:
    assert shown(file, *options.split()) == records


@pytest.mark.parametrize("text", ["", "x", "0x", "5-", "9-5", "0x10000000000000000", "-1", "0x1-0xg"])
def test_what_is_no_address_is_a_usage_error(file: Path, text: str) -> None:
    result = show(file, f"--port={text}")
    assert result.exit_code == 2
    assert "no address and no range" in result.stderr
    assert address_range("0x10-0x1F") == range(16, 32)


def test_the_summary_adds_up_by_device_and_address(file: Path) -> None:
    assert [line.split() for line in show(file, "--summary").stdout.splitlines()] == [
        ["web,", "2023-11-14", "22:13:20", "UTC:", "6", "exits", "in", "1.500000", "s,", "3", "missing"],
        ["DEVICE", "AT", "READS", "BYTES", "WRITES", "BYTES"],
        ["Uart", "port", "0x3f8", "0", "0", "20", "20"],
        ["-", "addr", "0x3fd", "3", "6", "0", "0"],
        ["Lamp", "addr", "0xd0000000", "0", "0", "1", "4"],
        ["Uart", "port", "0x3fd", "1", "1", "0", "0"],
        ["INTERNAL_ERROR", "1"],
        ["SHUTDOWN", "1"],
    ]


def test_the_summary_as_json(file: Path) -> None:
    summary = json.loads(show(file, "--summary", "--json", "--device", "Lamp").stdout)
    assert summary == {
        "machine": "web",
        "start_ns": 1_700_000_000 * 10**9,
        "end_ns": 3000,
        "exits": 1,
        "lost": 3,
        "accesses": [
            {
                "device": "Lamp",
                "bus": "mmio",
                "address": 0xD000_0000,
                "reads": 0,
                "writes": 1,
                "read_bytes": 0,
                "written_bytes": 4,
            }
        ],
        "others": {},
    }


def test_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(encode([Record(0, 0, IO, 1, 1, 1, False, True, b"", "[red]x[/nope]")]))
    assert "[red]x[/nope]" in show(path, "--summary").stdout


@pytest.mark.parametrize("options", [[], ["--summary"]])
def test_what_is_whole_of_a_trace_that_breaks_off_is_shown(file: Path, options: list[str]) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    result = show(file, *options)
    assert result.exit_code == 125
    assert "Lamp" in result.stdout
    assert result.stderr.startswith("aiokvm: the trace breaks off")


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"\x7fELF" + bytes(1000))
    result = show(tmp_path / "kernel")
    assert (result.exit_code, result.stdout) == (125, "")
    assert result.stderr == "aiokvm: this is no trace: aiokvm run --trace FILE writes one\n"
    assert show(tmp_path / "none").exit_code == 2


def test_a_trace_may_come_on_standard_input(file: Path) -> None:
    result = CliRunner().invoke(cli, ["trace", "-"], input=file.read_bytes())
    assert result.stdout == show(file).stdout


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(encode([Record(time, 0, IO, 1, 1, 1, False, True) for time in range(50_000)]))
    argv = [sys.executable, "-P", "-m", "aiokvm", "trace", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"web")
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


# aiokvm run --trace.

HERE = ("run", "--lab", "never", "-m", "64M")
HI = "66baf803 b068 ee b069 ee "  # "hi" to COM1
READ = "e499 "  # in al, 0x99
EXIT_42 = "b02a e6f4 f4"


@pytest.mark.kvm
def test_run_records_what_trace_shows(kernel: Kernel, aiokvm: Aiokvm, tmp_path: Path) -> None:
    path = tmp_path / "out.trace"
    result = aiokvm(*HERE, "--name", "web", "--trace", path, "--kernel", kernel(HI + READ + EXIT_42))
    assert (result.returncode, result.stdout) == (42, b"hi")
    summary = json.loads(show(path, "--summary", "--json").stdout)
    assert (summary["machine"], summary["lost"]) == ("web", 0)
    accesses = {(row["address"], row["reads"], row["writes"]) for row in summary["accesses"]}
    assert accesses == {(0x3F8, 0, 2), (0x99, 1, 0), (0xF4, 0, 1)}


@pytest.mark.kvm
def test_a_trace_that_cannot_be_written_is_an_error_before_the_guest_starts(
    kernel: Kernel, aiokvm: Aiokvm, tmp_path: Path
) -> None:
    result = aiokvm(*HERE, "--trace", tmp_path / "none" / "trace", "--kernel", kernel(HI + EXIT_42))
    assert (result.returncode, result.stdout) == (125, b"")
    assert b"No such file or directory" in result.stderr


@pytest.mark.kvm
def test_a_full_disk_ends_the_trace_and_is_told(kernel: Kernel, aiokvm: Aiokvm) -> None:
    result = aiokvm(*HERE, "--trace", "/dev/full", "--kernel", kernel(HI + EXIT_42))
    assert (result.returncode, result.stdout) == (125, b"hi")
    assert b"the trace ends here, it cannot be written" in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_trace_comes_back_from_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio

    from aiokvm import lab
    from aiokvm.cli.console import Console, Output

    async def stand_in(command: list[str], config: object, **rest: object) -> int:
        inner = command[command.index("--trace") + 1]
        async with await anyio.open_file(inner, "wb") as file:
            await file.write(b"what was traced")
        return 3

    monkeypatch.setattr(lab, "run", stand_in)
    path = tmp_path / "trace"
    options = run.Options(
        kernel=None,
        initrd=None,
        append="",
        cpus=1,
        memory=64 << 20,
        name="",
        as_json=False,
        timeout=None,
        lab="always",
        log=None,
        trace=path,
        command=(),
    )

    async def main() -> int:
        output = Output(1)
        try:
            machine = inlab.InLab(options, tmp_path, None, run.Report())
            return await machine.run(Console(0, output, output, None, None))
        finally:
            output.close()

    assert anyio.run(main) == 3
    assert path.read_bytes() == b"what was traced"
