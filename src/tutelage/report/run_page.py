"""The page of one run."""

from __future__ import annotations

from typing import Any

from tutelage.report.again import run_commands
from tutelage.report.analysis import Analysis
from tutelage.report.blocks import Block, Notice, Part, Section, Text, Tone
from tutelage.report.by_class import class_section
from tutelage.report.calibration import calibration_section
from tutelage.report.curves import run_curves
from tutelage.report.disagreements import disagreement_section
from tutelage.report.embedding import embedding_section
from tutelage.report.facts import (
    data_name,
    data_section,
    environment_section,
    method_names,
    recipe_section,
    scale,
)
from tutelage.report.format import (
    count,
    duration,
    in_sentence,
    metric_value,
    number,
)
from tutelage.report.layers import layer_section
from tutelage.report.own_tables import own_tables
from tutelage.report.records import Run, listed, mapping
from tutelage.report.tables import against_teacher, by_group, last_evaluation
from tutelage.report.tiles import run_tiles
from tutelage.report.verdict import (
    primary_metric,
    run_verdict,
    split_of,
)

LONGEST_ERROR = 6000
PICTURE_BYTES = 600_000
"""Pictures of one page; a page of several runs shares them out."""
ONE_RUN = (
    "This is one run with one seed: another seed gives somewhat other figures. `tutelage compare` runs several and "
    "tells whether a difference is more than chance."
)
STATUS: dict[str, tuple[str, Tone]] = {
    "done": ("finished", "good"),
    "failed": ("failed", "bad"),
    "stopped": ("stopped", "bad"),
    "unfinished": ("no result yet", "bad"),
}


def run_part(run: Run, title: str | None = None, *, room: int = PICTURE_BYTES) -> Part:
    """Everything that is known of a run, as one part of a page; ``title`` where the page has several runs.

    ``room`` is how many bytes its pictures may take.
    """
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
        tiles=run_tiles(result),
        notices=_notices(run),
        sections=[
            _result_section(run),
            *own_tables(result),
            run_curves(run),
            *_answers(run, room),
            recipe_section(run.recipe, run.recipe_text, run_commands(run)),
            data_section(data),
            environment_section(run.environment, mapping(result.get("versions"))),
        ],
    )


def _answers(run: Run, room: int) -> list[Section]:
    """What single answers and layers tell, as far as the run kept it."""
    analysis = Analysis.of(run.analysis)
    sections = [layer_section(run.explained)]
    if analysis is not None:
        sections = [
            class_section(analysis),
            calibration_section(analysis),
            disagreement_section(analysis, room),
            embedding_section(mapping(run.analysis.get("embeddings")), analysis.classes),
            *sections,
        ]
    return [section for section in sections if section is not None]


def run_title(run: Run) -> str:
    """``nkd on cifar10``; the folder's name where neither is known."""
    names = method_names(run.recipe) or [str(name) for name in listed(run.result.get("methods"))]
    data = data_name(run.recipe)
    if not names:
        return run.folder.resolve().name
    return f"{' + '.join(names)} on {data}" if data else " + ".join(names)


def _progress(run: Run) -> str:
    """How far a run came that has not ended well, and what it had reached."""
    if run.status == "done" or not run.train:
        return ""
    last = run.train[-1]
    planned = mapping(run.recipe.get("train")).get("epochs")
    epoch = (
        f" in epoch {count(last['epoch'])}{f' of {count(planned)}' if planned else ''}"
        if last.get("epoch") is not None
        else ""
    )
    return f"It came to step {count(last['step'])}{epoch}.{_reached(run)}"


def _reached(run: Run) -> str:
    """The first metric of the last evaluation, for a run that has no metrics in its result."""
    metrics = mapping(run.evaluations[-1].get("metrics")) if run.evaluations else {}
    if not metrics or primary_metric(run.result) is not None:
        return ""
    metric, value = next(iter(metrics.items()))
    at = f"{run.evaluations[-1].get('split')} rows at step {count(run.evaluations[-1]['step'])}"
    return f" Last measured: {metric_value(metric, value, 1)} {in_sentence(metric)} on {at}."


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


def _result_section(run: Run) -> Section:
    result = run.result
    metrics = mapping(result.get(split_of(result)))
    tables = [against_teacher(result), by_group(result)] if metrics or mapping(result.get("student")) else []
    blocks: list[Block] = [table for table in tables if table is not None]
    if not metrics:
        last = last_evaluation(run)
        blocks.insert(0, last or Notice("No metrics were recorded: the student was never evaluated."))
    elif split_of(result) != "test":
        blocks.append(Notice("No test metrics were recorded; the figures are from validation rows."))
    if run.status == "done":
        blocks += [Text(text) for text in (_best(result), ONE_RUN) if text]
    return Section("Result", blocks)


def _best(result: dict[str, Any]) -> str:
    """What the best evaluation on validation rows was, since the student is the last step's."""
    best, steps = mapping(result.get("best")), number(result.get("steps"))
    if not best.get("metric") or number(best.get("value")) is None:
        return ""
    metric, step = str(best["metric"]), number(best.get("step"))
    told = (
        f"Best validation {in_sentence(metric)}: {metric_value(metric, best['value'])}, at step {count(step)}"
    )
    if step is None or steps is None:
        return f"{told}."
    return (
        f"{told}, the last." if step == steps else f"{told}; this student is the last step's, {count(steps)}."
    )
