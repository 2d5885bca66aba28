"""Whether the states of routing, learnt without any label, go with the labels of the steps, and more so than words make them.

1. fit hidden states (see `hidden`) to routing on half of the problems, and read them off the other half;
2. do the same with what the identity of each token makes of its routing (states of the words), and with what is left of routing
   without it; and read the states of routing as they would be if it followed the tokens alone, each token with the routing of
   another of its id;
3. measure what states tell of the label, on the other half: adjusted mutual information, 0 at chance and 1 where one gives the
   other. Labels go with families, and with the place in a solution, and so may states; chance is therefore also that of labels
   shuffled over whole steps inside each problem and third of its solution.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from ling_probe import stats
from ling_probe.analysis.classified import PLACES
from ling_probe.analysis.hidden import Halves, fit
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_held_out
from ling_probe.analysis.sample import interval_text, label_codes, numbered
from ling_probe.errors import UsageError
from ling_probe.run import Run

ROUTING, TOKENS, LEFT, RESAMPLED = SOURCES = ("routing", "tokens", "routing beyond tokens", "routing by tokens alone")
LEAST_EFFECT = 0.02
"""Adjusted information that is worth having."""
LEAST_PROBLEMS = 40
"""With fewer to fit on, that states tell nothing says nothing."""
BLOCKS = 20


def routing_states(run: Run, *, states: int | None = None, shuffles: int = 199, seed: int = 0) -> pd.DataFrame:
    """How well states of routing agree with the labels of steps on held-out problems, beyond chance and beyond the tokens.

    One row a source of states (`source`: routing as it is, what tokens alone make of it, what is left without them, routing as
    it would be by tokens alone): `states`, mean `duration` in tokens and its value `by_chance` were the same states independent
    from token to token; `ami`, the adjusted mutual information with the labels, in [0, 1] but for noise; `shuffled_ami`, its
    mean when labels are shuffled over whole steps inside problem and third; `agreement`, the information above these shuffles
    over what there could be, with its interval (`ci_low`, `ci_high`: jackknife over blocks of held-out problems), `p` by the
    shuffles and `q` corrected over sources; `beyond_tokens`, the agreement minus that of the tokens' states, with its interval
    (`beyond_low`, `beyond_high`). All over `tokens` in `steps` of `sequences` held out.

    Args:
        run: A run whose benchmark has step labels.
        states: How many; None takes as many as tell held-out problems of the fitted half best.
        shuffles: Of the labels.
        seed: Of the sample, the halves, the start and the shuffles.

    Raises:
        UsageError: The run has no step labels, or too few problems.
    """
    if run.steps.empty:
        raise UsageError("no step labels in this run")
    fitted = fit(run, states=states, seed=seed)
    halves, labelled = fitted.halves, _Labelled.of(run, fitted.halves, shuffles, seed)
    series = {ROUTING: halves.values, TOKENS: halves.expected, LEFT: halves.left}
    chains = {ROUTING: fitted.states.chain}
    chains |= {name: halves.chain(series[name], fitted.n_states, seed=seed) for name in (TOKENS, LEFT)}
    paths = {name: halves.path(chains[name], series[name]) for name in chains} | {RESAMPLED: fitted.resampled_paths[0]}
    found: dict[str, _Agreement] = {}
    rows: list[dict[str, Any]] = []
    for name in SOURCES:
        found[name] = labelled.agreement(paths[name], fitted.n_states)
        rows.append({"source": name, "states": fitted.n_states} | _durations(halves, paths[name]) | labelled.row(found[name]))
    for row in rows:
        row |= _beyond(found[row["source"]], found[TOKENS])
    table = pd.DataFrame(rows)
    table.insert(list(table.columns).index("p") + 1, "q", stats.benjamini_hochberg(table["p"].to_numpy()))
    sizes = {"tokens": len(labelled.step), "steps": len(labelled.codes), "sequences": labelled.n_problems}
    return table.assign(**sizes, fitted=len(np.unique(halves.sample.sequence[halves.first])), seed=seed)


class _Labelled:
    """Held-out tokens inside steps, and the labels of these, as they are and shuffled."""

    def __init__(
        self, rows: np.ndarray, step: np.ndarray, codes: np.ndarray, problem: np.ndarray, shuffled: np.ndarray
    ) -> None:
        self.rows, self.step, self.codes, self.problem = rows, step, codes, problem
        self.block = stats.sequence_blocks(self.n_problems, blocks=BLOCKS)[problem]
        self.labels = np.concatenate([codes[None], shuffled])

    @classmethod
    def of(cls, run: Run, halves: Halves, shuffles: int, seed: int) -> "_Labelled":
        sample, labels = halves.sample, label_codes(run, halves.sample)
        rows = np.flatnonzero(~halves.first & (labels >= 0))
        step = numbered(sample.sequence[rows], sample.step[rows]) if len(rows) else rows
        first = np.unique(step, return_index=True)[1]
        codes, problem = numbered(labels[rows][first]), numbered(sample.sequence[rows][first])
        if not len(codes) or codes.max() == 0:
            raise UsageError("one step label only among the held-out problems of this run; states need two to tell apart")
        n_steps = np.bincount(run.steps["sequence"], minlength=len(run.sequences))[sample.sequence[rows][first]]
        third = PLACES * sample.step[rows][first] // n_steps
        shuffled = stats.permute_labels(codes, blocks=problem * PLACES + third, draws=shuffles, seed=seed)
        return cls(rows, step, codes, problem, shuffled)

    @property
    def n_problems(self) -> int:
        return int(self.problem.max()) + 1

    def agreement(self, path: Integer[np.ndarray, " N"], n_states: int) -> "_Agreement":
        """Counts of states by label, of all blocks and without each."""
        counts = np.bincount(self.step * n_states + path[self.rows], minlength=len(self.codes) * n_states)
        held, n_labels = counts.reshape(-1, n_states).astype(float), int(self.codes.max()) + 1
        n_blocks = int(self.block.max()) + 1
        tables = np.zeros((len(self.labels), n_blocks * n_labels, n_states))
        for table, codes in zip(tables, self.labels, strict=True):
            np.add.at(table, self.block * n_labels + codes, held)
        blocks = tables.reshape(len(self.labels), n_blocks, n_labels, n_states)
        total = blocks.sum(axis=1, keepdims=True)
        return _Agreement(np.concatenate([total, total - blocks], axis=1))

    def row(self, found: "_Agreement") -> dict[str, float]:
        """Columns of one source."""
        low, high, _ = stats.jackknife_interval(found.values[:1], found.values[1:, None])
        exceeding = (found.bits[1:, 0] >= found.bits[0, 0] - 1e-12).sum()
        amis = found.adjusted()
        return {
            "ami": float(amis[0]),
            "shuffled_ami": float(amis[1:].mean()),
            "agreement": float(found.values[0]),
            "ci_low": float(low[0]),
            "ci_high": float(high[0]),
            "p": float(stats.permutation_p(exceeding, len(found.bits) - 1)),
        }


class _Agreement:
    """Information between states and labels: true and shuffled labels, of all problems and without each block."""

    def __init__(self, tables: Float64[np.ndarray, "B J L S"]) -> None:
        self.tables = tables
        joint, states, labels = _entropy(tables, (-2, -1)), _entropy(tables.sum(axis=-2), -1), _entropy(tables.sum(axis=-1), -1)
        self.bits = states + labels - joint
        self.most = (states + labels) / 2
        chance = self.bits[1:].mean(axis=0)
        self.values = (self.bits[0] - chance) / np.maximum(self.most[0] - chance, 1e-12)
        """Information above that of shuffled labels, over what there could be [J]."""

    def adjusted(self) -> Float64[np.ndarray, " B"]:
        """Adjusted mutual information, as scikit-learn defines it."""
        counts = self.tables[:, 0].astype(np.int64)
        chance = np.array([expected_mutual_information(counts[0], int(counts[0].sum()))]) / np.log(2)
        bits = np.array([mutual_info_score(None, None, contingency=table) for table in counts]) / np.log(2)
        return (bits - chance) / np.maximum(self.most[:, 0] - chance, 1e-12)


def _entropy(counts: Float64[np.ndarray, "*rest"], axis: int | tuple[int, ...]) -> Float64[np.ndarray, "*less"]:
    share = counts / counts.sum(axis=axis, keepdims=True)
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=axis)


def _durations(halves: Halves, path: Integer[np.ndarray, " N"]) -> dict[str, float]:
    """Mean tokens until the state changes on held-out problems, and what independent tokens with these shares would make it."""
    inside = np.flatnonzero(~halves.first & halves.sample.follows)
    changes = (path[inside] != path[inside - 1]).mean()
    share = np.bincount(path[~halves.first]) / (~halves.first).sum()
    return {"duration": float(1 / max(changes, 1e-9)), "by_chance": float(1 / max(1 - (share**2).sum(), 1e-9))}


def _beyond(mine: _Agreement, words: _Agreement) -> dict[str, float]:
    difference = mine.values - words.values
    low, high, _ = stats.jackknife_interval(difference[:1], difference[1:, None])
    return {"beyond_tokens": float(difference[0]), "beyond_low": float(low[0]), "beyond_high": float(high[0])}


def _finding(table: pd.DataFrame) -> Finding:
    by: dict[object, pd.Series] = {name: rows.iloc[0] for name, rows in table.groupby("source")}
    row, words, left, alone = (by[name] for name in SOURCES)
    verdict = judge_held_out(row["beyond_low"], row["beyond_high"], least=LEAST_EFFECT, enough=row["fitted"] >= LEAST_PROBLEMS)
    return Finding(
        sentence=(
            f"{int(row['states'])} states of routing, learnt without labels, last {row['duration']:.1f} tokens and share an "
            f"adjusted information of {row['ami']:.3f} with the labels of held-out steps; states of the words alone "
            f"{words['ami']:.3f}. Above labels shuffled inside problem and third, routing agrees by {row['agreement']:.3f} "
            f"({interval_text(row['ci_low'], row['ci_high'])}; {alone['agreement']:.3f} if it followed the tokens alone), "
            f"words by "
            f"{words['agreement']:.3f}: {row['beyond_tokens']:+.3f} beyond the tokens "
            f"({interval_text(row['beyond_low'], row['beyond_high'], '+.3f')}). "
            f"States of what is left without the tokens agree by {left['agreement']:.3f} "
            f"({interval_text(left['ci_low'], left['ci_high'])}; {int(row['tokens']):,} tokens of {int(row['sequences']):,} "
            f"problems)."
        ),
        verdict=verdict,
        rung=4 if row["beyond_low"] > 0 else 0,
        effect=float(row["beyond_tokens"]),
        unit="adjusted information beyond the states of the tokens",
        ci_low=float(row["beyond_low"]),
        ci_high=float(row["beyond_high"]),
        q=float(row["q"]),
        token_effect=float(words["agreement"]),
    )


ROUTING_STATES = Analysis(
    function=routing_states,
    question="Does routing pass through states that go with the steps, beyond what their words make?",
    claim="States learnt from routing agree with the labels of steps better than states learnt from the tokens alone.",
    method=(
        "Principal components of the experts of all layers, averaged over 9 tokens; a hidden Markov chain with normal "
        "emissions "
        "fitted on half of the problems and decoded on the other; mutual information with labels, above labels shuffled over "
        "whole steps inside problem and third, over what there could be. Baseline: the same from each token's mean routing; "
        "intervals from a jackknife over problems, given the fit."
    ),
    order=in_order,
    finding=_finding,
)
