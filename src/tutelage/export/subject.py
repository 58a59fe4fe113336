"""What is exported: the student of a finished run, with rows to hold files against."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Data, open_data
from tutelage.engine.evaluate import Predict, evaluate
from tutelage.engine.rng import derive_seed
from tutelage.engine.types import Inputs, Outputs
from tutelage.engine.views import to_float
from tutelage.export.deployed import INPUT, OUTPUT, Deployed, deployed, without_place
from tutelage.export.errors import ExportError
from tutelage.models import BuiltModel, load_model
from tutelage.models.weights import find_weights, load_strict
from tutelage.recipe import load_recipe
from tutelage.recipe.schema import Recipe
from tutelage.runs.vocabulary import own_tokenizer
from tutelage.tasks import build_task
from tutelage.untrusted import read_object

ROWS = 64
"""Rows that files are held against."""
TEXTS = 4
"""The same, of text: a language model's logits are many."""
TOKENS = 32
"""Of a random row, where texts have unequal lengths."""
CALIBRATION = 256
"""Training rows that show a static quantisation which values occur; their labels are not looked at."""


@dataclass
class Subject:
    """A finished run, on the CPU.

    Attributes:
        built: the plain student.
        data: of the recipe; none where it cannot be had any more, for ``why_no_data``.
    """

    folder: Path
    recipe: Recipe
    result: dict[str, Any]
    environment: dict[str, Any]
    built: BuiltModel
    data: Data | None
    why_no_data: str | None

    @functools.cached_property
    def model(self) -> Deployed:
        return deployed(self.built)

    @property
    def reads_text(self) -> bool:
        """Whether rows are tokens."""
        return getattr(self.built.module, "main_input_name", None) == "input_ids"

    @functools.cached_property
    def inputs(self) -> Inputs:
        """Held-out rows as the data gives them; random ones where there is no data."""
        count = TEXTS if self.reads_text else ROWS
        if self.data is None:
            return self._random(count)
        source = self.data.test or self.data.validation or self.data.train
        return to_float(source.fetch(list(range(min(count, len(source)))))).inputs

    @property
    def rows(self) -> Tensor:
        """The same, for what takes one tensor.

        Raises:
            ExportError: they are several named tensors.
        """
        return self._one(self.inputs)

    def _random(self, count: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shape = self.built.description["input_shape"]
        if not self.reads_text:
            return torch.rand(count, *shape, generator=generator)
        model: Any = self.built.module
        tokens = model.get_input_embeddings().num_embeddings
        return {"input_ids": torch.randint(tokens, (count, *(shape or [TOKENS])), generator=generator)}

    @property
    def rows_are(self) -> str:
        """What `inputs` are, in words."""
        if self.data is None:
            return f"random rows, since the data cannot be had ({self.why_no_data})"
        split = next(s for s in ("test", "validation", "train") if getattr(self.data, s) is not None)
        return f"{split} rows"

    @functools.cached_property
    def expected(self) -> Tensor:
        """The student's own logits of `inputs`."""
        with torch.no_grad():
            logits: Tensor = self.model(self.inputs)
        return logits

    @functools.cached_property
    def calibration(self) -> Tensor:
        """Training rows, drawn by the run's seed, without their labels.

        Raises:
            ExportError: there is no data.
        """
        if self.data is None:
            raise ExportError(
                f"int8 looks at training rows to find the range of every layer, and the data of {self.folder} cannot "
                f"be had: {self.why_no_data}"
            )
        seed = derive_seed(self.recipe.train.seed, "calibration") % 2**63
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
        return self._one(to_float(self.data.train.fetch(order[:CALIBRATION].tolist())).inputs)

    @property
    def class_names(self) -> list[str] | None:
        return None if self.data is None else self.data.info.class_names

    def described(self, quantised: str | None = None) -> dict[str, Any]:
        """What a file says of itself.

        Args:
            quantised: how, in words; none: the file holds floats.
        """
        shape = list(self.built.description["input_shape"])
        return {
            "producer": f"tutelage {version('tutelage')}",
            "model": without_place(self.built.description["model"]),
            "input": {
                "name": INPUT,
                "dtype": "float32",
                "shape": ["batch", *shape],
                "range": "[0, 1]" if len(shape) == 3 else "as in the data",
            },
            "normalisation": {"inside": True, "mean": self.built.mean, "std": self.built.std},
            "output": {"name": OUTPUT, "shape": ["batch", self.built.description["outputs"]]},
            "classes": self.class_names,
            "quantised": quantised,
            "parameters": sum(parameter.numel() for parameter in self.built.module.parameters()),
            "flops": (self.result.get("student") or {}).get("flops"),
        }

    def metrics(self, predict: Any) -> dict[str, float]:
        """Metrics on test data (validation data where there is none); empty without either.

        Args:
            predict: rows as the data gives them to logits.
        """
        source = self.data and (self.data.test or self.data.validation)
        if not source:
            return {}

        def outputs(batch: Any) -> Outputs:
            return Outputs(predict(batch.inputs))

        return self._evaluate(outputs, source)

    def _evaluate(self, outputs: Predict, source: Any) -> dict[str, float]:
        assert self.data is not None
        task = build_task(self.recipe.task, self.data.info.outputs, class_names=self.class_names)
        names = [name for name in self.recipe.evaluation.metrics if not task.metrics((name,))[name].teacher]
        size = self.recipe.evaluation.batch_size
        return evaluate(outputs, source, task, names=tuple(names), batch_size=size, device="cpu")

    def _one(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, dict):
            raise ExportError(
                f"rows of {self.recipe.data.path} are several named tensors ({', '.join(inputs)}); students of one "
                "input tensor can be exported, others as safetensors"
            )
        return inputs.float()


def open_subject(folder: Path, student: nn.Module | None = None) -> Subject:
    """Read a finished run.

    Args:
        student: the architecture, where it came from Python; the run's weights are loaded into it.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ModelError: its student cannot be built, or the weights do not fit ``student``.
    """
    result = folder / "result.json"
    if not result.is_file() or read_object(result).get("status") != "done":
        raise FileNotFoundError(
            f"{folder} holds no finished run; give the folder that `tutelage run` printed, or resume it first"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    environment = folder / "environment.json"
    data, reason = _data(recipe)
    found = read_object(result)
    return Subject(
        folder,
        recipe,
        found,
        read_object(environment) if environment.is_file() else {},
        _built(folder, recipe, found, student),
        data,
        reason,
    )


def _built(folder: Path, recipe: Recipe, result: dict[str, Any], student: nn.Module | None) -> BuiltModel:
    if student is None:
        built = load_model(folder / "student", trust_remote_code=recipe.student.trust_remote_code)
    else:
        weights = find_weights(str(folder / "student"), None)
        load_strict(student, weights)
        data = result["data"]
        description = {
            "model": type(student).__name__,
            "input_shape": data["input_shape"],
            "outputs": data["outputs"],
        }
        built = BuiltModel(student, weights.card.get("mean"), weights.card.get("std"), description)
    built.module.eval().requires_grad_(False)
    return built


def _data(recipe: Recipe) -> tuple[Data | None, str | None]:
    try:
        return open_data(recipe.data, recipe.task, own_tokenizer(recipe.student)), None
    except (ValueError, OSError) as error:
        return None, str(error).splitlines()[0]
