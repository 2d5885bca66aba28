"""How much likelier a token of one class of text is to choose an expert than a token of another (SteerMoE, arXiv 2509.09660).

Words included: what this ranks highly may be nothing but the words of a class. It stands here because steering experts are
picked by it, and to show what becomes of it once sequences, not tokens, are the units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64, Integer
from scipy import stats as scipy_stats

from ling_probe import stats
from ling_probe.analysis.classified import COMPLETION, RIGHT, WRONG, families
from ling_probe.analysis.counting import segment_mask, sum_by
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, judge_cells, percent, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run

MOST_FAMILIES = 4
"""Families compared with each other, unless they are named: those with the most sequences."""
LEAST_VARIANCE = 1e-9
"""Variance of a sum of choices that only rounding makes."""


def risk_difference(run: Run, *, of: Sequence[str] | None = None, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of tokens that choose an expert in one class of text minus the share in another, words included.

    One row a layer, expert and pair `a`, `b`: every two families, and wrong against right solutions (compared inside each
    family, and averaged with the weight n·m/(n+m) of its n wrong and m right tokens). Completion tokens count. `share_a`,
    `share_b`, their `risk_difference` and its 95 % bootstrap interval over sequences (`ci_low`, `ci_high`); `p` from the exact
    moments of all shuffles of the classes over whole sequences, corrected in `q` over the whole table. `token_p` and `token_q`
    are what a test says that takes every token for independent: it finds too much wherever tokens of a sequence route alike.
    `even_share` is K/E.

    Args:
        run: A run with two families, or with right and wrong answers in one.
        of: Families to compare; the four with the most sequences if left out.
        draws: Bootstrap samples of the interval.
        seed: Of bundles and samples.

    Raises:
        UsageError: There is nothing to compare, a family does not exist, or there are no completions.
    """
    cells = _Cells.of(run, of)
    pairs = cells.pairs()
    unit = stats.bundles(len(run.sequences), seed=seed)
    units = np.bincount(unit).size
    found = _sums(run, cells, unit, units)
    weights = np.ones((draws + 1, units), np.float32)
    weights[1:] = stats.bootstrap_weights(units, draws=draws, seed=seed)
    tokens = (weights @ found.unit_tokens).astype(float)
    tables = []
    for layer, sums in found.layers.items():
        drawn = (weights @ sums.by_unit.reshape(units, -1)).reshape(len(weights), len(cells.family), -1)
        tables += [_pair_table(pair, sums, found, drawn, tokens).assign(layer=layer) for pair in pairs]
    table = pd.concat(tables, ignore_index=True).assign(even_share=run.spec.top_k / run.spec.n_experts, seed=seed)
    for p, q in (("p", "q"), ("token_p", "token_q")):
        table[q] = stats.benjamini_hochberg(table[p].to_numpy())
    return table[["layer", *table.columns.drop("layer")]]


@dataclass(frozen=True)
class _Pair:
    """Two classes of text as cells of a family and an answer; b is compared with a inside each stratum."""

    a: str
    b: str
    strata: list[tuple[list[int], list[int]]]
    """Cells of a and of b, stratum by stratum."""


@dataclass(frozen=True)
class _Cells:
    """Sequences by family and answer."""

    names: list[str]
    """Families compared."""
    family: Integer[np.ndarray, " G"]
    """Of each cell; three cells a family: right, wrong, not judged."""
    cell: Integer[np.ndarray, " S"]
    """Of each sequence; -1 for families not compared."""

    @classmethod
    def of(cls, run: Run, named: Sequence[str] | None) -> "_Cells":
        every, family = families(run)
        if unknown := [name for name in named or () if name not in every]:
            raise UsageError(f'no family "{unknown[0]}" in this run; these there are: {", ".join(every)}')
        most = np.argsort(-np.bincount(family), kind="stable")[:MOST_FAMILIES]
        names = [str(name) for name in (sorted(named) if named else every[np.sort(most)])]
        place = np.array([names.index(name) if name in names else -1 for name in every])[family]
        correct = run.sequences["correct"]
        answer = np.where(correct.isna(), 2, ~correct.fillna(value=False).to_numpy(dtype=bool))
        return cls(names, np.repeat(np.arange(len(names)), 3), np.where(place >= 0, place * 3 + answer, -1))

    def pairs(self) -> list[_Pair]:
        """What there is to compare.

        Raises:
            UsageError: Nothing.
        """
        held = np.bincount(self.cell[self.cell >= 0], minlength=len(self.family)) > 0
        places = {name: [3 * place + answer for answer in range(3)] for place, name in enumerate(self.names)}
        pairs = [_Pair(a, b, [(places[a], places[b])]) for a, b in combinations(self.names, 2)]
        if both := [([wrong], [right]) for right, wrong, _ in places.values() if held[right] and held[wrong]]:
            pairs.append(_Pair(WRONG, RIGHT, both))
        if not pairs:
            raise UsageError(f"one family only ({self.names[0] or 'unnamed'}), without both right and wrong answers to compare")
        return pairs


@dataclass
class _LayerSums:
    """Sums over the sequences of each cell: n choices of an expert among so many tokens."""

    by_unit: Float32[np.ndarray, "U G E"]
    """Choices by unit."""
    mixed: dict[tuple[int, int], Float64[np.ndarray, "G E"]] = field(default_factory=dict)
    """Sums of n to the power i times tokens to the power j, by (i, j) up to the third order."""


@dataclass(frozen=True)
class _Sums:
    layers: dict[int, _LayerSums]
    unit_tokens: Float32[np.ndarray, "U G"]
    tokens: Float64[np.ndarray, "4 G"]
    """Sums of tokens of a sequence to the powers 0 to 3."""


def _sums(run: Run, cells: _Cells, unit: Integer[np.ndarray, " S"], units: int) -> _Sums:
    n_cells, n_experts = len(cells.family), run.spec.n_experts
    layers = {layer: _LayerSums(np.zeros((units, n_cells, n_experts), np.float32)) for layer in run.spec.routed_layers}
    unit_tokens, tokens = np.zeros((units * n_cells, 1)), np.zeros((4, n_cells))
    for batch in run.batches():
        kept = segment_mask(batch, COMPLETION) & (cells.cell[batch.sequence] >= 0)
        sequences, place = np.unique(batch.sequence[kept], return_inverse=True)
        cell = cells.cell[sequences]
        home = unit[sequences] * n_cells + cell
        length = np.bincount(place, minlength=len(sequences)).astype(float)[:, None]
        unit_tokens += sum_by(length, home, len(unit_tokens))
        tokens += np.stack([sum_by(length**power, cell, n_cells)[:, 0] for power in range(4)])
        row = np.repeat(place * n_experts, run.spec.top_k)
        for number, sums in enumerate(layers.values()):
            chosen = np.bincount(row + batch.expert_ids[kept, number].ravel(), minlength=len(sequences) * n_experts)
            counts = chosen.reshape(-1, n_experts).astype(np.float64)
            # A unit and cell may hold several sequences of a part.
            np.add.at(sums.by_unit.reshape(-1, n_experts), home, counts.astype(np.float32))
            _add_mixed(sums.mixed, counts, length, cell, n_cells)
    if not tokens[1].any():
        raise UsageError("no completions in this run, prompts alone")
    return _Sums(layers, unit_tokens.reshape(units, n_cells).astype(np.float32), tokens)


def _add_mixed(
    mixed: dict[tuple[int, int], Float64[np.ndarray, "G E"]],
    counts: Float64[np.ndarray, "s E"],
    length: Float64[np.ndarray, "s 1"],
    cell: Integer[np.ndarray, " s"],
    n_cells: int,
) -> None:
    member = (cell == np.arange(n_cells)[:, None]).astype(float)
    power = counts
    for i in (1, 2, 3):
        weight = np.concatenate([member * length[:, 0] ** j for j in range(4 - i)])
        for j, added in enumerate((weight @ power).reshape(4 - i, n_cells, -1)):
            mixed[i, j] = mixed.get((i, j), 0.0) + added
        power = power * counts


def _pair_table(
    pair: _Pair,
    sums: _LayerSums,
    found: _Sums,
    drawn: Float32[np.ndarray, "B G E"],
    tokens: Float64[np.ndarray, "B G"],
) -> pd.DataFrame:
    share_a, share_b = _shares(pair, drawn, tokens)
    low, high = stats.percentile_interval(share_a[1:] - share_b[1:])
    null, token_variance = _null(pair, sums, found)
    spread = np.sqrt(np.where(token_variance > 0, token_variance, np.nan))
    return pd.DataFrame(
        {
            "expert": np.arange(drawn.shape[2]),
            "a": pair.a,
            "b": pair.b,
            "share_a": share_a[0],
            "share_b": share_b[0],
            "risk_difference": share_a[0] - share_b[0],
            "ci_low": low,
            "ci_high": high,
            "token_p": 2 * scipy_stats.norm.sf(np.abs(null.deviation[0]) / spread),
            "p": null.p(least=LEAST_VARIANCE)[0],
        }
    )


def _shares(
    pair: _Pair, choices: Float32[np.ndarray, "B G E"], tokens: Float64[np.ndarray, "B G"]
) -> tuple[Float64[np.ndarray, "B E"], Float64[np.ndarray, "B E"]]:
    """Share of the tokens of a and of b that choose each expert, strata weighted alike on both sides."""
    total, shares = np.zeros((len(tokens), 1)), np.zeros((2, len(tokens), choices.shape[2]))
    for sides in pair.strata:
        n_a, n_b = (tokens[:, cells].sum(axis=1, keepdims=True) for cells in sides)
        weight = n_a * n_b / np.maximum(n_a + n_b, 1)
        total += weight
        for side, cells, n in zip(shares, sides, (n_a, n_b), strict=True):
            side += weight * choices[:, cells].sum(axis=1) / np.maximum(n, 1)
    return shares[0] / np.maximum(total, 1e-9), shares[1] / np.maximum(total, 1e-9)


def _null(pair: _Pair, sums: _LayerSums, found: _Sums) -> tuple[stats.NullMoments, Float64[np.ndarray, " E"]]:
    """Moments of the choices of a beyond what the tokens of a and b choose together, and its variance if tokens were free.

    That sum is the risk difference times n·m/(n+m), n and m the tokens of a and b.
    """
    powers, inside, counts, variances = [], [], [], []
    for a, b in pair.strata:
        tokens = [found.tokens[:, cells].sum(axis=1) for cells in (a, b)]
        share = sums.mixed[1, 0][a + b].sum(axis=0) / max(tokens[0][1] + tokens[1][1], 1)
        beyond = [_central(sums, found, cells, share) for cells in (a, b)]
        powers.append(beyond[0] + beyond[1])
        inside.append(np.stack([beyond[0][0], beyond[1][0]]))
        counts.append([tokens[0][0], tokens[1][0]])
        variances.append(tokens[0][1] * tokens[1][1] / max(tokens[0][1] + tokens[1][1], 1) * share * (1 - share))
    shuffle = stats.ShuffleSums(np.sum(inside, axis=0), np.stack(powers, axis=1), np.array(counts).T)
    return shuffle.moments(), np.sum(variances, axis=0)


def _central(sums: _LayerSums, found: _Sums, cells: list[int], share: Float64[np.ndarray, " E"]) -> Float64[np.ndarray, "3 E"]:
    """Sums of (n - share·tokens) to the powers 1 to 3 over the sequences of some cells."""

    def total(i: int, j: int) -> Float64[np.ndarray, "*any"]:
        return sums.mixed[i, j][cells].sum(axis=0) if i else np.asarray(found.tokens[j, cells].sum())

    first = total(1, 0) - share * total(0, 1)
    second = total(2, 0) - 2 * share * total(1, 1) + share**2 * total(0, 2)
    third = total(3, 0) - 3 * share * total(2, 1) + 3 * share**2 * total(1, 2) - share**3 * total(0, 3)
    return np.stack([first, second, third])


def _finding(table: pd.DataFrame) -> Finding:
    found, naive = table[table["q"] < DISCOVERY], int((table["token_q"] < DISCOVERY).sum())
    told = (
        f"{len(found):,} of {table['p'].count():,} (layer, expert, pair) cells differ with sequences as units (q below 0.05); "
        f"a test that takes tokens for independent would report {naive:,}"
    )
    verdict = judge_cells(table, least=float(table["even_share"].iloc[0]) / 2)
    if found.empty:
        return Finding(sentence=f"{told}.", verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    interval = f"{100 * row['ci_low']:.2f} to {100 * row['ci_high']:.2f}"
    return Finding(
        sentence=(
            f"{told}. The surest is layer {row['layer']}, expert {row['expert']}: {percent(row['share_a'])} of the tokens of "
            f"{row['a']} choose it and {percent(row['share_b'])} of {row['b']}, {100 * row['risk_difference']:.2f} points "
            f"apart (95 % interval {interval}), words included."
        ),
        verdict=verdict,
        rung=1,
        effect=float(row["risk_difference"]),
        unit="share of tokens",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


RISK_DIFFERENCE = Analysis(
    function=risk_difference,
    question="Which experts would be picked for steering by how often two classes of text choose them?",
    claim="Some expert is chosen by another share of tokens in one class of text than in another, words included.",
    method=(
        "Share of tokens choosing the expert in a minus in b, for every two families and for wrong against right solutions. "
        "Null: classes shuffled over whole sequences, answers inside their family; p corrected over all rows "
        "(Benjamini-Hochberg); intervals from a bootstrap over sequences. Beside it the p of a test over tokens."
    ),
    order=surest_first,
    finding=_finding,
)
