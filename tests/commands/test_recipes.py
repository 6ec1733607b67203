"""Recipes are listed, and copied with all that they name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moa_diffusion import assembly, config
from moa_diffusion.commands import recipes

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_the_list_has_every_recipe_with_what_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moa-diffusion recipes"])
    assert recipes.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == RECIPES
    assert max(map(len, lines)) <= 100
    assert "PAMA on a language model of 0.9 M parameters: letters that are cheerful, polite" in (
        " ".join(" ".join(lines).split())
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_is_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder that it was copied to, everything that it names is there."""
    said = recipes.copy(name, tmp_path / "mine")
    assert f"cd {tmp_path}/mine && " in said
    assert said.endswith(f"--config configs/{name}.yaml")
    assert ("train-lm" in said) == name.startswith("lm_")
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {f"Written: {tmp_path / path}" for path in written} == set(said.splitlines()[:-2])
    monkeypatch.chdir(tmp_path / "mine")
    settings = config.load(f"configs/{name}.yaml")  # may compile a file of rewards
    assert assembly.heldout_requests(settings)
    assert list(assembly.heads(settings)) == list(settings.rewards)


def test_nothing_of_the_users_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the same text may be there
        monkeypatch.setattr(sys, "argv", ["moa-diffusion recipes", "copy", "lm_tiny_mopo"])
        assert recipes.main() == 0
    assert sorted(path.name for path in (tmp_path / "configs").iterdir()) == [
        "letters.py",
        "lm_tiny_mopo.yaml",
    ]
    (tmp_path / "configs" / "letters.py").write_text("mine = 1\n")
    (tmp_path / "configs" / "lm_tiny_mopo.yaml").unlink()
    assert recipes.main() == 2
    assert "`configs/letters.py` should not be there yet" in capsys.readouterr().err
    assert not (tmp_path / "configs" / "lm_tiny_mopo.yaml").exists()
    monkeypatch.setattr(sys, "argv", ["moa-diffusion recipes", "copy", "lm_tiny_mop"])
    assert recipes.main() == 2
    assert "Did you mean 'lm_tiny_mopo'?" in capsys.readouterr().err
