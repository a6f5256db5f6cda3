"""Which interfaces go: rtnetlink(7), RTM_DELLINK."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiokvm.aio import Loop

_RTMGRP_LINK = 1
_RTM_DELLINK = 17
_NLMSGHDR, _IFINFOMSG = struct.Struct("=IHHII"), struct.Struct("=BxHiII")
# Messages of one call, so that a storm of them does not hold the loop.
_MOST = 16


class LinkWatch:
    """Calls back when an interface of this network namespace goes, or may have: messages were lost.

    It has left the namespace; whether it is gone the caller has to see. Raises OSError without netlink.
    """

    def __init__(self, loop: Loop, ifindex: int, callback: Callable[[], object]) -> None:
        self._ifindex = ifindex
        self._callback = callback
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, _RTMGRP_LINK))
            self._watch = loop.watch(self._socket.fileno(), self._read)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Ends it. Idempotent."""
        self._watch.cancel()
        self._socket.close()

    def _read(self) -> None:
        for _ in range(_MOST):
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: some were lost
                self._callback()
                return
            if self._ifindex in removed(data):
                self._callback()
                return


def removed(data: bytes) -> Iterator[int]:
    """The interfaces that messages of rtnetlink say have gone."""
    at = 0
    while at + _NLMSGHDR.size + _IFINFOMSG.size <= len(data):
        length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
        if length < _NLMSGHDR.size:
            return
        if kind == _RTM_DELLINK:
            yield _IFINFOMSG.unpack_from(data, at + _NLMSGHDR.size)[2]
        at += (length + 3) & ~3
