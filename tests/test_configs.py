"""Every shipped configuration loads, and everything but the model is built from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from moa_diffusion import assembly, config
from moa_diffusion.data.prompt_files import read_prompts
from moa_diffusion.objectives.mopo_offline import OfflineSettings

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_sound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = config.load(path)
    assert settings.output_dir == f"runs/{path.stem}"
    assert config.from_dict(yaml.safe_load(config.to_yaml(settings))) == settings
    if settings.preferences.pairs or settings.preferences.data:
        check_offline(settings)
        return
    normalizer, weighting = assembly.objectives(settings)
    assert normalizer.objectives == weighting.objectives == tuple(settings.rewards)
    assert list(assembly.heads(settings)) == list(settings.rewards)
    assert assembly.heldout_requests(settings)
    if settings.prompts.train != "tiny":
        train = {prompt.text for prompt in read_prompts(settings.prompts.train)}
        assert train.isdisjoint(request.prompt for request in assembly.heldout_requests(settings))
    sizes = (1, 2, 4) if path.stem.startswith("lm") else (1, 2, 4, 8)
    for world_size in sizes:  # with the same forward passes, and so the same parameters
        geometry = assembly.solve_geometry(settings, world_size)
        assert geometry.per_rank * world_size == geometry.samples
        assert geometry.sample_batch == settings.trainer.sample_batch
        assert geometry.micro_batch == settings.trainer.micro_batch
        assert assembly.unequal_batches(settings, geometry) is None


def check_offline(settings: config.Config) -> None:
    assert list(assembly.heads(settings)) == list(settings.rewards)
    assert assembly.heldout_requests(settings)
    options = dict(settings.objectives.weighting)
    names = settings.preferences.objectives or list(settings.preferences.pairs)
    assert options.pop("primary") in names
    assert options.pop("bounds").keys() <= set(names)
    OfflineSettings(**options)
    if settings.preferences.data is not None:  # shipped
        assert assembly.preferences(settings).objectives == tuple(names)


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 4


def test_the_recipe_of_ddpo_has_what_trls_trainer_had() -> None:
    """The defaults of its last ``DDPOConfig``, by the keys of docs/ddpo.md."""
    rows = re.findall(
        r"^\| (.+?) \| (.*?) \|", (ROOT / "docs" / "ddpo.md").read_text(), re.MULTILINE
    )
    keys = {key for _, there in rows for key in re.findall(r"`([a-z_.]+)`", there)}
    known = {
        ".".join(key.split(".")[:n]) for key in assembly.flat(config.Config()) for n in (1, 2, 3)
    }
    options = {"objectives.normalizer.size", "objectives.normalizer.min_count"}
    assert {key for key in keys if "." in key} - known == options
    recipe = config.load(ROOT / "configs" / "sd35_medium_ddpo.yaml")
    assert recipe.loss.clip_range == 1e-4
    assert recipe.loss.advantage_clip == 5.0
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (3e-4, [0.9, 0.999])
    assert (recipe.optimizer.weight_decay, recipe.optimizer.eps) == (1e-4, 1e-8)
    assert recipe.optimizer.max_grad_norm == 1.0
    assert recipe.checkpoint.keep == 5
    assert recipe.objectives.method == "ddpo"
    assert recipe.objectives.normalizer["min_count"] == 16
