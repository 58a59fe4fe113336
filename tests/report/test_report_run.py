"""The report of one run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_fakes import TEACHER, metrics, result, write_run
from report_parser import Element, Page, tiles

from tutelage.report import ReportError, write_report
from tutelage.report.verdict import run_verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {
        "columns": ["step", "classes", "accuracy", "gamma"],
        "rows": [[0, 2, 0.991, None], [1, 4, 0.953, 0.81], [2, 6, 0.884, 0.72]],
    }
    place = tmp_path_factory.mktemp("whole") / "nkd run"
    groups = {"accuracy": 0.9132, "accuracy[sex=0]": 0.92, "accuracy[sex=1]": 0.9}
    return write_run(
        place, test=groups | {"loss": 0.322, "agreement": 0.938}, tables={"accuracy by step": table}
    )


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report([folder]))


def test_it_stands_in_the_run_folder(folder: Path) -> None:
    assert write_report([folder]) == folder / "report.html"
    assert not list(folder.glob(".*tmp*"))


def test_headline(page: Page) -> None:
    assert [heading.words for heading in page.all("h1")] == ["nkd on cifar10"]
    verdict = page.all("p", class_="verdict")[0].words
    assert verdict == (
        "The student reaches 91.3% accuracy on test rows, 1.8 points below its teacher's 93.1%. Compared with its "
        "teacher it has 6.0× fewer parameters, needs 6.1× fewer FLOPs and answers 4.3× faster."
    )
    chips = [chip.words.replace("\u202f", " ") for chip in page.all("ul", class_="chips")[0].all("li")]
    assert {"finished", "4 500 training rows", "12 epochs", "CPU, 2 threads", "seed 0"} <= set(chips)


def test_student_against_teacher(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.table("Student against teacher")}
    assert rows["Accuracy"] == ["91.32%", "93.12%", "−1.80"]
    assert rows["Loss"] == ["0.3220", "0.2640", "+0.058"]
    assert rows["Agreement with the teacher"] == ["93.80%", "–", "–"]
    assert rows["Parameters"] == ["1.23 M", "7.43 M", "6.0× less"]
    assert rows["FLOPs per row"] == ["354 M", "2.17 G", "6.1× less"]
    assert rows["Latency per row"] == ["2.31 ms", "9.87 ms", "4.3× less"]
    assert page.table("Student by group")[1:] == [["sex=0", "92.00%"], ["sex=1", "90.00%"]]


def test_tiles(page: Page) -> None:
    assert tiles(page) == {
        "Accuracy": "91.3% 1.8 points below the teacher",
        "Parameters": "1.23 M teacher: 7.43 M (6.0×)",
        "FLOPs per row": "354 M teacher: 2.17 G (6.1×)",
        "Latency per row": "2.31 ms teacher: 9.87 ms (4.3×)",
        "Training time": "3 min 07 s of the student",
    }


def test_what_one_run_cannot_tell_is_said(page: Page) -> None:
    assert "Best validation accuracy: 92.00%, at step 396; this student is the last step's, 432." in page.text
    told = next(p for p in page.all("p") if "another seed gives somewhat other figures" in p.text)
    assert told.all("code")[0].text == "tutelage compare"


def test_a_stopped_run_tells_what_it_had_reached(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"test": {}, "validation": {}, "student": {}, "best": {}}
    page = Page(
        write_report([write_run(tmp_path / "run", status="stopped", lines=metrics(epochs=3), **nothing)])
    )
    reached = [line for line in metrics(epochs=3) if line["kind"] == "evaluation"][-1]["metrics"]["accuracy"]
    assert page.all("p", class_="verdict")[0].words == (
        "This run was stopped before its end. It came to step 108 in epoch 3 of 12. "
        f"Last measured: {100 * reached:.1f}% accuracy on validation rows at step 108."
    )
    assert page.table("Last evaluation")[1] == ["Accuracy", f"{100 * reached:.2f}%"]
    assert not page.all("dl", class_="tiles")


def test_what_was_measured_once_is_no_curve(tmp_path: Path) -> None:
    lines = metrics(epochs=2, per_epoch=5)
    lines[-1]["metrics"]["top5"] = 0.99
    assert (
        "Validation top-5 accuracy"
        not in Page(write_report([write_run(tmp_path / "run", lines=lines)])).payloads
    )
    short = write_run(tmp_path / "short", lines=metrics(epochs=1, per_epoch=1))
    page = Page(write_report([short]))
    assert not page.payloads
    assert "One training step was logged, which makes no curve." in page.text


def test_curves(page: Page) -> None:
    drawn = page.payloads
    terms = drawn["Training loss and its terms"]["data"]
    assert [trace["name"] for trace in terms] == ["total", "label", "nkd"]
    assert terms[0]["y"][0] == pytest.approx(terms[1]["y"][0] + terms[2]["y"][0], rel=1e-5)
    assert len(terms[0]["x"]) <= 150
    assert {trace["mode"] for trace in terms} == {"lines+markers"}, "colour alone tells no line"
    assert all(
        drawn[title]["layout"]["xaxis"]["rangemode"] == "tozero" for title in set(drawn) - {"Shares by step"}
    )
    accuracy = drawn["Validation accuracy"]["data"]
    logged = [line["metrics"]["accuracy"] for line in metrics() if line["kind"] == "evaluation"]
    assert accuracy[0]["y"] == pytest.approx(logged, rel=1e-6)
    assert drawn["Learning rate"]["data"][0]["name"] == "main"
    assert {"Validation loss", "Gradient norm", "Speed"} <= set(drawn)


def test_every_figure_is_told_in_words_and_has_its_values(page: Page) -> None:
    for figure in page.all("figure"):
        plot = figure.all("div", class_="plot")[0].attributes
        assert plot["role"] == "img"
        assert " from " in plot["aria-label"]
        assert figure.all("figcaption")[0].words
        values = figure.all("details", class_="values")
        assert values[0].all("td") if values else "table below" in figure.all("figcaption")[0].words
    accuracy = next(f for f in page.all("figure") if f.all("h3")[0].words == "Validation accuracy")
    assert "up to step 432" in accuracy.all("div", class_="plot")[0].attributes["aria-label"]


def test_the_methods_own_tables(page: Page) -> None:
    assert page.table("Accuracy by step")[1:] == [
        ["0", "2", "99.10%", "–"],
        ["1", "4", "95.30%", "0.81"],
        ["2", "6", "88.40%", "0.72"],
    ]
    drawn = page.payloads["Shares by step"]["data"]
    assert [(trace["x"], trace["y"]) for trace in drawn] == [([0, 1, 2], [0.991, 0.953, 0.884])]


def test_what_was_run_and_how_to_run_it_again(page: Page, folder: Path) -> None:
    text = page.text
    assert "sgd (lr 0.05, weight_decay 0.0005, momentum 0.9)" in text
    assert "gamma 1.5" in text
    code = [block.all("code")[0].text for block in page.all("div", class_="code")]
    assert code[0] == f"tutelage run '{folder}/recipe.yaml' --dir '{folder}-again'"
    assert code[1].startswith("version: 1\ntask: classification")
    assert "0123456789abcdef0123456789abcdef01234567" in text
    assert "9f2c" * 16 in text
    assert "timm 1.0.20" in text


def test_headings_go_down_by_one(page: Page) -> None:
    levels = [int(e.tag[1]) for e in _in_order(page) if e.tag in ("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.all("a", class_="skip")[0].attributes["href"] == "#main"
    ids = [e.attributes["id"] for e in _in_order(page) if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = [a.attributes["href"].removeprefix("#") for a in page.all("a")]
    assert set(links) <= set(ids)


def _in_order(page: Page) -> Iterator[Element]:
    waiting = [page.root]
    while waiting:
        element = waiting.pop()
        yield element
        waiting += reversed(element.children)


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", seed=0)
    second = write_run(tmp_path / "b", seed=1, test={"accuracy": 0.92, "loss": 0.3})
    third = write_run(tmp_path / "c", seed=1, status="stopped", test=None, validation=None)
    page = Page(write_report([first, second, third]))
    assert (tmp_path / "report.html").exists()
    names = ["nkd on cifar10, seed 0", "nkd on cifar10, seed 1 (b)", "nkd on cifar10, seed 1 (c)"]
    rows = page.table("Runs side by side")[1:]
    assert [row[:4] for row in rows] == [
        [names[0], "finished", "91.32%", "−1.80"],
        [names[1], "finished", "92.00%", "−1.12"],
        [names[2], "stopped", "–", "–"],
    ]
    assert [heading.words for heading in page.all("h2")] == ["3 runs", *names]
    traces = page.payloads["Validation accuracy"]["data"]
    assert [trace["name"] for trace in traces] == names
    assert "seed 1 (b) has the best accuracy: 92.0%" in page.text


def test_runs_of_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = Page(write_report([write_run(tmp_path / place / "run") for place in ("a", "b")]))
    names = [f"nkd on cifar10, seed 0 (run) ({i})" for i in (1, 2)]
    assert [row[0] for row in page.table("Runs side by side")[1:]] == names


def test_many_runs_stay_one_file_of_bearable_size(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, lines=metrics(i, 5, 4)) for i in range(30)]
    out = write_report(runs, tmp_path / "deep" / "all.html")
    page = Page(out)
    assert len(page.table("Runs side by side")) == 31
    assert len(page.all("details", class_="chapter")) == 20
    assert "The first 20 of 30 runs follow in full" in page.text
    assert out.stat().st_size <= 6_000_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teachers": {}}, "The student reaches 91.3% accuracy on test rows. It had no outside teacher."),
        (
            {"test": None},
            "The student reaches 91.8% accuracy on validation rows; its teacher was not measured on them.",
        ),
        ({"status": "failed"}, "This run failed. What it had written until then is below."),
        (
            {"test": {"mae": 0.5}, "best": {}, "teachers": {}},
            "The student's mean absolute error on test rows is 0.5000.",
        ),
        ({"test": {}, "validation": {}}, "No metrics were recorded for this student."),
        (
            {"test": {"accuracy": float("nan")}, "teachers": {}},
            "The student reaches NaN accuracy on test rows.",
        ),
    ],
)
def test_verdict(changes: dict[str, Any], expected: str) -> None:
    assert run_verdict(result(**changes)).startswith(expected)


def test_verdict_does_not_flatter() -> None:
    dear = {"parameters": 10_000_000, "flops": TEACHER["flops"], "latency_ms": 20.0}
    said = run_verdict(result(student=dear, test={"accuracy": 0.94}))
    assert "0.9 points above its teacher's 93.1%" in said
    assert "has 1.35× as many parameters, needs as many FLOPs and takes 2.0× as long to answer." in said


def test_the_best_of_several_teachers_is_the_measure(tmp_path: Path) -> None:
    weak = TEACHER | {"test": {"accuracy": 0.5}}
    page = Page(write_report([write_run(tmp_path / "run", teachers={"weak": weak, "strong": TEACHER})]))
    head, accuracy, *_ = page.table("Student against teacher")
    assert head == ["", "Student", "Teacher (weak)", "Teacher (strong)", "Difference"]
    assert accuracy == ["Accuracy", "91.32%", "50.00%", "93.12%", "−1.80"]


def test_a_procedures_stages_are_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    for i in (0, 2, 10):
        write_run(folder / "stages" / f"step-{i}", lines=metrics(i, 3, 4))
    page = Page(write_report([folder]))
    traces = page.payloads["Training loss by stage"]["data"]
    assert [trace["name"] for trace in traces] == ["step-0", "step-2", "step-10"]
    assert "metrics.jsonl is missing" not in page.text
    assert "No training steps" not in page.text


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_what_is_no_run_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "here"
    if what == "a file":
        path.write_text("")
    if what == "an empty folder":
        path.mkdir()
    with pytest.raises(ReportError, match=r"here.*comparison\.json"):
        write_report([path])
    assert [found.name for found in tmp_path.iterdir()] == ([] if what == "nothing" else ["here"])


def test_no_folder_is_refused() -> None:
    with pytest.raises(ReportError, match="give run folders"):
        write_report([])


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run")
    old = write_report([folder]).read_text(encoding="utf-8")

    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_report([folder])
    assert (folder / "report.html").read_text(encoding="utf-8") == old
    assert sorted(path.name for path in folder.glob("*report*")) == ["report.html"]
    assert not list(folder.glob(".report*"))
