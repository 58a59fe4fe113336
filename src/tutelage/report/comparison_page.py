"""The page of a comparison."""

from __future__ import annotations

from typing import Any

import yaml

from tutelage.report.again import comparison_commands
from tutelage.report.blocks import Block, Notice, Part, Section, Text, Tone
from tutelage.report.comparison_figures import figures_section
from tutelage.report.facts import (
    data_name,
    data_section,
    environment_section,
    method_options,
    recipe_section,
    scale,
)
from tutelage.report.format import (
    duration,
    number,
)
from tutelage.report.leaderboard import leaderboard
from tutelage.report.records import Arm, Comparison, mapping
from tutelage.report.run_tables import by_seed, failures, further_metrics
from tutelage.report.styles import styles_for
from tutelage.report.tiles import comparison_tiles
from tutelage.report.tuning import tuning_section
from tutelage.report.verdict import comparison_verdict


def comparison_part(comparison: Comparison) -> Part:
    """Everything that is known of a comparison, as one part of a page."""
    recipe, environment = comparison.recipe, _environment(comparison)
    runs = [entry.run for entry in comparison.entries if entry.run is not None]
    data = next((found for run in runs if (found := mapping(run.result.get("data")))), {})
    styles = styles_for([arm.name for arm in comparison.arms], comparison.baseline)
    tuning = tuning_section(comparison, styles)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""
    return Part(
        eyebrow="Comparison",
        title=_title(comparison),
        verdict=comparison_verdict(comparison),
        chips=_chips(comparison, scale(recipe, data, environment)),
        tiles=comparison_tiles(comparison),
        notices=_notices(comparison),
        sections=[
            _section(
                "Leaderboard",
                leaderboard(comparison, styles),
                Text(_made_at(comparison, data, environment)),
                further_metrics(comparison, styles),
            ),
            figures_section(comparison, styles),
            *([tuning] if tuning is not None else []),
            _section("Every run", by_seed(comparison, styles), failures(comparison)),
            recipe_section(_as_compared(comparison), text, comparison_commands(comparison)),
            data_section(data),
            environment_section(environment, {}),
        ],
    )


def _section(title: str, *blocks: Block | None) -> Section:
    return Section(title, [block for block in blocks if block is not None])


def _made_at(comparison: Comparison, data: dict[str, Any], environment: dict[str, Any]) -> str:
    """The scale in one sentence, for who sees the leaderboard alone."""
    student = comparison.student.get("model") or mapping(comparison.recipe.get("student")).get("model")
    told = scale(comparison.recipe, data, environment)
    if name := data_name(comparison.recipe):
        told.insert(0, f"data {name}")
    told += [f"student {student}"] if student else []
    seeds = len(comparison.seeds)
    told += [f"{seeds} seed{'' if seeds == 1 else 's'}"] if seeds else []
    told += [str(environment[key]) for key in ("cpu", "gpu") if environment.get(key)]
    scaled = f"Made at this scale: {'; '.join(told)}. " if told else ""
    return f"{scaled}At another scale the order may be another."


def _title(comparison: Comparison) -> str:
    names = [arm.name for arm in comparison.arms]
    title = ", ".join(names) if 0 < len(names) <= 5 else f"{len(names)} methods"
    data = data_name(comparison.recipe)
    return f"{title} on {data}" if data else title


def _environment(comparison: Comparison) -> dict[str, Any]:
    own = mapping(comparison.data.get("environment"))
    found = [entry.run.environment for entry in comparison.entries if entry.run and entry.run.environment]
    return own or next(iter(found), {})


def _as_compared(comparison: Comparison) -> dict[str, Any]:
    """The recipe as the comparison used it: its methods and seeds in place of the recipe's own."""
    recipe = comparison.recipe
    if not recipe:
        return {}
    methods = [{"name": arm.name, **_options(arm)} for arm in comparison.arms]
    train = mapping(recipe.get("train")) | {"seed": ", ".join(comparison.seeds)}
    if any("train.optimizer.lr" in mapping(arm.tuning.get("chosen")) for arm in comparison.arms):
        train["optimizer"] = mapping(train.get("optimizer")) | {"lr": "tuned for each method"}
    return recipe | {"method": methods, "train": train}


def _options(arm: Arm) -> dict[str, Any]:
    """Every option that a method ran with, where its recipe tells them; else those that were asked for."""
    ran = list(method_options(arm.recipe).values())
    return ran[0] if len(ran) == 1 else arm.options


def _chips(comparison: Comparison, told: list[str]) -> list[tuple[str, Tone]]:
    done = sum(entry.status == "done" for entry in comparison.entries)
    failed = sum(entry.status == "failed" for entry in comparison.entries)
    state = f"{done} of {comparison.planned} runs finished" + (f", {failed} failed" if failed else "")
    chips: list[tuple[str, Tone]] = [(state, "good" if done and done == comparison.planned else "bad")]
    chips += [(text, "") for text in told]
    seeds = len(comparison.seeds)
    if seeds:
        chips.append((f"{seeds} seed{'' if seeds == 1 else 's'}", ""))
    if number(comparison.data.get("seconds")) is not None:
        chips.append((f"{duration(comparison.data.get('seconds'))} in all", ""))
    return chips


def _notices(comparison: Comparison) -> list[Notice]:
    notices = []
    if comparison.notes:
        notices.append(Notice(f"Not everything could be read. {' '.join(comparison.notes)}", "bad"))
    if not comparison.arms:
        notices.append(Notice("This comparison names no method yet.", "bad"))
    done = [entry for entry in comparison.entries if entry.status == "done"]
    away = sum(entry.run is None for entry in done)
    if away:
        text = (
            f"The folders of {away} of {len(done)} finished runs are not here, so their curves are missing."
        )
        notices.append(Notice(text))
    return notices
