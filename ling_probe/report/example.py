"""One problem of a run told step by step: the one with most steps of the kind that the surest expert prefers."""

from typing import Any

import pandas as pd

from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.shown import records
from ling_probe.step_view import answer_attribution, attribution_by_layer, step_table
from ling_probe.token_view import example_sequence, problem_facts

STEPS = 40
"""Steps shown of a long solution."""


def told_example(run: Run, specialisation: pd.DataFrame | UsageError | None, label: str | None) -> dict[str, Any]:
    """The problem as plain values, or under `note` why there is none.

    Args:
        run: The run.
        specialisation: Its `label_specialisation`.
        label: Of the steps that the surest expert prefers; where there is none, the first problem with steps is told.
    """
    if not isinstance(specialisation, pd.DataFrame):
        return {"note": f"Not applicable: {specialisation or 'label_specialisation was not asked for'}."}
    number = example_sequence(run, label) if label is not None else int(run.steps["sequence"].iloc[0])
    facts = problem_facts(run, number)
    steps = step_table(run, number, specialisation)
    told = {name: facts[name] for name in ("sequence_id", "family", "prompt", "answer", "predicted", "correct")}
    told |= {"chosen_for": label, "steps": records(steps.head(STEPS)), "n_steps": len(steps), "attribution": [], "note": ""}
    try:
        added = attribution_by_layer(answer_attribution(run, number))
        kept = [name for name in map(str, added) if name in ("layer", "answer") or int(name.split()[-1]) < STEPS]
        told["attribution"] = records(added[kept])
    except UsageError as error:
        told["note"] = f"No attribution: {error}."
    return told
