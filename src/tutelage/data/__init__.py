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
    column,
    row_ids,
    subset,
    targets,
)
from tutelage.data.streams import TokenStream, Window
from tutelage.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, vocabulary_difference
from tutelage.data.tokens import TokenSource
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
    "TokenSource",
    "TokenStream",
    "Tokenizer",
    "TorchSource",
    "Window",
    "WrongLabels",
    "column",
    "describe_rows",
    "load_tokenizer",
    "open_data",
    "row_ids",
    "subset",
    "targets",
    "train_tokenizer",
    "vocabulary_difference",
]
