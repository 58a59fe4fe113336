"""Reports in a real browser: drawn, answering, readable in both themes and on a phone, and silent on the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from report_analysis_fakes import analysis, explained, tune_comparison, tuning, write_analysis
from report_fakes import write_comparison, write_run
from report_hostile import hostile_run
from report_reader import (
    ARGUMENTS,
    CHROMIUM,
    CONTRASTS,
    PHONE,
    Reader,
    Scheme,
    figure_titled,
    hover,
    unfold,
    use,
)

from tutelage.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

EVIL = "<img src=x onerror=alert(1)>"
MEANS = {"none": 0.899, "kd": 0.9105, "nkd": 0.9142, "fitnet": 0.902, "a-method-of-a-long-name": 0.9}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One report of each kind, by name; the overview has the run and a hostile one as chapters."""
    place = tmp_path_factory.mktemp("reports")
    columns = ["step", *(f"accuracy_of_group_{i}" for i in range(12))]
    table = {
        "columns": columns,
        "rows": [[5 * i, *(0.9 - 0.01 * (i + j) for j in range(12))] for i in range(4)],
    }
    run = write_run(place / "run", tables={"accuracy by step": table})
    write_analysis(run, analysis(20), explained())
    comparison = write_comparison(place / "comparison", means=MEANS, failed={("fitnet", 2): "boom"})
    tune_comparison(comparison, {name: tuning(0.8, None, 0.85, 0.83) for name in MEANS})
    return {
        "run": write_report([run]),
        "comparison": write_report([comparison]),
        "overview": write_report([run, hostile_run(place / EVIL, EVIL)], place / "overview.html"),
    }


@pytest.fixture(scope="module")
def only_reader(browser: Browser, reports: dict[str, Path]) -> Iterator[Reader]:
    page = browser.new_page()
    yield Reader(page, reports)
    page.close()


@pytest.fixture
def reader(only_reader: Reader) -> Iterator[Reader]:
    """In the end of each test nothing may have gone wrong on its page, and nothing been asked of the network."""
    only_reader.problems.clear()
    yield only_reader
    assert only_reader.problems == []


@pytest.mark.parametrize("name", ["comparison", "overview"])
def test_every_figure_is_drawn(reader: Reader, reports: dict[str, Path], name: str) -> None:
    page = reader.open(name)
    unfold(page)
    figures = page.locator("figure.chart")
    assert figures.count() >= 4
    for figure in figures.all():
        drawn = figure.locator(".plot svg").locator(".scatterlayer .trace path, .heatmaplayer image")
        drawn.first.wait_for(state="attached")
        assert figure.locator(".plot .xtick, .plot .ytick").count() >= 4
    assert reports[name].stat().st_size <= 6_000_000


def test_a_point_tells_its_value(reader: Reader) -> None:
    page = reader.open("comparison")
    figure = figure_titled(page, "Validation accuracy")
    hover(page, figure.locator(".scatterlayer .trace .points path").nth(4))
    told = figure.locator(".hoverlayer .hovertext")
    told.first.wait_for()
    assert re.search(r"epoch 5: \d\d\.\d\d%", told.first.text_content() or "")


def test_a_cell_of_a_heat_map_tells_its_row_and_column(reader: Reader) -> None:
    page = reader.open("run")
    figure = figure_titled(page, "What the student answered")
    hover(page, figure.locator(".heatmap-label").nth(1))
    told = figure.locator(".hoverlayer .hovertext")
    told.first.wait_for()
    said = " ".join((told.first.text_content() or "").split())
    assert re.search(r"class (\d+) answered as class \d+: \d+ rows, \d\d.0% of class \1", said)


def test_a_heat_map_follows_the_theme(reader: Reader) -> None:
    page = reader.open("run", scheme="light")
    image = figure_titled(page, "What the student answered").locator(".heatmaplayer image").first
    light = image.get_attribute("href")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "([image, old]) => image.href.baseVal !== old", arg=[image.element_handle(), light]
    )


def test_pictures_are_seen_pixel_by_pixel(reader: Reader) -> None:
    shown = reader.open("run").locator(".pictures img")
    assert shown.count() == 12
    seen = shown.evaluate_all(
        "(all) => all.map((i) => [i.naturalWidth, i.width, i.height, getComputedStyle(i).imageRendering, i.alt])"
    )
    assert [found[:4] for found in seen] == [[8, 96, 96, "pixelated"]] * 12
    assert seen[0][4] == "Row 100, whose target is class 0"


def test_a_trial_tells_what_it_tried(reader: Reader) -> None:
    page = reader.open("comparison")
    figure = figure_titled(page, "Validation accuracy by trial")
    hover(page, figure.locator(".scatterlayer .trace").last.locator(".points path").nth(1))
    told = figure.locator(".hoverlayer .hovertext")
    told.first.wait_for()
    assert "trial 2: 85.00%lr 0.15, temperature 6" in (told.first.text_content() or "")


@pytest.mark.parametrize("way", ["click", "Space"])
def test_the_legend_hides_and_shows(reader: Reader, way: str) -> None:
    page = reader.open("comparison")
    button = page.locator(".legend button", has_text="nkd").first
    traces = {name: figure_titled(page, name).locator(".scatterlayer .trace") for name in FIGURES}
    before = {name: found.count() for name, found in traces.items()}
    use(button, way)
    assert button.get_attribute("aria-pressed") == "false"
    assert all(traces[name].count() < before[name] for name in FIGURES)
    use(button, way)
    assert button.get_attribute("aria-pressed") == "true"
    assert {name: found.count() for name, found in traces.items()} == before


FIGURES = ("Accuracy by method", "Accuracy against training time", "Validation accuracy", "Validation loss")


@pytest.mark.parametrize("way", ["click", "Enter"])
def test_a_table_is_sorted_by_any_column(reader: Reader, reports: dict[str, Path], way: str) -> None:
    content = json.loads((reports["comparison"].parent / "comparison.json").read_text())
    seconds = {method["name"]: method["seconds"] for method in content["methods"]}
    page = reader.open("comparison")
    table = page.locator("table.sortable").first
    head = table.locator("th", has_text="Training")
    assert _sorted(table) == {"Accuracy": "descending"}
    use(head.locator("button"), way)
    assert _sorted(table) == {"Training": "descending"}
    assert _names(table) == sorted(seconds, key=seconds.__getitem__, reverse=True)
    use(head.locator("button"), way)
    assert _sorted(table) == {"Training": "ascending"}
    assert _names(table) == sorted(seconds, key=seconds.__getitem__)
    use(table.locator("th button", has_text="Against none"), way)
    assert _names(table)[-1] == "none", "the baseline has no difference to itself: it stays last"
    assert "Teacher" in (table.locator("tfoot tr th").text_content() or "")


def test_numbers_are_not_sorted_as_text(reader: Reader) -> None:
    table = reader.open("run").locator("table.sortable").first
    use(table.locator("th button", has_text="accuracy of group 0"), "click")
    values = [float(text.rstrip("%")) for text in table.locator("tbody td:nth-child(2)").all_text_contents()]
    assert values == sorted(values, reverse=True)
    use(table.locator("th button", has_text="step"), "click")
    use(table.locator("th button", has_text="step"), "click")
    assert table.locator("tbody th").all_text_contents() == ["0", "5", "10", "15"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_all_text_is_readable(reader: Reader, name: str, scheme: Scheme) -> None:
    page = reader.open(name, scheme=scheme)
    unfold(page)
    page.locator("figure.chart .xtick text").first.wait_for()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [one for one in found if one["contrast"] < 4.5] == []


def test_the_theme_follows_the_system_and_the_reader(reader: Reader) -> None:
    light, dark = (_colors(reader.open("comparison", scheme=scheme)) for scheme in ("light", "dark"))
    assert all(light[part] != dark[part] for part in light)
    page = reader.open("comparison", scheme="light")
    page.get_by_role("button", name="Dark theme").click()
    assert _colors(page) == dark
    page.reload()
    assert _colors(page) == dark, "the choice is remembered"
    page.get_by_role("button", name="Light theme").click()
    assert _colors(page) == light


def _colors(page: Page) -> Any:
    page.locator("figure.chart .xtick text").first.wait_for()
    return page.evaluate(
        """() => ({
          ground: getComputedStyle(document.body).backgroundColor,
          text: getComputedStyle(document.body).color,
          ticks: getComputedStyle(document.querySelector("figure.chart .xtick text")).fill,
          line: getComputedStyle(document.querySelector("figure.chart .scatterlayer .js-line")).stroke,
        })"""
    )


@pytest.mark.parametrize("name", ["comparison", "overview"])
def test_a_phone_scrolls_tables_and_never_the_page_sideways(reader: Reader, name: str) -> None:
    page = reader.open(name, size=PHONE)
    unfold(page)
    page.locator("figure.chart .plot svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    within = page.locator(".scroll, .pan, :not(.pan) > .plot, pre")
    boxes = [box for box in within.all() if box.is_visible()]
    for box in boxes:
        place = box.bounding_box()
        assert place is not None
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= PHONE[0]


def test_a_wide_table_scrolls_by_keyboard(reader: Reader) -> None:
    page = reader.open("run", size=PHONE)
    box = page.locator(".scroll[aria-label='Accuracy by step']")
    _scroll_by_keyboard(page, box)
    first = box.locator("tbody th").first.bounding_box()
    place = box.bounding_box()
    assert first is not None
    assert place is not None
    assert first["x"] == pytest.approx(place["x"], abs=1), "the rows' names stay in sight"


def test_a_heat_map_of_many_classes_scrolls_by_keyboard(reader: Reader) -> None:
    page = reader.open("run", size=PHONE)
    figure = figure_titled(page, "What the student answered")
    figure.locator(".heatmaplayer image").first.wait_for(state="attached")
    _scroll_by_keyboard(page, figure.locator(".pan"))
    narrow = figure_titled(page, "The student's layers against the teacher's")
    assert narrow.locator(".pan").count() == 0


def _scroll_by_keyboard(page: Page, box: Locator) -> None:
    assert box.evaluate("(box) => box.scrollWidth > box.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(box) => box.scrollLeft > 0", arg=box.element_handle())


def test_focus_is_seen_and_comes_in_the_order_of_the_page(reader: Reader) -> None:
    page = reader.open("comparison")
    tops = []
    for i in range(30):
        page.keyboard.press("Tab")
        now = page.evaluate(
            """() => {
              const { activeElement: active } = document;
              const { outlineStyle, outlineWidth } = getComputedStyle(active);
              return { text: active.textContent, ring: outlineStyle === "none" ? 0 : parseFloat(outlineWidth),
                       top: active.getBoundingClientRect().top + scrollY, inMain: Boolean(active.closest("main")) };
            }"""
        )
        assert now["ring"] >= 2, now
        if i == 0:
            assert now["text"] == "Skip to the report"
            page.wait_for_function("document.activeElement.getBoundingClientRect().top >= 0")
        tops += [now["top"]] if now["inMain"] else []
    assert len(tops) > 10
    assert all(after >= before - 40 for before, after in pairwise(tops))
    page.keyboard.press("Home")
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("name", ["comparison", "overview"])
def test_what_is_seen_is_told_too(reader: Reader, name: str) -> None:
    page = reader.open(name)
    levels = page.locator("h1, h2, h3, h4, h5, h6").evaluate_all(
        "(all) => all.map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for selector, told in TOLD.items():
        found = page.locator(selector)
        assert found.count() > 0
        untold = f"(all) => all.filter((e) => !({told})).map((e) => e.outerHTML.slice(0, 200))"
        assert found.evaluate_all(untold) == []


TOLD = {
    "table": "e.caption.textContent.trim() && e.tBodies[0].rows.length",
    "thead th": "e.scope === 'col'",
    "tbody tr, tfoot tr": "e.cells[0].matches('th[scope=row]')",
    "figure.chart .plot": "e.role === 'img' && e.ariaLabel.length > 40",
    "figure.chart": "e.querySelector('figcaption').textContent.trim()",
    "button, a, summary": "e.ariaLabel || e.textContent.trim()",
}
"""What each element must have for who cannot see the page, as a condition on ``e``."""


def test_markup_in_names_stays_text(reader: Reader) -> None:
    page = reader.open("overview")
    unfold(page)
    page.locator("figure.chart .plot svg").last.wait_for()
    own = page.locator(".pictures img[src^='data:image/png;base64,']")
    assert page.locator("img").count() == own.count() == 12
    assert figure_titled(page, "What the student answered").is_visible()
    assert page.get_by_role("heading", name=f"{EVIL} on {EVIL}").first.is_visible()
    figure = page.locator("figure.chart", has=page.locator(".legend button", has_text=EVIL)).first
    assert figure.locator("h3, h4").text_content() == "Training loss and its terms"
    hover(page, figure.locator(".scatterlayer .trace").last.locator(".points path").nth(2))
    figure.locator(".hoverlayer .hovertext", has_text=EVIL).first.wait_for()
    assert page.locator("img").count() == 12


def test_a_figure_can_be_saved(reader: Reader, tmp_path: Path) -> None:
    page = reader.open("comparison")
    with page.expect_download() as started:
        figure_titled(page, "Accuracy by method").get_by_role("button", name="Save as SVG").click()
    started.value.save_as(tmp_path / "figure.svg")
    assert started.value.suggested_filename == "accuracy-by-method.svg"
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_command_can_be_copied(reader: Reader) -> None:
    page = reader.open("run")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("tutelage run ")


def test_it_is_readable_without_scripts(browser: Browser, reports: dict[str, Path]) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(reports["run"].as_uri())
    assert page.locator("table").first.is_visible()
    assert page.get_by_text("This figure is drawn by a script").first.is_visible()
    assert page.locator(".legend:visible, button:visible").count() == 0
    page.close()


def test_the_page_itself_refuses_the_network(only_reader: Reader) -> None:
    page = only_reader.open("run")
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in problem for problem in only_reader.problems)
    assert not any(problem.startswith("request to") for problem in only_reader.problems)


def _sorted(table: Locator) -> dict[str, str]:
    heads = {head.text_content(): head.get_attribute("aria-sort") for head in table.locator("thead th").all()}
    return {str(name): order for name, order in heads.items() if order not in (None, "none")}


def _names(table: Locator) -> list[str]:
    names = table.locator("tbody th .named > span").all()
    return [name.evaluate("(element) => element.firstChild.textContent") for name in names]
