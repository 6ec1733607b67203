"""Heads that score texts without a model, and that every head says what it scores."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import struct
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from rewards import (
    FunctionHead,
    RewardBatch,
    RewardError,
    RewardHead,
    available,
    create,
    register,
    registry,
)
from rewards.commands import cli
from rewards.commands.check_head import Unusable, prepare, try_head
from rewards.commands.score_folder import ScoreTable, score_pairs, texts_of
from rewards.identity import Identity
from rewards.serving import wire
from rewards.serving.remote import RemoteHead
from rewards.serving.server import Limits, Service, listen, run
from waiting import DEADLINES, HANG, wait_until

# Scores are quotients of whole numbers, rounded to float32, by 6e-8: pytest's default is 1e-6.


def scores(name: str, *texts: str, **options: Any) -> list[float]:
    found: list[float] = create(name, **options)(batch(*texts)).tolist()
    return found


def batch(*texts: str) -> RewardBatch:
    return RewardBatch(prompts=["a long prompt that no head here counts"] * len(texts), texts=texts)


def image_batch(count: int = 1) -> RewardBatch:
    return RewardBatch(prompts=["?"] * count, images=torch.zeros(count, 3, 8, 8))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    available()  # built-in modules register once per process, so before the copy is taken
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


# --- length ---------------------------------------------------------------------------------------


def test_length_is_the_clipped_quotient() -> None:
    texts = [" ".join(["word"] * count) for count in (0, 1, 70, 140, 182, 210, 5000)]
    wanted = [0.5, 0.5, 0.5, 1.0, 1.3, 1.5, 1.5]
    assert scores("length", *texts) == pytest.approx(wanted)
    assert scores("length", *texts, direction="shorter") == pytest.approx([-w for w in wanted])
    free = scores("length", *texts, scale=10, low=0, high=None)
    assert free == pytest.approx([0, 0.1, 7, 14, 18.2, 21, 500])
    assert create("length").unit == "words / 140"
    assert create("length", scale=0.5, direction="shorter", unit="characters").unit == (
        "-characters / 0.5"
    )


def test_characters_are_counted_so_that_white_space_gains_nothing() -> None:
    texts = ["", "ab", "  a \n\n b\t", "e\u0301", "你好", "\U0001f600"]
    found = scores("length", *texts, unit="characters", scale=1, low=0, high=None)
    assert found == [0, 2, 3, 1, 2, 1]
    assert scores("length", "  a \n\n b\t", scale=1, low=0, high=None) == [2]


def test_tokens_are_those_of_a_tokenizer_without_special_ones(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")]))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=2).save_pretrained(tmp_path)
    options = {"unit": "tokens", "scale": 1, "low": 0, "high": None}
    head = create("length", tokenizer=str(tmp_path), **options)
    assert head.provenance() == {}
    assert head(batch("ab", "aab", "", "aaaa")).tolist() == [1, 2, 0, 4]
    found = head.provenance()
    assert (found["tokenizer"], found["tokenizer_revision"]) == (str(tmp_path), "local")
    assert len(found["tokenizer_files_sha256"]) == 64
    head.close()
    assert head(batch("ab")).tolist() == [1]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(RewardError, match=r'"length" failed: The model .* lacks any of tokenizer'):
        create("length", tokenizer=str(tmp_path), **options).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"`scale` should be positive\. Found `scale = 0.0`"),
        ({"scale": float("nan")}, "Found `scale = nan`"),
        ({"low": -1.0}, "0 <= low < high"),
        ({"low": 1.5}, r"Found `low = 1.5`, `high = 1.5`"),
        ({"unit": "lines"}, "'words', 'characters', 'tokens'"),
        ({"direction": "up"}, "'longer', 'shorter'"),
        ({"unit": "tokens"}, "`tokenizer` should be given with `unit: tokens`, and only then"),
        ({"tokenizer": "gpt2"}, "with `unit = 'words'`"),
        ({"revision": "main"}, "`revision` is that of a tokenizer"),
        ({"unit": "tokens", "tokenizer": "./none"}, "`tokenizer` names a file or folder that"),
    ],
)
def test_wrong_options_of_length(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("length", **options)


# --- keyword --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text", "wanted"),
    [
        ({"words": ["please", "thank you"]}, "Please: THANK\n  you!", 1.0),
        ({"words": ["please", "thank you"]}, "please, please", 0.5),
        ({"words": ["please"]}, "displeased, pleased, please_", 0.0),
        ({"words": ["please"], "whole_words": False}, "displeased", 1.0),
        ({"words": ["please"], "ignore_case": False}, "Please", 0.0),
        ({"words": ["Straße"]}, "STRASSE", 1.0),
        ({"words": ["caf\u00e9"]}, "the cafe\u0301.", 1.0),
        ({"words": ["cafe"]}, "the cafe\u0301.", 0.0),
        ({"words": ["ﬁne"]}, "fine", 1.0),
        ({"words": ["हिन्दी"]}, "हिन्दी", 1.0),
        ({"words": ["हिन्द"]}, "हिन्दी", 0.0),  # a vowel sign is part of the word
        ({"words": ["c++", ".*"]}, "I write C++.", 0.5),
        ({"words": ["你好"]}, "大家你好啊", 0.0),
        ({"words": ["你好"], "whole_words": False}, "大家你好啊", 1.0),
        ({"words": ["thank", "thank you"], "cap": 4}, "Thank you, thanks, thank you!", 0.5),
        ({"words": ["aa"], "cap": 1, "whole_words": False}, "aaaa", 1.0),
        ({"words": ["a"], "cap": 2}, "", 0.0),
    ],
)
def test_keywords(options: dict[str, Any], text: str, wanted: float) -> None:
    assert scores("keyword", text, **options) == [wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": []}, r"not empty\. Found `words = \[\]`"),
        ({"words": "please"}, "should be a list"),
        ({"words": ["a", " "]}, "Found ' ' at place 1"),
        ({"words": ["Yes", "b", "YES"]}, "Found 'YES' twice, as they are compared"),
        ({"words": ["a"], "cap": 0}, "Found `cap = 0`"),
        ({}, "needs the option words"),
    ],
)
def test_wrong_options_of_keyword(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("keyword", **options)


# --- repetition -----------------------------------------------------------------------------------


def test_repetition_is_minus_the_share_of_repeated_n_grams() -> None:
    texts = ["", "one two three", "a b c a b c a b", "the end. The END!", "all of these differ now"]
    # n = 3: abc bca cab abc bca cab: 3 of 6 distinct.
    assert scores("repetition", *texts, n=3) == pytest.approx([0, 0, -0.5, 0, 0])
    assert scores("repetition", *texts, n=1) == pytest.approx([0, 0, -5 / 8, -0.5, 0])
    assert scores("repetition", "ab ab ab", n=2, unit="characters") == pytest.approx([-3 / 5])
    assert scores("repetition", "你好你好", n=1, unit="characters") == [-0.5]
    assert scores("repetition", "w " * 1000)[0] == pytest.approx(1 / 997 - 1)
    for options in ({"n": 0}, {"unit": "tokens"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            create("repetition", **options)


# --- format ---------------------------------------------------------------------------------------


def test_format_matches_the_whole_or_a_part() -> None:
    texts = ["Dear Ann,\nhello.\nYours, B", " Dear Ann,", "dear Ann,\nYours, C", ""]
    letter = r"(?s)Dear \w+,.*Yours, \w"
    assert scores("format", *texts, pattern=letter) == [1, 0, 0, 0]
    assert scores("format", *texts, pattern=f"(?i){letter}") == [1, 0, 1, 0]
    assert scores("format", *texts, pattern=r"Dear \w+,", match="search") == [1, 1, 0, 0]
    assert scores("format", *texts, pattern="") == [0, 0, 0, 1]


def test_a_pattern_that_explodes_is_an_error_and_no_score() -> None:
    for seconds in (0.05, *DEADLINES):
        head = create("format", pattern="(a|aa)+b", timeout=seconds)
        told = f"longer than {seconds:g} s on a text of 62 characters"
        with pytest.raises(RewardError, match=told) as e:
            head(batch("aab", "a" * 60 + "!b"))
        if len(e.value.samples) == 1:  # else the machine was too busy for the first
            break
    assert [index for index, _ in e.value.samples] == [1]
    assert scores("format", "aab", "a" * 60 + "!b", pattern="(?>a|aa)+b") == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "a(b"}, r"missing \) at position 3. Found `pattern = 'a\(b'`"),
        ({"pattern": "[a-"}, r"at position 3"),
        ({"pattern": "a", "match": "start"}, "'full', 'search'"),
        ({"pattern": "a", "timeout": 0.0}, r"`timeout` should be positive\. Found `timeout = 0.0`"),
    ],
)
def test_wrong_options_of_format(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("format", **options)


# --- what heads score -----------------------------------------------------------------------------


def test_every_built_in_head_says_what_it_scores() -> None:
    found = {name: info.scores for name, info in available().items() if name in registry._BUILT_IN}
    assert {name for name, kind in found.items() if kind == "texts"} == {
        "classifier",
        "format",
        "keyword",
        "length",
        "repetition",
    }
    assert [name for name, kind in found.items() if kind == "both"] == ["remote"]


def test_a_wrong_batch_is_refused_before_the_head_sees_it() -> None:
    class Texts(RewardHead):
        scores = "texts"

        def score(self, batch: RewardBatch) -> torch.Tensor:
            pytest.fail("the head was called")

    head = Texts()
    for count in (0, 1):
        with pytest.raises(RewardError, match=r'"Texts" .*scores texts\. Found a batch of images'):
            head(image_batch(count))
    with pytest.raises(RewardError, match="scores texts"):
        head.expect("images")
    head.expect("texts")
    for kind in ("images", "texts"):
        RemoteHead("http://localhost:1", "x").expect(kind)  # which it does not know yet
    assert (image_batch().kind, batch("a").kind) == ("images", "texts")


def test_a_head_cannot_claim_to_score_something_else(own_registry: None) -> None:
    class Wrong(RewardHead):
        scores = "text"  # type: ignore[assignment]

        def score(self, batch: RewardBatch) -> torch.Tensor:
            return torch.zeros(len(batch))

    with pytest.raises(
        ValueError, match=r"images, texts, both\. Found `scores = 'text'` of `Wrong"
    ):
        register("wrong")(Wrong)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda texts, prompts: [1.0], "texts"),
        (lambda text, prompt, /: 1.0, "texts"),
        (lambda images, prompts, texts=None: [1.0], "images"),
        (lambda image, prompt: 1.0, "images"),
        (lambda samples, prompts: [1.0], "both"),
        (lambda *texts: [1.0], "both"),
    ],
)
def test_the_first_parameter_of_a_function_says_what_it_scores(function: Any, kind: str) -> None:
    head = FunctionHead(function, name="f")
    assert head.scores == kind
    for name, given in (("images", image_batch()), ("texts", batch("a"))):
        if kind not in (name, "both"):
            with pytest.raises(RewardError, match=f'"f" failed: This head scores {kind}'):
                head(given)


def test_functions_of_texts(own_registry: None) -> None:
    """For a batch or one by one, blocking or async, with metadata, options and columns."""

    @register("shout", unit="share of capitals")
    def shout(texts: list[str], prompts: list[str], *, weight: float = 1.0, **metadata: Any) -> Any:
        assert isinstance(texts, list)
        assert metadata.get("tag") in (["a", None], None)
        return [weight * sum(map(str.isupper, text)) / len(text) for text in texts]

    @register("shout_each", per_image=True)
    async def shout_each(text: str, prompt: str, weight: float = 1.0) -> Any:
        return weight * sum(map(str.isupper, text)) / len(text), {"seen": text}

    samples = RewardBatch(prompts=["p", "q"], texts=["Ab", "ABCd"], metadata=[{"tag": "a"}, {}])
    for name in ("shout", "shout_each"):
        head = create(name, weight=2.0)
        found = head.evaluate(samples)
        assert found.values.tolist() == [1.0, 1.5]
        assert head.scores == available()[name].scores == "texts"
        with pytest.raises(RewardError, match=r"scores texts\. Found a batch of images"):
            head(image_batch())
        head.close()
    assert found.extra == {"seen": ["Ab", "ABCd"]}


# --- servers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(limits: Limits, *names: str) -> Iterator[str]:
    services = {}
    for name in names:
        head = create(name)
        services[name] = Service(identity=Identity.of(name, head, {}), batcher=limits.batcher(head))
    listener = listen("127.0.0.1", 0)
    servers: list[Any] = []
    thread = threading.Thread(
        target=run,
        args=(services, listener),
        kwargs={"token": "", "limits": limits, "started": servers.append},
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        wait_until(lambda: servers or not thread.is_alive(), "the server did not start")
        for server in servers:
            server.should_exit = True
        thread.join(HANG)
        listener.close()
        for service in services.values():
            service.batcher.close()


def test_a_served_head_says_what_it_scores_and_how_long_a_text_may_be(monkeypatch) -> None:
    monkeypatch.setattr(wire, "LONGEST_TEXT", 1000)
    texts = ["one two", "w " * 120, "☃ " * 300 + '"\\\n']
    with serving(Limits(), "length", "sharpness") as url:
        remote = RemoteHead(url, "length", batch_size=2)
        torch.testing.assert_close(remote(batch(*texts)), create("length")(batch(*texts)))
        assert remote.scores == "texts"
        with pytest.raises(RewardError, match=r"scores texts\. Found a batch of images"):
            remote(image_batch())
        # A client that has not asked is told by the server.
        with pytest.raises(RewardError, match=r'wrong_kind\): The head "length" scores texts'):
            RemoteHead(url, "length")(image_batch())
        with pytest.raises(RewardError, match=r'"sharpness" scores images. Found texts'):
            RemoteHead(url, "sharpness")(batch("a"))
        loaded = RemoteHead(url, "sharpness")
        loaded.load()
        assert loaded.scores == "images"
        with pytest.raises(RewardError, match=r"`texts\.1` is wrong: .* at most 1000 characters"):
            remote(batch("a", "b" * 1001))
        long_prompt = RewardBatch(prompts=["p" * 1001], texts=["a"])
        with pytest.raises(RewardError, match=r"`prompts\.0` is wrong: .* at most 1000"):
            remote(long_prompt)
        header = {"format": 1, "head": "length", "prompts": [["a"]], "texts": ["a"]}
        body = json.dumps(header).encode()
        body = struct.pack(">I", len(body)) + body
        answer = httpx2.post(f"{url}/score", content=body, timeout=HANG, trust_env=False)
        assert answer.status_code == 400
        assert "`prompts.0` is wrong: Input should be a valid string" in answer.text
        health = httpx2.get(f"{url}/health", timeout=HANG, trust_env=False).json()
        assert health["heads"]["length"]["scores"] == "texts"


def test_an_identity_without_the_kind_is_of_an_earlier_version() -> None:
    told = Identity.of("length", create("length"), {}).model_dump()
    assert Identity.model_validate(told).scores == "texts"
    del told["scores"]
    assert Identity.model_validate(told).scores == "both"
    with pytest.raises(ValueError, match="'texts' or 'both'"):
        Identity.model_validate({**told, "scores": "text"})


# --- tables and checks ----------------------------------------------------------------------------


def test_check_gives_a_head_what_it_scores() -> None:
    head = prepare("length", {"scale": 6, "low": 0}, kind="texts")
    assert try_head(head).scores.values.tolist() == [1, 1]
    with pytest.raises(Unusable, match=r"scores images\. Found a batch of texts"):
        prepare("sharpness", {}, kind="texts")


def test_the_list_says_what_heads_score() -> None:
    from rich.console import Console

    printed = io.StringIO()
    cli.list_heads(Console(file=printed, width=160))
    lines = [line.split("│") for line in printed.getvalue().splitlines()]
    kinds = {cells[1].strip(): cells[9].strip() for cells in lines if len(cells) > 9}
    assert (kinds["ocr"], kinds["classifier"], kinds["remote"]) == ("images", "texts", "both")


def rows_of_texts() -> list[tuple[str, dict[str, Any]]]:
    return [(f"prompt {i}", {"text": "word " * i, "tag": i}) for i in range(7)]


def test_texts_are_scored_into_a_table(tmp_path: Path, capsys: Any) -> None:
    options = {"scale": 1, "low": 0, "high": None}
    for suffix in ("jsonl", "csv"):
        output = tmp_path / f"scores.{suffix}"
        cli.score_samples("length", options, None, rows_of_texts(), output, batch_size=3)
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "word " * i, "prompt": f"prompt {i}", "score": i} for i in range(7)
    ]
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file)) == {"text": "", "prompt": "prompt 0", "score": "0.0"}
    assert json.loads((tmp_path / "scores.jsonl.json").read_text())["scores"] == "texts"
    printed = capsys.readouterr().out
    assert "7 texts, the objective applies to 7: mean 3, " in printed
    assert f"to 6 ({'word ' * 6})." in printed


def test_texts_scored_before_a_failure_are_kept(tmp_path: Path, capsys: Any) -> None:
    """And only taken over for the same texts, prompts and metadata."""
    code = """
        def picky(text, prompt, tag):
            assert tag != 5, "not this one"
            return len(text)
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(code))
    head, output = f"{tmp_path / 'mine.py'}:picky", tmp_path / "scores.jsonl"
    options = {"per_image": True}
    with pytest.raises(RewardError, match="not this one"):
        cli.score_samples(head, options, None, rows_of_texts(), output, batch_size=2)
    assert "4 of 7 scores are kept" in capsys.readouterr().out
    changed = rows_of_texts()
    changed[1] = ("prompt 1", {**changed[1][1], "text": "another"})
    with pytest.raises(RewardError, match="not this one"):
        cli.score_samples(head, options, None, changed, output, batch_size=2)
    assert "3 of 7 scores are in" in capsys.readouterr().out
    fine = [(p, m if i < 4 else {**m, "tag": 0}) for i, (p, m) in enumerate(rows_of_texts())]
    cli.score_samples(head, options, None, fine, output, batch_size=2)
    assert [json.loads(line)["score"] for line in output.read_text().splitlines()] == [
        5 * i for i in range(7)
    ]


def test_wrong_texts_and_heads_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    for metadata, found in (({}, "none"), ({"text": 3}, "int")):
        with pytest.raises(ValueError, match=f"Prompt 2 should come with the text.*Found {found}"):
            texts_of([("a", {"text": "b"}), ("c", metadata)])
    with pytest.raises(Unusable, match=r"scores images\. Found a batch of texts"):
        cli.score_samples("sharpness", {}, None, rows_of_texts(), output, batch_size=2)
    assert list(tmp_path.iterdir()) == []

    def clash(texts: list[str], prompts: list[str]) -> Any:
        from rewards import Scores

        return Scores(values=torch.ones(len(texts)), extra={"text": texts})

    table = ScoreTable(output, texts_of(rows_of_texts()))
    table.begin("digest")
    with pytest.raises(ValueError, match=r"columns \['text'\] are names of the table's own"):
        score_pairs(FunctionHead(clash), table, batch_size=4)
