from __future__ import annotations

import errno

from aiokvm._core import lib
from aiokvm.kvm import hints
from aiokvm.kvm.hints import hint


def test_hints_are_about_requests_that_exist() -> None:
    for name in hints._HINTS:
        assert name == "open" or isinstance(getattr(lib, name), int)


def test_the_request_comes_before_the_general_case() -> None:
    assert "already" in hint("KVM_CREATE_IRQCHIP", errno.EEXIST)
    assert "ulimit" in hint("KVM_CREATE_VM", errno.EMFILE)
    assert "fork" in hint("KVM_GET_REGS", errno.EIO)
    assert hint("KVM_GET_REGS", errno.EDOM) == ""
