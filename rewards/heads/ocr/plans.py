"""What an OCR engine needs before it can be built: options, packages, programs, weights.

The head asks an engine's plan; workers see only the engine (``engines.py``). An engine that is
nothing but Python packages with models inside needs no entry in ``_PLANS``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rewards.heads.ocr import alphabets
from rewards.heads.ocr.engines import (
    ENGINES,
    EasyOcr,
    Engine,
    contained,
    easyocr_folder,
    import_easyocr,
    run_program,
    tesseract_command,
)
from rewards.pretrained.base import pick_device
from rewards.suggestions import did_you_mean

_MODES = (3, 4, 5, 6, 8, 9, 10, 11, 12, 13)  # Tesseract's; 7 is reading without detection


class EnginePlan:
    """An engine with its options.

    Args:
        engine: Name of the engine.
        kind: Class of the engine.
        options: All arguments of the class, the defaults included.

    Attributes:
        options: The same, with a concrete device.

    Raises:
        ValueError: If an option is wrong or names what is not there.
        ImportError: If a package or program is not installed.
    """

    extra = "ocr"  # what `pip install "moa-diffusion[...]"` calls the packages

    def __init__(self, engine: str, kind: type[Engine], options: Mapping[str, Any]) -> None:
        missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f'The OCR engine "{engine}" needs {" and ".join(missing)}. Install with: '
                f'pip install "moa-diffusion[{self.extra}]"'
            )
        try:
            json.dumps(dict(options))
        except TypeError as error:
            raise ValueError(
                f"Parameter `engine_options` should hold numbers, strings and lists. "
                f"Found {dict(options)}."
            ) from error
        self.engine, self.kind, self.options = engine, kind, dict(options)
        self.check()

    @property
    def on_gpu(self) -> bool:
        """Whether the engine occupies a GPU, where a second process would only be in its way."""
        return False

    def check(self) -> None:
        """Raise what can be told without loading anything; see the class."""

    def fetch(self) -> None:
        """Download what is not there yet, one process at a time.

        Raises:
            RuntimeError: If that fails.
        """

    def alphabet(self) -> str | None:
        """Return all characters that the engine can answer with; None: it does not tell."""
        return None

    def offload(self, engine: Engine) -> None:
        """Free the GPU's memory until the engine's next image."""

    def provenance(self) -> dict[str, str]:
        """Return versions by package or program, and SHA-256 by file of weights, where known."""
        return {}


class RapidOcrPlan(EnginePlan):
    """RapidOCR brings its models along."""

    def alphabet(self) -> str:
        """See ``EnginePlan``."""
        return alphabets.rapidocr()

    def provenance(self) -> dict[str, str]:
        """See ``EnginePlan``."""
        spec = importlib.util.find_spec("rapidocr")
        assert spec is not None
        assert spec.origin is not None
        models = sorted((Path(spec.origin).parent / "models").glob("*.onnx"))
        # The classifier of upside-down text is not used.
        used = (path for path in models if "_cls_" not in path.name)
        return _versions(self.kind.packages) | _digests(used)


class EasyOcrPlan(EnginePlan):
    """EasyOCR fetches its weights by itself, and can do so in one process only."""

    extra = "easyocr"

    @property
    def on_gpu(self) -> bool:
        """See ``EnginePlan``."""
        return bool(self.options["device"] != "cpu")

    def check(self) -> None:
        """Check languages, device and, if there may be no download, the weights."""
        known = import_easyocr().config.all_lang_list
        _check_languages(self.options)
        for code in self.options["languages"]:
            if code not in known:
                raise ValueError(
                    f"Parameter `languages` should hold codes of EasyOCR: {', '.join(known)}. "
                    f"Found {code!r}.{did_you_mean(code, known)}"
                )
        self.options["device"] = str(pick_device(self.options["device"]))
        missing = self._missing()  # also tells of languages that do not go together
        if missing and not self.options["download_enabled"]:
            raise ValueError(
                f"EasyOCR's weights are not there, and `download_enabled` is false. "
                f"{_by_hand(missing)}"
            )

    def fetch(self) -> None:
        """See ``EnginePlan``."""
        for path, entry in self._files().items():
            if path.is_file() and _hexdigest(path, "md5") != entry["md5sum"]:
                raise RuntimeError(
                    f"EasyOCR's weights in {path} are damaged: their MD5 should be "
                    f"{entry['md5sum']}. Delete the file, and it will be fetched again."
                )
        if not (missing := self._missing()):
            return
        from filelock import FileLock  # torch brings it

        folder = easyocr_folder(self.options["model_dir"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # EasyOCR downloads to a temporary file of the same name in every process.
            with FileLock(folder / "download.lock"):
                if self._missing():
                    EasyOcr(**{**self.options, "device": "cpu"})
        # It asserts checksums, with a message that one of its branches forgets to define.
        except (OSError, AssertionError, NameError, zipfile.BadZipFile) as error:
            raise RuntimeError(
                f"EasyOCR could not fetch its weights ({type(error).__name__}: {error}). Check the "
                f"network, or do it by hand: {_by_hand(missing)}"
            ) from error

    def alphabet(self) -> str:
        """See ``EnginePlan``."""
        reader = self._bare_reader()
        # What the model knows, without what its languages do not have: that is never answered.
        return "".join(set(reader.character) & set(reader.lang_char))

    def offload(self, engine: Engine) -> None:
        """See ``EnginePlan``."""
        assert isinstance(engine, EasyOcr)
        engine.offload()

    def provenance(self) -> dict[str, str]:
        """See ``EnginePlan``."""
        files = (path for path in self._files() if path.is_file())
        return _versions(self.kind.packages) | _digests(files)

    def _files(self) -> dict[Path, Mapping[str, str]]:
        """Return the files of weights and what EasyOCR knows of each.

        ``url``, ``md5sum`` and more.
        """
        config = import_easyocr().config
        reader = self._bare_reader()
        sought = (reader.model_lang, reader.character)
        entries = [e for models in config.recognition_models.values() for e in models.values()]
        used = [e for e in entries if (e["model_script"], e["characters"]) == sought]
        if self.options["detect"]:
            used.append(config.detection_models["craft"])
        folder = easyocr_folder(self.options["model_dir"])
        return {folder / entry["filename"]: entry for entry in used}

    def _bare_reader(self) -> Any:
        """Return an EasyOCR reader that knows the languages' recogniser, and loads nothing."""
        with contained(), tempfile.TemporaryDirectory() as scratch:
            return import_easyocr().Reader(  # which makes its folders
                list(self.options["languages"]),
                gpu=False,
                model_storage_directory=scratch,
                user_network_directory=scratch,
                detector=False,
                recognizer=False,
                verbose=False,
            )

    def _missing(self) -> dict[Path, str]:
        """Return the files that are not there, with their addresses."""
        return {path: entry["url"] for path, entry in self._files().items() if not path.is_file()}


class TesseractPlan(EnginePlan):
    """Tesseract is a program, with a file for each language."""

    def check(self) -> None:
        """Check the numbers, the program and its languages."""
        program, psm, side = (self.options[name] for name in ("program", "psm", "min_side"))
        _check_languages(self.options)
        if psm not in _MODES:
            raise ValueError(
                f"Parameter `psm` should be one of {', '.join(map(str, _MODES))}. "
                f"Found `psm = {psm!r}`. (Reading without `detect` is mode 7.)"
            )
        if not isinstance(side, int) or side < 1:
            raise ValueError(
                f"Parameter `min_side` should be a positive integer. Found `min_side = {side!r}`."
            )
        if shutil.which(program) is None:
            raise ImportError(
                f'The OCR engine "tesseract" needs the program `{program}`. Install with: '
                f"apt-get install tesseract-ocr (Debian, Ubuntu) or brew install tesseract (macOS)"
            )
        languages = self._installed()[1]
        for code in self.options["languages"]:
            if code not in languages:
                raise ValueError(
                    f"Parameter `languages` should hold languages that Tesseract has here: "
                    f"{', '.join(languages) or 'none'}. Found {code!r}. Install with: apt-get "
                    f"install tesseract-ocr-{code} (Debian, Ubuntu) or brew install tesseract-lang "
                    f"(macOS)"
                )

    def alphabet(self) -> str | None:
        """See ``EnginePlan``."""
        folder = self._installed()[0]
        texts = [
            alphabets.tesseract(folder / f"{code}.traineddata")
            for code in self.options["languages"]
        ]
        return None if None in texts else "".join(text for text in texts if text)

    def provenance(self) -> dict[str, str]:
        """See ``EnginePlan``."""
        version = run_program([self.options["program"], "--version"]).split("\n")[0]
        folder = self._installed()[0]
        files = (folder / f"{code}.traineddata" for code in self.options["languages"])
        return {"tesseract": version.removeprefix("tesseract ")} | _digests(files)

    def _installed(self) -> tuple[Path, list[str]]:
        """Return the folder of the languages, and their codes."""
        command = tesseract_command(self.options["program"], self.options["model_dir"])
        heading, *codes = run_program([*command, "--list-langs"]).splitlines()
        quoted = re.search(r'"(.+)"', heading)
        if quoted is None:
            raise ImportError(
                f'The OCR engine "tesseract" should be version 5 or later. `{" ".join(command)} '
                f"--list-langs` said: {heading}"
            )
        return Path(quoted[1]), codes


_PLANS: dict[str, type[EnginePlan]] = {
    "rapidocr": RapidOcrPlan,
    "easyocr": EasyOcrPlan,
    "tesseract": TesseractPlan,
}


def plan_engine(
    engine: str, *, detect: bool, detection_side: int | None, options: Mapping[str, Any]
) -> EnginePlan:
    """Return the plan of an engine; nothing is loaded.

    Args:
        engine: A key of ``rewards.heads.ocr.engines.ENGINES``.
        detect: See ``OcrHead``.
        detection_side: See ``OcrHead``; None for the engine's own default.
        options: The engine's other options.

    Raises:
        ValueError: If there is no such engine or option, or an option is wrong.
        ImportError: If a package or program is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(
            f"Parameter `engine` should be one of {', '.join(ENGINES)}. "
            f"Found `engine = {engine!r}`."
        )
    if not isinstance(options, Mapping):
        raise ValueError(
            f"Parameter `engine_options` should be a mapping. Found `engine_options = {options!r}`."
        )
    kind = ENGINES[engine]
    parameters = inspect.signature(kind).parameters
    own = [name for name in parameters if name not in ("detect", "detection_side")]
    for option in options:
        if option in ("detect", "detection_side"):
            raise ValueError(
                f"Parameter `engine_options` should leave out `{option}`, an option of the head."
            )
        if option not in own:
            raise ValueError(
                f'The OCR engine "{engine}" has no option "{option}".'
                f"{did_you_mean(option, own)} "
                f"Valid options: {', '.join(own) or 'none'}."
            )
    given: dict[str, Any] = {"detect": detect, **options}
    if detection_side is not None:
        if "detection_side" not in parameters:
            raise ValueError(
                f'Parameter `detection_side` means nothing to the OCR engine "{engine}", which '
                f"looks for text at full resolution. Found `detection_side = {detection_side}`."
            )
        given["detection_side"] = detection_side
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return _PLANS.get(engine, EnginePlan)(engine, kind, defaults | given)


def _check_languages(options: Mapping[str, Any]) -> None:
    languages = options["languages"]
    listed = isinstance(languages, list | tuple) and all(isinstance(c, str) for c in languages)
    if not listed or not languages:
        raise ValueError(
            f"Parameter `languages` should be a list of codes. Found `languages = {languages!r}`."
        )


def _by_hand(missing: Mapping[Path, str]) -> str:
    folder = next(iter(missing)).parent
    return f"Unpack {' and '.join(missing.values())} into {folder}."


def _versions(packages: Iterable[str]) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: _hexdigest(path, "sha256") for path in files}


def _hexdigest(path: Path, method: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, method).hexdigest()
