"""Put analyses to runs, one after the other or in several processes, and index what they found."""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pandas as pd

from ling_probe.analysis.question import Finding, Verdict
from ling_probe.analysis.registry import ANALYSES
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.spawning import nobodys_main

Answer = pd.DataFrame | UsageError
"""A table, or the refusal that says why a run has none."""


def answers(run: Run, names: Sequence[str], *, against: Sequence[Run] = (), workers: int = 1) -> Iterator[tuple[str, Answer]]:
    """Each analysis with its table, or the refusal that says why these runs cannot answer it, in the order of the names.

    Args:
        run: The run asked about.
        names: Of analyses.
        against: Runs that comparisons compare it with.
        workers: Processes that share the work; the tables are the same however many.

    Raises:
        UsageError: An analysis does not exist.
    """
    if unknown := [name for name in names if name not in ANALYSES]:
        raise UsageError(f'no analysis "{unknown[0]}"; these there are: {", ".join(ANALYSES)}')
    if min(workers, len(names)) <= 1:
        for name in names:
            yield name, _answer(name, [run, *against])
        return
    folders = [each.folder for each in (run, *against)]
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        # Processes start as work is given out.
        with nobodys_main():
            waiting: list[Future[Answer]] = [pool.submit(_answer_in, folders, name) for name in names]
        for name, future in zip(names, waiting, strict=True):
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _answer_in(folders: Sequence[Path], name: str) -> Answer:
    return _answer(name, [Run.open(folder) for folder in folders])


def _answer(name: str, runs: Sequence[Run]) -> Answer:
    analysis = ANALYSES[name]
    try:
        return analysis.function(runs if analysis.compares else runs[0])
    except UsageError as error:
        return error


def finding(name: str, answer: Answer) -> Finding:
    """What an answer comes to; for a refusal, its reason."""
    if isinstance(answer, UsageError):
        return Finding(sentence=f"Not applicable: {answer}.", verdict=Verdict.NOT_APPLICABLE)
    return ANALYSES[name].finding(answer)


def findings_index(findings: Mapping[str, Finding]) -> pd.DataFrame:
    """What was asked and found, one row an analysis.

    Columns: `analysis`, `question`, `claim`, `finding` (a sentence), `effect` in `unit` with its 95 % interval (`ci_low`,
    `ci_high`), corrected p (`q`), `token_effect` (the same measure where token identity alone decides), `verdict` on the
    claim, and `rung` of the evidence.

    Args:
        findings: By analysis name.
    """
    return pd.DataFrame(
        [
            {
                "analysis": name,
                "question": ANALYSES[name].question,
                "claim": ANALYSES[name].claim,
                "finding": found.sentence,
                **{column: getattr(found, column) for column in ("effect", "unit", "ci_low", "ci_high", "q", "token_effect")},
                "verdict": found.verdict.value,
                "rung": found.rung,
            }
            for name, found in findings.items()
        ]
    ).astype({"rung": "Int64"})
