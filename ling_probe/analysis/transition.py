"""Whether the experts of one layer tell which the next layer takes, beyond what the token tells of both.

For each pair of neighbouring routed layers, over tokens:

1. pair each token with one of the same id from another sequence, drawn at random inside a block of sequences;
2. count how often an expert of the first layer and one of the second were chosen by the same token of a pair;
3. count the same across the pair, the first layer's choice of one with the second's of the other, both ways: what the token
   alone ties together. Both counts hold the same choices, so that only their company differs;
4. the mutual information of a random chosen expert of either layer, in bits, from the counts of 2, and from those of 3;
5. both overstate: a jackknife over the blocks takes the bias out and gives the interval.

Both routers read the same residual stream, so that what is left beyond the token is what they read from the context; the first
expert need not cause the second.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, judge, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_EXPECTED = 20.0
"""A transition expected less often is too rare to test: about one token a block."""
LEAST_EFFECT = 0.01
"""Mutual information in bits below which a tie is not worth having."""
BLOCKS = 20
LEAST_SEQUENCES = 3
"""Of a block: shorter runs have fewer blocks."""


def layer_transition(run: Run, *, most_tokens: int = 100_000, seed: int = 0) -> pd.DataFrame:
    """How often tokens go from an expert of one layer to one of the next, beside what their ids make of it.

    One row a layer and next routed layer, expert and next expert: `count` tokens that chose both, `probability` of the next
    expert given the first, `expected` count with the next layer's choice of the same token in another sequence, `log2_ratio` of
    the two counts (half a token added to each) with its 95 % interval (`ci_low`, `ci_high`), `p` for their difference, both
    from a jackknife over blocks of sequences, and `q` corrected over all tested rows (Benjamini-Hochberg). Transitions expected
    fewer than 20 times have no interval and no p.

    Per pair of layers, the same in all its rows, in bits: `information` that a chosen expert gives about one of the next layer,
    `token_information` that the token id gives of it, `beyond_token` the difference, with its interval (`beyond_low`,
    `beyond_high`) and `layer_p`; all without their bias. `tokens` counts those that found a partner; others are left out.

    Args:
        run: A run of two routed layers or more, and two sequences.
        most_tokens: Of a longer run every n-th sequence is read, to about so many tokens.
        seed: Of the places elsewhere.

    Raises:
        UsageError: There is no next layer, or no token that another sequence has too.
    """
    require_sequences(run)
    layers = run.spec.routed_layers
    if len(layers) < 2:
        raise UsageError(f"{run.spec.name} has {len(layers)} routed layer; a transition needs a next one")
    sample = _sample(run, most_tokens, seed)
    if not sample.tokens:
        raise UsageError(f"{run.folder} has no token that two of its sequences share; capture more of them")
    tables = [
        _transition(sample, row, run.spec.n_experts).assign(layer=here, next_layer=there)
        for row, (here, there) in enumerate(pairwise(layers))
    ]
    table = pd.concat(tables, ignore_index=True).assign(tokens=sample.tokens, seed=seed)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    front = ["layer", "next_layer", "expert", "next_expert"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs of tokens of one id and two sequences, sorted by block of sequences."""

    one: Integer[np.ndarray, "P M K"]
    other: Integer[np.ndarray, "P M K"]
    bounds: Integer[np.ndarray, " J1"]
    """Where each block begins, and where the last ends."""

    @property
    def tokens(self) -> int:
        """Of all pairs."""
        return 2 * len(self.one)


def _sample(run: Run, most_tokens: int, seed: int) -> Sample:
    stride = -(-sum(part.tokens for part in run.manifest.parts) // most_tokens)
    taken = [
        (batch.sequence[kept], batch.token_id[kept], batch.expert_ids[kept])
        for batch in run.batches()
        for kept in [batch.sequence % stride == 0]
    ]
    sequence, token_id, ids = (np.concatenate(each) for each in zip(*taken, strict=True))
    n_blocks = min(BLOCKS, -(-len(run.sequences) // stride) // LEAST_SEQUENCES)
    block = sequence // stride % max(n_blocks, 1)
    one, other = same_token_pairs(token_id, sequence, block, np.random.default_rng(seed))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(block[one], minlength=1))])
    return Sample(ids[one], ids[other], np.unique(bounds))


def same_token_pairs(
    token_id: Integer[np.ndarray, " N"],
    sequence: Integer[np.ndarray, " N"],
    block: Integer[np.ndarray, " N"],
    rng: np.random.Generator,
) -> tuple[Integer[np.ndarray, " P"], Integer[np.ndarray, " P"]]:
    """Places of random pairs of one token id and block and two sequences, by block; no token is in two pairs."""
    order = np.lexsort((rng.random(len(token_id)), token_id, block))
    new = np.diff(token_id[order], prepend=-1).astype(bool) | np.diff(block[order], prepend=-1).astype(bool)
    start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    first = np.flatnonzero((np.arange(len(order)) - start) % 2 == 0)[:, None] + [0, 1]
    first = first[first[:, 1] < len(order)]
    first = first[~new[first[:, 1]]]
    one, other = order[first].T
    two_sequences = sequence[one] != sequence[other]
    return one[two_sequences], other[two_sequences]


def _transition(sample: Sample, row: int, n_experts: int) -> pd.DataFrame:
    true = _joint(sample, row, n_experts, (sample.one, sample.other))
    token = _joint(sample, row, n_experts, (sample.other, sample.one))
    count, expected = true.sum(axis=0), token.sum(axis=0)
    ratio = stats.log2_ratio(count, expected)
    low, high, _ = stats.jackknife_interval(ratio, stats.log2_ratio(count - true, expected - token))
    _, _, p = stats.jackknife_interval(_excess(count, expected), _excess(count - true, expected - token))
    tested = expected >= LEAST_EXPECTED
    chosen = count.sum(axis=1) / sample.one.shape[-1]
    expert, following = (each.ravel() for each in np.indices(count.shape))
    columns = {
        "expert": expert,
        "next_expert": following,
        "count": count.ravel().astype(np.int64),
        "probability": (count / np.maximum(chosen, 1)[:, None]).ravel(),
        "expected": expected.ravel(),
        "log2_ratio": ratio.ravel(),
        **{name: np.where(tested, each, np.nan).ravel() for name, each in (("ci_low", low), ("ci_high", high), ("p", p))},
        **_information(true, token),
    }
    return pd.DataFrame(columns)


def _excess(count: Float64[np.ndarray, "*J E E"], expected: Float64[np.ndarray, "*J E E"]) -> Float64[np.ndarray, "*J E E"]:
    """Tokens that chose both beyond the expected, as a share of all counted: a total shrinks with each block left out."""
    return (count - expected) / np.maximum(count.sum(axis=(-2, -1), keepdims=True), 1)


def _joint(
    sample: Sample, row: int, n_experts: int, following: tuple[Integer[np.ndarray, "P M K"], Integer[np.ndarray, "P M K"]]
) -> Float64[np.ndarray, "J E E"]:
    """Tokens that chose both experts by block, when the next layer's choice is that of `following`."""
    counts = np.zeros((len(sample.bounds) - 1, n_experts**2))
    for ids, after in zip((sample.one, sample.other), following, strict=True):
        first, second = ids[:, row].astype(np.int32) * n_experts, after[:, row + 1].astype(np.int32)
        for block, (start, stop) in enumerate(pairwise(sample.bounds)):
            cells = first[start:stop, :, None] + second[start:stop, None, :]
            counts[block] += np.bincount(cells.ravel(), minlength=n_experts**2)
    return counts.reshape(-1, n_experts, n_experts)


def _information(true: Float64[np.ndarray, "J E E"], token: Float64[np.ndarray, "J E E"]) -> dict[str, float]:
    both = np.stack([true, token])
    whole = mutual_information(both.sum(axis=1))
    without = np.stack([mutual_information(both.sum(axis=1) - both[:, block]) for block in range(len(true))])
    bias = (len(true) - 1) * (without.mean(axis=0) - whole)
    low, high, p = stats.jackknife_interval(whole[0] - whole[1], without[:, 0] - without[:, 1])
    beyond = whole[0] - bias[0] - (whole[1] - bias[1])
    shift = beyond - (whole[0] - whole[1])
    return {
        "information": whole[0] - bias[0],
        "token_information": whole[1] - bias[1],
        "beyond_token": beyond,
        "beyond_low": float(low + shift),
        "beyond_high": float(high + shift),
        "layer_p": float(p),
    }


def mutual_information(counts: Float64[np.ndarray, "*rows E F"]) -> Float64[np.ndarray, "*rows"]:
    """Mutual information in bits of the two axes of a table of counts, its bias left in.

    >>> mutual_information(np.eye(4)), mutual_information(np.ones((4, 4)))
    (np.float64(2.0), np.float64(0.0))
    """
    total = np.maximum(counts.sum(axis=(-2, -1), keepdims=True), 1)
    joint = counts / total
    apart = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    seen = joint > 0
    return (joint * np.log2(np.divide(joint, apart, out=np.ones_like(joint), where=seen))).sum(axis=(-2, -1))


def _finding(table: pd.DataFrame) -> Finding:
    pairs = table.drop_duplicates("layer")
    pairs = pairs.assign(layer_q=stats.benjamini_hochberg(pairs["layer_p"].to_numpy()))
    best = pairs.iloc[int(np.argmax(pairs["beyond_token"]))]
    found = table[table["q"] < DISCOVERY]
    sentence = (
        f"Layer {best['layer']:.0f} tells most of the next: an expert gives {best['information']:.3f} bits about one of layer "
        f"{best['next_layer']:.0f}, {best['beyond_token']:.3f} beyond the token (95 % interval {best['beyond_low']:.3f} to "
        f"{best['beyond_high']:.3f}; {best['tokens']:,.0f} tokens). {len(found):,} of {table['p'].count():,} transitions are "
        "more or less common than the token makes them (q below 0.05)"
    )
    if len(found):
        row = surest_first(found).iloc[0]
        sentence += (
            f"; the surest goes from expert {row['expert']:.0f} of layer {row['layer']:.0f} to {row['next_expert']:.0f} of "
            f"layer {row['next_layer']:.0f}, {fold(row['log2_ratio'])} times as often (95 % interval {fold_interval(row)})"
        )
    verdict = judge(best["beyond_low"], best["beyond_high"], least=LEAST_EFFECT, q=best["layer_q"])
    return Finding(
        sentence=f"{sentence}.",
        verdict=verdict if best["beyond_token"] > 0 or verdict is not Verdict.SUPPORTED else Verdict.NOT_SUPPORTED,
        rung=3 if verdict is Verdict.SUPPORTED else 1,
        effect=float(best["beyond_token"]),
        unit="bits",
        ci_low=float(best["beyond_low"]),
        ci_high=float(best["beyond_high"]),
        q=float(best["layer_q"]),
        token_effect=float(best["token_information"]),
    )


LAYER_TRANSITION = Analysis(
    function=layer_transition,
    question="Does an expert of one layer tell which the next layer takes?",
    claim="In some layer the chosen experts tell of the next layer's, beyond the token.",
    method=(
        "Mutual information of the chosen experts of neighbouring routed layers, in bits. Null: the next layer's choice is "
        "taken from the same token in another sequence; bias, interval and p from a jackknife over blocks of sequences, p of "
        "single transitions corrected over all (Benjamini-Hochberg)."
    ),
    order=surest_first,
    finding=_finding,
)
