"""How much of what a routed layer adds comes from its shared expert, and whether that depends on the reasoning step.

The share is |shared| / (|shared| + |routed|). A run keeps the norm of every chosen expert's contribution, not that of their
sum, so |routed| is known between bounds: at most their sum (all in one direction), at least the largest less the others.
`share` takes them as orthogonal, the root of the sum of squares; `least` and `most` are what the bounds allow. Nothing is
known of the angle between shared and routed: a share of norms is no share of an effect.

Whether labels (families) differ is asked at equal tokens:

1. a token's residual is its share less the mean share of its token id in the same family (over all families);
2. it is summed over whole steps (sequences) and, for labels, what the problem as a whole does is taken out;
3. labels are shuffled over whole steps inside each problem (families over sequences);
4. the effect weights both sides of a comparison to the same words in the same proportions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.classified import Classified, classified_families, classified_steps
from ling_probe.analysis.contributions import bundled, require_extra
from ling_probe.analysis.counting import sum_by
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, judge_cells, percent, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

LEAST_EFFECT = 0.02
"""Difference in share below which labels do not differ to speak of."""


def shared_share(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of the shared expert in what each routed layer adds: of all tokens, by step label, by family.

    One row a `kind` ("layer", "label", "family"), `name` (the label or family) and `layer`: `tokens`, mean `share` with its
    95 % bootstrap interval over bundles of sequences (`share_low`, `share_high`), the means that bounds on the routed sum allow
    (`least`, `most`). For labels and families, the `difference` from the others of the same family at equal tokens with its
    interval (`ci_low`, `ci_high`), two-sided `p` from the moments of whole-step permutation inside each problem (families over
    sequences; `stats.NullMoments`), and `q` over all rows. Rows of kind "layer" have no difference.

    Args:
        run: A run captured with --keep contribution, of a model with a shared expert.
        draws: Bootstrap samples.
        seed: Of bundles and samples.

    Raises:
        UsageError: Contributions or those of the shared expert were not kept.
    """
    require_extra(run, "shared", "contribution")
    bundle, n_bundles = bundled(run, seed)
    weights = np.concatenate([np.ones((1, n_bundles)), stats.bootstrap_weights(n_bundles, draws=draws, seed=seed)])
    tables = [_by_layer(run, bundle, weights)]
    found = [_classes(run, classify) for classify in (classified_steps, classified_families)]
    tables += [_by_class(run, each, bundle, weights) for each in found if each]
    table = pd.concat(tables, ignore_index=True)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy(dtype=float))
    return table.assign(seed=seed)


def _classes(run: Run, classify: Callable[[Run], Classified]) -> Classified | None:
    try:
        found = classify(run)
    except UsageError:
        return None
    return found if len(found.names) > 1 else None


class Shares(NamedTuple):
    """Share of the shared expert in each layer; of tokens N, or of sums over them."""

    share: Float64[np.ndarray, "N M"]
    least: Float64[np.ndarray, "N M"]
    most: Float64[np.ndarray, "N M"]


def shares(shared: Float32[np.ndarray, "N M"], contributions: Float32[np.ndarray, "N M K"]) -> Shares:
    """Shares with the routed contributions orthogonal, all in one direction, and as far against each other as they go."""
    added = contributions.sum(axis=-1, dtype=float)
    routed = np.sqrt((contributions.astype(float) ** 2).sum(axis=-1)), added, 2 * contributions.max(axis=-1) - added
    return Shares(*(shared / np.maximum(shared + np.maximum(each, 0), 1e-12) for each in routed))


def _batch_shares(batch: TokenBatch) -> Shares:
    return shares(batch.extra["shared"], batch.extra["contribution"])


def _by_layer(run: Run, bundle: Integer[np.ndarray, " S"], weights: Float64[np.ndarray, "B U"]) -> pd.DataFrame:
    n_bundles = weights.shape[1]
    tokens, sums = np.zeros(n_bundles), np.zeros((3, n_bundles, run.spec.n_rows))
    for batch in run.batches(columns=["shared", "contribution"]):
        owner = bundle[batch.sequence]
        tokens += np.bincount(owner, minlength=n_bundles)
        sums += np.stack([sum_by(each, owner, n_bundles) for each in _batch_shares(batch)])
    means = np.einsum("bu,sum->sbm", weights, sums) / np.maximum(weights @ tokens, 1)[:, None]
    low, high = stats.percentile_interval(means[0, 1:])
    return _rows(run, "layer", "", int(tokens.sum()), means[:, 0], low, high)


def _rows(
    run: Run, kind: str, name: str, tokens: int, means: Float64[np.ndarray, "3 M"], low: np.ndarray, high: np.ndarray
) -> pd.DataFrame:
    columns = {"kind": kind, "name": name, "layer": run.spec.routed_layers, "tokens": tokens, "share": means[0]}
    nothing = dict.fromkeys(("difference", "ci_low", "ci_high", "p"), np.nan)
    return pd.DataFrame({**columns, "share_low": low, "share_high": high, "least": means[1], "most": means[2], **nothing})


@dataclass
class _Words:
    """What a run holds of each word (token id, in its family for labels)."""

    classified: Classified
    vocab_size: int
    counts: Float64[np.ndarray, "A W"]
    """Tokens by class of meaning."""
    means: Float64[np.ndarray, "W M"]
    """Mean share."""

    @classmethod
    def of(cls, run: Run, classified: Classified) -> "_Words":
        n_words = (int(classified.stratum.max()) + 1) * run.spec.vocab_size
        words = cls(
            classified, run.spec.vocab_size, np.zeros((len(classified.names), n_words)), np.zeros((n_words, run.spec.n_rows))
        )
        for batch in run.batches(columns=["shared", "contribution"]):
            owner, word, kept = words.places(batch)
            np.add.at(words.counts, (classified.codes[owner], word), 1)
            here, place = np.unique(word, return_inverse=True)
            words.means[here] += sum_by(_batch_shares(batch).share[kept], place, len(here))
        words.means /= np.maximum(words.counts.sum(axis=0), 1)[:, None]
        return words

    def places(self, batch: TokenBatch) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"], np.ndarray]:
        """Owner and word of the tokens that count, and which do."""
        owner = self.classified.owner(batch)
        kept = owner >= 0
        return owner[kept], self.classified.stratum[owner[kept]] * self.vocab_size + batch.token_id[kept], kept

    def weights(self, code: Integer[np.ndarray, " n"], word: Integer[np.ndarray, " n"]) -> Float64[np.ndarray, "n A"]:
        """Weight of each token in the comparison of each class with the others: as many of every word on both sides."""
        part = self.counts[:, word].T / self.counts[:, word].sum(axis=0)[:, None]
        own = np.arange(len(code))
        part[own, code] = 1 - part[own, code]
        return part


def _by_class(
    run: Run, classified: Classified, bundle: Integer[np.ndarray, " S"], weights: Float64[np.ndarray, "B U"]
) -> pd.DataFrame:
    words, n_bundles, n_classes, n_rows = _Words.of(run, classified), weights.shape[1], len(classified.names), run.spec.n_rows
    residual, length = np.zeros((len(classified.codes), n_rows)), np.zeros(len(classified.codes))
    plain = np.zeros((n_classes, n_bundles, 1 + 3 * n_rows))
    equal = np.zeros((n_classes, 2, n_bundles, 1 + n_rows))
    for batch in run.batches(columns=["shared", "contribution"]):
        owner, word, kept = words.places(batch)
        found = [each[kept] for each in _batch_shares(batch)]
        code, home, one = classified.codes[owner], bundle[classified.sequence[owner]], np.ones((len(owner), 1))
        residual += sum_by(found[0] - words.means[word], owner, len(residual))
        length += np.bincount(owner, minlength=len(length))
        plain += sum_by(np.hstack([one, *found]), code * n_bundles + home, n_classes * n_bundles).reshape(plain.shape)
        weight, values = words.weights(code, word), np.hstack([one, found[0]])
        for each in range(n_classes):
            side = (code != each) * n_bundles + home
            equal[each] += _weighted_sums(values, weight[:, each], side, 2 * n_bundles).reshape(equal[each].shape)
    p = _p(classified, residual, length)
    return pd.concat(
        [_class_rows(run, classified, each, plain[each], equal[each], weights, p[each]) for each in range(n_classes)]
    )


def _weighted_sums(
    values: Float64[np.ndarray, "n C"], weight: Float64[np.ndarray, " n"], owner: Integer[np.ndarray, " n"], n_owners: int
) -> Float64[np.ndarray, "O C"]:
    return sparse.csr_array((weight, (owner, np.arange(len(owner)))), shape=(n_owners, len(owner))) @ values


def _class_rows(
    run: Run, classified: Classified, code: int, plain: Float64[np.ndarray, "U X"], equal: Float64[np.ndarray, "2 U Y"],
    weights: Float64[np.ndarray, "B U"], p: Float64[np.ndarray, " M"],
) -> pd.DataFrame:  # fmt: skip
    total = weights @ plain
    means = total[:, 1:] / np.maximum(total[:, :1], 1)
    by_kind = means[0].reshape(3, -1)
    low, high = stats.percentile_interval(means[1:, : run.spec.n_rows])
    inside, outside = (weights @ side for side in equal)
    difference = inside[:, 1:] / np.maximum(inside[:, :1], 1e-9) - outside[:, 1:] / np.maximum(outside[:, :1], 1e-9)
    bounds = stats.percentile_interval(difference[1:])
    comparable = equal[0, :, 0].sum() >= 1
    columns = dict(zip(("difference", "ci_low", "ci_high", "p"), (difference[0], *bounds, p), strict=True))
    rows = _rows(run, classified.kind, classified.names[code], int(plain[:, 0].sum()), by_kind, low, high)
    return rows.assign(**columns) if comparable else rows


def _p(
    classified: Classified, residual: Float64[np.ndarray, "O M"], length: Float64[np.ndarray, " O"]
) -> Float64[np.ndarray, "A M"]:
    """From the exact moments of a shuffle of labels over whole steps inside each problem, of families over sequences."""
    blocks = classified.sequence if classified.kind == "label" else np.zeros_like(classified.codes)
    n_blocks = int(blocks.max()) + 1
    per_token = sum_by(residual, blocks, n_blocks) / np.maximum(np.bincount(blocks, length, n_blocks), 1)[:, None]
    values = residual - per_token[blocks] * length[:, None]
    n_labels = len(classified.names)
    sums = stats.ShuffleSums.of(values, classified.codes, blocks=blocks, n_labels=n_labels, n_blocks=n_blocks)
    return sums.moments().p(least=1e-12)


def layers_then_surest(table: pd.DataFrame) -> pd.DataFrame:
    """The layers as a whole, then labels and families by how sure their difference is."""
    whole = table["kind"] == "layer"
    return pd.concat([table[whole], surest_first(table[~whole])])


def _finding(table: pd.DataFrame) -> Finding:
    layers, tested = table[table["kind"] == "layer"], table[table["kind"] != "layer"]
    least, most = layers.iloc[int(np.argmin(layers["share"]))], layers.iloc[int(np.argmax(layers["share"]))]
    whole = (
        f"The shared expert makes {percent(least['share'])} of what layer {least['layer']:.0f} adds (95 % interval "
        f"{percent(least['share_low'])} to {percent(least['share_high'])}) and {percent(most['share'])} of layer "
        f"{most['layer']:.0f}, routed contributions taken as orthogonal (bounds {percent(layers['least'].min())} to "
        f"{percent(layers['most'].max())})."
    )
    found = tested[tested["q"] < DISCOVERY]
    counted = f" {len(found)} of {tested['p'].count()} labels and families in a layer differ at equal tokens (q below 0.05)"
    verdict = judge_cells(tested, least=LEAST_EFFECT)
    if found.empty:
        return Finding(sentence=f"{whole}{counted}.", verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{whole}{counted}; the surest is {row['kind']} {row['name']} in layer {row['layer']}, "
            f"{100 * row['difference']:+.2f} points ({100 * row['ci_low']:+.2f} to {100 * row['ci_high']:+.2f})."
        ),
        verdict=verdict,
        rung=3,
        effect=float(row["difference"]),
        unit="difference in share",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


SHARED_SHARE = Analysis(
    function=shared_share,
    question="How much of what a layer adds comes from its shared expert, and does it depend on the step?",
    claim="The shared expert's share differs between kinds of step or families beyond their words.",
    method=(
        "|shared| / (|shared| + |routed|), routed contributions as orthogonal, with bounds. Difference at equal tokens; null: "
        "labels shuffled over whole steps inside each problem, families over sequences; corrected over all layers and classes."
    ),
    order=layers_then_surest,
    finding=_finding,
)
