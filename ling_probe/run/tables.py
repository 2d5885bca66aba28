"""What the Parquet files hold: traces into Arrow tables, and token tables back into arrays."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int16, Int32, UInt8, UInt16

from ling_probe.errors import RunError, UsageError
from ling_probe.spec import ModelSpec
from ling_probe.trace import EVERY_LAYER, SEGMENTS, RoutingTrace, extra_layers

_TEXTS = ("benchmark", "family", "split", "prompt", "completion", "answer", "predicted")
SEQUENCES = pa.schema(
    [("sequence_id", pa.string()), *((name, pa.string()) for name in _TEXTS), ("correct", pa.bool_()), ("meta", pa.string())]
)
STEPS = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("step", pa.int32()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("correct", pa.bool_()),
    ]
)
TOKEN_COLUMNS = ("token", "loss", "sequence_id")
"""Columns of tokens.parquet that a batch holds only when asked."""
WHOLE = ("residual", "shared")
"""Extras stored in 32 bits: one number a layer, and in large models past what 16 bits hold."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokens of one part, sequence after sequence, in order of position."""

    sequence: Int32[np.ndarray, "_N"]
    """Row in `Run.sequences`."""
    position: Int32[np.ndarray, "_N"]
    token_id: Int32[np.ndarray, "_N"]
    segment: UInt8[np.ndarray, "_N"]
    """Codes of `trace.SEGMENTS`."""
    step: Int16[np.ndarray, "_N"]
    """Step of the token's sequence, -1 in none."""
    expert_ids: UInt8[np.ndarray, "_N _M _K"] | UInt16[np.ndarray, "_N _M _K"]
    """Of the layers asked for, in the order asked."""
    weights: Float32[np.ndarray, "_N _M _K"] | None
    """Aligned with `expert_ids`; stored in 16 bits. None unless asked for."""
    extra: dict[str, np.ndarray]
    """By name asked: [N] of a token column, float32 [N M] or [N M n] of an extra; "residual" is [N L], over all decoder layers
    whatever layers are asked for."""


def to_tables(traces: Sequence[RoutingTrace], spec: ModelSpec) -> dict[str, pa.Table]:
    """The three tables of a part, by file name."""
    return {
        "sequences.parquet": pa.Table.from_pylist([_sequence_row(trace) for trace in traces], schema=SEQUENCES),
        "steps.parquet": pa.Table.from_pylist([row for trace in traces for row in _step_rows(trace)], schema=STEPS),
        "tokens.parquet": _token_table(traces, spec),
    }


def write_table(table: pa.Table, path: Path) -> str:
    """Write one file through to the disk and return its sha256."""
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd", compression_level=3, **_encodings(table.schema))
        file.flush()
        os.fsync(file.fileno())
    return file_digest(path)


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Bytes of 32-bit floats apart, so that exponents compress; every other column by a dictionary.

    Dictionaries bring expert ids to within 1 % of their entropy. 16-bit floats would gain a tenth with their bytes apart, and
    DuckDB does not read that.
    """
    apart = {field.name for field in schema if pa.types.is_float32(field.type)}
    leaves = [f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name for field in schema]
    return {
        "use_dictionary": [name for name in leaves if name not in apart],
        "column_encoding": dict.fromkeys(sorted(apart), "BYTE_STREAM_SPLIT"),
    }


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of one file, in the order asked.

    Raises:
        RunError: The file is damaged or lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow, columns or ())
            table = file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    return table if columns is None else table.select(columns)


def check_columns(path: Path, schema: pa.Schema, columns: Sequence[str]) -> None:
    """Refuse a file without some columns.

    Raises:
        RunError: One is missing.
    """
    if missing := set(columns) - set(schema.names):
        raise RunError(f"{path} lacks column {', '.join(sorted(missing))}, which its run should have; capture it again")


def unreadable(path: Path, error: Exception) -> RunError:
    """What to say of a file that could not be read."""
    reason = str(error).splitlines()[0]
    return RunError(f"{path} cannot be read ({reason}); it is damaged: copy the run again, or capture it again")


def read_batch(
    path: Path, spec: ModelSpec, sequence_ids: pd.Index, *, layers: Sequence[int], weights: bool, columns: Sequence[str]
) -> TokenBatch:
    """Some layers and columns of one tokens.parquet; `sequence_ids` gives the rows that its sequences have in the run."""
    extras = [name for name in columns if name not in TOKEN_COLUMNS]
    names = ["sequence_id", "position", "token_id", "segment", "step", *(name for name in columns if name in TOKEN_COLUMNS)]
    names += [f"{kind}_{layer}" for kind in ("experts", *(["weights"] if weights else [])) for layer in layers]
    names += [f"{name}_{layer}" for name in extras for layer in _layers_read(name, spec, layers)]
    table = read_table(path, list(dict.fromkeys(names))).combine_chunks()
    ids_shape = (table.num_rows, len(layers), spec.top_k)
    return TokenBatch(
        sequence=_codes(table["sequence_id"], sequence_ids).astype(np.int32),
        position=_numbers(table["position"]),
        token_id=_numbers(table["token_id"]),
        segment=_codes(table["segment"], pd.Index(SEGMENTS)).astype(np.uint8),
        step=_numbers(table["step"]),
        expert_ids=_stacked(table, "experts", layers, np.empty(ids_shape, spec.id_dtype)),
        weights=_stacked(table, "weights", layers, np.empty(ids_shape, np.float32)) if weights else None,
        extra={name: _extra(table, name, _layers_read(name, spec, layers)) for name in columns},
    )


def _sequence_row(trace: RoutingTrace) -> dict[str, Any]:
    try:
        meta = json.dumps(dict(trace.meta), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"meta of sequence {trace.sequence_id} holds plain finite JSON values only: {error}") from error
    texts = {name: getattr(trace, name) for name in _TEXTS}
    return {"sequence_id": trace.sequence_id, **texts, "correct": trace.correct, "meta": meta}


def _step_rows(trace: RoutingTrace) -> list[dict[str, Any]]:
    return [{"sequence_id": trace.sequence_id, **vars(span)} for span in trace.steps]


def _token_table(traces: Sequence[RoutingTrace], spec: ModelSpec) -> pa.Table:
    lengths = [trace.n_tokens for trace in traces]
    columns: dict[str, pa.Array] = {
        "sequence_id": _words(np.repeat(np.arange(len(traces)), lengths), [trace.sequence_id for trace in traces]),
        "position": pa.array(np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])),
        "token_id": pa.array(np.concatenate([trace.token_ids for trace in traces])),
        "token": pa.array([token for trace in traces for token in trace.tokens], pa.string()),
        "segment": _words(np.concatenate([trace.segment for trace in traces]), SEGMENTS),
        "step": pa.array(np.concatenate([trace.step for trace in traces])),
        "loss": pa.array(np.concatenate([trace.loss for trace in traces])),
    }
    for row, layer in enumerate(spec.routed_layers):
        ids = np.concatenate([trace.expert_ids[:, row] for trace in traces])
        columns[f"experts_{layer}"] = _column(ids.astype(spec.id_dtype))
        columns[f"weights_{layer}"] = _column(np.concatenate([trace.weights[:, row] for trace in traces]).astype(np.float16))
    for name in sorted(traces[0].extras):
        for row, layer in enumerate(extra_layers(name, spec)):
            values = np.concatenate([trace.extras[name][:, row] for trace in traces])
            exact = name in WHOLE
            columns[f"{name}_{layer}"] = _column(values.astype(np.float32) if exact else _halved(values, name, layer))
    return pa.table(columns)


def _words(codes: np.ndarray, words: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(words, pa.string()))


def _column(values: np.ndarray) -> pa.Array:
    """[N] as it is, [N n] as lists of a fixed size."""
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _halved(values: np.ndarray, name: str, layer: int) -> np.ndarray:
    # A wider column in one part alone would come back as infinity from readers that take all files for the first one's type.
    with np.errstate(over="ignore"):
        halved = values.astype(np.float16)
    if (lost := np.isfinite(values) & ~np.isfinite(halved)).any():
        largest = np.finfo(np.float16).max
        raise UsageError(
            f"extra {name!r} of layer {layer} reaches {np.abs(values[lost]).max():.4g}; it is stored in 16 bits, which end at "
            f"{largest:.0f}: capture into a new folder without it, or keep whole vectors with --activations"
        )
    return halved


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """[N] of a plain column, [N n] of a column of fixed-size lists."""
    array = column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def _codes(column: pa.ChunkedArray, words: pd.Index) -> np.ndarray:
    """Place of each entry of a dictionary column in `words`."""
    array = column.combine_chunks()
    places = words.get_indexer(array.dictionary.to_pylist())
    if (places < 0).any():
        unknown = array.dictionary[int(places.argmin())].as_py()
        raise RunError(f"tokens.parquet names {unknown!r}, which this run does not have; it is damaged: copy the run again")
    return places[array.indices.to_numpy()]


def _stacked(table: pa.Table, kind: str, layers: Sequence[int], into: np.ndarray) -> np.ndarray:
    for row, layer in enumerate(layers):
        into[:, row] = _numbers(table[f"{kind}_{layer}"])
    return into


def _layers_read(name: str, spec: ModelSpec, layers: Sequence[int]) -> Sequence[int]:
    """Layers whose columns of an extra are read; those of one that dense layers have too are all read."""
    return extra_layers(name, spec) if name in EVERY_LAYER else layers


def _extra(table: pa.Table, name: str, layers: Sequence[int]) -> np.ndarray:
    if name == "sequence_id":
        return table[name].combine_chunks().cast(pa.string()).to_numpy(zero_copy_only=False)
    if name in TOKEN_COLUMNS:
        return _numbers(table[name])
    rows = [_numbers(table[f"{name}_{layer}"]).astype(np.float32) for layer in layers]
    return np.stack(rows, axis=1) if rows else np.empty((table.num_rows, 0), np.float32)
