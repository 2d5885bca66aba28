"""From a run to a study: which experts its steps prefer, and how much each expert does."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
from jaxtyping import Int64

from ling_probe.analysis import label_specialisation
from ling_probe.analysis.counting import count_choices
from ling_probe.causal.study import TRANSPLANT, Study
from ling_probe.causal.targets import Kind, Target, doses, preferred_experts
from ling_probe.errors import UsageError
from ling_probe.run import Run


def plan_study(
    run: Run,
    *,
    labels: Sequence[str] | None = None,
    kinds: Sequence[str] = ("exclude", TRANSPLANT),
    numbers: Sequence[int] = (4,),
    values: Sequence[float] = (),
    draws: int = 99,
    seed: int = 0,
) -> tuple[Study, dict[int, Int64[np.ndarray, " E"]]]:
    """A study of the experts that steps of this run prefer, and the load of every expert in its steps, by layer.

    Args:
        run: Where experts are picked.
        labels: Kinds of step; all that some expert surely prefers if left out.
        kinds: Of change.
        numbers: Change so many of the surest experts.
        values: Of `bias`, on the largest number of experts.
        draws: Matched draws of experts for each change.
        seed: Of all draws.

    Raises:
        UsageError: No expert surely prefers a label, bias has no value, or a value has no bias.
    """
    if ("bias" in kinds) != bool(values):
        raise UsageError("bias needs a value and only bias has one: --kind bias --value 0.1")
    table = label_specialisation(run, seed=seed)
    if labels is None:
        sure = table[(table["q"] < 0.05) & (table["ci_low"] > 0)]
        labels = sorted(sure["label"].unique())
        if not labels:
            raise UsageError("no expert of this run surely prefers a kind of step; name a --label, or capture more problems")
    changes: list[Kind] = [kind for kind in get_args(Kind) if kind in kinds]
    targets: list[Target] = []
    for label in labels if changes else ():
        targets += doses(label, preferred_experts(table, label, max(numbers)), changes, numbers, values)
    transplants = tuple(labels) if TRANSPLANT in kinds else ()
    study = Study(targets=tuple(targets), transplants=transplants, draws=draws, seed=seed)
    load = {
        layer: count_choices(run, layer, lambda batch: np.where(batch.step >= 0, 0, -1), 1)[0]
        for layer in run.spec.routed_layers
    }
    return study, load
