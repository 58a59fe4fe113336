"""Sections that runs and comparisons share: the recipe in a few lines, how to run it again, data, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.report.blocks import Block, Code, Facts, Folded, Notice, Section
from tutelage.report.format import count, plain
from tutelage.report.records import mapping, mappings

LONGEST = 400
"""Characters of one value in a list of facts; longer ones stand whole in the recipe."""
LABELS = {"cpu": "CPU", "gpu": "GPU", "torch": "PyTorch", "tutelage": "tutelage"}


def value_text(value: object) -> str:
    """Any JSON value on one line: lists with commas, mappings as ``key: value``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return plain(value, 6)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "none"
    text = str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def facts_of(content: Mapping[str, Any]) -> Facts:
    """What a mapping says, a line a key (``Rows`` – ``train: 300, test: 1 000``), without what is empty."""
    told = [(key, value) for key, value in content.items() if value not in (None, [], {}, "")]
    return Facts([(_label(key), value_text(value)) for key, value in told])


def _label(key: str) -> str:
    words = key.replace("_", " ")
    return LABELS.get(key) or words[:1].upper() + words[1:]


def method_names(recipe: Mapping[str, Any]) -> list[str]:
    method = recipe.get("method")
    named = method if isinstance(method, list) else [method]
    return [str(item.get("name")) if isinstance(item, dict) else str(item) for item in named if item]


def method_options(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of the recipe's methods by name, where they are written out."""
    method = recipe.get("method")
    named = mappings(method if isinstance(method, list) else [method])
    return {str(item.get("name")): {k: v for k, v in item.items() if k != "name"} for item in named}


def data_name(recipe: Mapping[str, Any]) -> str:
    """The last part of the data's path: ``cifar10``."""
    return str(mapping(recipe.get("data")).get("path") or "").rstrip("/").rpartition("/")[2]


def scale(recipe: Mapping[str, Any], data: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """At what scale figures were made: rows, length of training, device. What is unknown is left out."""
    train = mapping(recipe.get("train"))
    rows = train_rows(data)
    told = [f"{count(rows)} training rows" if rows is not None else ""]
    told += [f"{count(train[unit])} {unit}" for unit in ("epochs", "steps") if train.get(unit)]
    device, threads = environment.get("device"), environment.get("threads")
    if device:
        where = "CPU" if device == "cpu" else str(device)
        told.append(
            f"{where}, {value_text(threads)} thread{'' if threads == 1 else 's'}"
            if device == "cpu" and threads
            else where
        )
    return [text for text in told if text]


def train_rows(data: Mapping[str, Any]) -> int | None:
    """Training rows, wherever the description of the data has them (``rows.train`` or ``train``)."""
    for place in (mapping(data.get("rows")), data):
        rows = place.get("train")
        if isinstance(rows, dict):
            rows = rows.get("rows")
        if isinstance(rows, int) and not isinstance(rows, bool):
            return rows
    return None


def recipe_facts(recipe: Mapping[str, Any]) -> Facts:
    """The lines of a recipe that tell a reader what was done."""
    train = mapping(recipe.get("train"))
    optimizer, schedule = mapping(train.get("optimizer")), mapping(train.get("schedule"))
    length = " / ".join(
        f"{value_text(train[unit])} {unit}" for unit in ("epochs", "steps") if train.get(unit)
    )
    facts = [
        ("Task", recipe.get("task")),
        ("Data", mapping(recipe.get("data")).get("path")),
        ("Student", _model_text(recipe.get("student"))),
        ("Teacher", _model_text(recipe.get("teacher"))),
        *((f"Method {name}" if name else "Method", text) for name, text in _methods(recipe)),
        ("Length", length),
        ("Batch size", train.get("batch_size")),
        ("Optimiser", _named(optimizer)),
        ("Schedule", _named(schedule)),
        ("Precision", train.get("precision")),
        ("Seed", train.get("seed")),
    ]
    return Facts([(name, value_text(value)) for name, value in facts if value not in (None, "")])


def _methods(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = method_options(recipe)
    if not options:
        return [("", name) for name in method_names(recipe)]
    return [(name, _options(given) or "default options") for name, given in options.items()]


def _named(options: dict[str, Any]) -> str:
    rest = _options({key: value for key, value in options.items() if key != "name"})
    name = str(options.get("name") or "")
    return f"{name} ({rest})" if name and rest else name


def _options(options: Mapping[str, Any]) -> str:
    given = {key: value for key, value in options.items() if value not in (None, {}, [], "")}
    return ", ".join(f"{key} {value_text(value)}" for key, value in given.items())


def _model_text(model: object) -> str:
    config = mapping(model)
    for key in ("model", "run", "recipe", "store", "endpoint"):
        if config.get(key):
            weights = f", weights {config['weights']}" if config.get("weights") else ""
            return f"{'' if key == 'model' else key + ' '}{config[key]}{weights}"
    return "; ".join(
        f"{name}: {_model_text(inner)}" for name, inner in config.items() if isinstance(inner, dict)
    )


def recipe_section(recipe: Mapping[str, Any], text: str, commands: Sequence[tuple[str, str]]) -> Section:
    blocks: list[Block] = (
        [recipe_facts(recipe)]
        if recipe
        else [Notice("The recipe is missing, so what was run cannot be told.")]
    )
    blocks += [Code(label, command) for label, command in commands]
    if text:
        blocks.append(
            Folded("The whole recipe, every option resolved", [Code("recipe.yaml", text.rstrip("\n"))])
        )
    return Section("What was run, and how to run it again", blocks, short="Recipe")


def data_section(data: Mapping[str, Any]) -> Section:
    block: Block = facts_of(data) if data else Notice("No description of the data was recorded.")
    return Section("Data", [block])


def environment_section(environment: Mapping[str, Any], versions: Mapping[str, Any]) -> Section:
    machine = {key: value for key, value in environment.items() if key != "packages"}
    packages = {**mapping(environment.get("packages")), **versions}
    blocks: list[Block] = [facts_of(machine) if machine else Notice("The environment was not recorded.")]
    if packages:
        versions_told = [(name, value_text(version)) for name, version in packages.items()]
        blocks.append(Folded(f"Versions of {len(packages)} packages", [Facts(versions_told)]))
    return Section("Environment", blocks)
