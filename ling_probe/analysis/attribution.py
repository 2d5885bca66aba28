"""Which experts raise the logit of the token that follows, and which lower it, directly.

Direct logit attribution of a contribution is its product with the unembedding of the next token through the final norm as it
really was (`capture.writes`). It is the direct path alone: what later layers make of a contribution is not in it, and an expert
that "demotes" here may well help by another way; only silencing it tells. What raises all logits alike counts in it too, though
it changes no probability; the rank among the token's experts, and their differences, are free of most of that.

A contribution at position t speaks for the token at t + 1, so segments are those of the token that follows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy.stats import norm, rankdata

from ling_probe import stats
from ling_probe.analysis.contributions import bundled, require_extra, sums_by_bundle
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, judge_cells, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.trace import SEGMENTS

LEAST_EFFECT = 0.05
"""Logits below which an expert neither promotes nor demotes to speak of."""


def logit_attribution(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean direct attribution of every expert to the next token of completions, in logits, and of its answers alone.

    One row a layer and expert: `count` choices, `mean` attribution with its 95 % bootstrap interval over bundles of sequences
    (`ci_low`, `ci_high`), `p` for a mean of 0 (normal, from the same bootstrap), `q` over all experts, `rank` (mean place of
    its attribution among the token's K, 1 is the highest), `share` of the absolute attributions of its layer, `answer_count`,
    `answer_mean`, `answer_low`, `answer_high` the same where the next token is of the answer. The same for a layer: `routed`
    and `routed_low`, `routed_high`, the sum over a token's experts in its mean; `answer_routed`; `even_rank`, (K+1)/2.

    Args:
        run: A run captured with --keep lens.
        draws: Bootstrap samples.
        seed: Of the bundles and samples.

    Raises:
        UsageError: Attributions were not kept, or the run has no completions.
    """
    require_extra(run, "lens", "lens")
    bundle, n_bundles = bundled(run, seed)
    weights = np.concatenate([np.ones((1, n_bundles)), stats.bootstrap_weights(n_bundles, draws=draws, seed=seed)])
    tables = []
    for layer in run.spec.routed_layers:
        sums = _layer_sums(run, layer, bundle, n_bundles)
        tables.append(_layer_table(sums, weights).assign(layer=layer, even_rank=(run.spec.top_k + 1) / 2))
    table = pd.concat(tables, ignore_index=True)
    table = table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()), seed=seed)
    return table[["layer", *(name for name in table.columns if name != "layer")]]


class _Sums(NamedTuple):
    """Of one layer, by bundle and expert (`tokens` by bundle: of completions, and of answers)."""

    tokens: Float64[np.ndarray, "2 U"]
    choices: Float64[np.ndarray, "2 U E"]
    total: Float64[np.ndarray, "2 U E"]
    absolute: Float64[np.ndarray, "U E"]
    ranks: Float64[np.ndarray, "U E"]


def next_segments(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
    """Segment of the token that follows; -1 at the end of a sequence."""
    following = np.append(batch.segment[1:].astype(np.int64), -1)
    last = np.append(batch.sequence[1:] != batch.sequence[:-1], [True])
    return np.where(last, -1, following)


def _segments(run: Run, layer: int) -> Iterator[tuple[TokenBatch, Bool[np.ndarray, "2 N"]]]:
    completion = [SEGMENTS.index("reasoning"), SEGMENTS.index("answer")]
    for batch in run.batches(layers=[layer], columns=["lens"]):
        segment = next_segments(batch)
        yield batch, np.stack([np.isin(segment, completion), segment == completion[1]])


def _layer_sums(run: Run, layer: int, bundle: Integer[np.ndarray, " S"], n_bundles: int) -> _Sums:
    shape = (n_bundles, run.spec.n_experts)
    sums = _Sums(np.zeros((2, n_bundles)), np.zeros((2, *shape)), np.zeros((2, *shape)), np.zeros(shape), np.zeros(shape))
    for batch, counted in _segments(run, layer):
        for place, kept in enumerate(counted):
            owner, ids, lens = bundle[batch.sequence[kept]], batch.expert_ids[kept, 0], batch.extra["lens"][kept, 0]
            sums.tokens[place] += np.bincount(owner, minlength=n_bundles)
            sums.choices[place] += sums_by_bundle(owner, ids, np.ones_like(lens), shape)
            sums.total[place] += sums_by_bundle(owner, ids, lens, shape)
            if place == 0:
                sums.absolute[:] += sums_by_bundle(owner, ids, np.abs(lens), shape)
                sums.ranks[:] += sums_by_bundle(owner, ids, rankdata(-lens, axis=1), shape)
    if not sums.tokens[0].any():
        raise UsageError("no completions in this run, prompts alone")
    return sums


def _layer_table(sums: _Sums, weights: Float64[np.ndarray, "B U"]) -> pd.DataFrame:
    count, total = sums.choices.sum(axis=1), sums.absolute.sum(axis=0)
    mean, answer = (_ratio(weights @ sums.total[place], weights @ sums.choices[place]) for place in (0, 1))
    routed, answer_routed = (_ratio(weights @ sums.total[place].sum(axis=1), weights @ sums.tokens[place]) for place in (0, 1))
    (low, high), (answer_low, answer_high), (routed_low, routed_high) = (
        stats.percentile_interval(_unless_rare(each[1:])) for each in (mean, answer, routed)
    )
    spread = _unless_rare(mean[1:]).std(axis=0)
    return pd.DataFrame(
        {
            "expert": np.arange(count.shape[1]),
            "count": count[0].astype(np.int64),
            "mean": mean[0],
            "ci_low": low,
            "ci_high": high,
            "p": np.maximum(2 * norm.sf(np.abs(mean[0]) / np.where(spread > 0, spread, np.nan)), np.finfo(float).tiny),
            "rank": _ratio(sums.ranks.sum(axis=0), count[0]),
            "share": total / max(total.sum(), 1e-12),
            "answer_count": count[1].astype(np.int64),
            "answer_mean": answer[0],
            "answer_low": answer_low,
            "answer_high": answer_high,
            "routed": routed[0],
            "routed_low": routed_low,
            "routed_high": routed_high,
            "answer_routed": answer_routed[0],
        }
    )


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _unless_rare(samples: Float64[np.ndarray, "B *rest"]) -> Float64[np.ndarray, "B *rest"]:
    """The samples, without those of an expert so rare that some sample lacks it: it has no interval."""
    return np.where(np.isnan(samples).any(axis=0), np.nan, samples)


def _finding(table: pd.DataFrame) -> Finding:
    found = table[table["q"] < DISCOVERY]
    layers = table.drop_duplicates("layer")
    most = layers.iloc[int(np.argmax(layers["routed"]))]
    counted = (
        f"{int((found['mean'] > 0).sum())} of {table['p'].count():,} experts promote the next token directly and "
        f"{int((found['mean'] < 0).sum())} demote it (q below 0.05); layer {most['layer']:.0f} adds most, "
        f"{most['routed']:+.2f} logits a token (95 % interval {most['routed_low']:+.2f} to {most['routed_high']:+.2f})"
        + (f", {most['answer_routed']:+.2f} where the answer follows" if not np.isnan(most["answer_routed"]) else "")
    )
    verdict = judge_cells(table, least=LEAST_EFFECT)
    if found.empty:
        return Finding(sentence=f"{counted}.", verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{counted}; the surest is expert {row['expert']:.0f} of layer {row['layer']:.0f}, {row['mean']:+.2f} logits when "
            f"chosen ({row['ci_low']:+.2f} to {row['ci_high']:+.2f}). The direct path alone; only silencing shows an effect."
        ),
        verdict=verdict,
        rung=1,
        effect=float(row["mean"]),
        unit="logits",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


LOGIT_ATTRIBUTION = Analysis(
    function=logit_attribution,
    question="Which experts directly raise the logit of the token that follows, and which lower it?",
    claim="Some experts directly promote or demote the next token.",
    method=(
        "Direct logit attribution of each chosen expert's contribution, mean over the completion tokens that chose it, the "
        "answer apart; p and intervals from a bootstrap over bundles of sequences, corrected over all experts. The direct path "
        "alone, and of the logit itself, not of its distance from the others'."
    ),
    order=surest_first,
    finding=_finding,
)
