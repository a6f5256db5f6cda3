"""The logger of this part."""

from __future__ import annotations

import logging


def machine_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """``aiokvm.machine``, whose records have the machine's name as ``machine``."""
    return logging.LoggerAdapter(logging.getLogger("aiokvm.machine"), {"machine": name})
