"""Text from outside: what a guest, a peer, a file or another program has said, for people to read.

Such text may hold what moves a terminal's cursor, sets its title or forges a line of a log. It is kept as it
came, and escaped where it is shown: the errors of aiokvm (`AiokvmError.__str__`), its loggers (`get_logger`)
and the command line (`aiokvm.cli.common.say`) do so for all that passes there.
"""

from __future__ import annotations

import logging
import re

# What begins a line of its own; a line that is indented continues the one before it.
_LINES = re.compile(r"\n(?= )")


def printable(text: str) -> str:
    r"""Return the text on one line, each character that is not to be seen escaped as Python does: ``\x1b``.

    These are the control characters (C0, DEL, C1), what changes the direction or the line (U+202E, U+2028),
    whatever else Unicode calls a format or a separator, except the space, and bytes that were not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """Return the text as `printable` does, but with its lines kept."""
    return "\n".join(map(printable, text.split("\n")))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a part of aiokvm, whose records are printable whatever their arguments hold.

    A line break stays where the next line is indented, as that of a stack is: no text looks like a record.
    """
    found = logging.getLogger(name)
    found.addFilter(_printable_record)
    return found


def _printable_record(record: logging.LogRecord) -> bool:
    try:
        message = record.getMessage()
    except Exception:  # arguments that do not fit: for the handlers, which tell it, and do not raise
        return True
    shown = "\n".join(map(printable, _LINES.split(message)))
    if shown != message:
        record.msg, record.args = shown, ()
    if record.exc_info and not record.exc_text:
        trace = logging.Formatter().formatException(record.exc_info)
        if (shown := printable_lines(trace)) != trace:
            # What a formatter takes for the exception instead of asking it.
            record.exc_text = shown
    return True
