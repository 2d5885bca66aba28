"""How much routing changes from token to token, and whether it changes more across the boundary of two reasoning steps.

A boundary is no ordinary place: it is where a line ends and words begin that seldom stand elsewhere, so routing changes there
in any case. Fair is the same pair of token ids, as many tokens apart (1 to 4), once with a boundary between and once inside a
step: each such pair of ids counts on both sides with the weight n_a n_i / (n_a + n_i) of its n_a pairs across and n_i inside. A
pair of ids that occurs on one side only says nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Int64, Integer, UInt8

from ling_probe import metrics, stats
from ling_probe.analysis.counting import require_sequences, sum_by
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, in_order, percent
from ling_probe.run import Run, TokenBatch

LAGS = (1, 2, 3, 4)
"""Distances of the pairs that straddle a boundary, or do not."""
LEAST_EFFECT = 0.01
"""Share of the experts by which a boundary must change more to be worth having."""
LEAST_OVERLAP = 0.1
"""With less of the pairs to compare there is no effect and no test."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of tokens of one batch, both in steps, as many apart as a lag says."""

    first: Integer[np.ndarray, " P"]
    second: Integer[np.ndarray, " P"]
    """Places in the batch."""
    across: Bool[np.ndarray, " P"]
    """Whether a step ends between them."""
    key: Int64[np.ndarray, " P"]
    """Names both token ids and the lag."""


@dataclass(frozen=True, eq=False)
class EqualPairs:
    """The pairs of ids that occur across boundaries and inside steps, and the weight of one occurrence on either side."""

    keys: Int64[np.ndarray, " C"]
    """Ascending."""
    inside: Float64[np.ndarray, " C"]
    across: Float64[np.ndarray, " C"]
    overlap: float
    """Weight of what can be compared, 1 where both sides have the same pairs in the same proportions."""

    def weights(self, pairs: Pairs) -> Float64[np.ndarray, " P"]:
        """Weight of each pair; 0 where it says nothing."""
        if not len(self.keys):
            return np.zeros(len(pairs.key))
        place = np.minimum(np.searchsorted(self.keys, pairs.key), len(self.keys) - 1)
        weight = np.where(pairs.across, self.across[place], self.inside[place])
        return np.where(self.keys[place] == pairs.key, weight, 0.0)


def routing_churn(run: Run, *, draws: int = 1000, flips: int = 9999, seed: int = 0) -> pd.DataFrame:
    """Share of its experts that a token does not share with the one before it, by layer, and what a step boundary adds.

    One row a layer: `pairs` of neighbours and `sequences`; `churn`, with its 95 % bootstrap interval over sequences
    (`churn_low`, `churn_high`); `shuffled`, the same with the tokens of each sequence in random order, and `nearness` how much
    lower the true churn is (`near_low`, `near_high`). Where the run has steps, `inside` and `boundary` are the churn of
    neighbours inside a step and across two; `boundary_effect` is how much more of the experts changes across than inside, at
    equal pairs of token ids up to 4 tokens apart, with its interval (`ci_low`, `ci_high`), `p` from sign flips of whole
    sequences, `q` corrected over layers (Benjamini-Hochberg); `overlap` is the weight of the pairs that occur on both sides,
    and below a tenth there is no effect and no test.

    Args:
        run: Any run.
        draws: Bootstrap samples.
        flips: Sign flips.
        seed: Of samples, flips and the random order.
    """
    require_sequences(run)
    unit = stats.bundles(len(run.sequences), seed=seed)
    sums = _sums(run, unit, _equal_pairs(run), np.random.default_rng(seed))
    weights = np.concatenate([np.ones((1, len(sums.pairs))), stats.bootstrap_weights(len(sums.pairs), draws=draws, seed=seed)])
    churn, near = (weights @ each / (weights @ sums.pairs)[:, None] for each in (sums.churn, sums.shuffled - sums.churn))
    columns = {
        "layer": run.spec.routed_layers,
        "pairs": int(sums.pairs.sum()),
        "sequences": len(run.sequences),
        "churn": churn[0],
        **_bounds("churn", churn),
        "shuffled": churn[0] + near[0],
        "nearness": near[0],
        **_bounds("near", near),
        **_boundary_columns(sums, weights, flips, seed),
        "seed": seed,
    }
    return pd.DataFrame(columns)


@dataclass
class Sums:
    """Churn summed by bundle of sequences (U) and layer (M)."""

    overlap: float
    pairs: Float64[np.ndarray, " U"]
    churn: Float64[np.ndarray, "U M"]
    """Of neighbours."""
    shuffled: Float64[np.ndarray, "U M"]
    """Of neighbours in random order."""
    plain: Float64[np.ndarray, "2 M"]
    """Of neighbours inside steps, and across two."""
    n_plain: Float64[np.ndarray, " 2"]
    weighted: Float64[np.ndarray, "2 U M"]
    """Of equal pairs inside steps, and across two, weighted."""
    weight: Float64[np.ndarray, "2 U"]

    @classmethod
    def empty(cls, n_units: int, n_rows: int, overlap: float) -> "Sums":
        """Nothing summed yet."""
        by_layer = (n_units, n_rows)
        return cls(
            overlap, np.zeros(n_units), np.zeros(by_layer), np.zeros(by_layer), np.zeros((2, n_rows)), np.zeros(2),
            np.zeros((2, *by_layer)), np.zeros((2, n_units)),
        )  # fmt: skip


def _sums(run: Run, unit: Integer[np.ndarray, " S"], equal: EqualPairs, rng: np.random.Generator) -> Sums:
    sums = Sums.empty(int(unit.max()) + 1, run.spec.n_rows, equal.overlap)
    for batch in run.batches():
        owner, ids = unit[batch.sequence], batch.expert_ids
        _add_neighbours(sums, batch, owner, rng)
        for pairs in _pairs(batch, run.spec.vocab_size):
            weight = equal.weights(pairs)
            said = weight > 0
            churn = _changed(ids[pairs.first[said]], ids[pairs.second[said]]) * weight[said, None]
            for side in (0, 1):
                mine = pairs.across[said] == side
                owners = owner[pairs.first[said][mine]]
                sums.weighted[side] += sum_by(churn[mine], owners, len(sums.pairs))
                sums.weight[side] += np.bincount(owners, weights=weight[said][mine], minlength=len(sums.pairs))
    return sums


def _add_neighbours(sums: Sums, batch: TokenBatch, owner: Integer[np.ndarray, " N"], rng: np.random.Generator) -> None:
    ids, n_units = batch.expert_ids, len(sums.pairs)
    near = np.flatnonzero(batch.sequence[1:] == batch.sequence[:-1])
    churn = _changed(ids[near], ids[near + 1])
    order = np.lexsort((rng.random(len(ids)), batch.sequence))
    sums.pairs += np.bincount(owner[near], minlength=n_units)
    sums.churn += sum_by(churn, owner[near], n_units)
    sums.shuffled += sum_by(_changed(ids[order[near]], ids[order[near + 1]]), owner[near], n_units)
    step = batch.step
    in_steps = (step[near] >= 0) & (step[near + 1] >= 0)
    for side, mine in enumerate((step[near] == step[near + 1], step[near] != step[near + 1])):
        sums.plain[side] += churn[in_steps & mine].sum(axis=0)
        sums.n_plain[side] += (in_steps & mine).sum()


def _changed(one: Integer[np.ndarray, "N M K"], other: Integer[np.ndarray, "N M K"]) -> Float64[np.ndarray, "N M"]:
    """Share of the experts that changed."""
    common: UInt8[np.ndarray, "N M"] = metrics.overlap(one, other)
    return 1 - common / one.shape[-1]


def _pairs(batch: TokenBatch, vocab_size: int) -> Iterator[Pairs]:
    """The pairs of every lag."""
    for lag in LAGS:
        same = (batch.sequence[lag:] == batch.sequence[:-lag]) & (batch.step[lag:] >= 0) & (batch.step[:-lag] >= 0)
        first = np.flatnonzero(same)
        second = first + lag
        ids = batch.token_id.astype(np.int64)
        key = (ids[first] * vocab_size + ids[second]) * len(LAGS) + lag - 1
        yield Pairs(first, second, batch.step[first] != batch.step[second], key)


def _equal_pairs(run: Run) -> EqualPairs:
    """Memory holds the pairs of ids that stand across boundaries: as much as the table of steps."""
    across, n_inside = np.empty(0, np.int64), 0
    for batch in run.batches(layers=[]):
        pairs = list(_pairs(batch, run.spec.vocab_size))
        across = np.concatenate([across, *(each.key[each.across] for each in pairs)])
        n_inside += sum(int((~each.across).sum()) for each in pairs)
    keys, n_across = np.unique(across, return_counts=True)
    inside = np.zeros(len(keys))
    for batch in run.batches(layers=[]) if len(keys) else ():
        for each in _pairs(batch, run.spec.vocab_size):
            key = each.key[~each.across]
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            inside += np.bincount(place[keys[place] == key], minlength=len(keys))
    both = inside > 0
    n_a, n_i = n_across[both].astype(float), inside[both]
    weight = n_a * n_i / (n_a + n_i)
    most = len(across) * n_inside / max(len(across) + n_inside, 1)
    return EqualPairs(keys[both], weight / n_i, weight / n_a, float(weight.sum() / most) if most else 0.0)


def _boundary_columns(sums: Sums, weights: Float64[np.ndarray, "B U"], flips: int, seed: int) -> dict[str, object]:
    with np.errstate(invalid="ignore"):
        inside, boundary = sums.plain / sums.n_plain[:, None]
    plain = {"inside": inside, "boundary": boundary, "overlap": sums.overlap}
    names = ("boundary_effect", "ci_low", "ci_high", "p", "q")
    if sums.overlap < LEAST_OVERLAP:
        return plain | dict.fromkeys(names, np.nan)
    with np.errstate(invalid="ignore"):
        inside, across = (weights @ churn / (weights @ n)[:, None] for churn, n in zip(sums.weighted, sums.weight, strict=True))
    effect = across - inside
    low, high = np.nanquantile(effect[1:], [0.025, 0.975], axis=0)
    p = stats.permutation_p(stats.count_flipped(_differences(sums), draws=flips, seed=seed), flips)
    return plain | dict(zip(names, (effect[0], low, high, p, stats.benjamini_hochberg(p)), strict=True))


def _differences(sums: Sums) -> Float64[np.ndarray, "U M"]:
    """What each bundle adds to the boundary effect, net of its weight."""
    middle = sums.weighted.sum(axis=(0, 1)) / sums.weight.sum()
    inside, across = ((churn - n[:, None] * middle) / n.sum() for churn, n in zip(sums.weighted, sums.weight, strict=True))
    return across - inside


def _bounds(name: str, drawn: Float64[np.ndarray, "B M"]) -> dict[str, Float64[np.ndarray, " M"]]:
    low, high = stats.percentile_interval(drawn[1:])
    return {f"{name}_low": low, f"{name}_high": high}


def _finding(table: pd.DataFrame) -> Finding:
    low, high = (table.iloc[int(place(table["churn"]))] for place in (np.argmin, np.argmax))
    told = (
        f"From one token to the next {percent(low['churn'])} (layer {low['layer']:.0f}) to {percent(high['churn'])} (layer "
        f"{high['layer']:.0f}) of the experts change, in random order {percent(low['shuffled'])} and "
        f"{percent(high['shuffled'])}"
    )
    tested = table[table["p"].notna()]
    if tested.empty:
        nothing = (
            f"{told}. Whether more change where a step ends cannot be told: {percent(table['overlap'].iloc[0])} of the pairs "
            "of words stand both across a boundary and inside a step, as far apart."
        )
        return Finding(sentence=nothing, verdict=Verdict.CANNOT_TELL, rung=1)
    row = tested.iloc[int(np.argmax(tested["boundary_effect"]))]
    return Finding(
        sentence=(
            f"{told}. Across a step boundary {percent(row['boundary_effect'])} more change than inside a step in layer "
            f"{row['layer']:.0f}, the most (95 % interval {percent(row['ci_low'])} to {percent(row['ci_high'])}), at equal "
            f"words and distance, which {percent(row['overlap'])} of the pairs allow; of mere neighbours "
            f"{percent(row['boundary'] - row['inside'])} more."
        ),
        verdict=_verdict(tested),
        rung=3 if _verdict(tested) is Verdict.SUPPORTED else 1,
        effect=float(row["boundary_effect"]),
        unit="share of the experts",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(row["boundary"] - row["inside"] - row["boundary_effect"]),
    )


def _verdict(tested: pd.DataFrame) -> Verdict:
    if ((tested["q"] < DISCOVERY) & (tested["ci_low"] > 0)).any():
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if (tested["ci_high"] < LEAST_EFFECT).all() else Verdict.CANNOT_TELL


ROUTING_CHURN = Analysis(
    function=routing_churn,
    question="How much does routing change from token to token, and more so where a reasoning step ends?",
    claim="In some layer more experts change across a step boundary than inside a step, at equal words and distance.",
    method=(
        "1 - |A and A'| / K of the experts of neighbours, beside the same tokens in random order. Boundary: pairs of tokens up "
        "to 4 apart, across a boundary against inside a step, weighted to the same pairs of token ids. Null: signs of whole "
        "sequences flipped; p corrected over layers (Benjamini-Hochberg); intervals from a bootstrap over sequences."
    ),
    order=in_order,
    finding=_finding,
)
