from __future__ import annotations

import subprocess
import sys
import uuid
from contextlib import ExitStack

from aiokvm.lab.qemu import processor

ALLOWED = (0, 3, 5)
HOLD = """
import sys
from aiokvm.lab.qemu import processor

with processor([7], sys.argv[1]):
    print(flush=True)
    input()
"""


def test_a_lab_takes_the_processor_with_the_fewest_labs() -> None:
    name = str(uuid.uuid4())
    with ExitStack() as labs:
        first = [labs.enter_context(processor(ALLOWED, name)) for _ in ALLOWED]
        assert sorted(first) == list(ALLOWED)
        more = [ExitStack() for _ in ALLOWED]
        second = [stack.enter_context(processor(ALLOWED, name)) for stack in more]
        assert sorted(second) == list(ALLOWED)
        more[1].close()
        assert labs.enter_context(processor(ALLOWED, name)) == second[1]
        for stack in more:
            stack.close()


def test_a_lab_that_was_killed_has_none() -> None:
    name = str(uuid.uuid4())
    argv = [sys.executable, "-c", HOLD, name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with processor([7, 8], name) as number:
            assert number == 8
        other.kill()
        other.wait()
        with processor([8], name), processor([7, 8], name) as number:
            assert number == 7
