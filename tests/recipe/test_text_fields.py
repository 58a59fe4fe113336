"""The text fields of a recipe's data: which go together, and which do not."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.recipe import RecipeError, validate
from tutelage.recipe.schema import DataConfig

TEXT = {"path": "corpus", "text": "text"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TEXT | {"messages": "talk"}, "give one of text, messages, prompt; got text, messages"),
        ({"path": "corpus", "prompt": "q"}, "give `prompt` and `completion` together"),
        ({"path": "corpus", "completion": "a"}, "give `prompt` and `completion` together"),
        (TEXT | {"image": "picture"}, "`image` is for images or numbers, but `text` makes rows text"),
        (TEXT | {"features": ["a"], "noise": 0.5}, "`features` is for images or numbers"),
        (TEXT | {"views": [{"name": "flip"}]}, "`views` is for images or numbers"),
        (
            {"path": "corpus", "tokenizer": {"train": 4096}},
            "`tokenizer` is for text: set text or messages or prompt too",
        ),
        (TEXT | {"chat_template": "turns.jinja"}, "`chat_template` is for `messages`"),
        (TEXT | {"window": 5}, "`window` only together with `stream`"),
        (TEXT | {"stream": True, "validation": None}, "`stream` needs `epoch_rows`"),
        (
            TEXT | {"stream": True, "epoch_rows": 9},
            "`validation` is a share of rows that a stream cannot count",
        ),
        (
            TEXT | {"stream": True, "epoch_rows": 9, "validation": None, "limit": 5},
            "`limit` needs all rows at hand, which a stream has not",
        ),
        (TEXT | {"tokenizer": {"train": 10}}, "a whole number from 300"),
    ],
)
def test_settings_that_do_not_go_together(data: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate(DataConfig, data)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        TEXT,
        {"path": "pairs", "text": ["premise", "hypothesis"], "tokenizer": "bert-base-uncased"},
        {"path": "chats", "messages": "talk", "chat_template": "turns.jinja", "tokenizer": {"train": 4096}},
        {"path": "questions", "prompt": "q", "completion": "a", "packing": "none", "columns": ["topic"]},
        TEXT | {"stream": True, "epoch_rows": 9, "window": 100, "validation": 50, "test": "test"},
    ],
)
def test_settings_that_do(data: dict[str, Any]) -> None:
    assert validate(DataConfig, data).max_length == 512
