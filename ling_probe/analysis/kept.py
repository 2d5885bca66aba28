"""Answers kept beside the run they are about, so that a question is computed once.

    analysis/NAME.parquet   a table, or none where the run cannot answer; the file's metadata holds a stamp

The stamp says what an answer was computed from: the run's manifest and causal study, every line of this package, and the
packages that touch the numbers. A file with another stamp, a damaged one and a foreign one are as none. The
folder is nobody's business but this file's: it can be deleted at any time, and a run in a folder that cannot be written to
keeps nothing.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ling_probe.analysis.asking import Answer, answers
from ling_probe.analysis.registry import ANALYSES
from ling_probe.errors import LingProbeError, UsageError
from ling_probe.run import Run
from ling_probe.run.folder import CAUSAL_EFFECTS

KEPT = "analysis"
"""Folder in a run folder."""
_STAMP, _REFUSAL, _FOLDER = b"ling_probe.stamp", b"ling_probe.refusal", "\x00run\x00"
_PACKAGES = ("ling-probe", "numpy", "pandas", "scipy", "scikit-learn")


def kept_answers(
    run: Run, names: Sequence[str], *, against: Sequence[Run] = (), workers: int = 1, fresh: bool = False
) -> Iterator[tuple[str, Answer]]:
    """As `answers`, but what was computed before is read, and what is computed is kept; comparisons are always computed.

    Args:
        run: The run asked about.
        names: Of analyses.
        against: Runs that comparisons compare it with.
        workers: Processes that share what is to be computed.
        fresh: Compute everything anew.

    Raises:
        UsageError: An analysis does not exist.
    """
    there = {name for name in names if not fresh and name in ANALYSES and is_kept(run, name)}
    computed = answers(run, [name for name in names if name not in there], against=against, workers=workers)
    for name in names:
        answer = kept_answer(run, name) if name in there else None
        if answer is None:
            _, answer = next(computed if name not in there else answers(run, [name]))
            if not ANALYSES[name].compares:
                keep_answer(run, name, answer)
        yield name, answer


def answer_once(run: Run, name: str) -> Answer:
    """One answer of `kept_answers`."""
    ((_, answer),) = kept_answers(run, [name])
    return answer


def send_answer(folder: str, name: str, sender: Connection) -> None:
    """Send `answer_once`, or the error in its place, to the process that started this one."""
    try:
        sender.send(answer_once(Run.open(folder), name))
    except LingProbeError as error:
        sender.send(error)


def is_kept(run: Run, name: str) -> bool:
    """Whether an answer is there that was computed by this code from this very run."""
    try:
        return not ANALYSES[name].compares and _fits(pq.read_schema(_path(run, name)), run, name)
    except (pa.ArrowException, OSError):
        return False


def kept_answer(run: Run, name: str) -> Answer | None:
    """A table or refusal that was kept, None if there is none that fits."""
    try:
        with pq.ParquetFile(_path(run, name)) as file:
            table = file.read() if _fits(file.schema_arrow, run, name) else None
    except (pa.ArrowException, OSError):
        return None
    if table is None or ANALYSES[name].compares:
        return None
    refusal = table.schema.metadata.get(_REFUSAL)
    return UsageError(refusal.decode().replace(_FOLDER, str(run.folder))) if refusal else table.to_pandas()


def keep_answer(run: Run, name: str, answer: Answer) -> bool:
    """Keep an answer at default arguments for `kept_answer`; False if the folder cannot be written to.

    A reader finds the old file or the new one, never half of one.
    """
    told = {_STAMP: _stamp(run, name)}
    if isinstance(answer, UsageError):
        told[_REFUSAL] = str(answer).replace(str(run.folder), _FOLDER).encode()
        table = pa.table({})
    else:
        table = pa.Table.from_pandas(answer)
    path = _path(run, name)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **told}), new, compression="zstd")
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        return False
    return True


def _path(run: Run, name: str) -> Path:
    return run.folder / KEPT / f"{name}.parquet"


def _fits(schema: pa.Schema, run: Run, name: str) -> bool:
    return (schema.metadata or {}).get(_STAMP) == _stamp(run, name)


def _stamp(run: Run, name: str) -> bytes:
    """What an answer depends on, as JSON."""
    causal = run.folder / CAUSAL_EFFECTS
    values: dict[str, Any] = {
        "analysis": name,
        "seed": 0,
        "run": hashlib.sha256(json.dumps(run.manifest.to_dict(), sort_keys=True).encode()).hexdigest(),
        "causal": hashlib.sha256(causal.read_bytes()).hexdigest() if causal.is_file() else None,
        **_computing(),
    }
    return json.dumps(values, sort_keys=True).encode()


@cache
def _computing() -> dict[str, Any]:
    """Which code computes here."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    code = hashlib.sha256()
    for file in files:
        code.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    packages = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"code": code.hexdigest(), "packages": packages}
