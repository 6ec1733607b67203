"""Images: plain diffusers draws the same, and a key knows what one depends on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from evaluated_runs import OPTIONS, PROMPTS, SETTINGS
from PIL import Image

from moa_diffusion.config import from_dict
from moa_diffusion.evaluation.images import ImageSettings, base_digest
from moa_diffusion.evaluation.plan import plan_evaluation
from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.evaluation.sample_cache import ImageCache
from moa_diffusion.policies.samplers import generators
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.storage import checkpoint
from moa_diffusion.tiny import PIPELINE_PATH


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
    two_runs: Path, evaluated: tuple[Path, ScoredSamples], label: str
):
    """Also of weights with another rank and scale than those that share the policy with them."""
    output, found = evaluated
    name, _, step = label.partition("/step-")
    folder = checkpoint.step_folder(two_runs / name, int(step)) / "ema" if step else None
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


def test_the_resolution_is_that_of_the_runs_evaluations(two_runs: Path, tmp_path: Path):
    """Of rollouts where the run says no other; an option wins over both."""

    def side(*overrides: str, resolution: str | None = None) -> int:
        given = OPTIONS | {
            "run": [str(two_runs / "b")],
            "output": tmp_path,
            "resolution": resolution,
        }
        return plan_evaluation(given, overrides).medium.deployment(torch.device("cpu")).resolution

    larger = ("--evaluation.resolution", "64")
    assert [side(), side(*larger), side(*larger, resolution="48")] == [32, 64, 48]
