"""One problem of a run, step by step: what each step said, which experts it took, and what they wrote towards the answer."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.run.one import find_sequence, lists, part_file, sequence_rows

SELECTIVE = 3
"""Experts named for each step, at most."""
ANSWER, NOWHERE = -1, -2
"""What stands for a step at tokens of the answer, and of neither."""


def sequence_number(run: Run, name: str) -> int:
    """Row in `Run.sequences` of a sequence named by its id, or by that number itself.

    Raises:
        UsageError: There is none.
    """
    ids = run.sequences["sequence_id"]
    if (here := np.flatnonzero(ids == name)).size:
        return int(here[0])
    if name.isdecimal() and int(name) < len(ids):
        return int(name)
    raise UsageError(f'{run.folder} has no sequence "{name}"; it holds {len(ids)}, such as {ids.iloc[0]}, or count from 0')


def step_table(run: Run, sequence: int, specialisation: pd.DataFrame) -> pd.DataFrame:
    """One row a reasoning step: what it says, how sure the model was of it, and its most selective experts.

    `step`, `label`, `text`, `correct`, `tokens`, `loss` (mean over its own tokens, in nats), and `experts`: of those that its
    tokens chose and that surely prefer the label (corrected p below 0.05), the surest three, each with layer, expert, times
    chosen here, log2_ratio, ci_low and ci_high.

    Args:
        run: The run.
        sequence: Row in `Run.sequences`.
        specialisation: The run's `label_specialisation`.

    Raises:
        UsageError: There is no such row, or the sequence has no steps.
    """
    names = [f"experts_{layer}" for layer in run.spec.routed_layers]
    tokens, part, sequence_id = _tokens(run, sequence, ["step", "loss", *names])
    steps = sequence_rows(part_file(run, part, "steps"), sequence_id, ["step", "label", "text", "correct"]).to_pandas()
    if steps.empty:
        raise UsageError(f"sequence {sequence_id} has no reasoning steps")
    step = tokens["step"].to_numpy()
    own_loss = np.concatenate([[np.nan], tokens["loss"].to_numpy()[:-1]])
    ids = np.stack([lists(tokens[name]) for name in names], axis=1)
    surely = specialisation[(specialisation["q"] < 0.05) & (specialisation["ci_low"] > 0)]
    rows = []
    for row in steps.sort_values("step").itertuples():
        here = step == row.step
        rows.append(
            {
                "step": int(row.step),
                "label": row.label,
                "text": row.text,
                "correct": row.correct,
                "tokens": int(here.sum()),
                "loss": float(np.nanmean(own_loss[here])) if here.any() else np.nan,
                "experts": _selective(run, ids[here], surely[surely["label"] == row.label]),
            }
        )
    return pd.DataFrame(rows).astype({"correct": "boolean"})


def answer_attribution(run: Run, sequence: int) -> pd.DataFrame:
    """What each layer's experts added directly to the logits of the tokens that were written, by step and in the answer.

    One row a layer and place (`step` with its `label`; the answer has step -1 and label answer): `tokens`, `logit` (sum over
    the chosen experts, mean over the place's tokens), and `expert`, the one that adds the most there, with its `expert_logit`.
    Direct means the path through the final norm and the head alone: what later layers make of it is not in it.

    Raises:
        UsageError: There is no such row, or the run did not keep lens.
    """
    if not run.manifest.parts or "lens" not in run.manifest.parts[0].extras:
        raise UsageError("this run did not keep what experts add to the logits; capture with --keep lens")
    names = [f"{kind}_{layer}" for kind in ("experts", "lens") for layer in run.spec.routed_layers]
    tokens, part, sequence_id = _tokens(run, sequence, ["step", "segment", *names])
    steps = sequence_rows(part_file(run, part, "steps"), sequence_id, ["step", "label"])
    labels = dict(zip(steps["step"].to_pylist(), steps["label"].to_pylist(), strict=True)) | {ANSWER: "answer"}
    segment, step = np.asarray(tokens["segment"].to_pylist()), tokens["step"].to_numpy()
    place = np.select([segment == "answer", step >= 0], [ANSWER, step], NOWHERE)
    # What stands at a token was added to the logit of the next: it belongs to the place of that one.
    written = np.append(place[1:], NOWHERE)
    rows = []
    for layer in run.spec.routed_layers:
        ids, lens = lists(tokens[f"experts_{layer}"]), lists(tokens[f"lens_{layer}"]).astype(np.float64)
        for name, label in labels.items():
            here = written == name
            if here.any():
                head = {"layer": layer, "step": name, "label": label, "tokens": int(here.sum())}
                rows.append(head | _added(ids[here], lens[here]))
    return pd.DataFrame(rows)


def attribution_by_layer(table: pd.DataFrame, *, first: int = 0) -> pd.DataFrame:
    """Logits of `answer_attribution` with a row a layer and a column a place, the answer last; the first step is `first`."""
    wide = table.pivot(index="layer", columns="step", values="logit")  # noqa: PD010
    order = sorted(map(int, wide.columns), key=lambda step: (step == ANSWER, step))
    names = ["answer" if step == ANSWER else f"step {step + first}" for step in order]
    return wide[order].set_axis(names, axis=1).reset_index()


def _added(ids: np.ndarray, lens: np.ndarray) -> dict[str, Any]:
    total = np.bincount(ids.ravel(), weights=lens.ravel()) / len(ids)
    best = int(total.argmax())
    return {"logit": float(lens.sum() / len(lens)), "expert": best, "expert_logit": float(total[best])}


def _selective(run: Run, ids: np.ndarray, surely: pd.DataFrame) -> list[dict[str, Any]]:
    """The surest of the experts that prefer the label and were chosen here."""
    rows = np.array([run.spec.row(layer) for layer in surely["layer"]], dtype=np.int64)
    times = (ids[:, rows] == surely["expert"].to_numpy()[None, :, None]).sum(axis=(0, 2)) if len(rows) else np.zeros(0, int)
    best = surely.assign(times=times)[times > 0].nlargest(SELECTIVE, "ci_low")
    columns = ["layer", "expert", "times", "log2_ratio", "ci_low", "ci_high"]
    return [dict(zip(columns, row, strict=True)) for row in best[columns].itertuples(index=False)]


def _tokens(run: Run, sequence: int, columns: list[str]) -> tuple[pa.Table, str, str]:
    part, sequence_id = find_sequence(run, sequence)
    tokens = sequence_rows(part_file(run, part, "tokens"), sequence_id, columns)
    if not tokens.num_rows:
        raise RunError(f"{part_file(run, part, 'tokens')} has no tokens of {sequence_id}; it is damaged: copy the run again")
    return tokens, part, sequence_id
