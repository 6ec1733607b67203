"""Scores of a folder of images, or of texts, in a table."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.base import RewardBatch, RewardHead
from rewards.commands.tables import writer_for
from rewards.image_files import read_rgb
from rewards.progress_bar import progress_bar
from rewards.score_store import Score, ScoreStore

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SUMMARY_CHARACTERS = 60  # as much of a file's name or a text is shown
Pair = tuple[Path | str, str, Mapping[str, Any]]  # image or text, prompt, metadata


def refuse_blank_lines(prompts: Path) -> None:
    """Check that line i of a ``.txt`` file can belong to image i; other files have no blank rows.

    Raises:
        ValueError: If a line before the last prompt is blank; names file and line.
    """
    if prompts.suffix.lower() != ".txt":
        return
    lines = prompts.read_text(encoding="utf-8-sig").rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(
                f"{prompts}:{number}: The prompt of image {number} should stand here. "
                f"Found a blank line."
            )


def match(folder: Path, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Pair]:
    """Pair images with prompts.

    Args:
        folder: Its images are taken in natural order: ``2.png`` before ``10.png``.
        prompts: Prompt and metadata. If the metadata has the key ``file``, that names the image
            in the folder; else prompt i belongs to image i.

    Returns:
        File, prompt and metadata without ``file``, in the order of the files.

    Raises:
        ValueError: If an image lacks a prompt or a prompt its image.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder `{folder}`.")
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    files.sort(key=lambda file: _natural(file.name))
    if not files:
        raise ValueError(f"`{folder}` should hold images ({', '.join(SUFFIXES)}). Found none.")
    named = [str(metadata["file"]) for _, metadata in prompts if "file" in metadata]
    if not named:
        if len(files) != len(prompts):
            raise ValueError(
                f"There should be one prompt per image. Found {len(files)} images in "
                f"`{folder}` and {len(prompts)} prompts."
            )
        return [(file, *pair) for file, pair in zip(files, prompts, strict=True)]
    if len(named) < len(prompts):
        raise ValueError(f"{len(prompts) - len(named)} of {len(prompts)} prompts lack a `file`.")
    twice = sorted({name for name in named if named.count(name) > 1})
    absent = sorted(set(named) - {file.name for file in files})
    strangers = [name for name in absent if not (folder / name).is_file()]
    others = [name for name in absent if (folder / name).is_file()]
    lacking = [file.name for file in files if file.name not in set(named)]
    for problem, names in (
        ("files have more than one prompt", twice),
        ("files of the prompts are not in the folder", strangers),
        (f"files of the prompts are of another kind than {', '.join(SUFFIXES)}", others),
        ("images have no prompt", lacking),
    ):
        if names:
            more = ", ..." if len(names) > 5 else ""
            raise ValueError(f"{len(names)} {problem}: {', '.join(names[:5])}{more}.")
    by_name = {str(metadata["file"]): (prompt, metadata) for prompt, metadata in prompts}
    return [
        (file, prompt, {key: value for key, value in metadata.items() if key != "file"})
        for file in files
        for prompt, metadata in [by_name[file.name]]
    ]


def texts_of(prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Pair]:
    """Pair texts with prompts.

    Args:
        prompts: Prompt and metadata, which holds the text under the key ``text``.

    Returns:
        Text, prompt and metadata without ``text``, in order.

    Raises:
        ValueError: If a text is missing or of another type.
    """
    for number, (_, metadata) in enumerate(prompts, start=1):
        if not isinstance(metadata.get("text"), str):
            finding = "none" if "text" not in metadata else type(metadata["text"]).__name__
            raise ValueError(
                f"Prompt {number} should come with the text to score, under the key (in the "
                f"column) `text`. Found {finding}. For images, name their folder."
            )
    return [
        (metadata["text"], prompt, {key: metadata[key] for key in metadata if key != "text"})
        for prompt, metadata in prompts
    ]


class ScoreTable:
    """A table of scores: a row per sample with file or text, prompt, score, extras.

    Scores are kept in ``OUTPUT.partial.sqlite`` batch by batch, so that a failure loses none, and
    the same command goes on after them; ``finish`` turns them into the file that was asked for. A
    sample that has changed meanwhile is scored anew.

    Args:
        output: ``.parquet``, ``.csv`` or ``.jsonl``. A file of this name is replaced by ``finish``.
        pairs: See ``match`` and ``texts_of``.

    Attributes:
        scores: Scores by the digest of the sample, its prompt and its metadata.

    Raises:
        ValueError: If the name ends otherwise.
        ImportError: If it is ``.parquet`` and pyarrow is not installed.
    """

    def __init__(self, output: Path, pairs: Sequence[Pair]) -> None:
        self._write = writer_for(output)
        self.output = output
        self.partial = output.with_name(f"{output.name}.partial.sqlite")
        self.pairs = [(_digest(pair), pair) for pair in pairs]
        self.scores: dict[str, Score] = {}

    def begin(self, scorer: str) -> None:
        """Take over the scores of an earlier call.

        Args:
            scorer: Digest of the head; scores of another are not mixed with its own.

        Raises:
            ValueError: If what is there are not scores of this head. They stay as they are.
        """
        self._store = ScoreStore(self.partial, scorer)
        kept = self._store.read()
        self.scores = {key: kept[key] for key, _ in self.pairs if key in kept}

    def missing(self) -> dict[str, Pair]:
        """Return the samples that have no score yet by digest, in order; equal ones once."""
        return {key: pair for key, pair in self.pairs if key not in self.scores}

    def add(self, scores: Mapping[str, Score]) -> None:
        """Add scores by digest; they are on disk when this returns."""
        self._store.add(scores)
        self.scores.update(scores)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the samples that have a score, in the order of the samples."""
        return [
            {
                **_named(pair),
                "score": None if math.isnan(self.scores[key].value) else self.scores[key].value,
                **self.scores[key].extra,
            }
            for key, pair in self.pairs
            if key in self.scores
        ]

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write the file, with the provenance in it (.parquet) or beside it (OUTPUT.json)."""
        rows = self.rows()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = {column: [row.get(column) for row in rows] for column in columns}
        draft = self.output.with_name(f"{self.output.name}.draft")
        self._write(draft, table, provenance)
        if self.output.suffix != ".parquet":
            beside = self.output.with_name(f"{self.output.name}.json")
            beside.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, self.output)
        self.partial.unlink()


def score_pairs(head: RewardHead, table: ScoreTable, *, batch_size: int) -> None:
    """Score the samples that have no score yet, in order; a progress bar shows how far it is.

    Args:
        head: The head.
        table: Has the samples and gets their scores.
        batch_size: Samples read at once; of images, those of one size are scored together.

    Raises:
        RewardError: If the head fails.
        ValueError: If an image cannot be read, or the head's further columns do not fit in.
    """
    todo = list(table.missing().items())
    with progress_bar(title=head.name, total=len(todo), unit="sample") as bar:
        for start in range(0, len(todo), batch_size):
            keys, part = zip(*todo[start : start + batch_size], strict=True)
            found: dict[str, Score] = {}
            for chosen, batch in _batches(part):
                scores = head.evaluate(batch)
                taken = sorted({*_named(part[0]), "score"} & scores.extra.keys())
                if taken:
                    raise ValueError(f"The head's columns {taken} are names of the table's own.")
                for position, i in enumerate(chosen):
                    extra = {name: cells[position] for name, cells in scores.extra.items()}
                    found[keys[i]] = Score(value=float(scores.values[position]), extra=extra)
            table.add(found)
            bar.update(len(part))


def _batches(part: Sequence[Pair]) -> Iterator[tuple[list[int], RewardBatch]]:
    """Yield what can be scored together: texts, or images of one size.

    Each item is the places of the samples and their batch.
    """
    texts = [sample for sample, _, _ in part if isinstance(sample, str)]
    if texts:
        prompts, metadata = [pair[1] for pair in part], [pair[2] for pair in part]
        batch = RewardBatch(prompts=prompts, metadata=metadata, texts=texts)
        yield list(range(len(part))), batch
        return
    arrays = [_read(sample) for sample, _, _ in part if isinstance(sample, Path)]
    for shape in dict.fromkeys(array.shape for array in arrays):
        chosen = [i for i, array in enumerate(arrays) if array.shape == shape]
        stack = torch.from_numpy(np.stack([arrays[i] for i in chosen]))  # [n, H, W, 3]
        batch = RewardBatch(
            prompts=[part[i][1] for i in chosen],
            metadata=[part[i][2] for i in chosen],
            images=stack.permute(0, 3, 1, 2).float().div(255),  # [n, 3, H, W]
        )
        yield chosen, batch


def _named(pair: Pair) -> dict[str, str]:
    sample, prompt, _ = pair
    name = {"file": sample.name} if isinstance(sample, Path) else {"text": sample}
    return {**name, "prompt": prompt}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the number, mean, spread and extremes of the scores of a table's rows."""
    key, what = ("text", "texts") if "text" in rows[0] else ("file", "images")
    scored = [row for row in rows if row["score"] is not None]
    if not scored:
        return f"{len(rows)} {what}; the objective applies to none of them."
    values = np.array([row["score"] for row in scored])
    low = min(scored, key=lambda row: row["score"])
    high = max(scored, key=lambda row: row["score"])
    return (
        f"{len(rows)} {what}, the objective applies to {len(scored)}: mean {values.mean():.4g}, "
        f"standard deviation {values.std():.4g}, from {low['score']:.4g} "
        f"({low[key][:_SUMMARY_CHARACTERS]}) to {high['score']:.4g} "
        f"({high[key][:_SUMMARY_CHARACTERS]})."
    )


def _digest(pair: Pair) -> str:
    sample, prompt, metadata = pair
    content = sample.read_bytes() if isinstance(sample, Path) else json.dumps(sample).encode()
    digest = hashlib.sha256(content).hexdigest()
    name = [sample.name] if isinstance(sample, Path) else []
    essence = json.dumps([*name, digest, prompt, metadata], sort_keys=True, default=str)
    return hashlib.sha256(essence.encode()).hexdigest()


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(piece), "") if piece.isdecimal() else (0, piece)
        for piece in re.split(r"(\d+)", name.casefold())
    ]


def _read(file: Path) -> np.ndarray:
    try:
        return read_rgb(file)
    except ValueError as error:
        raise ValueError(f"Image `{file}` cannot be used: {error}.") from error
