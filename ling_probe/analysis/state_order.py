"""Which routing state follows which, against states that follow one another by their shares alone.

Neighbouring tokens share most of what their states are read off, so states last; what says something is where a state goes when
it ends. Of the states that follow, each would come by its share of all tokens outside the state that ended.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.hidden import Fitted, fit
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, judge_cells, surest_first
from ling_probe.run import Run

LEAST_EFFECT = 1.0
"""Log2 ratio from which an order is worth having: twice as often as by shares."""
BLOCKS = 20


def state_transitions(run: Run, *, states: int | None = None, fitted: Fitted | None = None, seed: int = 0) -> pd.DataFrame:
    """How often each routing state follows each other one on held-out problems.

    One row a pair of states, `before` and `after`: `count` of tokens that stand so; `probability` of `after` at the next token
    and what the shares alone would make it, `expected`; and of the changes alone, `leaving`, the chance to go there when
    `before` ends, and `expected_leaving`; `log2_ratio` of these two counts with its interval (`ci_low`, `ci_high`: jackknife
    over blocks of problems), `p` against 0 and `q` corrected over all pairs; `token_log2_ratio`, the same if routing followed
    the tokens alone. All but the first four columns are NaN where a state follows itself.

    Args:
        run: Any run with at least 12 sequences.
        states: How many; None takes as many as tell held-out problems of the fitted half best.
        fitted: States fitted to the run before.
        seed: Of the sample, the halves and the start.

    Raises:
        UsageError: Too few problems.
    """
    fitted = fitted or fit(run, states=states, seed=seed)
    blocks, *words = (_pairs(fitted, path) for path in (fitted.path, *fitted.resampled_paths))
    total, n = blocks.sum(axis=0), fitted.n_states
    share, away = _shares(total), ~np.eye(n, dtype=bool)
    ratio, token_ratio = _ratios(total), _ratios(np.sum(words, axis=(0, 1)))
    low, high, p = stats.jackknife_interval(ratio, np.array([_ratios(total - block) for block in blocks]))
    seen = away & (total > 0)
    p = np.where(seen, p, np.nan)
    before, after = (each.ravel() for each in np.indices((n, n)))
    columns = {
        "count": total.astype(np.int64),
        "probability": total / np.maximum(total.sum(axis=1, keepdims=True), 1),
        "expected": np.broadcast_to(share, (n, n)),
        "leaving": np.where(away, total, np.nan) / np.maximum((total * away).sum(axis=1, keepdims=True), 1),
        "expected_leaving": np.where(away, _expected(share), np.nan),
        "log2_ratio": np.where(away, ratio, np.nan),
        "ci_low": np.where(seen, low, np.nan),
        "ci_high": np.where(seen, high, np.nan),
        "p": p,
        "q": stats.benjamini_hochberg(p.ravel()),
        "token_log2_ratio": np.where(away, token_ratio, np.nan),
    }
    table = pd.DataFrame({"before": before, "after": after} | {name: value.ravel() for name, value in columns.items()})
    return table.assign(sequences=len(np.unique(fitted.halves.sample.sequence[~fitted.halves.first])), seed=seed)


def _pairs(fitted: Fitted, path: Integer[np.ndarray, " N"]) -> Float64[np.ndarray, "J S S"]:
    """States of neighbouring held-out tokens, counted by block of problems."""
    sample, n = fitted.halves.sample, fitted.n_states
    here = np.flatnonzero(~fitted.halves.first & sample.follows)
    problem = np.unique(sample.sequence[here], return_inverse=True)[1]
    block = stats.sequence_blocks(int(problem.max()) + 1, blocks=BLOCKS)[problem]
    cells = (block * n + path[here - 1]) * n + path[here]
    return np.bincount(cells, minlength=(int(block.max()) + 1) * n * n).reshape(-1, n, n).astype(float)


def _shares(counts: Float64[np.ndarray, "S S"]) -> Float64[np.ndarray, " S"]:
    return counts.sum(axis=0) / counts.sum()


def _expected(share: Float64[np.ndarray, " S"]) -> Float64[np.ndarray, "S S"]:
    """Chance of each state to come after another has ended, by the shares."""
    return share / np.maximum(1 - share, 1e-12)[:, None]


def _ratios(counts: Float64[np.ndarray, "S S"]) -> Float64[np.ndarray, "S S"]:
    changes = counts * ~np.eye(len(counts), dtype=bool)
    return stats.log2_ratio(changes, changes.sum(axis=1, keepdims=True) * _expected(_shares(counts)))


def _finding(table: pd.DataFrame) -> Finding:
    tested = table[table["q"].notna()]
    row, verdict = surest_first(tested if len(tested) else table).iloc[0], judge_cells(table, least=LEAST_EFFECT)
    stay = table[table["before"] == table["after"]]
    often, found = stay["count"].sum() / table["count"].sum(), int((tested["q"] < DISCOVERY).sum())
    return Finding(
        sentence=(
            f"A token keeps the state of the one before in {100 * often:.1f} % of cases. When it changes, {found} "
            f"of {len(tested)} successions come more or less often than shares make them; surest, state "
            f"{int(row['before'])} gives "
            f"way to state {int(row['after'])} {fold(row['log2_ratio'])} times as often (95 % interval {fold_interval(row)}), "
            f"where the tokens alone would make it {fold(row['token_log2_ratio'])} ({int(row['sequences']):,} problems)."
        ),
        verdict=verdict,
        rung=1 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["log2_ratio"]),
        unit="log2 ratio to shares",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(row["token_log2_ratio"]),
    )


STATE_TRANSITIONS = Analysis(
    function=state_transitions,
    question="Which state of routing follows which?",
    claim="Some states of routing follow each other more or less often than their shares make them.",
    method=(
        "States as in routing_states, on held-out problems; where a state ends, how often each other one follows, over its "
        "share "
        "of the tokens outside that state. Intervals and p from a jackknife over problems, corrected over pairs; beside it the "
        "same if routing followed the tokens alone (each with the routing of another of its id)."
    ),
    order=surest_first,
    finding=_finding,
)
