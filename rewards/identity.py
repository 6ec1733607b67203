"""Which scores a head gives: a digest of its weights, its engine and its options."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from rewards.base import RewardHead, Scored
from rewards.source import source_of_class


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who scores: two servers of one identity give the same scores."""

    head: str  # name on the server
    unit: str  # unit of the scores
    requires: tuple[str, ...]  # what a prompt must have for the head to apply
    version: str  # of this package on the server
    provenance: Mapping[str, str]  # weights, engines, and the source of what is not of this package
    digest: str  # sha256 of class, provenance, version and the options that matter
    scores: Scored = "both"  # what the head scores; a server of an earlier version does not say

    @classmethod
    def of(cls, name: str, head: RewardHead, options: Mapping[str, Any]) -> Identity:
        """Return the identity of a loaded head that was built with the given options."""
        known = {**source_of_class(type(head)), **head.provenance()}
        provenance = {str(key): str(value) for key, value in known.items()}
        relevant = {key: options[key] for key in options if key not in head.neutral_options}
        try:
            version = importlib.metadata.version("moa-diffusion")
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"  # run from a checkout
        kind = type(head).__qualname__
        essence = json.dumps([kind, provenance, version, relevant], sort_keys=True, default=str)
        return cls(
            head=name,
            unit=head.unit,
            requires=tuple(head.requires),
            version=version,
            provenance=provenance,
            digest=hashlib.sha256(essence.encode()).hexdigest(),
            scores=head.scores,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON values; ``from_json`` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Identity:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: If something is missing or of another type.
        """
        names = {field.name for field in fields(cls)} - {"scores"}
        if not isinstance(value, dict) or not names <= value.keys():
            raise ValueError(f"`identity` should have {', '.join(sorted(names))}.")
        provenance, requires = value["provenance"], value["requires"]
        texts = [value["head"], value["unit"], value["version"], value["digest"]]
        if isinstance(provenance, dict) and isinstance(requires, list):
            texts += [*provenance.values(), *requires]
        else:
            texts.append(None)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("`identity` should hold texts.")
        scores = value.get("scores", "both")
        if scores not in get_args(Scored):
            raise ValueError(f"`identity.scores` should be one of {', '.join(get_args(Scored))}.")
        chosen = {name: value[name] for name in names - {"requires"}}
        return cls(requires=tuple(requires), scores=scores, **chosen)
