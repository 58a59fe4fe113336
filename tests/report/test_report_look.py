"""The page's colours: readable in both themes, and told by more than colour."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

import tutelage.report
from tutelage.report.confusion import RIGHT, WRONG
from tutelage.report.heat import STRONGEST
from tutelage.report.layers import CLOSE
from tutelage.report.styles import COLORS, MARKERS, NEUTRAL, STROKES, styles_for

CSS = (Path(tutelage.report.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")


def _theme(selector: str) -> dict[str, str]:
    body = CSS[CSS.index(selector) :].partition("{")[2].partition("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", body))


LIGHT, DARK = _theme(":root {"), _theme(':root[data-theme="dark"]')


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    for name in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("card", "bg", "sunken"):
            assert _contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    for tone in ("good", "bad"):
        assert _contrast(theme[tone], theme[f"{tone}-bg"]) >= 4.5, tone
    for name in [name for name in theme if name.startswith("series-")]:
        assert _contrast(theme[name], theme["card"]) >= 3, name


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("color", sorted({RIGHT, WRONG, CLOSE}))
def test_text_on_the_deepest_cell_of_a_heat_map(theme: dict[str, str], color: str) -> None:
    over, under = ([int(theme[name][i : i + 2], 16) for i in (1, 3, 5)] for name in (color, "card"))
    mixed = [round(STRONGEST * a + (1 - STRONGEST) * b) for a, b in zip(over, under, strict=True)]
    assert _contrast(theme["ink"], "#" + "".join(f"{part:02x}" for part in mixed)) >= 4.5


def test_the_systems_dark_theme_is_the_chosen_one() -> None:
    assert _theme(":root:not([data-theme])") == DARK
    assert set(LIGHT) == set(DARK)
    assert {f"series-{i}" for i in range(COLORS)} < set(LIGHT)


def test_no_two_of_many_look_alike() -> None:
    styles = styles_for(["none", *(f"method {i}" for i in range(40))], neutral="none")
    assert styles["none"] == NEUTRAL
    assert len(set(styles.values())) == 41
    assert all(style.symbol in MARKERS and style.dash in STROKES for style in styles.values())


def test_neighbours_differ_by_more_than_colour() -> None:
    first = list(styles_for([f"method {i}" for i in range(len(MARKERS))]).values())
    assert all(a.symbol != b.symbol for a, b in combinations(first, 2))


def test_a_look_depends_on_the_place_in_the_list_alone() -> None:
    few, many = styles_for(["a", "b"]), styles_for(["a", "b", "c", "b"])
    assert few == {name: many[name] for name in ("a", "b")}
