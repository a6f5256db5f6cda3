"""An ASGI application as a service: HTTP/1.1 over a guest's connections.

ASGI 3.0, HTTP 2.4, lifespan 2.0; RFC 9112 by the package h11. WebSockets are not there: a request to
upgrade is answered like any other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import anyio
import anyio.lowlevel

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import AiokvmError, ConfigError
from aiokvm.logs import SeldomLogger
from aiokvm.net.http_lines import Lines
from aiokvm.text import get_logger

if TYPE_CHECKING:
    import h11

    from aiokvm.aio import Loop, Task
    from aiokvm.net.service import Connection

logger = get_logger("aiokvm.net")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# A guest that sends no request, or not all of its head, makes room for others.
REQUEST_TIMEOUT_S = 60.0
# An application that takes longer to start or to end does not.
LIFESPAN_TIMEOUT_S = 60.0
# A body, and what is taken of a response, may take so long, and longer by a second for so many bytes.
SLOWNESS_S = 60.0
SLOWEST_BYTES_S = 1024
# Of a request's body that the application did not read.
MAX_SKIPPED = 1 << 20
SKIP_TIMEOUT_S = 5.0
# Of what has come at once, so many pieces are taken before the loop has its turn: a millisecond.
_PIECES = 32


@owned
class Asgi:
    """What makes a handler of an ASGI application: ``services={("10.0.2.100", 80): net.Asgi(app)}``.

    A callable of three arguments is taken for an application without it. ``lifespan``: tell the application
    when the first network that it serves is opened and the last one closed, if it wants to know. False for
    one that another server runs as well.

    Guests of one loop may share it; on another, StateError is raised while there are any. Raises ConfigError
    if the package h11 is not installed.
    """

    @checked
    def __init__(self, app: Application, *, lifespan: bool = True) -> None:
        try:
            import h11
        except ImportError:
            raise ConfigError("ASGI applications need the package h11: pip install 'aiokvm[asgi]'") from None
        self.app = app
        self._h11 = h11
        self._log = SeldomLogger(logger)
        self._lifespan = _Lifespan(app, self._log.kind()) if lifespan else None
        self._users = 0
        # Those who serve it, or are about to: it is their loop's.
        self._claims = 0
        self._owner: Loop | None = None
        self._changing: anyio.Lock | None = None

    async def start(self, loop: Loop) -> None:
        """One who serves it more. Raises AiokvmError if the application cannot start."""
        if self._claims == 0:
            self._owner, self._changing = loop, None
        self._claims += 1
        try:
            async with self._lock():
                if self._users == 0 and self._lifespan:
                    await self._lifespan.start(loop)
                self._users += 1
        except BaseException:
            self._release()
            raise

    async def stop(self) -> None:
        """One less."""
        try:
            async with self._lock():
                self._users -= 1
                if self._users == 0 and self._lifespan:
                    await self._lifespan.stop()
        finally:
            self._release()

    def _release(self) -> None:
        self._claims -= 1
        if self._claims == 0:
            self._owner = None

    def _lock(self) -> anyio.Lock:
        # Of the loop that it is used on; it may be made where there is none.
        if self._changing is None:
            self._changing = anyio.Lock()
        return self._changing

    async def __call__(self, stream: Connection) -> None:
        """Answer the requests of one connection."""
        state = self._lifespan.state if self._lifespan else {}
        await _Http(self._h11, self.app, stream, state, self._log).run()


class _Lifespan:
    """Lifespan protocol 2.0: the application runs once, besides its requests."""

    def __init__(self, app: Application, log: SeldomLogger) -> None:
        self._log = log
        self.state: dict[str, Any] = {}
        self._app = app
        self._task: Task | None = None
        self._failures: list[str] = []

    async def start(self, loop: Loop) -> None:
        self._started, self._stopping, self._ended = anyio.Event(), anyio.Event(), anyio.Event()
        self._failures.clear()
        self._asked = False
        self.state.clear()
        self._task = loop.spawn(self._run, "ASGI lifespan")
        try:
            with anyio.move_on_after(LIFESPAN_TIMEOUT_S) as scope:
                await self._started.wait()
            if scope.cancelled_caught:
                raise AiokvmError(f"the ASGI application did not start within {LIFESPAN_TIMEOUT_S:g} s")
            for failure in self._failures:
                raise AiokvmError(f"the ASGI application did not start: {failure or 'it does not say why'}")
        except BaseException:
            task, self._task = self._task, None
            task.cancel()
            # Its end sets events, which the next run has anew.
            with anyio.move_on_after(LIFESPAN_TIMEOUT_S, shield=True):
                await task.wait()
            raise

    async def stop(self) -> None:
        if not self._task:
            return
        self._stopping.set()
        try:
            with anyio.move_on_after(LIFESPAN_TIMEOUT_S) as scope:
                await self._ended.wait()
            if scope.cancelled_caught:
                self._log.warning("an ASGI application did not end its lifespan")
        finally:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as error:
            # One that does not know the protocol raises; the specification says to go on without it.
            if self._started.is_set():
                self._log.exception("exception in the lifespan of an ASGI application")
            else:
                self._log.debug("an ASGI application has no lifespan: %r", error)
        finally:
            self._started.set()
            self._ended.set()

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self._stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.failed":
            self._failures.append(message.get("message", ""))
        elif kind == "lifespan.shutdown.failed":
            self._log.warning("an ASGI application did not end well: %s", message.get("message", ""))
        if kind.startswith("lifespan.startup"):
            self._started.set()
        else:
            self._ended.set()


class _Patience:
    """How long a guest has been waited for, and whether that is too long for what has come of it."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._size = 0

    async def wait(self, work: Awaitable[object], size: int = 0) -> bool:
        """Wait for ``work``, which moves so many bytes. False if it took too long: it is cancelled."""
        begun = anyio.current_time()
        self._size += size
        with anyio.move_on_after(SLOWNESS_S + self._size / SLOWEST_BYTES_S - self._waited) as scope:
            await work
        self._waited += anyio.current_time() - begun
        return not scope.cancelled_caught

    def moved(self, size: int) -> None:
        """So many bytes have come."""
        self._size += size


class _Http:
    """One connection: its requests, one after the other."""

    def __init__(
        self, library: Any, app: Application, stream: Connection, state: dict[str, Any], log: SeldomLogger
    ) -> None:
        self.log = log
        self.h11 = library
        self.http: h11.Connection = library.Connection(library.SERVER)
        self.lines = Lines(library, self.http)
        self.app = app
        self.stream = stream
        self.state = state
        self.sent = _Patience()
        self._pieces = 0

    async def run(self) -> None:
        while True:
            self.sent = _Patience()
            try:
                with anyio.fail_after(REQUEST_TIMEOUT_S):
                    event = await self.next_event()
            except TimeoutError:
                return
            except self.h11.RemoteProtocolError as error:
                await self._refuse(error.error_status_hint)
                return
            if not isinstance(event, self.h11.Request):
                return
            if event.method == b"CONNECT":
                # ASGI has no tunnels: an application that says yes to it cannot say more.
                await self._refuse(HTTPStatus.NOT_IMPLEMENTED)
                return
            await _Exchange(self, event).run()
            if not await self._is_done():
                return
            self.http.start_next_cycle()

    async def let_others(self) -> None:
        """A guest that sends thousands of tiny chunks at once is not to keep the loop with them."""
        self._pieces += 1
        if self._pieces > _PIECES:
            # Before it waits: who only looks, without waiting, is sent away once and not for good.
            self._pieces = 0
            await anyio.lowlevel.checkpoint()

    async def next_event(self) -> Any:
        """The next of h11's events; raises its RemoteProtocolError. Bytes for it are read as needed."""
        await self.let_others()
        while True:
            event = self.lines.next_event()
            if event is not self.h11.NEED_DATA:
                return event
            try:
                data = await self.stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                data = b""
            self._pieces = 0
            self.http.receive_data(data)

    async def send(self, event: Any) -> None:
        """Raises BrokenResourceError if the guest has gone."""
        data = self.http.send(event)
        if data and not await self.sent.wait(self.stream.send(data), len(data)):
            self.stream.abort()
            raise anyio.BrokenResourceError from TimeoutError("the guest takes the response too slowly")

    async def _is_done(self) -> bool:
        """Whether there may be a next request. What is left of a body that nobody has read is skipped."""
        h11, left = self.h11, MAX_SKIPPED
        try:
            with anyio.move_on_after(SKIP_TIMEOUT_S):
                while self.http.our_state is h11.DONE and self.http.their_state is h11.SEND_BODY and left > 0:
                    event = await self.next_event()
                    left -= len(event.data) if isinstance(event, h11.Data) else 0
        except h11.RemoteProtocolError:
            return False
        return bool(self.http.our_state is h11.DONE and self.http.their_state is h11.DONE)

    async def _refuse(self, status: int) -> None:
        if self.http.our_state not in (self.h11.IDLE, self.h11.SEND_RESPONSE):
            return
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await self.send(self.h11.Response(status_code=status, headers=headers, reason=_reason(status)))
        await self.send(self.h11.EndOfMessage())


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


class _Exchange:
    """A request and its response."""

    def __init__(self, connection: _Http, request: h11.Request) -> None:
        self._connection = connection
        self._request = request
        self._start: Message | None = None
        self._is_started = False
        self._has_body = False
        self._is_gone = False
        self._done = anyio.Event()
        self._event: Any = None
        self._received = _Patience()

    async def run(self) -> None:
        target, _, query = self._request.target.partition(b"?")
        stream = self._connection.stream
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": self._request.http_version.decode(),
            "method": self._request.method.decode(),
            "scheme": "http",
            "path": unquote_to_bytes(target).decode(errors="replace"),
            "raw_path": target,
            "query_string": query,
            "root_path": "",
            "headers": list(self._request.headers),
            "client": stream.guest,
            "server": stream.service,
            "state": dict(self._connection.state),
        }
        try:
            await self._connection.app(scope, self._receive, self._send)
        except Exception as error:
            if not self._is_gone:
                self._connection.log.error("exception in an ASGI application", exc_info=error)
        else:
            if not self._done.is_set() and not self._is_gone:
                self._connection.log.error("an ASGI application returned without a whole response")
        if not self._is_started and not self._is_gone:
            await self._fail()
        elif not self._done.is_set():
            # What there is of the response is not to be taken for all.
            stream.abort()
        self._done.set()

    async def _fail(self) -> None:
        h11, text = self._connection.h11, b"Internal Server Error"
        headers = [(b"content-length", b"%d" % len(text)), (b"content-type", b"text/plain")]
        await self._connection.send(h11.Response(status_code=500, headers=headers, reason=_reason(500)))
        if self._request.method != b"HEAD":
            await self._connection.send(h11.Data(data=text))
        await self._connection.send(h11.EndOfMessage())

    async def _receive(self) -> Message:
        h11, http = self._connection.h11, self._connection.http
        if not self._has_body:
            await self._connection.let_others()
        # An application may look, without waiting, whether the guest has gone: what is known is told at once.
        if not self._has_body and (event := self._at_hand()) is not None:
            return self._body(event)
        if self._is_gone or self._connection.stream.has_ended():
            self._is_gone = self._has_body = True
            return {"type": "http.disconnect"}
        if self._has_body:
            await self._until_gone()
            return {"type": "http.disconnect"}
        if http.they_are_waiting_for_100_continue and not self._is_started:
            try:
                await self._connection.send(h11.InformationalResponse(status_code=100, headers=[]))
            except anyio.BrokenResourceError:
                return self._body(None)
        if not await self._received.wait(self._read()):
            self._event = None
            self._connection.stream.abort()
        return self._body(self._event)

    def _at_hand(self) -> Any:
        """The next event of the body that needs no reading; None: there is none."""
        h11 = self._connection.h11
        try:
            event = self._connection.lines.next_event()
        except h11.RemoteProtocolError:
            self._is_gone = True
            return None
        return None if event is h11.NEED_DATA or event is h11.PAUSED else event

    async def _read(self) -> None:
        try:
            self._event = await self._connection.next_event()
        except (self._connection.h11.RemoteProtocolError, anyio.BrokenResourceError):
            self._event = None

    def _body(self, event: Any) -> Message:
        """The message that an event of the body is; None: there is no more, the guest has gone."""
        h11 = self._connection.h11
        if isinstance(event, h11.Data):
            self._received.moved(len(event.data))
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        self._has_body = True
        if isinstance(event, h11.EndOfMessage):
            return {"type": "http.request", "body": b"", "more_body": False}
        self._is_gone = True
        return {"type": "http.disconnect"}

    async def _until_gone(self) -> None:
        """Returns when the guest has gone, or all has been said."""
        if self._is_gone or self._done.is_set():
            return
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                try:
                    data = await self._connection.stream.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    self._is_gone = True
                    tasks.cancel_scope.cancel()
                else:
                    # The next request, early: it is looked at when its turn comes, and so is what follows.
                    self._connection.http.receive_data(data)

            tasks.start_soon(listen)
            await self._done.wait()
            tasks.cancel_scope.cancel()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start" and not self._start:
            self._start = message
        elif kind == "http.response.body" and self._start and not self._done.is_set():
            try:
                await self._send_body(message)
            except anyio.BrokenResourceError as error:
                self._is_gone = True
                raise OSError("the guest has gone") from error
        else:
            raise RuntimeError(f"{kind!r} is not what an ASGI application may send now")

    async def _send_body(self, message: Message) -> None:
        if self._is_gone:
            raise OSError("the guest has gone")
        assert self._start
        h11, status = self._connection.h11, self._start["status"]
        if not self._is_started:
            headers = [(bytes(name), bytes(value)) for name, value in self._start.get("headers", ())]
            if not any(name.lower() == b"date" for name, _ in headers):
                headers.append((b"date", formatdate(usegmt=True).encode()))
            response = h11.Response(status_code=status, headers=headers, reason=_reason(status))
            self._is_started = True
            await self._connection.send(response)
        body = message.get("body", b"")
        if body and self._request.method != b"HEAD" and status not in (204, 304):
            await self._connection.send(h11.Data(data=body))
        if not message.get("more_body", False):
            await self._connection.send(h11.EndOfMessage())
            self._done.set()
