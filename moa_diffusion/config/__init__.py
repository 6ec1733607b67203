"""The configuration: dataclasses that mirror the YAML, strict about every key and value.

``parse`` reads ``--config FILE`` and dotted overrides (``--trainer.steps 5``) through
jsonargparse. Nothing here builds anything: classes take flat keyword arguments and work without
a configuration.
"""

from moa_diffusion.config.check import check as check
from moa_diffusion.config.parse import from_dict as from_dict
from moa_diffusion.config.parse import load as load
from moa_diffusion.config.parse import parse as parse
from moa_diffusion.config.parse import to_yaml as to_yaml
from moa_diffusion.config.places import traces as traces
from moa_diffusion.config.schema import Config as Config
from moa_diffusion.config.schema import LossConfig as LossConfig
from moa_diffusion.config.schema import SamplingConfig as SamplingConfig
from moa_diffusion.config.schema import TrainerConfig as TrainerConfig
