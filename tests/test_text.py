"""Text from outside reaches no error, log or terminal as it came."""

from __future__ import annotations

import errno
import io
import logging
import unicodedata
from pathlib import Path

import pytest

import aiokvm
from aiokvm import AiokvmError, ImageError, KvmError, NbdError
from aiokvm.cli.common import say
from aiokvm.text import get_logger, printable, printable_lines

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1m\x7f\r\n\u202e\u2028\udc9b\0\t"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b1m\x7f\r\n\u202e\u2028\udc9b\x00\t"


def test_what_is_not_to_be_seen_is_escaped() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a plain text: ä 漢 \\n") == "a plain text: ä 漢 \\n"
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(char).isascii(), hex(code)
            assert printable(char).isprintable(), hex(code)


def test_lines_can_be_kept() -> None:
    assert printable_lines("a\x1b\n\rb") == "a\\x1b\n\\rb"


@pytest.mark.parametrize(
    "error",
    [
        ImageError(f"feature {EVIL}"),
        NbdError(errno.EPROTO, EVIL),
        KvmError(EVIL, errno.EPERM, EVIL),
        AiokvmError(EVIL),
        AiokvmError(ValueError(EVIL)),
        aiokvm.ConfigError(EVIL),
        aiokvm.SerialClosedError(EVIL),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_printable(error: AiokvmError) -> None:
    assert str(error).isprintable()
    assert SHOWN in str(error)


def test_more_arguments_are_more_lines() -> None:
    assert str(AiokvmError("it said:", "one\x1b", "two\n")) == "it said:\none\\x1b\ntwo\\n"
    assert str(AiokvmError()) == ""


def logged(*args: object, exc_info: BaseException | None = None) -> str:
    """What a program's own handler writes of a record of aiokvm's."""
    stream = io.StringIO()
    logger, handler = get_logger("aiokvm.test"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning(*args, exc_info=exc_info)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


def test_a_log_record_is_one_printable_line() -> None:
    assert logged("said %s, %r, %d", EVIL, EVIL, 3) == f"said {SHOWN}, {EVIL!r}, 3\n"
    assert logged("plain %s") == "plain %s\n"
    assert logged("100%% of %s", "all") == "100% of all\n"


def test_a_record_whose_arguments_do_not_fit_is_left_to_the_handlers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert logged("%(who)s did", {"who": EVIL}) == f"{SHOWN} did\n"
    assert logged("%s %%d %s", "%d", EVIL) == f"%d %d {SHOWN}\n"
    # pytest's own handler would raise.
    monkeypatch.setattr(get_logger("aiokvm.test"), "propagate", False)
    assert logged("%d apples", EVIL) == ""
    told = capsys.readouterr().err
    assert "--- Logging error ---" in told
    assert "\x1b" not in told
    assert logged("nothing to format", EVIL) == ""


def test_a_stack_in_a_record_keeps_its_lines() -> None:
    assert logged("held up:\n%s", '  File "x"\n    y()') == 'held up:\n  File "x"\n    y()\n'
    assert logged("%s", "a\nERROR all is lost") == "a\\nERROR all is lost\n"


def test_an_exception_in_a_record_is_printable() -> None:
    text = logged("failed", exc_info=ValueError(EVIL))
    assert all(line.isprintable() for line in text.splitlines())
    assert "ValueError: \\x1b]0;owned" in text


def test_records_that_are_plain_keep_their_arguments() -> None:
    seen: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    logger, handler = get_logger("aiokvm.test"), Handler()
    logger.addHandler(handler)
    try:
        logger.warning("%s has %d", "one", 2)
    finally:
        logger.removeHandler(handler)
    assert (seen[0].msg, seen[0].args) == ("%s has %d", ("one", 2))


def test_all_loggers_come_from_there() -> None:
    package = Path(__file__).parent.parent / "aiokvm"
    own = {
        str(file.relative_to(package)) for file in package.rglob("*.py") if "getLogger(" in file.read_text()
    }
    # The command line adds its handler to the root of them.
    assert own == {"text.py", "cli/run.py"}


def test_the_command_line_says_nothing_raw(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"one\ntwo {EVIL}")
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[:2] == ["aiokvm: one", r"two \x1b]0;owned\x07\x1b[2J\x9b1m\x7f\r"]
