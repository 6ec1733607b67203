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
IMAGES = RewardBatch(
    prompts=["p", "q"],
    images=torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]),
    metadata=[{"answer": "x"}, {"answer": "yy"}],
)


def lengths(completions):
    return [float(len(completion)) for completion in completions]


def asked(prompts, samples):
    assert prompts == ["p", "q"]
    return lengths(samples)


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
    "samples alone": lambda texts: lengths(texts),
    "any samples": lambda prompts, outputs: lengths(outputs),
    "questions and answers": lambda questions, answers: asked(questions, answers),
    "captions and what was generated": lambda captions, generated: asked(captions, generated),
    "a conversation and a reply": lambda conversation, reply: asked(conversation, reply),
    "instruction and output": lambda instruction, output: asked(instruction, output),
    "query and response": lambda query, response: asked(query, response),
    "answers first": lambda answers, questions: asked(questions, answers),
    "likely names, positional-only": lambda query, reply, /: asked(query, reply),
    "likely names and keywords": lambda query, hypotheses, **kwargs: asked(query, hypotheses),
    "as VERL names them": lambda solution_strs, extra_infos=None: lengths(solution_strs),
    "an answer beside samples is a column": lambda generated, answer: lengths(generated),
    "a question beside prompts is an option": lambda texts, prompts, query="": lengths(texts),
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
    assert FunctionHead(function, per_image=True)(IMAGES).tolist() == [0.0, 1.0]


def test_a_function_of_either_kind_is_given_what_there_is():
    def either(prompts, images=None, texts=None):
        return [0.0, 1.0] if texts is None else lengths(texts)

    head = FunctionHead(either)
    assert head.scores == "both"
    assert head(IMAGES).tolist() == [0.0, 1.0]
    assert head(TEXTS).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        (lambda prompts, completions: 0, "texts"),
        (lambda prompts, images: 0, "images"),
        (lambda prompts, completions, images: 0, "texts"),  # a column of the data set
        (lambda prompts, *, response: 0, "texts"),
        (lambda prompts, **kwargs: 0, "both"),
        (lambda images: 0, "images"),
        (lambda captions, generated: 0, "both"),
        (lambda question, answer: 0, "texts"),
        (lambda questions, answers, image: 0, "images"),
    ],
)
def test_the_name_of_the_samples_parameter_says_what_is_scored(function, scores):
    assert FunctionHead(function).scores == scores


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, reference: 0,
        lambda prompts: 0,
        lambda question: 0,
        lambda: 0,
        lambda x: 0,
        lambda images, tag, /: 0,
        lambda a, b: 0,
        lambda a, b, /: 0,
        lambda reference, candidate_text: 0,
        lambda x, prompts: 0,
        lambda queries, prompts, labels: 0,
        lambda question, *more: 0,
    ],
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


def test_two_parameters_that_may_be_the_samples_are_refused():
    with pytest.raises(ValueError, match="Found `prediction` and `output`, which may be the sam"):
        FunctionHead(lambda prediction, output: 0)


def test_what_is_no_sample_nor_prompt_is_asked_of_the_metadata():
    with pytest.raises(RewardError, match=r"needs prompts with the metadata `reference`"):
        FunctionHead(lambda reference, hypothesis: 0).check_prompts(TEXTS.prompts, TEXTS.metadata)
    for function in (
        lambda instruction, input, response: 0,  # at least one of two such names is a column
        lambda x, prompts, **kwargs: 0,
    ):
        with pytest.raises(RewardError, match=r"the samples as `images` or `texts`, `prompts`"):
            FunctionHead(function).check_prompts(TEXTS.prompts, TEXTS.metadata)
        with pytest.raises(RewardError, match="samples are `images` or `texts`, the prompts `pro"):
            FunctionHead(function)(TEXTS)
    with pytest.raises(RewardError, match=r"needs prompts with the metadata `answer`"):
        FunctionHead(lambda prompts, answer, **kwargs: 0).check_prompts(["p"], [{}])


def test_a_column_of_the_data_is_what_it_is_called():
    def judged(question, completions):
        return [float(len(one)) for one in question]

    columns = [{"question": "long"}, {"question": "longer"}]
    batch = RewardBatch(prompts=["p", "q"], texts=["ab", "abc"], metadata=columns)
    for function in (judged, lambda question, completions, **_: judged(question, completions)):
        head = FunctionHead(function)
        head.check_prompts(batch.prompts, columns)
        assert head(batch).tolist() == [4.0, 6.0]
        head.check_prompts(TEXTS.prompts, TEXTS.metadata)
        assert head(TEXTS).tolist() == [1.0, 1.0]
        with pytest.raises(RewardError, match=r"`question`.* 1 of 2 lack it"):
            head.check_prompts(batch.prompts, [columns[0], {}])
    each = FunctionHead(lambda question, text: len(question), per_image=True)
    assert (each(batch).tolist(), each(TEXTS).tolist()) == ([4.0, 6.0], [1.0, 1.0])


def test_a_parameter_that_might_mean_two_things_is_told():
    head = FunctionHead(lambda prompts, answer: lengths(answer))
    with pytest.raises(RewardError, match=r"parameter `answer` of .* may mean the metadata key"):
        head.check_prompts(TEXTS.prompts, TEXTS.metadata)
    with pytest.raises(RewardError, match="metadata key `answer` has the name"):
        head(TEXTS)


def test_a_function_of_one_sample_that_got_a_batch_is_told_how_to_say_so():
    hint = r"parameter `image` speaks of one sample.* set `per_image: true`"
    with pytest.raises(RewardError, match=r"shape \[2\]. Found \[\]\..*" + hint):
        FunctionHead(lambda image, prompt: image.mean())(IMAGES)
    with pytest.raises(RewardError, match="AttributeError: .*split.*" + hint):
        FunctionHead(lambda image, prompt: len(prompt.split()))(IMAGES)
    with pytest.raises(RewardError, match=r"2 numbers. Found None\..*" + hint):
        FunctionHead(lambda image, prompt: None)(IMAGES)
    with pytest.raises(RewardError) as caught:
        FunctionHead(lambda images, prompts: images.mean())(IMAGES)
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
        head(IMAGES)
