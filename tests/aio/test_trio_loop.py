"""What only trio needs: a callback that raises would end the whole run."""

from __future__ import annotations

import os

import pytest
import trio

from aiokvm.aio import current_loop


@pytest.mark.parametrize("how", ["watch", "call_soon", "call_at"])
def test_a_callback_that_raises_is_logged_and_the_loop_goes_on(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        loop = current_loop()
        eventfd = os.eventfd(1, os.EFD_NONBLOCK)

        def bad() -> None:
            os.eventfd_read(eventfd)
            raise ValueError("bad callback")

        if how == "watch":
            handle = loop.watch(eventfd, bad)
        elif how == "call_soon":
            loop.call_soon(bad)
        else:
            loop.call_at(loop.now_ns(), bad)
        with trio.fail_after(5):
            while not caplog.records:
                await trio.lowlevel.checkpoint()
        if how == "watch":
            handle.cancel()
        os.close(eventfd)

    trio.run(main)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "bad callback"
