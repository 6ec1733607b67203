"""Reading a Stable Diffusion 3 pipeline, and what of the settings has to fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moa_diffusion.policies import lora
from moa_diffusion.policies.hub import check_reachable
from moa_diffusion.policies.sd3.attention import backend
from moa_diffusion.types import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_pipeline(path: str, *, revision: str | None = None) -> None:
    """Read the pipeline's index and nothing else.

    Raises:
        ConfigError: If there is no pipeline, or one of another class.
    """
    from diffusers import StableDiffusion3Pipeline

    check_reachable(path, "model_index.json", revision=revision)
    try:
        index = StableDiffusion3Pipeline.load_config(path, revision=revision)
    except OSError as error:
        raise ConfigError(
            "policy.path: should be a folder with a model_index.json or a hub id that can be "
            f"reached. Found {path!r}: {error}"
        ) from error
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise ConfigError(
            "policy.path: should be a Stable Diffusion 3 pipeline. "
            f"Found {index.get('_class_name')!r} in {path!r}."
        )


def check_fit(
    path: str,
    *,
    revision: str | None,
    resolutions: Mapping[str, int],
    target_modules: Sequence[str] | None,
    attention: str = "native",
) -> None:
    """Check settings against a pipeline's configuration files, before its weights are read.

    Args:
        path: Folder or hub id.
        revision: Revision of a hub id.
        resolutions: Sides of the square images, in pixels, by the keys that name them.
        target_modules: Suffixes of the linear layers that get an adapter.
        attention: The attention backend.

    Raises:
        ConfigError: If there is no Stable Diffusion 3 pipeline, or a setting does not fit it.
        ValueError: If a target names no layer, or there is no such backend.
    """
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    check_pipeline(path, revision=revision)
    options: dict[str, Any] = {"revision": revision}
    try:
        vae = AutoencoderKL.load_config(path, subfolder="vae", **options)
        shape = SD3Transformer2DModel.load_config(path, subfolder="transformer", **options)
    except OSError as error:
        raise ConfigError(
            f"policy.path: the configuration files in {path!r} are missing or damaged: {error}"
        ) from error
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(shape)
    lora.check_targets(transformer, target_modules or lora.ATTENTION)
    backend(attention)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    for key, resolution in resolutions.items():
        latent_shape(transformer.config, factor, resolution, key=key)


def latent_shape(
    config: Any, factor: int, resolution: int, *, key: str = "sampling.resolution"
) -> tuple[int, int, int]:
    """Return the shape ``(C, h, w)`` of the latents of a square image.

    Args:
        config: Config of the transformer.
        factor: Pixels per latent along a side.
        resolution: Side of the image, in pixels.
        key: What names it, for messages.

    Raises:
        ConfigError: If the transformer cannot draw it.
    """
    multiple = factor * config.patch_size
    largest = config.pos_embed_max_size * multiple
    if resolution % multiple or not 0 < resolution <= largest:
        raise ConfigError(
            f"{key}: should be a multiple of {multiple}, at most {largest}. Found {resolution}."
        )
    return (config.in_channels, resolution // factor, resolution // factor)


def load_pipeline(
    path: str, *, revision: str | None = None, dtype: str = "float32", vae_dtype: str = "float32"
) -> Any:
    """Load a Stable Diffusion 3 pipeline from a folder or a hub id, cast once.

    Args:
        path: Folder or hub id.
        revision: Revision of a hub id.
        dtype: Data type of transformer and text encoders: 'float32', 'bfloat16' or 'float16'.
        vae_dtype: Data type of the VAE, likewise.

    Raises:
        ConfigError: Before any weight is read, if there is no pipeline or one of another class.
    """
    from diffusers import StableDiffusion3Pipeline
    from safetensors import SafetensorError

    check_pipeline(path, revision=revision)
    load: Any = StableDiffusion3Pipeline.from_pretrained
    kinds = {"default": DTYPES[dtype], "vae": DTYPES[vae_dtype]}
    try:
        pipeline = load(path, revision=revision, dtype=kinds)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"policy.path: the weights in {path!r} are missing or damaged: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
