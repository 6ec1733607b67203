"""What the pages show works: commands parse and run, YAML is loaded, Python runs."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import study
import yaml

from moa_diffusion import assembly, config
from moa_diffusion.assembly.methods import check_ppo
from moa_diffusion.commands import COMMANDS
from moa_diffusion.storage.log import read_metrics
from pages import BLOCKS, PAGES, ROOT, SHELL, Block, blocks, commands, files
from rewards import registry

SHOWN = ("json", "text")  # languages of blocks that are looked at and not run
# What a command may begin with that is no script of this project, and why it is not run.
OUTSIDE = {
    ".": "activates the environment that `make setup` makes",
    "cd": "goes to a folder that another command makes",
    "apt-get": "installs into the system",
    "brew": "installs into the system",
    "hf": "downloads from the hub",
}
# What `<!-- run: ... -->` above a Python block may say.
ALONE, AFTER, AFTER_TEXTS = "run: alone", "run: after training", "run: after training of texts"
NEEDS_TRL = "run: needs TRL and a data set"  # compiled; tests/integrations/test_trl.py trains so
SMALL = (
    "--trainer.steps 1 --trainer.groups 2 --trainer.group_size 2 --trainer.updates 1 "
    "--trainer.sample_batch 4 --trainer.micro_batch 4 --evaluation.prompts 2 --evaluation.steps 2 "
    "--evaluation.images_per_prompt 2 --evaluation.rollout_images 2 --evaluation.pictures 0 "
    "--sampling.steps 2 --sampling.window 1 --log.trackers []"
)
NO_OCR = ["--rewards.ocr", "null"]  # its processes take longer than everything else
# Heads of examples that cannot be built on every machine.
NOT_BUILT = {"tesseract": "a program that is not installed everywhere"}


class Parsed(BaseException):
    """A script has parsed its command line; it goes no further."""

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options, self.rest = vars(options), list(rest)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parsed]:
    """What a script's own parser makes of arguments, without running the script."""
    depth = 0
    whole = argparse.ArgumentParser.parse_args
    part = argparse.ArgumentParser.parse_known_args

    def outermost(parse: Callable[..., Any], *given: Any, **named: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found = parse(*given, **named)
        finally:
            depth -= 1
        if depth:
            return found
        raise Parsed(found, []) if parse is whole else Parsed(*found)

    def parse(script: str, arguments: Sequence[str]) -> Parsed:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *arguments])
            for name, original in (("parse_args", whole), ("parse_known_args", part)):

                def method(*given: Any, original: Any = original, **named: Any) -> Any:
                    return outermost(original, *given, **named)

                patch.setattr(argparse.ArgumentParser, name, method)
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except Parsed as found:
                return found
        raise AssertionError(f"{script} parsed nothing")

    return parse


def lay_out(folder: Path, page: str) -> None:
    """What commands and examples of a page find around them."""
    for name in ("configs", "scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in files(page).items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_a_command_is_one(
    page: str,
    command: str,
    parsed: Callable[..., Parsed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lay_out(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    words = as_script(words)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:])
    elif words[0] == "recipes":
        assert words[1:2] in ([], ["copy"])
        assert all((ROOT / "configs" / f"{word}.yaml").is_file() for word in words[2:3])
    elif words[:2] == ["pip", "install"]:
        check_packages(words[2:])
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all(Path(word).exists() for word in words if "/" in word)
    elif words[0] in ("bash", "sbatch"):  # both start training with what follows
        assert subprocess.run(["bash", "-n", words[1]], check=False).returncode == 0
        check_script("scripts/train_sd.py", words[2:], parsed)
    elif words[0] not in OUTSIDE:
        (place,) = [i for i, word in enumerate(words) if re.match(r"scripts/[\w/]+\.py$", word)]
        assert (ROOT / words[place]).is_file()
        check_script(words[place], words[place + 1 :], parsed)


def as_script(words: list[str]) -> list[str]:
    """A command of the installed program, or of a module, as that of its script."""
    pattern = r"(?:moa-diffusion|.* -m moa_diffusion)[ .]([\w-]+) ?(.*)"
    if not (found := re.match(pattern, shlex.join(words))):
        return words
    command, rest = found[1].replace("_", "-"), shlex.split(found[2])
    assert command in COMMANDS
    if command == "recipes":
        return [command, *rest]
    script = {"rewards": "heads"}.get(command, command.replace("-", "_"))
    return ["python", f"scripts/{script}.py", *rest]


def check_packages(words: Sequence[str]) -> None:
    """Whether extras of this package are among those that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        name, _, extra = word.rstrip("]").partition("[")
        if name == project["name"]:
            assert extra in project["optional-dependencies"]


def check_script(script: str, words: Sequence[str], parsed: Callable[..., Parsed]) -> None:
    """Whether a script takes these words; what they name may be made later."""
    # A run's own configuration, for which the recipe of that name stands here.
    words = [re.sub(r"^runs/(\w+)/config\.yaml$", r"configs/\1.yaml", word) for word in words]
    if script == "scripts/dev/study.py":
        assert (ROOT / study.command_line().parse_args(words).study).is_file()
    elif script.startswith("scripts/dev/") or script == "scripts/demo.py":
        assert not words
    elif script in ("scripts/train_sd.py", "scripts/train_lm.py"):
        if not {"...", "--print_config", "--dry_run"} & set(words):
            config.parse(words)
    else:
        found = parsed(script, words)
        run = next(iter(found.options.get("run") or []), "runs/tiny_apex").rpartition("/")[2]
        base = found.options.get("config") or f"configs/{run}.yaml"
        if found.rest:
            config.load(base if Path(base).is_file() else "configs/tiny_apex.yaml", found.rest)
        if script == "scripts/compare.py":
            for method in found.options["methods"].split(","):
                assert method in assembly.METHODS or Path(method).is_file(), method


def own_registry(patch: pytest.MonkeyPatch) -> None:
    """Have the rewards that examples register vanish with the test."""
    built_in = registry.built_in()  # they register once, when they are imported
    patch.setattr(registry, "_entries", {name: registry._entries[name] for name in built_in})


def neutral(folder: Path, block: Block) -> Path:
    """A recipe that an example of YAML can lie over, without options of any one method."""
    recipe = "tiny_apex"
    if block.page == "docs/text.md":
        recipe = "lm_tiny_mopo" if "preferences" in block.text else "lm_tiny_pama"
    values = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    values["objectives"] = {"method": values["objectives"]["method"]}
    (base := folder / "base.yaml").write_text(yaml.safe_dump(values))
    return base


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_an_example_of_yaml_can_be_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, block.page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOA_REWARDS_TOKEN", "secret")
    own_registry(monkeypatch)
    (tmp_path / "example.yaml").write_text(block.text)
    settings = config.load(neutral(tmp_path, block), ["--config", "example.yaml"])
    for section in ("rewards", "evaluation.rewards"):
        if not any(word in block.text for word in NOT_BUILT):
            assembly.heads(settings, section)
    if not settings.preferences.given:
        _, weighting = assembly.objectives(settings)
        assembly.is_fused(settings, weighting)  # checks what the weighting can do
        check_ppo(settings)


def start(script: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script in this process; fail if it ends with another status than 0."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code, (script, *words)


@pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
def test_commands_lead_from_one_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's commands in their order, with fewer and smaller steps; all in one test, so that
    they run once, in whichever process."""
    lay_out(tmp_path, "README.md")
    prompts = 'a red sign that says "GO"\na blue square\n'
    for name in ("my_prompts.txt", "my_heldout_prompts.txt"):
        (tmp_path / name).write_text(prompts)
    monkeypatch.chdir(tmp_path)
    own_registry(monkeypatch)
    for script, words in (
        ("train_sd", "--config configs/tiny_apex.yaml --config mine.yaml --policy.path tiny"),
        ("evaluate", "--run runs/mine --seeds 0,1 --rewards redness,sharpness"),
        ("export", "--run runs/mine --checkpoint latest --output exported"),
        ("calibrate", "--config configs/tiny_apex.yaml --prompts 2 --images 2"),
        ("train_lm", "--config configs/lm_tiny_pama.yaml --generation.max_new_tokens 8"),
        ("heads", "list"),
    ):
        small = SMALL.split() if script.startswith("train") else []
        faster = NO_OCR if script in ("train_sd", "calibrate") else []
        start(f"scripts/{script}.py", [*words.split(), *small, *faster], monkeypatch)
    for place in ("runs/mine/evaluate/report.html", "exported/README.md"):
        assert (tmp_path / place).is_file(), place
    assert (tmp_path / "runs" / "calibration" / "calibration.json").is_file()

    rows = read_metrics(tmp_path / "runs" / "mine" / "metrics.jsonl")
    assert rows[-1]["applies/redness"] == 0.5
    rows += read_metrics(tmp_path / "runs" / "lm_tiny_pama" / "metrics.jsonl")
    assert {name for row in rows for name in row if not described(name)} == set()

    left = {path.name for path in (tmp_path / "runs" / "mine").iterdir()} - {"evaluate"}
    table = PAGES["docs/training.md"].split("## What a run leaves")[1].split("\n## ")[0]
    assert {name for name in left if f"`{name}" not in table} == set()

    for run, mark in (("mine", AFTER), ("lm_tiny_pama", AFTER_TEXTS)):
        (checkpoint,) = (tmp_path / "runs" / run / "checkpoints").iterdir()
        for block in blocks("python"):
            if block.mark == mark:
                code = re.sub(r"runs/\w+/checkpoints/step-\d+", str(checkpoint), block.text)
                exec(compile(code, str(block), "exec"), {"__name__": "example"})


def described(name: str) -> bool:
    """Whether a metric of a run has a row, by its own name or by that of its kind."""
    table = PAGES["docs/metrics.md"]
    kind = re.match(r"seconds/(?:score|evaluate)_|.*?/", name)  # an objective's name follows
    return name == "step" or f"`{name}`" in table or bool(kind and f"`{kind[0]}<" in table)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_an_example_of_python_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(block.text, str(block), "exec")
    if block.mark == ALONE or block.mark.startswith("file: "):
        own_registry(monkeypatch)
        exec(code, {"__name__": "example"})
    else:
        assert block.mark in (AFTER, AFTER_TEXTS, NEEDS_TRL)


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= {SHELL, "yaml", "python", *SHOWN}
    assert len(blocks(SHELL)) > 10
    assert len(commands()) > 30
