"""Whether routing points to the first wrong step of a solution, better than its place, length, loss and words do.

1. Describe every step by its place and length, by its loss, by its words, and by its routing: expert shares, and how sure,
   spread, unusual and changed it is (`step_measures`), each as it is and less its mean over the problem.
2. Learn the chance h that a step goes wrong where all before it were right, by logistic regression on four fifths of the
   problems; steps after a first wrong one are not learnt from.
3. In every wrong solution of the fifth left out, point to the step k that was likeliest the first: h_k times 1 - h_j of all
   steps j before it.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64, Integer
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ling_probe import stats
from ling_probe.analysis.classified import Classified, classified_steps, read_parts
from ling_probe.analysis.decoders import FOLDS, folds, gain_p, problem_mean, problem_weights, tfidf, with_interval
from ling_probe.analysis.mistakes import Judged, judged_steps
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, in_order, judge_held_out, percent
from ling_probe.analysis.sample import interval_text, numbered
from ling_probe.analysis.step_measures import LOSS, StepMeasures, step_measures
from ling_probe.errors import UsageError
from ling_probe.run import Run

PLACE, LOSS_ALONE, WORDS, SURENESS, ROUTING, TEXT, ALL = (
    "place and length",
    "loss",
    "words",
    "how routing is",
    "routing",
    "place, length, loss and words",
    "place, length, loss, words and routing",
)
DECODERS: dict[str, tuple[str, ...]] = {
    PLACE: ("place",),
    LOSS_ALONE: ("loss",),
    WORDS: ("words",),
    SURENESS: ("measures",),
    ROUTING: ("measures", "shares"),
    TEXT: ("place", "loss", "words"),
    ALL: ("place", "loss", "words", "measures", "shares"),
}
"""What each decoder sees."""
LEAST_PROBLEMS = 20
LEAST_EFFECT = 0.05
"""Share of wrong solutions located that is worth having."""
ENOUGH = 100
"""With fewer wrong solutions to learn from, finding no gain says nothing."""
_COMPONENTS, _STRENGTH = 32, 0.05


def wrong_step_localisation(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How often the first wrong step of a held-out solution is the one pointed to, by what is known of the steps.

    One row a decoder: `features`, `located`, the share of wrong solutions of two steps or more, with its 95 % bootstrap
    interval over solutions (`ci_low`, `ci_high`); `chance` is that of a step drawn at random. For the last, `gain` over place,
    length, loss and words with its interval (`gain_low`, `gain_high`) and `p`, one-sided, from signs of solutions flipped.
    `solutions` were located, of which `first` went wrong in their first step; decoders learnt from `right` right steps.

    Args:
        run: A run whose steps are known to be right or wrong.
        draws: Bootstrap samples.
        seed: Of folds and samples.

    Raises:
        UsageError: Fewer than twenty wrong solutions of two steps or more whose first wrong step is known.
    """
    judged, steps = judged_steps(run, least=0), classified_steps(run)
    located = judged.wrong & (judged.n_steps > 1)
    if located.sum() < LEAST_PROBLEMS:
        raise UsageError(
            f"{int(located.sum())} solutions of this run have two steps or more and a known first wrong one, {LEAST_PROBLEMS} "
            "are needed; steps are judged in stepbench with --generate, and in benchmarks that mark them"
        )
    if not judged.right.any():
        raise UsageError("no step of this run is known to be right before a wrong one; telling apart needs some")
    seen = _seen(run, judged, steps, step_measures(run, steps), seed)
    hits = {name: _hits(np.hstack([seen[part] for part in parts]), judged, seed) for name, parts in DECODERS.items()}
    n = len(hits[ALL])
    every, each = problem_weights(np.arange(n), draws=draws, seed=seed), np.arange(n)
    rows = [
        {"features": name, **with_interval("located", "ci", problem_mean(hit, each, every), n)} for name, hit in hits.items()
    ]
    gain = hits[ALL] - hits[TEXT]
    rows[-1] |= with_interval("gain", "gain", problem_mean(gain, each, every), n)
    rows[-1]["p"] = gain_p(gain, each, seed=seed)
    table = pd.DataFrame(rows)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    return table.assign(
        chance=float((1 / judged.n_steps[located]).mean()),
        solutions=n,
        first=int((located & (judged.step == 0)).sum()),
        right=int(judged.right.sum()),
        seed=seed,
    )


def _seen(run: Run, judged: Judged, steps: Classified, measures: StepMeasures, seed: int) -> Mapping[str, np.ndarray]:
    """What decoders see of each step."""
    place, length = judged.step / np.maximum(judged.n_steps - 1, 1), np.log(np.maximum(steps.n_tokens, 1))
    columns = (judged.step, judged.step == 0, place, place**2, place == 1, length, judged.n_steps)
    is_loss = np.array([name == LOSS for name, _ in measures.names])
    values = _beside_problem(measures.beyond, judged.problem)
    return {
        "place": np.hstack([np.column_stack(columns).astype(float), _beside_problem(length[:, None], judged.problem)]),
        "loss": _beside_problem(measures.raw[:, is_loss], judged.problem),
        "words": _words(run, steps, seed),
        "measures": values[:, np.tile(~is_loss, 2)],
        "shares": _shares(run, steps, seed),
    }


def _beside_problem(values: Float64[np.ndarray, "O C"], problem: Integer[np.ndarray, " O"]) -> Float64[np.ndarray, "O 2*C"]:
    """Values, and less their mean over the problem; 0 where there is none."""
    owner, known = numbered(problem), np.isfinite(values)
    there = np.where(known, values, 0.0)
    means = [np.bincount(owner, weights=each) / np.maximum(np.bincount(owner, weights=kept), 1)
             for each, kept in zip(there.T, known.T, strict=True)]  # fmt: skip
    centred = np.where(known, values - np.column_stack(means)[owner], 0.0)
    overall = there.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.hstack([np.where(known, values, overall), centred])


def _words(run: Run, steps: Classified, seed: int) -> Float[np.ndarray, "O n"]:
    """Principal components of token ids (tf-idf)."""
    shape = (len(steps.codes), run.spec.vocab_size)
    found = sparse.csr_array(shape)
    for batch in run.batches(layers=[]):
        owner = steps.owner(batch)
        kept = owner >= 0
        found += sparse.csr_array((np.ones(kept.sum()), (owner[kept], batch.token_id[kept])), shape=shape)
    seen = found[:, found.sum(axis=0) > 0]
    return _components(tfidf([seen], np.ones(shape[0], dtype=bool)), seed)


def _components(values: Float[np.ndarray, "O n"] | sparse.csr_array, seed: int) -> Float[np.ndarray, "O c"]:
    n = min(_COMPONENTS, values.shape[1], values.shape[0] - 1)
    return TruncatedSVD(n, n_iter=2, random_state=seed).fit_transform(values)


def _shares(run: Run, steps: Classified, seed: int) -> Float[np.ndarray, "O n"]:
    """Principal components of the square roots of expert shares, over all layers."""
    layers = []
    for layer in run.spec.routed_layers:
        found = [part.observed(0, part.cells(part.owner)) for part in read_parts(run, steps, [layer])]
        layers.append(np.sqrt(np.concatenate(found) / np.maximum(steps.n_tokens, 1)[:, None]).astype(np.float32))
    values = np.concatenate(layers, axis=1)
    return _components(values - values.mean(axis=0), seed)


def _hits(seen: Float[np.ndarray, "O n"], judged: Judged, seed: int) -> Float64[np.ndarray, " P"]:
    """For each wrong solution of two steps or more, in order: the part of its best step that is the first wrong one."""
    chance, fold = np.full(len(seen), 0.5), folds(judged.problem, seed)
    known: Bool[np.ndarray, " O"] = judged.wrong | judged.right
    for each in range(FOLDS):
        learnt = known & (fold != each)
        if len(np.unique(judged.wrong[learnt])) == 2:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=_STRENGTH, max_iter=300))
            chance[fold == each] = model.fit(seen[learnt], judged.wrong[learnt]).predict_proba(seen[fold == each])[:, 1]
    score, owner = first_chances(chance, judged.problem), numbered(judged.problem)
    best = np.full(int(owner.max()) + 1, -np.inf)
    np.maximum.at(best, owner, score)
    first = score == best[owner]
    return (first / np.bincount(owner, weights=first)[owner])[judged.wrong & (judged.n_steps > 1)]


def first_chances(chance: Float64[np.ndarray, " O"], problem: Integer[np.ndarray, " O"]) -> Float64[np.ndarray, " O"]:
    """Log of the chance that each step is the first to go wrong in its problem, from those of going wrong if all were right.

    >>> np.exp(first_chances(np.array([0.5, 0.5, 0.1]), np.array([0, 0, 1]))).round(3).tolist()
    [0.5, 0.25, 0.1]
    """
    chance = np.clip(chance, 1e-9, 1 - 1e-9)
    survived = np.concatenate([[0.0], np.cumsum(np.log1p(-chance))])
    return np.log(chance) + survived[:-1] - survived[np.searchsorted(problem, problem)]


def _finding(table: pd.DataFrame) -> Finding:
    told = dict(zip(table["features"], table["located"].to_numpy(dtype=float), strict=True))
    row = table.iloc[-1]
    verdict = judge_held_out(row["gain_low"], row["gain_high"], least=LEAST_EFFECT, enough=bool(row["solutions"] >= ENOUGH))
    return Finding(
        sentence=(
            f"In {int(row['solutions'])} held-out wrong solutions routing points to the first wrong step in "
            f"{percent(told[ROUTING])}, a step at random in {percent(row['chance'])}, place and length in "
            f"{percent(told[PLACE])}, loss in {percent(told[LOSS_ALONE])}, words in {percent(told[WORDS])}, these together in "
            f"{percent(told[TEXT])}. With routing it is {percent(told[ALL])}, {100 * row['gain']:+.1f} points "
            f"({interval_text(100 * row['gain_low'], 100 * row['gain_high'], '+.1f')})."
        ),
        verdict=verdict,
        rung=4 if row["gain_low"] > 0 and row["q"] < DISCOVERY else 0,
        effect=float(row["gain"]),
        unit="share of wrong solutions located, beyond place, length, loss and words",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        q=float(row["q"]),
        token_effect=told[TEXT],
    )


WRONG_STEP_LOCALISATION = Analysis(
    function=wrong_step_localisation,
    question="Does routing point to the step where a solution first goes wrong?",
    claim="Routing locates the first wrong step better than its place, length, loss and words.",
    method=(
        "Logistic regression of going wrong where all was right before, five folds of whole problems; the likeliest first "
        "wrong step of a held-out wrong solution. Nulls: a step at random, and the same without routing (signs of solutions "
        "flipped); intervals from a bootstrap over solutions."
    ),
    order=in_order,
    finding=_finding,
)
