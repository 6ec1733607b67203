"""The shipped pipeline: complete, small, loaded by plain diffusers, drawing what is asked."""

import logging
import runpy
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moa_diffusion.tiny import PIPELINE_PATH
from rewards import RewardBatch, create
from tiny_pipeline.scenes import COLOURS

ROOT = Path(__file__).parents[2]
STEPS = 10


def load(path: Path):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return load(PIPELINE_PATH)


def draw(pipeline, prompts: list[str], **options) -> np.ndarray:
    """Images `[N, 64, 64, 3]` in 0 to 1 from seed 0."""
    options = {"guidance_scale": 1.0, "max_sequence_length": 16} | options
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompts,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="np",
        **options,
    ).images


def test_importing_the_package_is_light() -> None:
    check = (
        "import sys, moa_diffusion.tiny; "
        "print({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "diffusers" not in done.stdout
    assert "transformers" not in done.stdout
    assert "matplotlib" not in done.stdout


def test_files_are_small() -> None:
    assert sum(file.stat().st_size for file in PIPELINE_PATH.rglob("*")) <= 10e6


def test_loads_complete_without_warnings(tmp_path, caplog) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(PIPELINE_PATH, broken)
    weights = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["text_model.final_layer_norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in libraries:  # they hand nothing on to the root
        logger.addHandler(caplog.handler)
    try:
        load(PIPELINE_PATH)
        assert not caplog.records
        load(broken)
        assert "final_layer_norm.weight" in caplog.text, "nothing would be noticed"
    finally:
        for logger in libraries:
            logger.removeHandler(caplog.handler)


def test_every_weight_is_in_one_type(pipeline) -> None:
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    for part in parts:
        model = getattr(pipeline, part)
        assert model.dtype == torch.float32
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_is_a_stable_diffusion_3_5(pipeline) -> None:
    assert pipeline.vae_scale_factor == 8
    assert pipeline.vae.config.latent_channels == pipeline.transformer.config.in_channels == 16
    assert pipeline.transformer.config.qk_norm == "rms_norm"
    assert pipeline.scheduler.config.shift == 3.0


def test_draws_shapes_in_their_colours(pipeline) -> None:
    asked = [("red", "blue"), ("white", "black"), ("green", "yellow"), ("orange", "purple")]
    images = draw(pipeline, [f"a {a} circle on a {b} background" for a, b in asked])
    assert images.shape == (4, 64, 64, 3)
    assert np.isfinite(images).all()
    for image, (colour, background) in zip(images, asked, strict=True):
        for patch, name in ((image[28:36, 28:36], colour), (image[1:5, 1:5], background)):
            error = np.median(patch.reshape(-1, 3), axis=0) * 255 - COLOURS[name]
            assert np.abs(error).mean() < 40


def test_guidance_and_the_empty_prompt_work(pipeline) -> None:
    images = draw(pipeline, ['a blue sign that says "GO"'], guidance_scale=4.5)
    assert np.isfinite(images).all()
    assert np.isfinite(draw(pipeline, [""])).all()


def test_padding_hardly_matters(pipeline) -> None:
    prompts = ['a blue sign that says "STOP"', "a red star on a white background"]
    short, default = draw(pipeline, prompts), draw(pipeline, prompts, max_sequence_length=256)
    assert np.abs(short - default).mean() < 0.05


def test_some_signs_can_be_read(pipeline) -> None:
    words = ["BUS", "CAT", "TAX", "STOP", "PARK", "HOT", "OPEN", "SALE"]
    prompts = [f'a {colour} sign that says "{word}"' for word in words for colour in COLOURS]
    images = torch.from_numpy(draw(pipeline, prompts)).permute(0, 3, 1, 2)
    with closing(create("ocr", workers=0)) as head:
        scores = head(RewardBatch(prompts=prompts, metadata=[{}] * len(prompts), images=images))
    assert 0.3 < scores.mean() < 0.7  # two fifths of its pre-training were scribbled
    assert scores.quantile(0.9) == 1.0
    assert scores.quantile(0.1) < 0.3


@pytest.mark.slow
def test_can_be_rebuilt(tmp_path, monkeypatch) -> None:
    command = "--vae_steps 4 --vae_batch 4 --transformer_steps 4 --transformer_batch 4"
    script = str(ROOT / "scripts" / "dev" / "make_tiny.py")
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path), *command.split()])
    runpy.run_path(script, run_name="__main__")
    made = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    runpy.run_path(script, run_name="__main__")  # another transformer for the same autoencoder
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == made
    images = draw(load(tmp_path), ["a red circle on a blue background"])
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
