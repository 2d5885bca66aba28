"""Whether routing tells right from wrong solutions, beyond their length, their words and how sure the model was.

1. Describe every judged solution by its length, its loss, its words, its routing (how often each expert was chosen, by layer),
   and how sure the router was: how evenly tokens spread their weight over the chosen experts, and where logits were kept the
   entropy of all scores and the margin of the choice.
2. Learn right from wrong by logistic regression on four fifths of the solutions, score the last fifth, in turn.
3. Compare the scores of wrong and right solutions of the same family: the chance that the wrong one scores higher (AUROC).
4. Ask what routing adds to length, loss and words: the difference of the two AUROCs, against scores swapped at random in pairs.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64, Integer
from scipy import sparse
from scipy import stats as ranks
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from ling_probe import stats
from ling_probe.analysis.classified import Classified, classified_answers
from ling_probe.analysis.question import Analysis, Finding, Verdict, in_order, judge
from ling_probe.analysis.step_measures import router_sureness
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

LEAST = 10
"""Right and wrong solutions that there must be of each."""
LEAST_GAIN = 0.02
"""Gain in AUROC that is not worth having."""
SOLUTIONS = 1500
"""Of more, so many are drawn: learning costs their number times the experts of all layers."""
FOLDS = 5
BASELINE = ("length", "loss", "words")
DECODERS = {
    "length": ("length",),
    "loss": ("loss",),
    "words": ("words",),
    "how sure the router was": ("sureness",),
    "routing": ("routing", "sureness"),
    "length, loss and words": BASELINE,
    "length, loss, words and routing": (*BASELINE, "routing", "sureness"),
}
"""What each decoder sees."""


def answer_prediction(run: Run, *, draws: int = 1000, swaps: int = 1999, seed: int = 0) -> pd.DataFrame:
    """How well right and wrong solutions of the same family can be told apart, on solutions that the decoder has not seen.

    One row a decoder: `features`, `auroc` (0.5 is chance) with its 95 % bootstrap interval over solutions, and for the last
    one, `gain` over length, loss and words alone with its interval and `p`, one-sided, from swapping the two scores of a
    solution at random (Bandos et al. 2005); `right` and `wrong` solutions compared, drawn where there are many.

    Args:
        run: A run with right and wrong answers.
        draws: Bootstrap samples.
        swaps: Random swaps of the test.
        seed: Of folds, bootstrap and swaps.

    Raises:
        UsageError: Fewer than ten right or ten wrong solutions in families that have both.
    """
    answers = _sampled(classified_answers(run), seed)
    wrong = answers.codes == 1
    if min(wrong.sum(), (~wrong).sum()) < LEAST:
        raise UsageError(
            f"{(~wrong).sum()} right and {wrong.sum()} wrong solutions in families that have both; to tell them apart needs "
            f"{LEAST} of each"
        )
    seen = _features(run, answers)
    scores = {name: _scores(sparse.hstack([seen[part] for part in parts]).tocsr(), wrong, answers.stratum, seed)
              for name, parts in DECODERS.items()}  # fmt: skip
    weights = np.concatenate([np.ones((1, len(wrong))), stats.bootstrap_weights(len(wrong), draws=draws, seed=seed)])
    drawn = {name: _auroc(score, wrong, answers.stratum, weights) for name, score in scores.items()}
    rows = [{"features": name, "auroc": auroc[0]} | _bounds(auroc, "ci") for name, auroc in drawn.items()]
    with_routing, without = list(DECODERS)[-1], list(DECODERS)[-2]
    gain = drawn[with_routing] - drawn[without]
    p = _swapped_p(scores[with_routing], scores[without], wrong, answers.stratum, swaps, seed)
    rows[-1] |= {"gain": gain[0], **_bounds(gain, "gain"), "p": p}
    table = pd.DataFrame(rows).assign(right=int((~wrong).sum()), wrong=int(wrong.sum()), seed=seed)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    return table


def _sampled(answers: Classified, seed: int) -> Classified:
    """So many of the solutions as can be learned from, drawn at random."""
    n = len(answers.codes)
    if n <= SOLUTIONS:
        return answers
    rows = np.sort(np.random.default_rng(seed).choice(n, SOLUTIONS, replace=False))
    place = np.full(n, -1)
    place[rows] = np.arange(SOLUTIONS)

    def owner(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        own = answers.owner(batch)
        return np.where(own >= 0, place[np.maximum(own, 0)], -1)

    names = ("codes", "sequence", "stratum", "n_tokens")
    return replace(answers, owner=owner, **{name: getattr(answers, name)[rows] for name in names})


def _features(run: Run, answers: Classified) -> dict[str, sparse.csr_array]:
    """What decoders see of each solution, a row each."""
    n, spec = len(answers.codes), run.spec
    counts = np.zeros((n, spec.n_rows * spec.n_experts), np.float32)
    words = sparse.csr_array((n, spec.vocab_size))
    logits = bool(run.manifest.parts) and "logits" in run.manifest.parts[0].extras
    sureness, loss = np.zeros((n, spec.n_rows, 3 if logits else 1)), np.zeros(n)
    biases = run.manifest.model.get("expert_bias") or {}
    for batch in run.batches(weights=True, columns=("loss", *(["logits"] if logits else []))):
        owner = answers.owner(batch)
        kept = owner >= 0
        owner = owner[kept]
        assert batch.weights is not None
        for row in range(spec.n_rows):
            cells = owner[:, None] * spec.n_experts + batch.expert_ids[kept, row]
            found = np.bincount(cells.ravel(), minlength=n * spec.n_experts).reshape(n, -1)
            counts[:, row * spec.n_experts : (row + 1) * spec.n_experts] += found
            values = [_spread(batch.weights[kept, row])]
            if logits:
                bias = np.array(biases.get(str(spec.routed_layers[row]), np.zeros(spec.n_experts)))
                values += router_sureness(batch.extra["logits"][kept, row].astype(float), bias, spec)
            for place, value in enumerate(values):
                sureness[:, row, place] += np.bincount(owner, weights=np.nan_to_num(value), minlength=n)
        words += sparse.csr_array((np.ones(len(owner)), (owner, batch.token_id[kept])), shape=words.shape)
        loss += np.bincount(owner, weights=np.nan_to_num(batch.extra["loss"][kept]), minlength=n)
    length = np.maximum(answers.n_tokens, 1)[:, None]
    return {
        "length": sparse.csr_array(np.hstack([length, np.log(length)])),
        "loss": sparse.csr_array(np.stack([loss, loss / length[:, 0]], axis=1)),
        "words": sparse.csr_array(words / length),
        "routing": sparse.csr_array(counts / length),
        "sureness": sparse.csr_array(sureness.reshape(n, -1) / length),
    }


def _spread(weights: Float32[np.ndarray, "n K"]) -> Float64[np.ndarray, " n"]:
    """Entropy of each token's weights over its chosen experts, in nats."""
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    return -(share * np.log(np.maximum(share, 1e-9))).sum(axis=1).astype(float)


def _scores(
    seen: sparse.csr_array, wrong: np.ndarray, family: Integer[np.ndarray, " S"], seed: int
) -> Float64[np.ndarray, " S"]:
    """Score of each solution by a decoder that learned from the others; the higher, the more it looks wrong."""
    scores = np.zeros(len(wrong))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    # A family with fewer wrong solutions than folds cannot have one in each.
    cells = family * 2 + wrong
    for learned, judged in folds.split(seen, cells if np.unique(cells, return_counts=True)[1].min() >= FOLDS else wrong):
        decoder = make_pipeline(MaxAbsScaler(), LogisticRegression(class_weight="balanced", max_iter=300))
        scores[judged] = decoder.fit(seen[learned], wrong[learned]).decision_function(seen[judged])
    return scores


def _auroc(
    score: Float64[np.ndarray, " S"], wrong: np.ndarray, family: Integer[np.ndarray, " S"], weights: Float64[np.ndarray, "B S"]
) -> Float64[np.ndarray, " B"]:
    """Chance that a wrong solution scores higher than a right one of its family, ties half; pairs weigh as drawn."""
    better, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for each in np.unique(family):
        here = family == each
        bad, good = weights[:, here & wrong], weights[:, here & ~wrong]
        difference = score[here & wrong][:, None] - score[here & ~wrong]
        better += np.einsum("bi,ij,bj->b", bad, (difference > 0) + 0.5 * (difference == 0), good, optimize=True)
        pairs += bad.sum(axis=1) * good.sum(axis=1)
    return better / np.maximum(pairs, 1)


def _swapped_p(
    one: Float64[np.ndarray, " S"],
    other: Float64[np.ndarray, " S"],
    wrong: np.ndarray,
    family: Integer[np.ndarray, " S"],
    swaps: int,
    seed: int,
) -> float:
    even = np.ones((1, len(wrong)))
    first, second = ranks.rankdata(one), ranks.rankdata(other)

    def gap(swap: np.ndarray) -> float:
        mine, theirs = np.where(swap, second, first), np.where(swap, first, second)
        return float((_auroc(mine, wrong, family, even) - _auroc(theirs, wrong, family, even))[0])

    # One-sided: what knows nothing makes a decoder worse, and that is no finding.
    observed = gap(np.zeros(len(wrong), dtype=bool))
    rng = np.random.default_rng(seed)
    exceeding = sum(gap(rng.random(len(wrong)) < 0.5) >= observed - 1e-12 for _ in range(swaps))
    return float(stats.permutation_p(np.array(exceeding), swaps))


def _bounds(drawn: Float64[np.ndarray, " B"], name: str) -> dict[str, float]:
    low, high = stats.percentile_interval(drawn[1:])
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _finding(table: pd.DataFrame) -> Finding:
    told = dict(zip(table["features"], table["auroc"].to_numpy(dtype=float), strict=True))
    row = table.iloc[-1]
    verdict = judge(row["gain_low"], row["gain_high"], q=row["q"], least=LEAST_GAIN)
    return Finding(
        sentence=(
            f"{row['wrong']} wrong against {row['right']} right solutions: routing alone tells them apart with an AUROC of "
            f"{told['routing']:.3f} (0.5 is chance), words {told['words']:.3f}, length, loss and words together "
            f"{told['length, loss and words']:.3f}. Routing adds {row['gain']:+.3f} to the last (95 % interval "
            f"{row['gain_low']:+.3f} to {row['gain_high']:+.3f})."
        ),
        verdict=verdict,
        rung=4 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["gain"]),
        unit="AUROC",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        q=float(row["q"]),
    )


ANSWER_PREDICTION = Analysis(
    function=answer_prediction,
    question="Does routing tell right from wrong solutions?",
    claim="Routing tells wrong solutions from right ones beyond their length, loss and words.",
    method=(
        "Logistic regression on held-out fifths of the solutions; AUROC over pairs of a wrong and a right one of the same "
        "family. Null: the two scores of a solution, with and without routing, swapped at random (Bandos et al. 2005); "
        "intervals from a bootstrap over solutions."
    ),
    order=in_order,
    finding=_finding,
)
