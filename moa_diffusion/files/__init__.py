"""Files and places as their writer meant them; what is written is whole or not there."""

from moa_diffusion.files.digests import file_digest, json_digest
from moa_diffusion.files.paths import expanded, split_list, split_name
from moa_diffusion.files.writing import StorageError, write_bytes, write_text

__all__ = [
    "StorageError",
    "expanded",
    "file_digest",
    "json_digest",
    "split_list",
    "split_name",
    "write_bytes",
    "write_text",
]
