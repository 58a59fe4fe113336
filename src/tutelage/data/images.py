"""Images of a table, decoded when they are first asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.cache import SharedRows
from tutelage.data.source import ArraySource, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


@dataclass(frozen=True)
class Format:
    """What every image of a data set is brought to.

    Attributes:
        mode: ``L`` (grey) or ``RGB``, as the first row is; the others are converted.
        side: images are scaled so that their shorter side has this many pixels, and cut to the square in the middle.
            None: they stay as they are.
        height, width: of the result; images of another size are refused.
    """

    mode: str
    side: int | None
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1 if self.mode == "L" else 3, self.height, self.width)


class ImageTable:
    """One column of encoded images of a split.

    Args:
        rows: the split, giving arrow tables of that column.
        column: its name.
        split: the split's name, for messages.
        roots: folders in which the files lie that rows may name. A table from elsewhere could name any file.
    """

    def __init__(self, rows: Any, column: str, split: str, roots: Sequence[Path]) -> None:
        self.rows, self.column, self.split = rows, column, split
        # As the library names files, and as they are given.
        self.roots = [place for root in roots for place in (root.resolve(), root.absolute())]

    def format(self, side: int | None) -> Format:
        """What row 0 is."""
        image = self._open(self._entries([0])[0], 0)
        mode = plain_mode(image)
        pixels = _pixels(image, mode, side)
        return Format(mode, side, pixels.shape[1], pixels.shape[2])

    def read(self, ids: Sequence[int], wanted: Format) -> Tensor:
        """Decoded rows ``[rows, channels, height, width]`` uint8.

        Raises:
            DataError: an image that cannot be read, or has another size.
        """
        decoded = np.empty((len(ids), *wanted.shape), dtype=np.uint8)
        for position, (entry, row) in enumerate(zip(self._entries(ids), ids, strict=True)):
            pixels = _pixels(self._open(entry, row), wanted.mode, wanted.side)
            if pixels.shape != wanted.shape:
                raise DataError(
                    f"the image of row {row} of split {self.split!r} is {pixels.shape[2]}×{pixels.shape[1]} pixels, "
                    f"the first training row's is {wanted.width}×{wanted.height}; "
                    "set data.image_size to bring all to one size"
                )
            decoded[position] = pixels
        return torch.from_numpy(decoded)

    def _entries(self, ids: Sequence[int]) -> list[dict[str, Any] | None]:
        found = self.rows[list(ids)].column(self.column).to_pylist() if len(ids) else []
        return [{"bytes": entry, "path": None} if isinstance(entry, bytes) else entry for entry in found]

    def _open(self, entry: dict[str, Any] | None, row: int) -> Image:
        """The image with its pixels loaded, turned upright as its metadata says."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        if entry is None or (entry["bytes"] is None and entry["path"] is None):
            raise DataError(f"the image of row {row} of split {self.split!r} is missing")
        if entry["bytes"] is None:
            self._refuse_outside(entry["path"], row)
        try:
            encoded = Path(entry["path"]).read_bytes() if entry["bytes"] is None else entry["bytes"]
            image = Image.open(io.BytesIO(encoded))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            place = f" ({entry['path']})" if entry["path"] else ""
            reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(
                f"the image of row {row} of split {self.split!r}{place} cannot be read: {reason}; "
                "mend or remove it"
            ) from error
        if image.mode not in _GREY | _COLOUR:
            raise DataError(
                f"the image of row {row} of split {self.split!r} has the mode {image.mode!r}; "
                "allowed: grey or colour of 8 bits a channel"
            )
        return ImageOps.exif_transpose(image) if "exif" in image.info else image

    def _refuse_outside(self, path: str, row: int) -> None:
        # Not resolved: a folder of one's own may well hold links to where its images are.
        whole = Path(path).absolute()
        if ".." in whole.parts or not any(whole.is_relative_to(root) for root in self.roots):
            raise DataError(
                f"the image of row {row} of split {self.split!r} is {path!r}, a file outside of the data; "
                "put the images into the data's folder, or their bytes into the table"
            )


class ImageSource(ArraySource):
    """Rows with an image, uint8 ``[rows, channels, height, width]``. Up to 1 GiB stays decoded in memory that loader
    processes share, so that a second epoch costs a gather."""

    def __init__(
        self,
        table: ImageTable,
        wanted: Format,
        *,
        index: Tensor,
        target: Tensor | None,
        columns: Mapping[str, Tensor],
        names: Mapping[str, Sequence[str]],
        fingerprint: str,
    ) -> None:
        super().__init__(index, target, columns, names, fingerprint)
        self.table, self.wanted = table, wanted
        self.cache = (
            SharedRows(len(index), wanted.shape) if SharedRows.fits(len(index), wanted.shape) else None
        )

    def inputs(self, rows: Tensor) -> Tensor:
        if self.cache is None:
            return self._decode(rows)
        missing = self.cache.missing(rows)
        if len(missing):
            self.cache.put(missing, self._decode(missing))
        return self.cache.get(rows)

    def _decode(self, rows: Tensor) -> Tensor:
        return self.table.read(self.index[rows].tolist(), self.wanted)


def plain_mode(image: Image) -> str:
    """``L`` for grey images, ``RGB`` for any other."""
    return "L" if image.mode in _GREY else "RGB"


def pixels_of(image: Image, mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels ``[channels, height, width]`` in ``mode`` (``L`` or ``RGB``); transparency is dropped."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode), dtype=np.uint8)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _pixels(image: Image, mode: str, side: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if side is not None and image.size != (side, side):
        from PIL import Image, ImageOps

        image = ImageOps.fit(image.convert(mode), (side, side), Image.Resampling.BILINEAR)
    return pixels_of(image, mode)
