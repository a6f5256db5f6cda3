"""ACPI tables: pure functions from a description of the platform to the bytes that a guest reads."""

from __future__ import annotations

from aiokvm.boot.acpi.build import Tables, build
from aiokvm.boot.acpi.config import MAX_PROCESSORS, MAX_VIRTIO, Platform, SerialPort, VirtioMmio

__all__ = ["MAX_PROCESSORS", "MAX_VIRTIO", "Platform", "SerialPort", "Tables", "VirtioMmio", "build"]
