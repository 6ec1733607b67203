"""Names and import paths: what resolves, and what the errors say."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rewards import FunctionHead, RewardBatch, RewardHead, available, create, register, registry
from rewards.option_types import options_of
from rewards.registry import defaults_of

ROOT = Path(__file__).parents[2]

USER_FILE = """
    from rewards import RewardHead, register
    import torch

    VERSION = 3

    def plain(texts, prompts, bonus=0.0):
        return [float(len(prompt)) + bonus for prompt in prompts]

    @register("user_registered", unit="words", requires=["words"])
    def counted(texts, prompts):
        '''Counts words.

        More.
        '''
        return [len(prompt.split()) for prompt in prompts]

    @register("user_each", per_image=True)
    def each(text, prompt, bonus=0.0):
        return len(text) + bonus

    @register("user_async", per_image=True)
    async def each_async(text, prompt, bonus=0.0):
        return len(text) + bonus

    async def plain_async(text, prompt):
        return len(text)

    @register("user_class")
    class Constant(RewardHead):
        '''A constant.'''
        unit = "1"

        def __init__(self, value, scale=1.0):
            self.value = value * scale

        def score(self, batch):
            return torch.full((len(batch),), float(self.value))

    class Other: ...

    finished = Constant(1)
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    available()  # built-in modules register once per process, so before the copy is taken
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(textwrap.dedent(USER_FILE))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("user_rewards", None)


def texts(*prompts: str) -> RewardBatch:
    return RewardBatch(prompts=prompts, texts=prompts)


@pytest.mark.parametrize("by_file", [False, True])
def test_an_import_path_names_a_function_or_a_class(user, by_file):
    place = str(user / "user_rewards.py") if by_file else "user_rewards"
    plain = create("mine", f"{place}:plain")
    assert isinstance(plain, FunctionHead)
    assert plain.name == "mine"
    assert plain(texts("ab", "a b c")).tolist() == [2.0, 5.0]
    assert create("mine", f"{place}:plain", bonus=1.0)(texts("ab")).tolist() == [3.0]

    counted = create("words", f"{place}:counted")
    assert (counted.name, counted.unit, counted.requires) == ("words", "words", ("words",))

    constant = create("k", f"{place}:Constant", value=2, scale=3.0)
    assert (constant.name, constant.unit) == ("k", "1")
    assert constant(texts("a", "b")).tolist() == [6.0, 6.0]

    assert create(f"{place}:plain").name == "plain"


def test_whether_a_function_takes_one_image_is_said_once(user):
    """By `@register` in its own file, or by an option where nobody registered it."""
    b = texts("ab", "c")
    for function in ("each", "each_async"):
        head = create("mine", f"user_rewards:{function}", bonus=1.0)
        assert isinstance(head, FunctionHead)
        assert head.per_image
        assert head(b).tolist() == [3.0, 2.0]
        head.close()
    head = create("mine", "user_rewards:plain_async", per_image=True, concurrency=3)
    assert isinstance(head, FunctionHead)
    assert head.concurrency == 3
    assert head(b).tolist() == [2.0, 1.0]
    head.close()
    assert create("mine", "user_rewards:plain", per_image=False)(b).tolist() == [2.0, 1.0]
    assert create("user_each")(b).tolist() == [2.0, 1.0]
    assert create("user_async", concurrency=2).concurrency == 2


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("each", {"per_image": True}, 'no option "per_image".* Valid options: bonus'),
        ("each", {"concurrency": 2}, 'no option "concurrency".* Valid options: bonus'),
        ("each_async", {"concurency": 2}, "Did you mean 'concurrency'"),
        ("plain", {"per_image": True, "concurrency": 2}, 'no option "concurrency"'),
        ("plain_async", {"concurrency": 2}, "Valid options: per_image"),
        ("plain", {"per_image": "yes"}, "should be true or false. Found 'yes'"),
        ("each_async", {"concurrency": 0}, "should be a positive integer"),
    ],
)
def test_options_that_do_not_fit_the_kind_of_function(user, function, options, message):
    with pytest.raises(ValueError, match=message):
        create("mine", f"user_rewards:{function}", **options)


def test_a_class_scores_batches():
    with pytest.raises(ValueError, match=r"`per_image` is for functions.*`.*Mine`"):

        @register("mine", per_image=True)
        class Mine(RewardHead):
            def score(self, batch):
                return torch.zeros(len(batch))


def test_what_a_user_module_registers_is_found_by_name(user):
    importlib.import_module("user_rewards")
    assert create("user_registered")(texts("a b", "c")).tolist() == [2.0, 1.0]
    info = available()["user_registered"]
    assert (info.unit, info.requires, info.doc) == ("words", ("words",), "Counts words.")
    head = create("user_class", value=1)
    head.name = "renamed"
    assert create("user_class", value=1).name == "user_class"


def test_a_reload_replaces_and_another_source_is_an_error(user):
    module = importlib.import_module("user_rewards")
    module = importlib.reload(module)
    assert registry._entries["user_class"].target is module.Constant
    # The same file under another module name, as when a script imports itself.
    assert create("k", f"{user / 'user_rewards.py'}:Constant", value=1).name == "k"

    with pytest.raises(ValueError, match=r"user_rewards\.py:\d+.*test_registry\.py:\d+"):

        @register("user_registered")
        def other(images, prompts):
            return []


def test_a_built_in_name_cannot_be_taken_even_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(registry, "_entries", {})
    with pytest.raises(ValueError, match=r"rewards\.heads\.simple"):

        @register("sharpness")
        def mine(images, prompts):
            return []


@pytest.mark.parametrize("wrong", [lambda pixels: [], dict, 3])
def test_only_heads_and_reward_functions_register(wrong):
    with pytest.raises((ValueError, TypeError)):
        register("wrong")(wrong)


def test_register_wants_a_name():
    with pytest.raises(ValueError, match=r'@register\("name"\)'):

        @register
        def f(images, prompts):
            return []


def test_an_unknown_name_lists_all_names_and_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'colourfulness'") as caught:
        create("colorfulness")
    for name in registry._BUILT_IN:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "no module `no_such_module`"),
        ("user_rewards.deeper:f", "no module `user_rewards.deeper`|importing"),
        ("no_such_file.py:f", "no file `.*no_such_file.py`"),
        ("user_rewards:plane", "no attribute `plane`. Did you mean 'plain'"),
        ("user_rewards:VERSION", "`VERSION` is not callable. Found int"),
        ("user_rewards:Other", "no RewardHead"),
        ("user_rewards:finished", "Name its class, `Constant`"),
        ("user_rewards", "should read `my_module:my_reward`"),
        ("broken:f", "importing `broken` failed: ZeroDivisionError"),
        ("needs:f", "importing `needs` failed: No module named 'absent_dependency'"),
    ],
)
def test_a_bad_import_path_says_which_part_failed(user, path, message):
    (user / "broken.py").write_text("1 / 0")
    (user / "needs.py").write_text("import absent_dependency")
    with pytest.raises(ValueError, match=message) as caught:
        create("mine", path)
    assert path in str(caught.value)


def test_unknown_and_missing_options_are_named(user):
    with pytest.raises(ValueError, match=r'no option "shar"\. Did you mean \'share\'') as caught:
        create("prompt_colour", shar=0.1)
    assert "share, tolerance" in str(caught.value)
    with pytest.raises(ValueError, match="Valid options: none"):
        create("sharpness", x=1)
    with pytest.raises(ValueError, match="needs the option value"):
        create("k", "user_rewards:Constant")
    with pytest.raises(ValueError, match='no option "prompts"'):
        create("k", "user_rewards:plain", prompts=1)


def test_keywords_of_a_constructor_swallow_nothing():
    class Greedy(RewardHead):
        def __init__(self, size=1, **rest): ...

        def score(self, batch):
            return torch.zeros(len(batch))

    register("greedy")(Greedy)
    with pytest.raises(ValueError, match=r'no option "sise"\. Did you mean \'size\''):
        create("greedy", sise=2)


def test_every_built_in_head_is_registered_by_its_module_and_documented():
    infos = available()
    for name, module in registry._BUILT_IN.items():
        entry = registry._entries[name]
        assert entry.target.__module__ == module
        assert infos[name].unit, name
        assert len(infos[name].doc) > 20, name
        assert "igher is better" in (entry.target.__doc__ or ""), name


def test_neutral_options_of_the_built_in_heads_are_options():
    available()
    for name in registry._BUILT_IN:
        head = registry._entries[name].target
        assert set(head.neutral_options) <= set(options_of(head)), name


def test_importing_and_listing_loads_nothing_heavy():
    code = """
        import sys
        import rewards
        heavy = {"rapidocr", "onnxruntime", "cv2", "diffusers", "transformers", "peft",
                 "open_clip", "torchvision", "matplotlib", "moa_diffusion", "accelerate"}
        found = heavy & set(sys.modules)
        assert not found, found
        rewards.available()
        found = heavy & set(sys.modules)
        assert not found, found
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_defaults_are_those_that_a_yaml_file_holds() -> None:
    assert defaults_of("prompt_colour") == {"share": 0.15, "tolerance": 0.1}
    assert defaults_of("sharpness") == {}
    model = defaults_of("deqa")
    assert model["batch_size"] == 16  # of all heads with a model
    assert model["sha256"] is None
    place = f"{Path(__file__).parents[1]}/toy_runs.py:tagged"
    assert defaults_of("any", place) == defaults_of(place) == {"per_image": False}


def test_defaults_of_no_yaml_file_are_left_out() -> None:
    known, device = {"a": (3,)}, torch.device("cpu")

    class Odd(RewardHead):
        def __init__(self, sizes=(1, 2), names=known, where=device) -> None:
            pass

        def score(self, batch):
            return torch.zeros(len(batch))

    register("odd")(Odd)
    assert defaults_of("odd") == {"sizes": [1, 2], "names": {"a": [3]}}
