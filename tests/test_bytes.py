"""How many bytes a token takes on disk, for the shape of Ling-mini-2.0, and who can read them."""

import sys

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest

from ling_probe.run import Run
from ling_probe.spec import ModelSpec
from ling_probe.trace import RoutingTrace

TOKENS, LENGTH = 20_000, 500
SPEC = ModelSpec(
    name="ling-mini-shape", n_layers=20, routed_layers=tuple(range(1, 20)), n_experts=256, top_k=8, n_groups=8, topk_groups=4,
    scale=2.5, n_shared=1, d_model=2048, vocab_size=157_184,
)  # fmt: skip
BEST_BEFORE = 386
"""Bytes a token that ids and weights of this shape took in the best store measured before; raw they take 456."""


def routed(rng, n_tokens):
    """Ids and weights of one layer by the rule, a favourite expert chosen ten times as often as the median; ids independent."""
    liked = rng.normal(0, 0.6, 256).astype(np.float32)
    scores = 1 / (1 + np.exp(1.5 - liked - rng.normal(0, 1, (n_tokens, 256)).astype(np.float32)))
    choice = scores - 0.08 * liked
    best = np.sort(choice.reshape(n_tokens, 8, 32), axis=-1)[..., -2:].sum(-1)
    kept = best >= np.sort(best, axis=-1)[:, 4:5]
    choice = np.where(np.repeat(kept, 32, axis=1), choice, -np.inf)
    ids = np.argsort(-choice, axis=1)[:, :8]
    chosen = np.take_along_axis(scores, ids, axis=1)
    return ids.astype(np.uint8), (chosen / chosen.sum(1, keepdims=True) * 2.5).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = np.random.default_rng(0)
    layers = [routed(rng, TOKENS) for _ in SPEC.routed_layers]
    ids, weights = (np.stack(arrays, axis=1) for arrays in zip(*layers, strict=True))
    residual = np.cumsum(rng.lognormal(1, 0.3, (TOKENS, SPEC.n_layers)), axis=1).astype(np.float32)
    run = Run.create(tmp_path_factory.mktemp("bytes") / "run", spec=SPEC, model={}, benchmark={}, options={})
    vocabulary = rng.zipf(1.2, TOKENS) % SPEC.vocab_size
    run.append([_trace(start, ids, weights, residual, vocabulary, rng) for start in range(0, TOKENS, LENGTH)])
    return run


def _trace(start, ids, weights, residual, vocabulary, rng) -> RoutingTrace:
    place = slice(start, start + LENGTH)
    return RoutingTrace(
        spec=SPEC,
        sequence_id=f"sequence-{start}",
        token_ids=vocabulary[place].astype(np.int32),
        tokens=tuple(f" {each:x}" for each in vocabulary[place]),
        expert_ids=ids[place],
        weights=weights[place],
        segment=np.ones(LENGTH, np.uint8),
        step=np.full(LENGTH, -1, np.int16),
        loss=rng.exponential(1, LENGTH).astype(np.float32),
        extras={"residual": residual[place]},
    )


def entropy(values):
    """Bytes a value, by how often each occurs."""
    shares = np.unique(values, return_counts=True)[1] / values.size
    return float(-(shares * np.log2(shares)).sum() / 8)


def stored(run):
    """Bytes a token of each kind of column in tokens.parquet."""
    import pyarrow.parquet as pq

    sizes: dict[str, float] = {}
    with pq.ParquetFile(run.folder / "parts" / "00000" / "tokens.parquet") as file:
        group = file.metadata.row_group(0)
        assert file.metadata.num_row_groups == 1
        for column in (group.column(i) for i in range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            kind = name.rsplit("_", 1)[0] if name[-1].isdigit() else "token columns"
            sizes[kind] = sizes.get(kind, 0) + column.total_compressed_size / TOKENS
    return sizes


def test_ids_and_weights_take_no_more_than_the_best_before(run):
    sizes, (batch,) = stored(run), run.batches(weights=True)
    halves = batch.weights.astype(np.float16).view(np.uint16)
    floors = {
        "experts": sum(entropy(batch.expert_ids[:, row]) * 8 for row in range(19)),
        "weights": sum(entropy(halves[:, row, slot]) for row in range(19) for slot in range(8)),
    }
    for kind, raw in {"experts": 152, "weights": 304}.items():
        sys.stdout.write(f"\n{kind}: {sizes[kind]:.1f} bytes a token stored, {raw} raw, entropy {floors[kind]:.1f}")
    both = sizes["experts"] + sizes["weights"]
    whole = (run.folder / "parts" / "00000" / "tokens.parquet").stat().st_size / TOKENS
    rest = ", ".join(f"{kind} {sizes[kind]:.1f}" for kind in ("token columns", "residual"))
    sys.stdout.write(f"\nids and weights: {both:.1f} of 456 raw; with {rest}: the whole file {whole:.1f}\n")
    assert floors["experts"] < sizes["experts"] < 1.02 * floors["experts"]
    assert floors["weights"] < sizes["weights"] < 304
    assert both <= BEST_BEFORE
    assert sizes["residual"] < 0.9 * 4 * SPEC.n_layers
    assert 6.5 / 8 < floors["experts"] / 152 < 1


def test_pandas_polars_and_duckdb_read_every_encoding(run):
    (batch,) = run.batches(weights=True, columns=("residual", "loss"))
    file = run.folder / "parts" / "00000" / "tokens.parquet"
    wanted = {
        "experts_7": batch.expert_ids[:, 6], "weights_7": batch.weights[:, 6], "residual_0": batch.extra["residual"][:, 0],
        "loss": batch.extra["loss"],
    }  # fmt: skip
    frames = {
        "pandas": pd.read_parquet(file),
        "polars": pl.read_parquet(file),
        "duckdb": duckdb.sql(f"select {', '.join(wanted)} from '{file}'").df(),
    }
    for name, frame in frames.items():
        for column, values in wanted.items():
            found = frame[column].to_numpy()
            found = np.stack(found) if found.dtype == object else found
            np.testing.assert_array_equal(found.astype(values.dtype), values, err_msg=f"{name} {column}")
