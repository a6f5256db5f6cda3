"""What goes through h11's patterns again and again is refused before; all else is as h11 has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.net.http_lines import HEAD_BYTES, Lines

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.holdups import Step

BLANKS = 16_000
GET = b"GET / HTTP/1.1\r\nhost: a\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"


def connection() -> h11.Connection:
    return h11.Connection(h11.SERVER)


def answer(http: h11.Connection) -> None:
    """So that the next request may come."""
    http.send(h11.Response(status_code=200, headers=[(b"content-length", b"0")]))
    http.send(h11.EndOfMessage())
    if http.their_state is h11.DONE:
        http.start_next_cycle()


def events(pieces: Iterable[bytes], looks: bool) -> list[Any]:
    """What comes of them; what is refused is the last. Bodies are joined: h11 may cut them anywhere."""
    http = connection()
    source: Any = Lines(h11, http) if looks else http
    found: list[Any] = []
    for piece in pieces:
        http.receive_data(piece)
        while True:
            try:
                event = source.next_event()
            except h11.RemoteProtocolError as error:
                return [*found, error.error_status_hint]
            if event is h11.NEED_DATA:
                break
            if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return found
            if isinstance(event, h11.Data) and found and isinstance(found[-1], bytes):
                found[-1] += bytes(event.data)
            else:
                found.append(bytes(event.data) if isinstance(event, h11.Data) else event)
            if isinstance(event, h11.EndOfMessage):
                answer(http)
    return found


@pytest.mark.parametrize(
    "data",
    [
        GET + b"a:" + b" \t" * (BLANKS // 2) + b"\0\r\n\r\n",
        GET + b"a:" + b" " * BLANKS + b"x" + b" " * 10 + b"\r\r\n\r\n",
        GET + b"a:" + b"\r\n " * (BLANKS // 3) + b"\f\r\n\r\n",
        GET + b"a:" + b" " * 4 * BLANKS + b"\v\r\n\r\n",
        GET + b"a:\r\n" * BLANKS + b"\r\n",
        CHUNKED + b"1;" + b" " * BLANKS + b"\n\r\nx\r\n0\r\n\r\n",
        CHUNKED + b"3\r\nabc\r\n0\r\na:" + b" " * BLANKS + b"\0\r\n\r\n",
        CHUNKED + b"00;x=0\r\na:" + b" " * BLANKS + b"\0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [1 << 20, 5000])
def test_what_does_not_fit_behind_many_blanks_is_refused_at_once(data: bytes, size: int, step: Step) -> None:
    http = connection()
    lines = Lines(h11, http)
    refused = False
    for at in range(0, len(data), size):
        http.receive_data(data[at : at + size])
        try:
            with step():
                while lines.next_event() is not h11.NEED_DATA:
                    pass
        except h11.RemoteProtocolError:
            refused = True
            break
    assert refused


def test_headers_have_a_limit() -> None:
    fits = GET + b"a: " + b"x" * (HEAD_BYTES - len(GET) - 4) + b"\r\n\r\n"
    assert len(events([fits], True)) == 2
    assert events([fits.replace(b"x", b"xx", 1)], True) == [431]


BODIES = st.lists(st.binary(min_size=1, max_size=20), max_size=4)
MESSAGES = st.one_of(
    st.just(GET + b"x: \t y z\t\r\n\r\n"),
    st.just(GET.replace(b"\r\n", b"\n") + b"\n"),
    BODIES.map(lambda parts: POST + b"content-length: %d\r\n\r\n" % sum(map(len, parts)) + b"".join(parts)),
    st.tuples(BODIES, st.sampled_from([b"", b" ;x=\0y", b" "]), st.sampled_from([b"", b"t: u\r\n"])).map(
        lambda it: (
            CHUNKED
            + b"".join(b"%x%b\r\n%b\r\n" % (len(part), it[1], part) for part in it[0])
            + b"0%b\r\n%b\r\n" % (it[1], it[2])
        )
    ),
)


@given(st.lists(MESSAGES, min_size=1, max_size=3).map(b"".join), st.data())
def test_all_else_is_as_h11_has_it(data: bytes, source: st.DataObject) -> None:
    cuts = sorted(source.draw(st.lists(st.integers(0, len(data)), max_size=30)))
    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert events(pieces, True) == events(pieces, False)


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", GET, CHUNKED, CHUNKED + b"3\r\nabc\r\n", CHUNKED + b"0\r\n"]),
)
def test_nothing_else_is_raised(data: bytes, head: bytes) -> None:
    events([head, data], True)
