"""Export: the folder loads in plain diffusers, and the card tells what was measured."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from moa_diffusion import assembly
from moa_diffusion.adapters.diffusers import write_adapter
from moa_diffusion.commands.export import main
from moa_diffusion.config import from_dict
from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.evaluation.plan import plan_evaluation
from moa_diffusion.evaluation.write import write_results
from moa_diffusion.export.card import model_card
from moa_diffusion.export.export import export
from moa_diffusion.policies.adapters import Adapter, read_sd3_adapter, sd3_skeleton
from moa_diffusion.policies.lora_files import DIFFUSERS
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.storage import checkpoint
from moa_diffusion.tiny import PIPELINE_PATH
from moa_diffusion.types import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "policy": {"max_sequence_length": 16, "lora": {"rank": 2}},
    "sampling": {"resolution": 32, "steps": 2},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {"colourfulness": {"weight": 2.0}, "sharpness": {}},
    "trainer": {"groups": 2, "group_size": 2, "updates": 1, "sample_batch": 8},
    "evaluation": {"steps": 1, "guidance": 1.0, "prompts": 2},
    "log": {"trackers": []},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        settings = from_dict(SETTINGS | {"output_dir": str(folder / name), "seed": seed})
        assembly.write_config(settings)
        policy = assembly.policy(settings, torch.device("cpu"))
        noise = torch.Generator().manual_seed(seed)
        for name_of, parameter in policy.trainable().items():
            if "lora_B" in name_of:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=noise))
        with checkpoint.atomic_folder(checkpoint.step_folder(folder / name, 3)) as partial:
            policy.save(partial)
            policy.save(partial / "ema")
            (partial / checkpoint.STATE).write_bytes(checkpoint.packed({"step": 3}))
    return folder


@pytest.fixture(scope="module")
def evaluation(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs and the middle between them."""
    output = tmp_path_factory.mktemp("evaluation")
    names = ["lora", "config", "pipeline", "checkpoints", "every", "prompts", "rewards", "steps"]
    names += ["guidance", "resolution", "temperature", "cache"]
    options = dict.fromkeys(names) | {"lora": []}
    options |= {"run": [str(runs / "a"), str(runs / "b")], "ema": True, "seeds": "0,1"}
    plan = plan_evaluation(options | {"soup": "a,b", "points": 3, "shown": 2, "output": output}, [])
    found = evaluate(plan)
    write_results(found, output, shown=2, runs={})
    return output


def test_a_checkpoint_is_copied_with_a_card(
    runs: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Through the script."""
    output = tmp_path / "exported"
    script = str(ROOT / "scripts" / "export.py")
    options = ["--run", str(runs / "a"), "--checkpoint", "step-3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [script, *options, "--evaluation", str(evaluation)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    assert {path.name for path in output.iterdir()} == {
        *("README.md", "config.yaml", "grid.png", "images", DIFFUSERS)
    }
    probe = tmp_path / "usual"
    probe.touch()
    for path in output.rglob("*.*"):
        assert path.stat().st_mode == probe.stat().st_mode, "others can read it, if the umask lets"
    source = checkpoint.step_folder(runs / "a", 3) / "ema" / DIFFUSERS
    assert (output / DIFFUSERS).read_bytes() == source.read_bytes()
    card = (output / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers"
    assert "base_model" not in head, "no folder of the machine it was trained on"
    assert str(tmp_path) not in card
    assert [Path(shown["output"]["url"]) for shown in head["widget"]] == [
        Path("images") / f"{p}.png" for p in range(2)
    ]
    with Image.open(output / head["widget"][0]["output"]["url"]) as image:
        assert image.size == (32, 32)
    assert re.search(r"\| trainer.group_size +\| +2 \|", card)
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    trained = yaml.safe_load((output / "config.yaml").read_text())
    assert trained["output_dir"] == "a"  # and no folder of this machine
    assert trained["trainer"] == yaml.safe_load((runs / "a" / "config.yaml").read_text())["trainer"]
    for said in ("colourfulness x 2, sharpness", "2 prompts x 2 seeds", "## Licence", "says"):
        assert said in card
    summary = (evaluation / "summary.md").read_text()
    row = next(line for line in summary.splitlines() if line.startswith("| a/step-3 "))
    mean = row.split("|")[2].strip()
    assert f" {mean} " in card, "the card's means are the summary's"
    with Image.open(output / "grid.png") as grid:
        assert grid.width < 4 * 400


def test_a_soup_is_written_as_it_was_evaluated(runs: Path, evaluation: Path, tmp_path: Path):
    said = export(
        [str(runs / "a"), str(runs / "b")],
        weights="0.5,0.5",
        output=tmp_path / "soup",
        evaluation=evaluation,
    )
    assert "(rank 4)" in said
    assert {path.name for path in (tmp_path / "soup").glob("*.yaml")} == {
        *("config-a.yaml", "config-b.yaml")
    }
    card = (tmp_path / "soup" / "README.md").read_text()
    assert card.count("|   0.5 |") + card.count("|    0.5 |") == 2
    transformer = sd3_skeleton(str(PIPELINE_PATH))
    mixed = read_sd3_adapter(tmp_path / "soup", transformer)
    members = [
        read_sd3_adapter(checkpoint.step_folder(runs / name, 3) / "ema", transformer)
        for name in "ab"
    ]
    for name, (a, b) in mixed.layers.items():
        expected = sum(0.5 * one.layers[name][1] @ one.layers[name][0] for one in members)
        # Ranks in one sum or in two, in float32: some roundings, 6e-8 each.
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-6)
    pipeline = load_pipeline(str(PIPELINE_PATH))
    pipeline.load_lora_weights(tmp_path / "soup")
    assert pipeline.get_active_adapters() == ["default_0"]


def test_ranks_that_differ_are_padded(runs: Path, tmp_path: Path):
    """Without the file's metadata a loader would take one rank and scale for all layers."""
    transformer = sd3_skeleton(str(PIPELINE_PATH))
    one = read_sd3_adapter(checkpoint.step_folder(runs / "a", 3), transformer)
    (first, (a, b)), *rest = one.layers.items()
    mixed = Adapter(
        layers={first: (torch.cat([a, a]), torch.cat([b, b], 1)), **dict(rest)}, digest=""
    )
    write_adapter(mixed, tmp_path)
    found = read_sd3_adapter(tmp_path, transformer)
    assert {len(low) for low, _ in found.layers.values()} == {4}
    for name, (low, high) in found.layers.items():
        before = mixed.layers[name]
        # Ranks of zeros add nothing, but may cut sums otherwise: torch's 1.3e-6 is 20 roundings.
        torch.testing.assert_close(high @ low, before[1] @ before[0])


# Layers of Stable Diffusion 3 that ComfyUI knows by diffusers' names, after `transformer.`.
COMFYUI = (
    r"transformer\.transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
    r"attn2\.(to_[qkv]|to_out\.0)|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
    r"\.lora_[AB]\.weight"
)


def test_comfyui_finds_every_layer_and_needs_no_scale(runs: Path, tmp_path: Path):
    """It reads names like these with scale 1, and says `lora key not loaded` of any other."""
    export([str(runs / "a")], output=tmp_path / "out")
    with safe_open(tmp_path / "out" / DIFFUSERS, "pt") as file:
        names = list(file.keys())
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert len(names) > 20
    assert [name for name in names if not re.fullmatch(COMFYUI, name)] == []
    assert metadata["transformer.lora_alpha"] == metadata["transformer.r"]


def test_it_is_sent_after_it_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sent = []

    def send(folder: Path, name: str, *, private: bool) -> str:
        assert (folder / "README.md").is_file()
        sent.append((name, private))
        if len(sent) > 1:
            raise ConfigError("--push_to_hub: no")
        return "https://hub/me/mine"

    monkeypatch.setattr("moa_diffusion.export.upload.upload", send)
    for number, (name, status) in enumerate((("me/mine", 0), ("me/mine", 1), ("a/b/c", 2))):
        options = ["--run", str(runs / "a"), "--output", str(tmp_path / f"out-{number}")]
        options += ["--push_to_hub", name, "--private"]
        monkeypatch.setattr(sys, "argv", ["export.py", *options])
        assert main() == status
        assert (tmp_path / f"out-{number}").is_dir() == (status < 2)
    assert sent == [("me/mine", True)] * 2
    assert "Sent: https://hub/me/mine" in capsys.readouterr().out


def test_the_licence_of_the_base_model_is_named_for_the_hub() -> None:
    settings = from_dict({"policy": {"path": "stabilityai/stable-diffusion-3.5-medium"}})
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    one = Adapter(layers={"layer": (a, b)}, digest="")
    options = {"noun": "images", "name": "mine", "shown": None, "gallery": {}}
    card = model_card(settings, {"a": settings}, [], [], one, None, **options)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == settings.policy.path
    assert (head["license"], head["license_name"]) == ("other", "stabilityai-ai-community")
    assert "Stability AI Community License" in card


def test_without_an_evaluation_the_card_says_so(runs: Path, tmp_path: Path):
    said = export([str(runs / "a")], output=tmp_path / "out", ema=False)
    assert "The card has no scores" in said
    assert "Not evaluated." in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "grid.png").exists()


def test_bad_input_is_told(runs: Path, evaluation: Path, tmp_path: Path):
    a, b = str(runs / "a"), str(runs / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = [
        ([a], {"checkpoint": "9"}, "'9' is not in .*There are: step-3"),
        ([a], {"checkpoint": "base"}, "--checkpoint: should be latest or step-N. Found 'base'"),
        ([a], {"output": tmp_path / "full"}, "--output: should be a new folder"),
        ([a, b], {}, "--weights: should be given for 2 runs"),
        ([a, b], {"weights": "0.5,0.6"}, "--weights: should be 2 numbers that sum to 1"),
        ([a, b], {"weights": "0.5,half"}, "--weights: should be 2 numbers that sum to 1"),
        ([a, b], {"weights": "0.2,0.8", "evaluation": evaluation}, "should have these weights"),
        ([a], {"evaluation": tmp_path}, r"Found no scores.parquet"),
    ]
    for entries, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            export(entries, **({"output": tmp_path / "out"} | options))
    assert not (tmp_path / "out").exists()
