"""report.html in a real browser: opened from disk, clicked, used by keyboard, on a phone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from moa_diffusion.report.page.page import write_report
from moa_diffusion.report.summary import summarise
from moa_diffusion.report.table import Column, Table
from waiting import HANG

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright: pip install playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECTIONS = ("summary", "alarms", "front", "grid", "samples", "training", "setup")
CHARTS = ("rewards", "weights", "share", "conflict", "drift", "gap", "watch", "other")
EVIL = '</script><script>window.stolen = 1</script><img src=x onerror="window.stolen = 1">'
MESSAGE = "The held-out head fell."
MODELS = (("base", None), ("a/step-2", 2), ("a/step-4", 4), ("b/step-4", 4))

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium found: apt-get install chromium"
)


def make_table(folder: Path | None) -> Table:
    """4 models, 12 prompts, 2 seeds, 2 rewards; every image has a colour of its own."""
    prompts = (EVIL, *(f"a {word} sign" for word in ("red", "green", "blue", "black", "white")))
    prompts += tuple(f"scene {i}" for i in range(6))
    values = numpy.random.default_rng(0).normal(size=(len(MODELS), 2, len(prompts), 2))
    values += numpy.linspace(0, 1.5, len(MODELS))[:, None, None, None]
    values[:, 1, 3] = numpy.nan

    def image(e: int, p: int, s: int) -> Path:
        assert folder is not None
        path = folder / "images" / f"{e}-{p}-{s}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 48), (60 * e, 20 * p, 200 * s)).save(path)
        return path

    def cells(make: Any) -> Any:
        return tuple(
            tuple(tuple(make(e, p, s) for s in range(2)) for p in range(len(prompts)))
            for e in range(len(MODELS))
        )

    return Table(
        models=tuple(
            Column(
                label=label,
                series=label[0] if step else "",
                step=step,
                weights=None,
                model_digest="m",
                adapter_digest="",
            )
            for label, step in MODELS
        ),
        prompts=prompts,
        seeds=(7, 8),
        rewards=("text", "colour"),
        values=values,
        images=None if folder is None else cells(image),
        texts=None if folder is not None else cells(lambda e, p, s: f"{e} {p} {s} {EVIL}"),
        units={"text": "", "colour": "points"},
        scorers={"text": {"version": "1"}, "colour": {"version": "2"}},
        sampler={"steps": 4},
    )


def make_run(folder: Path, alarms: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    rows = []
    for step in range(9):
        row: dict[str, Any] = {"step": step}
        for k, name in enumerate(("text", "colour")):
            if step:
                row |= {f"reward_mean/{name}": 0.1 * step + k, f"weight/{name}": 0.5}
                row |= {f"share/{name}": 0.5, f"apex_need/{name}": 0.1}
                row |= {f"apex_progress/{name}": 0.2}
            if step % 4 == 0:
                row |= {f"eval_mean/{name}": 0.1 * step + k, f"eval_sem/{name}": 0.1}
                row |= {f"eval_gap/{name}": 0.1}
        if step:
            row |= {"correlation/text~colour": -0.25, "image/brightness": 0.5}
        if step % 4 == 0:
            row |= {"eval_mean/watched": 1.0 - step / 8, "alarm/watched": step / 4}
            row |= {"eval_image/brightness": 0.5}
        rows.append(row)
    for name, lines in (("metrics", rows), ("alarms", alarms)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    alarm = {"step": 8, "kind": "reward_hack", "name": "watched", "action": "rollback"}
    alarm |= {"to_step": 4, "message": MESSAGE, "best_step": 4, "fall": 0.5}
    runs = {"a": make_run(folder / "a", []), "b": make_run(folder / "b", [alarm])}
    table = make_table(folder)
    return write_report(table, summarise(table, resamples=50), runs, folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=EXECUTABLE, args=list(FLAGS), timeout=HANG * 1000
        )
        try:
            yield found
        finally:
            found.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """A page; whatever it complained about or asked for beyond this machine fails the test."""
    wrong: list[str] = []
    settings = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"} | options
    context = browser.new_context(**settings)
    context.set_default_timeout(HANG * 1000)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))

    def ask(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(f"request: {request.url}")

    page.on("request", ask)
    try:
        page.goto(path.as_uri())
        yield page
        assert page.evaluate("window.stolen") is None
    finally:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def shown(browser: Any, report: Path) -> Iterator[Any]:
    """The report, opened once for tests that leave it as they found it: loading takes longest."""
    with opened(browser, report) as page:
        yield page


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds; Playwright's own way is what the page's policy forbids."""
    for _ in range(int(HANG / 0.05)):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def see_everything(page: Any) -> None:
    """Scroll past everything, so that all that is drawn late is drawn."""
    page.evaluate(
        """async () => {
            for (let y = 0; y < document.body.scrollHeight; y += 500) {
                scrollTo(0, y);
                await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)));
            }
        }"""
    )
    until(
        page,
        """[...document.querySelectorAll('.plot')]
            .every((one) => one.querySelector('.main-svg') || !one.checkVisibility())""",
    )


def test_everything_is_drawn_without_a_word(shown: Any):
    page = shown
    for name in SECTIONS:
        assert page.locator(f"#{name}").is_visible()
    see_everything(page)
    for name in CHARTS:
        assert page.locator(f"#{name} .plot .main-svg").count() > 0, name
    titles = page.locator("#rewards h4").all_text_contents()
    assert titles == ["text", "colour (points)", "watched, held-out"]
    assert "correlations" in page.locator("#conflict h4").first.text_content()
    assert page.locator("#conflict .plot").first.get_attribute("aria-label").endswith("-0.250")
    assert page.locator("#front-plot .points path").count() == len(MODELS)
    assert page.locator("#summary .card").count() == 2
    assert page.locator("#samples .sample").count() == 16
    # Every cell has been seen, so it holds its image and its scores.
    assert page.locator("#cells .cell img[alt]").count() > 0
    missing = page.locator("#cells tbody tr").nth(3).locator(".score").nth(1)
    assert missing.text_content() == "colour-"
    page.locator("#front-plot").scroll_into_view_if_needed()
    page.emulate_media(color_scheme="dark")
    label = "document.querySelector('#front-plot .xtick text').style.fill"
    until(page, f"{label} === 'rgb(232, 234, 236)'")
    page.emulate_media(color_scheme="light")


def test_alarms_are_listed_and_marked(shown: Any):
    page = shown
    assert MESSAGE in page.locator("#alarms tbody").text_content()
    assert page.get_by_role("link", name="1 alarm").is_visible()
    see_everything(page)
    marked = page.evaluate(
        """[...document.querySelectorAll('#rewards .plot')].map((plot) => [
            plot.data
                .filter((one) => one.meta === 'alarm')
                .map((one) => [one.x[0], one.hovertext]),
            plot.layout.shapes.map((one) => [one.x0, one.x1]),
        ])"""
    )
    line = [[8, f"b, rollout 8: {MESSAGE}"]]
    assert marked == [[line, [[4, 8]]]] * 3
    dashes = "document.querySelectorAll('#rewards .plot')[{}].data.map((one) => one.line?.dash)"
    assert "dash" in page.evaluate(dashes.format(2))
    assert "dash" not in page.evaluate(dashes.format(0))
    plot = page.locator("#rewards .plot").first
    plot.scroll_into_view_if_needed()
    place = page.evaluate(
        """() => {
            const plot = document.querySelector('#rewards .plot');
            const { left, top } = plot.getBoundingClientRect();
            const { xaxis, yaxis2 } = plot._fullLayout;
            const [x, y] = [xaxis._offset + xaxis.d2p(8), yaxis2._offset + yaxis2.d2p(0.3)];
            return [left + x, top + y];
        }"""
    )
    page.mouse.move(place[0] - 3, place[1])
    page.mouse.move(*place)
    page.wait_for_selector(f"#rewards .hoverlayer :text('{MESSAGE}')")


def test_a_choice_shows_other_panels(shown: Any):
    page = shown
    for section, choice, word in (
        ("conflict", "the first quarter", "a: correlations of the advantages"),
        ("other", "apex_progress", "colour"),
    ):
        select = page.locator(f"#{section} .choice")
        select.select_option(choice)
        panel = page.locator(f"#{section} .panel:visible")
        assert word in panel.locator("h4").all_text_contents()
        panel.first.scroll_into_view_if_needed()
        until(
            page,
            f"""[...document.querySelectorAll('#{section} .plot')].some(
                (plot) => plot.checkVisibility() && plot.querySelector('.main-svg')
                    && plot._fullLayout.width === plot.clientWidth)""",
        )
        count = panel.count()
        select.select_option(index=0)
        assert page.locator(f"#{section} .panel:visible").count() == count


def test_the_export_command_is_copied(shown: Any):
    page = shown
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    card = page.locator("#summary .card").first
    card.get_by_role("button", name="Copy the export of a/step-").click()
    command = card.locator("code").text_content()
    program, _, options = command.partition(" --run ")
    assert "export" in program
    assert options
    until(page, "document.querySelector('.command [role=status]').textContent === 'Copied.'")
    assert page.evaluate("navigator.clipboard.readText()") == command
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert download.value.suggested_filename == "summary.csv"
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2 * len(MODELS)


def test_it_is_whole_without_scrolling(browser: Any, report: Path):
    with opened(browser, report) as page:
        until(
            page,
            """[...document.querySelectorAll('.plot')]
                .every((one) => one.querySelector('.main-svg') || !one.checkVisibility())
                && [...document.querySelectorAll('.cell')].every((one) => one.firstChild)""",
        )
        page.evaluate("document.querySelectorAll('.fold').forEach((one) => (one.open = false))")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".fold:not([open])").count() == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator(".fold[open]").count() == 0


def test_a_table_that_is_cut_off_says_so(browser: Any, report: Path):
    for width, hidden in ((390, False), (1600, True)):
        with opened(browser, report, viewport={"width": width, "height": 800}) as page:
            sign = page.locator("#front .more").first
            until(page, f"document.querySelector('#front .more').hidden === {str(hidden).lower()}")
            assert sign.is_visible() is not hidden


def test_what_lies_within_noise_has_no_arrow(shown: Any):
    page = shown
    found = page.evaluate(
        """(() => {
            const data = JSON.parse(document.getElementById('data').textContent);
            const wrong = [];
            for (const cell of document.querySelectorAll('.cell')) {
                const [e, p] = [Number(cell.dataset.model), Number(cell.dataset.prompt)];
                [...cell.querySelectorAll('.score')].forEach((score, k) => {
                    const [here, base] = [data.values[e][k][p][0], data.values[0][k][p][0]];
                    const far = Math.abs(here - base) > data.rewards[k].noise;
                    if (/[▲▼]/.test(score.textContent) !== (e > 0 && far)) wrong.push([e, p, k]);
                });
            }
            return [document.querySelectorAll('.cell .up, .cell .down').length > 0, wrong];
        })()"""
    )
    assert found == [True, []]
    assert page.locator("#samples .label").first.text_content() == "before"
    assert page.locator("#samples .sample").first.text_content().count("text: before") == 1


def test_the_seed_switch_changes_the_images(shown: Any):
    page = shown
    page.locator("#cells .cell").first.scroll_into_view_if_needed()
    colour = """(image) => {
        const canvas = new OffscreenCanvas(48, 48).getContext('2d');
        canvas.drawImage(image, 0, 0, 48, 48);
        return canvas.getImageData(24, 24, 1, 1).data[2] > 100;
    }"""
    image = page.locator("#cells .cell img").first
    loaded = "document.querySelector('#cells .cell img')?.naturalWidth === 48"
    until(page, loaded)
    assert image.evaluate(colour) is False
    page.get_by_role("radio", name="8").check()
    until(page, loaded)
    assert image.evaluate(colour) is True
    page.keyboard.press("ArrowLeft")
    until(page, loaded)
    assert page.get_by_role("radio", name="7").is_checked()
    assert image.evaluate(colour) is False


def test_a_click_on_the_front_leads_to_the_column(browser: Any, report: Path):
    with opened(browser, report, viewport={"width": 700, "height": 700}) as page:
        page.locator("#front-plot").scroll_into_view_if_needed()
        page.wait_for_selector("#front-plot .points path")
        page.locator("#front-x").select_option("colour")
        page.locator("#front-y").select_option("text")
        until(
            page,
            """document.querySelector('#front-plot').layout.xaxis.title.text.startsWith('colour')
                && document.querySelector('#front-plot').layout.yaxis.title.text === 'text'""",
        )
        place = page.evaluate(
            """() => {
                const plot = document.querySelector('#front-plot');
                const { left, top } = plot.getBoundingClientRect();
                const { xaxis, yaxis } = plot._fullLayout;
                const { x, y } = plot.data.at(-1);
                return [
                    left + xaxis._offset + xaxis.d2p(x[3]), top + yaxis._offset + yaxis.d2p(y[3]),
                ];
            }"""
        )
        page.mouse.move(place[0] - 4, place[1])
        page.mouse.move(*place)
        hover = page.wait_for_selector("#front-plot .hoverlayer text").text_content()
        assert hover.startswith("b/step-4")
        assert "colour: " in hover
        page.mouse.click(*place)
        page.wait_for_selector("#cells th.chosen[data-model='3']")
        assert page.locator("#cells th.chosen").count() == 1
        assert page.locator("#cells td.chosen").count() == 12
        head = page.locator("#cells th.chosen")
        box = head.bounding_box()
        assert 0 <= box["x"] <= 700 - box["width"]
        assert 0 <= box["y"] <= 650
        assert page.locator("#samples-model").input_value() == "3"
        # From the base model's cell, the comparison is with the selected model.
        page.locator("#cells tbody tr").nth(1).locator(".cell").first.evaluate("one => one.click()")
        assert page.locator("#compare-after").input_value() == "3"
        assert page.locator("#compare-before").input_value() == "0"


def test_the_keyboard_alone_is_enough(browser: Any, report: Path):
    with opened(browser, report) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        choose = page.locator("#models .choose").nth(2)
        choose.focus()
        page.keyboard.press("Enter")
        assert page.locator("#cells th.chosen").get_attribute("data-model") == "2"
        assert choose.get_attribute("aria-pressed") == "true"
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('.cell')"):
                break
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        here = "[document.activeElement.dataset.prompt, document.activeElement.dataset.model]"
        assert page.evaluate(here) == ["1", "2"]
        page.keyboard.press("Enter")
        assert page.locator("#compare").is_visible()
        slider = page.locator("#compare-slider")
        before = page.locator("#image-after").evaluate("one => getComputedStyle(one).clipPath")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert slider.input_value() == "52"
        after = page.locator("#image-after").evaluate("one => getComputedStyle(one).clipPath")
        assert (before, after) == ("inset(0px 0px 0px 50%)", "inset(0px 0px 0px 52%)")
        page.keyboard.press("Escape")
        assert not page.locator("#compare").is_visible()
        assert page.evaluate(here) == ["1", "2"]


def test_originals_are_loaded_and_linked_on_demand(shown: Any):
    page = shown
    page.locator("#cells .cell").nth(6).click()
    assert page.locator("#compare-title").text_content() == "a red sign (seed 7)"
    link = page.locator("#original-after")
    assert link.get_attribute("href") == "images/2-1-0.png"
    page.locator("#compare-full").check()
    until(
        page,
        """(() => {
            const image = document.querySelector('#image-after');
            return image.src.endsWith('images/2-1-0.png') && image.naturalWidth === 48;
        })()""",
    )
    page.locator("#compare-before").select_option("a/step-2")
    rows = page.locator("#compare-scores tbody tr")
    assert rows.count() == 2
    page.get_by_role("button", name="Next prompt").click()
    assert page.locator("#compare-title").text_content() == "a green sign (seed 7)"
    with page.context.expect_page() as original:
        link.click()
    original.value.wait_for_load_state()
    assert original.value.url.endswith("images/2-2-0.png")
    assert original.value.evaluate("document.images[0].naturalWidth") == 48
    original.value.close()
    page.keyboard.press("Escape")
    assert not page.locator("#compare").is_visible()


def test_prompts_can_be_found(shown: Any):
    page = shown
    page.get_by_role("searchbox").fill("BL")
    assert page.locator("#cells tbody tr:visible").count() == 2
    assert page.locator("#found").text_content() == "2 of 12 prompts"
    page.get_by_role("searchbox").fill("nothing")
    assert page.locator("#cells tbody tr:visible").count() == 0
    page.get_by_role("searchbox").fill("")


def test_a_phone_shows_all_of_it(browser: Any, report: Path):
    size = {"width": 390, "height": 844}
    with opened(browser, report, viewport=size, is_mobile=True, has_touch=True) as page:
        # Folded, but for what answers at once.
        assert page.locator("#summary .card").count() == 2
        assert page.locator(".fold[open]").count() == 1
        assert page.evaluate("document.documentElement.scrollHeight") < 6000
        page.get_by_role("link", name="1 alarm").tap()
        assert page.get_by_text(MESSAGE).first.is_visible()
        page.evaluate("document.querySelectorAll('.fold').forEach((one) => (one.open = true))")
        see_everything(page)
        wide = "document.scrollingElement.scrollWidth <= innerWidth && innerWidth === 390"
        assert page.evaluate(wide)
        small = page.evaluate(
            """[...document.querySelectorAll('body *')]
                .filter((one) => [...one.childNodes].some(
                    (node) => node.nodeType === 3 && node.data.trim()))
                .filter((one) => !one.closest('script, noscript'))
                .filter((one) => parseFloat(getComputedStyle(one).fontSize) < 12)
                .map((one) => one.outerHTML.slice(0, 80))"""
        )
        assert small == []
        page.locator("#cells .cell").nth(1).tap()
        inside = page.locator("#compare .inside").bounding_box()
        assert inside["x"] >= 0
        assert inside["x"] + inside["width"] <= 390
        assert page.locator("#compare").evaluate("one => one.scrollWidth <= one.clientWidth")


def test_where_nothing_applies_it_says_so(browser: Any, tmp_path: Path):
    table = make_table(None)
    nothing = dataclasses.replace(table, values=numpy.full_like(table.values, numpy.nan))
    alone = dataclasses.replace(table, rewards=("text",), values=table.values[:, :1])
    pages = []
    for name, one in (("nothing", nothing), ("alone", alone)):
        target = tmp_path / f"{name}.html"
        pages.append(write_report(one, summarise(one, resamples=50), {}, target))
    with opened(browser, pages[0]) as page:
        see_everything(page)
        assert page.get_by_text("No model has a mean of both.").is_visible()
        assert page.get_by_text("text applies to none of the prompts.").is_visible()
        assert page.locator("#summary .gains").first.text_content().count("does not apply") == 2
    with opened(browser, pages[1]) as page:
        see_everything(page)
        assert not page.locator("#front-x").is_visible()
        assert page.locator("#front-plot .points path").count() == len(MODELS)


def test_texts_are_shown_as_they_are(browser: Any, tmp_path: Path):
    table = make_table(None)
    path = write_report(table, summarise(table, resamples=50), {}, tmp_path / "texts.html")
    with opened(browser, path) as page:
        see_everything(page)
        assert page.locator("#training").count() == 0
        cell = page.locator("#cells .cell").nth(2)
        assert cell.locator(".completion").text_content() == f"2 0 0 {EVIL}"
        cell.click()
        assert page.locator("#text-before").text_content() == f"0 0 0 {EVIL}"
        assert page.locator("#text-after").text_content() == f"2 0 0 {EVIL}"
        assert page.locator("#compare-title").text_content() == f"{EVIL} (seed 7)"
        assert not page.locator("#compare-images").is_visible()
        assert page.locator("img").evaluate_all("all => all.every((one) => !one.src)")
