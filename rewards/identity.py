"""Which scores a head gives: a digest of its weights, its engine and its options."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from rewards.base import RewardHead, Scored
from rewards.functions import FunctionHead
from rewards.option_types import options_of
from rewards.parameters import OWN_OPTIONS
from rewards.source import source_of_class


class Identity(BaseModel, frozen=True):
    """Who scores: two servers of one identity give the same scores."""

    head: str  # name on the server
    unit: str  # unit of the scores
    requires: tuple[str, ...]  # what a prompt must have for the head to apply
    version: str  # this package's version on the server
    provenance: dict[str, str]  # weights, engines, and the source of what is not of this package
    digest: str  # sha256 of class, provenance, version and the options that matter
    scores: Scored = "both"  # what the head scores; a server of an earlier version does not say

    @classmethod
    def of(cls, name: str, head: RewardHead, options: Mapping[str, Any]) -> Identity:
        """Return the identity of a loaded head that was built with the given options.

        Args:
            name: The head's registered name, or the objective's where it has an import path.
            head: The loaded head, which tells its unit and provenance.
            options: The options that it was built with; those in ``neutral_options`` do not count,
                nor those that are as they are by default.
        """
        known = {**source_of_class(type(head)), **head.provenance()}
        provenance = {str(key): str(value) for key, value in known.items()}
        defaults = {key: option.default for key, option in options_of(type(head)).items()}
        if isinstance(head, FunctionHead):  # others of the name are the function's
            defaults = {key: defaults[key] for key in OWN_OPTIONS}
        relevant = {
            key: value
            for key, value in options.items()
            if key not in head.neutral_options
            and not (key in defaults and _text(value) == _text(defaults[key]))
        }
        try:
            version = importlib.metadata.version("moa-diffusion")
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"  # run from a checkout
        kind = type(head).__qualname__
        essence = _text([kind, provenance, version, relevant])
        return cls(
            head=name,
            unit=head.unit,
            requires=tuple(head.requires),
            version=version,
            provenance=provenance,
            digest=hashlib.sha256(essence.encode()).hexdigest(),
            scores=head.scores,
        )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
