"""Tests lie where one looks for them: a module's in the file of its name, or in one named here."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from test_layers import MODULES, imports

TESTS = Path(__file__).parent

# Modules without a test file of their own: the file that tests them instead, why, and the modules.
ELSEWHERE: dict[str, tuple[str, tuple[str, ...]]] = {
    "calibration/test_measure.py": (
        "what is measured is plotted",
        ("moa_diffusion.calibration.plot",),
    ),
    "commands/test_evaluate.py": (
        "the whole of an evaluation is what its command does",
        ("moa_diffusion.evaluation.evaluate",),
    ),
    "evaluation/test_images.py": (
        "images are drawn with each model's weights, and kept in records",
        (
            "moa_diffusion.adapters.diffusers",
            "moa_diffusion.evaluation.medium",
            "moa_diffusion.evaluation.records",
        ),
    ),
    "evaluation/test_draw.py": (
        "the error that ends an evaluation: its disk is full",
        ("moa_diffusion.evaluation.errors",),
    ),
    "report/test_summary.py": (
        "the table of scores is what a summary is made of",
        ("moa_diffusion.report.table",),
    ),
    "report/test_grid.py": (
        "the prompts that a grid shows",
        ("moa_diffusion.report.shown",),
    ),
    "commands/test_evaluate_text.py": (
        "the same of language models",
        (
            "moa_diffusion.adapters.peft",
            "moa_diffusion.evaluation.texts",
            "moa_diffusion.report.completions",
        ),
    ),
    "commands/test_export.py": (
        "what is exported is loaded by a plain pipeline",
        ("moa_diffusion.export.card", "moa_diffusion.export.export"),
    ),
    "commands/test_train_sd.py": (
        "assembling a run takes its whole configuration",
        (
            "moa_diffusion.assembly.models",
            "moa_diffusion.assembly.scorers",
            "moa_diffusion.assembly.trainers",
            "moa_diffusion.comparison.curves",
            "moa_diffusion.train_sd",
        ),
    ),
    "commands/test_train_lm.py": (
        "a program is what runs when it is started",
        ("moa_diffusion.train_lm",),
    ),
    "commands/test_wheel.py": (
        "what is installed is started from elsewhere",
        ("moa_diffusion.__main__",),
    ),
    "data/test_prompt_files.py": (
        "what a text file or a table may hold shows in the files that are read",
        ("moa_diffusion.data.prompt_tables", "moa_diffusion.files.text"),
    ),
    "planning/test_command.py": (
        "what is printed, and other settings, are of a whole plan",
        (
            "moa_diffusion.commands.plan",
            "moa_diffusion.planning.present",
            "moa_diffusion.planning.variants",
        ),
    ),
    "planning/test_planner.py": (
        "a forecast is what a planner makes",
        ("moa_diffusion.planning.forecast",),
    ),
    "policies/test_causal_lm.py": (
        "parts of the policy of language models, on a model",
        ("moa_diffusion.policies.language_model",),
    ),
    "policies/test_families.py": (
        "a common suite, which every policy must pass",
        (
            "moa_diffusion.monitoring.progress",
            "moa_diffusion.policies.base",
            "moa_diffusion.training.gradient_check",
        ),
    ),
    "policies/sd3/test_policy.py": (
        "a policy's parts, each by what the policy gives",
        (
            "moa_diffusion.policies.sd3.decisions",
            "moa_diffusion.policies.sd3.pipeline",
            "moa_diffusion.policies.sd3.reverse",
            "moa_diffusion.policies.sd3.velocity",
        ),
    ),
    "policies/test_forward.py": (
        "forward passes of our own, of layers and in a transformer",
        ("moa_diffusion.policies.sd3.attention",),
    ),
    "policies/test_lora_files.py": (
        "files of LoRA weights are read into adapters",
        ("moa_diffusion.policies.hub",),
    ),
    "test_distributed.py": (
        "all processes leave together, and one of them says why",
        ("moa_diffusion.training.launch",),
    ),
    "report/page/test_page.py": (
        "the page is looked at as a whole",
        ("moa_diffusion.report.page.payload",),
    ),
    "rewards_package/heads/deqa/test_model.py": (
        "the parts of one ported model, against the published code",
        ("rewards.heads.deqa.config", "rewards.heads.deqa.head", "rewards.heads.deqa.vision"),
    ),
    "rewards_package/heads/test_clip.py": (
        "tokens are those of the model's own tokenizer",
        ("rewards.heads.prompt_tokens", "rewards.pretrained.tokens"),
    ),
    "rewards_package/serving/test_server.py": (
        "server and client, each against the other",
        (
            "rewards.serving.batching",
            "rewards.serving.checked_png",
            "rewards.serving.client",
            "rewards.serving.wire",
        ),
    ),
    "tiny/test_writing.py": (
        "the rules of the shipped letters, which their models were trained by",
        ("moa_diffusion.tiny.phrases", "moa_diffusion.tiny.rules"),
    ),
    "training/test_endings.py": (
        "how a run ends: by itself, by a signal, by a full disk",
        ("moa_diffusion.storage.saving",),
    ),
    "training/test_trainer.py": (
        "a whole run on the toy policy, which must learn",
        ("moa_diffusion.policies.toy",),
    ),
    "training/test_update.py": (
        "an update takes a stepper, its steps and its minibatches",
        ("moa_diffusion.training.fused",),
    ),
}
UNITS = {name: path for name, path in MODULES.items() if path.name != "__init__.py"}
# Modules that their test file does not import, each with the words by which it uses them.
USED_BY = {
    "moa_diffusion.__main__": '"-m", "moa_diffusion"',
    "moa_diffusion.adapters.diffusers": "evaluated: ",
    "moa_diffusion.assembly.models": "assembly.trainer(",
    "moa_diffusion.assembly.scorers": "assembly.trainer(",
    "moa_diffusion.assembly.trainers": "assembly.trainer(",
    **{
        f"moa_diffusion.{module}": f'"{module.rpartition(".")[2]}.py"'  # by its script
        for module in (
            *("train_sd", "train_lm", "commands.evaluate", "commands.export", "commands.demo"),
            *("commands.calibrate", "commands.compare", "commands.heads"),
        )
    },
    "moa_diffusion.config.messages": "whole number",
    "moa_diffusion.config.yaml_files": "should be YAML",
    "moa_diffusion.data.prompt_tables": "read_prompts",
    "moa_diffusion.evaluation.draw": "evaluate(",
    "moa_diffusion.evaluation.medium": "plan_evaluation(",
    "moa_diffusion.evaluation.plan": "from evaluated_runs import ask",
    "moa_diffusion.evaluation.score": "evaluate(",
    "moa_diffusion.evaluation.write": "evaluated: ",
    "moa_diffusion.export.card": "README.md",
    "moa_diffusion.files.text": "read_prompts(",
    "moa_diffusion.monitoring.heldout": "trainer.heldout",
    "moa_diffusion.policies.base": ".log_probs(",
    "moa_diffusion.policies.hub": "huggingface_hub.HfApi.model_info",
    "moa_diffusion.policies.toy": "from toy_runs import",
    "moa_diffusion.policies.sd3.decisions": "policy._decisions.",
    "moa_diffusion.policies.sd3.reverse": "policy._decisions.stochastic",
    "moa_diffusion.policies.sd3.velocity": "policy._velocity(",
    "moa_diffusion.report.grid": "grid.png",
    "moa_diffusion.report.page.payload": "write_report(",
    "moa_diffusion.report.pareto_plot": "pareto.png",
    "moa_diffusion.report.shown": "evaluated: ",
    "moa_diffusion.training.loop": "trainer.run()",
    "moa_diffusion.training.steps": "loss__ratio_tolerance",
    "moa_diffusion.training.trainer": "trainer.learner",
    "rewards.coroutines": "async def",
    "rewards.heads.clip_iqa": 'create("clip_iqa"',
    "rewards.heads.deqa.head": '"deqa"',
    "rewards.heads.deqa.vision": "Deqa(DeqaConfig",
    "rewards.heads.prose": 'create("length"',
    "rewards.heads.prompt_tokens": "head.remarks(",
    "rewards.heads.qrealign": 'create("qrealign"',
    "rewards.heads.vqascore": 'create("vqascore"',
    "rewards.parameters": "FunctionHead",
    "rewards.pretrained.tokens": '"clipscore"',
    "rewards.serving.checked_png": "one(png(",
}


def own_file(module: str) -> Path:
    """Where the tests of a module lie, if it has a file of its own."""
    package, *folders, name = module.split(".")
    # No folder is called `rewards`: a test that is run as a script would find it first.
    first = ["rewards_package"] if package == "rewards" else []
    return Path(*first, *folders, f"test_{name}.py")


@functools.cache
def imported(module: str) -> frozenset[str]:
    """What a module of the packages imports, also inside functions."""
    path = MODULES[module]
    items = imports(path.read_text(), module, is_package=path.name == "__init__.py")
    return frozenset(item.module for item in items if item.module in MODULES)


def covers(name: str, module: str) -> bool:
    """Whether a test file imports a module, or uses it by the words that are listed."""
    text = (TESTS / name).read_text()
    named = USED_BY.get(module)
    if named is not None:
        return named in text
    known = {item.module for item in imports(text, "tests.any")}
    room = module.rpartition(".")[0]
    return module in known or (room in known and module in imported(room))  # what its room offers


@pytest.mark.parametrize("module", sorted(UNITS))
def test_a_module_has_a_test_file_of_its_name_or_is_listed(module: str) -> None:
    listed = [name for name, (_, modules) in ELSEWHERE.items() if module in modules]
    if (TESTS / own_file(module)).is_file():
        assert listed == [], "has a file of its own"
        assert covers(str(own_file(module)), module), "is not what the file of its name tests"
    else:
        assert len(listed) == 1, f"write tests/{own_file(module)}, or list the module"


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_a_listed_file_tests_what_it_is_listed_for(name: str) -> None:
    modules = ELSEWHERE[name][1]
    assert [module for module in modules if not covers(name, module)] == []
    assert set(modules) <= UNITS.keys()


# Stems that several modules have, each with the reason; any other tells a module from all others.
SHARED_STEMS = {
    "base": "the contract that the other modules of a room keep",
    "evaluate": "a command, and the function that does it",
    "export": "a command, and the function that does it",
    "head": "a reward head that has a folder of its own",
    "plan": "what a command will do, checked before anything is loaded",
    "plot": "the figure of a command that has one",
}


def test_no_two_modules_share_a_stem_without_a_reason() -> None:
    stems = [path.stem for path in UNITS.values()]
    shared = {stem for stem in stems if stems.count(stem) > 1}
    assert shared == SHARED_STEMS.keys()


def test_no_two_classes_share_a_name() -> None:
    names = [
        node.name
        for path in UNITS.values()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert {name for name in names if names.count(name) > 1} == set()
