"""What claims are read from beside analyses: studies of the model kept in the run's folder, and an adaptation's own."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from ling_probe.analysis.asking import Answer
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.run.folder import REROUTED

REROUTING, ADAPTATION, COST = "rerouting", "adaptation", "cost"
"""Sources of evidence that are no analyses."""
JUDGED = "judged.json"
"""Rows of an adaptation's tasks before and after, beside the adapted checkpoint."""
RETESTED = "test it with ling-probe claims RUN --causal"


def kept_evidence(run: Run, *, adapted: Path | None = None) -> dict[str, Answer]:
    """Every study that is kept, or why there is none.

    Args:
        run: Whose folder may hold studies of its model.
        adapted: Folder that `ling-probe adapt` made.
    """
    return {
        REROUTING: _or_refusal(partial(read_rerouting, run)),
        ADAPTATION: _or_refusal(partial(read_adaptation, run, adapted)),
    }


def read_rerouting(run: Run) -> pd.DataFrame:
    """Losses under other routers, a row a condition and family; see `ling_probe.rerouting`.

    Raises:
        UsageError: There are none, or they are of another model.
    """
    path = run.folder / REROUTED
    if not path.is_file():
        raise UsageError(f"the model was not run under other routers; {RETESTED}")
    table = pd.read_parquet(path)
    if set(table["digest"]) != {run.manifest.model.get("digest")}:
        raise UsageError(f"the losses under other routers are of another model than the run's; {RETESTED}")
    return table


def read_adaptation(run: Run, folder: Path | None) -> pd.DataFrame:
    """Tasks judged before and after an adaptation, a row a task and time; see `adapt.Judge`. `tuned` says what was moved.

    Raises:
        UsageError: No folder is named, or it holds no judged adaptation of the run's model.
    """
    if folder is None:
        raise UsageError("no adaptation was named; run ling-probe adapt MODEL --out FOLDER and give --adapted FOLDER")
    values: list[object] = []
    for name in ("adaptation.json", JUDGED):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} holds no {name}; name the folder that ling-probe adapt --out made")
        try:
            values.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except ValueError as error:
            raise UsageError(f"{folder / name} is not JSON ({error}); adapt again") from None
    asked, rows = values
    needed = {"when", "task", "problems", "correct"}
    if (
        not isinstance(asked, Mapping)
        or not isinstance(rows, list)
        or not rows
        or any(not isinstance(row, Mapping) or not needed <= set(row) for row in rows)
    ):
        raise UsageError(f"{folder / JUDGED} does not hold rows of tasks before and after; adapt again")
    if asked.get("digest") != run.manifest.model.get("digest"):
        raise UsageError(f"{folder} was adapted from another model than the run's; adapt {run.spec.name}")
    return pd.DataFrame(rows).assign(tuned=asked.get("tuned"))


def _or_refusal(read: Callable[[], pd.DataFrame]) -> Answer:
    try:
        return read()
    except UsageError as error:
        return error
