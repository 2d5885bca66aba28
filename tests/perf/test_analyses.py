"""How long every analysis takes on a million tokens of a Ling-mini-sized run, and how much memory all of them need.

Run with ``OMP_NUM_THREADS=2 python -m pytest tests/perf/test_analyses.py -m perf -s``; docs/performance.md holds the table. The
run keeps ids and weights alone (19 routed layers, 8 of 256 experts): analyses that need more say so and are not counted. The
yardstick is reading every column of ids and weights once.
"""

import resource
import sys
import time

import pytest
from large import large_run

from ling_probe.analysis import SINGLE, answers
from ling_probe.run import Run

SECONDS, BYTES = 120, 2e9


def read_once(run):
    start = time.perf_counter()
    tokens = sum(len(batch.token_id) for batch in run.batches(weights=True))
    return time.perf_counter() - start, tokens


@pytest.mark.perf
def test_a_million_tokens_are_analysed_in_two_minutes(tmp_path_factory, record_property):
    folder = tmp_path_factory.mktemp("large") / "run"
    large_run(folder)
    run = Run.open(folder)
    reading, tokens = read_once(run)
    assert tokens == 1_000_000
    sys.stdout.write(f"\n{'reading ids and weights once':<28}{reading:7.1f} s\n")
    total, refused = 0.0, []
    start = time.perf_counter()
    for name, answer in answers(run, SINGLE):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        if isinstance(answer, Exception):
            refused.append(name)
            continue
        total += seconds
        record_property(name, seconds)
        sys.stdout.write(f"{name:<28}{seconds:7.1f} s{seconds / reading:7.1f} x{len(answer):9,} rows\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(f"{'all of these':<28}{total:7.1f} s, peak {peak / 1e9:.2f} GB; refused: {', '.join(refused) or 'none'}\n")
    assert total <= SECONDS
    assert peak <= BYTES
