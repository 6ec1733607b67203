"""The contract: what a batch accepts, what a head may return, how a failure reads."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from rewards import RewardBatch, RewardError, RewardHead, Scores


def images(n: int = 3, side: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def batch(n: int = 3, **keywords) -> RewardBatch:
    return RewardBatch(prompts=[f"prompt {i}" for i in range(n)], images=images(n), **keywords)


class Fixed(RewardHead):
    name = "fixed"

    def __init__(self, result):
        self.result = result

    def score(self, batch):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"prompts": ["a"]}, "Found neither"),
        ({"prompts": ["a"], "images": images(1), "texts": ["b"]}, "Found both"),
        ({"prompts": "a", "texts": ["b"]}, "Found one string"),
        ({"prompts": ["a"], "texts": "b"}, "Found one string"),
        ({"prompts": [3], "texts": ["b"]}, r"prompts\[0\].*Found int"),
        ({"prompts": ["a"], "texts": [b"b"]}, r"texts\[0\].*Found bytes"),
        ({"prompts": ["a"], "texts": ["b", "c"]}, "Found 2"),
        ({"prompts": ["a"], "texts": ["b"], "metadata": [{}, {}]}, "Found 2"),
        ({"prompts": ["a"], "texts": ["b"], "metadata": ["x"]}, "Found str"),
        ({"prompts": ["a"], "images": images(2)}, r"Found \[2, 3, 4, 4\]"),
        ({"prompts": ["a"], "images": torch.zeros(1, 4, 4, 3)}, r"Found \[1, 4, 4, 3\]"),
        ({"prompts": ["a"], "images": images(1).double()}, "Found torch.float64"),
        ({"prompts": ["a"], "images": np.zeros((1, 3, 4, 4))}, "Found ndarray"),
        ({"prompts": ["a"], "images": torch.zeros(1, 3, 0, 4)}, "should have pixels"),
        ({"prompts": ["a", "b"], "images": images(2) * 2 - 1}, "in sample 0"),
        ({"prompts": ["a"], "images": torch.full((1, 3, 2, 2), torch.nan)}, "nan"),
    ],
)
def test_a_wrong_batch_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        RewardBatch(**keywords)


def test_a_batch_is_frozen_and_fills_in_metadata():
    b = batch(2)
    assert len(b) == 2
    assert list(b.metadata) == [{}, {}]
    with pytest.raises(AttributeError):
        b.prompts = []  # type: ignore[misc]


def test_quantisation_rounds_to_the_nearest_of_255_steps():
    value = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 100.4 / 255, 100.6 / 255, 1.0])
    b = RewardBatch(prompts=["a"], images=value.expand(1, 3, 2, 6).contiguous())
    assert b.uint8()[0, 0, 0].tolist() == [0, 0, 1, 100, 101, 255]
    assert b.uint8().dtype == torch.uint8
    assert b.arrays().shape == (1, 2, 6, 3)
    (image,) = b.to_pil()
    assert (image.mode, image.size) == ("RGB", (6, 2))
    np.testing.assert_array_equal(np.asarray(image), b.arrays()[0])


def test_heads_for_images_and_texts_say_what_they_miss():
    b = RewardBatch(prompts=["a"], texts=["b"])
    assert b.require_texts() == ["b"]
    with pytest.raises(ValueError, match="Found a batch of texts"):
        b.uint8()
    with pytest.raises(ValueError, match="Found a batch of images"):
        batch(1).require_texts()


def test_nan_passes_and_the_result_is_float32_on_the_cpu():
    result = Fixed(torch.tensor([1.0, torch.nan, -2.0], dtype=torch.float64, requires_grad=True))
    rewards = result(batch())
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad
    assert rewards.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, torch.inf, 2.0]), r"#1 'prompt 1': .*Found inf"),
        (torch.tensor([-torch.inf, 0.0, 2.0]), r"#0 'prompt 0': .*Found -inf"),
        (torch.tensor([1e300, 0.0, 2.0], dtype=torch.float64), r"#0 .*Found inf"),
        (torch.zeros(2), r"shape \[3\]. Found \[2\]"),
        (torch.zeros(3, 1), r"Found \[3, 1\]"),
        (torch.zeros(3, dtype=torch.int64), "Found torch.int64"),
        ([1.0, 2.0, 3.0], "Found list"),
        (KeyError("tag"), "KeyError: 'tag'"),
    ],
)
def test_whatever_is_no_score_is_an_error_that_names_the_head(result, message):
    with pytest.raises(RewardError, match=message) as caught:
        Fixed(result)(batch())
    assert caught.value.head == "fixed"
    assert '"fixed"' in str(caught.value)


def test_the_cause_is_chained_and_the_only_sample_is_named():
    cause = OSError("disk on fire")
    with pytest.raises(RewardError) as caught:
        Fixed(cause)(batch(1))
    assert caught.value.__cause__ is cause
    assert caught.value.samples == ((0, "prompt 0"),)


def test_an_error_raised_by_a_head_keeps_its_samples_and_gets_its_name():
    with pytest.raises(RewardError) as caught:
        Fixed(RewardError("unreadable", samples=[(2, "prompt 2")]))(batch())
    assert (caught.value.head, caught.value.samples) == ("fixed", ((2, "prompt 2"),))


def test_an_empty_batch_costs_no_call():
    empty = RewardBatch(prompts=[], images=torch.zeros(0, 3, 8, 8))
    assert Fixed(AssertionError("called"))(empty).shape == (0,)


def test_reward_error_survives_pickling():
    error = RewardError("boom", head="ocr", samples=[(1, "x"), (4, "y" * 200)])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.head, copy.samples, copy.cause) == (error.head, error.samples, error.cause)
    assert str(copy) == str(error)
    assert "#4 'yyy" in str(error)
    assert len(str(error)) < 200


def test_a_long_list_of_samples_is_cut_in_the_message_only():
    error = RewardError("boom", head="h", samples=[(i, "p") for i in range(40)])
    assert "and 35 more" in str(error)
    assert len(error.samples) == 40


# --- columns of the scores table ----------------------------------------------------------------


def test_columns_come_with_the_scores():
    scores = Scores(
        values=torch.zeros(3), extra={"text": ["a", None, "c"], "box": [[1, 2], [], {}]}
    )
    found = Fixed(scores).evaluate(batch())
    assert found.extra == scores.extra
    assert Fixed(scores)(batch()).tolist() == [0.0, 0.0, 0.0]


def test_numpy_scalars_become_plain_numbers():
    cells = {
        "whole": list(np.arange(3)),
        "half": list(np.float16([0.5, 1, 2])),
        "flag": list(np.array([True, False, True])),
        "deep": [{"x": [np.int8(1)]}, None, np.str_("a")],
    }
    found = Fixed(Scores(values=torch.zeros(3), extra=cells)).evaluate(batch()).extra
    assert found == {
        "whole": [0, 1, 2],
        "half": [0.5, 1.0, 2.0],
        "flag": [True, False, True],
        "deep": [{"x": [1]}, None, "a"],
    }
    kinds = {type(cell) for column in found.values() for cell in column}
    assert kinds == {int, float, bool, dict, type(None), str}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"text": ["a", torch.zeros(1), "c"]},
            r"on sample #1 'prompt 1': The column `text` should",
        ),
        ({"text": ["a", "b", float("nan")]}, r"on sample #2 .*should hold JSON values. Found nan"),
        ({"text": ["a", "b", np.float32("inf")]}, r"on sample #2 .*should hold JSON values"),
        ({"text": [np.zeros(2), 2, 3]}, r"on sample #0 .*ndarray is no JSON value"),
        ({"text": [np.complex64(1), 2, 3]}, r"on sample #0 .*complex is no JSON value"),
        ({3: ["a", "b", "c"]}, "name of a column should be text. Found 3"),
        ({"": ["a", "b", "c"]}, "name of a column should be text. Found ''"),
    ],
)
def test_a_column_that_is_no_json_is_an_error(extra, message):
    with pytest.raises(RewardError, match=message) as caught:
        Fixed(Scores(values=torch.zeros(3), extra=extra)).evaluate(batch())
    assert caught.value.head == "fixed"


@pytest.mark.parametrize("cells", [["a", "b"], "abc"])
def test_a_column_needs_an_entry_per_sample(cells):
    with pytest.raises(
        ValueError, match=r"`extra\['text'\]` should have one entry per sample \(3\)"
    ):
        Scores(values=torch.zeros(3), extra={"text": cells})
