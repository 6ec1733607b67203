"""Tensors of pretrained models: read without running code, loaded by name, each accounted for.

Where other loaders warn about a weight that is missing and draw it at random, these fail.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.base import RewardError
from rewards.pretrained.locate import Weights

_SHOWN_KEYS = 6


def read_tensors(weights: Weights, *, within: str = "") -> dict[str, Tensor]:
    """Read the weights by name, on the CPU, mapped into memory where the format allows it.

    Pickled files are read with ``weights_only=True``: they cannot run code.

    Args:
        weights: Files of weights.
        within: The name under which a pickled file holds the tensors, where it holds more, as
            checkpoints of trainings do.

    Raises:
        RewardError: If a file is damaged, two shards hold the same name, or the file holds
            something else than named tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name in weights.files:
        part = _read_file(weights.folder / name, within)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise RewardError(
                f"The tensors {_some(twice)} stand in two of the files {', '.join(weights.files)} "
                f"in {weights.folder}."
            )
        tensors.update(part)
    return tensors


def read_tensor(weights: Weights, name: str) -> Tensor:
    """Read one tensor, on the CPU, and where the format allows it nothing else.

    Raises:
        RewardError: If a file is damaged, or none holds the tensor.
    """
    for file in weights.files:
        path = weights.folder / file
        if path.suffix != ".safetensors":
            tensors = _read_file(path)
            if name in tensors:
                return tensors[name]
            continue
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                if name in opened.keys():  # noqa: SIM118 - it is no mapping
                    tensor: Tensor = opened.get_tensor(name)
                    return tensor
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    raise RewardError(
        f"The weights in {weights.folder} ({', '.join(weights.files)}) lack the tensor `{name}`."
    )


def load_strictly(
    module: nn.Module,
    weights: Weights,
    *,
    ignore: Sequence[str] = (),
    prefix: str = "",
    within: str = "",
    stored_as: Callable[[str], str] = str,
) -> None:
    """Put the weights into a module by name; every name and shape must match.

    The module takes over the tensors as they were read (``assign=True``): it may stand on the meta
    device, and keeps the file's dtype.

    Args:
        module: The module that takes the tensors, of the same names and shapes.
        weights: The module's files of weights.
        ignore: Endings of names in the files that the module need not have.
        prefix: Only the tensors whose names start so are meant.
        stored_as: Gives the name in the files, after the prefix, of a name in the module; by
            default they are the same.
        within: See ``read_tensors``.

    Raises:
        RewardError: Names what is missing, unexpected or of another shape, as the files have it.
    """
    tensors = {
        name: tensor
        for name, tensor in read_tensors(weights, within=within).items()
        if name.startswith(prefix) and not name.endswith(tuple(ignore))
    }
    state = module.state_dict()
    own_names = {prefix + stored_as(name): name for name in state}
    expected = {stored: state[name] for stored, name in own_names.items()}
    _check_names(
        weights,
        missing=expected.keys() - tensors.keys(),
        unexpected=tensors.keys() - expected.keys(),
        misshapen=[
            f"{name} ({list(tensors[name].shape)} instead of {list(expected[name].shape)})"
            for name in expected.keys() & tensors.keys()
            if tensors[name].shape != expected[name].shape
        ],
    )
    own = {own_names[stored]: tensor for stored, tensor in tensors.items()}
    module.load_state_dict(own, strict=True, assign=True)


def load_pretrained(
    kind: Any, weights: Weights, *, dtype: torch.dtype, ignore: Sequence[str] = ()
) -> nn.Module:
    """Build a transformers model from its ``config.json`` and weights, in evaluation mode.

    Args:
        kind: The model class, e.g. ``transformers.CLIPModel``.
        weights: Its files, ``config.json`` among them.
        dtype: Floating type of the parameters.
        ignore: Endings of names in the files that the model need not have.

    Raises:
        RewardError: As ``load_strictly``: where transformers would warn and draw weights at random,
            this is an error.
    """
    config = kind.config_class.from_pretrained(weights.folder, local_files_only=True)
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=read_tensors(weights),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they come back in the report
    )
    unexpected = [key for key in report["unexpected_keys"] if not key.endswith(tuple(ignore))]
    misshapen = [
        f"{name} ({list(shape)} instead of {list(wanted)})"
        for name, shape, wanted in report["mismatched_keys"]
    ]
    _check_names(
        weights, missing=report["missing_keys"], unexpected=unexpected, misshapen=misshapen
    )
    return model.eval()


def _check_names(
    weights: Weights,
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[str],
) -> None:
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    problems = [f"{fault}: {_some(sorted(names))}" for fault, names in faults.items() if names]
    if problems:
        raise RewardError(
            f"The weights in {weights.folder} do not fit this model. Tensors {'; '.join(problems)}."
        )


def _read_file(path: Path, within: str = "") -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path, device="cpu")
        # Only the format of torch 1.6 and later, a zip archive, can be mapped.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise RewardError(
            f"The file {path} is damaged, or holds other things than tensors, which could run code "
            f"when they are read. Fetch it again, or save it as safetensors where you trust it."
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error
    if within:
        if not isinstance(content, dict) or within not in content:
            raise RewardError(f"The file {path} should hold tensors by name under `{within}`.")
        content = content[within]
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise RewardError(f"The file {path} should hold tensors by name, a state dict.")
    return content


def _unreadable(path: Path, error: Exception) -> RewardError:
    return RewardError(
        f"The file {path} holds no readable weights ({type(error).__name__}: {error}). "
        f"Fetch it again."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return f"{', '.join(names[:_SHOWN_KEYS])}{more}"
