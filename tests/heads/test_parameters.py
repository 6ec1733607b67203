"""What a reward function is given: its parameters are filled by what they are called."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math

import pytest
import torch

from rewards import FunctionHead, RewardBatch, RewardError, create, register, registry

TEXTS = RewardBatch(
    prompts=["p", "q"], texts=["ab", "abc"], metadata=[{"answer": "x"}, {"answer": "yy"}]
)
PICTURES = RewardBatch(
    prompts=["p", "q"],
    images=torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]),
    metadata=[{"answer": "x"}, {"answer": "yy"}],
)


def lengths(completions):
    return [float(len(completion)) for completion in completions]


class Callable:
    def __call__(self, prompts, completions, **kwargs):
        assert list(prompts) == ["p", "q"]
        return lengths(completions)

    async def later(self, prompts, completions, **kwargs):
        await asyncio.sleep(0)
        return self(prompts, completions)


def documented(prompts, completions, **kwargs):
    assert kwargs == {"answer": ["x", "yy"]}
    return lengths(completions)


def with_a_column(completions, answer, **kwargs):
    assert (answer, kwargs) == (["x", "yy"], {"prompts": ["p", "q"]})
    return [10 + value for value in lengths(completions)]


def keywords_only(*, prompts, answer, responses):
    assert (prompts, answer) == (["p", "q"], ["x", "yy"])
    return lengths(responses)


def a_column_before(prompts, answer, texts):
    assert (prompts, answer) == (["p", "q"], ["x", "yy"])
    return lengths(texts)


def nothing_but_keywords(**kwargs):
    assert kwargs.keys() == {"prompts", "texts", "completions", "answer"}
    return lengths(kwargs["completions"])


def scaled(prompts, completions, scale):
    return [scale * value for value in lengths(completions)]


@functools.wraps(documented)
def decorated(*args, **kwargs):
    return documented(*args, **kwargs)


BY_NAME = {
    "as TRL documents it": documented,
    "samples first": lambda texts, prompts: lengths(texts),
    "keyword-only": keywords_only,
    "metadata in between": a_column_before,
    "prompts left out": lambda completions, answer: lengths(completions),
    "nothing but keywords": nothing_but_keywords,
    "positional-only": lambda prompts, completions, /: lengths(completions),
    "by place where no name says anything": lambda a, b: lengths(a),
    "by place, positional-only": lambda a, b, /: lengths(a),
    "any samples": lambda prompts, outputs: lengths(outputs),
    "any number": lambda *arguments: lengths(arguments[0]),
    "prompts and any number": lambda prompts, *arguments: lengths(arguments[0]),
    "decorated": decorated,
    "an object": Callable(),
    "a method": Callable().__call__,
    "async": Callable().later,
    "a partial": functools.partial(scaled, scale=1.0),
    "a column named as samples are": lambda completions, prompts, text=None: lengths(completions),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_texts_and_prompts_go_to_the_parameters_of_these_names(name):
    head = FunctionHead(BY_NAME[name])
    try:
        assert head(TEXTS).tolist() == [2.0, 3.0]
    finally:
        head.close()


def test_metadata_goes_to_the_parameters_of_its_names():
    assert FunctionHead(with_a_column)(TEXTS).tolist() == [12.0, 13.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompt, image: image.mean(),
        lambda image, answer: image.mean() * len(answer) / len(answer),
        lambda *, prompt, picture: picture.mean(),
        lambda **kwargs: kwargs["image"].mean() if kwargs["prompt"] in "pq" else math.nan,
    ],
)
def test_one_by_one_too(function):
    assert FunctionHead(function, per_image=True)(PICTURES).tolist() == [0.0, 1.0]


def test_a_function_of_either_kind_is_given_what_there_is():
    def either(prompts, images=None, texts=None):
        return [0.0, 1.0] if texts is None else lengths(texts)

    head = FunctionHead(either)
    assert head.scores == "both"
    assert head(PICTURES).tolist() == [0.0, 1.0]
    assert head(TEXTS).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        (lambda prompts, completions: 0, "texts"),
        (lambda prompts, images: 0, "images"),
        (lambda prompts, completions, images: 0, "texts"),  # a column of the data set
        (lambda prompts, *, response: 0, "texts"),
        (lambda prompts, **kwargs: 0, "both"),
    ],
)
def test_the_name_of_the_samples_parameter_says_what_is_scored(function, scores):
    assert FunctionHead(function).scores == scores


@pytest.mark.parametrize(
    "function", [lambda prompts, answer: 0, lambda prompts: 0, lambda: 0, lambda images, tag, /: 0]
)
def test_a_function_without_a_parameter_for_the_samples_is_refused(function):
    with pytest.raises(ValueError, match=r"should take `\(images, prompts, .*Found .*<lambda>\("):
        FunctionHead(function)


def test_what_nothing_fills_is_told_before_anything_is_drawn():
    def judge(completions, answer, rubric):
        return lengths(completions)

    head = FunctionHead(judge, name="judged")
    line = inspect.getsourcelines(judge)[1]
    with pytest.raises(RewardError) as caught:
        head.check_prompts(TEXTS.prompts, TEXTS.metadata)
    message = str(caught.value)
    assert message.startswith('Reward head "judged" failed: The function `judge(completions, ')
    assert f"({__file__}:{line}) needs prompts with the metadata `rubric`" in message
    assert "2 of 2 lack it, first 'p'" in message
    assert message.endswith("the samples as `images` or `texts`, `prompts`, `answer`.")
    FunctionHead(judge, options={"rubric": "r"}).check_prompts(TEXTS.prompts, TEXTS.metadata)


def test_a_parameter_that_might_mean_two_things_is_told():
    head = FunctionHead(lambda x, answer: lengths(x))
    with pytest.raises(RewardError, match=r"parameter `answer` of .* may mean the metadata key"):
        head.check_prompts(TEXTS.prompts, TEXTS.metadata)
    with pytest.raises(RewardError, match="metadata key `answer` has the name"):
        head(TEXTS)


def test_a_function_of_one_sample_that_got_a_batch_is_told_how_to_say_so():
    hint = r"parameter `image` speaks of one sample.* set `per_image: true`"
    with pytest.raises(RewardError, match=r"shape \[2\]. Found \[\]\..*" + hint):
        FunctionHead(lambda image, prompt: image.mean())(PICTURES)
    with pytest.raises(RewardError, match="AttributeError: .*split.*" + hint):
        FunctionHead(lambda image, prompt: len(prompt.split()))(PICTURES)
    with pytest.raises(RewardError, match=r"2 numbers. Found None\..*" + hint):
        FunctionHead(lambda image, prompt: None)(PICTURES)
    with pytest.raises(RewardError) as caught:
        FunctionHead(lambda images, prompts: images.mean())(PICTURES)
    assert "per_image" not in str(caught.value)


def test_heads_by_name_and_path_are_called_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register("documented")(documented)
    assert create("documented")(TEXTS).tolist() == [2.0, 3.0]
    file = tmp_path / "swapped.py"
    file.write_text("def f(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
    head = create("long", f"{file}:f")
    assert head(TEXTS).tolist() == [2.0, 3.0]
    with pytest.raises(RewardError, match="This head scores texts"):
        head(PICTURES)
