"""`tutelage taps`."""

from __future__ import annotations

from typing import Annotated

import typer

from tutelage.cli.complete import model_names
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table


def taps(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model by name, such as timm:resnet18.", autocompletion=model_names
        ),
    ],
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one row, such as 3,224,224; left out: what the architecture is made for."
        ),
    ] = None,
    outputs: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 10,
    as_json: AsJson = False,
) -> None:
    """List what can be tapped in a model: module paths in firing order, with shape and depth.

    Methods that match features take these paths, and patterns of them: layer*.1 (any part of a path), **.attn (any
    depth), layer3.-1 (the last child), -1 (the last stage), head:in (what the classifier gets). Weights are random:
    nothing is downloaded.

    \b
    Examples
      tutelage taps cifar:resnet8x4
      tutelage taps timm:vit_tiny_patch16_224 --json
    """
    from tutelage.models import tap_table

    with kept_for_json(as_json):
        found = tap_table(model, outputs=outputs, input_shape=shape_numbers(shape))
    if as_json:
        print_json([tap._asdict() for tap in found])
        return
    rows = [
        [
            tap.path,
            tap.kind,
            "-" if tap.shape is None else " × ".join(map(str, tap.shape)),
            f"{100 * tap.depth:.0f} %",
        ]
        for tap in found
    ]
    print_table(["path", "module", "shape of a row", "depth"], rows, title=model, right=["depth"])


def shape_numbers(shape: str | None) -> tuple[int, ...] | None:
    """The shape in an option, such as 3,32,32."""
    try:
        numbers = tuple(int(side) for side in shape.split(",")) if shape is not None else None
    except ValueError:
        numbers = ()
    if numbers is not None and (not numbers or min(numbers) < 1):
        raise typer.BadParameter(f"got {shape!r}; give whole numbers with commas between, such as 3,32,32")
    return numbers
