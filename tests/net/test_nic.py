"""net/nic.py: what can be said of an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aiokvm import ConfigError, net
from aiokvm.net.nic import check_mac, random_mac

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.net.plane import End, Plane


class Nowhere(net.NetBackend):
    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        raise NotImplementedError

    async def _close(self) -> None:
        raise NotImplementedError


def test_an_adapter_has_an_address_of_its_own() -> None:
    macs = {net.Nic(Nowhere()).mac for _ in range(1000)}
    assert len(macs) == 1000
    for mac in macs:
        assert mac is not None
        assert check_mac(mac) == mac
        # Locally administered, unicast.
        assert int(mac[:2], 16) & 3 == 2


def test_an_address_is_written_in_one_way() -> None:
    nic = net.Nic(Nowhere(), mac="52-54-00-AB-CD-EF")
    assert nic.mac == "52:54:00:ab:cd:ef"
    assert nic.mac_bytes == bytes.fromhex("525400abcdef")


@pytest.mark.parametrize(
    ("mac", "why"),
    [
        ("52:54:00:00:00", "no MAC address"),
        ("52:54:00:00:00:0g", "no MAC address"),
        ("525400000001", "no MAC address"),
        ("", "no MAC address"),
        ("53:54:00:00:00:01", "multicast"),
        ("ff:ff:ff:ff:ff:ff", "multicast"),
        ("00:16:3e:00:00:01", "maker of hardware"),
    ],
)
def test_addresses_that_are_none(mac: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        net.Nic(Nowhere(), mac=mac)


@pytest.mark.parametrize(
    "options",
    [
        {"queues": 0},
        {"queues": 17},
        {"queues": "2"},
        {"queue_size": 32},
        {"queue_size": 100},
        {"queue_size": 2048},
        {"queue_size": None},
        {"mtu": 67},
        {"mtu": 65536},
        {"speed_mbps": -1},
        {"dataplane": "process"},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        net.Nic(Nowhere(), **options)


def test_what_is_no_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"net\.User"):
        net.Nic("tap0")  # type: ignore[arg-type]


def test_random_addresses_are_random() -> None:
    assert random_mac() != random_mac()
