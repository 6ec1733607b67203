"""The pages are true: links lead somewhere, names are names, tables are whole and fresh."""

from __future__ import annotations

import re

import pytest

import architecture
import configuration
from moa_diffusion import assembly, config
from pages import CHANGELOG, FENCE, PAGES, ROOT


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


LINKS = [
    (page, link)
    for page, text in (*PAGES.items(), ("CHANGELOG.md", CHANGELOG))
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
    if "://" not in link
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: value)
def test_a_link_leads_somewhere(page: str, link: str) -> None:
    place, _, anchor = link.partition("#")
    target = (ROOT / page).parent / place if place else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.read_text(encoding="utf-8"))


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {link.partition("#")[0] for page, link in LINKS if page == "README.md"}
    assert {page for page in PAGES if page not in {*linked, "README.md"}} == set()


def test_named_files_and_tests_exist() -> None:
    paths = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}
    tests = "".join((ROOT / path).read_text() for path in paths if path.startswith("tests/"))
    for page, text in PAGES.items():
        for name in re.findall(r"\b(?:configs|scripts|docs|tests)/[\w/*.]*\w", text):
            assert list(ROOT.glob(name)), (page, name)
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
            if not name.startswith("my_") and name != "rewards.py":
                assert any(f"/{path}".endswith(f"/{name}") for path in paths), (page, name)
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, (page, name)


def test_named_options_are_options() -> None:
    known = set(assembly.flat(config.Config()))
    parts = {key.rpartition(".")[0] for key in known}
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    opened = (  # they take any key
        *("rewards.", "evaluation.rewards", "preferences.pairs"),
        *("objectives.weighting", "objectives.normalizer"),
    )
    for page, text in PAGES.items():
        options = set(re.findall(r"--((?:[a-z]+\.)+[a-z_]+)", text))
        options |= set(re.findall(rf"`((?:{sections})\.[a-z_.]+)[:`]", text))
        for option in options:
            if not option.startswith(opened) and not option.endswith((".py", ".json", ".jsonl")):
                assert option in known | parts, (page, option)


def test_the_generated_pages_are_fresh() -> None:
    written = PAGES["docs/architecture.md"]
    assert architecture.page(written) == written, "run python scripts/dev/architecture.py"
    assert configuration.page() == PAGES["docs/configuration.md"], (
        "run python scripts/dev/configuration.py"
    )
    assert configuration.HELP.read_text(encoding="utf-8") == configuration.help_of_options(), (
        "run python scripts/dev/configuration.py"
    )


def test_an_option_without_a_meaning_is_refused() -> None:
    class Undescribed:
        """Has an option of which this says nothing."""

        def __init__(self, size: int = 1) -> None: ...

    with pytest.raises(ValueError, match="Undescribed should describe `size`"):
        configuration.options(Undescribed)


def test_every_key_of_the_configuration_has_a_row() -> None:
    for key in assembly.flat(config.Config()):
        if not key.startswith("rewards"):
            assert f"| `{key}` |" in PAGES["docs/configuration.md"], key


def test_every_metric_has_a_row() -> None:
    table = PAGES["docs/metrics.md"]
    package = ROOT / "moa_diffusion"
    source = "".join(
        path.read_text(encoding="utf-8")
        for room in ("", "objectives/", "training/", "monitoring/", "storage/")
        for path in package.glob(f"{room}*.py")
    )
    kinds = (
        "policy|alarm|correlation|cosine|eval_[a-z]+|reward_[a-z]+|mopo_[a-z]+|shortfall|gradient"
    )
    written = {name.split("/")[0] + "/" for name in re.findall(rf'"((?:{kinds})/[^"]*)"', source)}
    written |= set(re.findall(r'"(policy/[a-z_]+)"', source))
    phases = set(re.findall(r'timed\("([a-z]+)"\)', source))
    assert {"sample", "update"} < phases
    written |= {f"seconds/{phase}`" for phase in phases}
    columns = set(re.findall(r'"(apex_[a-z]+)"', source)) | {"weight", "share", "applies"}
    columns |= {"zero_variance", "conflict_advantages", "conflict_gradients"}
    for name in written | {f"{column}/" for column in columns}:
        assert f"`{name}" in table, name


RANGE = re.compile(r"(at least|in [\[(]|positive|any (?:number|integer))", re.IGNORECASE)
ROW = re.compile(r"^\| `([\w.]+)` \| ([^|]*\b(?:integer|number)\b[^|]*) \| (.*) \|$", re.MULTILINE)


def test_every_number_of_the_configuration_has_a_range() -> None:
    rows = ROW.findall(PAGES["docs/configuration.md"])
    assert {"seed", "trainer.steps", "floor", "batch_size", "concurrency"} <= {
        row[0] for row in rows
    }
    assert [name for name, _, rest in rows if not RANGE.search(rest)] == []
