"""Minimal pairs: how the same words in the same places are routed in two problems that differ in the operation of one step.

The two texts of a pair differ in one word or sign of the prompt, and from the step on whose operation differs in what follows
from it. At every token that has the same id and position in both, after the first difference:

1. `changed` is the share of its experts that the two do not share, by where the token stands and how far back they last differ;
2. at tokens of the step itself while its words are still the same, it is set beside the steps before, at the same place in the
   step: both have the changed word behind them, only one has the other operation ahead;
3. the operation is decoded: a logistic regression on the difference of the two routings, learnt on four fifths of the pairs,
   says of the fifth left out which side has which operation. Words and places are the same, so they tell 1 in 2.

A network of random weights mixes the changed word into all that follows it, so decoding it proves little by itself; that the
step which needs the operation changes more than steps before it does not follow from the word.
"""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import stats as scipy_stats

from ling_probe import metrics, stats
from ling_probe.analysis.decoders import FOLDS, fit, folds, principal_axes, problem_mean, problem_weights, with_interval
from ling_probe.analysis.question import Analysis, Finding, Verdict, judge_gain, percent
from ling_probe.analysis.sample import TokenSample, indicator, interval_text, numbered, read_sample
from ling_probe.errors import UsageError
from ling_probe.run import Run

BEFORE, PROMPT, EARLIER, HERE, SIGN, AFTER = PLACES = (
    "before the difference",
    "rest of the prompt",
    "steps before",
    "the step, words still the same",
    "the step, from its difference on",
    "after the step",
)
DISTANCES = (1, 2, 4, 8, 16, 32)
"""Least distance, in tokens, of each class."""
LEAST_EFFECT = 0.01
"""Share of a token's experts that is worth having."""
LEAST_PAIRS = 10
_MOST, _COMPONENTS, _STRENGTH = 1000, 128, 3.0


def minimal_pairs(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How differently the same tokens are routed in two problems that differ in one operation, and whether that tells which.

    One row a layer (none: all of them), family ("all" or one) and where the tokens stand (`by` "place": `name` as in
    `PLACES`), and one a layer and distance in tokens from where the texts last differ (`by` "distance"). `changed` is the share
    of its experts that a token does not share with its twin, with its 95 % bootstrap interval over pairs (`ci_low`,
    `ci_high`); `usual` the same for two tokens of one id in different pairs. For the step itself while its words are the same,
    `beyond` is `changed` less that of steps before, at the same places in the step of the same pairs, with `beyond_low` and
    `beyond_high`; `p` two-sided from signs of pairs flipped. `accuracy` of telling which side has which operation on held-out
    pairs (chance 0.5), with its interval (`accuracy_low`, `accuracy_high`) and `accuracy_p`, one-sided binomial. `q` and
    `accuracy_q` correct over layers and places (Benjamini-Hochberg). Counted over `tokens` of `pairs`.

    Args:
        run: A run of minimal pairs, such as stepbench's split of that name.
        draws: Bootstrap samples.
        seed: Of folds, samples and partners.

    Raises:
        UsageError: The run holds fewer than ten pairs that differ in one operation.
    """
    twins = _twins(run, seed)
    tables = [_place_rows(twins, draws, seed), _distance_rows(twins, draws, seed)]
    table = pd.concat(tables, ignore_index=True).astype({"layer": "Int64"})
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    table["accuracy_q"] = stats.benjamini_hochberg(table["accuracy_p"].to_numpy())
    return table.assign(seed=seed)


@dataclass(frozen=True, eq=False)
class _Twins:
    """T tokens with the same id and position on both sides of P pairs, in order."""

    layers: tuple[int, ...]
    n_experts: int
    token_id: Integer[np.ndarray, " T"]
    pair: Integer[np.ndarray, " T"]
    place: Integer[np.ndarray, " T"]
    """An index into `PLACES`."""
    in_step: Integer[np.ndarray, " T"]
    """Number of the token in its step."""
    distance: Integer[np.ndarray, " T"]
    """Tokens since the texts last differ; 0 before they do."""
    one: Integer[np.ndarray, "T M K"]
    """Experts chosen on the first side."""
    other: Integer[np.ndarray, "T M K"]
    operations: Integer[np.ndarray, "P 2"]
    """Label of either side at the step that differs."""
    family: np.ndarray
    """Of each pair."""

    @cached_property
    def changed(self) -> Float64[np.ndarray, "T M"]:
        """Share of its experts that a token does not share with its twin."""
        return 1 - metrics.overlap(self.one, self.other) / self.one.shape[-1]


def _pairs(run: Run, seed: int) -> pd.DataFrame:
    """Rows of the two sequences of each pair (one, other), and the step that differs."""
    meta = [json.loads(text) for text in run.sequences["meta"]]
    known = pd.DataFrame(
        [(str(each["pair"]), row, each["pair_step"]) for row, each in enumerate(meta) if _differs(each)],
        columns=["pair", "row", "step"],
    )
    sides = known.groupby("pair")["row"].agg(["min", "max", "size"])
    sides = sides.assign(step=known.groupby("pair")["step"].first())[sides["size"] == 2].reset_index(drop=True)
    if len(sides) < LEAST_PAIRS:
        raise UsageError(
            f"{len(sides)} pairs of problems that differ in one operation in this run, {LEAST_PAIRS} are needed; capture "
            "stepbench with --split pairs"
        )
    if len(sides) > _MOST:
        sides = sides.sample(_MOST, random_state=seed).reset_index(drop=True)
    return sides.rename(columns={"min": "one", "max": "other"}).astype(int)


def _differs(meta: dict[str, object]) -> bool:
    """Whether a problem is one of an operation pair."""
    return "pair" in meta and isinstance(meta.get("pair_step"), int)


def _twins(run: Run, seed: int) -> _Twins:
    pairs, steps = _pairs(run, seed), run.steps
    first_step = np.searchsorted(steps["sequence"].to_numpy(), np.arange(len(run.sequences)))
    sample = _read(run, pairs)
    start = steps["start"].to_numpy()[np.minimum(first_step[sample.sequence] + np.maximum(sample.step, 0), len(steps) - 1)]
    solution = sample.position >= steps["start"].to_numpy()[np.minimum(first_step[sample.sequence], len(steps) - 1)]
    a, b, pair = _aligned(sample, pairs)
    alike = [each[a] == each[b] for each in (sample.token_id, sample.step, solution)]
    alike.append((sample.step[a] < 0) | (start[a] == start[b]))
    same, position = np.logical_and.reduce(alike), sample.position[a]
    last = _last(pair, np.where(same, -1, position))
    in_solution = _last(pair, np.where(same | ~solution[a], -1, position)) >= 0
    place = _places(sample.step[a] - pairs["step"].to_numpy()[pair], sample.step[a] >= 0, solution[a], last >= 0, in_solution)
    one, other = sample.expert_ids[a[same]], sample.expert_ids[b[same]]
    labels = np.unique(steps["label"].to_numpy(dtype=str), return_inverse=True)[1]
    return _Twins(
        layers=sample.layers,
        n_experts=sample.n_experts,
        token_id=sample.token_id[a[same]],
        pair=pair[same],
        place=place[same],
        in_step=(position - start[a])[same],
        distance=np.where(last >= 0, position - last, 0)[same],
        one=one,
        other=other,
        operations=np.stack([labels[first_step[pairs[side]] + pairs["step"]] for side in ("one", "other")], axis=1),
        family=run.sequences["family"].to_numpy(dtype=str)[pairs["one"]],
    )


def _read(run: Run, pairs: pd.DataFrame) -> TokenSample:
    wanted = np.zeros(len(run.sequences), dtype=bool)
    wanted[pairs[["one", "other"]].to_numpy().ravel()] = True
    return read_sample(run, lambda batch: wanted[batch.sequence])


def _aligned(sample: TokenSample, pairs: pd.DataFrame) -> tuple[Integer[np.ndarray, " n"], ...]:
    """Rows of both sides at every position that both have, and the pair; in order."""
    width, keys, rows = int(sample.position.max()) + 1, [], []
    for side in ("one", "other"):
        pair = np.full(int(sample.sequence.max()) + 1, -1)
        pair[pairs[side]] = np.arange(len(pairs))
        rows.append(np.flatnonzero(pair[sample.sequence] >= 0))
        keys.append(pair[sample.sequence[rows[-1]]] * width + sample.position[rows[-1]])
    both, one, other = np.intersect1d(*keys, return_indices=True)
    return rows[0][one], rows[1][other], both // width


def _last(pair: Integer[np.ndarray, " n"], marks: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """Largest mark so far in the same pair; -1 if there is none.

    >>> _last(np.array([0, 0, 0, 1]), np.array([-1, 5, -1, -1])).tolist()
    [-1, 5, 5, -1]
    """
    width = int(marks.max(initial=0)) + 2
    return np.maximum.accumulate(pair * width + marks + 1) - pair * width - 1


def _places(
    ahead: Integer[np.ndarray, " n"],
    in_step: Bool[np.ndarray, " n"],
    solution: Bool[np.ndarray, " n"],
    differed: Bool[np.ndarray, " n"],
    solution_differed: Bool[np.ndarray, " n"],
) -> Integer[np.ndarray, " n"]:
    """Where each token stands, an index into `PLACES`; `ahead` is its step less the one that differs."""
    conditions = (
        ~differed,
        ~solution,
        in_step & (ahead < 0) & ~solution_differed,
        in_step & (ahead == 0) & ~solution_differed,
        in_step & (ahead == 0),
    )
    return np.select(conditions, range(len(PLACES) - 1), len(PLACES) - 1)


def _usual(twins: _Twins, seed: int) -> Float64[np.ndarray, "T M"]:
    """Share of experts not shared with a token of the same id in another pair; NaN where there is none."""
    order = np.lexsort((np.random.default_rng(seed).random(len(twins.pair)), twins.token_id))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, -1)
    found = 1 - metrics.overlap(twins.one, twins.one[partner]) / twins.one.shape[-1]
    fair = (twins.token_id == twins.token_id[partner]) & (twins.pair != twins.pair[partner])
    return np.where(fair[:, None], found, np.nan)


def _place_rows(twins: _Twins, draws: int, seed: int) -> pd.DataFrame:
    changed, usual = twins.changed, _usual(twins, seed)
    beyond = _beyond(twins)
    rows = []
    for place, name in enumerate(PLACES):
        at = twins.place == place
        if not at.any():
            continue
        hits = _decoded(twins, at, seed)
        for family in ("all", *np.unique(twins.family)):
            mine = (twins.family == family) | (family == "all")
            some = at & mine[twins.pair]
            if not some.any():
                continue
            for layer in (None, *range(len(twins.layers))) if family == "all" else (None,):
                columns = slice(None) if layer is None else [layer]
                row = {"by": "place", "name": name, "layer": pd.NA if layer is None else twins.layers[layer], "family": family}
                row |= _change(changed[some][:, columns].mean(axis=1), twins.pair[some], draws, seed)
                row["usual"] = float(np.nanmean(usual[some][:, columns])) if np.isfinite(usual[some]).any() else np.nan
                row |= _accuracy(hits[-1 if layer is None else layer][mine], draws, seed)
                if place == PLACES.index(HERE):
                    row |= _beyond_columns(beyond[mine][:, columns].mean(axis=1), draws, seed)
                rows.append(row)
    return pd.DataFrame(rows).reindex(columns=_COLUMNS)


def _distance_rows(twins: _Twins, draws: int, seed: int) -> pd.DataFrame:
    rows = []
    bins = np.searchsorted(DISTANCES, twins.distance, side="right") - 1
    for place, least in enumerate(DISTANCES):
        at = (bins == place) & (twins.distance > 0)
        if not at.any():
            continue
        for layer in (None, *range(len(twins.layers))):
            columns = slice(None) if layer is None else [layer]
            change = _change(twins.changed[at][:, columns].mean(axis=1), twins.pair[at], draws, seed)
            told = {"by": "distance", "name": _distance_name(place), "distance": least, "family": "all"}
            rows.append({**told, "layer": pd.NA if layer is None else twins.layers[layer], **change})
    return pd.DataFrame(rows).reindex(columns=_COLUMNS)


_COLUMNS = [
    *("by", "name", "distance", "layer", "family", "tokens", "pairs", "changed", "ci_low", "ci_high", "usual"),
    *("beyond", "beyond_low", "beyond_high", "p", "accuracy", "accuracy_low", "accuracy_high", "accuracy_p"),
]


def _distance_name(place: int) -> str:
    if place + 1 == len(DISTANCES):
        return f"{DISTANCES[place]} on"
    first, last = DISTANCES[place], DISTANCES[place + 1] - 1
    return str(first) if first == last else f"{first} to {last}"


def _change(values: Float64[np.ndarray, " n"], pair: Integer[np.ndarray, " n"], draws: int, seed: int) -> dict[str, float]:
    """Mean over tokens, with its interval over pairs."""
    owner = numbered(pair)
    every = problem_weights(owner, draws=draws, seed=seed)
    told = with_interval("changed", "ci", problem_mean(values, owner, every), every.shape[1])
    return {**told, "tokens": len(values), "pairs": every.shape[1]}


def _beyond(twins: _Twins) -> Float64[np.ndarray, "P M"]:
    """How much more of the experts changes in the step that differs than in steps before, at the same places in the step."""
    n_pairs, width = len(twins.family), int(twins.in_step.max()) + 1
    means = []
    for name in (HERE, EARLIER):
        at = twins.place == PLACES.index(name)
        cell = twins.pair[at] * width + twins.in_step[at]
        sums, count = indicator(cell, n_pairs * width) @ twins.changed[at], np.bincount(cell, minlength=n_pairs * width)
        means.append(np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], np.nan))
    difference = (means[0] - means[1]).reshape(n_pairs, width, -1)
    there = np.isfinite(difference)
    return np.where(there, difference, 0).sum(axis=1) / np.where(there.any(axis=1), there.sum(axis=1), np.nan)


def _beyond_columns(values: Float64[np.ndarray, " P"], draws: int, seed: int) -> dict[str, float]:
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return {}
    every = problem_weights(np.arange(len(values)), draws=draws, seed=seed)
    told = with_interval("beyond", "beyond", problem_mean(values, np.arange(len(values)), every), len(values))
    return {**told, "p": float(stats.sign_flip_p(values[:, None], seed=seed)[0])}


def _decoded(twins: _Twins, at: Bool[np.ndarray, " T"], seed: int) -> Float64[np.ndarray, "R P"]:
    """For each layer and then all: 1 where the sides of a held-out pair were told, 0 where not, 1/2 where they are equal.

    NaN for pairs without tokens here.
    """
    pairs = np.unique(twins.pair[at])
    found = np.full((len(twins.layers) + 1, len(twins.family)), np.nan)
    if len(pairs) < FOLDS:
        return found
    differences = [_difference(twins, at, pairs, layer) for layer in range(len(twins.layers))]
    for row, values in enumerate((*differences, np.concatenate(differences, axis=1))):
        found[row, pairs] = _told(values, twins.operations[pairs], seed)
    return found


def _difference(
    twins: _Twins, at: Bool[np.ndarray, " T"], pairs: Integer[np.ndarray, " Q"], layer: int
) -> Float64[np.ndarray, "Q E"]:
    """Expert shares of one side less those of the other."""
    owner = np.searchsorted(pairs, twins.pair[at])
    counts = [
        np.bincount(
            (owner[:, None] * twins.n_experts + side[at, layer]).ravel(), minlength=len(pairs) * twins.n_experts
        ).reshape(len(pairs), -1)
        for side in (twins.one, twins.other)
    ]
    return (counts[0] - counts[1]) / np.bincount(owner)[:, None]


def _told(values: Float64[np.ndarray, "Q F"], operations: Integer[np.ndarray, "Q 2"], seed: int) -> Float64[np.ndarray, " Q"]:
    """Whether the sides of each pair are told by decoders of the others: which has the first operation, which the second."""
    values = values @ principal_axes(values, seed, most=_COMPONENTS).T
    values = values / max(np.sqrt((values**2).sum(axis=1).mean()), 1e-12)
    codes = numbered(operations.ravel()).reshape(-1, 2)
    fold, score = folds(np.arange(len(values)), seed), np.zeros(len(values))
    for each in range(FOLDS):
        held = np.flatnonzero(fold == each)
        both, train = np.concatenate([values, -values]), np.tile(fold != each, 2)
        model = fit(both, codes.T.ravel(), train, _STRENGTH).model
        if model is None:
            continue
        weights = np.zeros((int(codes.max()) + 1, values.shape[1]))
        weights[model.classes_] = np.concatenate([-model.coef_, model.coef_]) if len(model.classes_) == 2 else model.coef_
        score[held] = ((weights[codes[held, 0]] - weights[codes[held, 1]]) * values[held]).sum(axis=1)
    return (1 + np.sign(score)) / 2


def _accuracy(hits: Float64[np.ndarray, " P"], draws: int, seed: int) -> dict[str, float]:
    hits = hits[np.isfinite(hits)]
    if not len(hits):
        return {}
    every = problem_weights(np.arange(len(hits)), draws=draws, seed=seed)
    told = with_interval("accuracy", "accuracy", problem_mean(hits, np.arange(len(hits)), every), len(hits))
    sure = hits[hits != 0.5]
    p = scipy_stats.binomtest(int(sure.sum()), len(sure), alternative="greater").pvalue if len(sure) else np.nan
    return {**told, "accuracy_p": float(p)}


def all_layers_first(table: pd.DataFrame) -> pd.DataFrame:
    """Rows over all layers before those of one."""
    return table.iloc[np.argsort(table["layer"].notna().to_numpy(), kind="stable")]


def _finding(table: pd.DataFrame) -> Finding:
    whole = table[table["layer"].isna() & (table["by"] == "place") & (table["family"] == "all")]
    by = {str(row["name"]): row for _, row in whole.iterrows()}
    if HERE not in by or np.isnan(by[HERE]["beyond"]):
        return Finding(
            sentence="No pair has tokens of the step that differs before its words do, and steps before.",
            verdict=Verdict.CANNOT_TELL,
        )
    row = by[HERE]
    verdict = judge_gain(row["beyond_low"], row["beyond_high"], least=LEAST_EFFECT, q=row["q"])
    told = "; ".join(f"{name} {percent(by[name]['changed'])}" for name in PLACES if name in by)
    return Finding(
        sentence=(
            f"Experts that a token does not share with its twin, the same word in the same place: {told} (same word in another "
            f"pair: {percent(row['usual'])}). In the step whose operation differs, while its words are the same, "
            f"{row['beyond']:+.3f} of the experts more change than at the same places of steps before "
            f"({interval_text(row['beyond_low'], row['beyond_high'], '+.3f')}), and {percent(row['accuracy'])} of "
            f"{int(row['pairs'])} held-out pairs are told apart ({_earlier(by)}words and places tell 50 %)."
        ),
        verdict=verdict,
        rung=3 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["beyond"]),
        unit="share of a token's experts",
        ci_low=float(row["beyond_low"]),
        ci_high=float(row["beyond_high"]),
        q=float(row["q"]),
        token_effect=0.0,
    )


def _earlier(by: dict[str, pd.Series]) -> str:
    return f"{percent(by[EARLIER]['accuracy'])} in steps before; " if EARLIER in by else ""


MINIMAL_PAIRS = Analysis(
    function=minimal_pairs,
    question="What does another operation change in the routing of the same words?",
    claim="Before its words differ, a step that will apply another operation is routed otherwise, more than steps before it.",
    method=(
        "Two problems that differ in one word, at tokens of the same id and position: experts not shared, and a logistic "
        "regression on the difference of routings, five folds of whole pairs. Nulls: for the change, the same places of steps "
        "before the one that differs (signs of pairs flipped); for decoding, 1 in 2 (binomial); intervals from a bootstrap "
        "over pairs."
    ),
    order=all_layers_first,
    finding=_finding,
)
