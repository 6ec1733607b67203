"""Sizes of a pipeline's parts without its weights, and the parts on tensors without data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moa_diffusion.policies.sd3 import latent_shape
from moa_diffusion.policies.sd3.prompt_encoder import ENCODERS
from moa_diffusion.types import ConfigError

Sizes = Mapping[str, Any]  # arguments of a part, as its config.json has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Configurations of a pipeline's parts."""

    source: str  # where they are from, for the report
    transformer: Sizes
    vae: Sizes
    encoders: Mapping[str, Sizes]  # those that the pipeline has, by name

    @property
    def pixels_per_latent(self) -> int:
        """The pixels per latent along a side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def latent(self, resolution: int) -> tuple[int, int, int]:
        """Return the shape ``(C, h, w)`` of the latents of an image; see ``latent_shape``."""
        config = SimpleNamespace(**self.transformer)
        return latent_shape(config, self.pixels_per_latent, resolution)

    @property
    def clip_tokens(self) -> int:
        """The tokens of the first text encoder, which come before T5's."""
        clip = self.encoders.get(ENCODERS[0], self.encoders.get(ENCODERS[1], {}))
        return int(clip.get("max_position_embeddings", 77))


def read_shape(path: str, revision: str | None = None) -> Shape:
    """Return the sizes of a pipeline; nothing is downloaded.

    Args:
        path: Folder, or hub id: one in the local cache, or one whose configuration is published.
        revision: Revision of a hub id.

    Raises:
        ConfigError: If its configuration is not at hand.
    """
    local = {
        part: _local(path, f"{part}/config.json", revision)
        for part in ("transformer", "vae", *ENCODERS)
    }
    transformer, vae = local.pop("transformer"), local.pop("vae")
    if transformer is not None and vae is not None:
        encoders = {name: sizes for name, sizes in local.items() if sizes is not None}
        source = f"configuration files of {path}"
        return Shape(source=source, transformer=transformer, vae=vae, encoders=encoders)
    return published_shape(path)


def published_shape(path: str) -> Shape:
    """Return the published sizes of a pipeline.

    Args:
        path: Its hub id.

    Raises:
        ConfigError: If they are not known here.
    """
    known = published()
    if path not in known["pipelines"]:
        raise ConfigError(
            "policy.path: should be a folder with the configuration files of a pipeline, a hub id "
            f"in the local cache, or one of {', '.join(known['pipelines'])}. Found {path!r}, and "
            "nothing is downloaded for a plan."
        )
    return Shape(
        source=f"published configuration of {path}",
        transformer={**known["transformer"], **known["pipelines"][path]},
        vae=known["vae"],
        encoders={name: known[name] for name in ENCODERS},
    )


@cache
def published() -> dict[str, Any]:
    """Return what the ``config.json`` files of published models say, as far as sizes need it."""
    file = files("moa_diffusion.planning").joinpath("published.json")
    known: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return known


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters within the block in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_transformer(sizes: Sizes, dtype: torch.dtype, dual: Sequence[bool]) -> Any:
    """Return a transformer with other blocks.

    Args:
        sizes: The configuration.
        dtype: Data type of the parameters.
        dual: For each of the blocks whether it has a second attention.
    """
    from diffusers import SD3Transformer2DModel

    blocks = {
        "num_layers": len(dual),
        "dual_attention_layers": tuple(i for i, second in enumerate(dual) if second),
    }
    with made_in(dtype):
        return SD3Transformer2DModel.from_config({**sizes, **blocks})


def make_vae(shape: Shape, dtype: torch.dtype) -> Any:
    """Return the VAE."""
    from diffusers import AutoencoderKL

    with made_in(dtype):
        return AutoencoderKL.from_config(dict(shape.vae)).requires_grad_(False)


def make_encoder(name: str, sizes: Sizes, dtype: torch.dtype) -> Any:
    """Return a text encoder: CLIP, or T5 for the third.

    Args:
        name: Name of the encoder, one of ``ENCODERS``.
        sizes: The configuration.
        dtype: Data type of the parameters.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with made_in(dtype):
        if name == ENCODERS[2]:
            return T5EncoderModel(T5Config(**sizes))
        return CLIPTextModelWithProjection(CLIPTextConfig(**sizes))


def _local(path: str, name: str, revision: str | None) -> Sizes | None:
    """Return a configuration file of a folder or the hub's cache; None if there is none.

    Raises:
        ConfigError: If the file is damaged.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path)
    file = folder / name if folder.is_dir() else try_to_load_from_cache(path, name, None, revision)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    try:
        read: Sizes = json.loads(Path(file).read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"policy.path: {file} should be JSON. Found: {error}") from error
    return read
