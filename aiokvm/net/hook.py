"""Asking the program about flows, and the filter of one end in the C core."""

from __future__ import annotations

import errno
import ipaddress
import os
import time
from dataclasses import dataclass
from inspect import CORO_CREATED, getcoroutinestate, isawaitable, iscoroutine
from typing import TYPE_CHECKING, Any

import anyio

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import check_here
from aiokvm.arguments import checked
from aiokvm.errors import AiokvmError, ConfigError
from aiokvm.logs import SeldomLogger
from aiokvm.net.filter import DIRECTIONS, PROTOCOLS, Direction, Rule
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop, Task
    from aiokvm.net.plane import End

logger = get_logger("aiokvm.net")

# How long flows are looked at in a row before the loop has its turn.
BUDGET_NS = 500_000
_NAMES = {number: name for name, number in PROTOCOLS.items()}


@dataclass(frozen=True, slots=True)
class Flow:
    """What the program is asked about: who wants to speak to whom.

    ``protocol`` is a name as `allow` knows it, or the number of one that has none. Ports are None where there
    are none. ``frame`` is the first frame of the flow, from its Ethernet header on; its checksum may be left
    to be filled in, and it may be longer than an MTU. It waits for the answer.
    """

    direction: Direction
    protocol: str | int
    src: ipaddress.IPv4Address | ipaddress.IPv6Address
    dst: ipaddress.IPv4Address | ipaddress.IPv6Address
    src_port: int | None
    dst_port: int | None
    frame: bytes


class Hook:
    """A rule that asks ``decide`` about every flow that gets to it, at its first frame.

    ``decide(flow)`` is a function or a coroutine function that returns whether the flow may pass, both ways.
    Until it has answered, the first frame waits and the others of the flow are dropped. One that raises, or
    takes longer than ``timeout`` seconds, has denied; that is logged, about once a second if it goes on. At
    most 64 flows of a backend are asked about at the same time, what comes meanwhile is dropped. A yes lasts
    for as long as the flow is used, a no for 30 seconds; `forget` takes all answers back.

    Frames that are no IP go on to the next rule. IP packets that begin no flow do not pass: those with
    headers that cannot be read, fragments whose first one is not known, ICMP errors about unknown flows.
    """

    @checked
    def __init__(
        self,
        decide: Callable[[Flow], bool | Awaitable[bool]],
        *,
        direction: Direction | None = None,
        timeout: float = 30.0,
    ) -> None:
        if not timeout > 0:
            raise ConfigError(f"timeout is a number of seconds above 0, not {timeout!r}")
        self.decide = decide
        self.direction = direction
        self.timeout = timeout
        self._filters: set[Filter] = set()

    def forget(self) -> None:
        """Ask about all flows again, wherever it is in use. Raises StateError if that is on another loop."""
        filters = tuple(self._filters)
        for one in filters:
            check_here(one.loop, self)
        for one in filters:
            one.forget(self)


class Filter:
    """The rules and hooks of one end. Raises AiokvmError if there is no memory."""

    def __init__(self, end: End, items: Sequence[Rule | Hook]) -> None:
        error = ffi.new("int *")
        core = lib.aiokvm_net_filter_new(end.core, _compiled(items), len(items), error)
        if not core:
            raise AiokvmError(f"no filter: {os.strerror(error[0])}")
        self.core: Pointer | None = ffi.gc(core, lib.aiokvm_net_filter_free)
        self._end = end
        self._items: tuple[Rule | Hook, ...] = ()
        self._flow = ffi.new("struct aiokvm_net_flow *")
        self._frame: Pointer | None = None
        self._tasks: dict[int, Task] = {}
        self._answers: dict[int, Awaitable[bool]] = {}
        self._scheduled = False
        self._log = SeldomLogger(logger)
        self._adopt(items)
        end.subscribe(lib.AIOKVM_NET_NEWS_FLOW, self._on_flows)

    @property
    def loop(self) -> Loop:
        """Where it is in use."""
        return self._end.plane.loop

    @property
    def _live(self) -> Pointer | None:
        """The core, while its end is there."""
        return self.core if self._end.is_open else None

    def replace(self, items: Sequence[Rule | Hook]) -> None:
        """Other rules; what is being asked is dropped."""
        assert self._live
        error = lib.aiokvm_net_filter_replace(self._live, _compiled(items), len(items))
        if error:
            raise AiokvmError(f"the filters cannot be replaced: {os.strerror(-error)}")
        self._cancel()
        self._adopt(items)

    def forget(self, hook: Hook) -> None:
        """Take back what this hook has answered."""
        for index, item in enumerate(self._items):
            if item is hook and self._live:
                lib.aiokvm_net_filter_forget(self._live, index)

    def close(self) -> None:
        """Free it; the end is closed."""
        self._cancel()
        self._adopt(())
        self.core = None

    def _adopt(self, items: Sequence[Rule | Hook]) -> None:
        for hook in self._items:
            if isinstance(hook, Hook):
                hook._filters.discard(self)
        self._items = tuple(items)
        for hook in self._items:
            if isinstance(hook, Hook):
                hook._filters.add(self)

    def _cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        for answer in self._answers.values():
            # One that has not begun would complain that nobody waits for it.
            if iscoroutine(answer) and getcoroutinestate(answer) == CORO_CREATED:
                answer.close()
        self._tasks.clear()
        self._answers.clear()

    def _on_flows(self) -> None:
        if self._scheduled:
            return
        if self._frame is None:
            self._frame = ffi.new("uint8_t[]", lib.AIOKVM_NET_MAX_FRAME)
        until_ns = time.monotonic_ns() + BUDGET_NS
        while core := self._live:
            if lib.aiokvm_net_filter_take(core, self._flow, self._frame, lib.AIOKVM_NET_MAX_FRAME) != 1:
                return
            self._ask()
            if time.monotonic_ns() >= until_ns:
                self._scheduled = True
                self.loop.call_soon(self._go_on)
                return

    def _go_on(self) -> None:
        self._scheduled = False
        self._on_flows()

    def _ask(self) -> None:
        raw = self._flow[0]
        assert self._frame is not None
        number, hook = int(raw.id), self._items[raw.hook]
        assert isinstance(hook, Hook)
        flow = Flow(
            "egress" if raw.egress else "ingress",
            _NAMES.get(int(raw.protocol), int(raw.protocol)),
            _address(raw.src, raw.address_size),
            _address(raw.dst, raw.address_size),
            int(raw.src_port) if raw.has_ports else None,
            int(raw.dst_port) if raw.has_ports else None,
            bytes(ffi.buffer(self._frame, raw.frame_size)),
        )
        try:
            answer = hook.decide(flow)
        except Exception:
            self._failed(flow)
            self._decide(number, False)
            return
        if not isawaitable(answer):
            self._decide(number, answer is True)
            return

        async def wait() -> None:
            if number not in self._answers:
                return
            allowed = False
            try:
                with anyio.move_on_after(hook.timeout) as scope:
                    allowed = await answer is True
                if scope.cancelled_caught:
                    self._log.warning("no answer in %g s, so it does not pass: %s", hook.timeout, _text(flow))
            except Exception:
                self._failed(flow)
            finally:
                self._tasks.pop(number, None)
                self._answers.pop(number, None)
                self._decide(number, allowed)

        self._answers[number] = answer
        self._tasks[number] = self.loop.spawn(wait, f"aiokvm hook {_text(flow)}")

    def _failed(self, flow: Flow) -> None:
        self._log.exception("decide has failed, so it does not pass: %s", _text(flow))

    def _decide(self, number: int, allowed: bool) -> None:
        if core := self._live:
            error = lib.aiokvm_net_filter_decide(core, number, allowed)
            assert error in (0, -errno.ENOENT), error


def _address(raw: Any, size: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(bytes(ffi.buffer(raw, size)))


def _text(flow: Flow) -> str:
    ends = [
        f"{address}" if port is None else f"{address} port {port}"
        for address, port in ((flow.src, flow.src_port), (flow.dst, flow.dst_port))
    ]
    return f"{flow.direction} {flow.protocol} from {ends[0]} to {ends[1]}"


def check_filters(filters: Iterable[Rule | Hook]) -> tuple[Rule | Hook, ...]:
    """Rules and hooks as they are, or ConfigError."""
    items = tuple(filters)
    for item in items:
        if not isinstance(item, Rule | Hook):
            raise ConfigError(f"a filter is made by net.allow, net.deny or net.Hook; {item!r} is none")
    if len(items) > lib.AIOKVM_NET_MAX_RULES:
        raise ConfigError(f"{len(items)} rules are more than the {lib.AIOKVM_NET_MAX_RULES} there may be")
    return items


def _compiled(items: Sequence[Rule | Hook]) -> Pointer:
    rules: Pointer = ffi.new("struct aiokvm_net_rule[]", max(len(items), 1))
    for index, item in enumerate(items):
        raw = rules[index]
        raw.directions = DIRECTIONS[item.direction]
        if isinstance(item, Rule):
            _compile(raw, item)
        else:
            raw.verdict = lib.AIOKVM_NET_ASK
            raw.hook = index
    return rules


def _compile(raw: Any, rule: Rule) -> None:
    raw.verdict = lib.AIOKVM_NET_ALLOW if rule.allows else lib.AIOKVM_NET_DENY
    raw.has = 0 if rule.replies else lib.AIOKVM_NET_NO_REPLIES
    for flag, name, network in (
        (lib.AIOKVM_NET_HAS_SRC, "src", rule.src),
        (lib.AIOKVM_NET_HAS_DST, "dst", rule.dst),
    ):
        if network:
            raw.has |= flag
            packed = network.network_address.packed
            raw.address_size = len(packed)
            ffi.memmove(getattr(raw, name), packed, len(packed))
            setattr(raw, f"{name}_bits", network.prefixlen)
    for flag, name, value in (
        (lib.AIOKVM_NET_HAS_SRC_MAC, "src_mac", rule.src_mac),
        (lib.AIOKVM_NET_HAS_DST_MAC, "dst_mac", rule.dst_mac),
        (lib.AIOKVM_NET_HAS_ETHERTYPE, "ethertype", rule.ethertype),
        (lib.AIOKVM_NET_HAS_PROTOCOL, "protocol", rule.protocol),
        (lib.AIOKVM_NET_HAS_SRC_PORT, "src_ports", rule.src_ports),
        (lib.AIOKVM_NET_HAS_DST_PORT, "dst_ports", rule.dst_ports),
        (lib.AIOKVM_NET_HAS_ICMP_TYPE, "icmp_types", rule.icmp_types),
    ):
        if value is not None:
            raw.has |= flag
            setattr(raw, name, value)
