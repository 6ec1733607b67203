"""The shipped judges: small, loaded by the real heads, right on scenes that they never learnt."""

from __future__ import annotations

import copy
import json
import random
import runpy
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from moa_diffusion.tiny import PIPELINE_PATH
from rewards import RewardBatch
from tiny_judges import exam
from tiny_judges.clip import contrastive_loss
from tiny_judges.data import (
    confusable,
    is_held_out,
    load_vae,
    make_stock,
    training_scene,
    vary,
)
from tiny_judges.degradations import degradations, spoil
from tiny_judges.deqa import soft_labels, spoilt_stock
from tiny_judges.rule import beauty
from tiny_pipeline import parallel
from tiny_pipeline.scenes import Shape, Sign, all_signs, prompt_sets

ROOT = Path(__file__).parents[2]
JUDGES = ROOT / "moa_diffusion" / "tiny" / "judges"
SHIPPED = "package://moa_diffusion/tiny/judges"

# Measured on 82 held-out scenes, less a margin of a few images. Light JPEG does plain scenes no
# visible harm, and a thin line is hard to tell from a letter: these two rank worst.
FLOORS = {
    "pickscore": {"signs": 0.78, "shapes": 0.9, "prompts": 0.9},
    "aesthetic": {"all": 0.95, "siblings": 0.92},
    "deqa": {
        "blur": 0.8,
        "noise": 0.85,
        "jpeg": 0.5,
        "colours": 0.85,
        "strokes": 0.5,
        "latent": 0.8,
        "all": 0.75,
    },
}


# Changes of pixels in [0, 1], and root mean square changes of scores, in standard deviations among
# siblings. Found in 144 images: .0022 and .037 in float16, .024 and .11 in bfloat16.
LARGEST = {
    torch.float16: {"pixels": 0.006, "scores": 0.1},
    torch.bfloat16: {"pixels": 0.06, "scores": 0.3},
}


@pytest.fixture(scope="module")
def vae():
    return load_vae()


@pytest.fixture(scope="module")
def heads():
    with ExitStack() as stack:
        yield {n: stack.enter_context(closing(h)) for n, h in exam.judges(SHIPPED).items()}


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE_PATH, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(pipeline, prompts: list[str], steps: int) -> Tensor:
    """Images of the embedded pipeline, `[N, 3, 64, 64]` in 0 to 1, from seed 0."""
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return images.float().clamp(0, 1)


@torch.no_grad()
def decoded(vae, latents: Tensor) -> Tensor:
    """Images `[N, 3, 64, 64]` in 0 to 1, as the decoder makes them in its own precision."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
    return (images / 2 + 0.5).clamp(0, 1)


def test_files_are_small_and_in_half_precision() -> None:
    from safetensors import safe_open

    files = [file for file in JUDGES.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"clip", "aesthetic", "deqa"}
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds == {"F16"}


def test_shipped_judges_rank_held_out_scenes(vae) -> None:
    marks = exam.examine(SHIPPED, vae)
    assert {head: set(found) for head, found in marks.items()} == {
        head: set(floors) for head, floors in FLOORS.items()
    }
    low = {
        f"{head}/{name}": mark
        for head, found in marks.items()
        for name, mark in found.items()
        if mark < FLOORS[head][name]
    }
    assert not low


def test_the_match_is_told_from_the_pipelines_own_samples(pipeline, heads) -> None:
    prompts = [scene.prompt for scene in all_signs(["GO", "CAT", "STOP"])[::2]]
    prompts += [prompt for prompt in prompt_sets()[1] if "sign" not in prompt]
    images = samples(pipeline, prompts, steps=8)
    head = heads["pickscore"]
    own = head(RewardBatch(prompts=prompts, images=images))
    others = head(RewardBatch(prompts=[*prompts[1:], prompts[0]], images=images))
    assert (own > others).float().mean() >= 0.9


def test_the_pipelines_own_samples_are_rated_lower_when_spoilt(pipeline, heads, vae) -> None:
    prompts = prompt_sets()[0][:12]
    images = samples(pipeline, prompts, steps=8)
    clean = heads["deqa"](RewardBatch(prompts=prompts, images=images)).mean()
    assert clean > 4
    for name, way in degradations(vae).items():
        spoilt = way(images, torch.full((12,), 0.8), Generator().manual_seed(0))
        rating = heads["deqa"](RewardBatch(prompts=prompts, images=spoilt)).mean()
        assert clean - rating > 0.5, name


def test_images_without_noise_do_not_please_by_noise(heads, vae) -> None:
    scenes = exam.held_out_scenes()[:32]
    images = exam.render(scenes, vae, 1)
    noisy = degradations(vae)["noise"](images, torch.full((32,), 0.5), Generator().manual_seed(0))
    batches = [RewardBatch(prompts=[s.prompt for s in scenes], images=x) for x in (images, noisy)]
    for name, most in (("pickscore", 1.0), ("aesthetic", 0.7), ("deqa", -1.0)):
        clean, spoilt = (heads[name](batch).mean() for batch in batches)
        assert spoilt - clean < most


@pytest.fixture(scope="module")
def siblings(pipeline, heads):
    """Prompts, of each five images in a row; their latents, pixels and scores in float32."""
    prompts = [prompt for prompt in prompt_sets()[1][::18] for _ in range(5)]
    latents = pipeline(
        prompts,
        num_inference_steps=6,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    images = decoded(pipeline.vae, latents)
    batch = RewardBatch(prompts=prompts, images=images)
    return prompts, latents, images, {name: head(batch).double() for name, head in heads.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_half_precision_moves_scores_by_little_of_their_spread(
    pipeline, heads, siblings, dtype
) -> None:
    prompts, latents, exact, scores_in_full = siblings
    rounded = decoded(copy.deepcopy(pipeline.vae).to(dtype), latents)
    assert 0 < (rounded - exact).abs().max() < LARGEST[dtype]["pixels"]

    moved = {}
    with ExitStack() as stack:
        half = exam.judges(SHIPPED, dtype=str(dtype).removeprefix("torch."))
        for name, head in heads.items():
            stack.enter_context(closing(half[name]))
            batch = RewardBatch(prompts=prompts, images=exact)
            scores = scores_in_full[name]
            spread = scores.view(-1, 5).var(dim=1).mean().sqrt()  # of siblings
            for what, others in {
                f"{name}, decoder": head(RewardBatch(prompts=prompts, images=rounded)),
                f"{name}, judge": half[name](batch),
            }.items():
                moved[what] = float((others - scores).square().mean().sqrt() / spread)
    assert min(moved.values()) > 0
    assert max(moved.values()) < LARGEST[dtype]["scores"]


def test_degradations_spoil_by_degrees(vae) -> None:
    images = exam.render(all_signs(["HAT"])[:4], vae, 0)
    for name, way in degradations(vae).items():
        errors = []
        for strength in (0.0, 0.2, 0.5, 1.0):
            spoilt = way(images, torch.full((4,), strength), Generator().manual_seed(0))
            assert spoilt.shape == images.shape
            assert 0 <= spoilt.min() <= spoilt.max() <= 1
            errors.append((spoilt - images).square().mean().item())
        assert errors == sorted(errors), name
        assert errors[0] < 0.25 * errors[-1], name


def test_each_image_is_spoilt_in_its_own_way(vae) -> None:
    ways = list(degradations(vae).values())[:3]
    images = exam.render(all_signs(["HAT"])[:4], vae, 0)
    strengths = torch.tensor([0.5, 0.5, 0.5, 0.0])
    kinds = [1, 0, 2, 0]
    spoilt = spoil(images, strengths, kinds, ways, Generator().manual_seed(0))
    blurred = ways[0](images[1:2], strengths[1:2], Generator())
    assert torch.equal(spoilt[1], blurred[0])
    # A strength of 0 leaves an image as it is, but for what a blend rounds in float32; half of it
    # changes pixels by up to 0.5.
    assert torch.allclose(spoilt[3], images[3], atol=1e-5)
    assert all(not torch.allclose(a, b) for a, b in zip(spoilt[:3], images[:3], strict=True))


def disc(x: float, y: float, colour: tuple[float, ...], ground: tuple[float, ...]) -> Tensor:
    """A disc of radius 16 around a place in pixels, `[1, 3, 64, 64]`."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    inside = torch.hypot(columns - x, rows - y) < 16
    fill, rest = (torch.tensor(c).view(1, 3, 1, 1) for c in (colour, ground))
    return torch.where(inside, fill, rest)


def test_the_rule_rewards_contrast_vividness_and_balance() -> None:
    red, dull, grey, pale = (0.9, 0.1, 0.1), (0.6, 0.4, 0.4), (0.5,) * 3, (0.5, 0.6, 0.8)
    best = beauty(disc(31.5, 31.5, red, pale))
    assert best > beauty(disc(31.5, 31.5, red, grey))  # a ground without colour
    assert best > beauty(disc(31.5, 31.5, dull, pale))  # a figure that hardly stands out
    assert best > beauty(disc(22.0, 31.5, red, pale))  # off centre
    # Means of 4096 pixels in float32: 2e-7 apart.
    assert beauty(torch.full((1, 3, 64, 64), 0.5)).item() == pytest.approx(1 + 9 * 0.2, abs=1e-4)
    noise = torch.rand(4, 3, 64, 64, generator=Generator().manual_seed(0))
    assert (beauty(noise) < 4).all()


def test_held_out_scenes_are_not_learnt_from(vae) -> None:
    rng = random.Random(0)
    scenes = [training_scene(rng) for _ in range(3000)]
    assert not set(scenes) & set(exam.held_out_scenes())
    assert all(map(is_held_out, exam.held_out_scenes()))
    shapes = {prompt for prompts in prompt_sets() for prompt in prompts if "sign" not in prompt}
    assert shapes <= {scene.prompt for scene in exam.held_out_scenes()}


def test_confusable_scenes_differ_in_one_thing() -> None:
    rng = random.Random(0)
    for scene in exam.held_out_scenes() * 4:
        other = confusable(scene, rng)
        assert type(other) is type(scene)
        if isinstance(scene, Sign):
            letters = sum(a != b for a, b in zip(scene.word, other.word, strict=True))
            assert letters + (scene.colour != other.colour) == 1
        else:
            assert isinstance(other, Shape)
            assert other.colour != other.background
            changed = [
                scene.colour != other.colour,
                scene.shape != other.shape,
                scene.background != other.background,
            ]
            exchanged = (other.colour, other.background) == (scene.background, scene.colour)
            assert sum(changed) == (2 if exchanged else 1)


def test_stocks_are_the_same_for_the_same_seed(vae) -> None:
    one, two, other = (make_stock(6, random.Random(seed), vae) for seed in (1, 1, 2))
    assert torch.equal(one.images, two.images)
    assert one.scenes == two.scenes != other.scenes
    images, ratings = spoilt_stock(8, random.Random(1), vae)
    assert images.dtype == torch.uint8
    assert len(images) == len(ratings) == 32
    assert (ratings[:8] == 5).all()
    assert ratings[8:].max() < 5
    assert ratings.min() >= 1


def test_looks_vary_and_stay_images() -> None:
    images = torch.rand(5, 3, 64, 64, generator=Generator().manual_seed(0))
    varied = vary(images, Generator().manual_seed(1))
    assert varied.shape == images.shape
    assert 0 <= varied.min() <= varied.max() <= 1
    assert torch.equal(varied, vary(images, Generator().manual_seed(1)))
    assert not torch.equal(varied, vary(images, Generator().manual_seed(2)))


def test_soft_labels_have_the_rating_as_their_mean() -> None:
    ratings = torch.tensor([1.0, 1.4, 2.5, 4.9, 5.0])
    labels = soft_labels(ratings)
    # A few operations in float32: within 1e-6, of torch's 1e-5 and pytest's 1e-6.
    assert torch.allclose(labels.sum(dim=1), torch.ones(5))
    assert torch.allclose(labels @ torch.arange(5.0, 0, -1), ratings)
    assert labels[1].tolist() == pytest.approx([0, 0, 0, 0.4, 0.6])


def test_a_prompt_that_is_right_twice_is_not_a_wrong_one() -> None:
    scaled = torch.tensor([[2.0, 2.0, -1.0], [2.0, 2.0, -1.0]])
    same = torch.tensor([[True, True, False], [True, True, False]])
    expected = torch.nn.functional.cross_entropy(torch.tensor([[2.0, -1.0]]), torch.tensor([0])) / 2
    # Differences of float32 numbers up to 2, rounded by 1e-7 each.
    assert contrastive_loss(scaled, same).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.slow
def test_can_be_rebuilt(tmp_path, monkeypatch) -> None:
    command = "--clip_steps 2 --clip_batch 6 --deqa_steps 2 --deqa_batch 6 --processes 1"
    script = str(ROOT / "scripts" / "dev" / "make_judges.py")
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path), *command.split()])

    def run(work, processes, *arguments) -> None:
        """Here, for the time of a process; that there is one shows in `test_pipeline.py`."""
        with torch.random.fork_rng():
            parallel._enter(0, processes, parallel._free_port(), work, arguments)

    monkeypatch.setattr(parallel, "run", run)
    runpy.run_path(script, run_name="__main__")
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert names == {str(file.relative_to(JUDGES)) for file in JUDGES.rglob("*") if file.is_file()}
    for name in names:
        if name.endswith("config.json"):
            assert json.loads((tmp_path / name).read_text()) == json.loads(
                (JUDGES / name).read_text()
            )
