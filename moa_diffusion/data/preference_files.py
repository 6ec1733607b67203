"""Preference files, in two forms, and all that can be wrong with them.

Two forms are read. A JSONL with one prompt a line (``read_preferences``)::

    {"prompt": "To the baker:", "responses": ["Dear ...", "Your ...", "Hi ..."],
     "preferences": {"politeness": [[0, 1], [0, 2]]}, "scores": {"brevity": [1.5, 2.0, 3.5]}}

with pairs ``[winner, loser]`` of positions in ``responses``, or a score for each response; and
TRL's rows of prompt, chosen and rejected, with a file for each objective (``read_pairs``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.data.preferences import Preferences, win_rates_of_pairs, win_rates_of_scores
from moa_diffusion.files.text import bad_line, json_lines, shortened
from rewards.suggestions import did_you_mean

CYCLES = ("error", "keep")


def read_preferences(
    path: str | Path,
    objectives: Sequence[str],
    *,
    cycles: str = "error",
    smoothing: float = 0.0,
    scales: Mapping[str, float] | None = None,
) -> Preferences:
    """Read a JSONL of prompts with their responses.

    A row may have pairs for some objectives and scores for others, and nothing for the rest. A
    score of null leaves the response out. ``log_probs``, a number for each response, are those
    under the policy that wrote them, summed over tokens; in all rows or in none. Any other key
    becomes metadata.

    Args:
        path: The JSONL file.
        objectives: K names; the file may hold no other.
        cycles: Whether preferences that run in a circle are an ``error``, or kept (``keep``).
        smoothing: What smooths win rates from pairs, see ``preferences.py``.
        scales: The scale of win rates from scores, by objective. By default it is half of the RMS
            spread of the scores within a prompt, over the file.

    Raises:
        ConfigError: For anything wrong in the file; the message starts with file and line.
        ValueError: For a bad argument.
    """
    path = Path(path)
    known = _checked(objectives, cycles, smoothing, scales)
    drafts: dict[str, Draft] = {}
    for where, row in _rows(path):
        draft = _draft(where, row, known, cycles)
        if draft.prompt in drafts:
            again = f"that of {drafts[draft.prompt].where} again: {shortened(draft.prompt, SHOWN)}"
            raise bad_line(where, "A prompt should have one line.", again)
        drafts[draft.prompt] = draft
    return assemble(dict.fromkeys(known, path), list(drafts.values()), smoothing, scales)


def read_pairs(
    paths: Mapping[str, str | Path], *, cycles: str = "error", smoothing: float = 0.0
) -> Preferences:
    """Read TRL's preference rows (prompt, chosen, rejected), a JSONL for each objective.

    Rows of one prompt are merged, over all files; equal texts are the same response. The fields
    are strings, or conversations of one message: a user's prompt, an assistant's answer. Other
    columns are not read.

    Args:
        paths: The files of pairs, by objective.
        cycles: As in ``read_preferences``.
        smoothing: As in ``read_preferences``.

    Raises:
        ConfigError: For anything wrong in a file; the message starts with file and line.
        ValueError: For a bad argument.
    """
    files = {name: Path(path) for name, path in paths.items()}
    _checked(tuple(files), cycles, smoothing, None)
    drafts: dict[str, Draft] = {}
    for name, path in files.items():
        for where, row in _rows(path):
            prompt = _text(where, row, "prompt", "user")
            pair = [_text(where, row, key, "assistant") for key in ("chosen", "rejected")]
            if pair[0] == pair[1]:
                finding = f"{shortened(pair[0], SHOWN)} twice"
                raise bad_line(where, "`chosen` and `rejected` should differ.", finding)
            draft = drafts.setdefault(prompt, Draft(where=where, prompt=prompt))
            draft.responses += [text for text in pair if text not in draft.responses]
            winner, loser = map(draft.responses.index, pair)
            draft.prefer(where, name, winner, loser, cycles)
    return assemble(files, list(drafts.values()), smoothing, None)


# ---------------------------------------------------------------------- one line


def _draft(where: str, row: dict[str, Any], objectives: Sequence[str], cycles: str) -> Draft:
    """Return one line of a JSONL, checked."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise bad_line(where, "`responses` should be a list of texts.", repr(responses))
    if len(responses) < 2:
        expectation = "A prompt should have at least two responses to compare."
        raise bad_line(where, expectation, str(len(responses)))
    if repeated := [text for i, text in enumerate(responses) if text in responses[:i]]:
        positions = [i for i, text in enumerate(responses) if text == repeated[0]]
        finding = f"{shortened(repeated[0], SHOWN)} at the positions {positions}"
        raise bad_line(where, "Responses should differ.", finding)
    keys = {"prompt", "responses", "preferences", "scores", "log_probs"}
    draft = Draft(
        where=where,
        prompt=_text(where, row, "prompt", "user"),
        responses=responses,
        metadata={key: value for key, value in row.items() if key not in keys},
    )
    preferences, scores = (
        _by_objective(where, row, key, objectives) for key in ("preferences", "scores")
    )
    for name, pairs in preferences.items():
        if name in scores:
            raise bad_line(where, f"`{name}` should have preferences or scores.", "both")
        if not isinstance(pairs, list):
            raise bad_line(where, f"Preferences of `{name}` should be a list.", repr(pairs))
        for pair in pairs:
            winner, loser = _positions(where, name, pair, len(responses))
            draft.prefer(where, name, winner, loser, cycles)
    for name, values in scores.items():
        draft.scores[name] = _numbers(where, f"scores of `{name}`", values, responses, null=True)
    if "log_probs" in row:
        draft.log_probs = _numbers(where, "`log_probs`", row["log_probs"], responses, null=False)
        if (draft.log_probs > 0).any():
            largest = f"{draft.log_probs.max():g}"
            raise bad_line(where, "`log_probs` should not be positive.", largest)
    return draft


def _by_objective(
    where: str, row: dict[str, Any], key: str, objectives: Sequence[str]
) -> dict[str, Any]:
    entries = row.get(key, {})
    if not isinstance(entries, dict):
        raise bad_line(where, f"`{key}` should be an object by objective.", repr(entries))
    for name in entries:
        if name not in objectives:
            hint = did_you_mean(name, objectives).strip()
            expectation = f"An objective in `{key}` should be one of {tuple(objectives)}."
            raise bad_line(where, expectation, repr(name), hint)
    return entries


def _positions(where: str, name: str, pair: Any, responses: int) -> tuple[int, int]:
    if not isinstance(pair, list) or [type(i) for i in pair] != [int, int]:
        expectation = f"A preference of `{name}` should be [winner, loser], two positions."
        raise bad_line(where, expectation, repr(pair))
    winner, loser = pair
    if not (0 <= winner < responses and 0 <= loser < responses) or winner == loser:
        expectation = f"A preference of `{name}` should be between two of the {responses} responses"
        raise bad_line(where, f"{expectation}, counted from 0.", repr(pair))
    return winner, loser


def _numbers(where: str, what: str, values: Any, responses: Sequence[str], *, null: bool) -> Tensor:
    """Return a number for each response ``[Y]``; null becomes NaN where it is allowed."""
    kinds = (int, float, type(None)) if null else (int, float)
    if (
        not isinstance(values, list)
        or len(values) != len(responses)
        or not all(type(value) in kinds for value in values)
    ):
        expectation = f"{what} should be {len(responses)} numbers, one for each response."
        raise bad_line(where, expectation, repr(values))
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


# ---------------------------------------------------------------------- files


def _checked(
    objectives: Sequence[str], cycles: str, smoothing: float, scales: Mapping[str, float] | None
) -> tuple[str, ...]:
    names = tuple(objectives)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Parameter `objectives` should be distinct names. Found {names}.")
    if cycles not in CYCLES:
        raise ValueError(f"Parameter `cycles` should be one of {CYCLES}. Found {cycles!r}.")
    if not 0 <= smoothing < math.inf:
        raise ValueError(
            f"Parameter `smoothing` should be finite and not negative. Found {smoothing}."
        )
    for name, scale in (scales or {}).items():
        if name not in names:
            raise ValueError(f"Parameter `scales` should be about {names}. Found {name!r}.")
        if not 0 < scale < math.inf:
            raise ValueError(
                f"Parameter `scales` should be finite and positive. Found {scale} for `{name}`."
            )
    return names


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read file and line, and the object on it; at least one."""
    if not path.is_file():
        raise bad_line(str(path), "Preferences should be a file.", "none")
    rows = 0
    for row in json_lines(path, "Preferences"):
        rows += 1
        yield row
    if not rows:
        raise bad_line(str(path), "Preferences should have at least one line.", "none")


def _text(where: str, row: dict[str, Any], key: str, role: str) -> str:
    """Return a text, or the content of a conversation of one message by ``role``."""
    value = row.get(key)
    if isinstance(value, list):
        roles = [part.get("role") if isinstance(part, dict) else None for part in value]
        if roles != [role]:
            raise bad_line(
                where,
                f"A conversation in `{key}` should be one message of the role {role!r}.",
                f"the roles {roles}; a longer one can be rendered to a string beforehand, with "
                "the chat template of the model",
            )
        value = value[0].get("content")
    if not isinstance(value, str) or (key == "prompt" and not value.strip()):
        raise bad_line(where, f"A line should have a text `{key}`.", repr(value))
    return value


logger = logging.getLogger(__name__)


SHOWN = 40  # characters of a response in a message


@dataclass(slots=True, kw_only=True)
class Draft:
    """What the files say of one prompt."""

    where: str  # file and line that it was first seen at
    prompt: str
    responses: list[str] = field(default_factory=list)
    pairs: dict[str, dict[tuple[int, int], None]] = field(default_factory=dict)  # in order
    scores: dict[str, Tensor] = field(default_factory=dict)  # [Y] each
    log_probs: Tensor | None = None  # [Y]
    metadata: dict[str, Any] = field(default_factory=dict)

    def prefer(self, where: str, objective: str, winner: int, loser: int, cycles: str) -> None:
        """Note a pair; a tie is refused, and a cycle unless it is to be kept.

        Args:
            where: File and line, for messages.
            objective: The objective that the pair is about.
            winner: Index of the better response.
            loser: Index of the worse one.
            cycles: ``error`` refuses a pair that closes a circle, ``keep`` takes it.
        """
        pairs = self.pairs.setdefault(objective, {})
        if (loser, winner) in pairs:
            finding = f"both orders of {self._named([winner, loser])}; leave a tie out"
            raise bad_line(where, f"A pair of `{objective}` should have one winner.", finding)
        if cycles == "error" and (way := _way(pairs, loser, winner)):
            raise bad_line(
                where,
                f"Preferences of `{objective}` should not run in a circle.",
                f"{self._named([winner, *way])}. Take one of these pairs out, or keep such circles "
                "with `cycles: keep`",
            )
        pairs[winner, loser] = None

    def _named(self, positions: Sequence[int]) -> str:
        return " > ".join(f"{i} {shortened(self.responses[i], SHOWN)}" for i in positions)


def _way(pairs: Mapping[tuple[int, int], None], start: int, end: int) -> list[int]:
    """Return positions from ``start`` to ``end`` along winners and losers; empty without a way."""
    before = {start: start}
    queue = [start]
    for here in queue:
        for loser in [second for first, second in pairs if first == here]:
            if loser not in before:
                before[loser] = here
                queue.append(loser)
    if end not in before:
        return []
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def assemble(
    files: Mapping[str, Path],
    drafts: Sequence[Draft],
    smoothing: float,
    scales: Mapping[str, float] | None,
) -> Preferences:
    """Return the win rates of all prompts, padded to the longest.

    Args:
        files: The K objectives' files.
        drafts: What the files say of each of P prompts.
        smoothing: What win rates of pairs are smoothed with.
        scales: The scale of win rates from scores, by objective, as in ``read_preferences``.
    """
    longest = max(len(draft.responses) for draft in drafts)
    win_rates = torch.full((len(files), len(drafts), longest), math.nan, dtype=torch.float64)
    log_data = torch.full((len(drafts), longest), -math.inf, dtype=torch.float64)
    for p, draft in enumerate(drafts):
        log_data[p, : len(draft.responses)] = -math.log(len(draft.responses))
    for k, name in enumerate(files):
        scale = (scales or {}).get(name, _spread(drafts, name) / 2)
        for p, draft in enumerate(drafts):
            count = len(draft.responses)
            if pairs := draft.pairs.get(name):
                win_rates[k, p, :count] = win_rates_of_pairs(list(pairs), count, smoothing)
            elif name in draft.scores:
                win_rates[k, p, :count] = win_rates_of_scores(draft.scores[name], scale)
        if win_rates[k].isnan().all():
            expectation = f"`{name}` should be compared at least once."
            raise bad_line(str(files[name]), expectation, "no pair and no two scores of it")
        _warn_of_single_labels(name, drafts, smoothing)
    silent = win_rates.isnan().flatten(2).all(2).all(0)  # [P]
    for p in silent.nonzero().flatten().tolist():
        expectation = "A line should compare its responses, by a pair or by two scores at least."
        raise bad_line(drafts[p].where, expectation, "neither")
    return Preferences(
        objectives=tuple(files),
        prompts=tuple(draft.prompt for draft in drafts),
        responses=tuple(tuple(draft.responses) for draft in drafts),
        metadata=tuple(draft.metadata for draft in drafts),
        win_rates=win_rates,
        log_data=log_data,
        log_probs=_behaviour(drafts, log_data),
    )


def _spread(drafts: Sequence[Draft], name: str) -> float:
    """Return the RMS over prompts of the scores' deviation within a prompt; 0 without scores."""
    scores = [draft.scores[name] for draft in drafts if name in draft.scores]
    centred = [values[~values.isnan()] - values.nanmean() for values in scores]
    squares = [float(values.square().mean()) for values in centred if len(values) > 1]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _warn_of_single_labels(name: str, drafts: Sequence[Draft], smoothing: float) -> None:
    labelled = [pairs for draft in drafts if (pairs := draft.pairs.get(name))]
    if (
        labelled
        and smoothing == 0
        and all(len({i for pair in pairs for i in pair}) == 2 * len(pairs) for pairs in labelled)
    ):
        logger.warning(
            "Objective `%s`: every response was compared with one other, so that its win rate is "
            "a single label, 0 or 1, and the tilt towards it is too strong. More responses per "
            "prompt help, or `smoothing` (1, say).",
            name,
        )


def _behaviour(drafts: Sequence[Draft], log_data: Tensor) -> Tensor | None:
    """Return log-probabilities of the responses ``[P, Y]``, if the file has them."""
    if all(draft.log_probs is None for draft in drafts):
        return None
    log_probs = torch.full_like(log_data, math.nan)
    for p, draft in enumerate(drafts):
        if draft.log_probs is None:
            expectation = "`log_probs` should be in all lines or in none."
            raise bad_line(draft.where, expectation, "none here")
        log_probs[p, : len(draft.responses)] = draft.log_probs
    return log_probs
