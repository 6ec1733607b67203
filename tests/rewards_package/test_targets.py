"""Heads of other packages: found when installed, loaded when asked for, and no danger to others."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rewards import RewardBatch, available, create, register, registry
from rewards.targets import GROUP, declared
from waiting import python

ROOT = Path(__file__).parents[2]

MODULE = """
    import torch
    from rewards import RewardHead, register

    class Constant(RewardHead):
        '''A constant. Higher is better.'''
        unit = "1"
        requires = ("patience",)

        def __init__(self, value=2.0):
            self.value = value

        def score(self, batch):
            return torch.full((len(batch),), float(self.value))

    @register("their_letters", unit="letters", per_image=True)
    def letters(text, prompt):
        '''Counts letters.'''
        return len(text)

    @register("registered_only")
    def another(texts, prompts):
        '''Declared nowhere.'''
        return [0.0 for _ in texts]

    def one_argument(words):
        return []

    VERSION = 3
"""


def install(
    folder: Path, package: str, *points: str, modules: dict[str, str] | None = None
) -> None:
    """What pip leaves of a package: its modules, and a folder of metadata beside them."""
    info = folder / f"{package.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *points, ""]))
    for name, source in (modules or {}).items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the import path, as `site-packages` is."""
    available()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def texts(*found: str) -> RewardBatch:
    return RewardBatch(prompts=[""] * len(found), texts=found)


def test_a_declared_head_is_created_by_name_and_loaded_only_then(site):
    points = ("their_head = their_module:Constant", "their_letters = their_module:letters")
    install(site, "their-rewards", *points, modules={"their_module": MODULE})
    assert {"their_head", "their_letters"} <= set(declared())
    create("sharpness")
    with pytest.raises(ValueError, match="Did you mean 'their_head'"):
        create("their_haed")
    assert "their_module" not in sys.modules

    head = create("their_head", value=3)
    assert (head.name, head.unit, head.requires) == ("their_head", "1", ("patience",))
    assert head(texts("a")).tolist() == [3.0]
    assert create("their_letters")(texts("a", "bcd")).tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match=r'no option "valeu"\. Did you mean \'value\''):
        create("their_head", valeu=1)

    infos = available()
    assert infos["their_head"].doc == "A constant. Higher is better."
    assert (infos["their_letters"].unit, infos["their_letters"].problem) == ("letters", "")
    assert "registered_only" in infos  # registered while the list was made


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:f", "loading failed: ModuleNotFoundError: No module named 'no_such"),
        ("their_module:gone", "loading failed: AttributeError: .*gone"),
        ("broken:f", "loading failed: ZeroDivisionError: division by zero"),
        ("leaving:f", "loading failed: SystemExit: 3"),
        ("clashing:f", 'loading failed: ValueError: The reward head "sharpness" is registered'),
        ("their_module", "`their_module` is not callable. Found module"),
        ("their_module:VERSION", "`VERSION` is not callable. Found int"),
        ("their_module:RewardHead.__doc__", "not callable. Found str"),
        ("builtins:dict", "`dict` is a class but no RewardHead"),
        ("their_module:one_argument", r"should take `\(images, prompts, \.\.\.\)`"),
    ],
)
def test_a_broken_package_is_named_and_hides_no_other(site, value, message):
    clashing = """
        from rewards import register

        @register("sharpness")
        def f(images, prompts):
            return []
    """
    leaving = "import sys; sys.exit(3)"
    modules = {"their_module": MODULE, "broken": "1 / 0", "clashing": clashing, "leaving": leaving}
    install(site, "bad-rewards", f"bad = {value}", modules=modules)
    install(site, "good-rewards", "good = their_module:Constant")
    with pytest.raises(ValueError, match=message) as caught:
        create("bad")
    infos = available()
    assert infos["bad"].problem == str(caught.value)
    assert 'the package "bad-rewards" 1.2' in infos["bad"].problem
    assert not infos["good"].problem
    assert not infos["sharpness"].problem
    assert create("good").name == "good"
    if "loading failed" in message:
        assert caught.value.__cause__ is not None


def test_a_name_that_is_taken_is_an_error_that_names_the_packages(site, monkeypatch):
    modules = {"their_module": MODULE}
    install(site, "one-rewards", "ocr = their_module:Constant", modules=modules)
    install(site, "two-rewards", "twice = their_module:Constant")
    install(site, "three-rewards", "twice = their_module:letters", "mine = their_module:letters")

    both = r"by `path: rewards\.heads\.ocr\.head:OcrHead` or `path: their_module:Constant`"
    with pytest.raises(ValueError, match=r'"ocr" is declared twice: by the built-in .*' + both):
        create("ocr")
    ours = create("ocr", "rewards.heads.ocr.head:OcrHead", workers=0)
    assert (type(ours).__name__, ours.name) == ("OcrHead", "ocr")
    ours.close()
    with pytest.raises(ValueError, match=r'"t.*-rewards" 1.2 and by the package "t.*-rewards" 1.2'):
        create("twice")
    assert create("ocr", "their_module:Constant").name == "ocr"  # the way out that is named

    @register("mine")
    def mine(images, prompts):
        return []

    with pytest.raises(ValueError, match=r'`mine` \(.*test_targets.* the package "three-rewards"'):
        create("mine")
    infos = available()
    for name in ("ocr", "twice", "mine"):
        assert "twice: by " in infos[name].problem
    assert infos["ocr"].unit and infos["sharpness"].problem == ""


def test_an_installed_package_is_found_by_a_new_process(tmp_path):
    points = ("their_head = their_module:Constant", "broken_head = their_module:gone")
    install(tmp_path, "their-rewards", *points, modules={"their_module": MODULE})
    code = f"""
        import sys
        sys.path.append({str(tmp_path)!r})
        from rewards import RewardBatch, available, create
        assert "their_module" not in sys.modules
        batch = RewardBatch(prompts=["a"], texts=["b"])
        assert create("their_head", value=7)(batch).tolist() == [7.0]
        infos = available()
        assert infos["their_head"].requires == ("patience",), infos
        assert "gone" in infos["broken_head"].problem, infos
        assert [name for name, info in infos.items() if info.problem] == ["broken_head"], infos
    """
    subprocess.run([python(), "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_nothing_is_declared_by_the_packages_of_these_tests():
    assert declared() == {}
    assert importlib.metadata.entry_points(group=GROUP) == ()
