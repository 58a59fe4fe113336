"""Where a finished student thinks like its teacher: linear CKA between their layers, written as ``explain.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.engine.loading import Source
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch
from tutelage.engine.views import to_float
from tutelage.functional.similarity import linear_cka
from tutelage.models import load_model
from tutelage.recipe import load_recipe
from tutelage.runs.assemble import Assembly, assemble
from tutelage.runs.batch import write_json
from tutelage.runs.result import read_result
from tutelage.runs.teachers import teacher_configs

FILE = "explain.json"
LOGITS = "logits"


def explain(folder: Path | str, *, rows: int = 512) -> dict[str, Any]:
    """Compare every stage of a run's student with every stage of its teachers, on held-out rows. Of text, a layer's
    feature of a row is the mean over its tokens.

    Args:
        folder: a finished run. ``explain.json`` and the report are written there.
        rows: how many; fewer where there are fewer. Few rows of many features make CKA high by chance.

    Returns:
        ``split`` and ``rows``; the ``student``'s layers; by teacher its layers and ``cka`` ``[student][teacher]``,
        shares from 0 to 1. The last layer of each is its logits.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: fewer than two rows, or a run without a teacher.
    """
    folder = Path(folder)
    if rows < 2:
        raise ValueError(f"rows is {rows}; allowed: 2 and above")
    result = read_result(folder)
    if result is None or result["status"] != "done":
        raise FileNotFoundError(
            f"{folder} holds no finished run; give the folder that `tutelage run` printed, or resume it first"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.teacher is None:
        raise ValueError(
            f"{folder} was trained without a teacher; there is nothing to compare its student with"
        )
    assembly = assemble(recipe)
    if not assembly.live_teachers:
        raise ValueError(
            f"{folder} learned from a store ({', '.join(assembly.teachers)}), which has no layers to look into; "
            "explain a run that had the model"
        )
    found = _compare(assembly, folder, rows)
    write_json(folder / FILE, found)
    return found


def _compare(assembly: Assembly, folder: Path, rows: int) -> dict[str, Any]:
    split, source = _held_out(assembly)
    positions = range(min(rows, len(source)))
    built = load_model(folder / "student", trust_remote_code=assembly.recipe.student.trust_remote_code)
    batches = _Batches(assembly, source, positions)
    ours = batches.layers(assembly.recipe.student.model, Tapped(built.module, mean=built.mean, std=built.std))
    teachers = {}
    for name, teacher in assembly.live_teachers.items():
        held, kept = teacher.held, folder / "teachers" / name
        if kept.is_dir():  # it learned in this run
            trusted = teacher_configs(assembly.recipe)[name].trust_remote_code
            own = load_model(kept, trust_remote_code=trusted)
            held = Tapped(own.module, mean=own.mean, std=own.std)
        theirs = batches.layers(assembly.teacher_models[name].name, held)
        cka = [[round(float(linear_cka(x, y)), 4) for y in theirs.values()] for x in ours.values()]
        teachers[name] = {
            "model": assembly.teacher_models[name].name,
            "layers": list(theirs),
            "cka": cka,
        }
    student = {"model": assembly.recipe.student.model, "layers": list(ours)}
    return {"split": split, "rows": len(positions), "student": student, "teachers": teachers}


def _held_out(assembly: Assembly) -> tuple[str, Source]:
    data = assembly.data
    splits = {"test": data.test, "validation": data.validation, "train": data.train}
    return next((name, source) for name, source in splits.items() if source is not None)


class _Batches:
    """The rows that every model is shown."""

    def __init__(self, assembly: Assembly, source: Source, positions: range) -> None:
        size, device = assembly.recipe.evaluation.batch_size, assembly.runtime.device
        self.device = device
        self.batches: list[Batch] = [
            to_float(source.fetch(positions[start : start + size]).to(device))
            for start in range(0, len(positions), size)
        ]

    @torch.no_grad()
    def layers(self, name: str, model: Tapped) -> dict[str, Tensor]:
        """Features ``[rows, width]`` of every stage by its path, and the logits; of text, the mean over its tokens."""
        model = model.to(self.device).eval()
        example = self.batches[0].inputs
        spec = ModelSpec.of(name, model.model, model.normalise(example))
        found: dict[str, list[Tensor]] = {path: [] for path in (*spec.stages(), LOGITS)}
        for batch in self.batches:
            outputs = outputs_of(model(batch.inputs, spec.stages()))
            for path, parts in found.items():
                parts.append(_by_row(outputs.logits if path == LOGITS else outputs.features[path], batch))
        return {path: torch.cat(parts) for path, parts in found.items()}


def _by_row(feature: Tensor, batch: Batch) -> Tensor:
    """``[rows, width]`` in float32."""
    feature = feature.float()
    ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, dict) else None
    if ids is None or feature.dim() != 3 or feature.shape[:2] != ids.shape:
        return feature.flatten(1)
    assert isinstance(batch.inputs, dict)
    counted = batch.inputs.get("attention_mask", torch.ones_like(ids))[..., None]
    return (feature * counted).sum(1) / counted.sum(1)
