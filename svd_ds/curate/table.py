"""Result tables that grow while a stage runs: folders of parquet files, each of which readers take as one
table.

A row belongs to a raw file (column `video`) in the state in which it was read (column `stamp`), and contains
either a result or the reason why there is none (column `error`). All rows of one file are in one fragment,
which appears atomically. Several machines can therefore add to a table at once, and duplicates count once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from svd_ds.fsync_io import replace_file

Row = dict[str, Any]
"""Values by column."""
RowsByStage = Mapping[str, Sequence[Row]]
"""Rows of one raw file, by the name of the stage that wrote them."""

COMMON_COLUMNS = {
    "video": pa.string(),
    "stamp": pa.int64(),
    "error": pa.string(),
    "given_up_after": pa.float64(),
}
"""Columns of every table. `given_up_after` is the time limit in seconds, if the file exceeded it."""


@dataclass(frozen=True)
class Table:
    """A folder of parquet fragments with the same columns."""

    folder: Path
    columns: Mapping[str, pa.DataType]

    def read(self) -> dict[str, list[Row]]:
        """Return the rows of each raw file; of several fragments with the same file the newest counts."""
        found: dict[str, list[Row]] = {}
        for path in sorted(self.folder.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns):
            rows_by_file: dict[str, list[Row]] = {}
            for row in pq.read_table(path).to_pylist():
                rows_by_file.setdefault(row["video"], []).append(row)
            found |= rows_by_file
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """Write a fragment. It contains all rows of each of its files."""
        if rows:
            write_parquet(
                rows, {**COMMON_COLUMNS, **self.columns}, self.folder / f"{uuid.uuid4().hex}.parquet"
            )


def write_parquet(rows: Sequence[Row], columns: Mapping[str, pa.DataType], path: Path) -> None:
    """Write rows as a parquet file, atomically. Columns that a row lacks are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: [row.get(name) for row in rows] for name in columns}
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    pq.write_table(pa.table(content, schema=pa.schema(list(columns.items()))), partial)
    replace_file(partial, path)
