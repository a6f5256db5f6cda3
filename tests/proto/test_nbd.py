from __future__ import annotations

import errno
import itertools
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import ConfigError, NbdError
from aiokvm.proto import nbd
from aiokvm.proto.nbd import Address, Export, Handshake, Reply, Transmission, parse_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.holdups import Step

GREETING = struct.pack(">QQH", nbd.NBDMAGIC, nbd.IHAVEOPT, 3)
FLAGS = nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FLUSH


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", nbd.NBD_OPT_REPLY_MAGIC, option, reply, len(data)) + data


def info_export(size: int = 4096, flags: int = FLAGS) -> bytes:
    return option_reply(nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, struct.pack(">HQH", 0, size, flags))


def info_block_size(*sizes: int) -> bytes:
    return option_reply(nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, struct.pack(">HIII", 3, *sizes))


AGREED = option_reply(nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_REP_ACK)
GO_ACK = option_reply(nbd.NBD_OPT_GO, nbd.NBD_REP_ACK)


def chunk(kind: int, cookie: int, data: bytes = b"", *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", nbd.NBD_STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(data)) + data


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = True) -> bytes:
    return chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, cookie, struct.pack(">Q", offset) + data, done=done)


def hole_chunk(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    return chunk(nbd.NBD_REPLY_TYPE_OFFSET_HOLE, cookie, struct.pack(">QI", offset, length), done=done)


def error_chunk(cookie: int, error: int, message: bytes = b"", *, done: bool = True) -> bytes:
    data = struct.pack(">IH", error, len(message)) + message
    return chunk(nbd.NBD_REPLY_TYPE_ERROR, cookie, data, done=done)


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, error, cookie) + data


# Negotiation.


def test_the_negotiation_byte_for_byte() -> None:
    handshake = Handshake("disk")
    assert handshake.feed(GREETING) == (
        struct.pack(">I", 3) + struct.pack(">QII", nbd.IHAVEOPT, nbd.NBD_OPT_STRUCTURED_REPLY, 0)
    )
    go = struct.pack(">I", 4) + b"disk" + struct.pack(">HH", 1, 3)
    assert handshake.feed(AGREED) == struct.pack(">QII", nbd.IHAVEOPT, nbd.NBD_OPT_GO, len(go)) + go
    assert handshake.feed(info_export() + info_block_size(512, 4096, 1 << 20)) == b""
    assert handshake.result is None
    assert handshake.feed(GO_ACK) == b""
    assert handshake.result == Export(4096, FLAGS, 512, 1 << 20, structured=True)


@given(st.lists(st.integers(1, 40)))
def test_it_comes_in_pieces_of_any_size(sizes: list[int]) -> None:
    handshake = Handshake("")
    unsupported = option_reply(nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_REP_ERR_UNSUP, b"what?")
    unknown_info = option_reply(nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, struct.pack(">H", 7) + b"more")
    stream = GREETING + unsupported + info_export() + unknown_info + GO_ACK
    for size in sizes:
        handshake.feed(stream[:size])
        stream = stream[size:]
    handshake.feed(stream)
    assert handshake.result == Export(4096, FLAGS)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"HTTP/1.1 400 Bad R", "does not greet"),
        (struct.pack(">QQH", nbd.NBDMAGIC, 17, 3), "does not greet"),
        (struct.pack(">QQH", nbd.NBDMAGIC, nbd.CLISERV_MAGIC, 3), "too old"),
        (struct.pack(">QQH", nbd.NBDMAGIC, nbd.IHAVEOPT, 2), "too old"),
        (GREETING + AGREED[:-4] + b"\xff\xff\xff\xff", "a reply of 4294967295 bytes"),
        (GREETING + b"x" + AGREED[1:], "no reply to option 8"),
        (GREETING + GO_ACK, "no reply to option 8"),
        (GREETING + option_reply(8, nbd.NBD_REP_ACK, b"x"), "with data"),
        (GREETING + option_reply(8, nbd.NBD_REP_INFO), "reply 0x3 to NBD_OPT_STRUCTURED_REPLY"),
        (GREETING + AGREED + GO_ACK, "without saying how large"),
        (GREETING + AGREED + option_reply(7, nbd.NBD_REP_ACK, b"x"), "without saying"),
        (GREETING + AGREED + option_reply(7, 99, b"xx"), "reply 0x63"),
        (GREETING + AGREED + option_reply(7, nbd.NBD_REP_INFO, b"x"), "reply 0x3"),
        (GREETING + AGREED + option_reply(7, nbd.NBD_REP_INFO, bytes(11)), "wrong length"),
        (GREETING + AGREED + option_reply(7, nbd.NBD_REP_INFO, b"\0\3" + bytes(3)), "wrong length"),
        (GREETING + AGREED + info_export(flags=0), "flags 0x0"),
        (GREETING + AGREED + info_export(size=1 << 63), "an export of"),
        (GREETING + AGREED + info_block_size(3, 512, 1 << 20), "block sizes 3"),
        (GREETING + AGREED + info_block_size(0, 512, 1 << 20), "block sizes 0"),
        (GREETING + AGREED + info_block_size(1 << 17, 1 << 17, 1 << 20), "block sizes"),
        (GREETING + AGREED + info_block_size(512, 4096, 512), "block sizes"),
        (GREETING + AGREED + info_export() * nbd.OPTION_REPLIES_MAX, "more than 64"),
        (GREETING + AGREED + info_export() + GO_ACK + b"x", "not asked for"),
    ],
)
def test_a_server_that_negotiates_wrongly_is_left(stream: bytes, message: str) -> None:
    with pytest.raises(NbdError, match=message) as caught:
        Handshake("disk").feed(stream)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    ("reply", "code", "message"),
    [
        (nbd.NBD_REP_ERR_UNKNOWN, errno.ENOENT, "'disk' has no such export \\(no \\\\x1b\\[31mdisk\\)"),
        (nbd.NBD_REP_ERR_TLS_REQD, errno.ENOTSUP, "wants TLS"),
        (nbd.NBD_REP_ERR_SHUTDOWN, errno.ESHUTDOWN, "shutting down"),
        (nbd.NBD_REP_FLAG_ERROR | 77, errno.EPROTO, "refuses with 0x8000004d"),
    ],
)
def test_a_refusal_says_why(reply: int, code: int, message: str) -> None:
    with pytest.raises(NbdError, match=message) as caught:
        Handshake("disk").feed(GREETING + AGREED + option_reply(nbd.NBD_OPT_GO, reply, b"no \x1b[31mdisk"))
    assert caught.value.errno == code


# Requests and replies.


def read_of(length: int, offset: int = 0) -> Transmission:
    transmission = Transmission(structured=True)
    transmission.request(nbd.NBD_CMD_READ, offset, length)
    return transmission


def test_a_request_byte_for_byte() -> None:
    cookie, header = Transmission(structured=False).request(
        nbd.NBD_CMD_WRITE_ZEROES, 1 << 40, 512, nbd.NBD_CMD_FLAG_NO_HOLE
    )
    assert (cookie, header) == (
        1,
        bytes.fromhex("25609513 0002 0006 0000000000000001 0000010000000000 00000200"),
    )


@st.composite
def replies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A read's content, and chunks that give it, in any order."""
    content = draw(st.binary(min_size=1, max_size=200))
    cuts = sorted(draw(st.sets(st.integers(1, len(content)), max_size=8)) | {0, len(content)})
    pieces = list(itertools.pairwise(cuts))
    chunks = []
    data = bytearray(content)
    for start, end in draw(st.permutations(pieces)):
        if draw(st.booleans()):
            data[start:end] = bytes(end - start)
            chunks.append(hole_chunk(1, 1000 + start, end - start, done=False))
        else:
            chunks.append(data_chunk(1, 1000 + start, content[start:end], done=False))
    return bytes(data), b"".join(chunks) + chunk(nbd.NBD_REPLY_TYPE_NONE, 1)


@given(replies(), st.lists(st.integers(1, 60)))
def test_a_read_may_come_in_any_pieces(reply: tuple[bytes, bytes], sizes: list[int]) -> None:
    content, stream = reply
    transmission = read_of(len(content), 1000)
    ended: list[Reply] = []
    for size in sizes:
        ended += transmission.feed(stream[:size])
        stream = stream[size:]
    ended += transmission.feed(stream)
    assert ended == [Reply(1, data=bytearray(content))]


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_replies_or_an_error(stream: bytes, structured: bool) -> None:
    transmission = Transmission(structured=structured)
    for command in (nbd.NBD_CMD_READ, nbd.NBD_CMD_WRITE, nbd.NBD_CMD_FLUSH):
        transmission.request(command, 0, 512)
    magic = nbd.NBD_STRUCTURED_REPLY_MAGIC if structured else nbd.NBD_SIMPLE_REPLY_MAGIC
    with suppress(NbdError):
        transmission.feed(struct.pack(">I", magic) + stream)


def test_simple_replies_come_in_any_order() -> None:
    transmission = Transmission(structured=False)
    transmission.request(nbd.NBD_CMD_READ, 0, 4)
    transmission.request(nbd.NBD_CMD_WRITE, 0, 4)
    transmission.request(nbd.NBD_CMD_FLUSH)
    stream = simple(3, errno.ENOSPC) + simple(2) + simple(1, 0, b"data")
    assert transmission.feed(stream) == [Reply(3, errno.ENOSPC), Reply(2), Reply(1, data=bytearray(b"data"))]


def test_an_error_ends_a_read_that_has_partly_come() -> None:
    transmission = read_of(8)
    stream = data_chunk(1, 0, b"half", done=False) + error_chunk(1, errno.EIO, b"bad \x1bblock")
    assert transmission.feed(stream) == [Reply(1, errno.EIO, "bad \\x1bblock")]


def test_the_first_error_of_a_request_is_told_and_unknown_ones_are_eio() -> None:
    transmission = read_of(8)
    offset_error = struct.pack(">IH", 1234, 2) + b"no" + struct.pack(">Q", 4)
    unknown = struct.pack(">IH", errno.EPERM, 0) + b"future"
    stream = (
        chunk(nbd.NBD_REPLY_TYPE_ERROR_OFFSET, 1, offset_error, done=False)
        + chunk(1 << 15 | 99, 1, unknown, done=False)
        + chunk(nbd.NBD_REPLY_TYPE_NONE, 1)
    )
    assert transmission.feed(stream) == [Reply(1, errno.EIO, "no")]


def test_a_reply_in_many_chunks_is_looked_at_a_part_at_a_time(step: Step) -> None:
    reads, blocks = 32, 256
    transmission = Transmission(structured=True)
    for _ in range(reads):
        transmission.request(nbd.NBD_CMD_READ, 0, 512 * blocks)
    data = b"".join(
        data_chunk(cookie, 512 * at, b"x" * 512, done=at == blocks - 1)
        for at in range(blocks)
        for cookie in range(1, reads + 1)
    )
    replies, parts = [], 0
    while data or transmission.more:
        with step():
            replies += transmission.feed(data)
        data = b""
        parts += 1
    assert [bytes(reply.data or b"") for reply in replies] == [b"x" * 512 * blocks] * reads
    assert parts > 32


def test_memory_for_many_reads_is_not_made_in_one_go(step: Step) -> None:
    """A few bytes a read are enough to say that all of it is a hole."""
    transmission = Transmission(structured=True)
    cookies = [transmission.request(nbd.NBD_CMD_READ, 0, 4 << 20)[0] for _ in range(64)]
    data = b"".join(
        struct.pack(">IHHQI", nbd.NBD_STRUCTURED_REPLY_MAGIC, 1, nbd.NBD_REPLY_TYPE_OFFSET_HOLE, cookie, 12)
        + struct.pack(">QI", 0, 4 << 20)
        for cookie in cookies
    )
    ended, parts = [], 0
    while data or transmission.more:
        with step():
            ended += [reply.cookie for reply in transmission.feed(data)]
        data = b""
        parts += 1
    assert ended == cookies
    assert parts >= 64


@pytest.mark.parametrize("command", [nbd.NBD_CMD_READ, nbd.NBD_CMD_WRITE, nbd.NBD_CMD_FLUSH])
def test_chunks_without_an_end_are_no_reply(command: int, step: Step) -> None:
    transmission = Transmission(structured=True)
    cookies = [transmission.request(command, 0, 4096)[0] for _ in range(64)]
    data = b"".join(error_chunk(cookie, errno.EIO, done=False) for _ in range(1000) for cookie in cookies)
    with pytest.raises(NbdError, match="more than 64 errors"):  # noqa: PT012  a part at a time
        with step():
            transmission.feed(data)
        while transmission.more:
            with step():
                transmission.feed(b"")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"\0\0\0\1", "begins with 0x1"),
        (simple(1, 0, bytes(512)), "a simple reply to a read"),
        (data_chunk(2, 0, bytes(512)), "request 2, which is not waiting"),
        (data_chunk(1, 0, bytes(512)) * 2, "request 1, which is not waiting"),
        (data_chunk(1, 0, bytes(511)), "before all of it"),
        (data_chunk(1, 0, bytes(513)), "513|521 bytes in the reply"),
        (data_chunk(1, 1, bytes(512)), "outside of a read"),
        (data_chunk(1, (1 << 64) - 1, bytes(2)), "outside of a read"),
        (data_chunk(1, 0, b""), "8 bytes in the reply"),
        (chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, bytes(7)), "7 bytes in the reply"),
        (data_chunk(1, 0, bytes(400), done=False) + data_chunk(1, 399, bytes(113)), "twice"),
        (data_chunk(1, 400, bytes(112), done=False) + data_chunk(1, 0, bytes(401)), "twice"),
        (data_chunk(1, 0, bytes(512), done=False) + hole_chunk(1, 0, 512), "twice"),
        (hole_chunk(1, 0, 0), "outside of a read"),
        (hole_chunk(1, 0, 513), "outside of a read"),
        (chunk(nbd.NBD_REPLY_TYPE_OFFSET_HOLE, 1, bytes(11)), "described by 11"),
        (chunk(nbd.NBD_REPLY_TYPE_NONE, 1), "before all of it"),
        (chunk(nbd.NBD_REPLY_TYPE_NONE, 1, b"x"), "says something"),
        (chunk(nbd.NBD_REPLY_TYPE_NONE, 1, done=False), "is not the last"),
        (chunk(5, 1, bytes(8)), "type 5"),
        (error_chunk(1, 0), "error 0"),
        (chunk(nbd.NBD_REPLY_TYPE_ERROR, 1, bytes(5)), "described by 5 bytes"),
        (chunk(nbd.NBD_REPLY_TYPE_ERROR, 1, struct.pack(">IH", 5, 9) + b"short"), "message of 9"),
        (chunk(nbd.NBD_REPLY_TYPE_ERROR, 1, struct.pack(">IH", 5, 1) + b"long"), "message of 1"),
        (chunk(nbd.NBD_REPLY_TYPE_ERROR_OFFSET, 1, struct.pack(">IH", 5, 0) + bytes(4)), "described by 10"),
        (struct.pack(">IHHQI", nbd.NBD_STRUCTURED_REPLY_MAGIC, 1, 1 << 15 | 1, 1, 1 << 31), "described by"),
    ],
)
def test_a_server_that_replies_wrongly_is_left(stream: bytes, message: str) -> None:
    with pytest.raises(NbdError, match=message) as caught:
        read_of(512).feed(stream)
    assert caught.value.errno == errno.EPROTO


def test_a_read_in_countless_pieces_is_bounded() -> None:
    transmission = read_of(1 << 20)
    stream = b"".join(data_chunk(1, at, b"x", done=False) for at in range(0, 1 << 12, 2))
    with pytest.raises(NbdError, match="too many pieces"):  # noqa: PT012  a part at a time
        transmission.feed(stream)
        while transmission.more:
            transmission.feed(b"")


def test_pieces_that_meet_are_no_longer_counted() -> None:
    transmission = read_of(1 << 13)
    for at in range((1 << 13) - 1):
        transmission.feed(data_chunk(1, at, b"x", done=False))
    (reply,) = transmission.feed(data_chunk(1, (1 << 13) - 1, b"x"))
    assert reply.data == bytearray(b"x" * (1 << 13))


def test_structured_replies_have_to_be_agreed_on_and_fit_the_request() -> None:
    transmission = Transmission(structured=False)
    transmission.request(nbd.NBD_CMD_READ, 0, 512)
    with pytest.raises(NbdError, match="begins with"):
        transmission.feed(data_chunk(1, 0, bytes(512)))
    transmission = Transmission(structured=True)
    transmission.request(nbd.NBD_CMD_WRITE, 0, 512)
    with pytest.raises(NbdError, match="to command 1"):
        transmission.feed(data_chunk(1, 0, bytes(512)))


# URIs.


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://host", Address("host", 10809, "", "")),
        ("nbd://host:99/a%20disk/1", Address("host", 99, "", "a disk/1")),
        ("nbd://[::1]:99/", Address("::1", 99, "", "")),
        ("nbd+unix:///disk?socket=/run/a%20socket", Address("", 0, "/run/a socket", "disk")),
        ("nbd+unix:///?socket=s", Address("", 0, "s", "")),
        ("nbd+unix:///?socket=/run/%FF", Address("", 0, "/run/\udcff", "")),
    ],
)
def test_uris(uri: str, address: Address) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    "uri",
    [
        *("", "disk.img", "http://host/", "nbds://host/", "nbds+unix:///?socket=s", "nbd://", "nbd:///disk"),
        *(
            "nbd://host:port/",
            "nbd://host:99999/",
            "nbd://host/?socket=s",
            "nbd://host/?tls=1",
            "nbd://[::1/",
        ),
        *("nbd+unix:///disk", "nbd+unix://host/?socket=s", "nbd+unix:///?socket=a&socket=b", "nbd://u@host/"),
        *("nbd://host/\udcff", "nbd+unix:///?socket=\ud800", "nbd://host:" + "9" * 5000),
        *("nbd://host/a%00b", "nbd://host/" + "a" * 5000, "nbd+unix:///?socket"),
    ],
)
def test_what_is_no_uri_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError):
        parse_uri(uri)


def test_feeding_nothing_changes_nothing() -> None:
    feeds: list[Callable[[bytes], object]] = [Handshake("").feed, Transmission(structured=True).feed]
    for feed in feeds:
        assert not feed(b"")


def test_long_messages_are_not_escaped_in_one_go(step: Step) -> None:
    transmission = Transmission(structured=True)
    cookies = [transmission.request(nbd.NBD_CMD_READ, 0, 512)[0] for _ in range(64)]
    size = nbd.STRING_MAX_BYTES
    data = b"".join(
        struct.pack(">IHHQI", nbd.NBD_STRUCTURED_REPLY_MAGIC, 1, nbd.NBD_REPLY_TYPE_ERROR, cookie, 6 + size)
        + struct.pack(">IH", errno.EIO, size)
        + b"\x1b" * size
        for cookie in cookies
    )
    ended, parts = [], 0
    while data or transmission.more:
        with step():
            ended += [reply.cookie for reply in transmission.feed(data)]
        data = b""
        parts += 1
    assert ended == cookies
    assert parts >= 8
