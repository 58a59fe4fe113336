"""What `tutelage bench` is given: runs, students, exported files and names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tutelage.export.errors import ExportError
from tutelage.export.reading import read_metadata
from tutelage.models.names import parse_name
from tutelage.models.table import default_input
from tutelage.models.weights import CARD, FILE
from tutelage.recipe import load_recipe
from tutelage.recipe.schema import ModelConfig, Recipe, TeacherConfig
from tutelage.runs.teachers import fingerprint, teacher_configs, teachers_root
from tutelage.untrusted import read_object

OUTPUTS = 10
TOKENS = 128
"""Of one row, where a model of text takes any number."""


@dataclass(frozen=True)
class Target:
    """One model to measure.

    Attributes:
        title: what the table calls it.
        kind: a folder that `save_model` wrote, a model to build with random weights, or an exported file.
        place: path, or the name of the model.
        options: arguments of the architecture.
        input_shape: of one row; of text its number of tokens.
        outputs: classes, values or tokens.
        task: of a model by name, which decides on its head.
        vocabulary: of a model by name that reads text: tokens of its tokeniser.
        parameters, flops: where they are known already.
        bytes: on disk.
    """

    title: str
    kind: Literal["folder", "name", "pt2", "onnx"]
    place: str
    input_shape: tuple[int, ...]
    outputs: int
    options: dict[str, Any]
    parameters: int | None = None
    flops: int | None = None
    bytes: int | None = None
    task: str = "classification"
    vocabulary: int | None = None

    def spec(self) -> dict[str, Any]:
        return asdict(self)


def find_targets(text: str, input_shape: tuple[int, ...] | None, outputs: int | None) -> list[Target]:
    """The models that an argument names; a run stands for its student, its teachers and what was exported from it.

    Args:
        input_shape, outputs: of models by name; left out: what the architecture was made for, and 10.

    Raises:
        ExportError: there is no such file, folder or model.
    """
    path = Path(text)
    if path.is_dir():
        if (path / "recipe.yaml").is_file():
            return list(_of_run(path))
        if (path / CARD).is_file():
            return [_folder(path, str(path))]
        raise ExportError(
            f"{path} is neither a run nor a student: it holds no recipe.yaml and no {CARD}; give a run's folder, a "
            "student's folder, an exported file, or the name of a model"
        )
    if path.suffix in (".pt2", ".onnx"):
        if not path.is_file():
            raise ExportError(f"there is no file {path}")
        return [_file(path, input_shape, outputs)]
    if ":" not in text:
        raise ExportError(
            f"there is no file or folder {text!r}, and a model's name says where it is from, as cifar:vgg8"
        )
    return [_named(text, {}, input_shape, outputs or OUTPUTS)]


def _of_run(run: Path) -> Iterator[Target]:
    if not (run / "student" / CARD).is_file():
        raise ExportError(f"{run} has no student yet; resume the run first")
    recipe = load_recipe(run / "recipe.yaml")
    student = _folder(run / "student", f"{run.name}: student")
    yield from _teachers(run, recipe, student)
    yield student
    export = run / "export"
    for file in sorted((*export.glob("*.pt2"), *export.glob("*.onnx"))):
        yield _file(file, None, None)


def _teachers(run: Path, recipe: Recipe, student: Target) -> Iterator[Target]:
    for name, config in teacher_configs(recipe).items():
        title = f"{run.name}: {name}"
        folder = _teacher_folder(run, name, config)
        if folder is not None and (folder / CARD).is_file():
            yield _folder(folder, title)
        elif config.model is not None:
            # Time and memory do not depend on the weights.
            named = _named(config.model, config.options, student.input_shape, student.outputs, title)
            yield replace(named, task=recipe.task, vocabulary=_vocabulary(run / "student"))


def _teacher_folder(run: Path, name: str, config: TeacherConfig) -> Path | None:
    kept = run / "teachers" / name
    if kept.is_dir():
        return kept
    if config.run is not None:
        return Path(config.run) / "student"
    if config.recipe is not None:
        return teachers_root() / fingerprint(load_recipe(config.recipe, config.overrides)) / "student"
    return None


def _vocabulary(student: Path) -> int | None:
    """Tokens of a student that reads text; none of another."""
    if not (student / "tokenizer.json").is_file():
        return None
    size = read_object(student / "config.json").get("vocab_size")
    return size if isinstance(size, int) else None


def _folder(folder: Path, title: str) -> Target:
    described = read_object(folder / CARD).get("description") or {}
    try:
        shape, outputs = tuple(map(int, described["input_shape"])), int(described["outputs"])
    except (KeyError, TypeError, ValueError):
        raise ExportError(f"{folder / CARD} does not say what the model takes and gives") from None
    size = (folder / FILE).stat().st_size if (folder / FILE).is_file() else None
    return Target(title, "folder", str(folder), shape or (TOKENS,), outputs, {}, bytes=size)


def _file(path: Path, input_shape: tuple[int, ...] | None, outputs: int | None) -> Target:
    found = read_metadata(path)
    shape = tuple(found["input"]["shape"][1:]) if found else input_shape
    if shape is None:
        raise ExportError(f"{path} does not say what rows it takes; give --input-shape")
    return Target(
        path.name,
        "pt2" if path.suffix == ".pt2" else "onnx",
        str(path),
        shape,
        found["output"]["shape"][1] if found else outputs or OUTPUTS,
        {},
        found.get("parameters"),
        found.get("flops"),
        path.stat().st_size,
    )


def _named(
    name: str,
    options: dict[str, Any],
    input_shape: tuple[int, ...] | None,
    outputs: int,
    title: str | None = None,
) -> Target:
    config = ModelConfig(model=name, options=options)
    family, rest = parse_name(config.model)
    shape = input_shape or default_input(family, rest)
    return Target(title or name, "name", name, shape, outputs, options)
