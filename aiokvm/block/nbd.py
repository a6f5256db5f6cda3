"""A disk that an NBD server has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.arguments import checked
from aiokvm.block.nbd_client import NbdClient
from aiokvm.proto.nbd import parse_uri

if TYPE_CHECKING:
    from aiokvm.proto.nbd import Address


class Nbd(NbdClient):
    """An export of an NBD server: nbd://host[:port]/export or nbd+unix:///export?socket=path.

    It opens up to ``connections`` of them if the server allows several. When one breaks, all are given up
    and made anew, after a pause that grows to 5 s, until ``close``; requests wait meanwhile and are sent
    again. What has not ended after ``timeout`` seconds fails with EIO. Writes are kept until a flush has
    covered them, at most 64 MiB, and are written again to a server that has been away, which may have lost
    them.

    A server that breaks the protocol loses its connections, and the requests on them fail with `NbdError`.
    What it refuses while a disk is open counts as absence.

    ``size_bytes`` is rounded down to whole blocks. ``open`` raises NbdError if the server cannot be reached,
    refuses, or is to be written and does not know NBD_CMD_FLUSH. ConfigError for what is no such URI.
    """

    @checked
    def __init__(
        self, uri: str, *, readonly: bool = False, connections: int = 4, timeout: float = 30.0
    ) -> None:
        super().__init__(uri, readonly, connections, timeout)
        self.uri = uri
        self._address = parse_uri(uri)

    async def _locate(self) -> Address:
        return self._address
