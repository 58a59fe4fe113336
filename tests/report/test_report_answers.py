"""What a run's report tells of single answers: confusion, calibration, disagreements, layers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from report_analysis_fakes import analysis, explained, picture, write_analysis
from report_fakes import write_run
from report_parser import Element, Page

from tutelage.report import render, write, write_report


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_plotly", lambda: "var Plotly;")


def page_of(tmp_path: Path, found: dict[str, Any], layers: dict[str, Any] | None = None) -> Page:
    return Page(write_report([write_analysis(write_run(tmp_path / "run"), found, layers)]))


def titles(page: Page) -> list[str]:
    return [heading.words for heading in page.all("h2")]


ADDED = [
    "Right and wrong by class, on 100 test rows",
    "Calibration",
    "Where student and teacher disagree",
    "Layers of student and teacher",
]


def test_sections_are_there_where_their_files_are(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis(), explained())
    assert titles(page)[2:6] == ADDED
    links = [link.words for link in page.all("nav")[0].all("a")]
    assert links[2:6] == ["Classes", "Calibration", "Disagreements", "Layers"]
    without = Page(write_report([write_run(tmp_path / "old")]))
    assert not set(ADDED) & set(titles(without))
    assert "analysis.json" not in without.text


def test_the_confusion_has_counts_and_shares_of_their_row(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis())
    drawn = page.payloads["What the student answered"]
    right, wrong = drawn["data"]
    assert right["text"][0][:3] == [4, "", ""]
    assert wrong["text"][0][:3] == ["", 6, ""]
    assert right["z"][0][:2] == [0.4, None]
    assert wrong["z"][0][:3] == [None, 0.6, 0]
    assert (right["zmax"], wrong["zmax"]) == (1, 0.6)
    assert drawn["layout"]["yaxis"]["autorange"] == "reversed"
    figure = page.all("figure", class_="chart")[-4]
    assert figure.all("h3")[0].words == "What the student answered"
    told = figure.all("div", class_="plot")[0].attributes["aria-label"]
    assert "67 of 100 rows right; most often wrong: 60% of class 0 as class 1, 30% of class 1" in told
    assert page.payloads["What the teacher answered"]["data"][0]["z"][1][1] == 0.9


@pytest.mark.parametrize(("classes", "folded", "width"), [(12, False, None), (13, True, "min-width: 278px")])
def test_many_classes_take_the_whole_width(
    tmp_path: Path, classes: int, folded: bool, width: str | None
) -> None:
    page = page_of(tmp_path, analysis(classes))
    teachers = [fold for fold in page.all("details", class_="folded") if "teacher's answers" in fold.words]
    assert bool(teachers) == folded
    regions = page.all("div", class_="pan")
    assert bool(regions) == folded
    for region in regions:
        assert region.attributes["tabindex"] == "0"
        assert str(width) in region.all("div")[0].attributes["style"]


def test_the_pairs_that_are_confused_most(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis())
    head, first, *others = page.table("What the student confuses most often")
    assert head == ["Target", "Answer", "Rows", "Of the target", "Teacher"]
    assert first == ["class 0", "class 1", "6", "60.0%", "2"]
    assert len(others) == 9


def test_of_many_classes_tables_tell_the_worst(tmp_path: Path) -> None:
    found = analysis(100)
    found["student"]["recall"][70] = 0.1
    page = page_of(tmp_path, found)
    assert "What the student answered" not in page.payloads
    assert page.table("What the student confuses most often")[1] == ["class 0", "class 1", "6", "2"]
    head, first, second, *rest = page.table("Recall by class, farthest behind the teacher first: 20 of 100")
    assert head == ["Class", "Student", "Teacher", "Difference", "Agreement"]
    assert first == ["class 70", "10.0%", "90.0%", "−80.0", "80.0%"]
    assert second[0] == "class 0"
    assert len(rest) == 18


def test_agreement_stands_beside_both_recalls(tmp_path: Path) -> None:
    found = analysis()
    found["student"]["recall"][3] = found["teacher"]["recall"][3] = found["agreement"][3] = None
    page = page_of(tmp_path, found)
    drawn = page.payloads["Recall by class, and agreement with the teacher"]["data"]
    assert {trace["name"]: trace["y"][:4] for trace in drawn} == {
        "Student": [0.4, 0.7, 0.7, None],
        "Teacher": [0.8, 0.9, 0.9, None],
        "Agreement": [0.8, 0.8, 0.8, None],
    }
    rows = page.table("Recall by class")[1:]
    assert rows[0] == ["class 0", "10", "40.0%", "80.0%", "−40.0", "80.0%"]
    assert rows[-1] == ["class 3", "10", "–", "–", "–", "–"]


def test_without_a_teacher_the_student_stands_alone(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis() | {"teacher": None, "agreement": None, "examples": []})
    assert "What the teacher answered" not in page.payloads
    assert [trace["name"] for trace in page.payloads["Recall by class"]["data"]] == ["Student"]
    assert page.table("What the student confuses")[0] == ["Target", "Answer", "Rows", "Of the target"]
    assert page.table("Recall by class, lowest first")[1] == ["class 0", "10", "40.0%"]
    assert "Where student and teacher disagree" not in titles(page)
    assert {trace["name"] for trace in page.payloads["Accuracy by confidence"]["data"]} == {"Student"}


def test_calibration_tells_how_many_rows_a_point_has(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis())
    firm, faint, _, _, bars, _ = page.payloads["Accuracy by confidence"]["data"]
    assert (firm["x"], firm["y"], firm["customdata"]) == ([0.62, 0.95], [0.5, 0.9], [40, 57])
    assert (faint["x"], faint["mode"]) == ([0.4], "markers")
    assert (bars["type"], bars["y"], bars["yaxis"]) == ("bar", [0.03, 0.4, 0.57], "y2")
    assert page.table("Accuracy by confidence: values")[1:] == [
        ["25% to 50%", *["3", "40.0%", "0.0%"] * 2],
        ["50% to 75%", *["40", "62.0%", "50.0%"] * 2],
        ["75% to 100%", *["57", "95.0%", "90.0%"] * 2],
    ]
    assert "the student is 80.2% sure on average, and right in 71.3% of them" in page.source


def test_texts_stand_where_rows_are_no_pictures(tmp_path: Path) -> None:
    found = analysis(examples=2, side=None)
    for number, example in enumerate(found["examples"]):
        example["text"] = f"a <b>film</b> & more {number}"
    page = page_of(tmp_path, found)
    head, *rows = page.table("Rows that the two answer differently")
    assert head[:3] == ["Row", "Text", "Target"]
    assert [row[1] for row in rows] == ["a <b>film</b> & more 0", "a <b>film</b> & more 1"]
    assert gallery(page) == []


def test_answers_of_tokens_are_counted_as_such(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis(side=None) | {"items": "tokens"})
    assert "Right and wrong by class, on 100 test tokens" in titles(page)
    assert page.table("Tokens that the two answer differently")
    assert "Tokens" in page.table("What the student confuses most often")[0]
    assert page.payloads["Accuracy by confidence"]["layout"]["yaxis2"]["title"]["text"] == "tokens"


def gallery(page: Page) -> list[Element]:
    return [item for shown in page.all("ul", class_="pictures") for item in shown.all("li")]


def test_the_pictures_themselves_are_shown(tmp_path: Path) -> None:
    found = analysis()
    items = gallery(page_of(tmp_path, found))
    assert len(items) == 12
    shown = items[2].all("img")[0].attributes
    assert shown["src"] == found["examples"][2]["picture"]
    assert base64.b64decode(shown["src"].partition(",")[2]).startswith(b"\x89PNG")
    assert shown["alt"] == "Row 102, whose target is class 2"
    facts = {row.all("dt")[0].words: row.all("dd")[0].words for row in items[2].all("div")}
    assert facts == {
        "Target": "class 2",
        "Student": "class 3 wrong, 91% sure",
        "Teacher": "class 2 right, 99% sure",
    }


def test_rows_that_are_no_pictures_are_told(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis(side=None))
    assert not page.all("img")
    head, first, *_ = page.table("Rows that the two answer differently")
    assert head == ["Row", "Target", "Student", "Teacher"]
    assert first == ["100", "class 0", "class 1 wrong, 91% sure", "class 0 right, 99% sure"]


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/a.png",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:image/png;base64,AAAA\n",
        'data:image/png;base64,AA" onerror="alert(1)',
        "javascript:alert(1)",
        "data:image/png;base64,",
        7,
        None,
    ],
)
def test_no_other_source_of_a_picture_is_taken(tmp_path: Path, source: object) -> None:
    found = analysis(examples=2)
    found["examples"][0]["picture"] = source
    page = page_of(tmp_path, found)
    assert [image.attributes["alt"] for image in page.all("img")] == ["Row 101, whose target is class 1"]
    assert page.table("Further rows, without their pictures")[1][0] == "100"


def test_pictures_have_only_so_much_room(tmp_path: Path) -> None:
    found = analysis(examples=3, side=32)
    found["examples"][1]["picture"] = picture(400)
    page = page_of(tmp_path, found)
    assert len(gallery(page)) == 2
    assert page.table("Further rows")[1][0] == "101"


def test_layers_are_compared_with_each_teacher(tmp_path: Path) -> None:
    page = page_of(tmp_path, analysis(), explained("a", "b"))
    drawn = page.payloads["The student's layers against the teacher a's"]
    (cells,) = drawn["data"]
    assert (cells["x"], cells["y"]) == (["layer1", "logits"], ["layer1", "layer2", "logits"])
    assert cells["z"] == [[0.9, 0.4], [0.55, 0.5], [0.3, 0.8]]
    assert (cells["zmin"], cells["zmax"]) == (0.3, 0.9)
    assert page.table("The student's layers against the teacher b's")[2] == ["layer2", "0.55", "0.50"]
    assert "the same 512 test rows by linear CKA: 1 means" in page.text
    assert "layer2 is closest to layer1 (0.55)" in page.source


def test_long_names_are_told_apart(tmp_path: Path) -> None:
    layers = explained()
    layers["student"]["layers"] = [f"encoder.{i}.attention.output" for i in range(3)]
    found = analysis()
    found["classes"][:3] = ["a very long name indeed, one", "a very long name indeed, two", "<b>"]
    page = page_of(tmp_path, found, layers)
    shown = page.payloads["The student's layers against the teacher's"]["data"][0]["y"]
    assert len(set(shown)) == 3
    assert shown[0] == "…ttention.output (0)"
    classes = page.payloads["What the student answered"]["data"][0]["x"]
    assert classes[:3] == ["a very long nam… (0)", "a very long nam… (1)", "&lt;b&gt; (2)"]


def test_one_run_of_the_largest_kind_is_one_bearable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    found = analysis(50, side=96)
    for i, row in enumerate(found["student"]["confusion"]):
        row[:] = [1000 + i + j for j in range(50)]
    out = write_report([write_analysis(write_run(tmp_path / "run"), found, explained())])
    assert len(gallery(Page(out))) == 12
    assert out.stat().st_size <= 6_000_000


def test_of_many_large_runs_as_many_are_told_in_full_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "LARGEST", 2_500_000)
    table = {"columns": ["text"], "rows": [["x" * 400]] * 200}
    runs = [write_run(tmp_path / f"{i}", seed=i, lines=[], tables={"words": table}) for i in range(20)]
    out = write_report(runs, tmp_path / "all.html")
    assert out.stat().st_size <= 2_500_000
    page = Page(out)
    assert len(page.all("details", class_="chapter")) == 10
    assert "The first 10 of 20 runs follow in full" in page.text
