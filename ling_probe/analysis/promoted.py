"""Which following tokens each expert of a layer raises directly more than the other chosen experts do, and which less.

The run keeps what every chosen expert adds directly to the logit of the token that really followed (`attribution`). For each
expert and id of the following token, compare the mean with that of the other chosen experts before the same id: what the layer
as a whole does to it drops out. The best of thousands of ids looks good on noise alone, so for each expert:

1. rank ids on one half of the sequences and take the first few and the last few;
2. measure those on the other half.

Only tokens that followed can be seen: an expert may raise others that never came.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.attribution import next_segments
from ling_probe.analysis.classified import COMPLETION
from ling_probe.analysis.contributions import layer_batches, require_extra
from ling_probe.analysis.enrichment import token_texts
from ling_probe.analysis.sample import LEAST_UNITS, two_halves
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.trace import SEGMENTS

PICKING = 0
"""Place of the half that picks; the blocks of the other follow."""
_COMPLETION = [SEGMENTS.index(name) for name in COMPLETION]


def promoted_tokens(
    run: Run, layer: int, *, top: int = 5, least: int = 20, most: int = 200_000, blocks: int = 20, seed: int = 0
) -> pd.DataFrame:
    """The following tokens that each expert of one layer directly raises most, and least, against its company.

    One row an expert and token id (`code`, `token` its text), `top` of each `kind` ("raised", "lowered"), as they were ranked
    on one half of the sequences. On the other half: `count` choices, `mean` direct attribution in logits, `others` the mean of
    the other chosen experts before the same token, `beyond` their difference with `ci_low` and `ci_high` its 95 % interval and
    `p`, from a jackknife over blocks of sequences, and `q` corrected over the layer's rows (Benjamini-Hochberg). Fewer than 10
    held-out sequences give no interval.

    Args:
        run: A run captured with --keep lens.
        layer: A decoder layer.
        top: Tokens of each kind.
        least: Choices that an expert and token need on the half that ranks.
        most: Of a longer run every n-th sequence is read, to about so many tokens.
        blocks: Blocks of sequences for the jackknife.
        seed: Of the halves.

    Raises:
        UsageError: Attributions were not kept, or no token is frequent enough.
    """
    run.spec.row(layer)
    require_extra(run, "lens", "lens")
    stride = max(1, -(-sum(part.tokens for part in run.manifest.parts) // most))
    block_of, n_blocks = _blocks(len(run.sequences), stride, blocks, seed)
    counts, totals = _sums(run, layer, block_of, n_blocks)
    pairs = _picked(counts[: run.spec.n_experts], totals[: run.spec.n_experts], top, least)
    if pairs.empty:
        raise UsageError(f"no expert of layer {layer} is chosen {least} times before the same token; capture more problems")
    table = pairs.assign(layer=layer, **_measured(counts, totals, pairs, run.spec.n_experts, n_blocks))
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    texts = token_texts(run, table["code"].unique())
    table = table.assign(token=[texts[code] for code in table["code"]], seed=seed)
    front = ["layer", "expert", "kind", "token", "code"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


def _blocks(n_sequences: int, stride: int, blocks: int, seed: int) -> tuple[Integer[np.ndarray, " S"], int]:
    """Place of each sequence: `PICKING`, a block of the other half, or -1 where it is not read."""
    read = np.arange(0, n_sequences, stride)
    other = read[~two_halves(read, seed=seed)]
    place = np.full(n_sequences, -1)
    place[read] = PICKING
    if len(other):
        place[other] = 1 + stats.sequence_blocks(len(other), blocks=blocks)
    return place, int(place.max()) + 1


def _sums(
    run: Run, layer: int, block_of: Integer[np.ndarray, " S"], n_blocks: int
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Choices and summed attributions, a row a block and expert, a column an id of the token that followed."""
    n_experts, shape = run.spec.n_experts, (n_blocks * run.spec.n_experts, run.spec.vocab_size)
    counts, totals = sparse.csr_array(shape), sparse.csr_array(shape)
    for batch, lens in layer_batches(run, layer, ["lens"]):
        block = block_of[batch.sequence]
        kept = (block >= 0) & np.isin(next_segments(batch), _COMPLETION)
        row = block[kept, None] * n_experts + batch.expert_ids[kept, 0]
        column = np.repeat(_following(batch)[kept], row.shape[1])
        values, place = lens[kept].ravel().astype(np.float64), (row.ravel(), column)
        counts += sparse.coo_array((np.ones(len(values)), place), shape=shape).tocsr()
        totals += sparse.coo_array((values, place), shape=shape).tocsr()
    return counts, totals


def _following(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
    """Id of the token after; the last of a sequence has that of another and does not count."""
    return np.append(batch.token_id[1:], batch.token_id[-1:])


def _picked(counts: sparse.csr_array, totals: sparse.csr_array, top: int, least: int) -> pd.DataFrame:
    """Experts and ids that stand out most on the half that ranks."""
    codes = np.flatnonzero(counts.sum(axis=0) >= least)
    count, total = (each.tocsc()[:, codes].toarray() for each in (counts, totals))
    beyond = _beyond(total, count, total.sum(axis=0), count.sum(axis=0))[0]
    beyond = np.where(count >= least, beyond, np.nan)
    found = []
    for kind, sign in (("raised", -1), ("lowered", 1)):
        order = np.argsort(sign * beyond, axis=1, kind="stable")[:, :top]
        expert, place = np.repeat(np.arange(len(order)), order.shape[1]), order.ravel()
        kept = sign * beyond[expert, place] < 0
        found.append(pd.DataFrame({"expert": expert[kept], "kind": kind, "code": codes[place[kept]]}))
    return pd.concat(found).sort_values("expert", kind="stable").reset_index(drop=True)


def _measured(
    counts: sparse.csr_array, totals: sparse.csr_array, pairs: pd.DataFrame, n_experts: int, n_blocks: int
) -> dict[str, np.ndarray]:
    code, blocks = pairs["code"].to_numpy(), range(PICKING + 1, n_blocks)
    own, every = [], []
    for matrix in (totals, counts):
        pieces = [matrix[block * n_experts : (block + 1) * n_experts].tocsc()[:, code] for block in blocks]
        own.append(np.array([piece[pairs["expert"].to_numpy(), np.arange(len(code))] for piece in pieces]))
        every.append(np.array([piece.sum(axis=0) for piece in pieces]))
    sums = np.stack([*own, *every])
    whole = sums.sum(axis=1)
    beyond, mean, others = _beyond(*whole)
    left_out = _beyond(*(whole[:, None] - sums))[0]
    low, high, p = stats.jackknife_interval(beyond, left_out)
    tested = ~np.isnan(left_out).any(axis=0) & (len(blocks) >= LEAST_UNITS)
    interval = {name: np.where(tested, values, np.nan) for name, values in (("ci_low", low), ("ci_high", high), ("p", p))}
    return {"count": whole[1].astype(np.int64), "mean": mean, "others": others, "beyond": beyond, **interval}


def _beyond(
    total: Float64[np.ndarray, "*rest"],
    count: Float64[np.ndarray, "*rest"],
    all_total: Float64[np.ndarray, "*some"],
    all_count: Float64[np.ndarray, "*some"],
) -> tuple[Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"]]:
    """Own mean less that of the others, and both means; NaN where there are none."""
    mean, others = _mean(total, count), _mean(all_total - total, all_count - count)
    return mean - others, mean, others


def _mean(total: Float64[np.ndarray, "*rest"], count: Float64[np.ndarray, "*rest"]) -> Float64[np.ndarray, "*rest"]:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
