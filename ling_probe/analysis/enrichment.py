"""Which tokens and kinds of step each expert is chosen for, by pointwise mutual information on held-out sequences.

PMI = log2 p(x, e) / (p(x) p(e)): how often tokens of a kind choose an expert, over how often all do. The best of thousands of
ids is far above 0 on noise alone, so for each layer and expert:

1. rank ids (labels) by PMI on one half of the sequences and take the first few;
2. measure those on the other half;
3. show beside it the best that ids dealt at random reach on the half that chose.

A label's PMI is raw: its words are part of it (see `label_specialisation` and `routing_information`).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer, Real

from ling_probe import stats
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, judge_cells, surest_first
from ling_probe.analysis.sample import (
    LEAST_UNITS,
    TokenSample,
    frequent,
    label_codes,
    numbered,
    said,
    sample_tokens,
    two_halves,
)
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_EFFECT = 1.0
"""Bits of PMI worth having: twice as often."""
LEAST_EXPECTED = 10.0
"""A pair expected less often on the held-out half is too rare to test."""


def enrichment(
    run: Run, *, top: int = 5, least: int = 20, most: int = 150_000, blocks: int = 20, seed: int = 0
) -> pd.DataFrame:
    """The token ids and step labels that each expert is chosen for, found on one half of the sequences, measured on the other.

    One row a layer, expert and `kind` ("token", "label") and `name`, `top` of each kind. On the held-out half: `count` tokens
    of the name that chose the expert and `expected` from its load; `pmi` in bits, half a token added to both; `ci_low` and
    `ci_high` its 95 % interval and `p`, from a jackknife over blocks of sequences; `q` corrected over the tested rows of its
    kind (Benjamini-Hochberg); `npmi` PMI over its greatest value, -log2 p(x, e), at most 1. Pairs expected fewer than 10 times,
    and those of fewer than 10 held-out sequences, have no interval and no p. `pmi_found` on the half that chose is too high;
    `best_of_noise` is what the expert's best would read there if names were dealt at random (mean over experts).

    Args:
        run: Any run.
        top: Names of each kind for each expert.
        least: Tokens a name needs in each half.
        most: Tokens of whole sequences to draw from a longer run.
        blocks: Blocks of sequences for the jackknife.
        seed: Of halves, noise and the sequences drawn.

    Raises:
        UsageError: No name is frequent enough.
    """
    sample = sample_tokens(run, most=most, seed=seed)
    first, rng, tables = two_halves(sample.sequence, seed=seed), np.random.default_rng(seed), []
    for kind, ids in (("token", sample.token_id), ("label", label_codes(run, sample))):
        group = frequent(ids, first, least)
        if (group < 0).all():
            continue
        names = _first_of_each(ids, group)
        for place, layer in enumerate(sample.layers):
            table = _enriched(sample, place, group, first, top, blocks, rng)
            code = names[table.pop("group")]
            tables.append(table.assign(layer=layer, kind=kind, code=code))
    if not tables:
        raise UsageError(
            f"no token id is seen {least} times in each half of this run; capture more, or ask for fewer with `least`"
        )
    table = _named(run, pd.concat(tables, ignore_index=True))
    # Each kind by itself: thousands of ids that are found would let chance labels pass.
    table["q"] = table.groupby("kind")["p"].transform(lambda p: stats.benjamini_hochberg(p.to_numpy()))
    front = ["layer", "expert", "kind", "name"]
    table = table[[*front, *(column for column in table.columns if column not in front)]]
    return table.assign(tokens=sample.n_tokens, sequences=sample.n_sequences, seed=seed)


def _first_of_each(ids: Integer[np.ndarray, " N"], group: Integer[np.ndarray, " N"]) -> Integer[np.ndarray, " G"]:
    kept = group >= 0
    return ids[kept][np.unique(group[kept], return_index=True)[1]]


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Experts and names to be measured."""

    expert: Integer[np.ndarray, " P"]
    group: Integer[np.ndarray, " P"]


def _enriched(
    sample: TokenSample,
    place: int,
    group: Integer[np.ndarray, " N"],
    first: Bool[np.ndarray, " N"],
    top: int,
    blocks: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    found = _pmi(sample, place, group, first)
    best = np.argsort(-found, axis=0, kind="stable")[:top]
    pairs = _Pairs(np.tile(np.arange(found.shape[1]), len(best)), best.ravel())
    dealt = group.copy()
    rows = np.flatnonzero(first & (group >= 0))
    dealt[rows] = rng.permutation(group[rows])
    noise = float(_pmi(sample, place, dealt, first).max(axis=0).mean())
    columns = _held_out(sample, place, group, ~first, pairs, blocks)
    told = {"expert": pairs.expert, "group": pairs.group, **columns, "pmi_found": found[pairs.group, pairs.expert]}
    return pd.DataFrame({**told, "best_of_noise": noise})


def _pmi(
    sample: TokenSample, place: int, group: Integer[np.ndarray, " N"], half: Bool[np.ndarray, " N"]
) -> Float64[np.ndarray, "G E"]:
    counts = sample.counts(place, group, int(group.max()) + 1, half)
    tokens = np.bincount(group[half & (group >= 0)], minlength=len(counts))
    load = sample.counts(place, np.zeros(sample.n_tokens, dtype=np.int64), 1, half)[0] / half.sum()
    return stats.log2_ratio(counts, tokens[:, None] * load)


def _held_out(
    sample: TokenSample, place: int, group: Integer[np.ndarray, " N"], half: Bool[np.ndarray, " N"], pairs: _Pairs, blocks: int
) -> dict[str, Real[np.ndarray, " P"]]:
    """Counts of the pairs on a half, and what a jackknife over its blocks makes of them."""
    unit = numbered(np.where(half, sample.sequence, -1)) - 1
    block = np.where(half, stats.sequence_blocks(int(unit.max()) + 1, blocks=blocks)[unit], -1)
    rows, n_blocks, n_groups = np.flatnonzero(half), int(block.max()) + 1, int(group.max()) + 1
    chosen = np.stack([_pair_counts(sample, place, group, rows[block[rows] == each], pairs) for each in range(n_blocks)])
    load = sample.counts(place, np.where(half, block, -1), n_blocks)[:, pairs.expert]
    kept = half & (group >= 0)
    of_name = np.bincount(block[kept] * n_groups + group[kept], minlength=n_blocks * n_groups).reshape(n_blocks, -1)[
        :, pairs.group
    ]
    totals = np.stack(
        [chosen, load, of_name, np.broadcast_to(np.bincount(block[half], minlength=n_blocks)[:, None], chosen.shape)]
    )
    whole, without = totals.sum(axis=1), totals.sum(axis=1)[:, None] - totals
    count, expected = _seen_and_expected(whole)
    pmi = stats.log2_ratio(count, expected)
    low, high, _ = stats.jackknife_interval(pmi, stats.log2_ratio(*_seen_and_expected(without)))
    _, _, p = stats.jackknife_interval(_excess(whole), _excess(without))
    tested = (expected >= LEAST_EXPECTED) & (n_blocks >= LEAST_UNITS)
    joint = np.maximum(count, 0.5) / (half.sum() * sample.expert_ids.shape[2])
    untested = {"ci_low": low, "ci_high": high, "p": p}
    return {
        "count": count.astype(np.int64),
        "expected": expected,
        "pmi": pmi,
        **{name: np.where(tested, values, np.nan) for name, values in untested.items()},
        "npmi": pmi / -np.log2(joint),
    }


def _seen_and_expected(
    totals: Float64[np.ndarray, "4 *B P"],
) -> tuple[Float64[np.ndarray, "*B P"], Float64[np.ndarray, "*B P"]]:
    chosen, load, of_name, tokens = totals
    return chosen, of_name * load / np.maximum(tokens, 1)


def _excess(totals: Float64[np.ndarray, "4 *B P"]) -> Float64[np.ndarray, "*B P"]:
    """Choices beyond the expected, as a share of all tokens: a total shrinks with each block left out."""
    return np.subtract(*_seen_and_expected(totals)) / np.maximum(totals[3], 1)


def _pair_counts(
    sample: TokenSample, place: int, group: Integer[np.ndarray, " N"], rows: Integer[np.ndarray, " R"], pairs: _Pairs
) -> Float64[np.ndarray, " P"]:
    mine = np.full(sample.n_tokens, -1)
    mine[rows] = group[rows]
    return sample.counts(place, mine, int(group.max()) + 1)[pairs.group, pairs.expert]


def _named(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """The table with names in the place of codes."""
    labels = np.unique(run.steps["label"].to_numpy(dtype=str))
    words = token_texts(run, table.loc[table["kind"] == "token", "code"].unique())
    names = [
        labels[code] if kind == "label" else words[code] for kind, code in zip(table["kind"], table.pop("code"), strict=True)
    ]
    return table.assign(name=names)


def token_texts(run: Run, ids: np.ndarray) -> dict[int, str]:
    """Text of token ids, as it first stands in the run."""
    words: dict[int, str] = {}
    for batch in run.batches(layers=[], columns=["token"]):
        seen, rows = np.unique(batch.token_id, return_index=True)
        words = dict(zip(seen.tolist(), batch.extra["token"][rows], strict=True)) | words
        if np.isin(ids, list(words)).all():
            break
    return words


def _finding(table: pd.DataFrame) -> Finding:
    tokens, labels = (table[table["kind"] == kind] for kind in ("token", "label"))
    found = tokens[tokens["q"] < DISCOVERY]
    tested = (
        f"{len(found):,} of {tokens['p'].count():,} (expert, token) pairs found on one half of the sequences hold on the other "
        "(q below 0.05)"
    )
    verdict = judge_cells(tokens, least=LEAST_EFFECT)
    noise = f"the best of as many ids dealt at random reads {fold(table['best_of_noise'].max())} times where it is chosen"
    if found.empty:
        return Finding(sentence=f"{tested}; {noise} ({said(table)}).", verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    kinds = labels[labels["q"] < DISCOVERY]
    step = "" if kinds.empty else f"; of step labels, words included, {_pair(surest_first(kinds).iloc[0])}"
    return Finding(
        sentence=f"{tested}; the surest is {_pair(row)}{step}; {noise} ({said(table)}).",
        verdict=verdict,
        rung=4 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["pmi"]),
        unit="bits of PMI",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(row["pmi"]),
    )


def _pair(row: pd.Series) -> str:
    return (
        f"layer {row['layer']}, expert {row['expert']} for {row['name']!r}, {fold(row['pmi'])} times as often as for all "
        f"tokens (95 % interval {fold_interval(row)})"
    )


ENRICHMENT = Analysis(
    function=enrichment,
    question="Which tokens is each expert chosen for?",
    claim="Some expert is chosen for a token id far more than for others, on held-out problems.",
    method=(
        "Pointwise mutual information of token id (step label) and expert, names ranked on one half of the sequences and "
        "measured on the other; p from a jackknife over blocks of sequences, corrected over all tokens, or all labels "
        "(Benjamini-Hochberg). Null beside it: the best of as many ids dealt at random."
    ),
    order=surest_first,
    finding=_finding,
)
