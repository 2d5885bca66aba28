"""What a router was like over each step: how sure, how spread, how unusual for its words, how far from the step before."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer
from scipy import sparse

from ling_probe import routing
from ling_probe.analysis.classified import Classified, read_parts, token_rates
from ling_probe.analysis.counting import sum_by
from ling_probe.run import Run, TokenBatch
from ling_probe.spec import ModelSpec

LOSS, TOP, SURPRISE, DEPARTURE, ENTROPY, MARGIN = MEASURES = (
    "loss",
    "top weight",
    "surprise",
    "departure",
    "router entropy",
    "router margin",
)
"""Next-token loss; share of the weight that the heaviest expert has; 1 less how often the same word chooses these experts; 1
less the share these experts had in the step before; and of runs with logits, the entropy of the normalised scores over its
maximum, and the choice score of the last chosen expert over the best one left out of the groups kept."""


@dataclass(frozen=True, eq=False)
class StepMeasures:
    """Means over the tokens of each step; C measures, each of one layer but the loss."""

    names: tuple[tuple[str, int | None], ...]
    """Measure and layer."""
    raw: Float64[np.ndarray, "O C"]
    """NaN where a step has none, as a first step has no step before."""
    beyond: Float64[np.ndarray, "O C"]
    """Less what the same words have in the same third of solutions of the family."""


def step_measures(run: Run, steps: Classified) -> StepMeasures:
    """Measures of each step; memory holds one layer, whatever the length of the run."""
    logits = bool(run.manifest.parts) and "logits" in run.manifest.parts[0].extras
    names: list[tuple[str, int | None]] = []
    found = []
    for place, layer in enumerate(run.spec.routed_layers):
        kept = [name for name in MEASURES if (name != LOSS or place == 0) and (logits or name not in (ENTROPY, MARGIN))]
        names += [(name, None if name == LOSS else layer) for name in kept]
        found.append(_of_layer(run, steps, layer, kept))
    raw, beyond = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
    return StepMeasures(tuple(names), raw, beyond)


def _of_layer(run: Run, steps: Classified, layer: int, kept: list[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = list(read_parts(run, steps, [layer]))
    (rate,) = token_rates(run, parts, steps.n_words, 1)
    bias = np.array((run.manifest.model.get("expert_bias") or {}).get(str(layer), np.zeros(run.spec.n_experts)))
    n_steps = len(steps.codes)
    observed, there = np.zeros((2, n_steps, len(kept)))
    by_word, of_word = np.zeros((2, steps.n_words, len(kept)))
    words = sparse.csr_array((n_steps, steps.n_words))
    columns = [*(["loss"] if LOSS in kept else []), *(["logits"] if ENTROPY in kept else [])]
    for batch in run.batches(layers=[layer], weights=True, columns=columns):
        owner = steps.owner(batch)
        inside = np.flatnonzero(owner >= 0)
        owner = owner[inside]
        word = steps.word_of[steps.stratum[owner] * run.spec.vocab_size + batch.token_id[inside]]
        values = _values(run, batch, inside, owner, rate[word], bias, kept)
        known = np.isfinite(values)
        values = np.where(known, values, 0.0)
        observed += sum_by(values, owner, n_steps)
        there += sum_by(known.astype(float), owner, n_steps)
        by_word += sum_by(values, word, steps.n_words)
        of_word += sum_by(known.astype(float), word, steps.n_words)
        words += sparse.csr_array((np.ones(len(owner)), (owner, word)), shape=words.shape)
    tokens = np.where(there > 0, there, np.nan)
    return observed / tokens, (observed - words @ (by_word / np.maximum(of_word, 1))) / tokens


def _values(
    run: Run,
    batch: TokenBatch,
    inside: Integer[np.ndarray, " n"],
    owner: Integer[np.ndarray, " n"],
    rate: np.ndarray,
    bias: Float64[np.ndarray, " E"],
    kept: list[str],
) -> Float64[np.ndarray, "n P"]:
    """Of each token inside steps."""
    assert batch.weights is not None
    ids, weights = batch.expert_ids[inside, 0].astype(np.int64), batch.weights[inside, 0]
    told = {
        TOP: weights.max(axis=1) / np.maximum(weights.sum(axis=1), 1e-9),
        SURPRISE: 1 - np.take_along_axis(rate, ids, axis=1).mean(axis=1),
        DEPARTURE: _departure(ids, owner, batch.step[inside], run.spec.n_experts),
    }
    if LOSS in kept:
        told[LOSS] = batch.extra["loss"][inside]
    if ENTROPY in kept:
        told[ENTROPY], told[MARGIN] = router_sureness(batch.extra["logits"][inside, 0].astype(float), bias, run.spec)
    return np.column_stack([told[name] for name in kept]).astype(float)


def _departure(
    ids: Integer[np.ndarray, "n K"], owner: Integer[np.ndarray, " n"], step: Integer[np.ndarray, " n"], n_experts: int
) -> Float64[np.ndarray, " n"]:
    """1 less the mean share of the step before's tokens that chose each of a token's experts; NaN in first steps."""
    first = int(owner.min(initial=0))
    n_steps = int(owner.max(initial=0)) - first + 1
    cells = (owner - first)[:, None] * n_experts + ids
    counts = np.bincount(cells.ravel(), minlength=n_steps * n_experts).reshape(n_steps, n_experts)
    share = counts / np.maximum(np.bincount(owner - first, minlength=n_steps), 1)[:, None]
    before = share[np.maximum(owner - first - 1, 0)]
    return np.where(step > 0, 1 - np.take_along_axis(before, ids, axis=1).mean(axis=1), np.nan)


def router_sureness(
    logits: Float64[np.ndarray, "n E"], bias: Float64[np.ndarray, " E"], spec: ModelSpec
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Entropy of each token's normalised scores over its maximum, and the margin of its choice (NaN where nothing is left)."""
    scores = routing.scores(logits)
    share = scores / np.maximum(scores.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    entropy = -(share * np.log(np.maximum(share, np.finfo(float).tiny))).sum(axis=-1) / np.log(share.shape[-1])
    margin = routing.margin(routing.choice_scores(scores, bias), spec)
    return entropy, np.where(np.isfinite(margin), margin, np.nan)
