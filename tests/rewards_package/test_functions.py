"""Plain functions as heads: for a batch or one image, blocking or async, with their columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from reward_functions import batch, closing, redness, redness_async
from rewards import FunctionHead, RewardBatch, RewardError, Scores, create

ROOT = Path(__file__).parents[2]


# --- batch functions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert", [list, np.array, torch.tensor, lambda v: np.array(v, dtype=np.int64)]
)
def test_a_function_may_return_a_list_an_array_or_a_tensor(convert):
    head = FunctionHead(lambda images, prompts: convert([0, 1, 2]))
    assert head(batch()).tolist() == [0.0, 1.0, 2.0]


def test_a_function_sees_the_tensor_and_the_metadata_it_names():
    seen = {}

    def f(images, prompts, tag, *, count=7, absent="default"):
        seen.update(images=images, prompts=prompts, tag=tag, count=count, absent=absent)
        return [0.0] * len(prompts)

    b = batch(2, metadata=[{"tag": "a", "count": 1, "other": 0}, {"tag": "b"}])
    FunctionHead(f)(b)
    assert seen["images"] is b.images
    assert seen["prompts"] == ["prompt 0", "prompt 1"]
    assert (seen["tag"], seen["count"]) == (["a", "b"], [1, None])
    assert seen["absent"] == "default"


def test_a_function_with_keywords_sees_all_metadata():
    seen = {}

    def f(images, prompts, **metadata):
        seen.update(metadata)
        return [0.0] * len(prompts)

    FunctionHead(f)(batch(2, metadata=[{"tag": "a"}, {"x": 1}]))
    assert seen == {"tag": ["a", None], "x": [None, 1]}


def test_missing_metadata_names_the_samples():
    head = FunctionHead(lambda images, prompts, tag: [0.0] * 3, name="tagged")
    with pytest.raises(RewardError, match=r'"tagged" failed on sample #1 .*`tag`') as caught:
        head(batch(3, metadata=[{"tag": 1}, {}, {"tag": 2}]))
    assert caught.value.samples == ((1, "prompt 1"),)


def test_options_of_a_function_are_fixed_and_not_read_from_metadata():
    head = FunctionHead(lambda images, prompts, size: [size] * 2, options={"size": 5})
    assert head(batch(2, metadata=[{"size": 1}, {"size": 2}])).tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match="depth"):
        FunctionHead(lambda images, prompts, size: [], options={"depth": 5})


def test_a_function_scores_texts_too():
    head = FunctionHead(lambda texts, prompts: [len(text) for text in texts])
    assert head(RewardBatch(prompts=["p", "q"], texts=["ab", "abc"])).tolist() == [2.0, 3.0]


def test_a_function_of_the_wrong_length_or_signature_is_refused():
    with pytest.raises(RewardError, match=rf"Found \[1\]\. It comes from .*{__file__}:"):
        FunctionHead(lambda images, prompts: [0.0])(batch(2))
    with pytest.raises(ValueError, match=r"should take `\(images, prompts"):
        FunctionHead(lambda pixels: [0.0])
    for option in ("per_image", "concurrency"):
        with pytest.raises(ValueError, match=f"no parameter `{option}`"):
            namespace = {}
            exec(f"def f(images, prompts, {option}=1): ...", namespace)
            FunctionHead(namespace["f"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [1.0, None, 2.0],
            r"on sample #1 'prompt 1': A score should be a number, NaN .* Found None",
        ),
        ([1.0, 2.0, "3.0"], r"on sample #2 .*Found '3.0'"),
        ([[1.0], [2.0], [3.0]], r"on sample #0 .*Found list"),
        ([torch.zeros(2), 1.0, 2.0], r"on sample #0 .*Found Tensor of shape \[2\]"),
        (None, "should return 3 numbers. Found None"),
        ("123", "should return 3 numbers. Found '123'"),
        ({"a": 1.0}, "should return 3 numbers. Found dict"),
        (np.array([1.0, None, 2.0]), r"should return 3 numbers. Found ndarray of shape \[3\]"),
        (np.array(["1", "2", "3"]), r"should return 3 numbers. Found ndarray"),
        ([1.0, 2.0, 3.0, None], "A score should be a number"),
        (Scores(values=[1.0, None, 2.0]), r"on sample #1 .*Found None"),
    ],
)
def test_what_is_no_number_is_no_score(values, message):
    """NumPy would read None as NaN, which means "does not apply", and text as a number."""
    with pytest.raises(RewardError, match=message) as caught:
        FunctionHead(lambda images, prompts: values)(batch())
    assert f"`<lambda>(images, prompts)` ({__file__}:" in str(caught.value)


def test_a_list_may_hold_any_kind_of_number():
    values = [1, True, np.float32(0.5), np.int64(3), torch.tensor(2.5), torch.tensor([4.0]), np.nan]
    found = FunctionHead(lambda images, prompts: values)(batch(7)).tolist()
    assert found[:6] == [1.0, 1.0, 0.5, 3.0, 2.5, 4.0]
    assert np.isnan(found[6])


@pytest.mark.parametrize("per_image", [False, True])
def test_a_column_named_like_what_is_given_anyway_is_told(per_image):
    def f(images, prompt, **metadata):
        return 1.0 if per_image else [1.0] * len(prompt)

    def separate(images, prompt, /, **metadata):
        assert "prompt" in metadata
        return f(images, prompt)

    def modest(images, prompt, tag=None):
        return f(images, prompt)

    clashing = batch(2, metadata=[{}, {"prompt": "x"}])
    with pytest.raises(RewardError, match="metadata key `prompt` has the name of what") as caught:
        FunctionHead(f, per_image=per_image)(clashing)
    assert [index for index, _ in caught.value.samples] == [1]
    full = batch(2, metadata=[{"prompt": "y"}, {"prompt": "x"}])
    for function in (separate, modest):
        assert FunctionHead(function, per_image=per_image)(full).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_a_function_may_add_columns(convert):
    def f(images, prompts):
        return Scores(values=convert([0.0, 1.0, 2.0]), extra={"seen": ["a", "b", None]})

    found = FunctionHead(f).evaluate(batch())
    assert found.values.tolist() == [0.0, 1.0, 2.0]
    assert found.extra == {"seen": ["a", "b", None]}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda: Scores(values=[0.0] * 3, extra={"seen": ["a"]}), "one entry per sample"),
        (lambda: Scores(values=[0.0] * 2, extra={"seen": ["a"] * 2}), r"shape \[3\]. Found \[2\]"),
        (lambda: Scores(values=[0.0] * 3, extra={"seen": [1, {2}, 3]}), r"on sample #1 .*`seen`"),
    ],
)
def test_wrong_columns_are_an_error(scores, message):
    with pytest.raises(RewardError, match=message):
        FunctionHead(lambda images, prompts: scores(), name="columns")(batch())


# --- functions of one image -----------------------------------------------------------------------


@pytest.mark.parametrize("function", [redness, redness_async])
def test_one_image_at_a_time_is_the_batch(function):
    b = batch(5)
    expected = FunctionHead(lambda images, prompts: images[:, 0].mean((1, 2)))(b)
    # Means of some hundred float32 pixels, one by one or together: within torch's 1.3e-6.
    torch.testing.assert_close(closing(FunctionHead(function, per_image=True), b), expected)


def test_one_text_at_a_time():
    head = FunctionHead(lambda text, prompt: len(text), per_image=True)
    assert head(RewardBatch(prompts=["p", "q"], texts=["ab", "abc"])).tolist() == [2.0, 3.0]


def test_metadata_of_one_sample():
    seen = []

    def f(image, prompt, tag, *, count=7, size, **rest):
        seen.append((prompt, tag, count, size, rest))
        return 0.0

    metadata = [{"tag": "a", "count": 1, "size": 9}, {"tag": "b", "other": None}]
    FunctionHead(f, per_image=True, options={"size": 5})(batch(2, metadata=metadata))
    assert seen == [("prompt 0", "a", 1, 5, {}), ("prompt 1", "b", 7, 5, {"other": None})]
    with pytest.raises(RewardError, match=r"on sample #1 .*`tag`"):
        FunctionHead(f, per_image=True, options={"size": 5})(batch(2, metadata=[{"tag": 1}, {}]))


def test_columns_of_single_images_are_null_where_none_was_returned():
    def f(image, prompt):
        if prompt == "prompt 1":
            return float("nan")
        return 1.0, {"text": prompt} | ({"confidence": 0.5} if prompt == "prompt 2" else {})

    found = FunctionHead(f, per_image=True).evaluate(batch())
    assert found.values.isnan().tolist() == [False, True, False]
    assert found.extra == {"text": ["prompt 0", None, "prompt 2"], "confidence": [None, None, 0.5]}


def wrong(value):
    def f(image, prompt):
        return value if prompt == "prompt 1" else 0.0

    async def g(image, prompt):
        return f(image, prompt)

    return f, g


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"should be a number, NaN where the objective does not apply. Found None"),
        ("1.0", r"Found '1.0'"),
        (torch.zeros(2), r"Found Tensor of shape \[2\]"),
        (float("inf"), r"should be finite or NaN. Found inf"),
        ((1.0, "text"), r"number or \(number, \{column: value\}\). Found \(float, str\)"),
        ((1.0, {"a": {1}}), r"The column `a` should hold JSON values"),
        (Scores(values=torch.zeros(3)), r"Found Scores"),
    ],
)
def test_what_is_no_score_of_an_image_names_the_sample(value, message, is_async):
    head = FunctionHead(wrong(value)[is_async], name="h", per_image=True)
    with pytest.raises(
        RewardError, match=r'"h" failed on sample #1 \'prompt 1\': .*' + message
    ) as caught:
        closing(head, batch())
    assert f"`{'fg'[is_async]}(image, prompt)` ({__file__}:" in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("tag"), RewardError("KeyError: 'tag'")])
def test_an_exception_names_the_sample(error):
    def f(image, prompt):
        if prompt == "prompt 2":
            raise error
        return 0.0

    async def g(image, prompt):
        return f(image, prompt)

    for function in (f, g):
        with pytest.raises(RewardError, match="on sample #2 'prompt 2': KeyError: 'tag'") as caught:
            closing(FunctionHead(function, per_image=True), batch())
        assert caught.value.samples == ((2, "prompt 2"),)
        chain = caught.value
        while chain.__cause__ is not None:
            chain = chain.__cause__
        assert chain is error


# --- async functions ------------------------------------------------------------------------------


def test_a_function_that_forgets_to_be_async_is_an_error():
    """Only what is declared async is awaited; a coroutine is no number."""

    def f(image, prompt):
        return redness_async(image, prompt)

    with (
        pytest.warns(RuntimeWarning, match="never awaited"),
        pytest.raises(RewardError, match=r"on sample #0 .*Found coroutine"),
    ):
        FunctionHead(f, per_image=True)(batch())


# --- the README's example -------------------------------------------------------------------------


def test_the_example_of_the_readme_scores_what_it_says(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## A reward of your own\n")[1]
    code, options = (
        section.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml")
    )
    (tmp_path / "my_rewards.py").write_text(code)
    options = yaml.safe_load(options)["rewards"]["redness"]
    del options["weight"]
    options["path"] = str(tmp_path / options["path"])
    head = create("redness", **options)
    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)])
    found = head(RewardBatch(prompts=["a red kite", "a blue kite"], images=images))
    assert found[0] == 0.25
    assert found[1].isnan()
    assert head.unit
