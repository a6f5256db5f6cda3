from __future__ import annotations

import errno
import itertools
import json
import os
import resource
from typing import Self

import pytest
from click.testing import CliRunner

from aiokvm import KvmError, host_limits, kvm, lab
from aiokvm.cli import cli, doctor
from aiokvm.kvm import Cap
from aiokvm.kvm.probe import HARDWARE_RING0


@pytest.mark.kvm
def test_this_host() -> None:
    answer = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    with kvm.System() as system:
        hardware = kvm.ring0_speed(system) >= HARDWARE_RING0
        most = system.check_extension(Cap.KVM_CAP_MAX_VCPUS)
    checks = {check["name"]: check for check in answer["checks"]}
    assert checks["/dev/kvm"] == {
        "name": "/dev/kvm",
        "status": "ok",
        "detail": "usable, API version 12",
        "advice": "",
    }
    assert checks["ring 0"]["status"] == ("ok" if hardware else "fail")
    assert f"up to {most} a machine" in checks["vCPUs"]["detail"]
    assert answer["native"] == hardware
    assert answer["lab"] == (not lab.needed())
    assert answer["runs"] == (answer["native"] or answer["lab"])


def test_lines_say_what_to_do() -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    lines = result.stdout.splitlines()
    assert all(line.startswith(("ok    ", "warn  ", "fail  ", "      -> ")) for line in lines[:-2])
    for line, following in itertools.pairwise(lines):
        assert not line.startswith("fail") or following.startswith("      -> ")
    assert lines[-1].startswith("Linux machines run ")


@pytest.mark.parametrize(
    ("number", "detail", "advice"),
    [
        (errno.ENOENT, "it is not there", "modprobe"),
        (errno.EACCES, "no permission", "usermod -aG kvm"),
        (errno.EPERM, "forbids", "--device /dev/kvm"),
        (errno.ENODEV, "no module serves it", "modprobe"),
    ],
)
@pytest.mark.parametrize("missing", [[], ["qemu-system-x86"]])
def test_no_kvm(
    number: int, detail: str, advice: str, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    def system() -> kvm.System:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            return real()

    real = kvm.System
    monkeypatch.setattr(kvm, "System", system)
    monkeypatch.setattr(lab, "needed", lambda: missing)
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == bool(missing)
    assert (answer["runs"], answer["native"], answer["lab"]) == (not missing, False, not missing)
    first, last = answer["checks"][0], answer["checks"][-1]
    assert first["status"] == "fail"
    assert detail in first["detail"]
    assert advice in first["advice"]
    assert last["status"] == ("fail" if missing else "ok")
    assert last["advice"] == ("apt-get install qemu-system-x86" if missing else "")


class System:
    """A KVM with the capabilities given."""

    def __init__(self, *caps: Cap) -> None:
        self.caps = caps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_api_version(self) -> int:
        return 12

    def check_extension(self, cap: Cap) -> int:
        return int(cap in self.caps)


def test_missing_capabilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    caps = set(Cap) - {Cap.KVM_CAP_IRQFD, Cap.KVM_CAP_SIGNAL_MSI}
    monkeypatch.setattr(kvm, "System", lambda: System(*caps))
    monkeypatch.setattr(kvm, "ring0_speed", lambda _: 2e8)
    checks = {check.name: check for check in doctor.check_kvm()}
    assert checks["capabilities"].status == "fail"
    assert checks["capabilities"].detail == "missing: KVM_CAP_IRQFD"
    assert checks["more capabilities"].status == "warn"
    assert checks["more capabilities"].detail.startswith("missing: KVM_CAP_SIGNAL_MSI (")
    assert checks["ring 0"].status == "ok"
    assert "200.0 million" in checks["ring 0"].detail


def test_guest_that_does_not_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> float:
        raise KvmError("KVM_RUN", errno.EIO)

    monkeypatch.setattr(kvm, "System", lambda: System(*Cap))
    monkeypatch.setattr(kvm, "ring0_speed", broken)
    checks = {check.name: check for check in doctor.check_kvm()}
    assert checks["ring 0"].status == "fail"
    assert "KVM_RUN" in checks["ring 0"].detail


@pytest.mark.parametrize(("soft", "status"), [(100, "warn"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_limits(soft: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    files, processes, locked = doctor.check_limits()
    assert (files.status, processes.status, locked.status) == (status, status, "ok")
    assert (files.advice == "ulimit -n 65536") == (status == "warn")
    assert "(at most unlimited)" in files.detail


@pytest.mark.parametrize(("soft", "status"), [(100, "warn"), (1000, "ok")])
def test_machines_that_the_limits_allow(soft: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 5000))
    check = doctor.check_machines()
    most = min(limit.machines for limit in host_limits())
    assert check.status == status
    assert check.detail == f"the limits allow {most} of one vCPU in a process; RLIMIT_NOFILE is {soft}"
    assert check.advice.startswith("raise it up to 5000" if status == "warn" else "")
