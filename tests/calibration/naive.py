"""What others do: tests of a label's preference that know nothing of its words, or take tokens for independent."""

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency

from ling_probe import stats
from ling_probe.run import Run


def token_chi_square(run: Run) -> pd.DataFrame:
    """Chosen or not, in the label or not: every token an observation of its own."""
    chosen, tokens = _by_step(run)
    labels, cells = run.steps["label"].to_numpy(dtype=str), []
    for label in np.unique(labels):
        inside = labels == label
        sides = (inside, ~inside)
        hits, totals = np.stack([chosen[side].sum(axis=0) for side in sides]), np.array([tokens[side].sum() for side in sides])
        for row, expert in np.ndindex(chosen.shape[1:]):
            hit = hits[:, row, expert]
            cells.append((row, expert, label, _chi_square(np.stack([hit, totals - hit]))))
    return _corrected(pd.DataFrame(cells, columns=["row", "expert", "label", "p"]))


def step_shuffle(run: Run, *, permutations: int = 999, seed: int = 0) -> pd.DataFrame:
    """Labels shuffled over whole steps inside each problem, against raw counts: right units, and the words left in."""
    chosen, tokens = _by_step(run)
    labels, sequence = run.steps["label"].to_numpy(dtype=str), run.steps["sequence"].to_numpy()
    names, codes = np.unique(labels, return_inverse=True)
    n_experts = run.spec.n_experts
    share = pd.DataFrame(chosen.reshape(len(tokens), -1)).groupby(sequence).transform("sum").to_numpy()
    length = pd.Series(tokens).groupby(sequence).transform("sum").to_numpy()
    excess = chosen.reshape(len(tokens), -1) - share * (tokens / length)[:, None]
    shuffled, tables = stats.permute_labels(codes, blocks=sequence, draws=permutations, seed=seed), []
    for code, label in enumerate(names):
        p = stats.permutation_p(stats.count_exceeding(excess, codes == code, shuffled == code), permutations)
        row, expert = np.divmod(np.arange(len(p)), n_experts)
        tables.append(pd.DataFrame({"row": row, "expert": expert, "label": label, "p": p}))
    return _corrected(pd.concat(tables, ignore_index=True))


def _by_step(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Choices of each step [O M E] and its tokens [O]."""
    first = np.searchsorted(run.steps["sequence"].to_numpy(), np.arange(len(run.sequences)))
    chosen = np.zeros((len(run.steps), run.spec.n_rows, run.spec.n_experts))
    for batch in run.batches():
        inside = batch.step >= 0
        step = (first[batch.sequence] + batch.step)[inside]
        np.add.at(chosen, (step[:, None, None], np.arange(run.spec.n_rows)[:, None], batch.expert_ids[inside]), 1)
    return chosen, chosen[:, 0].sum(axis=1) / run.spec.top_k


def _chi_square(table: np.ndarray) -> float:
    return float(chi2_contingency(table, correction=False).pvalue) if (table.sum(axis=1) > 0).all() else np.nan


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()))
