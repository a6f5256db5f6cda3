"""ASGI applications behind connections that are socket pairs: no network, no guest."""

from __future__ import annotations

import logging
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from aiokvm import AiokvmError, ConfigError
from aiokvm.aio import current_loop
from aiokvm.net import Asgi, Connection, asgi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

pytestmark = pytest.mark.anyio
LIMIT_S = 30
GUEST, SERVICE = ("10.0.2.15", 40000), ("10.0.2.100", 80)


class Client:
    """Speaks with a served application in plain bytes."""

    def __init__(self, raw: socket.socket) -> None:
        self.stream = Connection(raw, SERVICE, GUEST)
        self.data = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def until(self, marker: bytes) -> bytes:
        while marker not in self.data:
            self.data += await self.stream.receive()
        head, _, self.data = self.data.partition(marker)
        return head

    async def rest(self) -> bytes:
        """All until the end."""
        try:
            while True:
                self.data += await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return self.data


@asynccontextmanager
async def served(app: Any, lifespan: bool = False) -> AsyncIterator[Client]:
    ours, theirs = socket.socketpair()
    handler = Asgi(app, lifespan=lifespan)
    connection, client = Connection(theirs, GUEST, SERVICE), Client(ours)

    async def serve() -> None:
        try:
            await handler(connection)
        finally:
            connection.close()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            try:
                yield client
            finally:
                client.stream.close()
                tasks.cancel_scope.cancel()


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.method} {request.url.path} {(await request.body()).decode()}")


async def numbers(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(5):
            yield b"%d\n" % number

    return StreamingResponse(parts())


async def broken(request: Request) -> PlainTextResponse:
    raise RuntimeError("as planned")


STARLETTE = Starlette(
    routes=[
        Route("/echo", echo, methods=["GET", "POST"]),
        Route("/numbers", numbers),
        Route("/broken", broken),
    ]
)


async def test_requests_of_a_connection_follow_each_other() -> None:
    async with served(STARLETTE) as client:
        for _ in range(3):
            await client.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello")
            head = await client.until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\ndate: " in head
            await client.until(b"POST /echo hello")
        await client.send(b"GET /numbers HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"chunked" in (await client.until(b"\r\n\r\n")).lower()
        body = await client.until(b"0\r\n\r\n")
        assert body.split(b"\r\n")[1::2] == [b"0\n", b"1\n", b"2\n", b"3\n", b"4\n"]
        await client.send(b"GET /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await client.rest()).endswith(b"GET /echo ")


async def test_requests_that_come_early_wait_for_their_turn() -> None:
    async with served(STARLETTE) as client:
        await client.send(b"GET /echo HTTP/1.1\r\nhost: x\r\n\r\n" * 2 + b"GET /echo HTTP/1.0\r\n\r\n")
        assert (await client.rest()).count(b"GET /echo ") == 3


async def test_old_and_terse_requests() -> None:
    async with served(STARLETTE) as client:
        await client.send(b"HEAD /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"content-length: 11\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")
    async with served(STARLETTE) as client:
        await client.send(b"GET /numbers HTTP/1.0\r\n\r\n")
        answer = await client.rest()
        assert answer.endswith(b"\r\n\r\n0\n1\n2\n3\n4\n")


async def test_the_application_is_told_who_asks_for_what() -> None:
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"nothing"})

    async with served(app) as client:
        await client.send(b"GET /a%20b?c=%20 HTTP/1.1\r\nHost: x\r\nX-Y: z\r\n\r\n")
        assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 No Content")
        await client.send(b"GET http://example.org/x HTTP/1.1\r\nhost: example.org\r\n\r\n")
        await client.until(b"\r\n\r\n")
    scope = scopes[0]
    assert (scope["type"], scope["method"], scope["path"]) == ("http", "GET", "/a b")
    assert (scope["raw_path"], scope["query_string"]) == (b"/a%20b", b"c=%20")
    assert scope["headers"] == [(b"host", b"x"), (b"x-y", b"z")]
    assert (scope["client"], scope["server"]) == (GUEST, SERVICE)
    assert scopes[1]["raw_path"] == b"http://example.org/x"


async def test_a_failure_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("as planned")

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("as planned")

    for app in (early, silent):
        async with served(app) as client:
            await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 500 Internal")
            await client.until(b"Internal Server Error")
    async with served(late) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await client.rest()
        assert b"half" in answer
        assert not answer.endswith(b"0\r\n\r\n")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\0\1\2\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", b"431"),
        # h11 would look for seconds.
        (b"GET / HTTP/1.1\r\nhost: x\r\nx:" + b" " * 15_000 + b"\0\r\n\r\n", b"400"),
    ],
)
async def test_nonsense_is_refused(request_: bytes, status: bytes) -> None:
    async with served(STARLETTE) as client:
        await client.send(request_)
        assert (await client.until(b"\r\n\r\n")).split()[1] == status
        await client.rest()


async def test_a_body_that_nobody_reads_is_skipped_up_to_a_limit() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def endless(client: Client) -> None:
        while True:
            await client.send(b"x" * 65536)

    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    async with served(app) as client:
        for _ in range(2):
            await client.send(head % 100_000 + b"x" * 100_000)
            await client.until(b"\r\n\r\nok")
        await client.send(head % 1_000_000_000)
        with pytest.raises(anyio.BrokenResourceError):
            await endless(client)


async def test_a_guest_is_told_to_go_on() -> None:
    async with served(STARLETTE) as client:
        await client.send(
            b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        )
        assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await client.send(b"hi")
        await client.until(b"POST /echo hi")


async def test_the_application_hears_that_the_guest_has_gone() -> None:
    gone = anyio.Event()
    failed = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        assert await receive() == {"type": "http.disconnect"}
        gone.set()
        try:
            while True:
                await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
        except OSError:
            failed.set()
            raise

    async with served(app) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await client.until(b"1\r\na\r\n")
        client.stream.close()
        await gone.wait()
        await failed.wait()


async def test_the_application_hears_that_all_is_said() -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a"})
        heard.append(await receive())
        heard.append(await receive())

    async with served(app) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await client.rest()
    assert heard == [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]


async def test_what_an_application_may_not_send() -> None:
    refused: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": []}
        body = {"type": "http.response.body", "body": b""}
        for message in (body, start, start, {"type": "websocket.send"}, body, body):
            try:
                await send(message)
            except RuntimeError as error:
                refused.append(str(error))

    async with served(app) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await client.rest()
    assert len(refused) == 4


async def test_a_guest_that_asks_for_nothing_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "REQUEST_TIMEOUT_S", 0.01)
    async with served(STARLETTE) as client:
        await client.send(b"GET / HT")
        assert await client.rest() == b""


async def test_lifespan() -> None:
    heard: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        heard.append("startup")
        yield {"key": "value"}
        heard.append("shutdown")

    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.key)

    handler = Asgi(Starlette(routes=[Route("/", page)], lifespan=lifespan))
    loop = current_loop()
    with anyio.fail_after(LIMIT_S):
        for _ in range(2):
            await handler.start(loop)
            await handler.start(loop)
            assert heard == ["startup"]
            ours, theirs = socket.socketpair()
            client, connection = Client(ours), Connection(theirs, GUEST, SERVICE)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(handler, connection)
                await client.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                await client.until(b"value")
            await handler.stop()
            assert heard == ["startup"]
            await handler.stop()
            assert heard == ["startup", "shutdown"]
            heard.clear()
            client.stream.close()
            connection.close()


async def test_an_application_that_cannot_start_says_why() -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if app:
            raise RuntimeError("no database")
        yield

    with anyio.fail_after(LIMIT_S):
        with pytest.raises(AiokvmError, match="no database"):
            await Asgi(Starlette(lifespan=lifespan)).start(current_loop())

        async def ignorant(scope: Any, receive: Any, send: Any) -> None:
            assert scope["type"] == "http"

        handler = Asgi(ignorant)
        await handler.start(current_loop())
        await handler.stop()


def test_h11_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h11", None)
    with pytest.raises(ConfigError, match=r"aiokvm\[asgi\]"):
        Asgi(STARLETTE)


# ---- guests that go, or are slow


async def test_an_application_hears_that_the_guest_has_gone() -> None:
    told = anyio.Event()
    arrived = anyio.Event()

    async def page(request: Request) -> PlainTextResponse:
        await request.body()
        arrived.set()
        # Starlette asks without waiting: in a scope that is cancelled already.
        while not await request.is_disconnected():
            await anyio.lowlevel.checkpoint()
        told.set()
        return PlainTextResponse("for nobody")

    async with served(Starlette(routes=[Route("/", page)])) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await arrived.wait()
        client.stream.close()
        await told.wait()


async def test_a_guest_that_is_there_is_not_taken_for_gone() -> None:
    async def page(request: Request) -> PlainTextResponse:
        await request.body()
        return PlainTextResponse(str([await request.is_disconnected() for _ in range(3)]))

    async with served(Starlette(routes=[Route("/", page, methods=["POST"])])) as client:
        # Not even with the next request at hand.
        await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nok" * 2)
        for _ in range(2):
            await client.until(b"[False, False, False]")


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "SLOWNESS_S", 0.05)
    heard: list[str] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            heard.append(message["body"].decode())
        heard.append(message["type"])

    async with served(page) as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhello")
        assert await client.rest() == b""
    assert heard == ["hello", "http.disconnect"]


async def test_a_response_that_is_not_taken_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "SLOWNESS_S", 0.05)
    monkeypatch.setattr(asgi, "SLOWEST_BYTES_S", 1 << 30)
    failed = anyio.Event()

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        except OSError:
            failed.set()
            raise

    async with served(page) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await failed.wait()
        await client.rest()


async def test_a_connection_that_takes_nothing_breaks() -> None:
    ours, theirs = socket.socketpair()
    stream = Connection(theirs, GUEST, SERVICE)
    stream.send_timeout = 0.05
    with anyio.fail_after(LIMIT_S), pytest.raises(anyio.BrokenResourceError) as caught:
        await stream.send(bytes(1 << 24))
    assert isinstance(caught.value.__cause__, TimeoutError)
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive()
    ours.close()


async def test_a_flood_of_failing_requests_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with served(STARLETTE) as client:
        for _ in range(100):
            await client.send(b"GET /broken HTTP/1.1\r\nhost: x\r\n\r\n")
            await client.until(b"Internal Server Error")
            await client.until(b"Internal Server Error")
    assert 0 < len([record for record in caplog.records if record.levelname == "ERROR"]) < 30


async def test_a_request_for_a_tunnel_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError

    async with served(app) as client:
        await client.send(b"CONNECT example.org:80 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 501 ")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("reads", [True, False])
async def test_a_body_of_tiny_chunks_does_not_keep_the_loop(reads: bool) -> None:
    chunks = 8000
    body = bytearray()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = reads and scope["method"] == "POST"
        while more:
            message = await receive()
            body.extend(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with served(app) as client:
        head = b"POST / HTTP/1.1\r\nHost: guest\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head + b"1\r\nx\r\n" * chunks + b"0\r\n\r\nGET / HTTP/1.1\r\nHost: guest\r\n\r\n")
        for _ in range(2):
            assert b"200 OK" in await client.until(b"\r\n\r\n")
    assert len(body) == (chunks if reads else 0)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(
    "rest", [b"1;" + b" " * 15_000 + b"\n\r\n", b"0\r\nx:" + b" " * 15_000 + b"\0\r\n\r\n"]
)
async def test_odd_lines_of_a_chunked_body_do_not_keep_the_loop(reads: bool, rest: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while reads and (await receive())["type"] == "http.request":
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with served(app) as client:
        head = b"POST / HTTP/1.1\r\nHost: guest\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head + b"1\r\nx\r\n" + rest)
        await client.rest()


async def test_a_start_that_fails_lets_the_others_begin_one_after_the_other() -> None:
    """While one waits behind it, a third that comes after the failure waits, too."""
    begun = running = worst = 0
    both = anyio.Event()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        nonlocal begun, running, worst
        begun += 1
        if begun == 1:
            await both.wait()
            raise RuntimeError("not the first time")
        running += 1
        worst = max(worst, running)
        await anyio.lowlevel.checkpoint()
        yield
        running -= 1

    handler, loop = Asgi(Starlette(lifespan=lifespan)), current_loop()

    async def first() -> None:
        with pytest.raises(AiokvmError):
            await handler.start(loop)
        await handler.start(loop)

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(handler.start, loop)
            await anyio.wait_all_tasks_blocked()
            both.set()
        await handler.stop()
        await handler.stop()
    assert (begun, worst, running) == (2, 1, 0)
