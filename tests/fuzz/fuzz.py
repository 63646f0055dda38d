"""Fuzzes one target with atheris (libFuzzer): `python tests/fuzz/fuzz.py TARGET [--seconds N] [--runs N] [--seed N]`.

New inputs that reach new code are kept in --corpus, so that a later run goes on from there; an input that is a finding
is written to the working directory as crash-*, timeout-* or oom-*, and `--replay FILE...` shows it again.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

ROOM = 1 << 30
"""Bytes of address space that a target may take beside what the libraries have."""
CPU_SECONDS, WALL_SECONDS = 10.0, 300
"""Most for one input. The processor's time is what counts, as a busy machine may let a process wait."""
SHARE_THAT_KNOWS = 0.5
"""Of the mutations, those that know the format; the others are libFuzzer's."""
NAMES = ("plan", "manifest", "model", "labels", "png", "jpeg", "tiff", "slide", "records", "checkpoint")
INSTRUMENTED = ["histoseg_fast", "tifffile"]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=0, help="how long; 0 for ever")
    parser.add_argument("--runs", type=int, default=-1, help="how many inputs; -1 for any number")
    parser.add_argument("--seed", type=int, default=0, help="of the random mutations; 0 for one of its own")
    parser.add_argument("--corpus", type=Path, help="folder of inputs to start from and to add to")
    parser.add_argument("--replay", type=Path, nargs="+", help="read these files, once each, and do not fuzz")
    options = parser.parse_args(arguments)
    if options.replay:
        replay(options.target, options.replay)
    else:
        fuzz(options)


def replay(name: str, paths: Sequence[Path]) -> None:
    import pytest
    import targets

    targets.lower_limits(pytest.MonkeyPatch())
    for path in paths:
        targets.check(targets.TARGETS[name], path.read_bytes())


def fuzz(options: argparse.Namespace) -> None:
    import atheris
    import pytest

    with atheris.instrument_imports(include=INSTRUMENTED):
        import targets
    targets.lower_limits(pytest.MonkeyPatch())
    target = targets.TARGETS[options.target]

    def one(data: bytes) -> None:
        started = time.process_time()
        targets.check(target, data)
        spent = time.process_time() - started
        assert spent < CPU_SECONDS, f"{spent:.1f} s for {len(data)} bytes"

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if target.mutate is not None and rng.random() < SHARE_THAT_KNOWS:
            return target.mutate(data, rng)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    with tempfile.TemporaryDirectory(prefix="histoseg-corpus-") as seeds:
        for i, seed in enumerate(target.seeds()):
            one(seed)
            Path(seeds, f"seed-{i}").write_bytes(seed)
        confine()
        flags = [f"-max_total_time={options.seconds}", f"-runs={options.runs}", f"-seed={options.seed}"]
        flags += [f"-max_len={target.max_bytes}", f"-timeout={WALL_SECONDS}", "-rss_limit_mb=0", "-print_final_stats=1"]
        if options.corpus:
            options.corpus.mkdir(parents=True, exist_ok=True)
        folders = [str(options.corpus)] if options.corpus else []
        atheris.Setup([sys.argv[0], *flags, *folders, seeds], one, custom_mutator=mutated)
        atheris.Fuzz()


def confine() -> None:
    """Little memory more than the process has."""
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))


if __name__ == "__main__":
    main(sys.argv[1:])
