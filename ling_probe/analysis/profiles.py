"""What each state of routing goes with: labels of steps, families, tokens, experts.

Counts are of held-out problems. Whether a state goes with a label is tested: how many of a step's tokens are in the state, less
how many would be if routing followed the tokens alone (each with the routing of another of its id), summed over the steps of
the label, against labels shuffled over whole steps inside each problem and third of its solution. Families, tokens and experts
describe.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import PLACES
from ling_probe.analysis.hidden import Fitted, fit
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, judge_cells, percent
from ling_probe.analysis.sample import label_codes, numbered
from ling_probe.run import Run

SHOWN = 5
"""Tokens and experts of each state in the table."""
LEAST_EFFECT = 1.0
"""Log2 ratio from which a label is worth having: twice the tokens in the state that the label's words make."""
BLOCKS = 20


def state_profiles(run: Run, *, states: int | None = None, fitted: Fitted | None = None, seed: int = 0) -> pd.DataFrame:
    """Labels, families, tokens and experts of each routing state, on held-out problems.

    One row a state and thing it may go with: `state`, its `share` of all tokens; `kind` (label, family, token, expert) and
    `name`; `part`, the share of the state's tokens that are of it, or choose it, and `overall`, that of all tokens, with
    `log2_ratio` of the two. For labels `beyond_log2_ratio` compares with what tokens, problem and third make of it, with its
    interval (`ci_low`, `ci_high`: jackknife over blocks of problems), `p` by whole-step shuffles and `q` corrected over states
    and labels. Of tokens (`token_id`) and experts (`layer`, `expert`) the five that the state prefers most, sure ones first.

    Args:
        run: Any run with at least 12 sequences; without step labels there are no rows of labels.
        states: How many; None takes as many as tell held-out problems of the fitted half best.
        fitted: States fitted to the run before.
        seed: Of the sample, the halves and the start.

    Raises:
        UsageError: Too few problems.
    """
    fitted = fitted or fit(run, states=states, seed=seed)
    held = ~fitted.halves.first
    sample, path = fitted.halves.sample.only(held), fitted.path[held]
    n, share = fitted.n_states, np.bincount(path, minlength=fitted.n_states) / len(path)
    families, family = np.unique(run.sequences["family"].to_numpy(dtype=str)[sample.sequence], return_inverse=True)
    ids, word = np.unique(sample.token_id, return_inverse=True)
    tables = [
        _labels(run, fitted),
        _described("family", _counts(path, family, n), families),
        _shown(_described("token", _counts(path, word, n), _texts(run, ids)).assign(token_id=np.tile(ids, n))),
        _experts(fitted, path, held),
    ]
    table = pd.concat([each for each in tables if len(each)], ignore_index=True)
    table.insert(1, "share", share[table["state"]])
    for name in ("token_id", "layer", "expert"):
        table[name] = table.get(name, pd.Series(pd.NA, index=table.index)).astype("Int64")
    sizes = {"tokens": len(path), "sequences": len(np.unique(sample.sequence)), "seed": seed}
    return table.sort_values("state", kind="stable", ignore_index=True).assign(**sizes)


def _counts(path: Integer[np.ndarray, " N"], code: Integer[np.ndarray, " N"], n_states: int) -> Float64[np.ndarray, "S C"]:
    n = int(code.max(initial=0)) + 1
    return np.bincount(path * n + code, minlength=n_states * n).reshape(n_states, n).astype(float)


def _described(kind: str, counts: Float64[np.ndarray, "S C"], names: np.ndarray, *, each: float = 1.0) -> pd.DataFrame:
    """Rows of every state and name; `each` is how many of the counted a token has."""
    tokens, total = counts.sum(axis=1, keepdims=True) / each, counts.sum() / each
    overall = np.broadcast_to(counts.sum(axis=0) / total, counts.shape)
    state = np.repeat(np.arange(len(counts)), counts.shape[1])
    values = {
        "count": counts,
        "part": counts / np.maximum(tokens, 1),
        "overall": overall,
        "log2_ratio": stats.log2_ratio(counts, overall * tokens),
    }
    head = {"state": state, "kind": kind, "name": np.tile(names.astype(object), len(counts))}
    return pd.DataFrame(head | {name: value.ravel() for name, value in values.items()})


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Those each state prefers most: by how far the count exceeds what it would be by chance, in standard deviations."""
    count, part, overall = (rows[name].to_numpy(dtype=float) for name in ("count", "part", "overall"))
    expected = overall * count / np.maximum(part, 1e-12)
    above = (count - expected) / np.sqrt(np.maximum(expected, 1))
    best = rows.assign(above=above)[rows["log2_ratio"] > 0].sort_values("above", ascending=False)
    return best.groupby("state").head(SHOWN).drop(columns="above")


def _experts(fitted: Fitted, path: Integer[np.ndarray, " T"], held: np.ndarray) -> pd.DataFrame:
    sample, rows = fitted.halves.sample, np.flatnonzero(held)
    group = np.full(sample.n_tokens, -1)
    group[rows] = path
    tables = []
    for place, layer in enumerate(sample.layers):
        counts = sample.counts(place, group, fitted.n_states)
        names = np.array([f"layer {layer}, expert {expert}" for expert in range(sample.n_experts)])
        table = _described("expert", counts, names, each=float(sample.expert_ids.shape[2]))
        tables.append(table.assign(layer=layer, expert=np.tile(np.arange(sample.n_experts), fitted.n_states)))
    return _shown(pd.concat(tables, ignore_index=True))


def _texts(run: Run, ids: Integer[np.ndarray, " U"]) -> np.ndarray:
    """Text of each token id, as first written in the run."""
    texts: dict[int, str] = {}
    for batch in run.batches(layers=[], columns=["token"]):
        found, first = np.unique(batch.token_id, return_index=True)
        texts = dict(zip(found.tolist(), batch.extra["token"][first].tolist(), strict=True)) | texts
        if len(texts) >= len(ids) and all(each in texts for each in ids.tolist()):
            break
    return np.array([texts[each] for each in ids.tolist()], dtype=object)


@dataclass(frozen=True, eq=False)
class _Steps:
    """Held-out steps: tokens in each state, and in excess of what their identities make."""

    names: np.ndarray
    codes: Integer[np.ndarray, " O"]
    block: Integer[np.ndarray, " O"]
    """Problem and third."""
    unit: Integer[np.ndarray, " O"]
    """Block of problems left out together."""
    counts: Float64[np.ndarray, "O S"]
    excess: Float64[np.ndarray, "O S"]

    def sums(self, rows: np.ndarray) -> tuple[stats.NullMoments, Float64[np.ndarray, "L S"]]:
        """The law of each label's excess under the shuffle, and its tokens in each state."""
        blocks, labels = numbered(self.block[rows]), len(self.names)
        found = stats.ShuffleSums.of(
            self.excess[rows], self.codes[rows], blocks=blocks, n_labels=labels, n_blocks=int(blocks.max()) + 1
        )
        inside = np.zeros((labels, self.counts.shape[1]))
        np.add.at(inside, self.codes[rows], self.counts[rows])
        return found.moments(), inside


def _held_out_steps(run: Run, fitted: Fitted) -> _Steps | None:
    sample, n = fitted.halves.sample, fitted.n_states
    labels = label_codes(run, sample)
    rows = np.flatnonzero(~fitted.halves.first & (labels >= 0))
    if not len(rows):
        return None
    step = numbered(sample.sequence[rows], sample.step[rows])
    first = np.unique(step, return_index=True)[1]
    n_steps = np.bincount(run.steps["sequence"], minlength=len(run.sequences))[sample.sequence[rows][first]]
    problem = numbered(sample.sequence[rows][first])
    counts, *words = (
        np.bincount(step * n + path[rows], minlength=len(first) * n).reshape(-1, n).astype(float)
        for path in (fitted.path, *fitted.resampled_paths)
    )
    return _Steps(
        np.unique(run.steps["label"].to_numpy(dtype=str)),
        labels[rows][first],
        problem * PLACES + PLACES * sample.step[rows][first] // n_steps,
        stats.sequence_blocks(int(problem.max()) + 1, blocks=BLOCKS)[problem],
        counts,
        counts - np.mean(words, axis=0),
    )


def _labels(run: Run, fitted: Fitted) -> pd.DataFrame:
    steps = _held_out_steps(run, fitted)
    if steps is None:
        return pd.DataFrame()
    law, inside = steps.sums(np.ones(len(steps.codes), dtype=bool))
    ratio = stats.log2_ratio(inside, inside - law.deviation)
    left = [steps.sums(steps.unit != unit) for unit in range(int(steps.unit.max()) + 1)]
    low, high, _ = stats.jackknife_interval(ratio, np.array([stats.log2_ratio(n, n - each.deviation) for each, n in left]))
    p = np.where(inside.sum(axis=1, keepdims=True) > 0, law.p(least=1e-9), np.nan)
    tested = np.isfinite(p) & np.isfinite(low)
    columns = {"beyond_log2_ratio": ratio, "ci_low": low, "ci_high": high, "p": np.where(tested, p, np.nan)}
    table = _described("label", inside.T, steps.names)
    table = table.assign(**{name: value.T.ravel() for name, value in columns.items()})
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()))


def _finding(table: pd.DataFrame) -> Finding:
    labels = table[table["kind"] == "label"] if "q" in table else table[:0]
    tested = labels[labels["q"].notna()]
    shares = table.drop_duplicates("state")["share"]
    sizes = f"{len(shares)} states hold {percent(shares.min())} to {percent(shares.max())} of the tokens"
    if tested.empty:
        return Finding(sentence=f"{sizes}; no label of steps could be tested.", verdict=Verdict.CANNOT_TELL, rung=0)
    row = tested.sort_values(["q", "ci_low"], ascending=[True, False]).iloc[0]
    verdict, found = judge_cells(labels, least=LEAST_EFFECT), int((tested["q"] < DISCOVERY).sum())
    return Finding(
        sentence=(
            f"{sizes}. Of {len(tested)} pairs of state and label, {found} go together more or less than words, problem and "
            f"third "
            f"make them; surest, state {int(row['state'])} holds tokens of {row['name']} steps "
            f"{fold(row['beyond_log2_ratio'])} times as often (95 % interval {fold_interval(row)}; "
            f"{int(row['tokens']):,} tokens of {int(row['sequences']):,} problems)."
        ),
        verdict=verdict,
        rung=4 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["beyond_log2_ratio"]),
        unit="log2 ratio to what words, problem and third make",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


def _order(table: pd.DataFrame) -> pd.DataFrame:
    """State after state, labels before the rest, preferred first."""
    place = table["kind"].map({"label": 0, "family": 1, "token": 2, "expert": 3})
    return table.iloc[np.lexsort((-table["log2_ratio"], place, table["state"]))]


STATE_PROFILES = Analysis(
    function=state_profiles,
    question="What does each state of routing go with?",
    claim="Some states of routing hold tokens of a label's steps more or less often than words, problem and third make them.",
    method=(
        "States as in routing_states, on held-out problems; tokens of each step in a state, less those of routing that follows "
        "the tokens alone (each with the routing of another of its id), summed by label. Null: labels shuffled over whole "
        "steps inside problem and third, its law from "
        "exact moments; corrected over states and labels; intervals from a jackknife over problems."
    ),
    order=_order,
    finding=_finding,
)
