"""A guest's network by user-mode NAT: no privileges, and services in the process."""

from __future__ import annotations

import errno
import inspect
import os
import re
import resource
import socket
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TYPE_CHECKING, cast

from anyio import to_thread

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, shown
from aiokvm.budget import DESCRIPTORS, Share
from aiokvm.errors import ConfigError, StateError
from aiokvm.logs import SeldomLogger
from aiokvm.net.address import remove_stale
from aiokvm.net.asgi import Asgi
from aiokvm.net.backend import NetBackend
from aiokvm.net.dns import PORT, Dns
from aiokvm.net.forwards import Forward, parse_forward, parse_host
from aiokvm.net.pace import Pace
from aiokvm.net.plane import BUDGET_NS
from aiokvm.net.service import MAX_WAITING, Connections, Service
from aiokvm.process import Folder
from aiokvm.text import get_logger, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Unpack

    from aiokvm._core import Pointer
    from aiokvm.net.asgi import Application
    from aiokvm.net.backend import Policy
    from aiokvm.net.plane import End, Plane
    from aiokvm.net.service import Handler

    Responder = Handler | Application | Asgi

logger = get_logger("aiokvm.net")

# TCP connections of a guest at a time, and as many UDP and ICMP flows. Each of the former may buffer 256 KiB.
MAX_CONNECTIONS = 512

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


@dataclass(slots=True, eq=False)
class _Forwarded:
    """``asked`` is what was asked for; ``real`` has the port that the system chose, while it is open."""

    asked: Forward
    real: Forward


@owned
class User(NetBackend):
    """Connections of the guest are sockets of this process, by libslirp: it needs no privileges.

    The guest finds a router at ``host`` (by default the second address of ``network``), DHCP that gives out
    addresses from ``dhcp_start`` on, a nameserver (the third address) that asks those of the host, and
    IPv6 router advertisements for the /64 ``ipv6``; None is no IPv6. ``dns`` is another nameserver that DHCP
    tells of; one of the network stands for the host's. ``hostname`` and the ``domains`` to search are told
    by DHCP, ``mtu`` by the adapter.

    The guest reaches what this process can, but nothing of the host's loopback unless
    ``allow_host_loopback``, which puts 127.0.0.1 at ``host`` and ::1 at every address of ``ipv6``. TCP, UDP
    and pings go through; multicast, broadcasts and IP options do not. With ``restrict`` nothing does but what
    comes by ``forward``, TCP only, and goes to ``services``.

    ``forward`` maps ports of the host to ports of the guest: ``[tcp:|udp:][ADDRESS:]PORT`` or the absolute
    path of a Unix socket that is to be, to ``[ADDRESS:]PORT``. It is 127.0.0.1 that is listened at if no
    address is given. Port 0 lets the system choose: `forwards` tells. IPv6 addresses are in brackets, and
    lead to an IPv6 address of the guest.

    ``services`` maps addresses of the network that nobody has, with a TCP port, to what answers there in
    this process: a coroutine function that gets each connection as a `Connection`, an anyio byte stream;
    or an ASGI application, which is a callable with three parameters, or `Asgi`.

    Raises ConfigError for what cannot be, and if aiokvm was built without libslirp.
    """

    @checked
    def __init__(
        self,
        *,
        network: str = "10.0.2.0/24",
        host: str | None = None,
        dhcp_start: str | None = None,
        dns: str | None = None,
        ipv6: str | None = "fec0::/64",
        hostname: str = "",
        domains: Sequence[str] = (),
        forward: Mapping[Any, int | str] | None = None,
        restrict: bool = False,
        allow_host_loopback: bool = False,
        mtu: int = 1500,
        services: Mapping[Any, Responder] | None = None,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(**policy)
        if not lib.aiokvm_net_slirp_built():
            raise ConfigError(
                "this build of aiokvm has no user-mode NAT: install libslirp 4.7 or later with its headers "
                "(Debian: libslirp-dev) and build it again"
            )
        self.network = _network(network)
        self.host = self._address("host", host, 2)
        self._nameserver = self._address("dns", None, 3)
        self._own_nameserver = False
        if dns is not None:
            self._nameserver = _address("dns", dns)
            self._own_nameserver = self._nameserver not in self.network
        self.dhcp_start = self._address(
            "dhcp_start", dhcp_start, 15 if self.network.num_addresses > 16 else 4
        )
        if len({self.host, self._nameserver, self.dhcp_start}) < 3:
            raise ConfigError("host, dns and dhcp_start have to be different addresses")
        self.ipv6 = _network6(ipv6)
        lowest = 1280 if self.ipv6 else lib.AIOKVM_NET_SLIRP_MIN_MTU
        if isinstance(mtu, bool) or not lowest <= mtu <= lib.AIOKVM_NET_SLIRP_MAX_MTU:
            raise ConfigError(
                f"an mtu of {mtu} is not {lowest} to {lib.AIOKVM_NET_SLIRP_MAX_MTU}, what "
                f"{'IPv6' if self.ipv6 else 'IPv4'} and libslirp can do"
            )
        self.mtu = mtu
        self.hostname = _name("hostname", hostname, 32) if hostname else ""
        if isinstance(domains, str):
            raise ConfigError("domains is a sequence of names, not one")
        self.domains = tuple(_name("domain", domain, 63) for domain in domains)
        if sum(len(domain) + 2 for domain in self.domains) > 200:
            raise ConfigError("domains to search: all of them have to fit into 200 bytes of DHCP")
        self.restrict = restrict
        self.allow_host_loopback = allow_host_loopback
        self._forwards: list[_Forwarded] = []
        self.forward: Mapping[int | str, int | str] = dict((forward or {}).items())
        """As it was given."""
        for from_host, to_guest in self.forward.items():
            self._claim(parse_forward(from_host, to_guest))
        self._handlers: dict[tuple[str, int], Handler] = {}
        for at, handler in (services or {}).items():
            self._handlers[self._service_address(at)] = _handler(handler)
        self._services: dict[tuple[str, int], Service] = {}
        self._plane: Plane | None = None
        self._end: End | None = None
        self._dns: Dns | None = None
        self._has_dns = not self._own_nameserver and not restrict
        """Whether the guest's nameserver stands for those of the host."""
        self._directory: Folder | None = None
        self._paths: dict[str, tuple[int, int]] = {}
        """Sockets that were made, with device and inode."""
        self._descriptors = Share(DESCRIPTORS)
        """All that the guest has open, in the core and here, is one share of the process's."""
        self._connections = Connections(self._descriptors)
        self._accepting = False
        # Who may have something of the guest's, and whether somebody may who has been looked at.
        self._asked: deque[Callable[[int], bool]] = deque()
        self._has_news = False
        self._log = SeldomLogger(logger)
        self._made = 0

    def __repr__(self) -> str:
        return f"net.User(network={str(self.network)!r})"

    # ---- forwards

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """What is forwarded; before it was opened, what will be. Ports that the system chose are real."""
        return tuple(each.real for each in self._forwards)

    @checked
    async def add_forward(self, host: int | str, guest: int | str) -> Forward:
        """Forward a port of the host to one of the guest, from now on. Gives it with its real port.

        Raises ConfigError, and OSError if the port is in use or not to be had.
        """
        forwarded = self._claim(parse_forward(host, guest))
        if self._is_there:
            try:
                self._listen(forwarded)
            except BaseException:
                self._forwards.remove(forwarded)
                raise
        return forwarded.real

    @checked
    async def remove_forward(self, host: int | str | Forward) -> None:
        """Forward it no more; connections that there are go on. Raises ConfigError for one that is not."""
        if not isinstance(host, Forward):
            protocol, address, port = parse_host(host)
            host = Forward(protocol, address, port, "", 0)
        # Before it is opened there may be several of port 0.
        found = [each for each in self._forwards if each.real.key == host.key]
        if not found:
            there = ", ".join(each.real.key for each in self._forwards)
            raise ConfigError(f"{host.key} is not forwarded: {there or 'nothing'} is")
        forwarded = next((each for each in found if each.real == host), found[0])
        self._forwards.remove(forwarded)
        if self._is_there:
            self._unlisten(forwarded.real)

    def _claim(self, forward: Forward) -> _Forwarded:
        for other in self.forwards:
            if other.key == forward.key and (forward.port or forward.is_path):
                raise ConfigError(f"{forward.key} is forwarded already, to {other.guest_port}")
        if self.restrict and forward.protocol == "udp":
            raise ConfigError(
                f"{forward.key}: with restrict a guest cannot answer UDP; forward TCP or leave it out"
            )
        if ":" in forward.host and not forward.is_path and not self.ipv6:
            raise ConfigError(f"{forward.key} is IPv6, which this network has not: give it a prefix by ipv6=")
        forwarded = _Forwarded(forward, forward)
        self._forwards.append(forwarded)
        return forwarded

    def _listen(self, forwarded: _Forwarded) -> None:
        forward = forwarded.asked
        if forward.is_path:
            remove_stale(forward.host, socket.SOCK_STREAM)
        result = lib.aiokvm_net_slirp_add_forward(
            self._core,
            forward.protocol == "udp",
            os.fsencode(forward.host),
            forward.port,
            forward.guest.encode(),
            forward.guest_port,
        )
        if result < 0:
            raise OSError(-result, printable(f"cannot forward {forward}: {_why(-result, forward)}"))
        if forward.is_path:
            status = os.stat(forward.host)
            self._paths[forward.host] = (status.st_dev, status.st_ino)
        forwarded.real = replace(forward, port=result)

    def _unlisten(self, forward: Forward) -> None:
        lib.aiokvm_net_slirp_remove_forward(
            self._core, forward.protocol == "udp", os.fsencode(forward.host), forward.port
        )
        self._remove_path(forward.host)

    def _remove_path(self, path: str) -> None:
        made = self._paths.pop(path, None)
        try:
            status = os.lstat(path) if made else None
            if status and made == (status.st_dev, status.st_ino):
                os.unlink(path)
        except OSError as error:
            self._log.debug("%s: the socket is not removed: %s", path, error)

    # ---- services

    @property
    def services(self) -> tuple[tuple[str, int], ...]:
        """Addresses and ports that are answered in this process."""
        return tuple(self._handlers)

    @checked
    async def add_service(self, address: tuple[str, int] | str, handler: Responder) -> tuple[str, int]:
        """Answer the guest's connections to this address and port from now on. Gives both.

        Raises ConfigError, OSError, and AiokvmError for an ASGI application that does not start.
        """
        at = self._service_address(address)
        self._handlers[at] = made = _handler(handler)
        if self._is_there:
            try:
                await self._serve(at)
            except BaseException:
                if self._handlers.get(at) is made:
                    del self._handlers[at]
                raise
        return at

    @checked
    async def remove_service(self, address: tuple[str, int] | str) -> None:
        """Answer there no more: handlers are cancelled. Raises ConfigError for one that is not."""
        at = _endpoint(address)
        if at not in self._handlers:
            raise ConfigError(f"there is no service at {at[0]}:{at[1]}")
        del self._handlers[at]
        service = self._services.pop(at, None)
        if service:
            if self._is_there:
                lib.aiokvm_net_slirp_remove_service(self._core, service.id)
            assert self._plane
            await self._plane.loop.uncancelled(lambda: _stop(service))

    def _service_address(self, address: tuple[str, int] | str) -> tuple[str, int]:
        at = _endpoint(address)
        where = IPv4Address(at[0])
        if where not in self.network or where in (self.network[0], self.network[-1]):
            raise ConfigError(f"a service at {at[0]} is not in {self.network}, where the guest looks for it")
        if where in (self.host, self._nameserver, self.dhcp_start):
            raise ConfigError(
                f"a service cannot be at {at[0]}, which is the router's, the nameserver's or the guest's"
            )
        if at in self._handlers:
            raise ConfigError(f"there is a service at {at[0]}:{at[1]} already")
        return at

    async def _serve(self, at: tuple[str, int]) -> None:
        assert self._plane
        handler = self._handlers[at]
        loop = self._plane.loop
        if isinstance(handler, Asgi):
            await handler.start(loop)
        service = Service(loop, at, handler, self._log)
        try:
            await self._make_directory()
            if not self._is_there:
                raise StateError(f"{self!r} was closed meanwhile")
            if self._handlers.get(at) is not handler:
                raise StateError(f"the service at {at[0]}:{at[1]} was removed meanwhile")
            self._add(service)
        except BaseException:
            await loop.uncancelled(lambda: _stop(service))
            raise

    async def _make_directory(self) -> None:
        """Where the sockets of services are. In a thread, as what killed processes have left is removed."""
        assert self._plane

        async def make() -> None:
            folder = await to_thread.run_sync(Folder)
            # Several services may be about to be added.
            if self._directory or not self._plane:
                folder.close()
            else:
                self._directory = folder

        if not self._directory:
            await self._plane.loop.uncancelled(make)

    def _add(self, service: Service) -> None:
        at = service.address
        assert self._directory
        self._made += 1
        path = self._directory.socket_path(str(self._made))
        number = int(IPv4Address(at[0]))
        result = lib.aiokvm_net_slirp_add_service(self._core, number, at[1], os.fsencode(path), MAX_WAITING)
        if result < 0:
            raise OSError(-result, f"no service at {at[0]}:{at[1]} by {path}: {os.strerror(-result)}")
        service.id = result
        self._services[at] = service

    def _on_news(self, _news: int, _error: int, _detail: int) -> None:
        self._connections.look()
        self._has_news = True
        if not self._accepting:
            self._accept_all()

    def _accept_all(self) -> None:
        """What the guest asks for: questions and connections, for as long as the loop can spare."""
        self._accepting = False
        until_ns = time.monotonic_ns() + BUDGET_NS
        while self._plane and (self._asked or self._has_news):
            if not self._asked:
                self._has_news = False
                self._asked.extend([self._dns.look] if self._dns else [])
                self._asked.extend(partial(self._accept, service) for service in self._services.values())
                continue
            # Each has its turn, though there be time for one only.
            step = self._asked.popleft()
            if not step(until_ns):
                self._asked.append(step)
                self._accepting = True
                self._plane.loop.call_soon(self._accept_all)
                return

    def _accept(self, service: Service, until_ns: int = 0) -> bool:
        """False: there may be more, and no time. One is accepted in any case, so that each has its turn."""
        while self._is_there and not service.is_busy and self._services.get(service.address) is service:
            connection = self._connections.accept(service)
            if connection is None:
                break
            service.start(connection, partial(self._accept, service))
            if time.monotonic_ns() >= until_ns:
                return False
        return True

    # ---- the end

    @property
    def _is_there(self) -> bool:
        """Whether it is open, or about to be: what is added is served at once."""
        return self._end is not None and self._end.is_open

    @property
    def _core(self) -> Pointer:
        assert self._end
        return self._end.core

    async def _open(self, plane: Plane, _on_lost: Callable[[str], None]) -> End:
        error = ffi.new("int *")
        self._plane = plane
        end: End | None = None
        try:
            # Before it is there: what is added meanwhile waits until then.
            if self._has_dns or self._handlers:
                await self._make_directory()
            core = lib.aiokvm_net_slirp_new(plane.core, self._config(), error)
            self._end = self._connections.end = end = plane.adopt(core, error[0], self._on_news)
            if self._has_dns:
                self._dns = Dns(plane.loop, end, self._log, self._descriptors)
                # libslirp takes it there, where no guest's address is.
                at = (str(self.network.broadcast_address), PORT)
                self._add(Service(plane.loop, at, self._dns.resolver.relay, self._log))
            for forwarded in self._forwards:
                self._listen(forwarded)
            # While one starts, others may be added, which begin to serve by themselves, or removed.
            pace = Pace(plane.loop)
            for at, handler in tuple(self._handlers.items()):
                await pace.step()
                try:
                    if self._handlers.get(at) is handler:
                        await self._serve(at)
                except StateError:
                    if not self._is_there or self._handlers.get(at) is handler:
                        raise
        except BaseException:
            if end:
                end.close()
            await plane.loop.uncancelled(self._close)
            raise
        return end

    async def _wind_down(self, end: End) -> None:
        assert self._plane
        self._end = None
        end.unlink()
        while end.is_open and lib.aiokvm_net_slirp_cut_some(end.core) == 1:
            await self._plane.loop.turn()

    async def _close(self) -> None:
        dns, self._dns = self._dns, None
        self._asked.clear()
        if dns:
            await dns.stop()
        services, self._services = self._services, {}
        if services and self._plane:
            pace = Pace(self._plane.loop)
            for service in services.values():
                await _stop(service)
                await pace.step()
        for path in tuple(self._paths):
            self._remove_path(path)
        for each in self._forwards:
            each.real = each.asked
        plane, self._plane = self._plane, None
        directory, self._directory = self._directory, None
        if plane and directory:
            # Each service has a file in it.
            await plane.loop.in_thread(directory.close)

    def _config(self) -> Pointer:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        config = ffi.new("struct aiokvm_net_slirp_config *")
        strings = [ffi.new("char[]", domain.encode()) for domain in self.domains]
        hostname = ffi.new("char[]", self.hostname.encode())
        search = ffi.new("char *[]", [*strings, ffi.NULL])
        config.network, config.netmask = int(self.network.network_address), int(self.network.netmask)
        config.host, config.dhcp_start = int(self.host), int(self.dhcp_start)
        config.nameserver, config.own_nameserver = int(self._nameserver), self._own_nameserver
        config.has_dns = self._has_dns
        config.hostname = hostname if self.hostname else ffi.NULL
        if strings:
            config.domain, config.search = strings[0], ffi.cast("char const **", search)
        if self.ipv6:
            config.prefix6 = self.ipv6.network_address.packed
            config.prefix6_length = self.ipv6.prefixlen
            config.host6, config.nameserver6 = self.ipv6[2].packed, self.ipv6[3].packed
        config.mtu = self.mtu
        config.restricted = self.restrict
        config.host_loopback = self.allow_host_loopback
        config.descriptors = self._descriptors.core
        config.max_connections = max(1, min(MAX_CONNECTIONS, limit // 4))
        self._strings = (strings, hostname, search)
        return cast("Pointer", config)

    def _address(self, name: str, given: str | None, default: int) -> IPv4Address:
        address = self.network[default] if given is None else _address(name, given)
        if address not in self.network or address in (self.network[0], self.network[-1]):
            raise ConfigError(f"{name}={given!r} is no address of a machine in {self.network}")
        return address


async def _stop(service: Service) -> None:
    await service.stop()
    if isinstance(service.handler, Asgi):
        await service.handler.stop()


def _handler(handler: Responder) -> Handler:
    if isinstance(handler, Asgi):
        return handler
    if not callable(handler):
        raise ConfigError(
            f"{handler!r} is neither a coroutine function of a connection nor an ASGI application"
        )
    try:
        inspect.signature(handler).bind(None)
    except TypeError:
        pass
    except ValueError:  # it has none that Python knows
        return cast("Handler", handler)
    else:
        return cast("Handler", handler)
    try:
        inspect.signature(handler).bind(None, None, None)
    except TypeError:
        raise ConfigError(
            f"{handler!r} takes neither a connection nor scope, receive and send, as ASGI applications do"
        ) from None
    return Asgi(cast("Application", handler))


def _endpoint(address: tuple[str, int] | str) -> tuple[str, int]:
    try:
        host, port = address.rpartition(":")[::2] if isinstance(address, str) else address
        where, number = IPv4Address(host), int(port)
    except (TypeError, ValueError):
        where, number = IPv4Address(0), 0
    if not where or not 0 < number <= 0xFFFF:
        raise ConfigError(
            f"a service is at an IPv4 address and a TCP port, like ('10.0.2.100', 80), not {shown(address)}"
        )
    return str(where), number


def _network(text: str) -> IPv4Network:
    try:
        network = IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"network={text!r} is no IPv4 network like '10.0.2.0/24': {error}") from None
    if (
        not 8 <= network.prefixlen <= 29
        or network.is_loopback
        or network.is_multicast
        or network[0].packed[0] == 0
    ):
        raise ConfigError(f"network={text!r} cannot be a guest's: it takes a /8 to /29, as '10.0.2.0/24' is")
    return network


def _network6(text: str | None) -> IPv6Network | None:
    if text is None:
        return None
    try:
        network = IPv6Network(text)
    except ValueError as error:
        raise ConfigError(f"ipv6={text!r} is no IPv6 network like 'fec0::/64': {error}") from None
    if (
        network.prefixlen != 64
        or network.is_multicast
        or network.is_link_local
        or not network.network_address.packed[0]
    ):
        raise ConfigError(f"ipv6={text!r} cannot be a guest's: it takes a /64, as 'fec0::/64' is")
    return network


def _address(name: str, text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is no IPv4 address: {error}") from None


def _name(what: str, text: str, limit: int) -> str:
    if not isinstance(text, str) or not _NAME.fullmatch(text) or len(text) > limit:
        raise ConfigError(f"{what} {text!r} is no name of letters, digits, '-' and '.', {limit} at most")
    return text


def _why(error: int, forward: Forward) -> str:
    reason = os.strerror(error)
    if error == errno.EADDRINUSE:
        return f"{reason}: " + (
            "remove the file if nobody listens there" if forward.is_path else "choose another port"
        )
    if error == errno.EACCES and 0 < forward.port < 1024:
        return f"{reason}: ports below 1024 are for programs with CAP_NET_BIND_SERVICE"
    if error == errno.EADDRNOTAVAIL:
        return f"{reason}: the host has no such address"
    return reason
