"""Every change, and its matched controls, on every label's problems; kept condition by condition, so that a study goes on."""

import hashlib
import json
import os
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
from ling_probe.causal.measure import ANSWER, Solutions
from ling_probe.causal.targets import Cells, Target, matched_experts
from ling_probe.causal.transplant import Choices, draw_donors
from ling_probe.errors import RunError, UsageError
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
    (Benjamini-Hochberg). For kind route_as the control is the routing of the same tokens in other steps of the same label,
    the effect that of steps of other labels, and `p` comes from sign flips by problem.

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
    kept = _Kept(folder, _identity(loaded, records, study))
    plan = {target: _controls(target, study, load) for target in study.targets}
    total = sum(1 + len(controls) for controls in plan.values()) + 2 * _donor_draws(study) * len(study.transplants)

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
        parts = Parts(solutions, label)
        for target in (target for target in study.targets if target.label == label):
            rows += _changed(solutions, parts, target, plan[target], study, kept, told)
        if label in study.transplants:
            rows += _transplanted(solutions, parts, label, study, kept, told)
    table = pd.DataFrame(rows).assign(seed=study.seed)
    table["q"] = table.groupby("measure")["p"].transform(lambda p: stats.benjamini_hochberg(p.to_numpy()))
    table.to_parquet(folder / EFFECTS, index=False)
    return table


def _changed(
    solutions: Solutions, parts: Parts, target: Target, controls: Sequence[Cells], study: Study, kept: "_Kept",
    told: Callable[[], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    found = []
    for experts in (target.experts, *controls):
        measure = partial(_under, solutions, parts, target.interventions(experts))
        found.append(kept.rises(json.dumps([target.to_dict(), [list(cell) for cell in experts]]), measure))
        told()
    head = {"label": target.label, "kind": target.kind, "dose": target.dose, "experts": _named(target)}
    for row in effect_rows(parts, found[0], found[1:], draws=1000, seed=study.seed):
        yield head | row


def _under(solutions: Solutions, parts: Parts, interventions: Sequence[Intervention]) -> Rises:
    return parts.rises(solutions.under(interventions))


def _controls(target: Target, study: Study, load: Mapping[int, Real[np.ndarray, " E"]]) -> list[Cells]:
    spared = tuple({cell for each in study.targets if each.label == target.label for cell in each.experts})
    rng = np.random.default_rng(study.seed)
    return [matched_experts(target.experts, load, rng=rng, spared=spared) for _ in range(study.draws)]


def _transplanted(
    solutions: Solutions, parts: Parts, label: str, study: Study, kept: "_Kept", told: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    moves = _Moves(solutions, label, study.seed)
    found: list[list[Rises]] = [[], []]
    for draw in range(_donor_draws(study)):
        for place, name in enumerate(("same", "other")):
            key = json.dumps([TRANSPLANT, label, name, draw])
            found[place].append(kept.rises(key, partial(moves.rises, parts, place, draw)))
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

    def rises(self, parts: Parts, place: int, draw: int) -> Rises:
        """With experts of steps of the label (place 0) or of another (1)."""
        donors = draw_donors(self._choices, self._solutions, self._label, rng=np.random.default_rng([self._seed, draw]))
        return parts.rises(self._choices.with_donors(donors[place]))


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


class _Kept:
    """Conditions done, one a line; a line cut short by a crash is done again."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._path = folder / CONDITIONS
        self._done: dict[str, Rises] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text(encoding="utf-8").split("\n") if self._path.is_file() else []
        whole = [json.loads(line) for line in lines[:-1]]
        if whole and whole[0] != dict(identity):
            different = ", ".join(name for name in identity if whole[0].get(name) != identity[name])
            raise RunError(f"{folder} holds a study with another {different}; name a new folder with --out")
        for line in whole[1:]:
            loss, right = ({name: np.array(each) for name, each in line[part].items()} for part in ("loss", "right"))
            self._done[line["key"]] = Rises(loss, right)
        text = "".join(f"{line}\n" for line in lines[:-1]) or json.dumps(dict(identity)) + "\n"
        self._path.write_text(text, encoding="utf-8")

    @property
    def done(self) -> int:
        """How many are kept."""
        return len(self._done)

    def rises(self, key: str, measured: Callable[[], Rises]) -> Rises:
        """What is kept under a key, or what is measured now and then kept."""
        if key not in self._done:
            found = measured()
            line = {"key": key} | {
                part: {name: values.tolist() for name, values in getattr(found, part).items()} for part in ("loss", "right")
            }
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._done[key] = found
        return self._done[key]
