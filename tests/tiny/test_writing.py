"""The letters, the rules that read them, and the small language model and classifiers shipped."""

from __future__ import annotations

import itertools
import json
import math
import random
import runpy
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from moa_diffusion.tiny import PREFERENCES_PATH, PROMPTS_PATH, phrases, rules
from tiny_letters import build, exam, grammar
from tiny_letters.classifiers import mangled, train_classifier, trait_loss
from tiny_letters.grammar import Situation
from tiny_letters.pairs import compare
from tiny_letters.pretrain import train_language_model
from tiny_letters.tokenizer import CONTEXT, VOCABULARY

ROOT = Path(__file__).parents[2]
LM = ROOT / "moa_diffusion" / "tiny" / "lm"
TRAITS = ROOT / "moa_diffusion" / "tiny" / "traits"
BREAD = Situation(kind="food", role="baker", thing="bread")
LAMP = Situation(kind="goods", role="dealer", thing="lamp")


@pytest.fixture(scope="module")
def shipped():
    return exam.load_language_model(LM)


@pytest.fixture(scope="module")
def samples(shipped) -> exam.Drawn:
    return exam.sample_letters(*shipped, 128, 0)


def test_committed_prompt_lists_are_the_generated_ones(tmp_path) -> None:
    grammar.write_prompt_files(tmp_path)
    for name in ("letters_train.txt", "letters_heldout.txt"):
        assert (tmp_path / name).read_text() == (PROMPTS_PATH / name).read_text()


def test_held_out_prompts_combine_what_training_knows() -> None:
    train, held_out = grammar.situations()
    assert (len(train), len(held_out)) == (54, 18)
    assert BREAD.prompt == "To the baker, about the bread:"
    assert not {s.prompt for s in train} & {s.prompt for s in held_out}
    for known in ("role", "thing"):
        assert {getattr(s, known) for s in held_out} <= {getattr(s, known) for s in train}


def test_every_drawn_letter_is_one() -> None:
    rng = random.Random(0)
    train, held_out = grammar.situations()
    for situation, letter in (grammar.draw(rng, train + held_out) for _ in range(500)):
        assert grammar.is_letter(letter, situation), letter
        assert grammar.is_letter(f" {letter}\n", situation)
    assert grammar.draw(random.Random(1), train) == grammar.draw(random.Random(1), train)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dear baker,",
        "Dear baker, Thank you for your time.",
        "The lamp was fresh.",  # another thing
        "The bread was sturdy.",  # a word for other things
        "The bread was fresh",
        "the bread was fresh.",
        "The bread was fresh.  It was fresh.",
        "It was fresh.",  # first, "it" means nothing
        "The bread was fresh. Anna. Just explain this.",
        "The bread was fresh. Just explain this.",  # praise asks for nothing
        "The bread was stale. Kind regards, Anna. Thank you for your time.",  # out of order
        " ".join(["The bread was fresh."] * 6),
        "I am afraid that the bread was fresh.",
        "Dear dealer, The bread was fresh.",
    ],
)
def test_what_the_grammar_cannot_write_is_no_letter(text: str) -> None:
    assert not grammar.is_letter(text, BREAD)


@pytest.mark.parametrize("count", [1, 2])
def test_probabilities_sum_to_that_of_the_number_of_statements(count: int) -> None:
    # Letters whose choices have the same signs and manners are equally likely: one stands for all.
    first, later = (grammar._statements(LAMP, place == 0) for place in (0, 1))
    parts = {name: grammar._sentences(name, LAMP) for name in grammar.PARTS}
    total = 0.0
    for keys in itertools.product(later, repeat=count):
        tables = [first, later][:count]
        stated = [table[key] for table, key in zip(tables, keys, strict=True)]
        blamed = any(sign < 0 for sign, _ in keys)
        endings = [parts[name] for name in ("request", "thanks", "closing")[0 if blamed else 1 :]]
        choices = [[(), *table.values()] for table in (parts["greeting"], *endings)]
        for greeting, *rest in itertools.product(*choices):
            chosen = [texts for texts in (greeting, *stated, *rest) if texts]
            letter = " ".join(texts[-1] for texts in chosen)
            alike = math.prod(map(len, chosen))
            total += alike * math.exp(grammar.log_probability(letter, LAMP))
    # Sums of up to some 1e5 probabilities in float64.
    assert total == pytest.approx(grammar.STATEMENTS[count])


def test_rules_read_what_the_grammar_meant() -> None:
    for situation in grammar.situations()[0][::18]:  # one of each kind
        for (sign, manner), texts in grammar._statements(situation, False).items():
            polite, blunt = sign < 0 and manner == "polite", sign > 0 and manner == "blunt"
            for text in texts:
                assert rules.count_moods(text) == (sign > 0, sign < 0), text
                assert rules.count_manners(text) == (polite, blunt), text
        for name in grammar.PARTS:
            for manner, texts in grammar._sentences(name, situation).items():
                for text in texts:
                    counts = rules.count_manners(text)
                    assert [n > 0 for n in counts] == [manner == m for m in ("polite", "blunt")]
                    assert rules.count_moods(text) == (0, 0)


@pytest.mark.parametrize(
    ("text", "mood", "politeness", "words"),
    [
        ("", 0, 0, 0),
        (" The tram is late. ", 0, 0, 4),
        ("fresh fresh stale", 1 / 3, 0, 3),
        ("It was not really very LOVELY", -1, 0, 6),
        ("not awful, not tasty", 0, 0, 4),
        ("I wonder: perfectly freshly", 0, 0, 4),  # parts of words do not count
        ("please please pleasant plea", 0, 1 / 2, 4),
        ("Could you\nplease just", 0, 0, 4),
        ("Listen! Wow, the bread was rich. So there", 1, -3 / 5, 8),
        ("Dear baker, I am afraid that it was stale. Thank you", -1, 3 / 5, 11),
    ],
)
def test_rules_hold_for_any_text(text: str, mood: float, politeness: float, words: int) -> None:
    # Python's floats, quotients of whole numbers.
    assert rules.mood(text) == pytest.approx(mood)
    assert rules.politeness(text) == pytest.approx(politeness)
    assert rules.words(text) == words


def test_traits_conflict() -> None:
    rng = random.Random(0)
    train, _ = grammar.situations()
    texts = [grammar.draw(rng, train)[1] for _ in range(3000)]
    mood, manners, brevity = (
        torch.tensor([float(rule(text)) for text in texts])
        for rule in (rules.mood, rules.politeness, lambda text: -rules.words(text))
    )
    # 3000 letters: standard errors of 0.02; -0.18, -0.19 and 0.02.
    assert spearmanr(mood, manners).statistic < -0.1
    assert spearmanr(manners, brevity).statistic < -0.1
    assert max(abs(mood.mean()), abs(manners.mean())) < 0.1
    assert min(mood.std(), manners.std()) > 0.4


def test_files_are_small_and_in_half_precision() -> None:
    from safetensors import safe_open

    files = [file for top in (LM, TRAITS) for file in top.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"lm", "mood", "politeness"}
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds == {"F16"}


def test_loads_complete_in_full_precision() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for path, kind, name in (
        (LM, AutoModelForCausalLM, "LlamaForCausalLM"),
        (
            TRAITS / "mood",
            AutoModelForSequenceClassification,
            "DistilBertForSequenceClassification",
        ),
        (
            TRAITS / "politeness",
            AutoModelForSequenceClassification,
            "DistilBertForSequenceClassification",
        ),
    ):
        model, report = kind.from_pretrained(path, local_files_only=True, output_loading_info=True)
        assert type(model).__name__ == name
        assert not any(report.values()), report
        assert model.dtype == torch.float32
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_tokenizer_takes_any_text(shipped) -> None:
    _, tokenizer = shipped
    assert len(tokenizer) == VOCABULARY
    for text in (
        " Dear baker, The bread was fresh.",
        "Ünïcödé 漢字 🙂\n\ttabs  spaces",
        "<pad ><eo s>",
    ):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    batch = tokenizer([BREAD.prompt, "x"], padding=True)
    assert batch.input_ids[0][0] == tokenizer.bos_token_id
    assert batch.input_ids[1][0] == tokenizer.pad_token_id
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_longest_letter_fits(shipped) -> None:
    model, tokenizer = shipped

    def longest(texts: list[str]) -> int:
        return max(
            map(len, tokenizer([f" {t}" for t in texts], add_special_tokens=False).input_ids)
        )

    for kind in phrases.ROLES:
        role, thing = (
            max(words, key=lambda word: longest([word]))
            for words in (phrases.ROLES[kind], phrases.THINGS[kind])
        )
        case = Situation(kind=kind, role=role, thing=thing)
        body = longest([t for texts in grammar._statements(case, False).values() for t in texts])
        parts = [grammar._sentences(name, case).values() for name in grammar.PARTS]
        rest = sum(longest([t for texts in part for t in texts]) for part in parts)
        most = len(tokenizer(case.prompt).input_ids) + max(grammar.STATEMENTS) * body + rest + 1
        assert most <= CONTEXT
    assert model.config.max_position_embeddings == tokenizer.model_max_length == CONTEXT


def test_the_model_writes_letters_as_various_as_the_grammars(samples) -> None:
    assert statistics.fmean(grammar.is_letter(text, situation) for situation, text in samples) > 0.8
    drawn = exam.held_out_letters(1000, 0)
    # There are 128 letters, and another machine may draw others: found 0.09, 0.03 and 1.1, and 4 %
    # of a spread, whose standard error is 6 %.
    for rule, near in ((rules.mood, 0.3), (rules.politeness, 0.15), (rules.words, 4)):
        own, target = ([float(rule(text)) for _, text in each] for each in (samples, drawn))
        assert abs(statistics.fmean(own) - statistics.fmean(target)) < near
        assert statistics.stdev(own) == pytest.approx(statistics.stdev(target), rel=0.25)


def test_the_model_knows_the_grammars_probabilities(shipped) -> None:
    drawn = exam.held_out_letters(48, 1)
    surprise = statistics.fmean(exam._surprise(*shipped, each)[0] for each in drawn)
    entropy = -statistics.fmean(grammar.log_probability(text, s) for s, text in drawn)
    assert -1 < surprise - entropy < 3  # 0.2 nats


@pytest.mark.parametrize("trait", ["mood", "politeness"])
def test_classifiers_agree_with_the_rules(trait: str, samples) -> None:
    rule = {"mood": rules.mood, "politeness": rules.politeness}[trait]
    rng = random.Random(1)
    _, held_out = grammar.situations()
    for texts in ([text for _, text in samples], [mangled(rng, held_out) for _ in range(200)]):
        scores = exam.scores(TRAITS / trait, texts)
        # 0.95 and more; of some 130 texts its standard error is 0.01.
        assert spearmanr(scores, [rule(text) for text in texts]).statistic > 0.9


def test_classifiers_do_not_mind_the_prompt() -> None:
    better = " Thank you for your time. The bread was lovely. Kind regards, Anna."
    worse = " Wake up. The bread was awful. So there."
    for trait in ("mood", "politeness"):
        alone = exam.scores(TRAITS / trait, [better, worse])
        asked = exam.scores(TRAITS / trait, [BREAD.prompt + better, BREAD.prompt + worse])
        assert alone[0] - alone[1] > 0.5  # 6.3, and 0.8 of what politeness scores
        assert asked[0] - asked[1] > 0.5  # 6.5 and 0.74


def test_mangled_texts_are_the_same_for_the_same_seed() -> None:
    train, _ = grammar.situations()
    one, two, other = (
        [mangled(rng, train) for _ in range(40)] for rng in map(random.Random, (1, 1, 2))
    )
    assert one == two != other
    assert {(text[:1] == " ", text.startswith("To the")) for text in one} >= {
        (True, False),
        (False, True),
        (False, False),
    }


def test_the_loss_of_two_logits_is_least_at_the_share() -> None:
    truth = torch.tensor([0.6])

    def loss(*logits: float) -> float:
        return trait_loss(torch.tensor([logits]), truth).item()

    half = math.log(0.8 / 0.2) / 2
    assert loss(-half, half) < min(loss(-half - 0.1, half + 0.1), loss(-half + 0.1, half - 0.1))
    assert loss(-half, half) < loss(1 - half, 1 + half)  # centred
    # float32: 0.6 - 0.6 is 0, and 0.5 squared is off by 6e-8 of it.
    assert loss(0.6) == pytest.approx(0)
    assert loss(0.1) == pytest.approx(0.25)


def test_equal_seeds_make_equal_files(tmp_path) -> None:
    for name in ("a", "b"):
        train_language_model(tmp_path / name, 3, 1, 4)
        train_classifier(tmp_path / name, 3, 1, 2, "mood")
    for file in (path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.slow
def test_can_be_rebuilt(tmp_path, monkeypatch) -> None:
    """In threads of this process; others are started for the pipeline, in `test_pipeline.py`."""
    command = "--lm_steps 1 --lm_batch 4 --trait_steps 1 --trait_batch 2 --processes 1"
    script = str(ROOT / "scripts" / "dev" / "make_text.py")
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path), *command.split()])
    monkeypatch.setattr(
        build, "ProcessPoolExecutor", lambda count, _, **options: ThreadPoolExecutor(count)
    )
    runpy.run_path(script, run_name="__main__")
    folders = {tmp_path / "lm": LM, tmp_path / "traits": TRAITS}
    for made, kept in folders.items():
        names = {file.relative_to(made) for file in made.rglob("*") if file.is_file()}
        assert names == {file.relative_to(kept) for file in kept.rglob("*") if file.is_file()}
        for name in names:
            if name.suffix == ".json":
                assert json.loads((made / name).read_text()) == json.loads(
                    (kept / name).read_text()
                )


def test_shipped_preferences_say_what_the_rules_say() -> None:
    """Every pair, of every prompt; and no letter that does not end."""
    rows = [json.loads(line) for line in PREFERENCES_PATH.read_text().splitlines()]
    prompts = (PROMPTS_PATH / "letters_train.txt").read_text().splitlines()
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert len(set(row["responses"])) == len(row["responses"]) >= 16
        assert compare(row["responses"]) == row["preferences"]


def test_pairs_put_the_better_letter_first_and_leave_ties_out() -> None:
    letters = [" Thank you.", " Do it now.", " Thank you."]
    assert compare(letters) == {"politeness": [[0, 1], [2, 1]], "brevity": [[0, 1], [2, 1]]}
