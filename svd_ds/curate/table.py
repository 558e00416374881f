"""Tables that grow while a stage works: folders of parquet files, which parquet's readers take as one table.

A row belongs to a raw file (`video`) in the state in which it was read (`stamp`), and says either what was
found or, in `error`, why nothing was. All rows of one file lie in one fragment, which appears when it is
whole. So several machines may add to a table at once, and what two of them did twice counts once.
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
Known = Mapping[str, Sequence[Row]]
"""Rows of one raw file, by the stage that found them."""

COMMON = {
    "video": pa.string(),
    "stamp": pa.int64(),
    "error": pa.string(),
    "given_up_after": pa.float64(),
}
"""The last: seconds in which the file was not read, where that is the error."""


@dataclass(frozen=True)
class Table:
    """A folder of fragments with the same columns."""

    folder: Path
    columns: Mapping[str, pa.DataType]

    def read(self) -> dict[str, list[Row]]:
        """The rows of each raw file, those with the files' newest state."""
        found: dict[str, list[Row]] = {}
        for path in sorted(self.folder.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns):
            of_fragment: dict[str, list[Row]] = {}
            for row in pq.read_table(path).to_pylist():
                of_fragment.setdefault(row["video"], []).append(row)
            found |= of_fragment
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """Write a fragment, which holds all rows of each file in it."""
        if rows:
            write_parquet(rows, {**COMMON, **self.columns}, self.folder / f"{uuid.uuid4().hex}.parquet")


def write_parquet(rows: Sequence[Row], columns: Mapping[str, pa.DataType], path: Path) -> None:
    """Write rows, what they lack empty, so that the file's name never stands for half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: [row.get(name) for row in rows] for name in columns}
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    pq.write_table(pa.table(content, schema=pa.schema(list(columns.items()))), partial)
    replace_file(partial, path)
