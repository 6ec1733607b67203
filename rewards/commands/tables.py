"""A table of scores as a file: Parquet, CSV or JSON lines."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Columns = Mapping[str, list[Any]]  # name -> a JSON value per row
Writer = Callable[[Path, Columns, Mapping[str, Any]], None]  # file, columns, provenance


def writer_for(output: Path) -> Writer:
    """Return the function that writes a table into a file of this name.

    A .parquet file also holds the provenance.

    Raises:
        ValueError: If the name ends otherwise than in ``.parquet``, ``.csv`` or ``.jsonl``.
        ImportError: If it is ``.parquet`` and pyarrow is not installed.
    """
    writers = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}
    if output.suffix not in writers:
        raise ValueError(f"`{output}` should end in one of {', '.join(writers)}.")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            'A .parquet file needs pyarrow. Install with: pip install "moa-diffusion[report]"'
        )
    return writers[output.suffix]


def _write_jsonl(file: Path, table: Columns, provenance: Mapping[str, Any]) -> None:
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _write_csv(file: Path, table: Columns, provenance: Mapping[str, Any]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table)
        writer.writerows(zip(*(_flat_cells(cells) for cells in table.values()), strict=True))


def _write_parquet(file: Path, table: Columns, provenance: Mapping[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = pyarrow.table({name: _flat_cells(cells) for name, cells in table.items()})
    described = columns.replace_schema_metadata({"provenance": json.dumps(provenance)})
    parquet.write_table(described, file)


def _flat_cells(cells: list[Any]) -> list[Any]:
    # A column of a table has one type; what has several, or an inner structure, becomes JSON.
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {int, float}:
        return [None if cell is None else float(cell) for cell in cells]
    if len(kinds) <= 1 and kinds <= {int, float, str, bool}:
        return cells
    return [None if cell is None else json.dumps(cell) for cell in cells]
