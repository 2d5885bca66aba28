"""Which way the tokens of a step, a family, a problem or a text take from layer to layer: the tables behind the page of paths.

1. Read whole problems once, every n-th of a long run, with each token's chosen experts, largest weight first.
2. Choose a set of tokens (`members`), or two.
3. Between neighbouring layers, count how many of them go from an expert to an expert of the next: by the leading expert, which
   has the largest weight, or by the first few, each token then spread over its pairs in proportion to their weights.
4. Beside each share, what independent layers would make of it: the product of the two experts' shares in the set.

Blocks of whole problems, left out in turn, give the intervals. Words are part of every share: a word that routes alike in two
layers ties them together (`layer_transition` takes that out), and sets of other words differ for their words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import COMPLETION, families
from ling_probe.analysis.counting import Owner, segment_mask
from ling_probe.analysis.enrichment import token_texts
from ling_probe.analysis.question import DISCOVERY
from ling_probe.analysis.sample import LEAST_UNITS
from ling_probe.analysis.transition import BLOCKS, LEAST_EXPECTED
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.run.one import find_sequence, lists, part_file, sequence_rows

MOST_LINKS = 300
"""Flows drawn at most."""
LEVELS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Shares of the tokens that a flow may have to reach to be drawn."""
EASY = 80
"""Flows that a first look shows at most."""
MEASURED = 1000
"""Flows of each two layers, the largest, that have intervals."""
MOST_PAIRS = 1_500_000
"""Pairs of experts counted between two layers; of a larger set every n-th problem is counted."""
OTHERS = -1
"""Stands for the experts that are not drawn by themselves."""


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """N tokens with the K experts that each layer chose for them, largest weight first."""

    sequence: Integer[np.ndarray, " N"]
    """Row in `Run.sequences`."""
    experts: Integer[np.ndarray, "N M K"]
    weights: Float[np.ndarray, "N M K"]
    layers: tuple[int, ...]
    n_experts: int

    def only(self, kept: Bool[np.ndarray, " N"]) -> Self:
        """The tokens kept."""
        return type(self)(self.sequence[kept], self.experts[kept], self.weights[kept], self.layers, self.n_experts)


@dataclass(frozen=True, eq=False)
class Paths:
    """Completion tokens of a run, of every n-th problem where it is long, and what they can be chosen by."""

    tokens: RoutedTokens
    token_id: Integer[np.ndarray, " N"]
    label: Integer[np.ndarray, " N"]
    """Of each token's step, a place in `labels`; -1 in none."""
    family: Integer[np.ndarray, " N"]
    labels: tuple[str, ...]
    families: tuple[str, ...]
    texts: pd.Series
    """Text of the token ids, the most frequent first."""
    whole: int
    """Tokens of the run, read or not."""


def read_paths(run: Run, *, most: int = 100_000) -> Paths:
    """Read a run once; memory is that of the tokens kept.

    Args:
        run: Any run of two routed layers or more.
        most: Of a longer run every n-th problem is kept, to about so many tokens.

    Raises:
        UsageError: There are no sequences, or no next layer.
    """
    names, family = families(run)
    if run.spec.n_rows < 2:
        raise UsageError(f"{run.spec.name} has {run.spec.n_rows} routed layer; a path needs a next one")
    labels, label_of = _labels(run)
    whole = sum(part.tokens for part in run.manifest.parts)
    completed = sum(int(segment_mask(batch, COMPLETION).sum()) for batch in run.batches(layers=[]))
    segments, stride = COMPLETION if completed else None, -(-(completed or whole) // most)
    columns = []
    for batch in run.batches(weights=True):
        kept = segment_mask(batch, segments) & (batch.sequence % stride == 0)
        columns.append((batch.sequence[kept], batch.token_id[kept], label_of(batch)[kept], *_by_weight(batch, kept)))
    sequence, token_id, label, experts, weights = (np.concatenate(each) for each in zip(*columns, strict=True))
    codes, counts = np.unique(token_id, return_counts=True)
    codes = codes[np.argsort(-counts, kind="stable")]
    texts = token_texts(run, codes)
    return Paths(
        RoutedTokens(sequence, experts, weights, run.spec.routed_layers, run.spec.n_experts),
        token_id,
        label,
        family[sequence],
        labels,
        tuple(map(str, names)),
        pd.Series([texts[code] for code in codes.tolist()], index=codes, dtype=object),
        whole,
    )


def problem_tokens(run: Run, sequence: int, layers: Sequence[int]) -> RoutedTokens:
    """The completion tokens of one problem in some layers, all tokens where it has no completion; only its part is opened.

    Raises:
        UsageError: There is no such row, or a layer has no router.
        RunError: A file is damaged.
    """
    for layer in layers:
        run.spec.row(layer)
    part, sequence_id = find_sequence(run, sequence)
    names = [f"{kind}_{layer}" for kind in ("experts", "weights") for layer in layers]
    rows = sequence_rows(part_file(run, part, "tokens"), sequence_id, ["segment", *names])
    segment = np.array(rows["segment"].to_pylist())
    kept = np.isin(segment, COMPLETION) if np.isin(segment, COMPLETION).any() else np.ones(len(segment), dtype=bool)
    experts, weights = (np.stack([lists(rows[f"{kind}_{layer}"])[kept] for layer in layers], axis=1) for kind in KINDS)
    return RoutedTokens(np.full(int(kept.sum()), sequence), *_sorted(experts, weights), tuple(layers), run.spec.n_experts)


KINDS = ("experts", "weights")


def members(paths: Paths, kind: str, value: str = "") -> Bool[np.ndarray, " N"]:
    """Which tokens are of a kind: "all", of a "label", of a "family", or of a "text".

    Raises:
        UsageError: There are none.
    """
    if kind == "all":
        return np.ones(len(paths.token_id), dtype=bool)
    if kind == "label":
        found = paths.label == _place(paths.labels, value)
    elif kind == "family":
        found = paths.family == _place(paths.families, value)
    else:
        found = np.isin(paths.token_id, paths.texts.index[paths.texts == value])
    if not found.any():
        raise UsageError(f'no token of {kind} "{value}" among the {len(found):,} read')
    return found


def outside(paths: Paths, kind: str, value: str = "") -> Bool[np.ndarray, " N"]:
    """The tokens to compare others with: those in steps of other labels where it is a label, else all others.

    Args:
        paths: The tokens read.
        kind: As in `members`, or "problem".
        value: Which; of a problem its row in `Run.sequences`, as text.

    Raises:
        UsageError: There are none.
    """
    inside = paths.tokens.sequence == int(value) if kind == "problem" else members(paths, kind, value)
    found = ~inside & (paths.label >= 0) if kind == "label" else ~inside
    if not found.any():
        raise UsageError("no other tokens to compare these with")
    return found


def flow_table(tokens: RoutedTokens, layers: Sequence[int], *, top: int = 1) -> pd.DataFrame:
    """How many of the tokens go from which expert to which of the next layer.

    One row a layer, expert and expert of the next layer (`next_layer`, `next_expert`) that some token connects, the largest
    first by layer: `share` of the tokens with its 95 % interval (`ci_low`, `ci_high`), `expected` if the layers were
    independent, `log2_lift` of the two (half a token added to both) with its interval (`lift_low`, `lift_high`). Intervals are
    from a jackknife over blocks of problems, for the 1,000 largest of each two layers; fewer than 10 problems have none, nor
    has a lift expected of fewer than 20 tokens. `tokens` and `problems` say how many were counted: every n-th problem of a set
    with too many pairs to count while one waits.

    Args:
        tokens: A set.
        layers: Routed layers one after the other, two or more.
        top: Experts counted of each token and layer; 1 is the leading one.
    """
    tokens = _thinned(tokens, top)
    block, n_blocks, problems = _blocks(tokens.sequence)
    tables = []
    for here, there, joint in _joints(tokens, layers, top, block, n_blocks):
        tables.append(_flows(joint, problems).assign(layer=here, next_layer=there))
    table = pd.concat(tables, ignore_index=True).assign(tokens=len(tokens.sequence), problems=problems)
    front = ["layer", "expert", "next_layer", "next_expert"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


def difference_table(one: RoutedTokens, other: RoutedTokens, layers: Sequence[int], *, top: int = 1) -> pd.DataFrame:
    """Where the tokens of one set go more, and where less, than those of another.

    Rows and `top` as in `flow_table`: `share` in the first set and `other_share` in the second, `difference` of the two with
    its 95 % interval (`ci_low`, `ci_high`) and `p`, from a jackknife over blocks of the problems of both, `q` corrected over
    the tested rows (Benjamini-Hochberg). Rows of fewer than 20 expected tokens in either set, if both went alike, are not
    tested, nor is anything of fewer than 10 problems. Surest differences first.
    """
    one, other = _thinned(one, top), _thinned(other, top)
    block, n_blocks, problems = _blocks(np.concatenate([one.sequence, other.sequence]))
    sides = [(one, block[: len(one.sequence)]), (other, block[len(one.sequence) :])]
    joints = [_joints(side, layers, top, its, n_blocks) for side, its in sides]
    tables = []
    for (here, there, mine), (_, _, theirs) in zip(*joints, strict=True):
        tables.append(_differences(mine, theirs, problems).assign(layer=here, next_layer=there))
    table = pd.concat(tables, ignore_index=True).assign(problems=problems)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    order = np.lexsort((-table["difference"].abs(), table["q"].fillna(2.0)))
    front = ["layer", "expert", "next_layer", "next_expert"]
    return table.iloc[order][[*front, *(name for name in table.columns if name not in front)]].reset_index(drop=True)


def drawn_flows(table: pd.DataFrame, *, least: float, most: int = MOST_LINKS) -> pd.DataFrame:
    """The flows of a `flow_table` that reach a share, the largest `most` of them, and what is left as flows of the others.

    Rows as there; `OTHERS` stands for a layer's experts that none of the drawn flows touches, and for what leaves or reaches
    an expert by flows too small to draw. Where that is more than the layer holds, the next largest are drawn too. So every
    expert is as high as its share of the tokens, and every two layers add up.
    """
    passing = table[table["share"] >= least].nlargest(most, "share", keep="first")
    ends = {(int(layer), int(expert)) for layer, expert in passing[["layer", "expert"]].to_numpy()}
    ends |= {(int(layer), int(expert)) for layer, expert in passing[["next_layer", "next_expert"]].to_numpy()}
    return pd.concat([_drawn(rows, passing.index, ends) for _, rows in table.groupby("layer")], ignore_index=True)


def suggested_level(table: pd.DataFrame) -> float:
    """The smallest of `LEVELS` that leaves few enough flows for a first look."""
    return next((level for level in LEVELS if (table["share"] >= level).sum() <= EASY), LEVELS[-1])


def counted(table: pd.DataFrame, least: float, *, most: int = MOST_LINKS) -> tuple[int, int]:
    """How many flows that reach a share `drawn_flows` draws, and how many there are."""
    reach = int((table["share"] >= least).sum())
    return min(reach, most), reach


def told_differences(table: pd.DataFrame) -> str:
    """A `difference_table` in a sentence."""
    found, tested = int((table["q"] < DISCOVERY).sum()), int(table["p"].count())
    if not tested:
        return f"No way is taken often enough to be tested: that needs {LEAST_EXPECTED:.0f} tokens of the smaller set."
    row = table.iloc[0]
    said = f"{found:,} of {tested:,} tested ways are taken more or less often (q below 0.05)."
    if not found:
        return said
    return (
        f"{said} The surest leads from expert {row['expert']:.0f} of layer {row['layer']:.0f} to {row['next_expert']:.0f} of "
        f"layer {row['next_layer']:.0f}: {row['share']:.2%} of the tokens against {row['other_share']:.2%}, a difference of "
        f"{row['difference']:+.2%} (95 % interval {row['ci_low']:+.2%} to {row['ci_high']:+.2%})."
    )


def _drawn(rows: pd.DataFrame, passing: pd.Index, ends: set[tuple[int, int]]) -> pd.DataFrame:
    """Drawn flows between two layers, then what they leave: out of drawn experts, into drawn ones, between the others."""
    here, there = int(rows["layer"].iloc[0]), int(rows["next_layer"].iloc[0])
    by_share = rows.sort_values("share", ascending=False, kind="stable")
    from_drawn, to_drawn = (
        [(layer, end) in ends for end in by_share[name]] for layer, name in ((here, "expert"), (there, "next_expert"))
    )
    touched = by_share["share"].where(np.logical_and(from_drawn, to_drawn), 0.0)
    drawn = by_share.index.isin(passing)
    # What goes between two drawn experts unseen is counted where it leaves and where it arrives.
    unseen = (touched.where(~drawn, 0.0)[::-1].cumsum()[::-1]).to_numpy()
    room = by_share.loc[~np.logical_or(from_drawn, to_drawn), "share"].sum()
    drawn |= (touched.to_numpy() > 0) & (unseen > room)
    kept, hidden = by_share[drawn], by_share.assign(shown=drawn)
    left = hidden[~drawn & np.array(from_drawn)].groupby("expert")["share"].sum()
    reached = hidden[~drawn & np.array(to_drawn)].groupby("next_expert")["share"].sum()
    between = max(0.0, by_share["share"].sum() - kept["share"].sum() - left.sum() - reached.sum())
    found = [(expert, OTHERS, share) for expert, share in left.items()]
    found += [(OTHERS, expert, share) for expert, share in reached.items()]
    grey = pd.DataFrame([*found, (OTHERS, OTHERS, between)], columns=["expert", "next_expert", "share"])
    return pd.concat([kept, grey[grey["share"] > 1e-9].assign(layer=here, next_layer=there)])


def _thinned(tokens: RoutedTokens, top: int) -> RoutedTokens:
    """The tokens of every n-th problem, few enough to count all their pairs while a reader waits."""
    stride = -(-len(tokens.sequence) * top**2 // MOST_PAIRS)
    _, place = np.unique(tokens.sequence, return_inverse=True)
    return tokens if stride <= 1 else tokens.only(place % stride == 0)


def _joints(
    tokens: RoutedTokens, layers: Sequence[int], top: int, block: Integer[np.ndarray, " N"], n_blocks: int
) -> Iterator[tuple[int, int, Float64[np.ndarray, "J E E"]]]:
    """Tokens by block, expert and next expert of each two neighbouring layers."""
    n = tokens.n_experts
    for here, there in pairwise(layers):
        first, second = (tokens.layers.index(layer) for layer in (here, there))
        one, two = (tokens.experts[:, row, :top].astype(np.int64) for row in (first, second))
        cells = (block[:, None, None] * n + one[:, :, None]) * n + two[:, None, :]
        share = None
        if top > 1:
            parts = [_normed(tokens.weights[:, row, :top]) for row in (first, second)]
            share = (parts[0][:, :, None] * parts[1][:, None, :]).ravel()
        counts = np.bincount(cells.ravel(), weights=share, minlength=n_blocks * n * n)
        yield here, there, counts.reshape(n_blocks, n, n).astype(np.float64)


def _normed(weights: Float[np.ndarray, "N k"]) -> Float64[np.ndarray, "N k"]:
    held = weights.astype(np.float64)
    return held / np.maximum(held.sum(axis=1, keepdims=True), 1e-12)


def _blocks(sequence: Integer[np.ndarray, " N"]) -> tuple[Integer[np.ndarray, " N"], int, int]:
    """Block of each token's problem, and how many blocks and problems there are."""
    problems, place = np.unique(sequence, return_inverse=True)
    block_of = stats.sequence_blocks(len(problems), blocks=BLOCKS)
    return block_of[place], int(block_of.max()) + 1, len(problems)


def _flows(joint: Float64[np.ndarray, "J E E"], problems: int) -> pd.DataFrame:
    whole = joint.sum(axis=0)
    expert, following = np.nonzero(whole)
    order = np.argsort(-whole[expert, following], kind="stable")
    expert, following = expert[order], following[order]
    share, lift, expected = _share_and_lift(whole, expert, following)
    table = pd.DataFrame({"expert": expert, "next_expert": following, "share": share, "expected": expected, "log2_lift": lift})
    largest = slice(0, MEASURED if problems >= LEAST_UNITS else 0)
    shares, lifts, _ = _share_and_lift(whole - joint, expert[largest], following[largest])
    low, high, _ = stats.jackknife_interval(share[largest], shares)
    lift_low, lift_high, _ = stats.jackknife_interval(lift[largest], lifts)
    tested = expected[largest] * whole.sum() >= LEAST_EXPECTED
    columns = {"ci_low": low, "ci_high": high}
    columns |= {name: np.where(tested, bound, np.nan) for name, bound in (("lift_low", lift_low), ("lift_high", lift_high))}
    return table.join(pd.DataFrame(columns))


def _share_and_lift(
    counts: Float64[np.ndarray, "*J E E"], expert: Integer[np.ndarray, " R"], following: Integer[np.ndarray, " R"]
) -> tuple[Float64[np.ndarray, "*J R"], Float64[np.ndarray, "*J R"], Float64[np.ndarray, "*J R"]]:
    """Share of some pairs, log2 of it over that of independent layers, and the latter."""
    n = np.maximum(counts.sum(axis=(-2, -1)), 1e-12)[..., None]
    expected = counts.sum(axis=-1)[..., expert] * counts.sum(axis=-2)[..., following] / n
    count = counts[..., expert, following]
    return count / n, stats.log2_ratio(count, expected), expected / n


def _differences(one: Float64[np.ndarray, "J E E"], other: Float64[np.ndarray, "J E E"], problems: int) -> pd.DataFrame:
    whole = np.stack([one.sum(axis=0), other.sum(axis=0)])
    expert, following = np.nonzero(whole.sum(axis=0))
    n = whole.sum(axis=(1, 2))
    share = whole[:, expert, following] / n[:, None]
    pooled = whole.sum(axis=0)[expert, following] / n.sum() * n.min()
    table = pd.DataFrame({"expert": expert, "next_expert": following, "share": share[0], "other_share": share[1]})
    table["difference"] = share[0] - share[1]
    tested = np.flatnonzero(pooled >= LEAST_EXPECTED) if problems >= LEAST_UNITS else np.empty(0, np.int64)
    pairs = expert[tested], following[tested]
    without = [_share_and_lift(side.sum(axis=0) - side, *pairs)[0] for side in (one, other)]
    low, high, p = stats.jackknife_interval(table["difference"].to_numpy()[tested], without[0] - without[1])
    return table.join(pd.DataFrame({"ci_low": low, "ci_high": high, "p": p}, index=tested))


def _labels(run: Run) -> tuple[tuple[str, ...], Owner]:
    steps = run.steps
    names, codes = np.unique(steps["label"].to_numpy(dtype=str), return_inverse=True)
    first = np.searchsorted(steps["sequence"].to_numpy(), np.arange(len(run.sequences)))

    def label_of(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        inside = batch.step >= 0
        label = np.full(len(batch.step), -1)
        label[inside] = codes[first[batch.sequence[inside]] + batch.step[inside]]
        return label

    return tuple(map(str, names)), label_of


def _by_weight(batch: TokenBatch, kept: Bool[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray]:
    assert batch.weights is not None
    return _sorted(batch.expert_ids[kept], batch.weights[kept])


def _sorted(experts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts and 16-bit weights, largest first; equal weights keep the router's order."""
    order = np.argsort(-weights.astype(np.float32), axis=-1, kind="stable")
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1).astype(np.float16)


def _place(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)
