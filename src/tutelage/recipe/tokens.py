"""Text in a recipe's ``data``: how it becomes tokens, and which settings do not go with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tutelage.recipe.config import Config


class TrainedTokenizerConfig(Config):
    """A byte-level BPE that is trained on the text of the training rows."""

    train: int = Field(
        ge=300, le=1_000_000, description="Tokens: 256 bytes, an end-of-text token, and merges."
    )


KINDS = ("text", "messages", "prompt")
"""Fields of which one says that rows are text."""

_NOT_OF_TEXT = ("image", "features", "image_size", "noise", "views", "distinct_views", "view_seed")
_OF_TEXT = ("tokenizer", "chat_template", "stream", "window", "epoch_rows")
_NOT_OF_A_STREAM = ("limit", "imbalance", "label_noise", "columns")


def text_conflicts(values: Mapping[str, Any]) -> list[str]:
    """Why the text fields of ``data`` do not go together or with its other fields, one sentence each."""
    kinds = [name for name in KINDS if values[name] is not None]
    reasons = []
    if len(kinds) > 1:
        reasons.append(f"give one of {', '.join(KINDS)}; got {', '.join(kinds)}")
    if (values["prompt"] is None) != (values["completion"] is None):
        reasons.append("give `prompt` and `completion` together: what is given, and what is learnt")
    if kinds:
        wrong = [name for name in _NOT_OF_TEXT if values[name]]
        reasons += [f"`{name}` is for images or numbers, but `{kinds[0]}` makes rows text" for name in wrong]
    else:
        given = [name for name in _OF_TEXT if values[name]]
        reasons += [f"`{name}` is for text: set {' or '.join(KINDS)} too" for name in given]
    if values["chat_template"] is not None and kinds == ["text"]:
        reasons.append("`chat_template` is for `messages`, or `prompt` and `completion`; `text` has no turns")
    return reasons + _stream_conflicts(values)


def _stream_conflicts(values: Mapping[str, Any]) -> list[str]:
    if values["stream"] is not True:
        return [f"`{name}` only together with `stream`" for name in ("window", "epoch_rows") if values[name]]
    reasons = [
        f"`{name}` needs all rows at hand, which a stream has not; leave it out"
        for name in _NOT_OF_A_STREAM
        if values[name]
    ]
    if values["epoch_rows"] is None:
        reasons.append("`stream` needs `epoch_rows`: how many rows count as an epoch")
    reasons += [
        f"`{part}` is a share of rows that a stream cannot count: give a split's name, a number of documents "
        "(the first ones), or null"
        for part in ("validation", "test")
        if isinstance(values[part], float)
    ]
    return reasons
