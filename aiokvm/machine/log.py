"""The logger of this part."""

from __future__ import annotations

import logging

from aiokvm.text import get_logger


def machine_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """``aiokvm.machine``, whose records have the machine's name as ``machine``."""
    return logging.LoggerAdapter(get_logger("aiokvm.machine"), {"machine": name})
