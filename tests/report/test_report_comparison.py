"""The report of a comparison."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_fakes import RECIPE, STUDENT, TEACHER, write_comparison
from report_parser import Page, tiles

from tutelage.report import write_report

MEANS = {"none": 0.899, "kd": 0.9105, "nkd": 0.9142, "fitnet": 0.902, "wa": 0.8}
ERRORS = {("fitnet", 2): "RuntimeError: loss is not finite at step 12 (term hint)"} | {
    ("wa", seed): "OutOfMemoryError: 3 GB" for seed in range(5)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("whole") / "comparison", means=MEANS, failed=ERRORS)


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report([folder]))


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return saved


def test_leaderboard(page: Page, content: dict[str, Any]) -> None:
    head, *rows, teacher = page.table("Methods by accuracy on test rows")
    assert head == [
        "Method",
        "Accuracy",
        "Against none",
        "p",
        "Parameters",
        "FLOPs",
        "Latency",
        "Training",
        "Runs",
    ]
    assert [row[0].split()[0] for row in rows] == ["nkd", "kd", "fitnet", "none", "wa"]
    nkd = next(method for method in content["methods"] if method["name"] == "nkd")
    assert rows[0][1] == f"{100 * nkd['mean']:.2f}% {100 * nkd['low']:.2f} to {100 * nkd['high']:.2f}%"
    found = nkd["difference"]
    assert rows[0][2] == f"+{100 * found['mean']:.2f} +{100 * found['low']:.2f} to +{100 * found['high']:.2f}"
    assert rows[0][3:7] == ["< 0.001", "1.23 M", "354 M", "2.31 ms"]
    assert rows[2][8] == "4 of 5 1 failed"
    assert rows[3][:4] == ["none baseline", rows[3][1], "–", "–"]
    assert rows[4][1:4] == ["failed OutOfMemoryError: 3 GB", "–", "–"]
    assert rows[4][8] == "0 of 5 5 failed"
    assert teacher[:2] == ["Teacher cifar:resnet32x4", "93.12%"]


def test_the_order_is_told_to_assistive_technology(page: Page) -> None:
    table = page.all("table", class_="sortable")[0]
    assert [head.attributes["aria-sort"] for head in table.all("th", scope="col")] == [
        "none",
        "descending",
    ] + ["none"] * 7
    body = table.all("tbody")[0].all("tr")
    sorts = [row.children[1].attributes.get("data-sort") for row in body]
    assert sorts[-1] is None
    known = [float(value) for value in sorts if value is not None]
    assert len(known) == len(sorts) - 1
    assert known == sorted(known, reverse=True)
    assert all(row.children[0].tag == "th" and row.children[0].attributes["scope"] == "row" for row in body)


def test_headline(page: Page, content: dict[str, Any]) -> None:
    verdict = page.all("p", class_="verdict")[0].words
    assert verdict.startswith(
        f"nkd leads with {100 * content['methods'][2]['mean']:.1f}% accuracy on test rows, over 5 seeds"
    )
    assert "points better than none (95% interval +" in verdict
    assert "p < 0.001)" in verdict
    assert "The teacher has 93.1%, " in verdict
    assert "the student has 6.0× fewer parameters" in verdict
    chips = [chip.words.replace("\u202f", " ") for chip in page.all("ul", class_="chips")[0].all("li")]
    assert chips == [
        "19 of 25 runs finished, 6 failed",
        "4 500 training rows",
        "12 epochs",
        "CPU, 2 threads",
        "5 seeds",
        "13 min 32 s in all",
    ]


def test_tiles(page: Page, content: dict[str, Any]) -> None:
    nkd = content["methods"][2]
    found = nkd["difference"]
    below = f"{100 * (TEACHER['test']['accuracy'] - nkd['mean']):.1f}"
    assert tiles(page) == {
        "Best: nkd": f"{100 * nkd['mean']:.1f}% 95% interval {100 * nkd['low']:.1f} to {100 * nkd['high']:.1f}%",
        "Against none": f"+{100 * found['mean']:.1f} points "
        f"+{100 * found['low']:.1f} to +{100 * found['high']:.1f}, p < 0.001",
        "Against the teacher": f"−{below} points teacher: 93.1%",
        "Parameters": "1.23 M teacher: 7.43 M (6.0×)",
        "Training time": "51.0 s none: 33.0 s",
    }


def test_a_lead_that_may_be_chance_is_called_that(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "close", means={"none": 0.9, "kd": 0.9004})
    verdict = Page(write_report([place])).all("p", class_="verdict")[0].words
    assert "kd leads" in verdict
    assert "may be chance at this scale" in verdict
    assert "p = 0.21" in verdict


def test_the_baseline_may_lead(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "worse", means={"none": 0.95, "kd": 0.9})
    page = Page(write_report([place]))
    assert "It is the baseline: no other method was better" in page.text
    worse = page.all("table")[0].all("tbody")[0].all("tr")[1].children[2]
    assert worse.attributes["class"] == "num bad"


def test_lower_may_be_better(tmp_path: Path) -> None:
    means = {"none": 0.5, "kd": 0.4, "nkd": 0.6}
    place = write_comparison(tmp_path / "loss", means=means, metric="loss", higher_is_better=False)
    page = Page(write_report([place]))
    _, *rows, _ = page.table("Methods by loss on test rows")
    assert [row[0].split()[0] for row in rows] == ["kd", "none", "nkd"]
    tones = [row.children[2].attributes["class"].split()[1:] for row in page.all("tbody")[0].all("tr")]
    assert tones == [["good"], [], ["bad"]]
    assert "better than none (95% interval +" in page.all("p", class_="verdict")[0].words
    assert "down and to the left is better" in page.text


def test_every_run_is_there(page: Page, content: dict[str, Any]) -> None:
    head, *rows = page.table("Accuracy by seed")
    assert head == ["Method", *(f"Seed {seed}" for seed in range(5))]
    values = {row[0]: row[1:] for row in rows}
    kd = next(method for method in content["methods"] if method["name"] == "kd")
    assert values["kd"] == [f"{100 * run['value']:.2f}%" for run in kd["runs"]]
    assert values["fitnet"][2] == "failed"
    assert values["wa"] == ["failed"] * 5
    failed = page.table("Failed runs")[1:]
    assert ["fitnet", "2", "RuntimeError: loss is not finite at step 12 (term hint)"] in failed
    assert len(failed) == 6


def test_figures(page: Page, content: dict[str, Any]) -> None:
    drawn = page.payloads
    assert set(drawn) == {
        "Accuracy by method",
        "Accuracy against training time",
        "Validation accuracy",
        "Validation loss",
    }
    by_method = drawn["Accuracy by method"]
    assert by_method["layout"]["yaxis"]["ticktext"] == ["none", "fitnet", "kd", "nkd"]
    seeds = [trace for trace in by_method["data"] if "text" in trace]
    assert sorted(len(trace["x"]) for trace in seeds) == [4, 5, 5, 5]
    cost = {trace["meta"]: trace for trace in drawn["Accuracy against training time"]["data"]}
    for method in content["methods"][:4]:
        assert cost[method["name"]]["x"] == [pytest.approx(method["seconds"], rel=1e-6)]
        assert cost[method["name"]]["y"] == [pytest.approx(method["mean"], rel=1e-6)]


def test_curves_are_means_with_a_band_from_lowest_to_highest(page: Page, folder: Path) -> None:
    data = page.payloads["Validation accuracy"]["data"]
    logs = [(folder / "1" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines() for seed in range(5)]
    rows = [[json.loads(line) for line in log] for log in logs]
    runs = [[row["metrics"]["accuracy"] for row in log if row["kind"] == "evaluation"] for log in rows]
    line = next(trace for trace in data if trace["meta"] == "kd" and "fill" not in trace)
    band = next(trace for trace in data if trace["meta"] == "kd" and "fill" in trace)
    assert line["y"] == pytest.approx([sum(values) / 5 for values in zip(*runs, strict=True)], rel=1e-6)
    highest = [max(values) for values in zip(*runs, strict=True)]
    lowest = [min(values) for values in zip(*runs, strict=True)]
    assert band["y"] == pytest.approx([*highest, *reversed(lowest)], rel=1e-6)
    assert line["x"] == list(range(1, 13))


def test_a_method_looks_the_same_everywhere(page: Page) -> None:
    colors: dict[str, set[str]] = {}
    for figure in page.payloads.values():
        for trace in figure["data"]:
            for part in ("line", "marker"):
                if "color" in trace.get(part, {}):
                    colors.setdefault(trace["meta"], set()).add(trace[part]["color"].split()[0])
    assert set(colors) == {"none", "kd", "nkd", "fitnet"}
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == 4
    rows = page.all("tbody")[0].all("tr")
    swatches = {row.children[0].words.split()[0]: row.all("svg")[0].attributes["style"] for row in rows}
    for name, found in colors.items():
        assert swatches[name] == f"--series: {next(iter(found))}"
    legend = [button.attributes["data-key"] for button in page.all("ul", class_="legend")[0].all("button")]
    assert legend == ["nkd", "kd", "fitnet", "none"]


def test_commands(page: Page, folder: Path) -> None:
    again = page.all("div", class_="code")
    told = {block.all("span")[0].words: block.all("code")[0].text for block in again}
    command = f"tutelage compare {folder}/recipe.yaml --methods none,kd,nkd,fitnet,wa --seeds 5 "
    command += f"--baseline none --dir {folder}"
    assert told["Compare again, into a new folder"] == f"{command}-again"
    assert told["Go on where it stopped, and try failed runs again"] == command


def test_options_that_the_recipe_has_not_are_told_in_python(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "options", means={"none": 0.8, "kd-temperature=2": 0.9, "kd": 0.85})
    saved = json.loads((place / "comparison.json").read_text())
    saved["methods"][1]["options"] = {"temperature": 2.0}
    (place / "comparison.json").write_text(json.dumps(saved))
    code = Page(write_report([place])).all("div", class_="code")[0].all("code")[0].text
    statement = ast.parse(code).body[-1]
    assert isinstance(statement, ast.Expr)
    call = statement.value
    assert isinstance(call, ast.Call)
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given["methods"] == [{"name": "none"}, {"name": "kd", "temperature": 2.0}, {"name": "kd"}]
    assert given["seeds"] == [0, 1, 2, 3, 4]
    assert given["baseline"] == "none"


def test_every_option_that_a_method_ran_with_is_told(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "options", means={"none": 0.8, "kd-temperature=2": 0.9}, seeds=1)
    recipe = RECIPE | {"method": [{"name": "kd", "temperature": 2.0, "loss_weight": 0.9}]}
    (place / "1" / "seed-0" / "recipe.yaml").write_text(json.dumps(recipe))
    assert "Method kd-temperature=2 temperature 2, loss_weight 0.9" in Page(write_report([place])).text


LABELS = {"right": lambda x, w: (x + 4, x + 10 + w), "left": lambda x, w: (x - 10 - w, x - 4)}


@pytest.mark.parametrize("seconds", [(30.0, 31.0, 90.0), (3.0, 33.0, 900.0)], ids=["linear", "log"])
def test_labels_of_points_do_not_lie_on_other_points(tmp_path: Path, seconds: tuple[float, ...]) -> None:
    place = write_comparison(tmp_path / "close", means={"none": 0.9, "somewhat long": 0.9002, "kd": 0.91})
    saved = json.loads((place / "comparison.json").read_text())
    for method, taken in zip(saved["methods"], seconds, strict=True):
        method["seconds"] = taken
    (place / "comparison.json").write_text(json.dumps(saved))
    drawn = Page(write_report([place])).payloads["Accuracy against training time"]
    log = drawn["layout"]["xaxis"]["type"] == "log"
    assert log == (max(seconds) > 10 * min(seconds))
    low, high = drawn["layout"]["xaxis"]["range"]
    xs = [(math.log10(trace["x"][0]) if log else trace["x"][0]) for trace in drawn["data"]]
    for trace, x in zip(drawn["data"], xs, strict=True):
        start, end = LABELS[trace["textposition"].split()[1]](0, 7 * len(trace["text"][0]))
        others = [(other - x) / (high - low) * 440 for other in xs if other != x]
        assert trace["textposition"].startswith("middle")
        assert not [other for other in others if start < other < end]


def test_the_teacher_is_compared_on_the_same_rows_only(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "validation", split="validation")
    page = Page(write_report([place]))
    assert page.table("Methods by accuracy on validation rows")[-1][:2] == ["Teacher cifar:resnet32x4", "–"]
    assert "The teacher has" not in page.text


def test_own_students_have_their_own_cost(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "pruned", means={"none": 0.9, "pruned": 0.89})
    for path in (place / "1").glob("seed-*/result.json"):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"student": STUDENT | {"parameters": 400_000}})
        )
    rows = {row[0].split()[0]: row for row in page_rows(place)}
    assert rows["pruned"][4] == "400 k"
    assert rows["none"][4] == "1.23 M"


def page_rows(place: Path) -> list[list[str]]:
    return Page(write_report([place])).table("Methods by")


def test_half_way_a_comparison_has_a_report(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "half", seeds=3)
    saved = json.loads((place / "comparison.json").read_text())
    saved["methods"][2] |= {
        "runs": [],
        "mean": None,
        "low": None,
        "high": None,
        "difference": None,
        "seconds": None,
    }
    saved["methods"][1]["runs"] = saved["methods"][1]["runs"][:1]
    (place / "comparison.json").write_text(json.dumps(saved))
    page = Page(write_report([place]))
    assert "4 of 9 runs finished" in page.text
    assert ["nkd", "–", "–", "–"] in page.table("Accuracy by seed")
    assert "Go on where it stopped" in page.text


def test_without_run_folders_the_numbers_are_still_there(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "alone")
    (tmp_path / "moved").mkdir()
    (place / "comparison.json").rename(tmp_path / "moved" / "comparison.json")
    page = Page(write_report([tmp_path / "moved"]))
    assert "The folders of 15 of 15 finished runs are not here" in page.text
    assert "so there are no curves" in page.text
    assert len(page.table("Methods by accuracy")) == 5


def test_run_folders_elsewhere_are_not_read(tmp_path: Path) -> None:
    place = write_comparison(tmp_path / "inside", seeds=1)
    saved = json.loads((place / "comparison.json").read_text())
    write_comparison(tmp_path / "other", seeds=1)
    saved["methods"][0]["runs"][0]["folder"] = "../other/0/seed-0"
    (place / "comparison.json").write_text(json.dumps(saved))
    assert "The folders of 1 of 3 finished runs are not here" in Page(write_report([place])).text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    page = Page(write_report([write_comparison(tmp_path / "one", seeds=1)]))
    assert "with one seed" in page.text
    assert "no interval" in page.table("Methods by accuracy")[1][1]
    assert page.payloads["Accuracy against training time"]["data"][0]["error_y"]["visible"] is False


def test_a_big_comparison_stays_one_file_of_bearable_size(tmp_path: Path) -> None:
    means = {f"method_{i}": 0.8 + 0.002 * i for i in range(45)}
    out = write_report([write_comparison(tmp_path / "big", means=means, seeds=5)])
    assert out.stat().st_size <= 6_000_000
    page = Page(out)
    assert len(page.table("Accuracy by seed")) == 46
    traces = [trace for trace in page.payloads["Validation accuracy"]["data"] if "fill" not in trace]
    looks = {(t["line"]["color"], t["marker"]["symbol"], t["line"]["dash"]) for t in traces}
    assert len(looks) == 45
