from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Literal

import click
import pytest
from click.testing import CliRunner

from aiokvm import ConfigError, net
from aiokvm.cli import cli, nets
from aiokvm.cli.nets import Forward, NetOption

if TYPE_CHECKING:
    from pathlib import Path

USER = NetOption("user")
WEB = Forward("127.0.0.1", 8080, 80, "tcp")


@pytest.mark.parametrize(
    ("text", "option", "kind"),
    [
        ("user", USER, net.User),
        ("tap:tap0", NetOption("tap", "tap0"), net.Tap),
        ("stream:/run/passt:1.sock", NetOption("stream", "/run/passt:1.sock"), net.Stream),
    ],
)
def test_where_an_adapter_may_lead(text: str, option: NetOption, kind: type[net.NetBackend]) -> None:
    assert nets.parse(text) == option
    assert str(option) == text
    assert [type(backend) for backend in nets.backends([option], (), None)] == [kind]


def test_a_relative_path_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert nets.parse("stream:s").name == str(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "nat", "user:x", "tap", "tap:", "stream:", "tap0"])
def test_another_place_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="none of user, tap:NAME and stream:PATH"):
        nets.parse(text)


@pytest.mark.parametrize(
    ("text", "key", "guest_port"),
    [
        ("8080:80", "tcp:127.0.0.1:8080", 80),
        ("53:5353/udp", "udp:127.0.0.1:53", 5353),
        ("0.0.0.0:8080:80/tcp", "tcp:0.0.0.0:8080", 80),
        ("[::1]:8080:80", "tcp:[::1]:8080", 80),
    ],
)
def test_ports_that_are_led_on(text: str, key: str, guest_port: int) -> None:
    forward = nets.parse_forward(text)
    assert (forward.key, forward.guest_port) == (key, guest_port)


@pytest.mark.parametrize(
    "text",
    ["80", "80:", "a:80", "1.2.3:80:80", "70000:80", "80:0", "0:80", "80:70000", "80:80/sctp", "::1:80:80"],
)
def test_ports_that_are_not(text: str) -> None:
    with pytest.raises(click.BadParameter):
        nets.parse_forward(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "8080:80"], "leads into a --net user"),
        (["--net", "tap:tap0", "-p", "8080:80"], "leads into a --net user"),
        (["--pcap", "x"], "there is none"),
        (["--net", "user", "-p", "8080:80", "-p", "8080:81"], "8080 of 127.0.0.1 is given twice"),
        (["--net", "wifi"], "none of user"),
    ],
)
def test_what_makes_no_sense_together_is_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["run", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_the_first_nat_has_the_ports_and_all_are_recorded(tmp_path: Path) -> None:
    first, second = nets.backends([USER, USER], [WEB], tmp_path / "packets")
    assert isinstance(first, net.User)
    assert isinstance(second, net.User)
    assert dict(first.forward) == {"tcp:127.0.0.1:8080": 80}
    assert not second.forward
    assert first.tap is second.tap is not None


def test_the_lab_passes_ports_on() -> None:
    assert nets.lab_forwards([USER], [WEB]) == ("tcp:127.0.0.1:8080-:8080",)
    assert nets.hostfwd([WEB]) == ("tcp:127.0.0.1:8080-:80",)
    assert nets.lab_arguments([USER], [WEB]) == ["--net", "user", "-p", "0.0.0.0:8080:80/tcp"]


@pytest.mark.parametrize(
    "forwards",
    [[Forward("::1", 8080, 80, "tcp")], [WEB, Forward("0.0.0.0", 8080, 22, "tcp")]],
)
def test_the_lab_refuses_ports_that_it_cannot_pass_on(forwards: list[Forward]) -> None:
    with pytest.raises(ConfigError, match="each port once, at an address of IPv4"):
        nets.lab_forwards([USER], forwards)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_in_use_is_told_before_the_lab_starts(protocol: Literal["tcp", "udp"]) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"-p: {protocol} port {port} of 127.0.0.1: Address already"):
            nets.lab_forwards([USER], [Forward("127.0.0.1", port, 80, protocol)])


@pytest.mark.parametrize("option", [NetOption("tap", "tap0"), NetOption("stream", "/s")])
def test_the_lab_has_no_way_to_what_is_on_the_host_and_what_does_is_told(option: NetOption) -> None:
    with pytest.raises(ConfigError, match=f"aiokvm lab -- .*aiokvm run --net {option}"):
        nets.lab_forwards([option], [])
