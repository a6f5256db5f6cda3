"""Recording frames."""

from __future__ import annotations


class Pcap:
    """Placeholder."""
