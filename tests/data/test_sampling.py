"""Prompt files, seeds, epochs and mixtures of prompt sets."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import torch

from moa_diffusion import assembly
from moa_diffusion.config import check, from_dict
from moa_diffusion.data.prompt_files import Prompt, read_prompts
from moa_diffusion.data.sampling import GroupSampler, Mixture, PromptSet, in_turn
from moa_diffusion.data.seeds import derive_seed, generator
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import ConfigError


def written(folder, name: str, text: str | bytes):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---------------------------------------------------------------------- prompt files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "a cat\n\n  a dog \n", [("a cat", {}), ("a dog", {})]),
        ("p.txt", "\ufeffa cat\r\nein Hund, groß", [("a cat", {}), ("ein Hund, groß", {})]),
        ("p.txt", 'a sign "A\u2028B"\n', [('a sign "A\u2028B"', {})]),
        (
            "p.jsonl",
            '{"prompt": "a cat", "n": 2, "tags": ["x"]}\n\n{"prompt": " a dog "}\n',
            [("a cat", {"n": 2, "tags": ["x"]}), ("a dog", {})],
        ),
        (
            "p.csv",
            'prompt,target\n"a ""big"" cat, black",cat\na dog,\n',
            [('a "big" cat, black', {"target": "cat"}), ("a dog", {"target": ""})],
        ),
        (
            "p.tsv",
            'target\tprompt\r\ncat\ta "big" cat\r\ndog\ta dog\r\n',
            [('a "big" cat', {"target": "cat"}), ("a dog", {"target": "dog"})],
        ),
    ],
)
def test_readers(tmp_path, name, text, expected):
    prompts = read_prompts(written(tmp_path, name, text))
    assert [(prompt.text, prompt.metadata) for prompt in prompts] == expected


def test_the_prompt_may_stand_in_another_column(tmp_path):
    path = written(tmp_path, "p.csv", "caption,prompt\na cat,meta\n")
    assert read_prompts(path, column="caption") == (
        Prompt(text="a cat", metadata={"prompt": "meta"}),
    )


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_a_table_cell_may_hold_a_unicode_line_separator(tmp_path, separator):
    """Only line feeds end a line; texts copied from the web hold these characters."""
    path = written(tmp_path, "p.tsv", f"prompt\ttarget\na cat{separator}on a mat\tcat\n")
    (prompt,) = read_prompts(path)
    assert prompt.metadata == {"target": "cat"}


def test_a_quoted_csv_cell_keeps_its_line_break(tmp_path):
    path = written(tmp_path, "p.csv", 'prompt,target\n"a cat\non a mat",cat\n')
    (prompt,) = read_prompts(path)
    assert prompt.text == "a cat\non a mat"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a\nb\x07c\n", r"p\.txt:2: .*control characters"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: A line should be JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n["b"]\n', r"p\.jsonl:3: A line should be a JSON object"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "x": NaN}\n',
            r"p\.jsonl:2: .*NaN is no JSON",
        ),
        ("p.jsonl", '{"prompt": "b", "x": [-Infinity]}\n', r"p\.jsonl:1: .*-Infinity is no JSON"),
        ("p.jsonl", '{"prompt": "b", "x": 1e999}\n', r"p\.jsonl:1: .*1e999 is no JSON number"),
        ("p.jsonl", '{"text": "a"}\n', r"p\.jsonl:1: .*non-empty text `prompt`.*'text': 'a'"),
        ("p.jsonl", '{"prompt": 3}\n', r"p\.jsonl:1: .*non-empty text `prompt`"),
        ("p.jsonl", '{"prompt": " "}\n', r"p\.jsonl:1: .*non-empty text `prompt`"),
        ("p.csv", "prompt,n\na,1\nb\n", r"p\.csv:3: A line should have 2 cells.*'b'"),
        ("p.csv", "prompt,n\na,1,2\n", r"p\.csv:2: A line should have 2 cells"),
        ("p.csv", "text,n\na,1\n", r"p\.csv:1: The header should have a column `prompt`"),
        ("p.tsv", "prompt\tn\na\t1\n\t2\n", r"p\.tsv:3: .*non-empty text `prompt`"),
        ("p.txt", " \n\n", r"at least one prompt. Found none"),
        ("p.csv", "prompt,n\n", r"at least one prompt. Found none"),
        ("p.csv", "", r"at least one prompt. Found none"),
        ("p.txt", b"a caf\xe9\n", r"should be UTF-8 text"),
        ("p.json", "[]", r"\.txt, \.jsonl, \.csv, \.tsv\. Found '\.json'"),
    ],
)
def test_bad_files_say_where(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(written(tmp_path, name, text))


def test_missing_file_says_from_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"`no\.txt` does not exist \(looked from {tmp_path}\)"):
        read_prompts("no.txt")


# ---------------------------------------------------------------------- seeds and groups


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "sample", 3, 7, 1) == 1762561486975384918
    assert derive_seed(0, "sample", 3, 7, 1) != derive_seed(0, "sample", 3, 71)
    seeds = [derive_seed(0, "sample", step, g) for step in range(50) for g in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    first, second = (torch.rand(2, generator=generator(1, "x")) for _ in range(2))
    assert torch.equal(first, second)


def sampler(count: int = 5, *, groups: int = 3, group_size: int = 2, seed: int = 0):
    prompts = [Prompt(text=f"p{i}", metadata={"i": i}) for i in range(count)]
    return GroupSampler(prompts, groups=groups, group_size=group_size, seed=seed)


def test_requests_of_a_step():
    requests = sampler().requests(4)
    assert [request.group for request in requests] == [12, 12, 13, 13, 14, 14]
    assert [request.sibling for request in requests] == [0, 1] * 3
    for left, right in zip(requests[::2], requests[1::2], strict=True):
        assert left.prompt == right.prompt
        assert left.metadata == right.metadata == {"i": int(left.prompt[1:])}
    assert len({request.seed for request in requests}) == 6
    drawn = [r.seed for step in range(9) for r in sampler(group_size=5).requests(step)]
    assert len(set(drawn)) == len(drawn) == 9 * 3 * 5


def test_every_epoch_covers_all_prompts_once_in_another_order():
    drawn = [r.prompt for step in range(10) for r in sampler().requests(step)][::2]
    epochs = [tuple(drawn[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(epoch) == ["p0", "p1", "p2", "p3", "p4"] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_more_groups_than_prompts():
    counts = Counter(r.prompt for r in sampler(2, groups=6, group_size=1).requests(0))
    assert counts == {"p0": 3, "p1": 3}
    groups = [r.group for r in sampler(2, groups=6, group_size=1).requests(0)]
    assert len(set(groups)) == 6


def test_requests_are_a_function_of_seed_and_step():
    assert sampler().requests(7) == sampler().requests(7)
    assert {r.seed for r in sampler().requests(7)}.isdisjoint(
        {r.seed for r in sampler().requests(8)} | {r.seed for r in sampler(seed=1).requests(7)}
    )


# ---------------------------------------------------------------------- mixtures


def mixture(*weights: float, sizes: tuple[int, ...] = ()) -> Mixture:
    """Sets a, b, c, ... of 5 prompts each."""
    names = "abcdefghijkl"[: len(weights)]
    return Mixture(
        [
            PromptSet(prompts=tuple(Prompt(text=f"{n}{i}") for i in range(size)), weight=weight)
            for n, weight, size in zip(names, weights, sizes or [5] * len(weights), strict=True)
        ]
    )


def drawn(source: Mixture, count: int, *, groups: int = 3, seed: int = 0) -> list[str]:
    sampler = GroupSampler(source, groups=groups, group_size=1, seed=seed)
    return [r.prompt for step in range(count // groups) for r in sampler.requests(step)]


@pytest.mark.parametrize(
    ("weights", "order"),
    [
        ((1, 1), "abababababab"),
        ((3, 1), "aabaaabaaaba"),
        ((0.75, 0.25), "aabaaabaaaba"),
        ((1, 2), "babbabbabbab"),
        ((1, 1, 1), "abcabcabcabc"),
        ((0.1, 0.2, 0.3), "cbacbccbacbc"),
        ((1e-300, 1e300), "bbbbbbbbbbbb"),
    ],
)
def test_the_order_of_the_sets(weights, order):
    assert "".join(prompt[0] for prompt in drawn(mixture(*weights), 12)) == order


@pytest.mark.parametrize(
    "weights", [(1, 1), (0.7, 0.3), (1, 99), (3, 1, 2), (0.1, 0.2, 0.3), (5, 1, 1, 1, 1, 0.03)]
)
def test_proportions_hold_in_every_stretch_of_draws(weights):
    source, count, total = mixture(*weights), 1200, sum(weights)
    numbers, positions = zip(*[source.locate(draw) for draw in range(count)], strict=True)
    for number, weight in enumerate(weights):
        share = weight / total
        before = [0, *itertools.accumulate(chosen == number for chosen in numbers)]
        off = [before[n] - share * n for n in range(count + 1)]
        bound = (1 + share * (len(weights) - 2)) / 2 + 1e-9
        assert max(map(abs, off)) <= bound
        # Each draw of a set is counted once, whatever draw the counting starts from.
        own = [p for chosen, p in zip(numbers, positions, strict=True) if chosen == number]
        assert own == list(range(len(own)))


def test_late_draws_cost_no_more_and_are_as_exact():
    source, period = mixture(0.7, 0.2, 0.1), 10
    for start in (10**6, 10**12):
        shifted = [source.locate(start + draw) for draw in range(30)]
        first = [source.locate(draw) for draw in range(30)]
        per_period = [7, 2, 1]
        assert shifted == [(k, p + start // period * per_period[k]) for k, p in first]


def test_a_single_set_is_drawn_as_ever():
    """Frozen: whoever resumes a run draws what it would have drawn."""
    prompts = [Prompt(text=f"a{i}") for i in range(5)]
    alone = GroupSampler(prompts, groups=3, group_size=1, seed=0)
    texts = [r.prompt for step in range(4) for r in alone.requests(step)]
    assert "".join(text[1] for text in texts) == "301421034221"
    for weight in (1, 0.3, 1e9):
        assert drawn(mixture(weight), 12) == texts
    # In a mixture its own draws stay in that order.
    assert [text for text in drawn(mixture(1, 1), 24) if text[0] == "a"] == texts


def test_each_set_has_epochs_of_its_own():
    texts = drawn(mixture(1, 2, sizes=(3, 5)), 90)
    for name, size in (("a", 3), ("b", 5)):
        own = [text for text in texts if text[0] == name]
        epochs = [tuple(own[i : i + size]) for i in range(0, len(own), size)]
        assert {frozenset(epoch) for epoch in epochs} == {frozenset(own)}
        assert len(set(epochs)) > 3
    same_size = drawn(mixture(1, 1), 200)
    first, second = ([text[1] for text in same_size if text[0] == name] for name in "ab")
    assert first != second


def test_a_mixture_is_a_function_of_seed_and_draw():
    source = mixture(2, 1)
    assert drawn(source, 60, groups=3) == drawn(source, 60, groups=4)
    assert drawn(source, 60) == drawn(mixture(4, 2), 60)
    assert drawn(source, 60) != drawn(source, 60, seed=1)
    one = GroupSampler(source, groups=2, group_size=3, seed=0, shared_start=True)
    assert one.requests(7) == GroupSampler(
        mixture(2, 1), groups=2, group_size=3, seed=0, shared_start=True
    ).requests(7)
    assert [prompt.text for prompt in one.prompts] == [f"{n}{i}" for n in "ab" for i in range(5)]


def test_a_mixture_describes_itself():
    assert mixture(3, 1, sizes=(2, 7)).describe() == (
        "2 prompt sets: 2 prompts in 75 % of the draws, 7 prompts in 25 % of the draws"
    )


def test_sets_in_turn():
    sets = [[Prompt(text=f"{n}{i}") for i in range(size)] for n, size in (("a", 1), ("b", 3))]
    assert [prompt.text for prompt in in_turn(sets)] == ["a0", "b0", "b1", "b2"]
    assert in_turn([]) == ()


# ---------------------------------------------------------------------- mixtures in a run


def legible(images, prompts):
    """As `ocr`: NaN where the prompt quotes nothing."""
    values = images[:, 0].mean((1, 2)).double()
    quotes = torch.tensor(['"' in prompt for prompt in prompts])
    return torch.where(quotes, values, torch.nan)


def green(images, prompts):
    return images[:, 1].mean((1, 2))


def run_of(folder, **prompts):
    written(folder, "signs.txt", "".join(f'a sign that says "{word}"\n' for word in ("GO", "NO")))
    written(folder, "plain.csv", "caption\na cat\na dog\na cow\n")
    values = {
        "output_dir": str(folder / "run"),
        "policy": {"name": "toy"},
        "sampling": {"steps": 2},
        "prompts": prompts,
        "rewards": {name: {"path": f"{__file__}:{name}"} for name in ("legible", "green")},
        "objectives": {"method": "dual_stage"},
        "loss": {"clip_range": 0.2},
        "optimizer": {"lr": 0.03},
        "trainer": {"steps": 12, "groups": 4, "group_size": 4, "updates": 2},
        "checkpoint": {"every": 0},
        "evaluation": {"every": 12, "prompts": 3},
        "log": {"trackers": []},
    }
    config = from_dict(values)
    check(config)
    return config


def mixed_sets(folder):
    plain = {"path": str(folder / "plain.csv"), "column": "caption"}
    signs = str(folder / "signs.txt")
    return {"train": [{"path": signs}, plain | {"weight": 3}], "heldout": [signs, plain]}


def test_a_mixture_of_signs_and_plain_prompts_trains_without_false_zeros(tmp_path, capsys):
    trainer = assembly.trainer(run_of(tmp_path, **mixed_sets(tmp_path)))
    trainer.progress.bars = False
    trainer.run()
    shares = "2 prompts in 25 % of the draws, 3 prompts in 75 % of the draws"
    assert shares in capsys.readouterr().out

    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [row["applies/legible"] for row in rows] == [0.25] * 12  # in every rollout
    assert [row["applies/green"] for row in rows] == [1.0] * 12
    for name in ("legible", "green"):
        curve = [row[f"reward_mean/{name}"] for row in rows]
        assert sum(curve[-3:]) > sum(curve[:3]), name
    lines = [
        json.loads(line)
        for path in (tmp_path / "run" / "scores").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 12 * 16
    for line in lines:
        assert (line["reward/legible"] is None) == ('"' not in line["prompt"])
        assert line["reward/green"] is not None
    # What does not apply leaves no trace in the mean, as a zero would.
    last = [line for line in lines if line["step"] == 12 and line["reward/legible"] is not None]
    mean = sum(line["reward/legible"] for line in last) / 4
    # A sum of four in another order; the file has all digits.
    assert rows[-1]["reward_mean/legible"] == pytest.approx(mean, rel=1e-6)

    found = (tmp_path / "run" / "evaluation" / "step-000012.jsonl").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in found]
    assert asked == ['a sign that says "GO"', "a cat", 'a sign that says "NO"']  # in turn


def test_a_bad_line_of_one_of_several_files_is_named(tmp_path):
    settings = run_of(tmp_path, **mixed_sets(tmp_path))
    written(tmp_path, "plain.csv", "caption\na cat\n \n")
    with pytest.raises(ConfigError, match=r"plain\.csv:3: .*non-empty text `caption`"):
        assembly.train_prompts(settings)
    with pytest.raises(ConfigError, match=r"plain\.csv:3: "):
        assembly.heldout_requests(settings)
    (tmp_path / "signs.txt").unlink()
    with pytest.raises(ConfigError, match=r"signs\.txt` does not exist"):
        assembly.train_prompts(settings)


def test_the_word_tiny_may_stand_in_a_list(tmp_path):
    settings = run_of(tmp_path, train=["tiny", str(tmp_path / "signs.txt")], heldout=["tiny"])
    tiny, signs = assembly.train_prompts(settings).sets
    assert (len(tiny.prompts) > 10, len(signs.prompts), tiny.weight) == (True, 2, 1.0)
    assert assembly.heldout_requests(settings)[0].prompt == 'a red sign that says "SUN"'


def test_siblings_share_their_start_only_when_asked():
    prompts = [Prompt(text="a"), Prompt(text="b")]
    options = {"groups": 2, "group_size": 3, "seed": 0}
    assert {r.start_seed for r in GroupSampler(prompts, **options).requests(4)} == {None}
    shared = GroupSampler(prompts, shared_start=True, **options).requests(4)
    starts = [request.start_seed for request in shared]
    assert starts[:3] == [starts[0]] * 3 and starts[3:] == [starts[3]] * 3
    assert starts[0] != starts[3]
    assert len({request.seed for request in shared}) == 6
