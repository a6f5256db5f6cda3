"""A TAP device: the guest's network is the host's."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Unpack

from anyio import to_thread

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError
from aiokvm.net.backend import NetBackend, Policy
from aiokvm.net.links import LinkWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop
    from aiokvm.net.plane import End, Plane

MAX_QUEUES = 16
MIN_MTU, MAX_MTU = 68, 65521

# linux/if_tun.h, linux/if.h, linux/sockios.h
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNGETIFF = 0x800454D2
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCGIFMTU, _SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
_SIOCGIFHWADDR = 0x8927
_IFNAMSIZ = 16


@owned
class Tap(NetBackend):
    """A TAP device of the host: ``name`` is opened, or created if it is not there and this program may do so.

    Without a name the kernel chooses one, aiokvm0 and so on. ``queues``, up to 16 pairs, are read and
    written in parallel. Checksums and segmentation are the kernel's, unless ``offload=False``. A device that
    was created goes when it is closed, unless ``persist``. ``mtu`` is set on the device, and told to the
    guest; by default the guest is told what the device has.

    ``fds`` are descriptors of a device that somebody else has opened (IFF_TAP | IFF_NO_PI, and IFF_VNET_HDR
    if offloads are wanted): a macvtap's /dev/tapN, those of a privileged helper. Copies are made of them. If
    the device is in another network namespace nothing is asked of it or set, and that a macvtap was deleted
    is not seen.

    ``bridge`` names a bridge that the device is to be a port of, ``address`` is one or more addresses that it
    is to have, as in "10.0.0.1/24". Both need the extra ``netlink`` (pyroute2).

    Opening raises ConfigError, with what to do, if the device cannot be had, and OSError.
    """

    @checked
    def __init__(
        self,
        name: str | None = None,
        *,
        queues: int = 1,
        offload: bool = True,
        fds: Sequence[int] | None = None,
        persist: bool = False,
        mtu: int | None = None,
        bridge: str | None = None,
        address: str | Sequence[str] = (),
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(**policy)
        if fds is not None:
            if name is not None or persist or queues not in (1, len(fds)):
                raise ConfigError("fds are of a device that is open: there is no name, queues or persist")
            queues = len(fds)
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError(f"{queues} queues: a TAP has 1 to {MAX_QUEUES} here")
        for interface in (name, bridge):
            if interface is not None and not _is_name(interface):
                raise ConfigError(
                    f"{interface!r} is no name of an interface: 1 to 15 bytes, no blanks, no '/'"
                )
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ConfigError(f"an MTU of {mtu}: it is {MIN_MTU} to {MAX_MTU}")
        self.name = name
        """The interface's; without one of the caller's it is known while it is open."""
        self.ifindex = 0
        """The interface's number in this program's network namespace, 0 if it is not there or not open."""
        self.queues = queues
        self.offload = offload
        self.persist = persist
        self.bridge = bridge
        self.addresses = (address,) if isinstance(address, str) else tuple(address)
        self._wanted_name, self._wanted_mtu = name, mtu
        self.mtu = mtu
        self._given = None if fds is None else tuple(fds)
        self._fds: list[int] = []
        self._links: LinkWatch | None = None
        self._core: Pointer = ffi.NULL
        self._loop: Loop | None = None
        self._on_lost: Callable[[str], None] = _nobody

    def __repr__(self) -> str:
        return f"<Tap {self.name!r}>" if self.name is not None else "<Tap>"

    @property
    def offloads(self) -> int:
        """AIOKVM_NET_OFFLOAD_*: what the open device takes from the guest."""
        return int(lib.aiokvm_net_tap_offloads(self.end.core)) if self.end and self.end.is_open else 0

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        self._on_lost = on_lost
        self._loop = plane.loop
        try:
            await self._in_thread(self._get)
            if self.bridge is not None or self.addresses:
                from aiokvm.net.bridge import configure

                assert self.name is not None
                await configure(self.name, bridge=self.bridge, addresses=self.addresses)
            if self._given is not None and self.ifindex:
                # A macvtap's descriptors do not tell.
                self._links = LinkWatch(plane.loop, self.ifindex, self._look)
            await self._in_thread(lambda: self._make(plane))
            core, self._core = self._core, ffi.NULL
            return plane.adopt(core, 0, self._on_news)
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        links, self._links = self._links, None
        if links:
            links.close()
        core, self._core = self._core, ffi.NULL
        if core:
            lib.aiokvm_net_end_free(core)
        fds, self._fds = self._fds, []
        self.name, self.mtu, self.ifindex = self._wanted_name, self._wanted_mtu, 0
        self._on_lost = _nobody

        def close() -> None:
            for fd in fds:
                os.close(fd)

        if fds:
            await self._in_thread(close)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        # The kernel's lock for interfaces may be held for long. Uncancelled: nothing of it may get lost.
        assert self._loop
        await self._loop.uncancelled(lambda: to_thread.run_sync(work))

    def _on_news(self, news: int, error: int, _detail: int) -> None:
        if news & lib.AIOKVM_NET_NEWS_CLOSED:
            self._lose("was deleted" if error == errno.ENODEV else f"failed: {os.strerror(error)}")

    def _look(self) -> None:
        # One that has moved to another network namespace is still there.
        if _name_of(self._fds[0]) is None:
            if self.end and self.end.is_open:
                self.end.set_up(False)
            self._lose("was deleted")

    def _lose(self, why: str) -> None:
        links, self._links = self._links, None
        if links:
            links.close()
        on_lost, self._on_lost = self._on_lost, _nobody
        on_lost(f"the interface {self.name} {why}")

    # In a worker thread.

    def _make(self, plane: Plane) -> None:
        error = ffi.new("int *")
        fds = ffi.new("int[]", self._fds)
        self._core = lib.aiokvm_net_tap_new(plane.core, fds, len(self._fds), self.offload, error)
        if self._core:
            return
        match error[0]:
            case errno.ENOTTY | errno.EBADFD | errno.EPROTOTYPE:
                raise ConfigError(f"{self!r}: a descriptor is no TAP's: it is to be opened with IFF_TAP")
            case code:
                raise OSError(code, f"{self!r}: {os.strerror(code)}")

    def _get(self) -> None:
        if self._given is not None:
            for fd in self._given:
                try:
                    self._fds.append(os.dup(fd))
                except OSError as error:
                    raise ConfigError(f"descriptor {fd} of a TAP: {error.strerror}") from error
            self.name = _name_of(self._fds[0])
        else:
            self._create()
        if self.name is not None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
                if _is_here(control, self._fds[0], self.name):
                    self.ifindex = socket.if_nametoindex(self.name)
                    self._set_up(control, self.name)
                elif self._wanted_mtu is not None or self.bridge is not None or self.addresses:
                    raise ConfigError(
                        f"{self.name} is in another network namespace: its MTU, bridge and addresses "
                        "are to be set there"
                    )

    def _create(self) -> None:
        for _ in range(self.queues):
            try:
                self._fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                raise _explain_tun(error) from error
            name = self.name or "aiokvm%d"
            try:
                self.name = _set_if(self._fds[-1], name, self.queues > 1)
            except OSError as error:
                raise self._explain(name, error) from error
        if self.persist:
            fcntl.ioctl(self._fds[0], _TUNSETPERSIST, 1)

    def _set_up(self, control: socket.socket, name: str) -> None:
        if self._wanted_mtu is not None:
            try:
                _set(control, _SIOCSIFMTU, name, "i", self._wanted_mtu)
            except OSError as error:
                raise ConfigError(
                    f"the MTU of {name} cannot be {self._wanted_mtu} ({error.strerror}): set it before, "
                    f"`ip link set {name} mtu {self._wanted_mtu}`, or leave it out"
                ) from error
        self.mtu = _ask(control, _SIOCGIFMTU, name, "i")
        flags = _ask(control, _SIOCGIFFLAGS, name, "h")
        if not flags & _IFF_UP:
            # Who may not do that has somebody who does.
            with suppress(PermissionError):
                _set(control, _SIOCSIFFLAGS, name, "h", flags | _IFF_UP)

    def _explain(self, name: str, error: OSError) -> Exception:
        several = " multi_queue" if self.queues > 1 else ""
        make = f"`ip tuntap add dev {name} mode tap user $USER{several}`"
        if name == "aiokvm%d":
            make = f"`ip tuntap add dev NAME mode tap user $USER{several}` and give its name"
        match error.errno:
            case errno.EPERM | errno.EACCES:
                return ConfigError(
                    f"the TAP {name} may not be opened or created: that takes CAP_NET_ADMIN; have it made "
                    f"for this user by root, with {make}"
                )
            case errno.EBUSY:
                return ConfigError(f"the TAP {name} is in use by another program, or all its queues are")
            case errno.EINVAL if self.queues > 1:
                return ConfigError(
                    f"{name} is no TAP that may have {self.queues} queues: have it made with {make}"
                )
            case errno.EINVAL:
                return ConfigError(f"{name} is no TAP: choose another name, or have it made with {make}")
        return error


def _is_name(name: str) -> bool:
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(data) < _IFNAMSIZ and name not in (".", "..") and not set(name) & set("/:% \t\n\v\f\r\0")


def _explain_tun(error: OSError) -> Exception:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return ConfigError(
                "there is no /dev/net/tun: load it with `modprobe tun`; containers must be given it"
            )
        case errno.EACCES | errno.EPERM:
            return ConfigError(
                "/dev/net/tun may not be opened: root can allow it with `chmod 666 /dev/net/tun`"
            )
    return error


def _set_if(fd: int, name: str, several: bool) -> str:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    tries = [flags | _IFF_MULTI_QUEUE] if several else [flags, flags | _IFF_MULTI_QUEUE]
    for index, attempt in enumerate(tries):
        request = bytearray(struct.pack(f"{_IFNAMSIZ}sH22x", os.fsencode(name), attempt))
        try:
            fcntl.ioctl(fd, _TUNSETIFF, request)
        except OSError as error:
            # One that was made for several queues wants to be opened as such.
            if error.errno != errno.EINVAL or index + 1 == len(tries):
                raise
        else:
            return _text(request)
    raise AssertionError("the last attempt returns or raises")


def _name_of(fd: int) -> str | None:
    request = bytearray(40)
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
    except OSError:
        return None  # the core says what it is not
    return _text(request)


def _text(request: bytes | bytearray) -> str:
    return os.fsdecode(bytes(request[:_IFNAMSIZ]).partition(b"\0")[0])


def _is_here(control: socket.socket, fd: int, name: str) -> bool:
    """Whether the interface of this name is the descriptor's: it may have one of another namespace."""
    request = struct.pack(f"{_IFNAMSIZ}s24x", os.fsencode(name))
    try:
        theirs, ours = (fcntl.ioctl(each, _SIOCGIFHWADDR, request) for each in (fd, control.fileno()))
    except OSError:
        return False
    return theirs[_IFNAMSIZ : _IFNAMSIZ + 8] == ours[_IFNAMSIZ : _IFNAMSIZ + 8]


def _ask(control: socket.socket, what: int, name: str, form: str) -> int:
    request = struct.pack(f"{_IFNAMSIZ}s24x", os.fsencode(name))
    value: int = struct.unpack_from(form, fcntl.ioctl(control, what, request), _IFNAMSIZ)[0]
    return value


def _set(control: socket.socket, what: int, name: str, form: str, value: int) -> None:
    request = struct.pack(f"{_IFNAMSIZ}s", os.fsencode(name)) + struct.pack(form, value)
    fcntl.ioctl(control, what, request.ljust(40, b"\0"))


def _nobody(why: str) -> None:
    pass
