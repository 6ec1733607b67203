"""Reward models of full size with random weights: what scoring costs, without a download.

A judge is built from the published sizes of the model that a recipe names, on the device and in the
precision that the recipe asks for. The head around it is the real one: its tokenizer, its
preprocessing on the CPU and its batches cost what they cost in a run. Scores mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.pipelines import made_as
from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.planning.shapes import published
from moa_diffusion.scoring import RewardHead
from rewards.heads.aesthetic import Aesthetic
from rewards.heads.clip import ClipScore, PickScore
from rewards.heads.deqa.config import DeqaConfig
from rewards.heads.deqa.head import DeqaHead
from rewards.heads.deqa.model import Deqa
from rewards.pretrained.base import ModelHead
from rewards.pretrained.locate import Weights, find_weights
from rewards.serving.remote import RemoteHead
from tiny_pipeline.tokenizers import clip_tokenizer

COUNT = 4  # rewards, at least: what the methods cost depends on it
CHEAP: tuple[dict[str, Any], ...] = (  # without a model
    {"head": "colourfulness"},
    {"head": "sharpness"},
    {"head": "jpeg_compressibility", "quality": 90},
    {"head": "jpeg_compressibility", "quality": 50},
)
KEPT = ("weight", "dtype", "batch_size")  # options of a recipe that say what scoring costs


def random_clip(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a ``CLIPModel`` with random weights, of the sizes in a folder's ``config.json``."""
    from transformers import CLIPConfig, CLIPModel

    with made_as(str(device), dtype, seed=0):
        model: Any = CLIPModel(CLIPConfig(**json.loads((folder / "config.json").read_text())))
    model.logit_scale.data = model.logit_scale.data.float()  # as the loaded one has it
    return model


def random_deqa(folder: Path, dtype: torch.dtype, device: torch.device) -> Deqa:
    """Return a DeQA model with random weights, of the sizes in a folder's ``config.json``."""
    sizes = DeqaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with made_as(str(device), dtype, seed=0):
        model = Deqa(sizes)
    return model.to(dtype)  # tables of positions are made in float32


class RandomPickScore(PickScore):
    """``pickscore`` on random weights."""

    def _recipe(self) -> Hashable:
        return random_clip

    def _build(self, weights: Weights) -> nn.Module:
        return random_clip(weights.folder, self.dtype, self.device)


class RandomClipScore(ClipScore):
    """``clipscore`` on random weights."""

    def _recipe(self) -> Hashable:
        return random_clip

    def _build(self, weights: Weights) -> nn.Module:
        return random_clip(weights.folder, self.dtype, self.device)


class RandomAesthetic(Aesthetic):
    """``aesthetic`` on random weights, with the model of transformers."""

    def _recipe(self) -> Hashable:
        return random_clip

    def _build(self, weights: Weights) -> nn.Module:
        return random_clip(weights.folder, self.dtype, self.device)


class RandomDeqa(DeqaHead):
    """``deqa`` on random weights."""

    def _build(self, weights: Weights) -> Deqa:
        return random_deqa(weights.folder, self.dtype, self.device)


# By the head that a recipe has: the random one, and the published model that it has by default.
RANDOM: dict[type[ModelHead], tuple[type[ModelHead], str]] = {
    PickScore: (RandomPickScore, "yuvalkirstain/PickScore_v1"),
    ClipScore: (RandomClipScore, "openai/clip-vit-large-patch14"),
    Aesthetic: (RandomAesthetic, "openai/clip-vit-large-patch14"),
    DeqaHead: (RandomDeqa, "zhiyuanyou/DeQA-Score-Mix3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A reward of the benchmark, in the place of one of the recipe or beside them."""

    name: str
    options: Mapping[str, Any]  # as a configuration has them
    kind: str  # "random weights", "as configured" or "stand-in"
    note: str = ""  # the architecture, or why a stand-in is there


def judges(settings: Config, folder: Path, *, device: str, full: bool) -> tuple[Judge, ...]:
    """Return at least ``COUNT`` rewards that need neither a download nor a server.

    Args:
        settings: The recipe, whose rewards are replaced by such with random weights.
        folder: Where the models' configurations and tokenizers are written.
        device: Device of the models.
        full: Whether they have their published sizes; else those of the models of the tests.
    """
    count = len(settings.rewards)
    wanted: dict[str, Mapping[str, Any]] = dict(settings.rewards)
    wanted |= {f"stand_in_{number}": {} for number in range(count + 1, COUNT + 1)}
    chosen = []
    for name, substitute in cheap(wanted).items():
        made: Judge | str = f"the recipe has fewer than {COUNT} rewards"
        if name in settings.rewards:
            made = _judge(settings, name, folder, device=device, full=full)
        if isinstance(made, str):
            made = Judge(name=name, options=substitute, kind="stand-in", note=made)
        chosen.append(made)
    return tuple(chosen)


def _judge(settings: Config, name: str, folder: Path, *, device: str, full: bool) -> Judge | str:
    """Return what stands for a reward of the recipe, or why it needs a cheap one."""
    options = settings.rewards[name]
    try:
        head = assembly.heads(replace(settings, rewards={name: options}))[name]
    except ImportError as error:
        return str(error)
    if type(head) in RANDOM:
        return _random(name, options, head, folder, device=device, full=full)
    if isinstance(head, ModelHead | RemoteHead):
        return f"{type(head).__name__} needs files of its model, or a server"
    return Judge(name=name, options=options, kind="as configured")


def cheap(rewards: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return rewards of the same names and weights that cost next to nothing."""
    return {
        name: CHEAP[number % len(CHEAP)]
        | {key: value for key, value in options.items() if key == "weight"}
        for number, (name, options) in enumerate(rewards.items())
    }


def _random(
    name: str,
    options: Mapping[str, Any],
    head: RewardHead,
    folder: Path,
    *,
    device: str,
    full: bool,
) -> Judge:
    """Return a judge with random weights, whose files lie in a folder of its model."""
    assert isinstance(head, ModelHead)
    kind, usual = RANDOM[type(head)]
    model = head.model if head.model in published()["judges"] else usual
    place = folder / model.replace("/", "--")
    sizes = published()["judges"][model] if full else _small(kind)
    if not place.exists():
        _write(place, sizes, clip=kind is not RandomDeqa)
    own: dict[str, Any] = {"path": f"{__name__}:{kind.__name__}", "model": str(place)}
    if kind is RandomAesthetic:
        predictor = place / "predictor.safetensors"
        width = sizes["projection_dim"]
        weight = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        save_file({"layers.0.weight": weight, "layers.0.bias": torch.tensor([5.0])}, str(predictor))
        own |= {"predictor": str(predictor), "predictor_sha256": None}
    kept = {key: options[key] for key in KEPT if key in options}
    place_of_model = "cpu" if options.get("device") == "cpu" else device
    return Judge(
        name=name,
        options={**own, **kept, "device": place_of_model},
        kind="random weights",
        note=f"architecture of {model}" + ("" if full else ", small"),
    )


def _small(kind: type[ModelHead]) -> dict[str, Any]:
    """Return the sizes of the judges that are shipped for tests."""
    model = f"package://moa_diffusion/tiny/judges/{'deqa' if kind is RandomDeqa else 'clip'}"
    folder = find_weights(model, tensors=False).folder
    sizes: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return sizes


def _write(place: Path, sizes: Mapping[str, Any], *, clip: bool) -> None:
    """Write what a head reads beside weights, and a file in their place that holds none."""
    place.mkdir(parents=True)
    save_file({}, str(place / "model.safetensors"))
    config = dict(sizes)
    if clip:
        tokenizer = clip_tokenizer()
        text = dict(config["text_config"])
        tokenizer.model_max_length = text.setdefault("max_position_embeddings", 77)
        tokenizer.save_pretrained(place)
        # Where the embedding of a prompt is read: at the token of its end.
        marks: Iterable[str] = ("bos_token_id", "eos_token_id", "pad_token_id")
        config["text_config"] = text | {mark: getattr(tokenizer, mark) for mark in marks}
        side = config["vision_config"]["image_size"]
        (place / "preprocessor_config.json").write_text(
            json.dumps({"size": side, "crop_size": side})
        )
    (place / "config.json").write_text(json.dumps(config))
