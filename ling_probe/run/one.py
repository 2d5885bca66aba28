"""One sequence of a run: only the part that holds it is opened, and of that only the rows and columns asked for."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from ling_probe.errors import RunError, UsageError
from ling_probe.run.store import Run
from ling_probe.run.tables import read_table


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
    """Rows of one sequence, streamed: memory does not grow with the part.

    Raises:
        RunError: The file is damaged.
    """
    wanted = ds.field("sequence_id") == sequence_id
    try:
        return ds.dataset(path).to_table(columns=columns, filter=wanted if also is None else wanted & also).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read ({reason}); it is damaged: copy the run again, or capture it again") from error


def lists(column: pa.ChunkedArray) -> np.ndarray:
    """[N K] of a column of fixed-size lists."""
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
