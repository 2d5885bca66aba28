"""What a steering vector does on held-out problems, beside vectors of the same values given to other experts."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ling_probe import stats
from ling_probe.benchmarks import Record
from ling_probe.capture.edits import Editor
from ling_probe.causal.effects import MEASURES, Parts, Rises, compared, loss_measures, problem_weights
from ling_probe.causal.kept import Arrays, Kept
from ling_probe.causal.measure import ANSWER, Batch, Solutions
from ling_probe.causal.study import CONDITIONS
from ling_probe.causal.transplant import Choices
from ling_probe.causal.written import SOLVED, STEPS_OWN, STEPS_RIGHT, WRITTEN, spread, write, written_rows
from ling_probe.errors import UsageError
from ling_probe.interventions import check_all
from ling_probe.model.load import LoadedLing
from ling_probe.run.folder import STEERING_EFFECTS
from ling_probe.steering.vector import SteeringVector

STRENGTHS = (-0.1, -0.05, -0.02, 0.02, 0.05, 0.1)
MOVED = "moved"
BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a vector is tried."""

    strengths: tuple[float, ...] = STRENGTHS
    draws: int = 49
    """Vectors of the same values that each strength is compared with."""
    written: int = 100
    """Problems that the model also solves itself; 0 reads given solutions alone."""
    written_draws: int = 9
    """So many of the drawn vectors solve them too."""
    max_new_tokens: int = 300
    seed: int = 0


def steer(
    loaded: LoadedLing,
    records: Sequence[Record],
    vector: SteeringVector,
    trial: Trial,
    folder: Path,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> pd.DataFrame:
    """Try a vector, or the rest of its trial, and give the table of what it does.

    One row a strength and measure. `measure` moved is the share of choices, in steps and answers, that are others than the
    model's own; own, other, selectivity and answer the rise of the loss in nats a token (own: in steps of the class steered to,
    or in all steps where the classes are answers or runs); solved, steps_right and steps_own the change in the share of
    problems solved, of judged steps right, and of steps with the label, in what the model writes itself. `effect`, `control`
    (drawn vectors) and `excess` with their 95 % intervals as `causal.intervene` has them. `p` is two-sided among the draws and
    `p_unchanged` exact against the model as it is (solved only); `q` and `q_unchanged` are corrected over rows of a measure.

    Args:
        loaded: The model; it is left as it was.
        records: Problems with solutions, others than those the vector was made of.
        vector: What to steer with.
        trial: How.
        folder: Where conditions are kept; one that holds the same trial's is gone on with.
        batch_tokens: Padded tokens of one forward pass.
        progress: Called with conditions done and their number.

    Raises:
        UsageError: The vector is of another geometry, a strength is 0, or no record has what it steers to.
        RunError: The folder holds another trial.
    """
    vector.check(loaded.spec)
    if not trial.strengths or 0 in trial.strengths:
        raise UsageError("a strength of 0 changes nothing; give others, such as --strength 0.05")
    solutions = Solutions(loaded, records, batch_tokens=batch_tokens)
    parts = _parts(solutions, vector)
    kept = Kept(folder / CONDITIONS, _identity(loaded, solutions.records, vector, trial))
    rng = np.random.default_rng(trial.seed)
    vectors = [vector, *(vector.shuffled(rng) for _ in range(trial.draws))]
    writing = len(trial.strengths) * (1 + min(trial.draws, trial.written_draws)) + 1 if trial.written else 0
    told = lambda: progress(kept.done, len(trial.strengths) * len(vectors) + writing)  # noqa: E731
    reading, rows = _Reading(solutions, parts), []
    for strength in sorted(trial.strengths):
        found = []
        for draw, each in enumerate(vectors):
            measure = partial(reading.under, each, strength)
            found.append(kept.arrays(json.dumps(["read", strength, draw]), measure))
            told()
        rows += [{"strength": strength} | row for row in _read_rows(parts, found, trial.seed)]
        for row in _written_rows(parts, solutions, vectors[: 1 + trial.written_draws], strength, trial, kept, told):
            rows.append({"strength": strength} | row)
    table = pd.DataFrame(rows).assign(toward=vector.toward, away=vector.away, about=vector.about, seed=trial.seed)
    for p, q in (("p", "q"), ("p_unchanged", "q_unchanged")):
        table[q] = table.groupby("measure")[p].transform(lambda some: stats.benjamini_hochberg(some.to_numpy(float)))
    first = ["toward", "away", "about", "strength", "measure"]
    table = table[[*first, *table.columns.drop(first)]]
    table.to_parquet(folder / STEERING_EFFECTS, index=False)
    return table


def held_out(records: Sequence[Record], prompts: Sequence[str]) -> list[Record]:
    """Records whose prompt is not among those that a vector was made of.

    Raises:
        UsageError: All are.
    """
    known = set(prompts)
    others = [record for record in records if record.prompt not in known]
    if not others:
        raise UsageError(
            f"all {len(records)} problems stand in the run that the vector is made of; name another benchmark or --split"
        )
    return others


def _parts(solutions: Solutions, vector: SteeringVector) -> Parts:
    """Units of what is steered to, and of the rest."""
    if vector.about == "label":
        own, among = solutions.labels == vector.toward, None
    elif vector.about == "family":
        of_family = np.array([record.family == vector.toward for record in solutions.records])
        own, among = of_family[solutions.problem], np.ones(len(of_family), bool)
    else:
        own, among = solutions.labels != ANSWER, None
    if not own.any():
        raise UsageError(f'no problem has "{vector.toward}" in it, so what steering does to that cannot be measured')
    return Parts(solutions, own, among)


class _Reading:
    """Given solutions under vectors: losses, and how many choices are others than the model's own."""

    def __init__(self, solutions: Solutions, parts: Parts) -> None:
        self._solutions, self._parts = solutions, parts
        self._choices = Choices(solutions)
        self._row = np.full(len(solutions.records), -1)
        self._row[parts.problems] = np.arange(parts.n_problems)

    def under(self, vector: SteeringVector, strength: float) -> Arrays:
        """What one vector does, by problem."""
        interventions = vector.interventions(strength)
        check_all(interventions, self._solutions.loaded.spec)
        editor = Editor(self._solutions.loaded, interventions)
        moved, slots = np.zeros((2, self._parts.n_problems))
        start = 0

        @contextmanager
        def change(batch: Batch) -> Iterator[None]:
            nonlocal start
            here = slice(start, start + batch.input_ids.numel())
            start = here.stop
            with editor.inside(batch.layouts, batch.input_ids.shape[1]), self._counting(here, moved, slots):
                yield

        return vars(self._parts.rises(self._solutions.scores(change))) | {MOVED: {"moved": moved, "slots": slots}}

    @contextmanager
    def _counting(self, here: slice, moved: np.ndarray, slots: np.ndarray) -> Iterator[None]:
        unit = self._choices.unit[here]
        row = np.where(unit >= 0, self._row[self._solutions.problem[np.maximum(unit, 0)]], -1)
        counted = np.flatnonzero(row >= 0)

        def count(place: int, ids: torch.Tensor) -> None:
            own, new = self._choices.ids[here][counted, place], ids.cpu().numpy()[counted]
            other = ~(new[:, :, None] == own[:, None, :]).any(axis=-1)
            np.add.at(moved, row[counted], other.sum(axis=1))
            np.add.at(slots, row[counted], new.shape[1])

        with ExitStack() as stack:
            for place, gate in enumerate(self._solutions.loaded.gates().values()):
                hook = lambda _m, _a, ids, place=place: count(place, ids)  # noqa: E731
                stack.callback(gate.expert_ids.register_forward_hook(hook).remove)
            yield


def _read_rows(parts: Parts, found: Sequence[Arrays], seed: int) -> Iterator[dict[str, Any]]:
    weights = problem_weights(parts.n_problems, draws=BOOTSTRAP, seed=seed)
    each = [_read_measures(parts, one, weights) for one in found]
    shown = (MOVED, *(MEASURES if parts.tokens["other"].any() else ("own", "answer")))
    for name in shown:
        effect, control = each[0][name], np.stack([one[name] for one in each[1:]])
        yield {"measure": name, "problems": parts.n_problems} | compared(effect, control, seed=seed) | {
            "p": stats.rank_p(float(effect[0]), control[:, 0]), "p_unchanged": np.nan,
        }  # fmt: skip


def _read_measures(parts: Parts, found: Arrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    moved = (weights @ found[MOVED]["moved"]) / np.maximum(weights @ found[MOVED]["slots"], 1)
    return loss_measures(parts, Rises(found["loss"], found["right"]), weights) | {MOVED: moved}


def _written_rows(
    parts: Parts, solutions: Solutions, vectors: Sequence[SteeringVector], strength: float, trial: Trial, kept: Kept,
    told: Callable[[], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    steered = vectors[0]
    own = [solutions.records[place] for place in parts.problems]
    if steered.about == "family":
        own = [record for record in own if record.family == steered.toward]
    if not (records := spread(own, trial.written)):
        return
    sizes: dict[str, Any] = {
        "max_new_tokens": trial.max_new_tokens,
        "batch_tokens": solutions.batch_tokens,
        "label": steered.toward,
    }
    asked = [WRITTEN, len(records), trial.max_new_tokens]
    before = kept.arrays(json.dumps(asked), partial(write, solutions.loaded, records, (), **sizes))[WRITTEN]
    found = []
    for draw, each in enumerate(vectors):
        measure = partial(write, solutions.loaded, records, each.interventions(strength), **sizes)
        found.append(kept.arrays(json.dumps([*asked, strength, draw]), measure)[WRITTEN])
        told()
    measures = (SOLVED, STEPS_RIGHT, *((STEPS_OWN,) if steered.about == "label" else ()))
    yield from written_rows(before, found[0], found[1:], stats.rank_p, measures=measures, draws=BOOTSTRAP, seed=trial.seed)


def _identity(loaded: LoadedLing, records: Sequence[Record], vector: SteeringVector, trial: Trial) -> Mapping[str, Any]:
    texts = hashlib.sha256("\0".join(f"{each.id}\0{each.prompt}\0{each.solution}" for each in records).encode()).hexdigest()
    values = hashlib.sha256(json.dumps(vector.differences).encode()).hexdigest()
    dtype = str(loaded.native.dtype)
    return {"model": loaded.digest, "dtype": dtype, "records": texts, "vector": values, "seed": trial.seed}
