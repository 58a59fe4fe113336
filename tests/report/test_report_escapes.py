"""Whatever data, models and people call things, it is text on the page: in HTML, in figures, in what scripts read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_hostile import hostile_comparison, hostile_run
from report_parser import Element, Page

from tutelage.report import write_report

EVILS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</ScRiPt ><script>alert(1)</script>",
    "<!--<script>alert(1)",
    "]]><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "`<img src=x onerror=alert(1)>`",
    "{{ 7 * 7 }}{% for x in y %}",
    "</style><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\u2028\u2029<script>",
]
ON_PAGE = {"html", "head", "body", "main", "footer", "section", "header", "table", "div", "span", "p"}


def everything(folder: Path, evil: str) -> Path:
    """A run of which every name is evil, those of its stages, machine and tuned trials too."""
    run = hostile_run(folder, evil)
    (run / "environment.json").write_text(
        json.dumps({evil: evil, "device": evil, "cpu": evil, "packages": {evil: evil}})
    )
    stage = run / "stages" / evil.replace("/", "|")
    stage.mkdir(parents=True)
    line = {"kind": "train", "step": 1, "loss": 1.0, "terms": {evil: 1.0}, "lr": {evil: 0.1}}
    (stage / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run


def compared(folder: Path, evil: str) -> Path:
    """A comparison whose metric, baseline, split, models and machine are evil too."""
    hostile_comparison(folder, evil)
    file = folder / "comparison.json"
    table: dict[str, Any] = json.loads(file.read_text())
    table |= {
        "metric": evil,
        "baseline": evil,
        "split": evil,
        "teachers": {evil: evil},
        "environment": {evil: evil},
    }
    table["teacher"], table["student"] = (
        {"model": evil, "test": {evil: 0.9}},
        {"model": evil, "parameters": evil},
    )
    table["recipe"] = {evil: {evil: evil}}
    file.write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Elements, and attributes of each, of pages whose names are harmless."""
    place = tmp_path_factory.mktemp("quiet")
    pages = [Page(write_report([make(place / make.__name__, "name")])) for make in (everything, compared)]
    found: dict[str, set[str]] = {"img": {"src", "alt", "width", "height"}}
    for element in (each for page in pages for each in _elements(page.root)):
        found.setdefault(element.tag, set()).update(element.attributes)
    assert found.keys() >= ON_PAGE
    return found


@pytest.mark.parametrize("make", [everything, compared])
@pytest.mark.parametrize("evil", EVILS)
def test_evil_names_add_no_element_and_no_attribute(
    evil: str, make: Any, quiet: dict[str, set[str]], tmp_path: Path
) -> None:
    page = Page(write_report([make(tmp_path / "made", evil)]))
    for element in _elements(page.root):
        assert element.tag in quiet
        extra = element.attributes.keys() - quiet[element.tag]
        assert not {
            name for name in extra if name.startswith("on") or name in ("src", "href", "srcdoc", "style")
        }
    scripts = [script for script in page.all("script") if script.attributes.get("type") != "application/json"]
    assert len(scripts) == 2
    assert "alert(1)" not in "".join(script.text for script in scripts)
    for figure in page.payloads.values():
        # Plotly reads some HTML in what it shows; ``meta`` is only compared.
        shown = [{key: value for key, value in trace.items() if key != "meta"} for trace in figure["data"]]
        for text in _texts([shown, figure["layout"]]):
            assert "<" not in re.sub("</?b>|<br>|<extra></extra>", "", text)


def _elements(root: Element) -> list[Element]:
    return [inner for child in root.children for inner in (child, *_elements(child))]


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
