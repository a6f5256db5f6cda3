"""Which frames may pass."""

from __future__ import annotations


class Rule:
    """Placeholder."""


class Hook:
    """Placeholder."""
