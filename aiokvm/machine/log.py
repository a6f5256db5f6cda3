"""The logger of this part."""

from __future__ import annotations

import logging

from aiokvm.logs import SeldomLogger
from aiokvm.text import get_logger


def machine_logger(name: str) -> SeldomLogger:
    """``aiokvm.machine``, whose records have the machine's name as ``machine``: its share of the log."""
    return SeldomLogger(logging.LoggerAdapter(get_logger("aiokvm.machine"), {"machine": name}))
