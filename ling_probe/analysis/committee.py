"""Whether the same few experts lead everywhere: a standing committee (CommitteeAudit, arXiv 2601.03425).

For each layer, phase (the prompt that is read, the completion that is written) and domain (a family of problems, or a kind of
step of the completion):

1. rank the experts by the routing weight that the domain's tokens gave them;
2. the first m are its committee, m the experts a token chooses;
3. compare the committees of domains, Jaccard index |A ∩ B| / |A ∪ B|, with two marks: what committees drawn at random share,
   and what the two halves of one domain's own sequences share.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import stats as distributions

from ling_probe import metrics, stats
from ling_probe.analysis.bundled import Cells
from ling_probe.analysis.classified import COMPLETION
from ling_probe.analysis.counting import segment_mask
from ling_probe.analysis.question import Analysis, Finding, judge_above, layer_means
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

PHASES = {"prompt": ("prompt",), "completion": COMPLETION}
STANDING = 0.8
"""Share of domains whose committee an expert must be in to stand in all."""
_BUNDLES = 40
_HALVINGS = 20


def committee(run: Run, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Experts that lead in some domain, how steadily they do in all, and how alike the domains' leaders are.

    One row a `phase` ("prompt" or "completion"), `kind` of domain ("family" or "label"), layer and expert that is in a
    committee at all: `presence`, the share of domains whose committee it is in, `standing` if that is 0.8 at least,
    `mean_rank` and `rank_variance` over domains (1 leads, absent counts as one past the last), `pareto` if no other expert of
    the layer has both lower, `weight` its mean share of the weight. Of the layer: `jaccard` of two domains' committees, the
    mean over all pairs, with its 95 % interval (`ci_low`, `ci_high`: a bootstrap over bundles of sequences), `chance` what
    random committees share, `halves` what those of two random halves of one domain's sequences share; `domains` compared.

    Args:
        run: A run with two families or two kinds of step.
        draws: Bootstrap samples.
        seed: Of samples and halves, and of how sequences are dealt to bundles.

    Raises:
        UsageError: The run has neither two families nor two kinds of step.
    """
    cells = Cells.of(run, most=_BUNDLES, seed=seed)
    domains = _domains(run, cells)
    if not domains:
        raise UsageError("one family and no two kinds of step in this run; comparing needs two")
    drawn = cells.bundles.weights(draws=draws, seed=seed)
    rng = np.random.default_rng(seed)
    tables = []
    for (phase, kind), totals in domains.items():
        halves = rng.random((_HALVINGS, len(drawn[0]))) < 0.5
        for row, layer in enumerate(run.spec.routed_layers):
            table = _layer_table(totals[:, :, row], drawn, halves, run.spec)
            tables.append(table.assign(phase=phase, kind=kind, layer=layer, domains=totals.shape[0]))
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    front = ["phase", "kind", "layer", "expert"]
    return table[[*front, *table.columns.drop(front)]]


def _domains(run: Run, cells: Cells) -> dict[tuple[str, str], Float64[np.ndarray, "D U M E"]]:
    """Weight of every expert by phase and kind of domain; those with tokens, where there are two at least."""
    n_labels, bundles = len(cells.labels), cells.bundles
    found = {}
    for phase, total in zip(PHASES, _weights(run, cells), strict=True):
        by_label = total.reshape(len(bundles.family), n_labels + 1, *total.shape[1:])
        whole = by_label.sum(axis=1)
        families = [whole * (bundles.family == code)[:, None, None] for code in range(len(bundles.families))]
        found[phase, "family"] = np.stack(families)
        found[phase, "label"] = by_label[:, :n_labels].swapaxes(0, 1)
    held = {key: value[value.any(axis=(1, 2, 3))] for key, value in found.items()}
    return {key: value for key, value in held.items() if len(value) > 1}


def _weights(run: Run, cells: Cells) -> Float64[np.ndarray, "phases cells M E"]:
    n_experts, n_rows = run.spec.n_experts, run.spec.n_rows
    totals = np.zeros((n_rows, len(PHASES) * cells.size * n_experts))
    for batch in run.batches(weights=True):
        assert batch.weights is not None
        for place, segments in enumerate(PHASES.values()):
            counted = np.flatnonzero(segment_mask(batch, segments))
            base = ((place * cells.size + cells.of_tokens(batch)[counted]) * n_experts)[:, None]
            for row in range(n_rows):
                places = (base + batch.expert_ids[counted, row]).ravel()
                each = batch.weights[counted, row].ravel()
                totals[row] += np.bincount(places, weights=each, minlength=totals.shape[1])
    return np.moveaxis(totals.reshape(n_rows, len(PHASES), cells.size, n_experts), 0, 2)


def _layer_table(
    totals: Float64[np.ndarray, "D U E"], drawn: Float64[np.ndarray, "B U"], halves: Bool[np.ndarray, "H U"], spec: ModelSpec
) -> pd.DataFrame:
    total, size = totals.sum(axis=1), spec.top_k
    rank = np.minimum(_ranks(total), size + 1)
    presence, mean, variance = (rank <= size).mean(axis=0), rank.mean(axis=0), rank.var(axis=0)
    low, high = stats.percentile_interval(_between(_lead(_resampled(drawn, totals), size)))
    one, other = (_lead(_resampled(half.astype(float), totals), size) for half in (halves, ~halves))
    table = pd.DataFrame(
        {
            "expert": np.arange(spec.n_experts),
            "presence": presence,
            "standing": presence >= STANDING,
            "mean_rank": mean,
            "rank_variance": variance,
            "pareto": _pareto(mean, variance),
            "weight": metrics.load_share(total).mean(axis=0),
            "jaccard": float(_between(_lead(total, size))),
            "ci_low": float(low),
            "ci_high": float(high),
            "chance": random_jaccard(spec.n_experts, size),
            "halves": float(_jaccard(one, other).mean()),
        }
    )
    return table[table["presence"] > 0]


def _resampled(weights: Float64[np.ndarray, "B U"], totals: Float64[np.ndarray, "D U E"]) -> Float64[np.ndarray, "B D E"]:
    return np.tensordot(weights, totals, axes=(1, 1))


def _ranks(total: Float64[np.ndarray, "*rows E"]) -> Integer[np.ndarray, "*rows E"]:
    """1 for the expert of most weight; ties go to the lower id."""
    return np.argsort(np.argsort(-total, axis=-1, kind="stable"), axis=-1) + 1


def _lead(total: Float64[np.ndarray, "*rows E"], size: int) -> Bool[np.ndarray, "*rows E"]:
    return _ranks(total) <= size


def _jaccard(one: Bool[np.ndarray, "*rows E"], other: Bool[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    return (one & other).sum(axis=-1) / (one | other).sum(axis=-1)


def _between(committees: Bool[np.ndarray, "*rows D E"]) -> Float64[np.ndarray, "*rows"]:
    """Mean Jaccard index over all pairs of domains."""
    pairs = combinations(range(committees.shape[-2]), 2)
    return np.mean([_jaccard(committees[..., one, :], committees[..., other, :]) for one, other in pairs], axis=0)


def _pareto(mean: Float64[np.ndarray, " E"], variance: Float64[np.ndarray, " E"]) -> Bool[np.ndarray, " E"]:
    """Whom no other expert beats in both; an equal one does not."""
    no_worse = (mean[:, None] <= mean) & (variance[:, None] <= variance)
    better = (mean[:, None] < mean) | (variance[:, None] < variance)
    beaten = (no_worse & better).any(axis=0)
    return np.logical_not(beaten)


def random_jaccard(n_experts: int, size: int) -> float:
    """Mean Jaccard index of two sets of so many experts drawn at random.

    >>> round(random_jaccard(256, 8), 4)
    0.0169
    """
    shared = np.arange(size + 1)
    return float(distributions.hypergeom(n_experts, size, size).pmf(shared) @ (shared / (2 * size - shared)))


def standing_first(table: pd.DataFrame) -> pd.DataFrame:
    """Completions before prompts, then by presence and mean rank."""
    keys = (table["mean_rank"], -table["presence"], table["kind"] != "family", table["phase"] != "completion")
    return table.iloc[np.lexsort(keys)]


ALIKE = 0.5
"""Jaccard index from which on two committees are the same one."""


def _finding(table: pd.DataFrame) -> Finding:
    phase, kind = standing_first(table)[["phase", "kind"]].iloc[0]
    rows = table[(table["phase"] == phase) & (table["kind"] == kind)]
    layers = rows.groupby("layer", sort=False).first()
    jaccard, low, high, halves, chance = layer_means(layers, "jaccard", "ci_low", "ci_high", "halves", "chance")
    prompts = table[(table["phase"] == "prompt") & (table["kind"] == kind)].groupby("layer").first()
    read = f" For prompts it is {prompts['jaccard'].mean():.2f}." if phase == "completion" and len(prompts) else ""
    first = standing_first(rows).iloc[0]
    return Finding(
        sentence=(
            f"In {phase}s the leading experts of two {PLURAL[kind]} overlap with a Jaccard index of {jaccard:.2f} (95 % "
            f"interval {low:.2f} to {high:.2f}; two halves of one share {halves:.2f}, random ones {chance:.2f}), mean of "
            f"layers.{read} {rows['standing'].sum()} experts stand in at least {STANDING:.0%} of {first['domains']} "
            f"{PLURAL[kind]}; layer {first['layer']}, expert {first['expert']} leads most steadily (mean rank "
            f"{first['mean_rank']:.1f})."
        ),
        verdict=judge_above(low, high, than=ALIKE),
        rung=1,
        effect=jaccard,
        unit="Jaccard index",
        ci_low=low,
        ci_high=high,
    )


PLURAL = {"family": "families", "label": "kinds of step"}


COMMITTEE = Analysis(
    function=committee,
    question="Do the same few experts lead in every domain?",
    claim="The experts that lead one domain mostly lead the others too: a Jaccard index above one half.",
    method=(
        "Jaccard index of the K experts of most routing weight in two families, or kinds of step, prompts and completions "
        "apart; beside random committees and two halves of one domain. Intervals from a bootstrap over sequences, averaged "
        "over layers."
    ),
    order=standing_first,
    finding=_finding,
)
