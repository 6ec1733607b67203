"""The configuration: dataclasses that mirror the YAML, strict about every key and value.

``parse`` reads ``--config FILE`` and dotted overrides (``--trainer.steps 5``); pydantic checks
types and ranges, which stand beside the fields. Nothing here builds anything: classes take sections
as their settings, and work with sections that are made in code.
"""

from moa_diffusion.config.parse import check, from_dict, load, parse, to_yaml
from moa_diffusion.config.places import traces
from moa_diffusion.config.schema import Config, LossConfig, SamplingConfig, TrainerConfig

__all__ = [
    "Config",
    "LossConfig",
    "SamplingConfig",
    "TrainerConfig",
    "check",
    "from_dict",
    "load",
    "parse",
    "to_yaml",
    "traces",
]
