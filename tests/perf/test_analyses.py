"""How long every analysis takes on a million tokens of a Ling-mini-sized run, and how much memory all of them need.

Run with ``OMP_NUM_THREADS=1 python -m pytest tests/perf/test_analyses.py -m perf -s``; docs/performance.md holds the table. The
run keeps ids and weights alone (19 routed layers, 8 of 256 experts): analyses that need more say so and are not counted. All
together run in two processes, as `ling-probe analyze RUN all` has them; then one after the other in one, for the time of each.
The yardstick is reading every column of ids and weights once.
"""

import resource
import sys
import time

import pytest
from large import large_run

from ling_probe.analysis import SINGLE, answers
from ling_probe.errors import UsageError
from ling_probe.run import Run

SECONDS, BYTES, WORKERS = 120, 2e9, 2


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
    start = time.perf_counter()
    found = dict(answers(run, SINGLE, workers=WORKERS))
    together = time.perf_counter() - start
    peak = WORKERS * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    refused = [name for name, answer in found.items() if isinstance(answer, UsageError)]
    sys.stdout.write(f"\n{'reading ids and weights once':<28}{reading:7.1f} s\n")
    sys.stdout.write(
        f"{'all, two processes':<28}{together:7.1f} s, at most {peak / 1e9:.2f} GB; refused: {', '.join(refused)}\n"
    )
    for name in (name for name in SINGLE if name not in refused):
        start = time.process_time()
        (_, answer), *_ = answers(run, [name])
        seconds = time.process_time() - start
        record_property(name, seconds)
        sys.stdout.write(f"{name:<28}{seconds:7.1f} s{seconds / reading:7.1f} x{len(answer):9,} rows\n")
    assert together <= SECONDS
    assert peak <= BYTES
