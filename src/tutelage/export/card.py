"""The model card: what the student is, what it can do and where it comes from, in figures of its own run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage import catalogue
from tutelage.export.deployed import without_place
from tutelage.export.licences import UNKNOWN, data_licence, teacher_licence
from tutelage.export.subject import Subject
from tutelage.recipe import dump
from tutelage.recipe.schema import Recipe, TeacherConfig

Json = Mapping[str, Any]

LOADING = {
    "timm": 'timm.create_model("local-dir:<this folder>", pretrained=True)   # input normalisation: config.json',
    "hf": "{kind}.from_pretrained(<this folder>)   # input normalisation: tutelage.json",
    "text": "{kind}.from_pretrained(<this folder>), AutoTokenizer.from_pretrained(<this folder>)",
    "other": "tutelage.models.load_model(<this folder>)   # input normalisation: tutelage.json",
    "torch": 'torch.export.load("model.pt2").module()',
    "onnx": 'onnxruntime.InferenceSession("model.onnx").run(None, {{"inputs": rows}})',
    "int8": 'import torchao.quantization.pt2e; torch.compile(torch.export.load("model.int8.pt2").module())',
    "int4": 'torch.export.load("model.int4.pt2").module()',
    "onnx-int8": 'onnxruntime.InferenceSession("model.int8.onnx").run(None, {{"inputs": rows}})',
}
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def card(subject: Subject, record: Json) -> str:
    """README.md of an export.

    Args:
        record: what ``export.json`` keeps.

    Returns:
        Markdown with the hub's front matter. Whatever comes from data, recipe or result is escaped.
    """
    parts = [
        f"---\n{_front_matter(subject, record)}\n---\n",
        f"# {_text(_title(subject))}\n",
        _what(subject),
        "## Figures\n",
        _figures(subject),
        "## Files\n",
        _files(subject, record),
        "## Where it comes from\n",
        _origin(subject),
        "## Recipe\n",
        _fenced(dump(_without_places(subject.recipe)), "yaml"),
    ]
    return "\n".join(parts)


def _title(subject: Subject) -> str:
    return (
        f"{without_place(subject.built.description['model'])}, distilled by {_method_names(subject.recipe)}"
    )


def _front_matter(subject: Subject, record: Json) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, result = subject.recipe, subject.result
    metrics = _metrics(result.get("test") or result.get("validation"))
    split = "test" if result.get("test") else "validation"
    name = recipe.data.path
    published = _HUB_NAME.fullmatch(name) and not Path(name).exists() and name not in ("digits", "markov")
    task = _task(subject)
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type=name if published else "local",
            dataset_name=Path(name).name,
            dataset_revision=recipe.data.revision,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
    family = subject.built.description["model"].partition(":")[0]
    library = {"timm": "timm", "hf": "transformers", "config": "transformers"}.get(family, "pytorch")
    data = ModelCardData(
        library_name=library if "safetensors" in record["formats"] else "pytorch",
        pipeline_tag=None if task.startswith("tabular") else task,
        tags=["knowledge-distillation", *sorted({method.name for method in recipe.method})],
        datasets=[name] if published else None,
        metrics=list(metrics) or None,
        model_name=_title(subject),
        eval_results=evaluations or None,
    )
    return str(data.to_yaml()).strip()


def _what(subject: Subject) -> str:
    return f"Input: {_input(subject)}\n\nOutput: {_output(subject)}.\n"


def _input(subject: Subject) -> str:
    if subject.reads_text:
        return "token ids, as the tokeniser in this folder makes them of text."
    shape = " × ".join(map(str, subject.built.description["input_shape"]))
    image = len(subject.built.description["input_shape"]) == 3
    rows = f"images of {shape} (channels, height, width), float32 in [0, 1]" if image else f"rows of {shape}"
    return (
        f"{rows}. Input normalisation is inside every graph (.pt2, .onnx); weights alone (safetensors) "
        f"want normalised rows, mean {_values(subject.built.mean)}, standard deviation "
        f"{_values(subject.built.std)}."
    )


def _output(subject: Subject) -> str:
    names, outputs = subject.class_names, subject.built.description["outputs"]
    classes = f": {', '.join(map(_text, names))}" if names and len(names) <= 100 else ""
    given = {
        "classification": f"logits of {outputs} classes{classes}",
        "token-classification": f"logits of {outputs} classes for each token{classes}",
        "language-model": f"logits of the next token, of {outputs}, for each token",
    }
    return given.get(subject.recipe.task, f"{outputs} values a row")


def _figures(subject: Subject) -> str:
    result = subject.result
    split = "test" if result.get("test") else "validation"
    models = {"student": result.get("student") or {}, **(result.get("teachers") or {})}
    found = {
        name: result.get(split) if name == "student" else model.get(split) for name, model in models.items()
    }
    metrics = list(_metrics(result.get(split)))
    head = ["", "model", *metrics, "parameters", "FLOPs a row", "latency, one row"]
    rows = [
        [
            name,
            without_place(str(model.get("model", "-"))),
            *(_number((found[name] or {}).get(metric)) for metric in metrics),
            _number(model.get("parameters")),
            _number(model.get("flops")),
            f"{_number(model.get('latency_ms'))} ms",
        ]
        for name, model in models.items()
    ]
    count = ((result.get("data") or {}).get("rows") or {}).get(split)
    rounded = subject.recipe.train.quantize
    note = [
        f"Metrics: {count or 'all'} {split} rows, one run, seed {result.get('seed')}.",
        f"They are those of the student with its weights rounded to {rounded}." if rounded else "",
        f"Latency: eager PyTorch in float32 on {_device(subject)}.",
    ]
    return f"{_table(head, rows)}\n\n{_text(' '.join(filter(None, note)))}\n"


def _files(subject: Subject, record: Json) -> str:
    before = record["float_metrics"]
    rows, notes = [], []
    for name, entry in record["formats"].items():
        check = entry["check"]
        agreement = check.get("agreement")
        rows.append(
            [
                name,
                ", ".join(entry["files"]),
                f"{entry['bytes']:,}",
                f"{check['largest_difference']:.2g}",
                "-" if agreement is None else f"{100 * agreement:.1f} %",
                entry["checked_on"],
            ]
        )
        notes += _quantised(name, entry, before, record)
    head = ["format", "files", "bytes", "largest difference of a logit", "same answer", "checked on"]
    loading = [_loading(name, subject) for name in record["formats"]]
    lines = "".join(f"- {_text(note)}\n" for note in notes)
    return f"{_table(head, rows)}\n\n{lines}\n{_fenced(chr(10).join(loading), 'python')}"


def _quantised(name: str, entry: Json, before: Json, record: Json) -> list[str]:
    if "quantised" not in entry:
        return []
    shares, metrics = entry["quantised"], entry.get("metrics") or {}
    changes = ", ".join(
        f"{metric} {_number(before.get(metric))} → {_number(metrics[metric])}" for metric in _metrics(metrics)
    )
    left = shares["left"]
    more = f" and {len(left) - 8} more" if len(left) > 8 else ""
    return [
        f"{name}: {100 * shares['parameters']:.1f} % of the parameters and {100 * shares['flops']:.1f} % of the FLOPs "
        f"are quantised; floats stay in {', '.join(left[:8]) + more if left else 'no layer with weights'}. "
        f"{record['student_bytes']:,} → {entry['bytes']:,} bytes"
        + (
            ""
            if entry["bytes"] < record["student_bytes"]
            else " (not smaller: so small a model is mostly graph)"
        )
        + (f"; {record['split']} {changes}." if changes else ".")
    ]


def _loading(name: str, subject: Subject) -> str:
    family = subject.built.description["model"].partition(":")[0]
    kind = {"timm": "timm", "hf": "hf", "config": "hf"}.get(family, "other")
    kind = "text" if subject.reads_text else kind
    key = kind if name == "safetensors" else name
    return LOADING[key].format(kind=type(subject.built.module).__name__)


def _origin(subject: Subject) -> str:
    recipe, result = subject.recipe, subject.result
    data = result.get("data") or {}
    lines = [_method(method.name) for method in recipe.method]
    for name, config in _teachers(recipe).items():
        model = (result.get("teachers") or {}).get(name, {}).get("model") or config.model or "?"
        licence = teacher_licence(config)
        made = (
            f"weights {without_place(config.weights)}, licence {licence}" if config.weights else _made(config)
        )
        revision = f", revision {config.revision}" if config.revision else ""
        lines.append(f"Teacher {_text(name)}: {_text(f'{without_place(model)} ({made}{revision})')}.")
    revision = recipe.data.revision or UNKNOWN
    lines.append(
        _text(
            f"Data: {without_place(recipe.data.path)}, revision "
            f"{revision}, licence {data_licence(recipe)}; rows: {_pairs(data.get('rows') or {})}; fingerprint "
            f"{data.get('fingerprint', UNKNOWN)}."
        )
    )
    versions = (subject.environment.get("packages") or {}).items()
    lines.append(_text(f"Seed {result.get('seed')}; {_pairs(dict(versions))}."))
    lines.append("The licence of these weights is for whoever publishes them to state.")
    return "".join(f"- {line}\n" for line in lines)


def _made(config: TeacherConfig) -> str:
    if config.run is not None or config.recipe is not None:
        return "trained by a recipe of its own"
    return "no published weights"


def _method(name: str) -> str:
    paper = catalogue.load(name).paper
    where = ", ".join(str(part) for part in (paper.venue, paper.year) if part)
    link = f" ([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))" if paper.arxiv else ""
    return f"Method {_text(name)}: {_text(paper.title)}{_text(f', {where}') if where else ''}{link}."


def _teachers(recipe: Recipe) -> dict[str, TeacherConfig]:
    if recipe.teacher is None:
        return {}
    return {"teacher": recipe.teacher} if isinstance(recipe.teacher, TeacherConfig) else dict(recipe.teacher)


def _method_names(recipe: Recipe) -> str:
    return " + ".join(method.name for method in recipe.method)


def _task(subject: Subject) -> str:
    """What the hub calls it."""
    task = subject.recipe.task
    if subject.reads_text:
        return {"classification": "text-classification", "language-model": "text-generation"}.get(task, task)
    if task == "classification" and len(subject.built.description["input_shape"]) == 3:
        return "image-classification"
    return f"tabular-{task}"


def _metrics(values: Json | None) -> dict[str, float]:
    """Metrics of all rows together; those of groups of rows are named after data."""
    return {name: value for name, value in (values or {}).items() if "[" not in name and value is not None}


def _device(subject: Subject) -> str:
    device = subject.environment.get("device", "an unknown device")
    return str(subject.environment.get("cpu", "a CPU")) if device == "cpu" else str(device)


def _pairs(values: Json) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or UNKNOWN


def _values(values: Iterable[float] | None) -> str:
    return "none" if values is None else _text("(" + ", ".join(f"{value:.4g}" for value in values) + ")")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head)]
    shown = ["| " + " | ".join(map(_text, head)) + " |", "| " + " | ".join(lines[1]) + " |"]
    return "\n".join([*shown, *("| " + " | ".join(map(_text, row)) + " |" for row in rows)])


def _text(value: Any) -> str:
    """Plain text in Markdown: nothing in it is markup, and it is one line."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe with folders of this machine cut down to their names."""
    content = recipe.model_dump(mode="json")
    content["output"]["dir"] = None

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        return without_place(value) if isinstance(value, str) else value

    return Recipe.model_validate_json(json.dumps(cut(content)))


def _fenced(text: str, language: str) -> str:
    """A block that no run of backticks in the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
