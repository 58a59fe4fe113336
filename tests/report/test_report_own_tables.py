"""A method's own tables: curves that are guessed, plots that are asked for, and pictures."""

from __future__ import annotations

from typing import Any

import torch

from tutelage.data.pictures import LARGEST_SIDE, png_uri
from tutelage.report.blocks import Figures, Pictures, Table
from tutelage.report.own_tables import own_tables


def blocks(columns: list[str], rows: list[list[Any]], **content: Any) -> dict[type, Any]:
    (section,) = own_tables({"tables": {"figures": {"columns": columns, "rows": rows, **content}}})
    return {type(block): block for block in section.blocks}


def test_a_plot_draws_what_it_names_in_the_rows_order() -> None:
    rows: list[list[Any]] = [[0, 0.3, 0.9, "a"], [1, 0.1, 0.8, "b"], [2, 0.2, None, "c"]]
    found = blocks(
        ["epoch", "cmi", "accuracy", "word"],
        rows,
        plots=[
            {"x": "cmi", "y": ["accuracy"]},
            {"x": "epoch", "y": ["cmi", "word", "missing"]},
            {"x": "word", "y": ["cmi"]},
        ],
    )
    drawn = found[Figures].figures
    assert [figure.title for figure in drawn] == ["Accuracy by cmi", "Cmi by epoch"]
    assert drawn[0].traces[0]["x"] == [0.3, 0.1]
    assert drawn[0].traces[0]["y"] == [0.9, 0.8]
    assert [trace["name"] for trace in drawn[1].traces] == ["cmi"]
    assert len(found[Table].rows) == 3


def test_shares_are_drawn_unasked() -> None:
    found = blocks(["step", "accuracy"], [[1, 0.5], [2, 0.6]])
    assert found[Figures].figures[0].title == "Shares by step"
    assert Figures not in blocks(["step", "norm"], [[1, 5.0], [2, 6.0]])


def test_pictures_are_shown_with_what_the_row_says() -> None:
    picture, other = png_uri(torch.rand(1, 8, 8)), png_uri(torch.rand(3, 8, 8))
    found = blocks(
        ["row", "class", "image", "map"], [[4, "cat", picture, other], [5, "dog", picture, "javascript:x"]]
    )
    shown = found[Pictures].pictures
    assert [item.source for item in shown] == [picture, other, picture]
    assert [name for name, _ in shown[0].facts] == ["Picture", "row", "class"]
    assert shown[1].description == "map: row 4, class cat"
    assert Table not in found


def test_png_uris() -> None:
    import base64
    import io

    from PIL import Image

    def size(uri: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size

    assert size(png_uri(torch.rand(1, 8, 6), least_side=20)) == (24, 32)
    assert size(png_uri(torch.rand(3, 400, 200))) == (LARGEST_SIDE // 2, LARGEST_SIDE)
    assert png_uri(torch.full((1, 2, 2), 7.0)) == png_uri(torch.ones(1, 2, 2))
