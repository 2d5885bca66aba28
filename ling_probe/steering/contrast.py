"""How often two classes of a run's tokens choose each expert, the same token ids compared in the same strata.

With n_a(x) and n_b(x) the tokens of id and stratum x in either class, the difference of an expert is the mean over x, weighted
by n_a·n_b/(n_a + n_b), of the share of class-a tokens that choose it minus that of class-b tokens. With shares p_a and p_b so
weighted, pointwise mutual information with class a minus that with class b is log2(p_a / p_b); both have `PRIOR` tokens of even
choices added, for a rare expert's ratio is mostly chance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import (
    COMPLETION,
    RIGHT,
    WRONG,
    Classified,
    classified_answers,
    classified_families,
    classified_steps,
    families,
)
from ling_probe.analysis.counting import segment_mask
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.steering.vector import Measure, SteeringVector

OTHERS = "others"
HALVES = 2
PRIOR = 20.0


@dataclass(frozen=True)
class _Source:
    """A run whose tokens count, and for each of them its word, its class (0 toward, 1 away) and its half of the problems."""

    run: Run
    tokens: Callable[[TokenBatch], tuple[np.ndarray, np.ndarray]]
    """Word, -1 for tokens that do not count, and class."""
    half: Integer[np.ndarray, " S"]


def steering_vector(
    run: Run, toward: str, *, away: str | None = None, measure: Measure = "risk-difference", seed: int = 0
) -> SteeringVector:
    """The vector from one class of text to another.

    Args:
        run: Whose routing is contrasted.
        toward: A step label, a family, or right or wrong.
        away: Another of the same kind; all the others if left out.
        measure: What a value says of an expert.
        seed: Of the halves that the reliability comes from.

    Raises:
        UsageError: The run has no such class, or the two share no tokens.
    """
    about, classified = _classes(run, toward)
    names = {name: code for code, name in enumerate(classified.names)}
    for name in (toward, away):
        if name is not None and name not in names:
            raise UsageError(f'no {about} "{name}" in this run; these there are: {", ".join(names)}')
    if toward == away:
        raise UsageError(f'"{toward}" cannot be steered away from itself; name another {about} with --away')
    side = np.where(classified.codes == names[toward], 0, 1)
    side = np.where((side == 1) & (away is not None) & (classified.codes != names.get(str(away), -1)), -1, side)

    def tokens(batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
        owner = classified.owner(batch)
        counted = (owner >= 0) & (side[owner] >= 0)
        word = classified.word_of[classified.stratum[owner] * run.spec.vocab_size + batch.token_id]
        return np.where(counted, word, -1), side[owner]

    source = _Source(run, tokens, stats.halves(families(run)[1], seed=seed))
    return _vector([source], classified.n_words, measure, toward=toward, away=away or OTHERS, about=about)


def run_vector(run: Run, other: Run, *, measure: Measure = "risk-difference", seed: int = 0) -> SteeringVector:
    """The vector from the completions of one run to those of another of the same model, such as after another instruction.

    Raises:
        UsageError: The runs are of two models, or share no tokens.
    """
    if run.manifest.model.get("digest") != other.manifest.model.get("digest") or run.spec != other.spec:
        raise UsageError(f"{run.folder} and {other.folder} are of two models; a vector is made of two runs of one")
    sources = [_completions(each, side, seed) for side, each in enumerate((run, other))]
    return _vector(sources, run.spec.vocab_size, measure, toward=run.folder.name, away=other.folder.name, about="run")


def _completions(run: Run, side: int, seed: int) -> _Source:
    def tokens(batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
        word = np.where(segment_mask(batch, COMPLETION), batch.token_id.astype(np.int64), -1)
        return word, np.full(len(word), side)

    return _Source(run, tokens, stats.halves(families(run)[1], seed=seed))


def _classes(run: Run, toward: str) -> tuple[str, Classified]:
    if toward in (RIGHT, WRONG):
        return "answer", classified_answers(run)
    labels = sorted(set(run.steps["label"])) if len(run.steps) else []
    if toward in labels:
        return "label", classified_steps(run)
    named = [str(name) for name in families(run)[0]]
    if toward in named:
        return "family", classified_families(run)
    there = "; ".join(f"{kind} {', '.join(names) or 'none'}" for kind, names in (("labels", labels), ("families", named)))
    raise UsageError(f'this run has no "{toward}" to steer to; it has {there}; and right or wrong answers')


def _vector(
    sources: Sequence[_Source], n_words: int, measure: Measure, *, toward: str, away: str, about: str
) -> SteeringVector:
    spec = sources[0].run.spec
    tokens = np.zeros((HALVES, 2, n_words))
    for word, side, half, _ in _kept(sources, layers=[]):
        np.add.at(tokens, (half, side, word), 1.0)
    both = tokens.sum(axis=0)
    if not (both.min(axis=0) > 0).any():
        raise UsageError(f"{toward} and {away} share no tokens in this run, so nothing but words would be steered to")
    # Of each half, and of all together.
    groups = np.concatenate([tokens, both[None]])
    overlap = groups.prod(axis=1) / np.maximum(groups.sum(axis=1), 1)
    weight = overlap[:, None] / np.maximum(groups, 1)
    sums = np.zeros((HALVES + 1, 2, spec.n_rows, spec.n_experts))
    load = np.zeros((spec.n_rows, spec.n_experts), np.int64)
    for word, side, half, ids in _kept(sources, layers=None):
        for group, mine in ((0, half == 0), (1, half == 1), (HALVES, half >= 0)):
            _add(sums[group], weight[group][side[mine], word[mine]], side[mine], ids[mine])
        for row in range(spec.n_rows):
            load[row] += np.bincount(ids[:, row].ravel(), minlength=spec.n_experts)
    difference = _differences(sums, overlap.sum(axis=1)[:, None, None, None], measure, even=spec.top_k / spec.n_experts)
    return SteeringVector(
        toward=toward, away=away, about=about, model=spec.name, digest=str(sources[0].run.manifest.model.get("digest", "")),
        tokens=(float(both[0].sum()), float(both[1].sum())), reliability=_correlation(difference[0], difference[1]),
        measure=measure,
        differences={layer: tuple(row.tolist()) for layer, row in zip(spec.routed_layers, difference[HALVES], strict=True)},
        load={layer: tuple(row.tolist()) for layer, row in zip(spec.routed_layers, load, strict=True)},
    )  # fmt: skip


def _differences(
    sums: Float64[np.ndarray, "G 2 M E"], tokens: Float64[np.ndarray, "G 1 1 1"], measure: Measure, *, even: float
) -> Float64[np.ndarray, "G M E"]:
    ratios = np.log2((sums + PRIOR * even) / (tokens + PRIOR))
    shares = ratios if measure == "information" else sums / np.maximum(tokens, 1e-9)
    return shares[:, 0] - shares[:, 1]


def _kept(
    sources: Sequence[_Source], *, layers: Sequence[int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Word, class, half and choices of the tokens that count, a part of a run at a time."""
    for source in sources:
        for batch in source.run.batches(layers=layers):
            word, side = source.tokens(batch)
            kept = word >= 0
            yield word[kept], side[kept], source.half[batch.sequence[kept]], batch.expert_ids[kept]


def _add(sums: np.ndarray, weight: Float64[np.ndarray, " n"], side: np.ndarray, ids: np.ndarray) -> None:
    """Add the weight of each token to the cells of its class and experts [2 M E]."""
    first = np.repeat(side * sums.shape[2], ids.shape[2])
    for row in range(sums.shape[1]):
        cells = first + ids[:, row].ravel()
        found = np.bincount(cells, weights=np.repeat(weight, ids.shape[2]), minlength=2 * sums.shape[2])
        sums[:, row] += found.reshape(2, -1)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if not (one.std() and other.std()):
        return float("nan")
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])
