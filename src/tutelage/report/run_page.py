"""The page of one run."""

from __future__ import annotations

from typing import Any

from tutelage.report.again import run_commands
from tutelage.report.blocks import Block, Notice, Part, Section, Text, Tile, Tone
from tutelage.report.curves import run_curves
from tutelage.report.facts import (
    data_name,
    data_section,
    environment_section,
    method_names,
    recipe_section,
    scale,
)
from tutelage.report.format import (
    ABSENT,
    duration,
    in_sentence,
    is_share,
    metric_label,
    metric_value,
    milliseconds,
    number,
    si,
    times,
)
from tutelage.report.own_tables import own_tables
from tutelage.report.records import Run, listed, mapping
from tutelage.report.tables import against_teacher, by_group, last_evaluation
from tutelage.report.verdict import (
    compared,
    cost_ratio,
    main_teacher,
    primary_metric,
    run_verdict,
    split_of,
)

LONGEST_ERROR = 6000
STATUS: dict[str, tuple[str, Tone]] = {
    "done": ("finished", "good"),
    "failed": ("failed", "bad"),
    "stopped": ("stopped before its end", "bad"),
    "unfinished": ("no result yet", "bad"),
}


def run_part(run: Run, title: str | None = None) -> Part:
    """Everything that is known of a run, as one part of a page; ``title`` where the page has several runs."""
    result = run.result
    data = mapping(result.get("data"))
    chips: list[tuple[str, Tone]] = [STATUS.get(run.status, (run.status, ""))]
    chips += [(text, "") for text in scale(run.recipe, data, run.environment)]
    if number(result.get("seconds")) is not None:
        chips.append((f"{duration(result.get('seconds'))} in all", ""))
    if result.get("seed") is not None:
        chips.append((f"seed {result['seed']}", ""))
    return Part(
        eyebrow="Run",
        title=title or run_title(run),
        verdict=f"{run_verdict(result)} {_progress(run)}".strip(),
        chips=chips,
        tiles=_tiles(result),
        notices=_notices(run),
        sections=[
            _result_section(run),
            run_curves(run),
            *own_tables(result),
            recipe_section(run.recipe, run.recipe_text, run_commands(run)),
            data_section(data),
            environment_section(run.environment, mapping(result.get("versions"))),
        ],
    )


def run_title(run: Run) -> str:
    """``nkd on cifar10``; the folder's name where neither is known."""
    names = method_names(run.recipe) or [str(name) for name in listed(run.result.get("methods"))]
    data = data_name(run.recipe)
    if not names:
        return run.folder.resolve().name
    return f"{' + '.join(names)} on {data}" if data else " + ".join(names)


def _progress(run: Run) -> str:
    """How far a run came that has not ended well."""
    if run.status == "done" or not run.train:
        return ""
    last = run.train[-1]
    planned = mapping(run.recipe.get("train")).get("epochs")
    epoch = (
        f" in epoch {last['epoch']}{f' of {planned}' if planned else ''}"
        if last.get("epoch") is not None
        else ""
    )
    return f"It came to step {last['step']}{epoch}."


def _notices(run: Run) -> list[Notice]:
    notices = []
    if run.result.get("error"):
        text = str(run.result["error"])
        cut = text if len(text) <= LONGEST_ERROR else f"…{text[-LONGEST_ERROR:]}"
        notices.append(Notice("The run ended with an error:", "bad", cut))
    if run.notes:
        notices.append(
            Notice(
                "Not everything could be read: " + " ".join(run.notes), "bad" if run.status == "done" else ""
            )
        )
    return notices


def _tiles(result: dict[str, Any]) -> list[Tile]:
    metric = primary_metric(result)
    split = split_of(result)
    student = mapping(result.get("student"))
    name, teacher = main_teacher(result)
    tiles = []
    if metric is not None:
        value = mapping(result.get(split)).get(metric)
        against = mapping(teacher.get(split)).get(metric)
        left, right = number(value), number(against)
        detail = f"on {split} rows"
        if left is not None and right is not None:
            detail = f"{compared(metric, left - right)} the teacher"
            detail = detail.replace("equal to the", "equal to its")
        tiles.append(Tile(metric_label(metric), metric_value(metric, value, 1), detail))
    for key, label, write, less in (
        ("parameters", "Parameters", si, "fewer"),
        ("flops", "FLOPs a row", si, "fewer"),
        ("latency_ms", "Latency a row", milliseconds, "less"),
    ):
        if student.get(key) is not None:
            tiles.append(
                Tile(label, write(student[key]), _beside(cost_ratio(student, teacher, key), less, bool(name)))
            )
    if number(result.get("train_seconds")) is not None:
        tiles.append(Tile("Training time", duration(result["train_seconds"]), "of the student"))
    return tiles


def _beside(ratio: float | None, less: str, teacher: bool) -> str:
    if ratio is None:
        return "the teacher's is unknown" if teacher else ""
    if abs(ratio - 1) < 0.005:
        return "as the teacher"
    return f"{times(ratio)} {less} than the teacher" if ratio > 1 else f"{times(1 / ratio)} the teacher's"


def _result_section(run: Run) -> Section:
    result = run.result
    blocks: list[Block] = [
        table for table in (against_teacher(result), by_group(result)) if table is not None
    ]
    last = last_evaluation(run)
    if not blocks:
        blocks.append(last or Notice("No result was recorded, and nothing was evaluated yet."))
    elif not mapping(result.get("test")):
        found = (
            "the figures are from validation rows"
            if mapping(result.get("validation"))
            else "there are no metrics"
        )
        blocks.append(Notice(f"No test metrics were recorded; {found}."))
    best = mapping(result.get("best"))
    if best.get("metric") and number(best.get("value")) is not None:
        metric = str(best["metric"])
        written = (
            metric_value(metric, best["value"], 1)
            if is_share(metric)
            else metric_value(metric, best["value"])
        )
        text = f"Best checkpoint by validation {in_sentence(metric)}: step {best.get('step', ABSENT)} with {written}."
        blocks.append(Text(text))
    return Section("Student against teacher" if result.get("teachers") else "Result", blocks, short="Result")
