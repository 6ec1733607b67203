"""Whether a model can be had at all, found out at once."""

from __future__ import annotations

from pathlib import Path

from moa_diffusion.files.paths import names_a_place
from moa_diffusion.types import ConfigError

SECONDS = 4.0  # to reach the hub, and again for its answer: below ten in all


def check_place(path: str) -> None:
    """Check that what can only be a folder of this machine is one.

    Raises:
        ConfigError: If not.
    """
    if names_a_place(path) and not Path(path).is_dir():
        contents = "a file" if Path(path).is_file() else f"none at `{Path(path).absolute()}`"
        raise ConfigError(f"policy.path: should be a folder with a model. Found {contents}.")


def check_reachable(path: str, file: str, *, revision: str | None = None) -> None:
    """Ask the hub once for a model that is neither a folder nor in the local cache.

    The libraries that load it would ask for a minute before they gave up.

    Args:
        path: Folder or hub id.
        file: The file of the model, that is in the cache if the model is.
        revision: The revision of a hub id.

    Raises:
        ConfigError: If there is no such model, or no way to the hub.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    check_place(path)
    if Path(path).is_dir():
        return
    expected = "policy.path: should be a folder with a model, or a hub id that can be reached."
    local = f"there is no folder `{Path(path).absolute()}`"
    try:
        if isinstance(try_to_load_from_cache(path, file, revision=revision), str):
            return
        HfApi().model_info(path, revision=revision, timeout=SECONDS)
    except HFValidationError as error:
        raise ConfigError(f"{expected} Found {path!r}: {local}, and {error}") from None
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"policy.revision: should be a branch, tag or commit of {path!r}. Found {revision!r}."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{expected} Found {path!r}: {local}, and the hub has no such model that you may read "
            "(`hf auth login` for one that is private)."
        ) from error
    except Exception as error:  # offline, timeouts, proxies: they have no common base class
        raise ConfigError(
            f"{expected} Found {path!r}: {local}, it is not in the local cache, and the hub does "
            f"not answer ({type(error).__name__}: {error}). With network, `hf download {path}` "
            "fetches it, after `hf auth login` if it is private or gated; or name a local folder."
        ) from error
