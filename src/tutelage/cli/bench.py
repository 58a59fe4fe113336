"""`tutelage bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tutelage.cli import figures
from tutelage.cli.complete import bench_names
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Folders of runs or students, .pt2 and .onnx files, or names such as cifar:resnet8x4.",
            autocompletion=bench_names,
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once, for throughput and memory.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 5,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where torch models run.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; left out: each library's own choice.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile torch models first.")] = False,
    shape: Annotated[
        str | None, typer.Option("--input-shape", help="Of one row of models by name, such as 3,32,32.")
    ] = None,
    outputs: Annotated[int | None, typer.Option(min=1, help="Classes of models by name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side: latency of one row, throughput, peak memory, size. A run stands for its teachers,
    its student and what was exported from it. Each has a process of its own, and they take turns. A row of text is 128
    tokens, of packed text as many as the model was trained on.

    \b
    Examples
      tutelage bench runs/digits-kd-0
      tutelage bench cifar:resnet32x4 cifar:resnet8x4 --threads 1
      tutelage bench deploy/model.pt2 deploy/model.int8.onnx --json
    """
    from tutelage.cli.taps import shape_numbers

    with kept_for_json(as_json):
        from tutelage.export.bench import bench as measure
        from tutelage.export.targets import find_targets

        rows = shape_numbers(shape)
        targets = [target for text in models for target in find_targets(text, rows, outputs)]
        found = measure(
            targets,
            batch_size=batch_size,
            rounds=rounds,
            device=device,
            threads=threads,
            compiled=compiled,
        )
    if as_json:
        print_json(found)
    else:
        _print(found, batch_size)


def _print(found: list[dict[str, Any]], batch_size: int) -> None:
    rows = [
        [
            Path(model["model"]).name,
            figures.milliseconds(model["latency_ms"]["p50"]),
            figures.milliseconds(model["latency_ms"]["p90"]),
            f"{model['speed']:.2f} ×",
            figures.amount(model["rows_per_second"]),
            f"{model['memory'] / 2**20:.1f} MiB",
            "-" if model["disk"] is None else f"{model['disk'] / 2**20:.2f} MiB",
            figures.amount(model["parameters"]),
            figures.amount(model["flops"]),
            model["device"],
        ]
        for model in found
    ]
    columns = ["", "p50", "p90", "speed", "rows/s", "peak memory", "on disk", "parameters", "FLOPs", "device"]
    title = f"One row: latency, speed next to the first. {batch_size} rows at once: rows/s, peak memory"
    print_table(columns, rows, title=title, right=columns[1:-1])
