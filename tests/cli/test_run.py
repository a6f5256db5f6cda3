from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import anyio
import pytest
from click.testing import CliRunner, Result

from aiokvm import KvmError, kvm, lab
from aiokvm.cli import cli, host
from aiokvm.cli.run import Options
from aiokvm.cli.typed import resized
from tests.cli.terminal import WATCH, Terminal

Kernel = Callable[[str], Path]
Aiokvm = Callable[..., "subprocess.CompletedProcess[bytes]"]

HERE = ("run", "--lab", "never", "-m", "64M")
HLT = "f4 "
HI = "66baf803 b068 ee b069 ee b00d ee b00a ee "  # "hi\r\n" to COM1
EXIT_42 = "b02a e6f4 f4"
RESET = "b0fe e664 f4"  # the keyboard controller's reset line
TRIPLE_FAULT = "0f0b"
# Wait for PWRBTN_STS in PM1_STS, then exit with 9.
POWER_BUTTON = "66ba0006 66ed f6c401 74f9 b009 e6f4 f4"
# 1: wait for a byte on COM1, echo it; until it is "q", then exit with 7.
ECHO = "66bafd03 ec a801 74f7 66baf803 ec ee 3c71 75ed b007 e6f4 f4"


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (HI + EXIT_42, 42, b""),
        (HI + RESET, 75, b"aiokvm: the guest has asked for a reset: keyboard controller\n"),
        (HI + TRIPLE_FAULT, 75, b"triple fault"),
    ],
)
def test_status_is_how_the_guest_ended(
    code: str, status: int, message: bytes, kernel: Kernel, aiokvm: Aiokvm
) -> None:
    result = aiokvm(*HERE, "--kernel", kernel(code))
    assert result.returncode == status
    assert result.stdout == b"hi\r\n"
    assert message in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.kvm
def test_report_and_log(kernel: Kernel, aiokvm: Aiokvm, tmp_path: Path) -> None:
    path, log = kernel(HI + EXIT_42), tmp_path / "log"
    result = aiokvm(*HERE, "--kernel", path, "--json", "--name", "web", "--log", log)
    report = json.loads(result.stdout)
    seconds = report.pop("seconds")
    assert report == {
        "name": "web",
        "kernel": str(path),
        "lab": False,
        "reason": "debug-exit",
        "code": 42,
        "detail": "",
        "status": 42,
    }
    assert seconds.keys() == {"fetch", "create", "run"}
    assert result.stderr.endswith(b"hi\r\n")
    assert log.read_bytes() == b"hi\r\n"


@pytest.mark.kvm
def test_timeout(kernel: Kernel, aiokvm: Aiokvm) -> None:
    result = aiokvm(*HERE, "--kernel", kernel(HI + HLT), "--timeout", "0.2", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == report["status"] == 124
    assert (report["reason"], report["detail"]) == ("killed", "the machine did not end within 0.2 s")
    assert b"hi\r\n" in result.stderr


@pytest.mark.kvm
def test_piped_input_is_passed_on_and_its_end_is_not_the_end(kernel: Kernel, aiokvm: Aiokvm) -> None:
    assert aiokvm(*HERE, "--kernel", kernel(ECHO), stdin=b"ab\x1dcq").stdout == b"ab\x1dcq"
    late = aiokvm(*HERE, "--kernel", kernel(ECHO), "--timeout", "0.3", stdin=b"ab")
    assert (late.returncode, late.stdout) == (124, b"ab")
    assert late.stderr.endswith(b"aiokvm: the machine did not end within 0.3 s\n")


@pytest.mark.kvm
def test_input_may_be_a_file(kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"xyq")
    with (tmp_path / "input").open("rb") as stdin, (tmp_path / "output").open("wb") as stdout:
        argv = [sys.executable, "-P", "-m", "aiokvm", *HERE, "--kernel", str(kernel(ECHO))]
        assert subprocess.run(argv, stdin=stdin, stdout=stdout, timeout=60, check=False).returncode == 7
    assert (tmp_path / "output").read_bytes() == b"xyq"


@pytest.mark.kvm
def test_reader_that_leaves_ends_the_machine(kernel: Kernel) -> None:
    source, sink = os.pipe()
    argv = [sys.executable, "-P", "-m", "aiokvm", *HERE, "--kernel", str(kernel(ECHO))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=sink) as process:
        os.close(sink)
        os.close(source)
        assert process.stdin is not None
        process.stdin.write(b"a")
        process.stdin.close()
        assert process.wait(60) == 128 + signal.SIGPIPE


def terminal(kernel: Path, *options: str) -> Terminal:
    return Terminal(*HERE, *options, "--kernel", kernel)


@pytest.mark.kvm
def test_keys_go_to_the_guest_as_they_are_and_ctrl_bracket_leaves(kernel: Kernel) -> None:
    with terminal(kernel(HI + ECHO)) as there:
        there.expect(b"hi\r\n")
        assert there.is_raw()
        there.type(b"\x03\x04\r")
        there.expect(b"\x03\x04\r")
        there.type(b"\x1d")
        assert there.process.wait(60) == 130
        assert termios.tcgetattr(there.fd) == there.before


@pytest.mark.kvm
def test_signal_presses_the_power_button(kernel: Kernel) -> None:
    with terminal(kernel(HI + POWER_BUTTON), "--json") as there:
        there.expect(b"hi\r\n")
        there.process.send_signal(signal.SIGTERM)
        there.expect(b'"code": 9')
        assert there.process.wait(60) == 128 + signal.SIGTERM
        assert termios.tcgetattr(there.fd) == there.before


@pytest.mark.kvm
def test_second_signal_kills(kernel: Kernel) -> None:
    with terminal(kernel(HI + HLT)) as there:
        there.expect(b"hi\r\n")
        start = time.monotonic()
        there.process.send_signal(signal.SIGTERM)
        there.process.send_signal(signal.SIGHUP)
        assert there.process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
        assert time.monotonic() - start < 4
        assert termios.tcgetattr(there.fd) == there.before


@pytest.mark.kvm
def test_guest_that_ends_gives_the_terminal_back(kernel: Kernel) -> None:
    with terminal(kernel(HI + TRIPLE_FAULT)) as there:
        assert there.process.wait(60) == 75
        assert termios.tcgetattr(there.fd) == there.before


@pytest.mark.kvm
def test_bare_run_imports_no_more_than_it_needs(kernel: Kernel) -> None:
    program = (
        "import sys; from aiokvm.cli import cli\n"
        f"try: cli({[*HERE, '--kernel', str(kernel(EXIT_42))]!r})\n"
        "except SystemExit as end: print(end.code, *sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    status, *modules = result.stdout.split()
    assert status == "42"
    assert not {"rich", "aiofiles", "aiokvm.images", "aiokvm.lab", "aiokvm.cli.doctor"} & set(modules)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--kernel", "nope"], 125, "aiokvm: nope is neither a file nor one of the images cloud, "),
        (["--kernel", "nope", "--", "ls"], 125, "aiokvm: nope is neither a file nor one of the images"),
        (["--kernel", "./nope"], 125, "nope: No such file or directory"),
        (["--kernel", "initramfs"], 125, "the image initramfs (busybox, for cloud) is no kernel"),
        (["--kernel", "./nope", "--append", "a\udcff"], 125, "cannot be encoded"),
        (["-m", "5X"], 2, "'5X' is not a size"),
        (["-c", "0"], 2, "0 is not in the range"),
        (["--timeout", "0"], 2, "'0' is no number of seconds above 0"),
        (["--timeout", "nan"], 2, "'nan' is no number of seconds above 0"),
        (["--lab", "sometimes"], 2, "is not one of"),
        (["--kernel", "./nope", "--", "ls"], 2, "only these initramfs images can: initramfs, "),
        (["--initrd", "./nope", "ls", "-l"], 2, "--initrd ./nope cannot be told a command"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(args: list[str], status: int, message: str) -> None:
    result = CliRunner().invoke(cli, ["run", "--lab", "never", *args])
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-m", "0"], "memory is 0 bytes"),
        (["-c", "100000"], "cpus is 100000: a machine has at most 4096"),
        (["--name", "a\nb"], "printable"),
        (["--kernel", "./nope"], "nope: No such file or directory"),
        (["--kernel", __file__], "is neither a bzImage nor an ELF file"),
    ],
)
def test_no_lab_is_started_for_what_cannot_work(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> int:
        raise AssertionError

    monkeypatch.setattr(lab, "run", never)
    result = CliRunner().invoke(cli, ["run", "--lab", "always", "--kernel", __file__, *args])
    assert (result.exit_code, result.stdout) == (125, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def as_if_in_the_lab(
    inner: subprocess.CompletedProcess[bytes], path: Path, monkeypatch: pytest.MonkeyPatch
) -> Result:
    """The command outside of the lab, when the one inside ended like this."""

    async def run(argv: list[str], *_: object, **__: object) -> int:
        await anyio.Path(argv[3], "report").write_bytes(inner.stdout)
        return inner.returncode

    monkeypatch.setattr(lab, "run", run)
    return CliRunner().invoke(cli, ["run", "--lab", "always", "--kernel", str(path)])


@pytest.mark.kvm
def test_what_is_warned_of_in_the_lab_is_no_output(
    kernel: Kernel, aiokvm: Aiokvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = aiokvm(*HERE, "--framed", "--json", "--kernel", kernel(HI + TRIPLE_FAULT))
    assert (inner.returncode, inner.stderr) == (75, b"hi\r\n")

    result = as_if_in_the_lab(inner, kernel(EXIT_42), monkeypatch)
    assert (result.exit_code, result.stdout) == (75, "")
    warned, said = result.stderr.splitlines()
    assert warned.startswith(
        f"aiokvm: {json.loads(inner.stdout.splitlines()[-1])['name']}: vCPU 0: triple fault; rip="
    )
    assert said == "aiokvm: the guest has asked for a reset: vCPU 0: triple fault"


def test_what_fails_in_the_lab_is_said_here(
    kernel: Kernel, aiokvm: Aiokvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = aiokvm(*HERE, "--framed", "--json", "--kernel", "./nope")
    assert (inner.returncode, inner.stderr) == (125, b"")

    result = as_if_in_the_lab(inner, kernel(EXIT_42), monkeypatch)
    assert (result.exit_code, result.stdout) == (125, "")
    assert result.stderr.startswith("aiokvm: cannot read ")
    assert result.stderr.count("\n") == 1


@pytest.mark.kvm
def test_output_that_cannot_be_written_is_told(kernel: Kernel) -> None:
    argv = [sys.executable, "-P", "-m", "aiokvm", *HERE, "--kernel", str(kernel(HI + EXIT_42))]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert result.returncode == 125
    assert result.stderr == b"aiokvm: cannot write the output: No space left on device\n"


def test_own_errors_are_in_the_report() -> None:
    result = CliRunner().invoke(cli, ["run", "--lab", "never", "--json", "--kernel", "nope"])
    report = json.loads(result.stdout)
    assert (report["status"], report["reason"]) == (125, None)
    assert report["detail"].startswith("nope is neither")


def test_why_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    class System:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def refuse() -> System:
        raise KvmError("open", 13, "add the user")

    monkeypatch.setattr(kvm, "System", System)
    monkeypatch.setattr(kvm, "ring0_speed", lambda _: 250e6)
    assert host.why_lab() == ""
    monkeypatch.setattr(kvm, "ring0_speed", lambda _: 1.2e6)
    assert "1.2 million instructions a second" in host.why_lab()
    monkeypatch.setattr(kvm, "System", refuse)
    assert "add the user" in host.why_lab()


@pytest.mark.parametrize(
    ("args", "status", "output"),
    [
        pytest.param(["--", "true"], 0, b"", marks=pytest.mark.linux),
        pytest.param(["--", "false"], 1, b"", marks=pytest.mark.linux),
        pytest.param(["-c", "2", "--", "sh", "-c", "nproc; exit 42"], 42, b"2\n", marks=pytest.mark.linux),
        pytest.param(["--", "printf", r"a\r\n\377"], 0, b"a\r\n\xff", marks=pytest.mark.linux),
        pytest.param(["--append", "reboot=t", "--", "reboot", "-f"], 75, None, marks=pytest.mark.linux),
        pytest.param(["--append", "rdinit=/nonexistent", "--", "true"], 75, b"", marks=pytest.mark.linux),
        pytest.param(["--timeout", "30", "--", "sleep", "1000"], 124, b"", marks=pytest.mark.linux),
    ],
)
def test_command_in_linux(args: list[str], status: int, output: bytes | None, aiokvm: Aiokvm) -> None:
    result = aiokvm("run", "--lab", "never", *args, timeout=180)
    assert result.returncode == status, result.stderr
    assert output is None or result.stdout == output
    assert b"Traceback" not in result.stderr


@pytest.mark.linux
def test_shell_takes_piped_input_and_shuts_down(aiokvm: Aiokvm) -> None:
    result = aiokvm("run", "--lab", "never", stdin=b"echo $((6*7))\npoweroff -f\n", timeout=180)
    assert result.returncode == 0, result.stderr
    assert b"\n42\r\n" in result.stdout


@pytest.mark.lab
@pytest.mark.parametrize("options", [(), ("--net", "user", "--append", "aiokvm.nodhcp")])
def test_lab_carries_input_output_status_and_report(aiokvm: Aiokvm, options: tuple[str, ...]) -> None:
    command = "stty -echo; echo ready; read line; echo got $line; exit 3"
    argv = ("run", "--lab", "always", "--json", *options, "--", "sh", "-c", command)
    result = aiokvm(*argv, stdin=b"this\n", timeout=300)
    report = json.loads(result.stdout)
    assert result.returncode == report["status"] == report["code"] == 3
    assert (report["lab"], report["reason"]) == (True, "debug-exit")
    assert report["seconds"].keys() == {"fetch", "lab", "create", "run"}
    assert b"got this\n" in result.stderr


@pytest.mark.lab
def test_lab_carries_the_terminal_s_size_to_the_guest() -> None:
    with Terminal("run", "--lab", "always") as there:
        there.expect(b"# ", 120)
        there.type(WATCH)
        there.expect(b"24 80\r\n")
        there.expect(b"watching")
        for rows, cols in ((50, 132), (25, 81)):
            there.resize(rows, cols)
            there.expect(b"%d %d\r\n" % (rows, cols))
        there.type(b"\x03")
        there.expect(b"# ")
        there.type(b"poweroff -f\n")
        assert there.process.wait(60) == 0


@pytest.mark.kvm
def test_reboot_begins_anew(kernel: Kernel, aiokvm: Aiokvm) -> None:
    result = aiokvm(*HERE, "--reboot", "--timeout", "5", "--kernel", kernel(HI + RESET))
    assert result.returncode == 124
    assert result.stdout.startswith(b"hi\r\nhi\r\nhi\r\n")


def test_more_memory_than_there_is_takes_overcommit(kernel: Kernel, aiokvm: Aiokvm) -> None:
    for where in ("never", "always"):
        result = aiokvm("run", "--lab", where, "-m", "64T", "--kernel", kernel(HI + EXIT_42))
        assert result.returncode == 125
        assert b"memory is 65536 GiB, and " in result.stderr
        assert result.stderr.count(b"\n") == 1


@pytest.mark.kvm
def test_overcommit(kernel: Kernel, aiokvm: Aiokvm) -> None:
    result = aiokvm("run", "--lab", "never", "--overcommit", "-m", "200G", "--kernel", kernel(HI + EXIT_42))
    assert (result.returncode, result.stdout) == (42, b"hi\r\n")


@pytest.mark.parametrize(
    ("terminal", "append", "command", "appended"),
    [
        (True, "", (), "aiokvm.tty=33x101"),
        (True, "quiet", (), "quiet aiokvm.tty=33x101"),
        (True, "aiokvm.tty=1x2", (), "aiokvm.tty=1x2"),
        (True, "quiet", ("ls",), "quiet"),
        (False, "quiet", (), "quiet"),
    ],
)
def test_the_guest_is_told_the_terminal_s_size(
    terminal: bool, append: str, command: tuple[str, ...], appended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((101, 33)))
    options = Options(
        kernel=None,
        initrd=None,
        append=append,
        cpus=1,
        memory=512 << 20,
        name="",
        as_json=False,
        timeout=None,
        lab="never",
        log=None,
        trace=None,
        command=command,
    )
    assert options.appended == appended
    assert options.cmdline.endswith(appended)


# Asks on the second serial port, and shows on the first what comes there.
ASKS = (
    "66baf802 488d351d000000"  # mov dx, 0x2f8; lea rsi, [text]
    "ac 84c0 7403 ee ebf8"  # 1: lodsb; test al, al; jz 2f; out dx, al; jmp 1b
    "66bafd02 ec a801 74f7"  # 2: mov dx, 0x2fd; in al, dx; test al, 1; jz 2b
    "66baf802 ec 66baf803 ee ebeb"  # mov dx, 0x2f8; in al, dx; mov dx, 0x3f8; out dx, al; jmp 2b
) + (b"aiokvm.tty\n\0").hex()
# The same, and ends with 7 when it has got a line.
ASKS_ONCE = ASKS.replace("351d", "3524").replace("ebeb", "3c0a 75e9 b007 e6f4 f4")


@pytest.mark.kvm
def test_a_guest_that_asks_is_told_each_size_of_the_terminal(kernel: Kernel) -> None:
    with terminal(kernel(ASKS)) as there:
        there.expect(b"aiokvm.tty 24 80\n")
        for rows, cols in ((50, 132), (25, 81)):
            there.resize(rows, cols)
            there.expect(b"aiokvm.tty %d %d\n" % (rows, cols))
        there.type(b"\x1d")
        assert there.process.wait(60) == 130


@pytest.mark.kvm
def test_a_guest_that_asks_where_there_is_no_terminal_is_told_by_frames_alone(
    kernel: Kernel, aiokvm: Aiokvm
) -> None:
    path = kernel(ASKS_ONCE)
    result = aiokvm(*HERE, "--timeout", "3", "--kernel", path, stdin=resized(50, 132))
    assert (result.returncode, result.stdout) == (124, b"")
    result = aiokvm(*HERE, "--framed", "--kernel", path, stdin=resized(50, 132))
    assert (result.returncode, result.stdout) == (7, b"aiokvm.tty 50 132\n")
