"""Evaluation: images and scores of checkpoints, what is kept, what is said, what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from moa_diffusion import assembly
from moa_diffusion.adapters.soup import mix, mixtures
from moa_diffusion.config import from_dict
from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.evaluation import score_cache
from moa_diffusion.evaluation.candidates import candidates
from moa_diffusion.evaluation.errors import EvaluationError
from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.evaluation.images import ImageSettings, base_digest
from moa_diffusion.evaluation.plan import EvaluationPlan, plan_evaluation
from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.evaluation.sample_cache import ImageCache
from moa_diffusion.evaluation.write import write_results
from moa_diffusion.policies.adapters import read_sd3_adapter, sd3_skeleton
from moa_diffusion.policies.lora_files import DIFFUSERS
from moa_diffusion.policies.samplers import generators
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.report.summary import summarise, text
from moa_diffusion.report.table import read_table
from moa_diffusion.storage import checkpoint
from moa_diffusion.tiny import PIPELINE_PATH
from moa_diffusion.types import ConfigError
from rewards.score_store import ScoreStore
from waiting import HANG, python

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ['a red sign that says "BUSH"', "a blue star on a white background", "a green square"]
SETTINGS = {
    "policy": {"max_sequence_length": 16, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {"colourfulness": {"weight": 2.0}, "sharpness": {}},
    "trainer": {"groups": 2, "group_size": 2, "updates": 1, "sample_batch": 4},
    "evaluation": {"steps": 2, "guidance": 1.5, "prompts": 3},
    "log": {"trackers": []},
}
MINE = """
calls = 0

def length(images, prompts):
    global calls
    calls += len(prompts)
    return [float(len(prompt)) for prompt in prompts]

def target(images, prompts, wanted):
    return [float(value) for value in wanted]

def signs(images, prompts):
    return [1.0 * i.mean() if "sign" in p else float("nan") for i, p in zip(images, prompts)]
"""
OPTIONS = {
    "run": [],
    "lora": [],
    "config": None,
    "pipeline": None,
    "checkpoints": None,
    "every": None,
    "ema": True,
    "prompts": None,
    "seeds": "0,1",
    "rewards": None,
    "steps": None,
    "guidance": None,
    "resolution": None,
    "temperature": None,
    "soup": None,
    "points": 3,
    "shown": 12,
    "output": None,
    "cache": None,
}


def make_run(folder: Path, seed: int, **sections: object) -> None:
    """A run's folder with two checkpoints, whose weights are drawn and not trained."""
    settings = from_dict(SETTINGS | {"output_dir": str(folder), "seed": seed} | sections)
    assembly.write_config(settings)
    policy = assembly.policy(settings, torch.device("cpu"))
    noise = torch.Generator().manual_seed(seed)
    for step in (1, 2):
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=noise))
        with checkpoint.atomic_folder(checkpoint.step_folder(folder, step)) as partial:
            policy.save(partial / "ema")
            policy.save(partial)
            (partial / checkpoint.STATE).write_bytes(checkpoint.packed({"step": step}))
        live = checkpoint.step_folder(folder, step) / DIFFUSERS
        doubled = {name: 2 * value for name, value in load_file(live).items()}
        save_file(doubled, live)  # so that averaged and last weights differ


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "a", 1)
    make_run(folder / "b", 2, policy={"max_sequence_length": 16, "lora": {"rank": 2, "alpha": 6}})
    (folder / "three.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(MINE)
    return folder


def ask(runs: Path, output: Path, *overrides: str, **options: object) -> EvaluationPlan:
    given = {"run": [str(runs / "a"), str(runs / "b")], "prompts": str(runs / "three.txt")}
    return plan_evaluation(OPTIONS | given | {"output": output} | options, overrides)


def run(plan: EvaluationPlan) -> ScoredSamples:
    return evaluate(plan)


@pytest.fixture(scope="module")
def evaluated(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScoredSamples]:
    """Two runs of two checkpoints, a soup, and a reward that does not apply to every prompt."""
    output = tmp_path_factory.mktemp("evaluated")
    found = run(ask(runs, output, f"--rewards.signs.path={runs}/mine.py:signs", soup="a,b"))
    write_results(found, output, shown=2, runs={})
    return output, found


# ---------------------------------------------------------------------- images


def plain(folder: Path | None, prompt: str, seed: int) -> numpy.ndarray:
    """What a diffusers pipeline draws with these weights, as bytes."""
    pipeline = load_pipeline(str(PIPELINE_PATH))
    if folder is not None:
        pipeline.load_lora_weights(folder)
    with torch.no_grad():
        image = pipeline(
            prompt,
            num_inference_steps=2,
            guidance_scale=1.5,
            height=32,
            width=32,
            max_sequence_length=16,
            generator=generators([seed]),
            output_type="np",
        ).images[0]
    return (255 * image).round()


@pytest.mark.parametrize("label", ["base", "a/step-2", "b/step-1"])
def test_images_are_those_of_plain_diffusers(
    runs: Path, evaluated: tuple[Path, ScoredSamples], label: str
):
    """Also of weights with another rank and scale than those that share the policy with them."""
    output, found = evaluated
    name, _, step = label.partition("/step-")
    folder = checkpoint.step_folder(runs / name, int(step)) / "ema" if step else None
    (index,) = [i for i, one in enumerate(found.candidates) if one.label == label]
    (key,) = [
        sample.key
        for sample in found.samples
        if (sample.candidate, sample.prompt, sample.seed) == (index, 0, 1)
    ]
    with Image.open(output / "images" / f"{key}.png") as image:
        drawn = numpy.array(image, dtype=float)
    expected = plain(folder, PROMPTS[0], 1)
    # Float32 in another batch differs by 1e-5 of [0, 1], which is 0.3 % of a level: so many pixels
    # lie that near to where levels change, and then by one.
    assert numpy.abs(drawn - expected).max() <= 1
    assert (drawn != expected).mean() < 0.01
    if folder is not None:
        assert numpy.abs(drawn - plain(None, PROMPTS[0], 1)).max() > 8


def test_a_key_knows_everything_that_an_image_depends_on(tmp_path: Path):
    settings = from_dict(SETTINGS)
    deployment = ImageSettings.of(settings, str(PIPELINE_PATH))
    given = {"model": "m", "prompt": "p", "seed": 0, "deployment": deployment}
    others = [{"model": "n"}, {"prompt": "q"}, {"seed": 1}]
    changes = {
        "steps": 9,
        "guidance": 9.0,
        "resolution": 128,
        "scheduler": "Other",
        "dtype": "bfloat16",
        "vae_dtype": "bfloat16",
        "max_sequence_length": 9,
        "negative_prompt": "ugly",
        "kind": "sde",
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(ImageSettings)}
    others += [
        {"deployment": dataclasses.replace(deployment, **{k: v})} for k, v in changes.items()
    ]
    keys = [ImageCache.key(**given | other) for other in [{}, *others]]
    assert len(set(keys)) == len(keys)

    memory = tmp_path / "digests.txt"
    copy = tmp_path / "pipeline"
    shutil.copytree(PIPELINE_PATH, copy)
    first = base_digest(str(PIPELINE_PATH), revision=None, memory=memory)
    assert base_digest(str(copy), revision=None, memory=memory) == first
    assert base_digest(str(copy), revision=None, memory=memory) == first  # from memory
    with (copy / "scheduler" / "scheduler_config.json").open("a") as file:
        file.write("\n")
    assert base_digest(str(copy), revision=None, memory=memory) != first


# ---------------------------------------------------------------------- what is kept


def test_only_what_is_new_is_drawn_and_scored(runs: Path, tmp_path: Path):
    mine = f"--rewards.length.path={runs}/mine.py:length"
    first = run(ask(runs, tmp_path, checkpoints="step-1", run=[str(runs / "a")]))
    assert (first.drawn, first.scored) == (12, 24)  # 2 models x 3 prompts x 2 seeds, 2 rewards
    more = run(ask(runs, tmp_path, checkpoints="1,2", run=[str(runs / "a")]))
    assert (more.drawn, more.scored) == (6, 12)
    for name in first.scores:
        assert more.scores[name][:12] == first.scores[name]
    reward = run(ask(runs, tmp_path, mine, run=[str(runs / "a")]))
    assert (reward.drawn, reward.scored) == (0, 18)
    assert [score.value for score in reward.scores["length"][:3]] == [27.0, 27.0, 33.0]
    again = run(ask(runs, tmp_path, mine, run=[str(runs / "a")]))
    assert (again.drawn, again.scored) == (0, 0)
    assert again.scores == reward.scores
    edited = tmp_path / "mine.py"
    edited.write_text(MINE.replace("float(len(prompt))", "-float(len(prompt))"))
    changed = f"--rewards.length.path={edited}:length"
    assert run(ask(runs, tmp_path, changed, run=[str(runs / "a")])).scored == 18
    steps = run(ask(runs, tmp_path, run=[str(runs / "a")], checkpoints="base", steps="3"))
    assert steps.drawn == 6
    last = run(ask(runs, tmp_path, run=[str(runs / "a")], checkpoints="1", ema=False))
    assert last.drawn == 6  # the base model's are there


def test_a_full_disk_leaves_what_was_drawn(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = ask(runs, tmp_path, run=[str(runs / "a")], checkpoints="1")
    write, count = Path.write_bytes, 0

    def full(self: Path, data: bytes) -> int:
        nonlocal count
        count += self.parent.name == "images"
        if count > 5:
            write(self, b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EvaluationError, match=r"disk is full.*the same command continues"):
        run(plan)
    monkeypatch.undo()
    assert len(list((tmp_path / "images").iterdir())) == 5, "five whole files, no half one"

    add, calls = ScoreStore.add, []

    def full_for_scores(store: ScoreStore, scores: dict) -> None:
        calls.append(store)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(store, scores)

    monkeypatch.setattr(ScoreStore, "add", full_for_scores)
    with pytest.raises(EvaluationError, match="No space left"):
        run(plan)
    monkeypatch.undo()
    assert len(list((tmp_path / "images").iterdir())) == 12
    found = run(plan)
    assert (found.drawn, found.scored) == (0, 12), "one reward's scores were written"


def test_damaged_scores_are_told(runs: Path, tmp_path: Path):
    plan = ask(runs, tmp_path, run=[str(runs / "a")], checkpoints="base", rewards="sharpness")
    whole = run(plan)
    (path,) = (tmp_path / "scores").iterdir()
    assert path.name.startswith("sharpness-")
    again = run(plan)
    assert (again.scored, again.scores) == (0, whole.scores)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"sqlite` holds no scores that can be read"):
        run(plan)


def test_a_damaged_image_is_told(runs: Path, tmp_path: Path):
    plan = ask(runs, tmp_path, run=[str(runs / "a")], checkpoints="base", rewards="sharpness")
    found = run(plan)
    path = found.outputs.path(found.samples[0].key)
    path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(tmp_path / "scores")
    with pytest.raises(ConfigError, match=r"cannot be read.* Delete it, and it is drawn again"):
        run(plan)


# ---------------------------------------------------------------------- numbers


def test_the_summary_says_what_the_table_holds(evaluated: tuple[Path, ScoredSamples]):
    """Recomputed from the file alone."""
    output, _ = evaluated
    rows = parquet.read_table(output / "scores.parquet").to_pylist()
    assert len(rows) == 6 * 3 * 2 * 3
    said = (output / "summary.md").read_text()
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    assert names == ["base", "a/step-1", "a/step-2", "b/step-1", "b/step-2", "a+b 50:50"]
    draws = numpy.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=2000)
    checked = 0
    for reward in ("colourfulness", "sharpness", "signs"):
        section = said.split(f"## {reward}")[1].split("\n## ")[0]
        scores = {
            (row["checkpoint"], row["prompt_index"], row["seed"]): row["score"]
            for row in rows
            if row["reward"] == reward and row["score"] is not None
        }
        prompts = sorted({key[1] for key in scores})
        assert prompts == ([0] if reward == "signs" else [0, 1, 2])
        base = {p: [scores["base", p, s] for s in (0, 1)] for p in prompts}
        std = math.sqrt(numpy.mean([numpy.var(pair, ddof=1) for pair in base.values()]))
        for name in names:
            mine = {p: [scores[name, p, s] for s in (0, 1)] for p in prompts}
            line = next(row for row in section.splitlines() if row.startswith(f"| {name} "))
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            gains = {p: numpy.subtract(mine[p], base[p]).mean() for p in prompts}
            sums = numpy.array([[sum(mine[p]) if p in mine else 0.0 for p in range(3)]])
            counts = numpy.array([2.0 if p in mine else 0.0 for p in range(3)])
            with numpy.errstate(invalid="ignore"):
                again = (sums @ draws.T)[0] / (draws @ counts)
            low, high = numpy.nanquantile(again, [0.025, 0.975])
            mean = numpy.mean(list(mine.values()))
            assert cells[1] == f"{mean:.4g} [{low:.4g}, {high:.4g}]"
            if name == "base":
                assert cells[2:5] == ["-", "-", "-"]
                continue
            gain = numpy.mean(list(gains.values()))
            assert cells[2].split()[0] == f"{gain:+.4g}"
            assert cells[3].split()[0] == f"{gain / std:+.2f}"
            assert cells[4] == f"{numpy.mean([g > 0 for g in gains.values()]):.0%}"
            assert cells[5] == str(2 * len(prompts))
            checked += 1
    assert checked == 15

    # The volume of one point is a product.
    table = read_table(output)
    numbers = summarise(table)
    for model in numbers.models:
        gains = [max(0.0, one.gain_in_stds.value) for one in model.rewards.values()]
        assert model.hypervolume.value == pytest.approx(math.prod(gains))  # float64
        assert f"| {model.label} " in said.split("## Front")[1]
    assert json.loads((output / "summary.json").read_text())["units"] == dict(numbers.units)


def test_the_table_names_what_scores_depend_on(evaluated: tuple[Path, ScoredSamples]):
    output, found = evaluated
    row = parquet.read_table(output / "scores.parquet").to_pylist()[-1]
    assert row["sampler_steps"] == 2
    assert row["sampler_guidance"] == 1.5
    assert row["sampler_scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert row["scorer_digest"] == found.versions["signs"].digest
    assert json.loads(row["weights"]) == {"a/step-2": 0.5, "b/step-2": 0.5}
    assert row["score"] is None
    assert (output / row["image"]).is_file()
    table = read_table(output)
    assert table.values.shape == (6, 3, 3, 2)
    assert numpy.isnan(table.values[:, 2, 1:]).all()
    assert not numpy.isnan(table.values[:, 2, 0]).any()


def test_one_seed_has_no_unit(evaluated: tuple[Path, ScoredSamples]):
    table = read_table(evaluated[0])
    one = dataclasses.replace(
        table,
        seeds=table.seeds[:1],
        values=table.values[..., :1],
        images=tuple(tuple(row[:1] for row in model) for model in table.images),
    )
    found = summarise(one, resamples=20)
    assert all(math.isnan(unit) for unit in found.units.values())
    assert math.isnan(found.together.value)
    assert "so there is no std" in text(one, found)


def test_the_images_show_every_model(evaluated: tuple[Path, ScoredSamples]):
    output, found = evaluated
    with Image.open(output / "grid.png") as grid:
        pixels = numpy.array(grid.convert("RGB"), dtype=float)
    key = next(p.key for p in found.samples if (p.candidate, p.prompt, p.seed) == (2, 0, 0))
    with Image.open(output / "images" / f"{key}.png") as image:
        cell = numpy.array(image.resize((192, 192), Image.Resampling.NEAREST), dtype=float)
    width = (pixels.shape[1] + 2) // 7 - 2  # a column of prompts, six models, gaps of 2
    left, top = 3 * (width + 2) + (width - 192) // 2, 38
    assert numpy.array_equal(pixels[top : top + 192, left : left + 192], cell)
    with Image.open(output / "pareto.png") as pareto:
        assert pareto.width > 600
        assert len(pareto.convert("RGB").getcolors(maxcolors=2**24)) > 100


# ---------------------------------------------------------------------- processes


def test_two_processes_give_the_table_of_one(runs: Path, tmp_path: Path):
    """Nine images in batches of four: one process has more than the other."""
    options = {"run": [str(runs / "a")], "seeds": "1"}
    plan = ask(runs, tmp_path / "one", **options)
    write_results(run(plan), plan.output, shown=12, runs=plan.runs)
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*torchrun, "--nproc_per_node", "2", "--", "scripts/evaluate.py"),
            *("--run", str(runs / "a"), "--prompts", str(runs / "three.txt"), "--seeds", "1"),
            *("--output", str(tmp_path / "two")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Drawn: 9 of 9 images; scored: 18 of 18 scores") == 1
    one, two = (parquet.read_table(tmp_path / name / "scores.parquet") for name in ("one", "two"))
    assert one.column_names == two.column_names
    for name in one.column_names:
        mine, other = one[name].to_pylist(), two[name].to_pylist()
        # Other batches may round a few pixels to the next of 256 levels: less than a thousandth.
        floats = isinstance(mine[0], float)
        assert other == (pytest.approx(mine, rel=1e-3) if floats else mine), name
    said = [(tmp_path / name / "summary.md").read_text() for name in ("one", "two")]
    words = [re.sub(r"-?\d+\.\d+", "number", text) for text in said]
    assert words[0] == words[1]


# ---------------------------------------------------------------------- soups


def test_a_soup_is_the_weighted_sum_of_the_updates(runs: Path):
    transformer = sd3_skeleton(str(PIPELINE_PATH))
    a, b = (
        read_sd3_adapter(checkpoint.step_folder(runs / name, 2) / "ema", transformer)
        for name in ("a", "b")
    )
    assert (a.rank, b.rank) == (4, 2)
    half = mix([a, b], [0.25, 0.75])
    assert half.rank == 6
    for name, (low, high) in half.layers.items():
        one, other = (adapter.layers[name] for adapter in (a, b))
        expected = 0.25 * one[1] @ one[0] + 0.75 * other[1] @ other[0]
        # Ranks in one sum or in two, in float32: some roundings, 6e-8 each.
        torch.testing.assert_close(high @ low, expected, rtol=1e-4, atol=1e-6)
    assert mix([a, b], [1.0, 0.0]) is a
    assert mix([a, b], [0.0, 1.0]) is b
    assert half.digest == mix([b, a], [0.75, 0.25]).digest
    assert half.digest != mix([a, b], [0.75, 0.25]).digest


def test_mixtures_cover_the_simplex():
    assert mixtures(2, 3) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    three = mixtures(3, 5)
    assert len(three) == 15
    assert all(sum(weights) == pytest.approx(1) for weights in three)
    with pytest.raises(ConfigError, match="--points"):
        mixtures(2, 1)
    with pytest.raises(ConfigError, match="--soup"):
        mixtures(1, 3)


# ---------------------------------------------------------------------- other people's weights


def test_scales_are_read_as_diffusers_reads_them(runs: Path, tmp_path: Path):
    """With alpha in the metadata and without, and in the names of older files."""
    transformer = sd3_skeleton(str(PIPELINE_PATH))
    name = "transformer_blocks.0.attn.to_q"
    width = transformer.get_submodule(name).in_features
    a, b = torch.randn(2, width), torch.randn(width, 2)
    state = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    meta = {"r": 2, "lora_alpha": 6, "target_modules": [name]}
    packed = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in meta.items()})}
    old = {
        f"transformer.{name}.lora.down.weight": a,
        f"transformer.{name}.lora.up.weight": b,
    }
    for tensors, metadata, scale in ((state, packed, 3.0), (state, None, 1.0), (old, None, 1.0)):
        save_file(tensors, tmp_path / DIFFUSERS, metadata)
        found = read_sd3_adapter(tmp_path, transformer)
        assert list(found.layers) == [name]
        # At most one product in float32: 6e-8 of torch's 1.3e-6.
        torch.testing.assert_close(found.layers[name][1], scale * b)
        torch.testing.assert_close(found.layers[name][0], a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder.x.lora_A.weight": (2, 4)}, "should be of the transformer alone"),
        ({"transformer.nowhere.lora_A.weight": (2, 4)}, "updates of the base model's linear"),
        (
            {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 7)},
            "do not fit the base model",
        ),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": None}, "should be finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    runs: Path, tmp_path: Path, change: dict[str, tuple[int, int] | None], message: str
):
    state = load_file(checkpoint.step_folder(runs / "b", 1) / DIFFUSERS)
    for name, shape in change.items():
        state[name] = state[name] * math.nan if shape is None else torch.ones(shape)
    save_file(state, tmp_path / DIFFUSERS)
    with pytest.raises(ConfigError, match=message):
        read_sd3_adapter(tmp_path, sd3_skeleton(str(PIPELINE_PATH)))


def test_a_folder_of_lora_weights_needs_no_run(runs: Path, tmp_path: Path):
    folder = checkpoint.step_folder(runs / "b", 2) / "ema"
    plan = plan_evaluation(
        OPTIONS
        | {
            "lora": [f"mine={folder}"],
            "pipeline": "tiny",
            "prompts": str(runs / "three.txt"),
            "rewards": "colourfulness",
            "output": tmp_path,
        },
        ["--sampling.resolution", "32"],
    )
    assert [one.label for one in plan.candidates] == ["base", "mine"]
    assert (
        plan.candidates[1].digest
        == candidates(plan.medium, {"b": runs / "b"}, {}, chosen="latest")[1].digest
    )


def test_the_resolution_is_that_of_the_runs_evaluations(runs: Path, tmp_path: Path):
    """Of rollouts where the run says no other; an option wins over both."""

    def side(*overrides: str, resolution: str | None = None) -> int:
        given = OPTIONS | {"run": [str(runs / "b")], "output": tmp_path, "resolution": resolution}
        return plan_evaluation(given, overrides).medium.deployment(torch.device("cpu")).resolution

    larger = ("--evaluation.resolution", "64")
    assert [side(), side(*larger), side(*larger, resolution="48")] == [32, 64, 48]


# ---------------------------------------------------------------------- bad input


def test_bad_input_is_told_before_anything_is_drawn(runs: Path, tmp_path: Path):
    a, b = str(runs / "a"), str(runs / "b")
    other, damaged = tmp_path / "other", tmp_path / "damaged"
    for copy in (other, damaged):
        shutil.copytree(runs / "a", copy)
    config = (other / "config.yaml").read_text()
    (tmp_path / "x").mkdir()
    (other / "config.yaml").write_text(config.replace("path: tiny", f"path: {tmp_path}/x"))
    weights = checkpoint.step_folder(damaged, 1) / "ema" / DIFFUSERS
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty.txt").write_text("\n\n")
    cases = [
        ({"checkpoints": "base,step-7"}, "'step-7' is not in .*There are: step-1, step-2"),
        ({"every": 5}, "no checkpoint of .* is a multiple of 5. There are: step-1"),
        ({"every": 1, "checkpoints": "1"}, "--every: should stand without --checkpoints"),
        ({"run": [str(damaged)]}, f"{DIFFUSERS}` are damaged"),
        ({"run": [str(tmp_path)]}, "--run: should be the folder of a run"),
        ({"run": ["nowhere"]}, "--run: should be a folder. Found none at `nowhere`"),
        ({"run": [a, a]}, "--run: should have another name than base, a"),
        ({"run": [a, str(other)]}, "policy.path: should be the same for all models"),
        ({"prompts": str(tmp_path / "empty.txt")}, "should hold at least one prompt. Found none"),
        ({"seeds": "one"}, "--seeds: should be a number of seeds"),
        ({"rewards": "sharpness,"}, "--rewards: should be different names"),
        ({"run": [a, b], "soup": "a,c"}, "unknown model 'c'. Known: a, a/step-1, a/step-2, b"),
        ({"soup": "a"}, "--soup: should name at least two"),
        ({"run": [], "config": None}, "should come from --run, or .* Found none of them"),
        ({"pipeline": "tiny"}, "Found --run, --pipeline"),
        ({"lora": [f"a={b}"]}, "--lora: should have another name than a run"),
        ({"run": [a, b], "lora": [b]}, "--lora: should have another name than a run"),
        ({"lora": [f"c={b}"]}, "Found the folder of a run; --run evaluates"),
        ({"resolution": "65"}, "sampling.resolution: should be a multiple of 16"),
        ({"shown": 0}, "--shown: should be at least 1"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            ask(runs, tmp_path / "out", **({"run": [a]} | options))

    changed = tmp_path / "b"
    shutil.copytree(runs / "b", changed)
    text = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(text.replace("steps: 2", "steps: 5"))
    with pytest.raises(ConfigError, match=r"evaluation.steps: .* Give one for both: --steps"):
        ask(runs, tmp_path / "out", run=[a, str(changed)])
    ask(runs, tmp_path / "out", run=[a, str(changed)], steps="4")

    target = f"--rewards.target.path={runs}/mine.py:target"
    with pytest.raises(ConfigError, match=r"metadata `wanted`.*3 of 3 lack it, first 'a red"):
        run(ask(runs, tmp_path / "out", target, run=[a]))
    with pytest.raises(ConfigError, match='Unknown reward head "sharpnes"'):
        run(ask(runs, tmp_path / "out", run=[a], rewards="sharpnes"))
    with pytest.raises(ConfigError, match=r"--seeds: .* or different seeds"):
        run(ask(runs, tmp_path / "out", run=[a], seeds="1,1"))
    assert not (tmp_path / "out").exists()


def test_the_script_says_it_in_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = str(ROOT / "scripts" / "evaluate.py")
    monkeypatch.setattr(sys, "argv", [script, "--run", str(runs / "a"), "--checkpoints", "9"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --checkpoints: '9' is not in")
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_prompts_with_metadata_reach_the_function(runs: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a green square", "wanted": 3}, {"prompt": "a red circle", "wanted": 5}]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    target = f"--rewards.target.path={runs}/mine.py:target"
    options = {"run": [str(runs / "a")], "checkpoints": "base", "prompts": str(prompts)}
    found = run(ask(runs, tmp_path, target, **options, seeds="1", rewards="target"))
    assert [score.value for score in found.scores["target"]] == [3.0, 5.0]
    prompts.write_text(prompts.read_text().replace("5", "6"))
    found = run(ask(runs, tmp_path, target, **options, seeds="1", rewards="target"))
    assert (found.drawn, found.scored) == (0, 1), "the score of other metadata is another one"


def test_code_in_no_file_cannot_be_told_apart():
    space: dict[str, object] = {}
    exec("def unknown(images, prompts):\n    return [0.0] * len(prompts)", space)
    head = score_cache.FunctionHead(space["unknown"])
    with pytest.raises(ConfigError, match="should be code in a file"):
        score_cache.HeadVersion.of("unknown", head, {})
    assembly.check_requirements("rewards", {"unknown": head}, [Prompt(text="a")])
