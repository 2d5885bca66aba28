"""One problem of a run along its tokens, in the routing states of the run; and what states do in right and wrong solutions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe import routing, stats
from ling_probe.analysis.boundary_prediction import DISTANCE, TOKENS, distance_thresholds, routing_distance
from ling_probe.analysis.classified import COMPLETION, RIGHT, WRONG
from ling_probe.analysis.hidden import Fitted, fit
from ling_probe.analysis.margins import choice_margin
from ling_probe.analysis.profiles import state_profiles
from ling_probe.analysis.router import router_bias
from ling_probe.analysis.state_order import state_transitions
from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.run.one import find_sequence, lists, part_file, sequence_rows
from ling_probe.token_view import visible_text

LOSS, ENTROPY, MARGIN = "loss", "entropy", "margin"


@dataclass(frozen=True, eq=False)
class StateTables:
    """Routing states of a run and what they are, fitted once."""

    fitted: Fitted
    thresholds: dict[str, float]
    """See `distance_thresholds`; empty where the run has no steps."""
    profiles: pd.DataFrame
    transitions: pd.DataFrame
    answers: pd.DataFrame
    """See `state_answers`; empty where no family has both right and wrong answers."""


@dataclass(frozen=True, eq=False)
class ProblemStates:
    """What `charts.timeline` draws."""

    tokens: pd.DataFrame
    """A row a token of the completion: position, text, state, and the lines."""
    steps: pd.DataFrame
    """A row a step: step, label, start, stop, and the place of its label among the problem's."""
    boundaries: pd.DataFrame
    """A row a place where a step begins, or is found to begin: position, found."""
    lines: tuple[str, ...]


def state_tables(run: Run, *, states: int | None = None, seed: int = 0) -> StateTables:
    """Routing states of a run, what they go with and how they follow one another; arguments as for `fit_states`."""
    fitted = fit(run, states=states, seed=seed)
    try:
        thresholds = distance_thresholds(fitted)
    except UsageError:
        thresholds = {}
    profiles, transitions = (table(run, fitted=fitted, seed=seed) for table in (state_profiles, state_transitions))
    return StateTables(fitted, thresholds, profiles, transitions, state_answers(run, fitted))


def problem_states(run: Run, sequence: int, tables: StateTables) -> ProblemStates:
    """Steps, states, boundaries and lines of one problem; only its part of the run is read.

    Args:
        run: The run.
        sequence: Row in `Run.sequences`.
        tables: Of the run.

    Raises:
        UsageError: There is no such row.
        RunError: A file is damaged.
    """
    part, sequence_id = find_sequence(run, sequence)
    layers, biases = run.spec.routed_layers, _biases(run)
    kept = [f"{kind}_{layer}" for kind in ("experts", *(["logits"] if biases is not None else [])) for layer in layers]
    columns = ["position", "token", "token_id", "segment", "step", "loss", *kept]
    rows = sequence_rows(part_file(run, part, "tokens"), sequence_id, columns)
    if not rows.num_rows:
        raise RunError(f"{part_file(run, part, 'tokens')} has no tokens of {sequence_id}; it is damaged: copy the run again")
    told = np.isin(np.asarray(rows["segment"].to_pylist()), COMPLETION)
    told = told if told.any() else ~told
    ids = np.stack([lists(rows[f"experts_{layer}"])[told] for layer in layers], axis=1)
    own_loss = np.concatenate([[np.nan], rows["loss"].to_numpy()[:-1]])[told]
    texts = [visible_text(text) for text, here in zip(rows["token"].to_pylist(), told, strict=True) if here]
    tokens = pd.DataFrame({"position": rows["position"].to_numpy()[told], "text": texts})
    tokens = tokens.assign(state=tables.fitted.states.decode(ids), **{LOSS: own_loss})
    if biases is not None:
        logits = np.stack([lists(rows[f"logits_{layer}"])[told].astype(float) for layer in layers], axis=1)
        tokens = tokens.assign(**_router_lines(run, logits, biases))
    steps = sequence_rows(part_file(run, part, "steps"), sequence_id, ["step", "label", "start", "stop"]).to_pandas()
    steps = steps.sort_values("step", ignore_index=True).assign(place=pd.factorize(steps.sort_values("step")["label"])[0])
    inside = rows["step"].to_numpy()[told] >= 0
    boundaries = _boundaries(
        tables, steps, tokens["position"].to_numpy()[inside], ids[inside], rows["token_id"].to_numpy()[told][inside]
    )
    return ProblemStates(tokens, steps, boundaries, tuple(name for name in (LOSS, ENTROPY, MARGIN) if name in tokens))


def _biases(run: Run) -> dict[int, Float64[np.ndarray, " E"]] | None:
    """The router's biases, where logits were kept that they fit to."""
    try:
        return router_bias(run)
    except UsageError:
        return None


def _router_lines(
    run: Run, logits: Float64[np.ndarray, "T M E"], biases: dict[int, Float64[np.ndarray, " E"]]
) -> dict[str, np.ndarray]:
    """Entropy of the normalised scores as a share of its maximum, and margin of the choice, each the mean over layers."""
    scores = routing.scores(logits)
    share = scores / np.maximum(scores.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    entropy = -(share * np.log(np.maximum(share, np.finfo(float).tiny))).sum(axis=-1) / np.log(share.shape[-1])
    margin = np.stack([choice_margin(logits[:, place], bias, run.spec) for place, bias in enumerate(biases.values())], axis=1)
    return {ENTROPY: entropy.mean(axis=1), MARGIN: np.where(np.isfinite(margin), margin, np.nan).mean(axis=1)}


def _boundaries(
    tables: StateTables, steps: pd.DataFrame, position: np.ndarray, expert_ids: np.ndarray, token_ids: np.ndarray
) -> pd.DataFrame:
    found = [pd.DataFrame({"position": steps["start"].to_numpy()[1:], "found": "annotated"})]
    space, names = tables.fitted.states.space, {DISTANCE: "by routing", TOKENS: "by tokens alone"}
    if len(position):
        series = {DISTANCE: space.place(expert_ids), TOKENS: space.expected(token_ids)}
        for name, threshold in tables.thresholds.items():
            here = routing_distance(series[name], [len(position)]) >= threshold
            found.append(pd.DataFrame({"position": position[here], "found": names[name]}))
    return pd.concat(found, ignore_index=True)


def state_answers(run: Run, fitted: Fitted, *, draws: int = 1000) -> pd.DataFrame:
    """Shares of the states in right and in wrong solutions, of families that have both, on held-out problems.

    One row an answer (right, wrong) and state: `share` of the tokens, mean over problems, right ones weighted so that their
    families are as frequent as among wrong ones, with its interval (`ci_low`, `ci_high`: bootstrap over problems), and the
    `problems`. Empty where no family has both.
    """
    sample, n = fitted.halves.sample, fitted.n_states
    held = ~fitted.halves.first
    rows, problem = np.unique(sample.sequence[held], return_inverse=True)
    counts = np.bincount(problem * n + fitted.path[held], minlength=len(rows) * n).reshape(-1, n)
    about = run.sequences.iloc[rows]
    family = pd.factorize(about["family"])[0]
    judged, right = about["correct"].notna().to_numpy(), about["correct"].fillna(value=False).to_numpy(dtype=bool)
    both = [
        code for code in np.unique(family) if 0 < right[judged & (family == code)].sum() < (judged & (family == code)).sum()
    ]
    if not both:
        return pd.DataFrame(columns=["answer", "state", "share", "ci_low", "ci_high", "problems"])
    kept = judged & np.isin(family, both)
    shares, right, family = (counts / counts.sum(axis=1, keepdims=True))[kept], right[kept], family[kept]
    weights = np.concatenate([np.ones((1, len(right))), stats.bootstrap_weights(len(right), draws=draws, seed=fitted.seed)])
    drawn = {WRONG: _mean(weights * ~right, shares), RIGHT: np.zeros((len(weights), n))}
    wrong = np.maximum((weights * ~right).sum(axis=1, keepdims=True), 1)
    for code in both:
        part = (weights * (~right & (family == code))).sum(axis=1, keepdims=True) / wrong
        drawn[RIGHT] = drawn[RIGHT] + part * _mean(weights * (right & (family == code)), shares)
    tables = []
    for answer in (RIGHT, WRONG):
        low, high = stats.percentile_interval(drawn[answer][1:])
        columns = {"answer": answer, "state": np.arange(n), "share": drawn[answer][0], "ci_low": low, "ci_high": high}
        tables.append(pd.DataFrame(columns).assign(problems=int((right if answer == RIGHT else ~right).sum())))
    return pd.concat(tables, ignore_index=True)


def _mean(weights: Float64[np.ndarray, "B P"], shares: Float64[np.ndarray, "P S"]) -> Float64[np.ndarray, "B S"]:
    return (weights @ shares) / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)


def state_summary(profiles: pd.DataFrame, *, most: int = 3) -> pd.DataFrame:
    """One row a state of `state_profiles`: its share, and the names it has more of than all tokens do.

    `labels`, `families`, `tokens` and `experts` are lists of the names preferred most, `most` each.
    """
    rows = []
    for _, about in profiles.groupby("state"):
        liked = about[about["log2_ratio"] > 0].sort_values("log2_ratio", ascending=False)
        names = {
            kind: liked.loc[liked["kind"] == kind, "name"].head(most).tolist()
            for kind in ("label", "family", "token", "expert")
        }
        rows.append(
            {
                "state": int(about["state"].iloc[0]),
                "share": float(about["share"].iloc[0]),
                **{
                    plural: names[kind] for kind, plural in zip(names, ("labels", "families", "tokens", "experts"), strict=True)
                },
            }
        )
    return pd.DataFrame(rows)
