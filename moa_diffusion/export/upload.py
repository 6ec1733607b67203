"""An exported folder to a repository of the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

import httpx2

from moa_diffusion.types import ConfigError


def check_repository(name: str) -> None:
    """Check the name of a repository before anything is written.

    Raises:
        ConfigError: If the hub allows no such name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub: should be a repository: {error}") from None


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Make the repository if it is missing, and commit all files of a folder to it at once.

    Args:
        folder: What ``export`` wrote.
        repository: The name ``owner/name``; without an owner that of whoever is logged in.
        private: Whether a new repository is private; one that exists stays what it is.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: If the hub does not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload LoRA weights"
        )
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"--push_to_hub: should be a repository that you may write (`hf auth login` with a "
            f"token that writes). Found {repository!r}: {type(error).__name__}: {error}\n"
            f"The export is whole; `hf upload {repository} {shlex.quote(str(folder))}` tries again."
        ) from error
    return str(made)
