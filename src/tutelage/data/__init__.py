"""Rows: from the hub, local files, memory or any torch dataset, as sources that the engine reads."""

from tutelage.data.label_noise import WrongLabels
from tutelage.data.opening import Data, DataInfo, describe_rows, open_data
from tutelage.data.source import (
    ArraySource,
    DataError,
    NoisySource,
    RowSource,
    SubsetSource,
    TensorSource,
    row_ids,
    subset,
    targets,
)
from tutelage.data.torch_source import TorchSource

__all__ = [
    "ArraySource",
    "Data",
    "DataError",
    "DataInfo",
    "NoisySource",
    "RowSource",
    "SubsetSource",
    "TensorSource",
    "TorchSource",
    "WrongLabels",
    "describe_rows",
    "open_data",
    "row_ids",
    "subset",
    "targets",
]
