"""The VQAScore head against a direct computation, on small models of several classes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_vlms
import torch
import transformers
from small_vlms import QWEN_TURNS, batch, change, random_images
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Florence2Config

from rewards import RewardError, available, create
from rewards.identity import Identity

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
# Questions of three lengths, and one with braces; two of one prompt do not stand side by side.
PROMPTS = ["a fish", "a dog on a boat, at night", "a fish", "two {birds}", "a bird"]
ANSWERS = {"qwen3_vl": "Yes", "llava": "Yes", "idefics3": " Yes"}
# Of a probability, which is a part of it: some dozen products of float32 follow each other, in
# another batch. 5e-7 apart, which is 4 eps.
ROUNDING = 1e-5

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders of models, each made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = small_vlms.save(tmp_path_factory.mktemp(name), name)
        return made[name]

    return folder


def head(folder: Path, **options: Any) -> Any:
    return create("vqascore", model=str(folder), device="cpu", **{"dtype": "float32"} | options)


@torch.no_grad()
def direct(
    folder: Path, images: Sequence[Any], questions: Sequence[str], **variables: bool
) -> Tensor:
    """Probabilities of the first token of the reply, ``[n, V]``.

    As the authors' code has them: one image at a time, in the first step of a generation; the
    variables are those of the chat template.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for image, question in zip(images, questions, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **variables,
        )
        reply = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        rows.append(reply.scores[0][0].softmax(-1))
    return torch.stack(rows)


def token(folder: Path, answer: str) -> int:
    """The first token of an answer, as the authors' code finds it."""
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    first: int = tokenizer.encode(answer, add_special_tokens=False)[0]
    return first


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", ANSWERS)
def test_the_head_scores_as_the_authors_do(
    folders: Folders, name: str, height: int, width: int
) -> None:
    folder, answer = folders(name), ANSWERS[name]
    images = random_images(height, width, len(PROMPTS))
    shares = direct(folder, images, [QUESTION.format(prompt) for prompt in PROMPTS])
    expected = shares[:, token(folder, answer)]
    assert expected.max() > 1.2 * expected.min()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    likeliest = [tokenizer.decode(ids) for ids in shares.argmax(-1, keepdim=True).tolist()]
    for batch_size in (1, 2, 16):
        judge = head(folder, answer=answer, batch_size=batch_size)
        found = judge.evaluate(batch(images, PROMPTS))
        torch.testing.assert_close(found.values, expected, rtol=ROUNDING, atol=0)
        assert found.extra == {"reply": likeliest}


def test_the_share_of_two_answers(folders: Folders) -> None:
    folder = folders("qwen3_vl")
    images = random_images(32, 32)
    shares = direct(folder, images, [QUESTION.format("a fish")] * 3)
    yes, no = (shares[:, token(folder, answer)] for answer in ("Yes", "No"))
    assert (yes + no).max() < 0.5  # other words are likelier
    found = head(folder, against="No")(batch(images))
    torch.testing.assert_close(found, yes / (yes + no), rtol=ROUNDING, atol=0)
    turned = head(folder, answer="No", against="Yes")(batch(images))
    torch.testing.assert_close(turned, 1 - found, rtol=ROUNDING, atol=0)


def test_a_question_of_ones_own(folders: Folders) -> None:
    folder = folders("qwen3_vl")
    images = random_images(32, 32, 5)
    shares = direct(folder, images, [f"Is this photo of {{{prompt}}} sharp?" for prompt in PROMPTS])
    found = head(folder, template="Is this photo of {{{prompt}}} sharp?")(batch(images, PROMPTS))
    torch.testing.assert_close(found, shares[:, token(folder, "Yes")], rtol=ROUNDING, atol=0)


def test_a_question_about_the_image_alone_applies_to_every_prompt(folders: Folders) -> None:
    images = random_images(32, 32)
    judge = head(folders("qwen3_vl"), template="Is there a person in this picture?")
    prompts = ["a fish", " ", ""]
    found = judge(batch(images, prompts))
    torch.testing.assert_close(found, judge(batch(images, PROMPTS[:3])), rtol=ROUNDING, atol=0)
    assert found.isfinite().all()
    assert judge.remarks(prompts) == []


def test_blank_prompts_score_nan_where_the_question_is_about_them(folders: Folders) -> None:
    images = random_images(32, 32)
    judge, prompts = head(folders("qwen3_vl")), ["a fish", " \n", ""]
    found = judge.evaluate(batch(images, prompts))
    assert found.values.isnan().tolist() == [False, True, True]
    assert [reply is None for reply in found.extra["reply"]] == [False, True, True]
    assert judge.remarks(prompts) == ["2 of 3 prompts are blank: they score NaN."]
    assert judge.remarks(PROMPTS) == []


def test_the_published_precision_is_the_default(folders: Folders) -> None:
    folder, images = folders("qwen3_vl"), batch(random_images(32, 32))
    judge = create("vqascore", model=str(folder), device="cpu")
    # Relative: some dozen roundings to bfloat16, whose eps is 0.008, move a logit by 0.02.
    torch.testing.assert_close(judge(images), head(folder)(images), rtol=0.1, atol=0)
    assert judge.provenance()["dtype"] == "bfloat16"


def test_what_made_the_scores_is_told(folders: Folders) -> None:
    folder = folders("qwen3_vl")
    judge = head(folder)
    question = {"template": QUESTION.format("{prompt}"), "answer": "Yes"}
    assert judge.provenance() == {"model": str(folder), "dtype": "float32", **question}
    judge.load()
    added = judge.provenance().keys() - {"model", "dtype", *question}
    assert added == {"revision", "files_sha256", "sha256"}
    other = head(folder, template="Sharp?", answer="No", against="Yes")
    told = {"template": "Sharp?", "answer": "No", "against": "Yes"}
    assert other.provenance().items() >= told.items()
    info = available()["vqascore"]
    assert (info.scores, info.unit) == ("images", "probability, 0 to 1")


@pytest.mark.parametrize(
    ("name", "token"),
    [("qwen3_vl", "<|image_pad|>"), ("qwen3_vl", "<|im_end|>"), ("llava", "<image>")],
)
def test_prompts_with_a_special_token_are_told_and_refused(
    folders: Folders, name: str, token: str
) -> None:
    prompts = ["a fish", f"a {token}fish", " "]
    judge = head(folders(name))
    blank, special = judge.remarks(prompts)
    assert blank.startswith("1 of 3 prompts are blank")
    assert special.startswith("1 of 3 prompts hold a special token of the model")
    assert f"The first is 'a {token}fish', with '{token}'." in special
    message = rf"no special token of .* Found '{re.escape(token)}' in 'a {re.escape(token)}fish'"
    with pytest.raises(RewardError, match=message):
        judge(batch(random_images(32, 32), prompts))
    alone = head(folders(name), template="Is it sharp?")
    assert alone.remarks(prompts) == []
    assert alone(batch(random_images(32, 32), prompts)).isfinite().all()


@pytest.mark.parametrize("file", ["chat_template.jinja", "processor_config.json"])
def test_another_turn_or_preprocessing_is_another_scorer(
    folders: Folders, tmp_path: Path, file: str
) -> None:
    options = {"model": str(copy(folders("qwen3_vl"), tmp_path))}

    def identity() -> Identity:
        judge = create("vqascore", device="cpu", **options)
        judge.load()
        return Identity.of("vqascore", judge, options)

    before = identity()
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
    after = identity()
    assert before.provenance["sha256"] == after.provenance["sha256"]
    assert before.digest != after.digest
    assert identity() == after


def test_heads_with_other_questions_share_one_model(folders: Folders) -> None:
    one = head(folders("qwen3_vl"))
    other = head(folders("qwen3_vl"), template="Is this a photo?", answer="No")
    assert one._loaded() is other._loaded()


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("", "should ask a question"),
        (" \n", "should ask a question"),
        ("{text}", r"should have no place but \{prompt\}\. Found"),
        ("{prompt", r"should have no place but \{prompt\}; other braces are doubled"),
        ("{prompt.x}", "should have no place but"),
        ("{prompt!r}", "should have no place but"),
        ("{}", "should have no place but"),
    ],
)
def test_a_wrong_template_is_refused(template: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"Parameter `template` {complaint}"):
        create("vqascore", model="owner/name", template=template)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"answer": ""}, r"`answer` should begin with a token of .* Found `answer = ''`"),
        ({"against": ""}, r"`against` should begin with a token of .* Found `against = ''`"),
        ({"against": "Yes, but"}, r"tell `answer` and `against` apart by their first token"),
    ],
)
def test_answers_that_cannot_be_read_are_told(
    folders: Folders, options: dict[str, str], complaint: str
) -> None:
    with pytest.raises(RewardError, match=complaint):
        head(folders("qwen3_vl"), **options).load()


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def test_a_processor_in_the_files_that_the_hub_has(folders: Folders, tmp_path: Path) -> None:
    """The published weights were saved by a version of transformers that named files otherwise."""
    copy(folders("qwen3_vl"), tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    parts = json.loads((tmp_path / "processor_config.json").read_text())
    for name in ("chat_template.jinja", "processor_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    image = {**parts["image_processor"], "image_processor_type": "Qwen2VLImageProcessorFast"}
    for name, part in (("", image), ("video_", parts["video_processor"])):
        part["processor_class"] = "Qwen3VLProcessor"
        (tmp_path / f"{name}preprocessor_config.json").write_text(json.dumps(part))
    images = batch(random_images(24, 40))
    assert torch.equal(head(tmp_path)(images), head(folders("qwen3_vl"))(images))


@pytest.mark.parametrize("file", ["chat_template.jinja", "processor_config.json"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_what_is_missing_beside_the_weights_is_told(
    folders: Folders, tmp_path: Path, name: str, file: str
) -> None:
    (copy(folders(name), tmp_path) / file).unlink()
    with pytest.raises(RewardError, match=r"chat template in .* is missing or damaged .* anew"):
        head(tmp_path).load()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_every_model_has_is_asked_for(
    folders: Folders, tmp_path: Path, file: str
) -> None:
    (copy(folders("qwen3_vl"), tmp_path) / file).unlink()
    with pytest.raises(RewardError, match=f"lacks `{file}`"):
        head(tmp_path).load()


def test_a_tokenizer_is_no_processor(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(folder: Path, **options: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", without)
    with pytest.raises(RewardError, match=r"found .*Tokenizer.* in the place of a processor"):
        head(folders("qwen3_vl")).load()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            {"model_type": "tomorrow_vl"},
            r"of transformers \d(?s:.*) or update transformers where a later",
        ),
        ({"model_type": "llama"}, "describes no vision-language model"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}},
            "describes no vision-language model.*custom code",
        ),
        (Florence2Config().to_dict(), "Found Florence2ForConditionalGeneration, which has an enc"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    folders: Folders, tmp_path: Path, config: dict[str, Any], complaint: str
) -> None:
    (copy(folders("qwen3_vl"), tmp_path) / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match=complaint):
        head(tmp_path).load()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model.visual.merger.norm.weight": None}, "missing: model.visual.merger.norm.weight"),
        ({"model.mystery": torch.ones(2)}, "unexpected: model.mystery"),
    ],
)
def test_wrong_weights_are_named(
    folders: Folders, tmp_path: Path, changes: dict[str, Tensor | None], complaint: str
) -> None:
    change(copy(folders("qwen3_vl"), tmp_path), changes)
    with pytest.raises(RewardError, match=f'Reward head "vqascore" failed.*{complaint}'):
        head(tmp_path).load()


def test_a_model_that_may_think_is_told_not_to(folders: Folders, tmp_path: Path) -> None:
    answer = (
        "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    )
    file = copy(folders("qwen3_vl"), tmp_path) / "chat_template.jinja"
    file.write_text(QWEN_TURNS + answer)
    images = random_images(32, 32)
    questions = [QUESTION.format("a fish")] * 3
    shares = direct(tmp_path, images, questions, enable_thinking=False)
    found = head(tmp_path)(batch(images))
    expected = shares[:, token(tmp_path, "Yes")]
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)
    file.write_text(QWEN_TURNS + "<|im_start|>assistant\n<think>\n")
    with pytest.raises(RewardError, match=r"thinks before it answers.* first token is the answer"):
        head(tmp_path).load()
