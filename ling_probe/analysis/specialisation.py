"""Whether experts prefer a kind of reasoning step, a family of problems, or wrong solutions, beyond the words of the text.

For each layer and class of text (a step label, a problem family, wrong answers):

1. sort tokens into classes by token id, for answers in each family by itself, for labels also in each third of the solution;
2. expect of every step what its tokens alone would choose: the expert's rate in each token class, over the whole run;
3. take the difference, chosen minus expected, summed over each whole step (or sequence);
4. for step labels, also take out what the problem as a whole does, in proportion to the length of its steps;
5. sum over the steps (sequences) of the class, and compare with the same sum after shuffling labels over whole steps inside
   each problem (families over sequences, answers over the sequences of a family), tokens and routing fixed: drawn in small
   runs, from the exact moments of all shuffles in large ones and wherever a p is near the floor of drawn ones;
6. for the effect, compare the expert's rate in the class with its rate in the other steps of the same family of problems and
   the same third of the solution (in a family with that in the others), both sides weighted to the same words in the same
   proportions;
7. pick rows on one half of the problems, by their corrected p there, and measure and test them again on the other.

What a test rejects: that labels (families, answers) are exchangeable given the tokens, their third of the solution, their
routing and the problem. Without the thirds, routing that drifts along a solution whose labels keep their place passed for
preference in nearly every run. Steps that differ in their length are not exchangeable; neither is a family that differs in
format. Tokens that occur in one class alone say nothing: their meaning and their form cannot be told
apart. A preference is not a cause: see `causal`.
"""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float32, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.adjusted import Design, LayerSums, stream
from ling_probe.analysis.classified import WRONG, Classified, classified_answers, classified_families, classified_steps
from ling_probe.analysis.counting import sum_by
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, fold, fold_interval, judge_cells, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_OVERLAP = 0.1
"""With less of a class's tokens to compare there is no effect, no interval and no p: its words give it away."""
LEAST_VARIANCE = 1e-6
"""Variance of a sum of choices that only rounding makes: the cell cannot be tested."""
LEAST_CHOICES = 40
"""An expert that is chosen less often, inside classes and outside them, is not tested: what tokens would make of it comes from
the same few choices, and no law of a sum holds for so few."""
DRAWN = 2e9
"""Most multiplications spent on drawn permutations; where they would cost more, every p is from moments."""


def label_specialisation(run: Run, *, permutations: int = 1999, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Which experts prefer which kind of reasoning step, beside what its tokens alone would make of it.

    One row a layer, expert and label. `tokens` of the label, the expert's share of the choices there (`share_in`) and in other
    steps (`share_out`). `raw_log2_ratio` compares with its rate in other steps of the same family and third of the solution:
    "specialised by word" counts in it. `log2_ratio`, the effect, compares with how often the same words choose it there: what
    is left is specialised by the step. `ci_low` and `ci_high` are its 95 % bootstrap interval over sequences (in bundles,
    beyond 400), weights of words held fixed; `overlap` is the weight of the label's tokens in that comparison over their
    number; below a tenth there is no effect and no test, and an expert that is chosen fewer than 40 times is not tested either.
    `p` is two-sided from whole-step permutation inside each problem. `permutations` says how many were drawn; 0 is a p from
    the exact moments of all of them. `q` corrects over all tested rows (Benjamini-Hochberg).

    Replication: rows with `picked_q` (q in the first half of the problems, drawn at random) below 0.05 have their effect there
    (`picked_log2_ratio`, `picked_low`, `picked_high`) and on the other half (`held_out_log2_ratio`, `held_out_low`,
    `held_out_high`, `held_out_q` corrected over the picked rows); the others have none. `replicated` says whether the
    held-out effect has the same sign, `held_out_q` below 0.05 and an interval without 0.

    Args:
        run: A run whose benchmark has step labels.
        permutations: Shuffles drawn, if the run is small enough.
        draws: Bootstrap samples of the interval.
        seed: Of halves, shuffles and samples.

    Raises:
        UsageError: The run has no step labels.
    """
    return _specialisation(run, classified_steps(run), permutations, draws, seed)


def family_specialisation(run: Run, *, permutations: int = 1999, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Which experts prefer which family of problems, beside what its tokens alone would make of it.

    Columns as in `label_specialisation`, with `family` for `label`. Completion tokens count; the null shuffles families over
    the whole sequences of each half of the run. Three more say what domain studies report, words included: `token_share`, the
    share of the family's tokens that choose the expert, beside the `even_share` K/E; and `log_odds_z`, its log-odds against the
    other families over their standard error, under a Dirichlet prior of the whole run's shares that weighs as much as ten
    choices an expert (Monroe et al. 2008). It takes tokens for independent: fit to rank by, not to test by.

    Raises:
        UsageError: The run has fewer than two families, or no completions.
    """
    table = _specialisation(run, classified_families(run), permutations, draws, seed)
    return table.assign(
        token_share=table["share_in"] * run.spec.top_k,
        even_share=run.spec.top_k / run.spec.n_experts,
        log_odds_z=_log_odds_z(table, run.spec.top_k, run.spec.n_experts),
    )


def correctness_specialisation(run: Run, *, permutations: int = 1999, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Which experts wrong solutions choose more or less often than right ones of the same family, at equal tokens.

    Columns as in `label_specialisation`, with `answer` (always "wrong") for `label`: a positive `log2_ratio` is an expert of
    wrong solutions, a negative one of right ones. Completion tokens of families with both count; the null shuffles answers
    over the whole sequences of a family. Harder problems differ from easier ones in more than their answers.

    Raises:
        UsageError: No family has both right and wrong answers, or there are no completions.
    """
    return _specialisation(run, classified_answers(run), permutations, draws, seed)


PRIOR_CHOICES = 10
"""Choices an expert that the prior of the log-odds weighs as much as."""


def _log_odds_z(table: pd.DataFrame, top_k: int, n_experts: int) -> Float64[np.ndarray, " R"]:
    """Monroe, Colaresi & Quinn 2008, equations 15, 16, 19 and 22, with choices for words."""
    inside = (table["share_in"] * table["tokens"] * top_k).to_numpy()
    total = pd.Series(inside).groupby([table["layer"], table["expert"]]).transform("sum").to_numpy()
    n_inside = (table["tokens"] * top_k).to_numpy()
    n_total = (table.drop_duplicates("family")["tokens"].sum()) * top_k
    prior = PRIOR_CHOICES * n_experts * total / max(n_total, 1) + 1e-9
    mine, theirs = inside + prior, total - inside + prior
    n_mine, n_theirs = (n + PRIOR_CHOICES * n_experts for n in (n_inside, n_total - n_inside))
    log_odds = np.log(mine / (n_mine - mine)) - np.log(theirs / (n_theirs - theirs))
    return log_odds / np.sqrt(1 / mine + 1 / theirs)


def _specialisation(run: Run, classified: Classified, permutations: int, draws: int, seed: int) -> pd.DataFrame:
    if permutations < 1 or draws < 1:
        raise UsageError(f"{permutations} permutations and {draws} bootstrap draws: both must be at least 1")
    design = Design.of(run, classified, seed)
    cost = float(permutations) * len(classified.codes) * run.spec.n_experts * run.spec.n_rows * len(classified.names)
    drawn = _Drawn(design, permutations, seed) if cost <= DRAWN else None
    bootstrap = _Bootstrap(design, draws, seed)
    shown = [code for code, name in enumerate(classified.names) if classified.kind != "answer" or name == WRONG]
    tables = []
    for streamed in stream(run, design, keep=drawn is not None):
        for layer, sums in streamed.layers.items():
            matched = sums.matched()
            rows = [_class_table(sums, matched, streamed.weight, code, bootstrap, drawn) for code in shown]
            tables.append(pd.concat(rows).assign(layer=layer))
    table = _replicated(pd.concat(tables, ignore_index=True)).assign(seed=seed)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    front = ["layer", "expert", classified.kind]
    back = ["p", "q", "seed", "permutations"]
    return table[[*front, *(name for name in table.columns if name not in {*front, *back}), *back]]


class _Drawn:
    """Permutations of the labels, drawn once for all layers and classes."""

    def __init__(self, design: Design, permutations: int, seed: int) -> None:
        classified = design.classified
        strata = design.half * classified.n_strata + classified.stratum
        block = classified.sequence if classified.within_sequences else strata
        _, self._block = np.unique(block, return_inverse=True)
        self._codes = classified.codes
        self._shuffled = stats.permute_labels(classified.codes, blocks=self._block, draws=permutations, seed=seed)

    def p(
        self, residuals: list[Float32[np.ndarray, "o E"]], code: int, tail: Float64[np.ndarray, " E"]
    ) -> tuple[Float64[np.ndarray, " E"], Integer[np.ndarray, " E"]]:
        """P of one class, and how many permutations it rests on: none where `tail`, from moments, tells a small p better."""
        residual = np.concatenate(residuals).astype(float)
        size = np.bincount(self._block)[:, None]
        centred = residual - (sum_by(residual, self._block, len(size)) / size)[self._block]
        exceeding = stats.count_exceeding(centred, self._codes == code, self._shuffled == code)
        n = len(self._shuffled)
        return stats.finer_p(exceeding, n, tail), np.where(exceeding < stats.COARSE, 0, n)


class _Bootstrap:
    """Weights of units in every sample, of the whole run and of each half; the first row is the run as it is."""

    def __init__(self, design: Design, draws: int, seed: int) -> None:
        half = design.unit_half
        self.whole = _sample_weights(np.ones(len(half), bool), draws, seed)
        self.halves = [_sample_weights(half == side, draws, seed) for side in (0, 1)]


def _sample_weights(drawn: Bool[np.ndarray, " U"], draws: int, seed: int) -> Float32[np.ndarray, "B U"]:
    weights = np.zeros((draws + 1, len(drawn)), np.float32)
    weights[0, drawn] = 1
    if drawn.any():
        weights[1:, drawn] = stats.bootstrap_weights(int(drawn.sum()), draws=draws, seed=seed)
    return weights


def _equal_token_ratio(
    weights: Float32[np.ndarray, "B U"], choices: Float32[np.ndarray, "2 U E"], tokens: Float64[np.ndarray, "2 U"]
) -> tuple[Float[np.ndarray, " E"], Float[np.ndarray, " E"], Float[np.ndarray, " E"]]:
    """Effect size with the bounds of its interval: log2 of the rate inside over that outside, half a choice added to each."""
    inside, outside = (weights @ side + np.float32(0.5) for side in choices)
    n_inside, n_outside = (np.maximum(weights @ side, 1e-9)[:, None].astype(np.float32) + 0.5 for side in tokens)
    ratio = inside / outside * (n_outside / n_inside)
    low, high = stats.percentile_interval(ratio[1:])
    return np.log2(ratio[0]), np.log2(low), np.log2(high)


def _class_table(
    sums: LayerSums,
    matched: Float32[np.ndarray, "Z U E"],
    weight: Float64[np.ndarray, "U Z"],
    code: int,
    bootstrap: _Bootstrap,
    drawn: _Drawn | None,
) -> pd.DataFrame:
    """Rows of one class in one layer."""
    classified = sums.design.classified
    n_classes, n_tokens = len(classified.names), _tokens(classified, code)
    first, second = sums.null(0).of(code), sums.null(1).of(code)
    p = (first + second).p(least=LEAST_VARIANCE)
    permutations = np.zeros(len(p), dtype=np.int64)
    if drawn is not None:
        tail, (p, permutations) = p, drawn.p(sums.residuals, code, p)
        p = np.where(np.isnan(tail), np.nan, p)
    by_class = sums.choices.reshape(n_classes, -1, len(p))
    observed, others = by_class[code].sum(axis=0), by_class.sum(axis=(0, 1)) - by_class[code].sum(axis=0)
    rare = observed + others < LEAST_CHOICES
    p = np.where(rare, np.nan, p)
    overlap = weight[:, code].sum() / max(n_tokens[0].sum(), 1.0)
    columns = {
        "expert": np.arange(len(p)),
        classified.kind: classified.names[code],
        "tokens": int(n_tokens[0].sum()),
        "share_in": observed / max(observed.sum(), 1.0),
        "share_out": others / max(others.sum(), 1.0),
        "raw_log2_ratio": _raw_ratio(by_class, code, n_tokens),
    }
    unknown = np.full(len(p), np.nan)
    if overlap < LEAST_OVERLAP:
        effect = dict.fromkeys(("log2_ratio", "ci_low", "ci_high"), unknown)
        halves = dict.fromkeys(HALF_COLUMNS, unknown)
        p = unknown
    else:
        sides = [code, n_classes + code]
        found = _equal_token_ratio(bootstrap.whole, matched[sides], weight[:, sides].T)
        effect = dict(zip(("log2_ratio", "ci_low", "ci_high"), found, strict=True))
        halves = _half_columns(matched, weight, code, bootstrap, (first, second), rare)
    return pd.DataFrame(columns | effect | {"overlap": overlap} | halves | {"p": p, "permutations": permutations})


HALF_COLUMNS = tuple(f"{half}_{name}" for half in ("picked", "held_out") for name in ("log2_ratio", "low", "high", "q"))


def _half_columns(
    matched: Float32[np.ndarray, "Z U E"],
    weight: Float64[np.ndarray, "U Z"],
    code: int,
    bootstrap: _Bootstrap,
    null: tuple[stats.NullMoments, stats.NullMoments],
    rare: Bool[np.ndarray, " E"],
) -> dict[str, Float64[np.ndarray, " E"]]:
    """Effect and p in each half; `q` columns hold p still, and experts that cannot be picked have no effect."""
    p = [np.where(rare, np.nan, each.p(least=LEAST_VARIANCE)) for each in null]
    near = np.flatnonzero(p[0] < DISCOVERY)
    columns = {name: np.full(len(p[0]), np.nan) for name in HALF_COLUMNS}
    n_classes = len(matched) // 4
    sides = [2 * n_classes + code, 3 * n_classes + code]
    choices = matched[sides][:, :, near]
    for side, half in enumerate(("picked", "held_out")):
        columns[f"{half}_q"] = p[side]
        found = _equal_token_ratio(bootstrap.halves[side], choices, weight[:, sides].T)
        for name, values in zip(("log2_ratio", "low", "high"), found, strict=True):
            columns[f"{half}_{name}"][near] = values
    return columns


def _replicated(table: pd.DataFrame) -> pd.DataFrame:
    """The table with p of the halves corrected, and replication judged, for the rows picked on the first."""
    table = table.assign(picked_q=stats.benjamini_hochberg(table["picked_q"].to_numpy()))
    picked = (table["picked_q"] < DISCOVERY).to_numpy()
    for name in HALF_COLUMNS:
        table[name] = table[name].where(picked)
    table["held_out_q"] = stats.benjamini_hochberg(table["held_out_q"].to_numpy())
    sign = np.sign(table["picked_log2_ratio"])
    beyond = np.where(sign > 0, table["held_out_low"] > 0, table["held_out_high"] < 0)
    return table.assign(replicated=(table["held_out_q"] < DISCOVERY).to_numpy() & beyond)


def _tokens(classified: Classified, code: int) -> Float64[np.ndarray, "2 F"]:
    """Tokens of each stratum inside a class and outside it."""
    inside = classified.codes == code
    sides = [np.bincount(classified.stratum, classified.n_tokens * side, classified.n_strata) for side in (inside, ~inside)]
    return np.array(sides)


def _raw_ratio(
    choices: Float64[np.ndarray, "A F E"], code: int, n_tokens: Float64[np.ndarray, "2 F"]
) -> Float64[np.ndarray, " E"]:
    """The same comparison without matching the words: families weigh the same on both sides, words do not."""
    weight = n_tokens[::-1] / np.maximum(n_tokens.sum(axis=0), 1)
    sides = (choices[code], choices.sum(axis=0) - choices[code])
    rates = [(w @ side + 0.5) / (w @ n + 0.5) for w, side, n in zip(weight, sides, n_tokens, strict=True)]
    return np.log2(rates[0] / rates[1])


def surest_picked(table: pd.DataFrame) -> pd.DataFrame:
    """Rows picked on the first half, in the order of `surest_first` by what that half says of them; the other has no say."""
    picked = table[table["picked_q"] < DISCOVERY]
    seen = picked.assign(q=picked["picked_q"], ci_low=picked["picked_low"], ci_high=picked["picked_high"])
    return picked.loc[surest_first(seen).index]


def held_out(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the effect, interval and q of the half they were not picked on."""
    names = {"log2_ratio": "log2_ratio", "low": "ci_low", "high": "ci_high", "q": "q"}
    return rows.assign(**{name: rows[f"held_out_{half}"] for half, name in names.items()})


LEAST_EFFECT = 0.585
"""Log2 ratio below which a preference is not worth having: one and a half times as often."""
_WORDS = {
    "label": ("preference for a label", "{} steps", "other steps at the same place"),
    "family": ("preference for a family", "{} problems", "other families"),
    "answer": ("preference for right or wrong solutions", "{} solutions", "right ones of the same family"),
}
"""How a finding speaks of each class column: what there may be, where, and beside what."""


def _finding(table: pd.DataFrame) -> Finding:
    kind = next(name for name in _WORDS if name in table.columns)
    what, place, others = _WORDS[kind]
    found, verdict = table[table["q"] < DISCOVERY], judge_cells(table, least=LEAST_EFFECT)
    tested = f"{len(found):,} of {table['p'].count():,} (layer, expert, {kind}) cells differ from chance (q below 0.05)"
    if found.empty:
        nothing = f"{tested}: this run shows no {what} beyond its tokens that survives the correction."
        return Finding(sentence=nothing, verdict=verdict, rung=0)
    picked = surest_picked(table)
    row = (surest_first(found) if picked.empty else held_out(picked)).iloc[0]
    if picked.empty:
        told = "the surest, picked and measured on the same problems,"
    else:
        again = f"{int(picked['replicated'].sum()):,} of {len(picked):,} picked on one half of the problems hold on the other"
        told = f"{again}; the surest there, measured where it was not picked,"
    return Finding(
        sentence=(
            f"{tested}; {told} is layer {row['layer']}, expert {row['expert']}, chosen {fold(row['log2_ratio'])} times as "
            f"often in {place.format(row[kind])} as the same tokens choose it in {others} (95 % interval {fold_interval(row)})."
        ),
        verdict=verdict,
        rung=4 if len(picked) and row["replicated"] else 3,
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
    claim="Some expert prefers a kind of step beyond its words and place.",
    method=(
        "Choices over what the same tokens choose in other steps of the family in the same third of the solution, log2. Null: "
        "labels shuffled over whole steps inside each problem; p corrected over all layers, experts and labels "
        "(Benjamini-Hochberg); intervals from a bootstrap over sequences. Picked on a random half of the problems, measured on "
        "the other."
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
        "p corrected over all layers, experts and families (Benjamini-Hochberg); intervals from a bootstrap over sequences. "
        "Picked on a random half of the problems, measured on the other."
    ),
    order=surest_first,
    finding=_finding,
)
CORRECTNESS_SPECIALISATION = Analysis(
    function=correctness_specialisation,
    question="Which experts do wrong solutions choose, and which right ones?",
    claim="Some expert is chosen more or less often in wrong solutions, beyond their words.",
    method=(
        "Choices in wrong solutions over what the same tokens choose in right ones of the same family, log2. Null: answers "
        "shuffled over whole sequences inside each family; p corrected over all layers and experts (Benjamini-Hochberg); "
        "intervals from a bootstrap over sequences. Picked on a random half of the problems, measured on the other."
    ),
    order=surest_first,
    finding=_finding,
)
