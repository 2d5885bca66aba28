"""Record made-up traces through the real `record`, and end the process in the middle of it.

Run as a script, it forks a child for each attempt, so that what takes seconds to import is imported once. The traces are made
up; everything from `record` on, every write and every rename, is the real thing.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from synthetic import synthetic_spec, synthetic_traces

from ling_probe import recording
from ling_probe.activations import ActivationSpec
from ling_probe.benchmarks import Benchmark, Record
from ling_probe.capture.vectors import Spill
from ling_probe.errors import LingProbeError
from ling_probe.run import Run, Shard, merge
from ling_probe.run.folder import LOCK
from ling_probe.run.manifest import NEW
from ling_probe.trace import Activation

SPEC = synthetic_spec()
MODEL = {"name": "synthetic", "digest": "0" * 64, "device": "cpu", "tokenizer_digest": "2" * 64}
LOADED = SimpleNamespace(spec=SPEC, digest=MODEL["digest"], describe=lambda: dict(MODEL))
KEPT = ActivationSpec(names=("residual:0", "router:1"))
CALLS = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "link")
"""Everything that changes names on the disk or makes bytes stay there."""


@cache
def traces():
    return {trace.sequence_id: with_vectors(trace) for trace in synthetic_traces(SPEC, 80, rng=np.random.default_rng(5))}


def with_vectors(trace, spill=None, every=2):
    """The trace with vectors for `KEPT`, in memory or put aside as a capture does it."""
    positions = np.arange(0, trace.n_tokens, every, dtype=np.int32)
    vectors = np.outer(positions, np.arange(SPEC.d_model)).astype(np.float32)
    stored = partial(spill.read, spill.put(vectors), vectors.shape, vectors.dtype) if spill else lambda: vectors
    return replace(trace, activations={name: Activation(positions, stored) for name in KEPT.names})


def benchmark(n_records):
    records = [Record(id=name, prompt=each.prompt, solution=each.completion) for name, each in traces().items()]
    return Benchmark("synthetic", "test", tuple(records[:n_records]), "1" * 64)


def record(folder, n_records, parts, **options):
    """The real `record`, with traces that need no model."""
    recording.capture = lambda _loaded, records, **_options: (traces()[each.id] for each in records)
    return recording.record(LOADED, benchmark(n_records), Path(folder), parts=parts, activations=KEPT, **options)


def contents(folder):
    """Every byte under ``parts``, by path, and what run.json says but for the times."""
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "parts").rglob("*") if path.is_file()}
    said = json.loads((folder / "run.json").read_text())
    return files, {name: value for name, value in said.items() if name not in ("created", "finished")}


def forked(work):
    """Process id of a child that does the work and ends with 0, or with 2 where the command line would say one line."""
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    except (LingProbeError, OSError) as error:
        # What the command line says in one line, and what it does not.
        if isinstance(error, LingProbeError) or error.filename is not None:
            code = 2
        else:
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    return 0


def finished(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def failing_at(number, fail):
    """Count the calls of `CALLS` from here on, and fail instead of the one with this number."""
    seen, sync = 0, os.fsync

    def guarded(call):
        def instead(*args, **options):
            nonlocal seen
            seen += 1
            if seen == number + 1:
                fail(*([] if call is sync else args[:1]))
            return call(*args, **options)

        return instead

    for name in CALLS:
        setattr(os, name, guarded(getattr(os, name)))
    return lambda: seen


def state(folder):
    """Where in a write the process was killed."""
    if not (folder / "run.json").exists():
        return "before the run was there"
    listed = {part["name"] for part in json.loads((folder / "run.json").read_text())["parts"]}
    names = {path.name for path in (folder / "parts").iterdir()} - listed
    if any(name.endswith(".new") for name in names):
        return "inside a part"
    if names or (folder / NEW).exists():
        return "between a part and run.json"
    return "holding the lock" if (folder / LOCK).exists() else "between writes"


def kill(folder, n_kills, seed):
    """SIGKILL at random moments until there were so many, each time resumed; every finished run must equal the whole one."""
    draw, found, runs, begun = random.Random(seed), Counter(), 0, time.monotonic()
    assert finished(forked(lambda: record(folder / "whole", 80, 40))) == 0
    longest = (time.monotonic() - begun) / 5
    while sum(found.values()) < n_kills:
        run, code = folder / f"cut-{runs}", None
        while code != 0:
            child = forked(lambda run=run: record(run, 80, 40, resume=True))
            if sum(found.values()) < n_kills:
                time.sleep(draw.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
            code = finished(child)
            assert code in (0, -signal.SIGKILL), code
            if code:
                found[state(run)] += 1
        runs += 1
        assert contents(run) == contents(folder / "whole"), "not what an uninterrupted run holds"
    return {"kills": sum(found.values()), "runs": runs, "moments": found}


def everywhere(folder, end):
    """Stop at each single call in turn, while recording and while merging; then it must go on to the same bytes."""
    shards = [folder / "shards" / Shard(index, 2).folder for index in (1, 2)]
    for index, shard in enumerate(shards, start=1):
        assert finished(forked(lambda shard=shard, index=index: record(shard, 6, 4, shard=Shard(index, 2)))) == 0

    def again(run):
        if not run.exists():
            merge(run, shards)

    return {
        "record": _each_call(folder / "record", end, lambda run: record(run, 6, 3, resume=True)),
        "merge": _each_call(folder / "merge", end, again),
    }


def _each_call(folder, end, attempt):
    def counted():
        calls = failing_at(-2, end)
        attempt(folder / "whole")
        (folder / "calls").write_text(str(calls()))

    assert finished(forked(counted)) == 0
    n_calls, codes = int((folder / "calls").read_text()), Counter()
    for number in range(n_calls):
        run = folder / f"{number}"

        def stopping(number=number, run=run):
            failing_at(number, end)
            attempt(run)

        code = finished(forked(stopping))
        codes[code] += 1
        if run.exists():
            Run.open(run).verify()
        assert finished(forked(lambda run=run: attempt(run))) == 0
        assert contents(run) == contents(folder / "whole"), f"differs after an end at call {number}"
    return codes


def _crash(*_):
    os._exit(9)


def _full(*names):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


def fill(folder):
    """A file may not grow to the size of the largest one: what a full disk does to a write in the middle of it."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        record(folder / "run", 30, 6)

    assert finished(forked(lambda: record(folder / "whole", 30, 6))) == 0
    files, _ = contents(folder / "whole")
    size = max(map(len, files.values())) - 1
    code = finished(forked(limited))
    held, left = len(Run.open(folder / "run").done), Run.open(folder / "run").verify()
    resumed = finished(forked(lambda: record(folder / "run", 30, 6, resume=True)))
    same = contents(folder / "run") == contents(folder / "whole")
    return {"code": code, "held": held, "left": left, "resumed": resumed, "same": same}


def grow(folder):
    """Resident bytes after some parts and after many more of them."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    (trace,) = synthetic_traces(SPEC, 1, rng=np.random.default_rng(5), n_steps=(60, 60), step_tokens=(60, 60))
    recording.capture = lambda _loaded, records, **_options: (
        with_vectors(replace(trace, sequence_id=each.id), Spill(folder), every=1) for each in records
    )
    records = tuple(Record(id=f"{number}", prompt="p") for number in range(240))
    seen = []
    recording.record(
        LOADED, Benchmark("b", "test", records, "1" * 64), folder / "run", parts=120, activations=KEPT,
        progress=lambda _: seen.append(resident()),
    )  # fmt: skip
    written = sum(path.stat().st_size for path in (folder / "run" / "parts").rglob("*.parquet"))
    return {"after": {40: seen[39], 120: seen[119]}, "written": written}


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    traces()
    told = {
        "kill": lambda: kill(where, int(sys.argv[3]), int(sys.argv[4])),
        "crash": lambda: everywhere(where, _crash),
        "full": lambda: everywhere(where, _full),
        "fill": lambda: fill(where),
        "grow": lambda: grow(where),
    }
    sys.stdout.write(json.dumps(told[what]()) + "\n")
