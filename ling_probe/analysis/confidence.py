"""How sure the router is: how much its scores favour few experts, and how near each choice was to another.

Sigmoid scores sum to anything; their shape is read from the scores divided by their sum.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from scipy import sparse

from ling_probe import routing, stats
from ling_probe.analysis.bundled import Cells
from ling_probe.analysis.classified import Classified, classified_steps, problem_share
from ling_probe.analysis.counting import sum_by
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, judge_cells, overall_first
from ling_probe.analysis.router import RouterBatch, router_batches, router_bias
from ling_probe.run import Run

MEASURES = ("entropy", "top_share", "margin", "experts_90")
MASS = 0.9
"""Of the scores, that `experts_90` counts experts for."""


def router_confidence(run: Run, *, permutations: int = 1999, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How sure the router is in each layer, family and kind of step; for kinds of step, also beyond their words.

    One row a layer, class of tokens (`kind` "all", "family" or "label", and its `name`) and `measure`, with its mean `value`
    and 95 % interval (`ci_low`, `ci_high`: a bootstrap over bundles of sequences), and the `tokens` and `sequences` counted:

        entropy     of the normalised scores, as a share of its maximum, log E: 1 is no preference
        top_share   share of the scores that the best expert has; 1/E is no preference
        margin      choice score of the least chosen expert over the best not chosen, in the kept groups; NaN if all are
        experts_90  experts that hold 90 % of the scores

    For labels, `beyond_words` is the mean over the label's tokens less what the same words have in the run and its problem
    has as a whole, with the interval `beyond_low` to `beyond_high` over sequences; `p` is two-sided, from labels shuffled over
    whole steps inside each problem, `q` corrected over all tested rows (Benjamini-Hochberg).

    Args:
        run: A run captured with `--keep logits`.
        permutations: Shuffles of the test.
        draws: Bootstrap samples.
        seed: Of shuffles, samples, and of how sequences are dealt to bundles.

    Raises:
        UsageError: The run kept no logits, or its routing was changed.
    """
    cells, biases = Cells.of(run, seed=seed), router_bias(run)
    steps = classified_steps(run) if cells.labels else None
    tables, residuals = [], []
    for layer, bias in biases.items():
        totals, tally = cells.zeros(len(MEASURES)), StepTally(steps)
        for batch in router_batches(run, layer, bias):
            values = _measures(batch)
            totals += cells.totals(batch.tokens, values)
            tally.add(batch, values)
        means = cells.means(totals, draws=draws, seed=seed)
        tables += [means.table(place).assign(layer=layer, measure=name) for place, name in enumerate(MEASURES)]
        residuals.append(tally.residual())
    table = pd.concat(tables, ignore_index=True)
    if steps is not None:
        beyond = _beyond_words(run, steps, np.concatenate(residuals, axis=1), permutations, draws, seed)
        table = table.merge(beyond, on=["layer", "measure", "kind", "name"], how="left")
    else:
        table = table.assign(**dict.fromkeys(("beyond_words", "beyond_low", "beyond_high", "p"), np.nan))
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    front = ["layer", "kind", "name", "measure"]
    return table[[*front, *table.columns.drop(front)]].assign(seed=seed)


def _measures(batch: RouterBatch) -> Float64[np.ndarray, "N P"]:
    ordered = np.sort(batch.scores, axis=-1)[:, ::-1]
    share = ordered / np.maximum(ordered.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    entropy = -(share * np.log(np.maximum(share, np.finfo(float).tiny))).sum(axis=-1) / np.log(share.shape[-1])
    needed = 1 + (share.cumsum(axis=-1) < MASS).sum(axis=-1)
    margin = routing.margin(batch.choice, batch.spec)
    return np.column_stack([entropy, share[:, 0], np.where(np.isfinite(margin), margin, np.nan), needed])


class StepTally:
    """Sums of some measures over whole steps, and what the same words of the family would make of them."""

    def __init__(self, steps: Classified | None) -> None:
        self.steps = steps
        self._observed: np.ndarray | float = 0.0
        self._by_word: np.ndarray | float = 0.0
        self._words: sparse.csr_array | None = None

    def add(self, batch: RouterBatch, values: Float64[np.ndarray, "N P"]) -> None:
        """Count some tokens."""
        if self.steps is None:
            return
        owner = self.steps.owner(batch.tokens)
        kept = owner >= 0
        owner, token = owner[kept], batch.tokens.token_id[kept]
        word = self.steps.word_of[self.steps.stratum[owner] * batch.spec.vocab_size + token]
        shape = (len(self.steps.codes), self.steps.n_words)
        words = sparse.csr_array((np.ones(len(owner)), (owner, word)), shape)
        self._words = words if self._words is None else self._words + words
        self._observed = self._observed + _sums(values[kept], owner, shape[0])
        self._by_word = self._by_word + _sums(values[kept], word, shape[1])

    def residual(self) -> Float64[np.ndarray, "O P"]:
        """Each step's sums less those of its words and of its problem."""
        if self.steps is None or self._words is None:
            return np.empty((0, 0))
        tokens = np.maximum(np.asarray(self._words.sum(axis=0)).ravel(), 1)
        residual = self._observed - self._words @ (self._by_word / tokens[:, None])
        return residual - problem_share(residual, self.steps.sequence, self.steps.n_tokens)


def _sums(values: Float64[np.ndarray, "N P"], owner: Integer[np.ndarray, " N"], n_owners: int) -> Float64[np.ndarray, "O P"]:
    return sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), (n_owners, len(owner))) @ values


def _beyond_words(
    run: Run, steps: Classified, residual: Float64[np.ndarray, "O R"], permutations: int, draws: int, seed: int
) -> pd.DataFrame:
    """A row a label and column of residuals, which run over layers and, in each, measures."""
    shuffled = stats.permute_labels(steps.codes, blocks=steps.sequence, draws=permutations, seed=seed)
    bundle = stats.bundles(len(run.sequences), seed=seed)
    weights = stats.bootstrap_weights(int(bundle.max()) + 1, draws=draws, seed=seed)
    places = [(layer, measure) for layer in run.spec.routed_layers for measure in MEASURES]
    tables = []
    for code, name in enumerate(steps.names):
        inside = steps.codes == code
        owner = bundle[steps.sequence[inside]]
        length = steps.n_tokens[inside, None]
        sums = sum_by(np.column_stack([residual[inside], length]), owner, weights.shape[1])
        total, drawn = sums.sum(axis=0), weights @ sums
        low, high = stats.percentile_interval(drawn[:, :-1] / np.maximum(drawn[:, -1:], 1.0))
        exceeding = stats.count_exceeding(residual, inside, shuffled == code)
        columns = {
            "beyond_words": total[:-1] / max(total[-1], 1.0),
            "beyond_low": low,
            "beyond_high": high,
            "p": np.where(np.isnan(total[:-1]), np.nan, stats.permutation_p(exceeding, permutations)),
        }
        tables.append(pd.DataFrame(places, columns=["layer", "measure"]).assign(kind="label", name=name, **columns))
    return pd.concat(tables, ignore_index=True)


LEAST_DIFFERENCE = 0.02
"""Of its maximum: a difference in entropy below it is not worth having."""


def _finding(table: pd.DataFrame) -> Finding:
    whole = table[table["kind"] == "all"]
    entropy = whole[whole["measure"] == "entropy"]
    mean = {measure: whole.loc[whole["measure"] == measure, "value"].mean() for measure in MEASURES}
    surest, least = (entropy.iloc[int(place)] for place in (np.argmin(entropy["value"]), np.argmax(entropy["value"])))
    overall = (
        f"Mean entropy is {mean['entropy']:.3f} of its maximum, from {surest['value']:.3f} in layer {surest['layer']} to "
        f"{least['value']:.3f} in layer {least['layer']}; the best expert has {100 * mean['top_share']:.1f} % of the scores, "
        f"{mean['experts_90']:.1f} experts have 90 %, and the margin of a choice is {mean['margin']:.4f}."
    )
    tested = table[table["p"].notna() & (table["measure"] == "entropy")]
    if tested.empty:
        return Finding(sentence=f"{overall} There are no step labels to compare.", verdict=Verdict.CANNOT_TELL, rung=1)
    row = tested.iloc[_surest(tested)]
    found = int((tested["q"] < DISCOVERY).sum())
    verdict = judge_cells(tested.assign(ci_low=tested["beyond_low"], ci_high=tested["beyond_high"]), least=LEAST_DIFFERENCE)
    return Finding(
        sentence=(
            f"{overall} In {found} of {len(tested)} (layer, label) cells entropy differs beyond the words (q below 0.05); the "
            f"surest is layer {row['layer']}, {row['name']}: {row['beyond_words']:+.4f} (95 % interval "
            f"{row['beyond_low']:+.4f} to {row['beyond_high']:+.4f})."
        ),
        verdict=verdict,
        rung=3 if found else 1,
        effect=float(row["beyond_words"]),
        unit="of maximal entropy",
        ci_low=float(row["beyond_low"]),
        ci_high=float(row["beyond_high"]),
        q=float(row["q"]),
    )


def _surest(tested: pd.DataFrame) -> int:
    """Row farthest from 0 among the discoveries, or of all where there are none."""
    far = np.maximum(np.maximum(tested["beyond_low"], -tested["beyond_high"]), 0.0)
    return int(np.lexsort((-far, tested["q"] >= DISCOVERY))[0])


ROUTER_CONFIDENCE = Analysis(
    function=router_confidence,
    question="How sure is the router of its choice?",
    claim="The router is surer, or less sure, in some kinds of step than their words make it.",
    method=(
        "Entropy, largest share and 90 % mass of the scores divided by their sum, and the margin c_(K) - c_(K+1). Null: labels "
        "shuffled over whole steps inside each problem, after taking out what the same words and the problem have; p corrected "
        "over all layers, labels and measures (Benjamini-Hochberg); intervals from a bootstrap over sequences."
    ),
    order=overall_first,
    finding=_finding,
)
