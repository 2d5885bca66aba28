"""What activations.safetensors holds: vectors of chosen sites, and which token each belongs to.

    SITE.sequence   int32 [N]     row of the part's sequences.parquet
    SITE.position   int32 [N]     place of the token in its sequence
    SITE.vectors    [N D]         in the model's own number type: F32, F16 or BF16

for each site, such as ``residual:3``; rows are in the order of sequences and positions. The file is written and read one piece
at a time, whatever its size, which the usual libraries do not do; they all read it.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ling_probe.errors import RunError, UsageError
from ling_probe.run.tables import file_digest
from ling_probe.trace import RoutingTrace, as_float32

PIECE = 1 << 25
"""About so many bytes of vectors are read at a time."""
_Entry = tuple[np.dtype[Any], tuple[int, ...]]
"""Type and shape of a tensor."""
_CODES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32"}
"""Of the format, by NumPy's name."""


class ActivationBatch(NamedTuple):
    """Some vectors of one site, in the order of sequences and positions."""

    sequence: Int32[np.ndarray, " N"]
    """Row in `Run.sequences`."""
    position: Int32[np.ndarray, " N"]
    vectors: Float32[np.ndarray, "N D"]


def write_vectors(traces: Sequence[RoutingTrace], width: int, path: Path) -> str:
    """Write the activations of a part's traces through to the disk, one sequence at a time, and return the file's sha256.

    Raises:
        UsageError: The vectors of a sequence are of another number, width or type than expected.
    """
    names = sorted(traces[0].activations)
    counts = {name: sum(len(trace.activations[name].positions) for trace in traces) for name in names}
    first = traces[0].activations[names[0]].stored().dtype
    # What cannot be stored is found to be of another type than this one.
    kind = first if first.name in _CODES else np.dtype(np.float32)
    entries: dict[str, _Entry] = {
        f"{name}.{index}": (np.dtype(np.int32), (counts[name],)) for name in names for index in ("sequence", "position")
    }
    # Wider numbers first: every tensor then begins at a multiple of its size.
    entries |= {f"{name}.vectors": (kind, (counts[name], width)) for name in names}
    with path.open("wb") as file:
        file.write(_header(entries))
        for name in names:
            lengths = [len(trace.activations[name].positions) for trace in traces]
            file.write(np.repeat(np.arange(len(traces), dtype=np.int32), lengths).tobytes())
            file.writelines(trace.activations[name].positions.astype(np.int32).tobytes() for trace in traces)
        for name in names:
            file.writelines(_checked(trace, name, kind, width).tobytes() for trace in traces)
        file.flush()
        os.fsync(file.fileno())
    return file_digest(path)


def _header(entries: Mapping[str, _Entry]) -> bytes:
    listed: dict[str, Any] = {}
    stop = 0
    for name, (dtype, shape) in entries.items():
        start, stop = stop, stop + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        listed[name] = {"dtype": _CODES[dtype.name], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checked(trace: RoutingTrace, name: str, kind: np.dtype[Any], width: int) -> np.ndarray:
    activation = trace.activations[name]
    stored, expected = activation.stored(), (len(activation.positions), width)
    if stored.dtype != kind or stored.shape != expected:
        found = f"{stored.dtype} {list(stored.shape)}"
        raise UsageError(f"activation {name} of sequence {trace.sequence_id} is {found}; expected {kind} {list(expected)}")
    return stored


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: type, shape, and where it begins."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Some rows of it, read from the disk."""
        wide = int(np.prod(self.shape[1:], dtype=np.int64))
        count, offset = (stop - first) * wide, self.start + first * wide * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count=count, offset=offset).reshape(stop - first, *self.shape[1:])


def read_vectors(path: Path, name: str, first_sequence: int) -> Iterator[ActivationBatch]:
    """The vectors of one site of a part, some at a time; the part's first sequence has that row in the run.

    Raises:
        RunError: The file is damaged or lacks the site.
    """
    try:
        tensors = [_find(path, f"{name}.{part}") for part in ("sequence", "position", "vectors")]
        count, width = tensors[2].shape
        step = max(1, PIECE // (width * tensors[2].dtype.itemsize))
        for first in range(0, count, step):
            sequence, position, vectors = (tensor.rows(first, min(first + step, count)) for tensor in tensors)
            yield ActivationBatch(sequence + np.int32(first_sequence), position, as_float32(vectors))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); it is damaged: copy the run again, or capture it again") from error


def _find(path: Path, name: str) -> _Stored:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # A damaged length must not become memory.
        found = json.loads(file.read(min(size, path.stat().st_size)))[name]
    kinds = {code: kind for kind, code in _CODES.items()}
    return _Stored(path, np.dtype(kinds[found["dtype"]]), tuple(found["shape"]), 8 + size + found["data_offsets"][0])
