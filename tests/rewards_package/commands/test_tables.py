"""Tables of scores: the same cells in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from rewards.commands.tables import writer_for

TABLE = {
    "prompt": ["a", "b,\n\u00e9"],
    "score": [1, 0.5],
    "missing": [None, None],
    "mixed": [1, "x"],
    "boxes": [[1, 2], None],
}


def test_json_lines_hold_the_values(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    writer_for(file)(file, TABLE, {})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        dict(zip(TABLE, cells, strict=True)) for cells in zip(*TABLE.values(), strict=True)
    ]


def test_csv_holds_json_where_a_column_has_several_types(tmp_path: Path):
    file = tmp_path / "a.csv"
    writer_for(file)(file, TABLE, {})
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[1] == {
        "prompt": "b,\n\u00e9",
        "score": "0.5",
        "missing": "",
        "mixed": '"x"',
        "boxes": "",
    }
    assert rows[0]["boxes"] == "[1, 2]"


def test_parquet_holds_the_provenance(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    writer_for(file)(file, TABLE, {"weights": "none"})
    table = parquet.read_table(file)
    assert table["score"].to_pylist() == [1.0, 0.5]
    assert table["mixed"].to_pylist() == ["1", '"x"']
    assert json.loads(table.schema.metadata[b"provenance"]) == {"weights": "none"}


def test_another_ending_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"should end in one of \.parquet, \.csv, \.jsonl"):
        writer_for(tmp_path / "a.xlsx")
