"""Tables of a report as files."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import pandas as pd

from ling_probe.analysis import ANALYSES
from ling_probe.errors import UsageError
from ling_probe.shown import visible

TABLE_ROWS = 50_000
"""Longer tables are cut to their first rows to read; pairs of 256 experts in 19 layers are 620,160."""


class TableKind(StrEnum):
    """Files a table can be written as."""

    csv = "csv"
    json = "json"
    parquet = "parquet"


DEFAULT_KINDS = (TableKind.csv, TableKind.json)


def kept_rows(table: pd.DataFrame) -> int:
    """Rows of a table that its files hold."""
    return min(len(table), TABLE_ROWS)


def write_table(folder: Path, name: str, answer: pd.DataFrame | UsageError, kinds: Sequence[TableKind]) -> None:
    """The files of a table, in its own order; a longer one keeps the rows to read first. Older files of its name go."""
    for kind in TableKind:
        (folder / f"{name}.{kind}").unlink(missing_ok=True)
    if isinstance(answer, UsageError):
        return
    table = _fit_to_read(answer if len(answer) <= TABLE_ROWS else ANALYSES[name].order(answer).head(TABLE_ROWS))
    if TableKind.csv in kinds:
        table.to_csv(folder / f"{name}.csv", index=False)
    if TableKind.json in kinds:
        table.to_json(folder / f"{name}.json", orient="records", double_precision=15)
    if TableKind.parquet in kinds:
        table.to_parquet(folder / f"{name}.parquet", index=False)


def _fit_to_read(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts are as the page shows them: one of a million letters would stand in every row."""
    texts = table.select_dtypes(["object", "str"]).columns
    return table.assign(**{name: table[name].map(_cell) for name in texts})


def _cell(value: object) -> object:
    return value if not isinstance(value, str) or (value.isprintable() and len(value) < 100) else visible(value)
