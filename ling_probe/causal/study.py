"""Every change, and its matched controls, on every label's problems; kept condition by condition, so that a study goes on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Real

from ling_probe import stats
from ling_probe.benchmarks import Record
from ling_probe.causal.effects import Parts, Rises, effect_rows
from ling_probe.causal.kept import Kept
from ling_probe.causal.measure import ANSWER, Solutions
from ling_probe.causal.targets import Cells, Target, matched_experts
from ling_probe.causal.transplant import Choices, draw_donors
from ling_probe.causal.written import WRITTEN, spread, write, written_rows
from ling_probe.errors import UsageError
from ling_probe.interventions import Intervention
from ling_probe.model.load import LoadedLing
from ling_probe.run.folder import CAUSAL_EFFECTS

TRANSPLANT = "route_as"
CONDITIONS, EFFECTS = "conditions.jsonl", CAUSAL_EFFECTS.name
"""Files of a study's folder: what each condition did to each problem, and the table made of it."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is changed on which problems."""

    targets: tuple[Target, ...]
    transplants: tuple[str, ...] = ()
    """Labels whose steps are given the routing of other steps."""
    draws: int = 99
    """Matched draws of experts for each target; donors are drawn a tenth as often, at least 5 times."""
    written: int = 0
    """Problems of each label that the model also solves itself under each target."""
    written_draws: int = 9
    """So many of the matched draws solve them too."""
    max_new_tokens: int = 300
    """Of a solution that the model writes."""
    seed: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label asked about."""
        return tuple(dict.fromkeys([*(target.label for target in self.targets), *self.transplants]))


def intervene(
    loaded: LoadedLing,
    records: Sequence[Record],
    study: Study,
    load: Mapping[int, Real[np.ndarray, " E"]],
    folder: Path,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> pd.DataFrame:
    """Carry a study out, or the rest of it, and give its table of effects.

    Labels that no record has steps of are left out. Each other label's problems are read teacher-forced once under the model's
    own router, once under each target, and once under each matched draw: 100 passes a target with 99 draws.

    One row a label, kind, dose and measure. `effect` is the rise of the loss in nats a token (`measure` own: in steps of the
    label; other: in the other steps of the same problems; selectivity: the first minus the second; answer), with `ci_low` and
    `ci_high`, 95 % over problems; `control` the mean over matched experts of the same layers and like load, `control_low` and
    `control_high` the middle 95 % of them; `excess` the difference with its interval; `right_change` the change in the share
    of units with every token right; `p` one-sided among the draws, `q` corrected over rows of the same measure
    (Benjamini-Hochberg). With `study.written`, two more rows: the change in the share of problems solved and of steps right
    when the model writes the solution itself under the change (`measure` solved, steps_right; shares instead of nats), with
    `p_unchanged`, exact against the model's own router. For kind route_as the control is the routing of the same tokens in
    other steps of the same label, the effect that of steps of other labels, and `p` comes from sign flips by problem.

    Args:
        loaded: The model; it is left as it was.
        records: Problems with solutions, best others than those the experts were picked on.
        study: What to change.
        load: Choices of each expert by layer, to match controls by.
        folder: Where conditions are kept; one that holds the same study's is gone on with.
        batch_tokens: Padded tokens of one forward pass.
        progress: Called with conditions done and their number.

    Raises:
        UsageError: No record has steps of any label.
        RunError: The folder holds another study.
        InterventionError: The model cannot carry out a change.
    """
    if not study.labels:
        raise UsageError("nothing to change: name a label and a kind of change")
    kept = Kept(folder / CONDITIONS, _identity(loaded, records, study))
    plan = {target: _controls(target, study, load) for target in study.targets}
    writing = 1 + len(study.targets) * (1 + min(study.written_draws, study.draws)) if study.written else 0
    total = len(study.targets) * (1 + study.draws) + writing + 2 * _donor_draws(study) * len(study.transplants)

    def told() -> None:
        progress(kept.done, total)

    rows: list[dict[str, Any]] = []
    every = Solutions(loaded, records)
    if not set(study.labels) & set(every.labels):
        found = ", ".join(sorted(set(every.labels) - {ANSWER}))
        raise UsageError(f'no problem has a "{study.labels[0]}" step; these labels there are: {found}')
    for label in (label for label in study.labels if label in every.labels):
        mine = [every.records[place] for place in np.unique(every.problem[every.labels == label])]
        solutions = Solutions(loaded, mine, batch_tokens=batch_tokens)
        parts = Parts(solutions, solutions.labels == label)
        for target in (target for target in study.targets if target.label == label):
            rows += _changed(solutions, parts, target, plan[target], study, kept, told)
            if study.written:
                rows += _written(solutions, target, plan[target][: study.written_draws], study, kept, told)
        if label in study.transplants:
            rows += _transplanted(solutions, parts, label, study, kept, told)
    table = pd.DataFrame(rows).assign(seed=study.seed)
    table["q"] = table.groupby("measure")["p"].transform(lambda p: stats.benjamini_hochberg(p.to_numpy()))
    table.to_parquet(folder / EFFECTS, index=False)
    return table


def _changed(
    solutions: Solutions, parts: Parts, target: Target, controls: Sequence[Cells], study: Study, kept: Kept,
    told: Callable[[], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    found = []
    for experts in (target.experts, *controls):
        measure = partial(_under, solutions, parts, target.interventions(experts))
        found.append(Rises(**kept.arrays(json.dumps([target.to_dict(), [list(cell) for cell in experts]]), measure)))
        told()
    for row in effect_rows(parts, found[0], found[1:], draws=1000, seed=study.seed):
        yield _head(target) | row


def _under(solutions: Solutions, parts: Parts, interventions: Sequence[Intervention]) -> dict[str, Any]:
    return vars(parts.rises(solutions.under(interventions)))


def _written(
    solutions: Solutions, target: Target, controls: Sequence[Cells], study: Study, kept: Kept, told: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    records = spread(solutions.records, study.written)
    if not records:
        return
    asked = [WRITTEN, target.label, len(records), study.max_new_tokens]
    found = []
    for experts in ((), target.experts, *controls):
        changes = target.interventions(experts) if experts else ()
        key = [*asked, target.to_dict(), [list(cell) for cell in experts]] if experts else asked
        sizes = {"max_new_tokens": study.max_new_tokens, "batch_tokens": solutions.batch_tokens}
        measure = partial(write, solutions.loaded, records, changes, label=target.label, **sizes)
        found.append(kept.arrays(json.dumps(key), measure)[WRITTEN])
        told()
    before, changed, *others = found
    rank = partial(stats.rank_p, side=-1)
    for row in written_rows(before, changed, others, rank, draws=1000, seed=study.seed):
        yield _head(target) | row


def _head(target: Target) -> dict[str, Any]:
    return {"label": target.label, "kind": target.kind, "dose": target.dose, "experts": _named(target)}


def _controls(target: Target, study: Study, load: Mapping[int, Real[np.ndarray, " E"]]) -> list[Cells]:
    spared = tuple({cell for each in study.targets if each.label == target.label for cell in each.experts})
    rng = np.random.default_rng(study.seed)
    return [matched_experts(target.experts, load, rng=rng, spared=spared) for _ in range(study.draws)]


def _transplanted(
    solutions: Solutions, parts: Parts, label: str, study: Study, kept: Kept, told: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    moves = _Moves(solutions, label, study.seed)
    found: list[list[Rises]] = [[], []]
    for draw in range(_donor_draws(study)):
        for place, name in enumerate(("same", "other")):
            key = json.dumps([TRANSPLANT, label, name, draw])
            found[place].append(Rises(**kept.arrays(key, partial(moves.rises, parts, place, draw))))
            told()
    same, other = (_mean(each) for each in found)
    flips = np.random.default_rng(study.seed).choice([-1.0, 1.0], size=(9999, parts.n_problems))
    for row in effect_rows(parts, other, [same], draws=1000, seed=study.seed):
        name = row["measure"]
        if name == "selectivity":
            continue
        difference = other.loss[name] - same.loss[name]
        reached = int((flips @ difference >= difference.sum() - 1e-9).sum())
        yield {"label": label, "kind": TRANSPLANT, "dose": 1.0, "experts": ""} | row | {
            "draws": _donor_draws(study), "p": (1 + reached) / (1 + len(flips)),
        }  # fmt: skip


class _Moves:
    """Transplants into steps of one label; the model's own choices are read when the first is made."""

    def __init__(self, solutions: Solutions, label: str, seed: int) -> None:
        self._solutions, self._label, self._seed = solutions, label, seed

    @cached_property
    def _choices(self) -> Choices:
        return Choices(self._solutions)

    def rises(self, parts: Parts, place: int, draw: int) -> dict[str, Any]:
        """With experts of steps of the label (place 0) or of another (1)."""
        donors = draw_donors(self._choices, self._solutions, self._label, rng=np.random.default_rng([self._seed, draw]))
        return vars(parts.rises(self._choices.with_donors(donors[place])))


def _mean(rises: Sequence[Rises]) -> Rises:
    loss = {name: np.mean([each.loss[name] for each in rises], axis=0) for name in rises[0].loss}
    return Rises(loss, {name: np.mean([each.right[name] for each in rises], axis=0) for name in rises[0].right})


def _donor_draws(study: Study) -> int:
    return max(5, study.draws // 10)


def _named(target: Target) -> str:
    return " ".join(f"{layer}.{expert}" for layer, expert in target.experts)


def _identity(loaded: LoadedLing, records: Sequence[Record], study: Study) -> dict[str, Any]:
    texts = hashlib.sha256("\0".join(f"{each.id}\0{each.prompt}\0{each.solution}" for each in records).encode()).hexdigest()
    return {"model": loaded.digest, "dtype": str(loaded.native.dtype), "records": texts, "seed": study.seed}
