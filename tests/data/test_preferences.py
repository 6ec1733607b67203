"""Preference files: win rates in numbers, the two forms, and everything that can be wrong."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_diffusion.data.preference_files import read_pairs, read_preferences
from moa_diffusion.data.preferences import win_rates_of_pairs, win_rates_of_scores
from moa_diffusion.types import ConfigError

NAN = math.nan
OBJECTIVES = ("politeness", "brevity")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def row(prompt: str = "To the baker:", **changes: Any) -> dict[str, Any]:
    """A line with three responses and complete preferences."""
    good = {
        "prompt": prompt,
        "responses": ["Dear sir", "You there", "Hi"],
        "preferences": {"politeness": [[0, 1], [0, 2], [2, 1]], "brevity": [[2, 0], [2, 1]]},
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def close(found: torch.Tensor, expected: Any) -> None:
    """Float64 from end to end: torch's default of 1e-7, and pytest's, are far above rounding."""
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


# ---------------------------------------------------------------------- in numbers


def test_win_rates_of_pairs_count_what_was_compared():
    pairs = [(0, 1), (0, 2), (2, 1)]
    close(win_rates_of_pairs(pairs, 4), [1.0, 0.0, 0.5, NAN])
    close(win_rates_of_pairs(pairs, 4, smoothing=1.0), [3 / 4, 1 / 4, 0.5, NAN])
    close(win_rates_of_pairs([], 2), [NAN, NAN])


def test_a_complete_tournament_averages_one_half():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(order[i], order[j]) for i in range(6) for j in range(i + 1, 6)]
    # Float64, here and below: pytest's default is 1e-6.
    assert float(win_rates_of_pairs(pairs, 6).mean()) == pytest.approx(0.5)
    assert float(win_rates_of_pairs(pairs, 6, smoothing=2.0).mean()) == pytest.approx(0.5)


def test_win_rates_of_scores_are_mean_probabilities():
    def wins(gap: float) -> float:
        return 1 / (1 + math.exp(-gap / 2))

    found = win_rates_of_scores(torch.tensor([1.0, NAN, 3.0, 0.0]), 2.0)
    close(
        found,
        [(wins(-2) + wins(1)) / 2, NAN, (wins(2) + wins(3)) / 2, (wins(-1) + wins(-3)) / 2],
    )
    assert float(found.nanmean()) == pytest.approx(0.5)
    close(win_rates_of_scores(torch.tensor([1.0, 3.0, 1.0]), 0.0), [0.25, 1.0, 0.25])
    close(win_rates_of_scores(torch.tensor([5.0, NAN]), 1.0), [NAN, NAN])


def test_smoothing_narrows_what_single_labels_do_to_the_tilt():
    """Mean weight over labels against the weight of the probability: the docstring's numbers."""
    p, tau = torch.linspace(0.05, 0.95, 10).double(), 0.2

    def bias(smoothing: float) -> float:
        """Log of the factor by which the ratio of two responses' weights is off at most."""
        won, lost = win_rates_of_pairs([(0, 1)], 2, smoothing).tolist()
        scale = won - lost  # what is left of a label
        mean = (p * math.exp(won / tau) + (1 - p) * math.exp(lost / tau)).log()
        true = scale * p / tau
        gap = mean - true
        return float(gap.max() - gap.min())

    assert bias(0.0) > 2 * bias(1.0) > 4 * bias(4.0)
    plain = p * math.exp(1 / tau) + (1 - p)
    torch.testing.assert_close(plain, 1 + (math.exp(1 / tau) - 1) * p)


# ---------------------------------------------------------------------- one line a prompt


def test_a_file_is_read(tmp_path):
    path = lines(
        tmp_path / "pairs.jsonl",
        row(source="letters", preferences={"politeness": [[0, 1], [0, 2], [0, 2], [2, 1]]}),
        "",
        {
            "prompt": " To the smith:\n",
            "responses": ["Yo", "Ahoy\u2028there"],
            "preferences": {"politeness": [[1, 0]]},
            "scores": {"brevity": [1, 0.0]},
        },
    )
    data = read_preferences(path, OBJECTIVES, scales={"brevity": 0.5})
    assert data.objectives == OBJECTIVES
    assert data.prompts == ("To the baker:", " To the smith:\n")
    assert data.responses == (("Dear sir", "You there", "Hi"), ("Yo", "Ahoy\u2028there"))
    assert data.metadata == ({"source": "letters"}, {})
    better = 1 / (1 + math.exp(-2))
    close(
        data.win_rates,
        [[[1, 0, 0.5], [0, 1, NAN]], [[NAN, NAN, NAN], [better, 1 - better, NAN]]],
    )
    third, half = -math.log(3), -math.log(2)
    close(data.log_data, [[third, third, third], [half, half, -math.inf]])
    assert data.log_probs is None
    assert data.rows().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


def test_scores_count_in_half_their_spread_within_a_prompt(tmp_path):
    """RMS over the prompts; a null and a lone score have no part in it."""
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "scores": {"taste": [1.0, 3.0, None]}},
        {"prompt": "b", "responses": ["x", "y"], "scores": {"taste": [10, 17]}},
        {"prompt": "c", "responses": ["x", "y"], "scores": {"taste": [9, None], "price": [1, 2]}},
    ]
    path = lines(tmp_path / "a.jsonl", *rows)
    data = read_preferences(path, ["taste", "price"])
    scale = math.sqrt((1 + 3.5**2) / 2) / 2
    first = 1 / (1 + math.exp(2 / scale))
    close(data.win_rates[0, 0], [first, 1 - first, NAN])
    close(data.win_rates[0, 2], [NAN, NAN, NAN])
    double = read_preferences(path, ["taste", "price"], scales={"taste": 2 * scale})
    assert float(double.win_rates[0, 0, 0]) == pytest.approx(1 / (1 + math.exp(1 / scale)))


def test_scores_that_are_all_equal_are_draws(tmp_path):
    path = lines(
        tmp_path / "a.jsonl", {"prompt": "a", "responses": ["x", "y"], "scores": {"taste": [2, 2]}}
    )
    close(read_preferences(path, ["taste"]).win_rates, [[[0.5, 0.5]]])


def test_log_probs_of_the_writer_are_kept(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        row("a", log_probs=[-1, -2.5, 0]),
        row("b", responses=["x", "y"], preferences={"brevity": [[0, 1]]}, log_probs=[-3, -4]),
    )
    data = read_preferences(path, OBJECTIVES)
    close(data.log_probs, [[-1, -2.5, 0], [-3, -4, NAN]])


def test_any_change_changes_the_digest(tmp_path):
    def digest(*rows: Any, **options: Any) -> str:
        path = lines(tmp_path / "a.jsonl", *rows)
        return read_preferences(path, OBJECTIVES, **options).digest()

    others = [
        digest(row("x")),
        digest(row(responses=["Dear sir", "You there", "Ho"])),
        digest(row(preferences={"politeness": [[0, 1]], "brevity": [[2, 0]]}), smoothing=0.5),
        digest(row(log_probs=[-1, -1, -1])),
        digest(row(log_probs=[-1, -1, -2])),
        digest(row(), smoothing=0.5),
    ]
    assert len({digest(row()), *others}) == 7
    assert digest(row()) == digest(row(note="not read by training"))


# ---------------------------------------------------------------------- rows of pairs


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def test_rows_of_one_prompt_are_merged(tmp_path):
    polite = lines(
        tmp_path / "polite.jsonl",
        pair("a", "Dear sir", "You there", score_chosen=3),
        pair("b", "Please", "Now"),
        pair("a", "Dear sir", "Hi"),
    )
    brief = lines(
        tmp_path / "brief.jsonl",
        pair(said("user", "a"), said("assistant", "Hi"), said("assistant", "Dear sir")),
        pair("c", "x", "y"),
    )
    data = read_pairs({"politeness": polite, "brevity": str(brief)})
    assert data.objectives == OBJECTIVES
    assert data.prompts == ("a", "b", "c")
    assert data.responses == (("Dear sir", "You there", "Hi"), ("Please", "Now"), ("x", "y"))
    close(
        data.win_rates,
        [
            [[1, 0, 0], [1, 0, NAN], [NAN, NAN, NAN]],
            [[0, NAN, 1], [NAN, NAN, NAN], [1, 0, NAN]],
        ],
    )
    assert data.metadata == ({}, {}, {})


def test_single_labels_are_warned_of(tmp_path, caplog):
    polite = lines(tmp_path / "a.jsonl", pair("a", "x", "y"), pair("b", "x", "y"))
    brief = lines(tmp_path / "b.jsonl", pair("a", "x", "y"), pair("a", "x", "z"))
    with caplog.at_level(logging.WARNING):
        read_pairs({"politeness": polite, "brevity": brief})
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Objective `politeness`: every response was compared with one other")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_pairs({"politeness": polite, "brevity": brief}, smoothing=1.0)
        scores = {"prompt": "a", "responses": ["x", "y"], "scores": {"taste": [1, 2]}}
        read_preferences(lines(tmp_path / "c.jsonl", scores), ["taste"])
    assert not caplog.records


# ---------------------------------------------------------------------- what is wrong


def test_a_circle_is_named_or_kept(tmp_path):
    circle = {"politeness": [[0, 1], [1, 2], [0, 2]], "brevity": [[0, 1], [1, 2], [2, 0]]}
    path = lines(tmp_path / "a.jsonl", row("first"), row(preferences=circle))
    with pytest.raises(ConfigError) as caught:
        read_preferences(path, OBJECTIVES)
    assert str(caught.value) == (
        f"{path}:2: Preferences of `brevity` should not run in a circle. Found 2 'Hi' > "
        "0 'Dear sir' > 1 'You there' > 2 'Hi'. Take one of these pairs out, or keep such circles "
        "with `cycles: keep`."
    )
    data = read_preferences(path, OBJECTIVES, cycles="keep")
    close(data.win_rates[1, 1], [0.5, 0.5, 0.5])


def test_a_circle_of_rows_is_found_at_the_row_that_closes_it(tmp_path):
    rows = [pair("p", one, other) for one, other in ("ab", "cd", "bc", "xy", "da", "yz")]
    path = lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ConfigError, match=r"a\.jsonl:5: .* 3 'd' > 0 'a' > 1 'b' > 2 'c' > 3 'd'"):
        read_pairs({"taste": path})
    close(read_pairs({"taste": path}, cycles="keep").win_rates[0, 0, :4], [0.5] * 4)


def test_many_preferences_without_a_circle_are_read(tmp_path):
    names = [f"answer {i}" for i in range(30)]
    pairs = [[i, j] for i in range(30) for j in range(i + 1, 30)]
    path = lines(
        tmp_path / "a.jsonl", {"prompt": "p", "responses": names, "preferences": {"taste": pairs}}
    )
    found = read_preferences(path, ["taste"]).win_rates[0, 0]
    close(found, [(29 - i) / 29 for i in range(30)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", "A line should be JSON"),
        ('{"prompt": "x", "log_probs": [NaN]}', "NaN is no JSON number"),
        ('{"prompt": "x", "log_probs": [1e999]}', "1e999 is no JSON number"),
        ("[1]", r"A line should be a JSON object. Found '\[1\]'"),
        (row(prompt=7), "A line should have a text `prompt`. Found 7"),
        (row(prompt="  "), "A line should have a text `prompt`. Found '  '"),
        (row(prompt="To the cook:"), "A prompt should have one line. Found that of .*:1 again"),
        (row(responses="Hi"), "`responses` should be a list of texts. Found 'Hi'"),
        (row(responses=["Hi", 3]), "`responses` should be a list of texts"),
        (row(responses=["Hi"]), "at least two responses to compare. Found 1"),
        (row(responses=["Hi", "Ho", "Hi"]), r"Responses should differ. Found 'Hi' .* \[0, 2\]"),
        (row(preferences=[[0, 1]]), "`preferences` should be an object by objective"),
        (row(preferences={"politness": [[0, 1]]}), "'politness'. Did you mean 'politeness'"),
        (row(scores={"zzz": [1, 2, 3]}), r"in `scores` should be one of .* Found 'zzz'\.$"),
        (row(preferences={"brevity": 3}), "Preferences of `brevity` should be a list. Found 3"),
        (row(preferences={"brevity": [[0, 3]]}), r"two of the 3 responses, .* Found \[0, 3\]"),
        (row(preferences={"brevity": [[-1, 0]]}), r"two of the 3 responses, .* Found \[-1, 0\]"),
        (row(preferences={"brevity": [[1, 1]]}), r"two of the 3 responses, .* Found \[1, 1\]"),
        (row(preferences={"brevity": [[0, True]]}), r"\[winner, loser\], two positions"),
        (row(preferences={"brevity": [[0, 1, 2]]}), r"\[winner, loser\], two positions"),
        (row(preferences={"brevity": [0]}), r"\[winner, loser\], two positions\. Found 0"),
        (
            row(preferences={"brevity": [[0, 1], [1, 0]]}),
            "both orders of 1 'You there' > 0 'Dear sir'; leave a tie out",
        ),
        (row(preferences={}), "A line should compare its responses"),
        (row(preferences={"brevity": []}), "A line should compare its responses"),
        (row(preferences=None, scores={"brevity": [1, None, None]}), "should compare its resp"),
        (row(scores={"brevity": [1, 2, 3]}), "`brevity` should have preferences or scores"),
        (row(preferences=None, scores={"brevity": [1, 2]}), "scores of `brevity` .* 3 numbers"),
        (row(preferences=None, scores={"brevity": [1, 2, "3"]}), "should be 3 numbers"),
        (row(preferences=None, scores={"brevity": 1}), "should be 3 numbers, .* Found 1"),
        (row(log_probs=[-1, -2, None]), "`log_probs` should be 3 numbers"),
        (row(log_probs=[-1, -2, 0.5]), "`log_probs` should not be positive. Found 0.5"),
        (row(log_probs=[-1, -2, -3]), "a.jsonl:1: `log_probs` should be in all lines or in none"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = lines(tmp_path / "a.jsonl", row("To the cook:"), bad)
    with pytest.raises(ConfigError, match=message) as caught:
        read_preferences(path, OBJECTIVES)
    assert str(caught.value).startswith((f"{path}:2: ", f"{path}:1: `log_probs` should be in all"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pair("p", "x", "x"), "`chosen` and `rejected` should differ. Found 'x' twice"),
        ({"chosen": "x", "rejected": "y"}, "A line should have a text `prompt`. Found None"),
        ({"prompt": "p", "chosen": "x"}, "A line should have a text `rejected`. Found None"),
        (pair("p", "y", "x"), "A pair of `taste` should have one winner"),
        (
            pair(said("user", "p") + said("assistant", "q") + said("user", "r"), "x", "y"),
            r"one message of the role 'user'. Found the roles \['user', 'assistant', 'user'\]",
        ),
        (pair("p", said("user", "x"), "y"), r"of the role 'assistant'. Found the roles \['user'\]"),
        (pair("p", ["x"], "y"), r"Found the roles \[None\]"),
        (pair("p", [{"role": "assistant"}], "y"), "should have a text `chosen`. Found None"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    path = lines(tmp_path / "a.jsonl", pair("p", "x", "y"), bad)
    with pytest.raises(ConfigError, match=message) as caught:
        read_pairs({"taste": path})
    assert str(caught.value).startswith(f"{path}:2: ")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ConfigError, match=r"a\.jsonl: Preferences should be a file\. Found none"):
        read_preferences(path, OBJECTIVES)
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match=r"a\.jsonl: .* at least one line\. Found none"):
        read_preferences(path, OBJECTIVES)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.jsonl: Preferences should be UTF-8 text"):
        read_preferences(path, OBJECTIVES)
    lines(path, row(preferences={"politeness": [[0, 1]]}))
    with pytest.raises(ConfigError, match=r"a\.jsonl: `brevity` should be compared at least once"):
        read_preferences(path, OBJECTIVES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ()}, r"`objectives` should be distinct names. Found \(\)"),
        ({"objectives": ("a", "a")}, "`objectives` should be distinct names"),
        ({"cycles": "drop"}, r"`cycles` should be one of .* Found 'drop'"),
        ({"smoothing": -1.0}, "`smoothing` should be finite and not negative. Found -1"),
        ({"smoothing": math.inf}, "`smoothing` should be finite"),
        ({"scales": {"taste": 1.0}}, "`scales` should be about .* Found 'taste'"),
        ({"scales": {"brevity": 0.0}}, "finite and positive. Found 0.0 for `brevity`"),
    ],
)
def test_bad_parameters_are_named(tmp_path, change, message):
    path = lines(tmp_path / "a.jsonl", row())
    with pytest.raises(ValueError, match=message):
        read_preferences(path, **({"objectives": OBJECTIVES} | change))
