"""Files of pretrained models: where they lie, what they hash to, and what is in them.

A model is named in one of five ways:

- a folder: ``./models/pickscore``, ``~/models/pickscore``;
- a file of weights in a folder: ``./models/head.pth``;
- a folder or a file inside an installed package: ``package://my_package/judges/small``;
- a model on the Hugging Face hub: ``yuvalkirstain/PickScore_v1``;
- one file of it: ``owner/name:head.pth``.

What a hub model needs is looked for in the local cache first and fetched only if it is not there,
so that a machine without network can score, and a run does not change when a branch moves. Name
a commit as the revision to hold on to it elsewhere too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rewards.base import RewardError

_PACKAGE = "package://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# Large files; a small one is a git blob, with the 40 digits of a SHA-1.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
# The order in which transformers looks.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's files on this machine."""

    folder: Path
    model: str  # as the user named it
    revision: str  # commit of a hub model, "name version" of a package's distribution, "local"
    files: tuple[str, ...]  # names in `folder` of the files that hold tensors, sorted
    beside: tuple[
        str, ...
    ] = ()  # names of the other files that are read, sorted; none for a hub model

    def has(self, *names: str) -> bool:
        """Return whether all these files are in the folder."""
        return all((self.folder / name).is_file() for name in names)

    def digest(self, *, reread: bool = True) -> str:
        """Return the SHA-256 of the files that hold tensors, in hexadecimal.

        Of one file, what ``sha256sum FILE`` prints. Of several, with the names in the order of
        their bytes, what ``sha256sum FILE... | sha256sum`` prints in their folder.

        Args:
            reread: Whether every file is read. Else of a file in the hub's cache that is called by
                its SHA-256, as large files there are, the name counts: what was fetched, whatever
                has happened to it on the disk since.
        """
        return _digest(self.folder, self.files, reread=reread)

    def origin(self, part: str = "") -> dict[str, str]:
        """Return what tells these files from others of the name, beside the digest of the tensors.

        The commit tells all of a hub model. Of any other model ``files_sha256`` is the digest of
        the files that are read beside the tensors, such as a tokenizer's, which change scores too;
        it is made as that of ``digest`` is.

        Args:
            part: What the names of the facts begin with, such as ``tokenizer_``.

        Returns:
            ``revision`` and, where there are such files, ``files_sha256``.
        """
        facts = {f"{part}revision": self.revision}
        if self.beside:
            facts[f"{part}files_sha256"] = _digest(self.folder, self.beside, reread=True)
        return facts

    def expect(self, sha256: str | None, digest: str, *, option: str = "sha256") -> None:
        """Compare the digest to the expected one; None expects nothing.

        Args:
            sha256: The digest that is expected, in hex.
            digest: The digest of the files, in lower-case hex.
            option: The option that holds the expected digest, for the message.

        Raises:
            RewardError: If they differ.
        """
        if sha256 is not None and digest != sha256.lower():
            raise RewardError(
                f"The weights of `{self.model}` ({', '.join(self.files)} in {self.folder}) are not "
                f"the expected ones: their SHA-256 is {digest}, expected is {sha256.lower()}. "
                f"Fetch them again; for weights of your own set `{option}` to their digest, or to "
                f"null."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a model name points to: a folder, or a repository on the hub."""

    folder: Path | None
    repository: str
    file: str  # name of one file in it; empty when the whole is meant
    revision: str  # "name version" of a package's distribution, "local", or empty on the hub


def check_name(model: str, *, revision: str | None = None, option: str = "model") -> None:
    """Check the name of a model without touching the network or loading anything.

    A folder or file must exist; the name of a hub model must be well-formed.

    Args:
        model: See the module.
        revision: Branch, tag or commit of a hub model; None for anything else.
        option: Name of the parameter, for the message.

    Raises:
        ValueError: If there is no such file, folder or package, the name cannot be one, or a
            folder or file is given a revision.
    """
    place = _locate(model, option)
    if place.folder is not None and revision is not None:
        raise ValueError(
            f"Parameter `revision` should be left out for a folder or file. "
            f"Found `revision = {revision!r}` with `{option} = {model!r}`."
        )


def find_weights(
    model: str,
    *,
    revision: str | None = None,
    required: Sequence[str] = ("config.json",),
    optional: Sequence[str] = (),
    one_of: Sequence[str] = (),
    tensors: bool = True,
) -> Weights:
    """Find the files of a model; fetches those of a hub model that are not in the local cache.

    Args:
        model: See the module.
        revision: Branch, tag or commit of a hub model; ``main`` by default.
        required: Names of files that must be there, beside the weights.
        optional: Names of files that are fetched if the hub has them.
        one_of: Those of the optional files of which one must be there; none need be by default.
        tensors: Whether the weights are needed: ``model.safetensors``, else ``pytorch_model.bin``,
            in one piece or with an index and shards. Where ``model`` names one file, it is that.

    Raises:
        RewardError: If a file is missing or cannot be fetched; says what to do.
        ValueError: As ``check_name``.
    """
    check_name(model, revision=revision)
    place = _locate(model, "model")
    if place.folder is None:
        folder = _cached_or_fetched(place, revision, required, optional, one_of, tensors)
        commit = folder.name  # snapshots are named after their commit
    else:
        folder, commit = place.folder, place.revision
    missing = _missing(folder, place.file, required, one_of, tensors)
    if missing:
        advice = "Name a folder that holds all its files."
        if place.folder is None:
            names = _names(place, required, optional, tensors)
            advice = f"If the hub has them: `{_command(place, revision, names)}`."
        raise RewardError(
            f"The model `{model}` lacks {' and '.join(missing)} in {folder}. {advice}"
        )
    files = _tensor_files(folder, place.file) if tensors else ()
    beside: tuple[str, ...] = ()
    if place.folder is not None:
        present = {name for name in (*required, *optional) if (folder / name).is_file()}
        beside = tuple(sorted(present.difference(files), key=str.encode))
    return Weights(folder=folder, model=model, revision=commit, files=files, beside=beside)


def _digest(folder: Path, names: Sequence[str], *, reread: bool) -> str:
    digests = {}
    for name in names:
        path = (folder / name).resolve()
        if not reread and path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
            digests[name] = path.name
            continue
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def _locate(model: str, option: str) -> _Place:
    if not isinstance(model, str) or not model:
        raise ValueError(f"Parameter `{option}` should name a model. Found `{option} = {model!r}`.")
    if model.startswith(_PACKAGE):
        return _local(*_in_package(model, option))
    path = Path(model).expanduser()
    if path.exists():
        return _local(path.absolute(), "local")
    if model.startswith((".", "/", "~")):
        raise ValueError(
            f"Parameter `{option}` names a file or folder that does not exist. "
            f"Found `{option} = {model!r}` ({path.absolute()})."
        )
    repository, colon, file = model.partition(":")
    whole = not colon or (file and not {"", ".", ".."} & set(file.split("/")))
    if _REPOSITORY.fullmatch(repository) is None or not whole:
        raise ValueError(
            f"Parameter `{option}` should be a folder, a file, `package://NAME/PATH`, a hub model "
            f"`OWNER/NAME` or `OWNER/NAME:FILE`. Found `{option} = {model!r}`."
        )
    return _Place(folder=None, repository=repository, file=file, revision="")


def _local(path: Path, revision: str) -> _Place:
    folder, file = (path, "") if path.is_dir() else (path.parent, path.name)
    return _Place(folder=folder, repository="", file=file, revision=revision)


def _in_package(model: str, option: str) -> tuple[Path, str]:
    package, _, inside = model.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or importlib.util.find_spec(package) is None:
        raise ValueError(
            f"Parameter `{option}` names a file in the package {package!r}, which is not "
            f"installed. Found `{option} = {model!r}`."
        )
    path = importlib.resources.files(package).joinpath(inside)
    if not isinstance(path, Path) or not path.exists():
        raise ValueError(
            f"Parameter `{option}` names a file or folder that the installed package `{package}` "
            f"does not have. Found `{option} = {model!r}` ({path})."
        )
    return path, _distribution(package)


@functools.cache  # every installed package is looked through
def _distribution(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package)
    return f"{names[0]} {importlib.metadata.version(names[0])}" if names else "local"


def _missing(
    folder: Path, file: str, required: Sequence[str], one_of: Sequence[str], tensors: bool
) -> list[str]:
    missing = [f"`{name}`" for name in required if not (folder / name).is_file()]
    if one_of and not any((folder / name).is_file() for name in one_of):
        missing.append(f"any of {', '.join(one_of)}")
    if not tensors:
        return missing
    if file:
        return missing if (folder / file).is_file() else [*missing, f"`{file}`"]
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        return [*missing, f"weights ({', '.join(_WEIGHT_FILES)})"]
    shards = _tensor_files(folder, file)
    return [*missing, *(f"`{name}`" for name in shards if not (folder / name).is_file())]


def _tensor_files(folder: Path, file: str) -> tuple[str, ...]:
    file = file or next(name for name in _WEIGHT_FILES if (folder / name).is_file())
    if not file.endswith(".index.json"):
        return (file,)
    try:
        names = set(json.loads((folder / file).read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RewardError(
            f"The file {folder / file} should be a JSON object that maps every tensor to its file "
            f"under `weight_map`. Found: {type(error).__name__}: {error}."
        ) from error
    outside = [name for name in names if PurePosixPath(name).name != name]
    if outside:
        raise RewardError(f"The index {folder / file} names files outside its folder: {outside}.")
    return tuple(sorted(names, key=str.encode))


def _cached_or_fetched(
    place: _Place,
    revision: str | None,
    required: Sequence[str],
    optional: Sequence[str],
    one_of: Sequence[str],
    tensors: bool,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names = _names(place, required, optional, tensors)
    try:
        folder = Path(
            snapshot_download(
                place.repository, revision=revision, allow_patterns=names, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        folder = None
    # The cache can hold a part only, left there by another program.
    if folder is not None and not _missing(folder, place.file, required, one_of, tensors):
        return folder
    folder = _fetched(place, revision, names)
    if tensors and not place.file and not any(folder.glob("model*.safetensors")):
        folder = _fetched(place, revision, [*required, *optional, *_BIN])
    return folder


def _fetched(place: _Place, revision: str | None, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = place.repository
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except GatedRepoError as error:
        raise RewardError(
            f"The hub hands out `{repository}` only to those who accepted its licence. Accept it "
            f"at https://huggingface.co/{repository} and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise RewardError(
            f"The hub's `{repository}` has no revision `{revision}`. Name a branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise RewardError(
            f"The hub has no model `{repository}` that you may read. If a folder is meant: there "
            f"is no {Path(repository).absolute()}. If it is private: log in with `hf auth login`."
        ) from error
    except Exception as error:
        # Offline, timeouts, proxies, a full disk: the libraries below have no common base class.
        raise RewardError(
            f"The hub's model `{repository}` is not in the local cache and could not be fetched "
            f"({type(error).__name__}: {error}). With network: "
            f"`{_command(place, revision, names)}`. Or name a local folder that holds it."
        ) from error


def _names(
    place: _Place, required: Sequence[str], optional: Sequence[str], tensors: bool
) -> list[str]:
    """Return what to ask the hub for at first, names and patterns."""
    if not tensors:
        return [*required, *optional]
    return [*required, *optional, *([place.file] if place.file else _SAFETENSORS)]


def _command(place: _Place, revision: str | None, names: Sequence[str]) -> str:
    at = f" --revision {revision}" if revision else ""
    includes = "".join(f' --include "{name}"' for name in names)
    return f"hf download {place.repository}{at}{includes}"
