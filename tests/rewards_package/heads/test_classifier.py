"""Text classifiers as heads: the scores of transformers itself, whatever the batch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import RewardBatch, RewardError, create
from rewards.heads.classifier import check_template
from rewards.identity import Identity

WORDS = ["the", "film", "is", "a", "dull", "joy", "and", "rain", "fell", "on", "my", "red", "hat"]
WORDS += ["so", "we", "left", "early", "but", "laughed"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<e>"]
LABELS = {0: "SAD", 1: "GLAD", 2: "MIXED"}
PROMPTS = ["the film is", "a red hat and", "my", "so we left", "rain fell on the film"]
TEXTS = [
    " a joy",
    " dull dull dull and dull rain fell on my hat",
    " the",
    " early but laughed a",
    "",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# Another batch or padding sums in another order: some 30 products that follow each other, each of
# 32 terms, whose errors add up to about 32 times float32's eps, of activations up to about 10.
ROUNDING = 32 * 10 * torch.finfo(torch.float32).eps


def tokenizer(kind: str) -> Any:
    """Words as tokens; for encoders between <s> and </s>, as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    decoder = kind.startswith(("gpt2", "llama"))
    names = ["input_ids", "attention_mask"]
    if not decoder:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 2), ("</s>", 3)],
        )
        if kind == "bert":
            names.append("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<e>",
        pad_token=None if "without" in kind else "<pad>",
        model_input_names=names,
        model_max_length=40,
    )


def model(kind: str, labels: dict[int, str], **more: Any) -> Any:
    import transformers as t

    name = kind.split()[0]
    common: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "id2label": labels,
        "label2id": {label: index for index, label in labels.items()},
        "bos_token_id": 2,
        "eos_token_id": 4,
        "pad_token_id": None if "without" in kind else 0,
        **more,
    }
    configs: dict[str, Any] = {
        "bert": lambda: t.BertConfig(**SMALL, intermediate_size=32, **common),
        "distilbert": lambda: t.DistilBertConfig(
            dim=32, n_layers=2, n_heads=2, hidden_dim=32, **common
        ),
        "roberta": lambda: t.RobertaConfig(
            **SMALL, intermediate_size=32, max_position_embeddings=20, **common
        ),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=48, **common),
        "llama": lambda: t.LlamaConfig(
            **SMALL, intermediate_size=32, max_position_embeddings=48, **common
        ),
        "xlnet": lambda: t.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=32, **common),
    }
    torch.manual_seed(3)
    made = t.AutoModelForSequenceClassification.from_config(configs[name]())
    with torch.no_grad():
        for parameter in made.parameters():  # the usual start is so small that scores are all 0
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def save(folder: Path, kind: str, labels: dict[int, str] = LABELS, **more: Any) -> Any:
    made = model(kind, labels, **more)
    made.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and model of a kind, made once."""
    made: dict[str, tuple[str, Any]] = {}

    def get(kind: str) -> tuple[str, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("model")
            made[kind] = (str(folder), save(folder, kind))
        return made[kind]

    return get


def batch(texts: list[str] = TEXTS, prompts: list[str] = PROMPTS) -> RewardBatch:
    return RewardBatch(prompts=prompts[: len(texts)], texts=texts)


def head(folder: str | Path, **options: Any) -> Any:
    return create("classifier", **{"model": str(folder), "device": "cpu", "logit": 1, **options})


def alone(made: Any, kind: str, *parts: list[str], **options: Any) -> torch.Tensor:
    """Logits of transformers itself, one text after the other: no padding at all."""
    read = tokenizer(kind)
    rows = [
        made(**read(*row, return_tensors="pt", **options)).logits[0].double()
        for row in zip(*parts, strict=True)
    ]
    return torch.stack(rows).detach()


def joined() -> list[str]:
    return [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]


KINDS = [
    "bert",
    "distilbert",
    "roberta",
    "gpt2",
    "llama",
    "xlnet",
    "gpt2 without",
    "llama without",
]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers_for_each_text_alone(folders: Any, kind: str) -> None:
    folder, made = folders(kind)
    wanted = alone(made, kind, joined())  # [5, 3]
    assert wanted.std(0).min() > 0.01  # there is something to be wrong about
    for size in (1, 2, 16):
        found = head(folder, batch_size=size)(batch())
        torch.testing.assert_close(found.double(), wanted[:, 1], rtol=ROUNDING, atol=ROUNDING)
    chance = head(folder, logit="MIXED", output="probability")(batch()).double()
    torch.testing.assert_close(chance, wanted.softmax(-1)[:, 2], rtol=ROUNDING, atol=ROUNDING)


def test_texts_that_end_in_the_token_for_padding(tmp_path: Path) -> None:
    """As where GPT-2 pads with its end: transformers reads the last token before, alone or not."""
    made = save(tmp_path, "gpt2", pad_token_id=SPECIAL.index("<e>"))
    template = "{prompt}{text} <e> <e>"
    texts = [f"{text} <e> <e>" for text in joined()]
    wanted = alone(made, "gpt2", texts)[:, 1]
    found = head(tmp_path, template=template)(batch()).double()
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_scores_are_those_of_the_pipeline(folders: Any, kind: str) -> None:
    from transformers import pipeline

    folder, made = folders(kind)
    classify = pipeline("text-classification", model=made, tokenizer=tokenizer(kind), device="cpu")
    wanted = [
        {cell["label"]: cell["score"] for cell in cells} for cells in classify(joined(), top_k=None)
    ]
    for label in LABELS.values():
        found = head(folder, logit=label, output="probability")(batch()).tolist()
        assert found == pytest.approx([cells[label] for cells in wanted], abs=ROUNDING)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama without"])
def test_prompt_and_text_as_two_segments(folders: Any, kind: str) -> None:
    folder, made = folders(kind)
    wanted = alone(made, kind, PROMPTS, TEXTS)[:, 1]
    found = head(folder, pair=True)(batch()).double()
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)
    if kind == "bert":  # the separator is read
        assert (found - head(folder)(batch()).double()).abs().max() > 0.01


def test_a_template_says_what_is_read(folders: Any) -> None:
    folder, made = folders("bert")
    for template, texts in (
        ("{text}", TEXTS),
        ("{text} <e> {prompt}", [f"{t} <e> {p}" for p, t in zip(PROMPTS, TEXTS, strict=True)]),
        ("{{ {text} }}", [f"{{ {text} }}" for text in TEXTS]),
    ):
        found = head(folder, template=template)(batch()).double()
        torch.testing.assert_close(
            found, alone(made, "bert", texts)[:, 1], rtol=ROUNDING, atol=ROUNDING
        )
    # What a policy writes is no template.
    evil = ["{prompt}", "{text.__class__}", "{0}", "}{", "{"]
    assert head(folder, template="{text}")(batch(evil)).isfinite().all()


@pytest.mark.parametrize(
    "template",
    ["", "{prompt}", "{text", "{text}{answer}", "{text.x}", "{text!r}", "{text:>9}", "{}"],
)
def test_a_wrong_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="Parameter `template` should have the place"):
        check_template(template)


def test_one_output_needs_no_name_and_gives_a_sigmoid(tmp_path: Path) -> None:
    made = save(tmp_path, "llama without", {0: "reward"})
    wanted = alone(made, "llama without", joined())[:, 0]
    found = head(tmp_path, logit=None)
    torch.testing.assert_close(found(batch()).double(), wanted, rtol=ROUNDING, atol=ROUNDING)
    assert found.unit == "logit"
    assert found.provenance()["label"] == "reward"
    chance = head(tmp_path, logit="reward", output="probability")(batch()).double()
    torch.testing.assert_close(chance, wanted.sigmoid(), rtol=ROUNDING, atol=ROUNDING)


def test_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    made = save(tmp_path, "bert", problem_type="multi_label_classification")
    chance = head(tmp_path, output="probability")(batch()).double()
    wanted = alone(made, "bert", joined())[:, 1].sigmoid()
    torch.testing.assert_close(chance, wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    ("logit", "message"),
    [
        (None, r"several outputs. Set `logit` to one of 0 \(SAD\), 1 \(GLAD\), 2 \(MIXED\)"),
        ("GLADD", r"`logit = \'GLADD\'`. It has 0 \(SAD\).* Did you mean \'GLAD\'"),
        (3, r"one output that is `logit = 3`. It has 0 \(SAD\)"),
        (-1, r"`logit = -1`"),
    ],
)
def test_an_output_that_is_not_there_is_told_at_loading(
    folders: Any, logit: int | str | None, message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        head(folders("bert")[0], logit=logit).load()


@pytest.mark.parametrize(("kind", "longest"), [("bert", 40), ("roberta", 19), ("gpt2", 40)])
def test_long_texts_are_cut_with_one_warning(
    folders: Any, kind: str, longest: int, caplog: pytest.LogCaptureFixture
) -> None:
    """By default where tokenizer or model ends; the positions of RoBERTa begin after padding's."""
    folder, made = folders(kind)
    texts = [" ".join(WORDS * 4), " ".join(WORDS[::-1] * 5)]
    for side in ("right", "left"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rewards.heads.classifier"):
            scored = head(folder, template="{text}", truncation_side=side)
            found = scored(batch(texts)).double()
        (record,) = caplog.records
        assert f"reads {longest} tokens and cuts the {side} end off" in record.getMessage()
        rows = []
        for text in texts:
            ids = tokenizer(kind)(text, add_special_tokens=False).input_ids
            room = longest - (0 if kind == "gpt2" else 2)
            kept = ids[:room] if side == "right" else ids[-room:]
            whole = kept if kind == "gpt2" else [2, *kept, 3]
            rows.append(made(input_ids=torch.tensor([whole])).logits[0, 1].double())
        torch.testing.assert_close(found, torch.stack(rows), rtol=ROUNDING, atol=ROUNDING)


def test_max_length(folders: Any) -> None:
    folder, made = folders("bert")
    wanted = alone(made, "bert", joined(), truncation=True, max_length=5)[:, 1]
    found = head(folder, max_length=5)(batch()).double()
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)
    head(folder, max_length=512).load()  # more than the tokenizer's own, which is a default
    with pytest.raises(RewardError, match=r"reads at most 512 tokens. Found `max_length = 513`"):
        head(folder, max_length=513).load()


def test_a_text_without_tokens(folders: Any, tmp_path: Path) -> None:
    """An empty answer is read as the token for the beginning; without one it is an error."""
    folder, made = folders("gpt2 without")
    found = head(folder, template="{text}")(batch(["", "a joy"]))
    wanted = made(input_ids=torch.tensor([[2]])).logits[0, 1]
    torch.testing.assert_close(found[0], wanted.detach(), rtol=ROUNDING, atol=ROUNDING)
    made.save_pretrained(tmp_path)
    bare = tokenizer("gpt2 without")
    bare.bos_token = bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="has none for the beginning of a text"):
        head(tmp_path, template="{text}")(batch(["", "a joy"]))


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    save(tmp_path, "gpt2", vocab_size=len(SPECIAL) + 6)
    assert head(tmp_path)(batch(["", ""], ["the film", "a"])).isfinite().all()
    with pytest.raises(RewardError, match=r"makes the token 19 of 'so we', and the model knows 11"):
        head(tmp_path, template="{text}")(batch(["the film", "so we"]))


def test_a_token_for_padding_that_the_model_does_not_know(folders: Any, tmp_path: Path) -> None:
    """One that was added to a tokenizer, and to no embeddings."""
    save(tmp_path, "gpt2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 99}))
    with pytest.raises(RewardError, match=r"`pad_token_id` = 99 in `config.json`, should be one"):
        head(tmp_path).load()
    # Where the tokenizer has another token for padding than the model, the model's counts.
    made = folders("gpt2")[1]
    other = tokenizer("gpt2")
    other.pad_token = "joy"
    made.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    wanted = alone(made, "gpt2", joined())[:, 1]
    torch.testing.assert_close(
        head(tmp_path)(batch()).double(), wanted, rtol=ROUNDING, atol=ROUNDING
    )


def test_pickled_weights_are_read_without_running_code(tmp_path: Path) -> None:
    made = save(tmp_path, "distilbert")
    (tmp_path / "model.safetensors").unlink()
    torch.save(made.state_dict(), tmp_path / "pytorch_model.bin")
    wanted = alone(made, "distilbert", joined())[:, 1]
    torch.testing.assert_close(
        head(tmp_path)(batch()).double(), wanted, rtol=ROUNDING, atol=ROUNDING
    )
    torch.save({"module": made}, tmp_path / "pytorch_model.bin")
    again = head(tmp_path)
    with pytest.raises(RewardError, match="could run code"):
        again.load()


def test_what_is_no_classifier_is_told(folders: Any, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    _, made = folders("gpt2")
    GPT2LMHeadModel(made.config).save_pretrained(tmp_path)
    with pytest.raises(
        RewardError, match=r"do not fit this model\. Tensors missing: score\.weight"
    ):
        head(tmp_path).load()
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in (
        {"model_type": "t5gemma2_encoder_that_is_not"},
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}},
        {"model_type": "vit"},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        (tmp_path / "mine.py").write_text("raise SystemExit('code of the model ran')")
        with pytest.raises(RewardError, match="describes no text classifier"):
            head(tmp_path).load()


def test_a_model_without_a_tokenizer_is_told(folders: Any, tmp_path: Path) -> None:
    folders("bert")[1].save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"has no tokenizer in .*: one of tokenizer\.json"):
        head(tmp_path).load()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RewardError, match=r"tokenizer in .* cannot be loaded"):
        head(tmp_path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "score"}, "should be one of 'logit', 'probability'"),
        ({"truncation_side": "middle"}, "should be one of 'left', 'right'"),
        ({"pair": True, "template": "{text}"}, "`template` should be left out with `pair`"),
        ({"max_length": 0}, r"Found `max_length = 0`\."),
        ({"logit": 0.5}, "should be an integer or a text or null"),
        ({"dtype": "float8"}, "Found `dtype = 'float8'`"),
        ({"model": "./no/such/folder"}, "does not exist"),
    ],
)
def test_wrong_options(folders: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(folders("bert")[0], **options)


def test_wrong_options_without_the_registry(folders: Any) -> None:
    from rewards.heads.classifier import Classifier

    for option in ("output", "truncation_side"):
        with pytest.raises(ValueError, match=f"Parameter `{option}` should be one of"):
            Classifier(folders("bert")[0], **{option: "middle"})


def test_images_are_refused_before_anything_is_loaded(folders: Any) -> None:
    scored = head(folders("bert")[0])
    with pytest.raises(RewardError, match=r"This head scores texts\. Found a batch of images"):
        scored(RewardBatch(prompts=["a"], images=torch.zeros(1, 3, 8, 8)))
    assert scored.provenance().keys() == {"model", "dtype"}


def test_half_precision_sharing_and_identity(folders: Any) -> None:
    folder, made = folders("gpt2")
    wanted = alone(made, "gpt2", joined())[:, 1]
    half = head(folder, dtype="bfloat16")
    # Some dozen roundings to bfloat16, by 0.4 % of activations of a few: 0.025 apart.
    torch.testing.assert_close(half(batch()).double(), wanted, rtol=0.05, atol=0.1)
    one, two = head(folder, logit="SAD"), head(folder, logit="GLAD")
    one.load()
    two.load()
    assert one._shared is two._shared  # two labels of one model are one model
    assert one.provenance()["label"] == "SAD"
    two.offload()
    torch.testing.assert_close(two(batch()).double(), wanted, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(RewardError, match="are not the expected ones"):
        head(folder, sha256="00").load()
    first = Identity.of("c", one, {"model": folder, "logit": "SAD", "batch_size": 3})
    second = Identity.of("c", one, {"model": folder, "logit": "SAD"})
    assert first.digest == second.digest
    assert first.scores == "texts"
    for scored in (half, one, two):
        scored.close()


def test_prompts_that_leave_no_room_for_the_text_are_counted(folders: Any) -> None:
    """All texts score the same then."""
    folder, _ = folders("bert")
    options: dict[str, Any] = {"model": folder, "logit": 0, "max_length": 8}
    prompts = ["the " * 8, "the film is"]
    (remark,) = create("classifier", **options).remarks(prompts)
    assert remark.startswith("1 of 2 prompts fill the 8 tokens that the model reads: nothing of a")
    assert "`truncation_side: left`" in remark
    # Of a pair the longer is cut, so that something of the text is always left.
    for more in ({"truncation_side": "left"}, {"pair": True}, {"template": "{text} {prompt}"}):
        assert create("classifier", **options, **more).remarks(prompts) == []
