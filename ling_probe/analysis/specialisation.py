"""Whether experts prefer a kind of reasoning step, or a family of problems, beyond the words these are written in.

For each layer and class of text (a step label, or a problem family):

1. sort tokens into classes by token id (`TokenClasses`);
2. expect of every step what its tokens alone would choose: the expert's rate in each token class, over the whole run;
3. take the difference, chosen minus expected, summed over each whole step (or sequence);
4. for step labels, also take out what the problem as a whole does, in proportion to the length of its steps;
5. sum over the steps (sequences) of the label (family), and compare with the same sum after shuffling labels over whole
   steps inside each problem (families over sequences), tokens and routing fixed;
6. for the effect, compare the expert's rate in the label with its rate in the other steps of the same family of problems (in a
   family with that in the others), both sides weighted to the same words in the same proportions;
7. where too few rows reach the smallest p for any of them to survive the correction, test those with a p near it again, with
   more permutations.

What a test rejects: that labels (families) are exchangeable given the tokens, their routing and the problem. Steps that
differ because they stand early or late in a solution, or in their length, are not exchangeable either; neither is a family
that differs in format. Tokens that occur in one class alone say nothing: their meaning and their form cannot be told apart.
A preference is not a cause: see `causal`.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import (
    Choices,
    Classified,
    EqualTokens,
    at_equal_tokens,
    classified_families,
    classified_steps,
    expected_choices,
)
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, judge_cells, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run

RETEST = 20_000
"""Permutations of the second test."""
LEAST_OVERLAP = 0.1
"""With less of a class's tokens to compare there is no effect, no interval and no p: its words give it away."""
_SLICE = 1000
"""Permutations held at a time in the second test."""


def label_specialisation(run: Run, *, permutations: int = 1999, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Which experts prefer which kind of reasoning step, beside what its tokens alone would make of it.

    One row a layer, expert and label. `tokens` of the label, the expert's share of the choices there (`share_in`) and in other
    steps (`share_out`). `raw_log2_ratio` compares with its rate in other steps of the same family: "specialised by word" counts
    in it. `log2_ratio`, the effect, compares with how often the same words choose it there: what is left is specialised by the
    step. `ci_low` and `ci_high` are its 95 % bootstrap interval over sequences, weights of words held
    fixed; `overlap` is the weight of the label's tokens in that comparison over their number; below a tenth there is no effect
    and no test. `p` is two-sided from whole-step permutation inside each problem, `permutations` says how many; `q` corrects
    over all tested rows (Benjamini-Hochberg). No p is below 1 in 20,001, so among tens of thousands of rows a few lone effects
    cannot be found, however large.

    Args:
        run: A run whose benchmark has step labels.
        permutations: Shuffles of the first test.
        draws: Bootstrap samples of the interval.
        seed: Of shuffles and samples.

    Raises:
        UsageError: The run has no step labels.
    """
    return _specialisation(run, classified_steps(run), permutations, draws, seed)


def family_specialisation(run: Run, *, permutations: int = 1999, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Which experts prefer which family of problems, beside what its tokens alone would make of it.

    Columns as in `label_specialisation`, with `family` for `label`. Completion tokens count; the null shuffles families over
    whole sequences.

    Raises:
        UsageError: The run has fewer than two families, or no completions.
    """
    return _specialisation(run, classified_families(run), permutations, draws, seed)


def _specialisation(run: Run, classified: Classified, permutations: int, draws: int, seed: int) -> pd.DataFrame:
    if permutations < 1 or draws < 1:
        raise UsageError(f"{permutations} permutations and {draws} bootstrap draws: both must be at least 1")
    shuffled = stats.permute_labels(classified.codes, blocks=classified.blocks, draws=permutations, seed=seed)
    weights = stats.bootstrap_weights(len(run.sequences), draws=draws, seed=seed)
    tables = []
    for layer in run.spec.routed_layers:
        choices = expected_choices(run, layer, classified)
        equal = at_equal_tokens(run, layer, classified)
        for code in range(len(classified.names)):
            table = _class_table(choices, equal[code], classified, code, weights)
            p = stats.permutation_p(_exceeding(choices, classified, code, shuffled), permutations)
            tables.append(table.assign(layer=layer, p=np.where(table["log2_ratio"].notna(), p, np.nan)))
    table = pd.concat(tables, ignore_index=True).assign(permutations=permutations)
    table = _tested_again(run, classified, table, seed).assign(seed=seed)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    front = ["layer", "expert", classified.kind]
    back = ["p", "q", "seed", "permutations"]
    return table[[*front, *(name for name in table.columns if name not in {*front, *back}), *back]]


def _class_table(
    choices: Choices, equal: EqualTokens, classified: Classified, code: int, weights: Float64[np.ndarray, "B S"]
) -> pd.DataFrame:
    inside, n_tokens = classified.codes == code, classified.tokens.n_tokens
    observed, others = choices.observed[inside].sum(axis=0), choices.observed[~inside].sum(axis=0)
    overlap = equal.tokens[0].sum() / max(n_tokens[inside].sum(), 1.0)
    log2_ratio, low, high = _equal_token_ratio(equal, weights)
    if overlap < LEAST_OVERLAP:
        log2_ratio = low = high = np.full(len(observed), np.nan)
    return pd.DataFrame(
        {
            "expert": np.arange(len(observed)),
            classified.kind: classified.names[code],
            "tokens": int(n_tokens[inside].sum()),
            "share_in": observed / max(observed.sum(), 1.0),
            "share_out": others / max(others.sum(), 1.0),
            "raw_log2_ratio": _raw_ratio(choices, classified, code),
            "log2_ratio": log2_ratio,
            "ci_low": low,
            "ci_high": high,
            "overlap": overlap,
        }
    )


def _raw_ratio(choices: Choices, classified: Classified, code: int) -> Float64[np.ndarray, " E"]:
    """The same comparison without matching the words: families weigh the same on both sides, words do not."""
    inside, n_tokens = classified.codes == code, classified.tokens.n_tokens
    counts = np.array([np.bincount(classified.stratum, weights=n_tokens * side) for side in (inside, ~inside)])
    weight = (counts[::-1] / np.maximum(counts.sum(axis=0), 1))[(~inside).astype(int), classified.stratum]
    rates = [
        (weight[side] @ choices.observed[side] + 0.5) / (weight[side] @ n_tokens[side] + 0.5) for side in (inside, ~inside)
    ]
    return np.log2(rates[0] / rates[1])


def _equal_token_ratio(
    equal: EqualTokens, weights: Float64[np.ndarray, "B S"]
) -> tuple[Float64[np.ndarray, " E"], Float64[np.ndarray, " E"], Float64[np.ndarray, " E"]]:
    """Effect size with the bounds of its interval: log2 of the rate inside over that outside, half a choice added to each."""
    every = np.concatenate([np.ones((1, weights.shape[1])), weights])
    inside, outside = (every @ side for side in equal.choices)
    n_inside, n_outside = (np.maximum(every @ side, 1e-9)[:, None] for side in equal.tokens)
    ratio = np.log2((inside + 0.5) / (n_inside + 0.5)) - np.log2((outside + 0.5) / (n_outside + 0.5))
    return ratio[0], *stats.percentile_interval(ratio[1:])


def _exceeding(
    choices: Choices, classified: Classified, code: int, shuffled: Integer[np.ndarray, "B O"]
) -> Integer[np.ndarray, " E"]:
    residual = choices.observed - choices.expected
    return stats.count_exceeding(residual, classified.codes == code, shuffled == code)


def _tested_again(run: Run, classified: Classified, table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table with a finer p where the first test's smallest is too coarse for any row to be found.

    Rows are chosen by the first test and get their p from fresh permutations alone.
    """
    near = (table["p"] < 10 * table["p"].min()).to_numpy()
    found = stats.benjamini_hochberg(table["p"].to_numpy()) < DISCOVERY
    floor = 1 / (table["permutations"].iloc[0] + 1)
    if found.any() or not near.any() or table["p"].min() > floor or floor < 1 / RETEST:
        return table
    rows = table[near]
    columns = [
        (choices.observed - choices.expected)[:, group["expert"].to_numpy()]
        for layer, group in rows.groupby("layer", sort=False)
        for choices in [expected_choices(run, int(layer), classified)]
    ]
    exceeding = _retest(np.concatenate(columns, axis=1), rows[classified.kind].to_numpy(dtype=str), classified, seed)
    again = table.copy()
    again.loc[near, "p"] = stats.permutation_p(exceeding, RETEST)
    again.loc[near, "permutations"] = RETEST
    return again


def _retest(
    values: Float64[np.ndarray, "O R"], names: np.ndarray, classified: Classified, seed: int
) -> Integer[np.ndarray, " R"]:
    """For each column of residuals and its class, how many of `RETEST` permutations exceed it."""
    exceeding = np.zeros(values.shape[1], dtype=np.int64)
    for number in range(RETEST // _SLICE):
        shuffled = stats.permute_labels(classified.codes, blocks=classified.blocks, draws=_SLICE, seed=[seed, number])
        for code, name in enumerate(classified.names):
            mine = names == name
            exceeding[mine] += stats.count_exceeding(values[:, mine], classified.codes == code, shuffled == code)
    return exceeding


LEAST_EFFECT = 0.585
"""Log2 ratio below which a preference is not worth having: one and a half times as often."""


def _finding(table: pd.DataFrame) -> Finding:
    kind = "label" if "label" in table.columns else "family"
    place, others = ("steps", "other steps of the same family") if kind == "label" else ("problems", "other families")
    found = table[table["q"] < DISCOVERY]
    tested = f"{len(found):,} of {table['p'].count():,} (layer, expert, {kind}) cells differ from chance (q below 0.05)"
    verdict = judge_cells(table, least=LEAST_EFFECT)
    if found.empty:
        nothing = f"{tested}: this run shows no preference for a {kind} beyond its tokens that survives the correction."
        return Finding(sentence=nothing, verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{tested}; the surest is layer {row['layer']}, expert {row['expert']}, chosen {fold(row['log2_ratio'])} times as "
            f"often in {row[kind]} {place} as the same tokens choose it in {others} (95 % interval {fold_interval(row)})."
        ),
        verdict=verdict,
        rung=3 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["log2_ratio"]),
        unit="log2 ratio",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(row["raw_log2_ratio"] - row["log2_ratio"]),
    )


LABEL_SPECIALISATION = Analysis(
    function=label_specialisation,
    question="Which experts prefer which kind of reasoning step?",
    claim="Some expert prefers a kind of step beyond its words.",
    method=(
        "Choices over what the same tokens would choose in other steps of the same family, log2. Null: labels shuffled over "
        "whole steps inside each problem; p corrected over all layers, experts and labels (Benjamini-Hochberg); intervals from "
        "a bootstrap over sequences."
    ),
    order=surest_first,
    finding=_finding,
)
FAMILY_SPECIALISATION = Analysis(
    function=family_specialisation,
    question="Which experts prefer which family of problems?",
    claim="Some expert prefers a family of problems beyond its words.",
    method=(
        "Choices over what the same tokens would choose in other families, log2. Null: families shuffled over whole sequences; "
        "p corrected over all layers, experts and families (Benjamini-Hochberg); intervals from a bootstrap over sequences."
    ),
    order=surest_first,
    finding=_finding,
)
