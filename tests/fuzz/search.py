"""Search for inputs that do harm, guided by coverage: python -P tests/fuzz/search.py NAME SECONDS.

Without arguments it prints all names. It needs the package atheris. What it finds is in build/fuzz, and the
next search goes on from there.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

TREE = Path(__file__).parents[2]
# At the end: what is installed is searched, not the tree.
sys.path.append(str(TREE))

# What is instrumented takes longer.
SLOWER = 10


def main(name: str, seconds: str) -> None:
    import atheris

    with atheris.instrument_imports(include=["aiokvm", "h11"]):
        from tests.fuzz.targets import LIMIT_S, TARGETS, found

    target = TARGETS[name]
    corpus = TREE / f"build/fuzz/{name}.corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate((*target.seeds, *found(name))):
        (corpus / f"seed{number}").write_bytes(data)
    options = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=60", "-rss_limit_mb=1024"]
    options += [f"-artifact_prefix={corpus.with_suffix('')}.", "-print_final_stats=1"]
    worst_s = 0.0

    def run(data: bytes) -> None:
        nonlocal worst_s
        took_s = target.check(data, SLOWER * LIMIT_S)
        if took_s > worst_s:
            worst_s = took_s
            print(f"held up: {1e3 * worst_s:.3f} ms", file=sys.stderr)

    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    if find_spec("atheris") is None:
        sys.exit("the package atheris is missing: .venv/bin/pip install 'atheris>=3'")
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        from tests.fuzz.targets import TARGETS

        print(*TARGETS, sep="\n")
