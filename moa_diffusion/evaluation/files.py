"""Files that are either whole or not there, and what names their content."""

from __future__ import annotations

from moa_diffusion.digests import file_digest as file_digest
from moa_diffusion.digests import json_digest as json_digest
from moa_diffusion.storage import replaced as replaced
from moa_diffusion.storage import write_text as write_text
