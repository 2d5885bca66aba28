"""One sequence of a run: only the part that holds it is opened, and of that only the rows and columns asked for."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ling_probe.errors import UsageError
from ling_probe.run.store import Run
from ling_probe.run.tables import check_columns, read_table, unreadable

PIECE = 4096
"""Rows read at a time."""


def find_sequence(run: Run, sequence: int) -> tuple[str, str]:
    """Name of the part that holds a sequence, and the sequence's id.

    Raises:
        UsageError: There is no such row.
    """
    first = 0
    for part in run.manifest.parts:
        if first <= sequence < first + part.sequences:
            ids = read_table(part_file(run, part.name, "sequences"), ["sequence_id"])["sequence_id"]
            return part.name, ids[sequence - first].as_py()
        first += part.sequences
    raise UsageError(f"{run.folder} has no sequence {sequence}; it holds {first}, counted from 0")


def part_file(run: Run, part: str, name: str) -> Path:
    """Path of one table of a part."""
    return run.folder / "parts" / part / f"{name}.parquet"


def sequence_rows(
    path: Path, sequence_id: str, columns: list[str] | None = None, also: ds.Expression | None = None
) -> pa.Table:
    """Rows of one sequence, which stand together, in the order of the file.

    Columns are read no further than the sequence goes, a piece at a time: memory does not grow with the part.

    Args:
        path: One table of the part that holds it.
        sequence_id: Which.
        columns: All if left out.
        also: What else holds for the rows, in terms of these columns.

    Raises:
        RunError: The file is damaged or lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow, columns or ())
            ids = file.read(columns=["sequence_id"])["sequence_id"].combine_chunks()
            here = np.flatnonzero(pc.equal(ids.cast(pa.string()), sequence_id))
            start, stop = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
            table = _rows(file, start, stop, columns)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    table = table if columns is None else table.select(columns)
    return (table if also is None else table.filter(also)).combine_chunks()


def _rows(file: pq.ParquetFile, start: int, stop: int, columns: list[str] | None) -> pa.Table:
    sizes = [file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)]
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    groups = [place for place in range(len(sizes)) if first[place] < stop and first[place + 1] > start]
    pieces, at = [], int(first[groups[0]]) if groups else 0
    for piece in file.iter_batches(batch_size=PIECE, row_groups=groups, columns=columns) if groups else ():
        if at + len(piece) > start:
            pieces.append(piece.slice(max(0, start - at), min(stop, at + len(piece)) - max(start, at)))
        at += len(piece)
        if at >= stop:
            break
    if not pieces:
        return file.read_row_groups([], columns=columns)
    return pa.Table.from_batches(pieces)


def lists(column: pa.ChunkedArray) -> np.ndarray:
    """[N K] of a column of fixed-size lists."""
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
