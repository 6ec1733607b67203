"""Imports flow one way. Read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("moa_diffusion", "rewards")

# From the top down. A module imports only from lower rows, or from its own room: `policies/*` names
# a folder with all that is in it, `scoring` a module.
LAYERS = (
    ("__main__", "train_sd", "train_lm"),
    ("commands/*",),
    ("export/*",),
    ("evaluation/*", "comparison/*", "calibration/*", "planning/*"),
    ("assembly/*",),
    ("training/*",),
    ("monitoring/*", "report/*", "adapters/*", "integrations/*"),
    ("policies/*", "objectives/*", "storage/*", "scoring"),
    ("data/*", "config/*", "statistics/*"),
    ("distributed", "processes/*"),
    ("moa_diffusion",),
    ("files/*",),
    ("types", "tiny/*"),
    ("rewards",),
    ("rewards/commands/*",),
    ("rewards/heads/*", "rewards/serving/*"),
    ("rewards/*",),
    ("rewards/pretrained/*",),
    ("rewards/base",),
    ("rewards/blame", "rewards/pixels", "rewards/suggestions"),
)

# The only modules that import the package `rewards` (scripts may too).
USERS_OF_REWARDS = {
    "moa_diffusion.commands.heads",  # the command of rewards
    "moa_diffusion.assembly.methods",  # import paths of weightings, as rewards have them
    "moa_diffusion.scoring",
    "moa_diffusion.planning.judges",  # what a head's model takes, by the head's class
    "moa_diffusion.evaluation.sample_cache",
    "moa_diffusion.evaluation.score_cache",
}
SUGGESTIONS = "rewards.suggestions"
FOR_EVERYONE = {SUGGESTIONS, "rewards.progress_bar"}  # no part of what scores
# What `rewards` and `types`, which everything loads, may import at module level.
LIGHT = {"torch", "numpy", "PIL"}
FIRST = {"moa_diffusion", "moa_diffusion.files.neighbours"}  # and what everything loads first
# Not among what everything loads: the commands of rewards, the head `remote` and what
# serves heads, who a head is, and progress bars.
LATER = {
    "rewards.commands.cli",
    "rewards.commands.score_folder",
    "rewards.identity",
    "rewards.progress_bar",
    "rewards.serving.client",
    "rewards.serving.remote",
    "rewards.serving.wire",
}
# Imported inside functions, everywhere: the packages load without them.
HEAVY = {
    "diffusers",
    "transformers",
    "peft",
    "torchjd",
    "matplotlib",
    "moocore",
    "jinja2",
    "plotly",
    "tensorboard",
    "rapidocr",
    "onnxruntime",
    "easyocr",
    "open_clip",
    "fastapi",
    "uvicorn",
    "pyarrow",
    "playwright",
    "markupsafe",
    "trl",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import statement's target."""

    module: str  # dotted, as far as it is a module: `moa_diffusion.types`
    line: int
    on_load: bool  # runs when the importing module is loaded


def module_name(path: Path) -> str:
    """``moa_diffusion/tiny/__init__.py`` to ``moa_diffusion.tiny``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}


def entries(module: str) -> list[str]:
    """What may stand for a module in the table, the nearest first."""
    parts = module.split(".")
    if parts == ["rewards"]:
        return parts
    if parts[0] == "rewards":  # its root is a room too, and its modules may have rows of their own
        return [f"rewards/{parts[1]}/*", f"rewards/{parts[1]}", "rewards/*"]
    return [f"{parts[1]}/*", parts[1]] if len(parts) > 1 else ["moa_diffusion"]


def row(module: str) -> int:
    """The module's row in the table, 0 at the top."""
    for entry in entries(module):
        for number, names in enumerate(LAYERS):
            if entry in names:
                return number
    raise LookupError(
        f"Module `{module}` has no layer. List it in the table LAYERS of tests/test_layers.py."
    )


def room(module: str) -> str | None:
    """The folder a module lies in, as the table names it: inside it, imports are free."""
    named = {name for names in LAYERS for name in names}
    found = next(entry for entry in entries(module) if entry in named)
    return found if found.endswith("*") else None


DYNAMIC = ("import_module", "__import__")


def by_name(node: ast.Call) -> str | None:
    """The module that ``import_module`` or ``__import__`` names, as far as the source says it.

    A package that names modules of its own, as `rewards` does, names itself.
    """
    match node.func:
        case ast.Name(called) | ast.Attribute(attr=called) if called in DYNAMIC:
            pass
        case _:
            return None
    name = node.args[0] if node.args else None
    if isinstance(name, ast.JoinedStr):  # `f"rewards.{module}"` names at least its package
        name = name.values[0]
        if isinstance(name, ast.Constant):
            return str(name.value).rpartition(".")[0]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None


def imports(source: str, importer: str, *, is_package: bool = False) -> list[Import]:
    """Every import in `source`; a name taken from a package counts as the module it names."""
    found: list[Import] = []

    def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = node.module or ""
        if node.level:
            parents = importer.split(".")
            kept = len(parents) - node.level + is_package
            base = ".".join(parents[:kept] + ([base] if base else []))
        names = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else base for name in names]

    def walk(node: ast.AST, on_load: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend(
                Import(module=module, line=node.lineno, on_load=on_load) for module in targets(node)
            )
        if isinstance(node, ast.Call) and (module := by_name(node)) and module != importer:
            found.append(Import(module=module, line=node.lineno, on_load=on_load))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            on_load = False
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                walk(child, False)
            for child in node.orelse:
                walk(child, on_load)
            return
        for child in ast.iter_child_nodes(node):
            walk(child, on_load)

    walk(ast.parse(source), True)
    return found


def violations(source: str, importer: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of a module, one sentence each."""
    wrong = []
    for item in imports(source, importer, is_package=is_package):
        where, top = f"{importer}, line {item.line}", item.module.partition(".")[0]
        if top in PACKAGES:
            if importer.split(".")[0] == "rewards" and top == "moa_diffusion":
                wrong.append(f"{where}: `rewards` imports nothing of moa_diffusion.")
            elif top == "rewards" and importer.split(".")[0] != "rewards":
                if importer not in USERS_OF_REWARDS and item.module not in FOR_EVERYONE:
                    wrong.append(f"{where}: only {sorted(USERS_OF_REWARDS)} imports `rewards`.")
            elif row(item.module) <= row(importer) and (
                room(importer) is None or room(importer) != room(item.module)
            ):
                wrong.append(f"{where}: `{item.module}` is not in a lower layer.")
        elif top in HEAVY and item.on_load:
            wrong.append(f"{where}: `{top}` is imported inside functions only.")
        elif (
            (importer in FIRST or row(importer) >= row("moa_diffusion.types"))
            and importer not in LATER
            and item.on_load
            and top not in LIGHT | sys.stdlib_module_names
        ):
            wrong.append(f"{where}: `{top}` loads with everything; import it in a function.")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_lower_layers(module: str) -> None:
    path = MODULES[module]
    row(module)
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


# All that a room imports of the project, itself apart, where that is less than the rows allow.
ONLY = {
    "an objective sees numbers, and nothing that could have made them": (
        "moa_diffusion.objectives",
        {"moa_diffusion.types", "moa_diffusion.statistics", SUGGESTIONS},
    ),
    "statistics know types and nothing else": (
        "moa_diffusion.statistics",
        {"moa_diffusion.types"},
    ),
    "what is shipped knows nothing of the code": ("moa_diffusion.tiny", set[str]()),
    "the contract of heads needs no head": (
        "rewards.base",
        {"rewards.blame", "rewards.pixels"},
    ),
}
# Imports that are never made, each with the reason; the rows forbid some of them as well.
NEVER = {
    "monitors are statistics of outputs, for any weighting": ("monitoring", "objectives"),
    "a log takes numbers, whatever they are": ("storage", "objectives"),
    "a page shows what lies in files": ("report", "objectives"),
    "the page of an evaluation reads its tables alone": ("report", "evaluation"),
    "a policy does not know what is rewarded": ("policies", "scoring"),
    "a policy does not know how rewards are weighed": ("policies", "objectives"),
    "a head does not know from where it is asked": ("rewards.heads", "rewards.serving"),
    "a model's files are located for any head": ("rewards.pretrained", "rewards.registry"),
}


def inside(module: str, rooms: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in rooms)


def imported_by(importer: str) -> set[str]:
    """All modules of the project that a module or the modules of a room import."""
    assert importer in MODULES
    return {
        item.module
        for module, path in MODULES.items()
        if inside(module, [importer])
        for item in imports(path.read_text(), module, is_package=path.name == "__init__.py")
        if item.module.split(".")[0] in PACKAGES
    }


@pytest.mark.parametrize(("importer", "allowed"), ONLY.values(), ids=ONLY)
def test_a_room_imports_nothing_else(importer: str, allowed: set[str]) -> None:
    assert {
        name for name in imported_by(importer) if not inside(name, {importer, *allowed})
    } == set()


@pytest.mark.parametrize(("importer", "never"), NEVER.values(), ids=NEVER)
def test_a_room_never_imports(importer: str, never: str) -> None:
    importer, never = (
        name if name.startswith("rewards") else f"moa_diffusion.{name}"
        for name in (importer, never)
    )
    assert never in MODULES
    assert {name for name in imported_by(importer) if inside(name, [never])} == set()


def test_what_the_package_does_without_stays_outside_of_it() -> None:
    """``scripts/dev`` may import anything, and nothing that is installed imports it."""
    outside = {path.stem for path in (ROOT / "scripts" / "dev").iterdir()} | {"scripts", "tests"}
    wrong = [
        f"{module}, line {item.line}"
        for module, path in MODULES.items()
        for item in imports(path.read_text(), module, is_package=path.name == "__init__.py")
        if item.module.split(".")[0] in outside
    ]
    assert wrong == []


def loose(package: Path) -> list[Path]:
    """The folders that hold modules and no ``__init__.py``: nothing installs what is in them."""
    folders = {path.parent for path in package.rglob("*.py")}
    return sorted(folder for folder in folders if not (folder / "__init__.py").is_file())


@pytest.mark.parametrize("package", PACKAGES)
def test_each_folder_of_modules_is_a_package(package: str) -> None:
    assert loose(ROOT / package) == []


def test_a_folder_without_its_init_is_found(tmp_path: Path) -> None:
    for name in ("package/__init__.py", "package/room/module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert loose(tmp_path / "package") == [tmp_path / "package" / "room"]


def test_the_root_holds_three_modules_beside_the_programs_and_a_folder_fifteen() -> None:
    counts: dict[Path, int] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    programs = {"moa_diffusion.__main__", "moa_diffusion.train_sd", "moa_diffusion.train_lm"}
    assert programs <= MODULES.keys()  # what `python -m` and launchers name
    assert counts[ROOT / "moa_diffusion"] - len(programs) <= 3
    assert {str(path): count for path, count in counts.items() if count > 15} == {}


ROOMS = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")
BY_NAME = {"rewards.heads", "rewards.heads.deqa", "rewards.heads.ocr"}  # by `create`, not by import


@pytest.mark.parametrize("room", [name for name in ROOMS if "." in name])
def test_a_room_says_what_it_offers(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__doc__
    assert bool(module.__all__) == (room not in BY_NAME)
    assert [name for name in module.__all__ if name not in vars(module)] == []


def test_the_embedded_models_lie_beside_their_rules_alone() -> None:
    assert {name for name in MODULES if name.startswith("moa_diffusion.tiny.")} == {
        "moa_diffusion.tiny.phrases",
        "moa_diffusion.tiny.rules",
    }


def test_the_trainer_knows_the_policy_protocol_and_no_policy() -> None:
    path = MODULES["moa_diffusion.training.trainer"]
    names = {item.module for item in imports(path.read_text(), "moa_diffusion.training.trainer")}
    policies = {name for name in names if name.startswith("moa_diffusion.policies")}
    assert policies <= {"moa_diffusion.policies.base"}


def test_one_module_makes_accelerators() -> None:
    """Any other would take from the launcher's environment what this project does not do."""
    calls = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Accelerator"
    }
    assert calls == {"moa_diffusion.processes.launcher"}


@pytest.mark.parametrize(
    ("importer", "source", "complaint"),
    [
        ("moa_diffusion.storage.log", "import moa_diffusion.training.trainer", "not in a lower"),
        (
            "moa_diffusion.training.loss",
            "def f():\n    from moa_diffusion import assembly",
            "not in a lower",
        ),
        ("moa_diffusion.scoring", "from .policies import samplers", "not in a lower layer"),
        ("moa_diffusion.training.trainer", "from rewards import create", "imports `rewards`"),
        ("moa_diffusion.training.trainer", "import rewards.registry", "imports `rewards`"),
        (
            "rewards.heads.ocr.head",
            "from moa_diffusion.types import Rollout",
            "nothing of moa_diffusion",
        ),
        ("rewards.heads.ocr.head", "import yaml", "import it in a function"),
        ("moa_diffusion.types", "from accelerate import Accelerator", "import it in a function"),
        ("moa_diffusion.policies.sd3", "from diffusers import UNet", "inside functions only"),
        (
            "moa_diffusion.storage.log",
            "import importlib\nx = importlib.import_module('moa_diffusion.training.trainer')",
            "not in a lower",
        ),
        ("moa_diffusion.policies.sd3", "__import__('rewards.registry')", "imports `rewards`"),
        (
            "moa_diffusion.storage.log",
            "def f(name):\n    import_module(f'moa_diffusion.training.{name}')",
            "not in a lower",
        ),
    ],
)
def test_a_wrong_import_is_found(importer: str, source: str, complaint: str) -> None:
    (found,) = violations(source, importer)
    assert complaint in found


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("moa_diffusion.policies.sd3", "def f():\n    import diffusers"),
        (
            "moa_diffusion.training.loss",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import peft",
        ),
        ("moa_diffusion.policies.sd3", "from moa_diffusion.policies import base"),
        ("moa_diffusion.scoring", "from rewards import create"),
        ("moa_diffusion.config.check", "from rewards.suggestions import did_you_mean"),
        ("moa_diffusion.storage.log", "from accelerate import Accelerator"),
        ("rewards.registry", "import importlib\nimportlib.import_module(place)"),
    ],
)
def test_a_right_import_passes(importer: str, source: str) -> None:
    assert violations(source, importer) == []


def test_an_unlisted_module_is_told_where_it_belongs() -> None:
    with pytest.raises(LookupError, match="List it in the table LAYERS"):
        row("moa_diffusion.utils")


def test_the_page_shows_the_rows() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| \d+ \| (.*) \|$", page.partition("## Rows")[2], re.M)
    of_rooms = [names for names in LAYERS if not names[0].startswith(("rewards", "moa_diffusion"))]
    for row_shown, names in zip(shown[:-1], of_rooms, strict=True):
        listed = {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", row_shown)}
        assert listed == {name.removesuffix("/*") for name in names}
