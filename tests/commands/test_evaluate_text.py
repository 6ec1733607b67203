"""Evaluation and export of language models: completions, what is kept, said and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PeftModel
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from moa_diffusion import assembly
from moa_diffusion.adapters.peft import write_adapter
from moa_diffusion.adapters.soup import mix
from moa_diffusion.config import from_dict
from moa_diffusion.evaluation.errors import EvaluationError
from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.evaluation.plan import EvaluationPlan, plan_evaluation
from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.evaluation.sample_cache import TextCache
from moa_diffusion.evaluation.texts import Texts, TextSettings, base_digest
from moa_diffusion.evaluation.write import write_results
from moa_diffusion.export.export import export
from moa_diffusion.policies.adapters import Adapter, read_text_adapter, text_skeleton
from moa_diffusion.policies.lora_files import CONFIG, PEFT
from moa_diffusion.report.completions import literal
from moa_diffusion.report.table import read_table
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError
from waiting import HANG, python

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz .,|<*\n"
PROMPTS = ["tell me.", "to the baker, about the bread.", "why"]
TOKENS = 8
MINE = """
def vowels(texts, prompts):
    return [float(sum(letter in "aeiou" for letter in text)) for text in texts]

def short(texts, prompts):
    return [-float(len(text)) for text in texts]

def bakers(texts, prompts):
    return [1.0 * len(set(t)) if "baker" in p else float("nan") for t, p in zip(texts, prompts)]

def seen(images, prompts):
    return [0.0] * len(prompts)

def wanted(texts, prompts, answer):
    return [0.0] * len(prompts)
"""
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(["config", "pipeline", "checkpoints", "every", "prompts", "rewards"]),
    **dict.fromkeys(["steps", "guidance", "resolution", "temperature", "soup", "output", "cache"]),
    "run": [],
    "lora": [],
    "ema": True,
    "seeds": "0,1",
    "points": 3,
    "shown": 12,
}


def tokenizer() -> Any:
    """One token a letter; the beginning-of-text token comes by itself."""
    words = {text: i for i, text in enumerate(["<s>", "</s>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def llama(width: int = 16, *, seed: int = 0) -> Any:
    """Weights large enough for a text to have likely and unlikely tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 2,
        eos_token_id=1,
        bos_token_id=0,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


def settings_of(folder: Path, name: str, seed: int, **sections: Any) -> dict[str, Any]:
    lora = {"rank": 2, "alpha": 5} if name == "b" else {"rank": 3}
    return {
        "output_dir": str(folder / name),
        "seed": seed,
        "policy": {"name": "causal_lm", "path": str(folder / "base"), "lora": lora},
        "generation": {"max_new_tokens": TOKENS},
        "prompts": dict.fromkeys(["train", "heldout"], str(folder / "three.txt")),
        "rewards": {
            "vowels": {"path": f"{folder}/mine.py:vowels", "weight": 2.0},
            "short": {"path": f"{folder}/mine.py:short"},
        },
        "trainer": {"groups": 2, "group_size": 2, "updates": 1, "sample_batch": 4},
        "log": {"trackers": []},
        **sections,
    }


def make_run(folder: Path, name: str, seed: int) -> None:
    """A run's folder with two checkpoints, whose weights are drawn and not trained."""
    settings = from_dict(settings_of(folder, name, seed))
    assembly.write_config(settings)
    policy = assembly.policy(settings, torch.device("cpu"))
    noise = torch.Generator().manual_seed(seed)
    for step in (1, 2):
        for parameter in policy.trainable().values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        with checkpoint.atomic_folder(checkpoint.step_folder(folder / name, step)) as partial:
            (partial / "ema").mkdir()
            policy.save(partial / "ema")
            policy.save(partial)
            (partial / checkpoint.STATE).write_bytes(checkpoint.packed({"step": step}))
        live = checkpoint.step_folder(folder / name, step) / PEFT
        save_file({key: 2 * value for key, value in load_file(live).items()}, live)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "three.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(MINE)
    make_run(folder, "a", 1)
    make_run(folder, "b", 2)
    return folder


def ask(runs: Path, output: Path, *overrides: str, **options: Any) -> EvaluationPlan:
    given = {"run": [str(runs / "a"), str(runs / "b")], "output": output}
    return plan_evaluation(OPTIONS | given | options, overrides)


def run(plan: EvaluationPlan) -> ScoredSamples:
    return evaluate(plan)


@pytest.fixture(scope="module")
def evaluated(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScoredSamples]:
    """Two runs of two checkpoints, a soup, and a reward that does not apply to every prompt."""
    output = tmp_path_factory.mktemp("evaluated")
    plan = ask(runs, output, f"--rewards.bakers.path={runs}/mine.py:bakers", soup="a,b")
    found = run(plan)
    said = write_results(found, output, shown=2, runs=plan.runs)
    assert "Drawn: 36 of 36 completions; scored: 108 of 108 scores" in said
    return output, found


def ema(runs: Path, name: str, step: int = 2) -> Path:
    return checkpoint.step_folder(runs / name, step) / "ema"


def greedy(model: Any, prompt: str) -> str:
    """The likeliest tokens one by one, from the whole text each time."""
    words = tokenizer()
    ids = words(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + TOKENS and 1 not in ids[0, start:]:
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(words.decode(ids[0, start:], skip_special_tokens=True))


# ---------------------------------------------------------------------- completions


def test_completions_are_those_of_plain_peft(runs: Path, tmp_path: Path):
    """Also of weights with another rank and scale than those that share the policy with them."""
    found = run(ask(runs, tmp_path, temperature="0", seeds="1"))
    texts = found.outputs.read([sample.key for sample in found.samples])
    assert len(set(texts)) > 6, "models differ, and prompts"
    expected = []
    for label in (one.label for one in found.candidates):
        model = llama()
        if label != "base":
            name, _, step = label.partition("/step-")
            model = PeftModel.from_pretrained(model, ema(runs, name, int(step)))
        expected += [greedy(model, prompt) for prompt in PROMPTS]
    assert list(texts) == expected


def test_one_noise_for_all_models_and_another_for_every_prompt():
    medium = Texts(from_dict({"policy": {"name": "causal_lm"}}))
    asked = [medium.request(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    assert len({request.seed for request in asked}) == 6
    assert medium.request("why", 1) == asked[-1]


def test_a_key_knows_everything_that_a_completion_depends_on(runs: Path, tmp_path: Path):
    settings = from_dict(settings_of(runs, "a", 1))
    path, cpu = str(runs / "base"), torch.device("cpu")
    deployment = TextSettings.of(settings, path, cpu)
    assert deployment == TextSettings(
        max_new_tokens=TOKENS, temperature=1.0, chat=False, dtype="float32", noise="cpu"
    )
    settings.generation.eval_temperature = 0.0
    assert TextSettings.of(settings, path, torch.device("cuda")).noise == "none"
    given = {"model": "m", "prompt": "p", "seed": 0, "deployment": deployment}
    others: list[dict[str, Any]] = [{"model": "n"}, {"prompt": "q"}, {"seed": 1}]
    changes = {"max_new_tokens": 9, "temperature": 0.5, "chat": True, "dtype": "x", "noise": "y"}
    assert changes.keys() == {field.name for field in dataclasses.fields(TextSettings)}
    others += [
        {"deployment": dataclasses.replace(deployment, **{k: v})} for k, v in changes.items()
    ]
    keys = [TextCache.key(**given | other) for other in [{}, *others]]
    assert len(set(keys)) == len(keys)

    memory = tmp_path / "digests.txt"
    first = base_digest(path, revision=None, memory=memory)
    copy = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(copy)
    assert base_digest(str(copy), revision=None, memory=memory) != first, "no tokenizer"
    AutoTokenizer.from_pretrained(path).save_pretrained(copy)
    (copy / "README.md").write_text("no part of the model")
    same = base_digest(str(copy), revision=None, memory=memory)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert base_digest(str(copy), revision=None, memory=memory) != same


# ---------------------------------------------------------------------- what is kept


def test_only_what_is_new_is_drawn_and_scored(runs: Path, tmp_path: Path):
    one = {"run": [str(runs / "a")]}
    first = run(ask(runs, tmp_path, checkpoints="step-1", **one))
    assert (first.drawn, first.scored) == (12, 24)  # 2 models x 3 prompts x 2 seeds, 2 rewards
    more = run(ask(runs, tmp_path, checkpoints="1,2", **one))
    assert (more.drawn, more.scored) == (6, 12)
    assert more.scores["short"][:12] == first.scores["short"]
    reward = run(ask(runs, tmp_path, f"--rewards.bakers.path={runs}/mine.py:bakers", **one))
    assert (reward.drawn, reward.scored) == (0, 18)
    cool = run(ask(runs, tmp_path, checkpoints="base", temperature="0.5", **one))
    assert (cool.drawn, cool.scored) == (6, 12)
    last = run(ask(runs, tmp_path, checkpoints="1", ema=False, **one))
    assert last.drawn == 6  # the base model's are there


def test_an_interrupted_evaluation_continues(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run(ask(runs, tmp_path / "whole", run=[str(runs / "a")], checkpoints="1"))
    plan = ask(runs, tmp_path / "part", run=[str(runs / "a")], checkpoints="1")
    fsync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += "/texts/" in os.readlink(f"/proc/self/fd/{handle}")
        if count > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvaluationError, match=r"disk is full.*the same command continues"):
        run(plan)
    monkeypatch.undo()
    assert len(list((tmp_path / "part" / "texts").iterdir())) == 5, "five whole files"
    found = run(plan)
    assert found.drawn == 7
    assert found.scores == whole.scores


def test_texts_are_kept_to_the_last_blank_and_damage_is_told(tmp_path: Path):
    cache = TextCache(tmp_path / "texts")
    texts = ("", " two\n lines \r\n", "émoji 🥖 \x00 \u2028")
    for i, text in enumerate(texts):
        cache.write(str(i), text)
    assert cache.read(["2", "0", "1"]) == (texts[2], texts[0], texts[1])
    assert cache.missing(["0", "3"]) == ["3"]
    path = cache.path("1")
    for damaged in (path.read_bytes()[:-4], b"3\n", b"\xff"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"cannot be read.* Delete it, and it is drawn again"):
            cache.read(["1"])
    with pytest.raises(ConfigError, match="cannot be read"):
        cache.read(["3"])


# ---------------------------------------------------------------------- what is said


def test_the_table_holds_the_texts(evaluated: tuple[Path, ScoredSamples]):
    output, found = evaluated
    row = parquet.read_table(output / "scores.parquet").to_pylist()[-1]
    assert {key: row[key] for key in row if key.startswith("sampler_")} == {
        "sampler_max_new_tokens": TOKENS,
        "sampler_temperature": 1.0,
        "sampler_chat": False,
        "sampler_dtype": "float32",
        "sampler_noise": "cpu",
    }
    assert "image" not in row
    assert row["text_digest"] == found.samples[-1].key
    assert json.loads(row["weights"]) == {"a/step-2": 0.5, "b/step-2": 0.5}
    table = read_table(output)
    assert table.images is None
    assert table.texts is not None
    flat = [text for model in table.texts for seeds in model for text in seeds]
    assert tuple(flat) == found.outputs.read([sample.key for sample in found.samples])
    lengths = [-float(len(text)) for text in flat]
    assert table.values[:, table.rewards.index("short")].ravel().tolist() == lengths


def test_words_fit_completions(evaluated: tuple[Path, ScoredSamples]):
    output, found = evaluated
    said = (output / "summary.md").read_text()
    assert "6 models, 3 prompts, 2 completions each (seeds 0, 1); temperature 1, at most 8" in said
    assert "image" not in said
    assert (output / "pareto.png").is_file()
    assert not (output / "grid.png").exists()
    assert "2 texts each" in " ".join((output / "report.html").read_text().split())
    page = (output / "completions.md").read_text()
    rows = page.splitlines()[2:]
    assert len(rows) == 2 + 2, "heading, rule and two prompts"
    assert {row.replace(r"\|", "").count("|") for row in rows} == {8}
    first = found.outputs.read([found.samples[0].key])[0]
    score = found.scores["vowels"][0].value
    assert f"| {literal(first)}<br><br>vowels {score:.3f}<br>" in rows[2]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("# *x*\n\n`y`", r"\# \*x\*<br><br>\`y\`"),
        ("a\x00\tb", "a\ufffd b"),
        ("", ""),
    ],
)
def test_a_cell_shows_a_text_as_it_is(text: str, cell: str):
    assert literal(text) == cell


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(runs: Path, tmp_path: Path):
    """Nine completions in batches of four: one process has more than the other."""
    plan = ask(runs, tmp_path / "one", run=[str(runs / "a")], seeds="1")
    write_results(run(plan), plan.output, shown=12, runs=plan.runs)
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*torchrun, "--nproc_per_node", "2", "--", "scripts/evaluate.py"),
            *("--run", str(runs / "a"), "--seeds", "1", "--output", str(tmp_path / "two")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Drawn: 9 of 9 completions; scored: 18 of 18 scores") == 1
    one, two = (parquet.read_table(tmp_path / name / "scores.parquet") for name in ("one", "two"))
    assert one.equals(two)
    names = ("summary.md", "completions.md")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---------------------------------------------------------------------- soups


def test_a_soup_is_exact_at_its_ends_and_the_mean_in_the_middle(
    runs: Path, evaluated: tuple[Path, ScoredSamples], tmp_path: Path
):
    model = text_skeleton(str(runs / "base"))
    members = [read_text_adapter(ema(runs, name), model) for name in "ab"]
    assert [one.rank for one in members] == [3, 2]
    assert mix(members, [1.0, 0.0]) is members[0]
    assert mix(members, [0.0, 1.0]) is members[1]
    labels = [one.label for one in evaluated[1].candidates]
    assert labels == ["base", "a/step-1", "a/step-2", "b/step-1", "b/step-2", "a+b 50:50"]

    merged = [
        PeftModel.from_pretrained(llama(), ema(runs, name)).merge_and_unload() for name in "ab"
    ]
    states = [one.state_dict() for one in merged]
    middle = llama()
    middle.load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
    found = run(ask(runs, tmp_path, soup="a,b", checkpoints="2", temperature="0", seeds="1"))
    drawn = [s.key for s in found.samples if s.candidate == len(found.candidates) - 1]
    assert found.outputs.read(drawn) == tuple(greedy(middle, prompt) for prompt in PROMPTS)


# ---------------------------------------------------------------------- other people's weights


def test_scales_are_read_as_peft_reads_them(runs: Path, tmp_path: Path):
    """Rank-stabilised, with ranks and scales that differ by layer; no run is needed."""
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 4},
        alpha_pattern={"layers.1.self_attn.v_proj": 7},
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    trained = PeftModel(llama(), config)
    trained.save_pretrained(tmp_path / "mine")
    options = {"lora": [str(tmp_path / "mine")], "pipeline": str(runs / "base")}
    overrides = [f"--rewards.short.path={runs}/mine.py:short", "--generation.max_new_tokens", "8"]
    plan = plan_evaluation(
        OPTIONS | options | {"prompts": str(runs / "three.txt"), "rewards": "short"}, overrides
    )
    assert [one.label for one in plan.candidates] == ["base", "mine"]
    adapter = plan.candidates[1].adapter
    assert adapter is not None
    assert adapter.rank == 4
    merged, before = trained.merge_and_unload().state_dict(), llama().state_dict()
    for name, (a, b) in adapter.layers.items():
        update = merged[f"{name}.weight"] - before[f"{name}.weight"]
        # The update was added to weights of up to 1, which round it by 6e-8.
        torch.testing.assert_close(b @ a, update, rtol=1e-4, atol=1e-6)
    changed = sum(not torch.equal(merged[name], before[name]) for name in before)
    assert changed == len(adapter.layers) == 4


def test_weights_of_conv1d_layers_survive_writing(tmp_path: Path):
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 35}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    model = text_skeleton(str(tmp_path / "gpt2"))
    name = "transformer.h.0.attn.c_attn"
    wide = Adapter(layers={name: (torch.randn(2, 16), torch.randn(48, 2))}, digest="")
    (tmp_path / "lora").mkdir()
    write_adapter(wide, tmp_path / "lora", model, base=None)
    found = read_text_adapter(tmp_path / "lora", model)
    assert torch.equal(found.layers[name][0], wide.layers[name][0])
    assert torch.equal(found.layers[name][1], wide.layers[name][1])
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["fan_in_fan_out"]
    PeftModel.from_pretrained(GPT2LMHeadModel(GPT2Config(**shape)), tmp_path / "lora")


def damaged(folder: Path, **changes: Any) -> Path:
    """The folder of an adapter with other settings."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def test_weights_that_do_not_fit_are_refused(runs: Path, tmp_path: Path):
    model = text_skeleton(str(runs / "base"))
    names = "layers.0.self_attn.q_proj"

    def fresh() -> Path:
        folder = tmp_path / "lora"
        folder.mkdir(exist_ok=True)
        for name in (CONFIG, PEFT):
            (folder / name).write_bytes((ema(runs, "a") / name).read_bytes())
        return folder

    whole = read_text_adapter(fresh(), model)
    state = load_file(fresh() / PEFT)
    prefix = f"base_model.model.model.{names}"
    assert f"{prefix}.lora_A.weight" in state
    tensors = [
        ({f"{prefix}.lora_A.weight": torch.ones(3, 7)}, r"layer model\.layers\.0.* is \(16, 16\)"),
        ({f"{prefix}.lora_B.weight": torch.ones(16, 2)}, r"Found B \(16, 2\) and A \(3, 16\)"),
        ({f"{prefix}.lora_magnitude_vector": torch.ones(16)}, "Found a DoRA"),
        ({"model.x": torch.ones(1)}, "should be of the model alone"),
        ({f"{prefix}.lora_A.weight": torch.full((3, 16), torch.nan)}, "should be finite"),
    ]
    for more, message in tensors:
        save_file(state | more, fresh() / PEFT)
        with pytest.raises(ConfigError, match=message):
            read_text_adapter(tmp_path / "lora", model)
    changes = [
        ({"use_dora": True}, "plain LoRA.*Found use_dora"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, "Found modules_to_save, bias"),
        ({"init_lora_weights": "pissa"}, "Found init_lora_weights 'pissa'"),
        ({"peft_type": "nothing"}, f"{CONFIG}` should be of a LoRA. Found peft_type nothing"),
        ({"target_modules": ["to_q"]}, "do not fit the base model"),
    ]
    for change, message in changes:
        with pytest.raises(ConfigError, match=message):
            read_text_adapter(damaged(fresh(), **change), model)
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(fresh())
    with pytest.raises(ConfigError, match=r"should be of a LoRA\. Found peft_type .*IA3"):
        read_text_adapter(tmp_path / "lora", model)
    other = damaged(fresh(), base_model_name_or_path="somebody/gpt2-xl")
    assert read_text_adapter(other, model, base="elsewhere/gpt2-xl").layers
    with pytest.raises(ConfigError, match="should be of the base model 'gpt2'"):
        read_text_adapter(other, model, base="gpt2")
    (fresh() / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match=f"{CONFIG}` is damaged"):
        read_text_adapter(tmp_path / "lora", model)
    (tmp_path / "lora" / CONFIG).unlink()
    with pytest.raises(ConfigError, match=f"Found no {CONFIG}"):
        read_text_adapter(tmp_path / "lora", model)
    assert read_text_adapter(fresh(), model).digest == whole.digest, "the skeleton is as it was"
    scaled = read_text_adapter(damaged(fresh(), lora_alpha=9), model)
    assert scaled.digest != whole.digest, "the scale is no part of the weights' file"


# ---------------------------------------------------------------------- bad input


def test_bad_input_is_told_before_anything_is_drawn(runs: Path, tmp_path: Path):
    a = str(runs / "a")
    other, broken = tmp_path / "other", tmp_path / "broken"
    llama(24).save_pretrained(tmp_path / "wide" / "base")
    tokenizer().save_pretrained(tmp_path / "wide" / "base")
    for copy in (other, broken):
        assembly.write_config(from_dict(settings_of(runs, "a", 1, output_dir=str(copy))))
        for path in (runs / "a").rglob("*"):
            target = copy / path.relative_to(runs / "a")
            if path.is_file() and path.name != "config.yaml":
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(
        text.replace(str(runs / "base"), str(tmp_path / "wide" / "base"))
    )
    weights = checkpoint.step_folder(broken, 1) / "ema" / PEFT
    weights.write_bytes(weights.read_bytes()[:500])
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "long.txt").write_text("a" * 60)
    (tmp_path / "toy.yaml").write_text(
        "policy: {name: toy}\nevaluation: {every: 0}\nrewards: {short: {}}\n"
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"run": [str(other)]}, "do not fit the base model: layer model.layers.0"),
        ({"run": [a, str(other)]}, "policy.path: should be the same for all models"),
        ({"run": [str(broken)]}, f"{PEFT}` are damaged"),
        ({"checkpoints": "base,step-7"}, "'step-7' is not in .*There are: step-1, step-2"),
        ({"prompts": str(tmp_path / "empty.txt")}, "should hold at least one prompt. Found none"),
        ({"prompts": str(tmp_path / "long.txt")}, "at most 56 tokens .* Found 61"),
        ({"steps": "4"}, "--steps: is for images. policy.name causal_lm .* have --temperature"),
        ({"guidance": "2"}, "--guidance: is for images"),
        ({"resolution": "64"}, "--resolution: is for images"),
        ({"temperature": "-1"}, "generation.eval_temperature: should be at least 0"),
        ({"soup": "a,c"}, "unknown model 'c'"),
        ({"lora": [f"x={runs}"]}, r"with adapter_config\.json\. Found mine\.py, three\.txt"),
        ({"run": [], "config": str(tmp_path / "toy.yaml")}, "policy.name: should be sd3 or causal"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            ask(runs, tmp_path / "out", **{"run": [a]} | options)
    for name, message in [
        ("seen", "rewards.seen: should score texts, .* Found a head for images"),
        ("wanted", "metadata `answer`.*3 of 3 lack it"),
    ]:
        head = f"--rewards.{name}.path={runs}/mine.py:{name}"
        with pytest.raises(ConfigError, match=message):
            run(ask(runs, tmp_path / "out", head, run=[a]))
    assert not (tmp_path / "out").exists()


def test_options_of_texts_are_none_of_images(tmp_path: Path):
    options = {"pipeline": "tiny", "rewards": "sharpness", "temperature": "1"}
    with pytest.raises(ConfigError, match="--temperature: is for completions"):
        plan_evaluation(OPTIONS | options, [])


# ---------------------------------------------------------------------- export


def test_an_exported_adapter_writes_as_its_card_says(
    runs: Path, evaluated: tuple[Path, ScoredSamples], tmp_path: Path
):
    """The card's own code is run."""
    output = tmp_path / "exported"
    said = export([str(runs / "a")], output=output, evaluation=evaluated[0])
    assert f"{output / PEFT} (rank 3)" in said
    names = ["README.md", CONFIG, PEFT, "completions.md", "config.yaml"]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    assert (output / PEFT).read_bytes() == (ema(runs, "a") / PEFT).read_bytes()
    card = (output / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    assert "base_model" not in head
    for name in ("README.md", CONFIG, "completions.md", "config.yaml"):
        assert str(runs) not in (output / name).read_text(), "no folder of this machine"
    for words in ("vowels x 2, short", "3 prompts x 2 seeds; temperature 1", "](completions.md)"):
        assert words in card
    assert "for its completions as far" in card

    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/the/base/model", str(runs / "base"))
    code = code.replace('"exported"', f'"{output}"').replace("do_sample=True", "do_sample=False")
    space: dict[str, Any] = {"prompt": PROMPTS[0]}
    exec(code, space)
    trained = PeftModel.from_pretrained(llama(), ema(runs, "a"))
    assert space["text"] == greedy(trained, PROMPTS[0])


def test_an_exported_soup_is_the_one_that_was_evaluated(
    runs: Path, evaluated: tuple[Path, ScoredSamples], tmp_path: Path
):
    export(
        [str(runs / "a"), str(runs / "b")],
        weights="0.5,0.5",
        output=tmp_path / "soup",
        evaluation=evaluated[0],
    )
    found = read_text_adapter(tmp_path / "soup", text_skeleton(str(runs / "base")))
    mixed = evaluated[1].candidates[-1].adapter
    assert mixed is not None
    assert found.layers.keys() == mixed.layers.keys()
    for name, (a, b) in mixed.layers.items():
        assert torch.equal(found.layers[name][0], a)
        assert torch.equal(found.layers[name][1], b)
    PeftModel.from_pretrained(llama(), tmp_path / "soup")
