"""Chats, and prompts with their completions, as documents of which only the assistant's tokens count."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import numpy as np

from tutelage.data.documents import Documents
from tutelage.data.source import DataError
from tutelage.data.texts import Chat, TextRows
from tutelage.data.tokenizer import Tokenizer

Spans = list[tuple[int, int]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = date(2024, 7, 26)
"""The day on which every chat is written: tokens are a function of the data alone."""
_DIRECTIVES = ("-d", "-m", *"aAbBdeFHIjmMpSTyY")


def chat_documents(rows: TextRows, column: str, tokenizer: Tokenizer) -> Documents:
    """Chats as the chat template writes them. A token counts if it touches what the assistant says: what the template
    marks by ``{% generation %}``; where it marks nothing, what a turn of the assistant adds to the text of the turns
    before it and the header that asks for an answer.

    Raises:
        DataError: no chat template, several without a default, or one that cannot write a chat or rewrites earlier
            turns, by row.
    """
    return _written(rows, column, rows.chats(column), tokenizer)


def completion_documents(rows: TextRows, prompt: str, completion: str, tokenizer: Tokenizer) -> Documents:
    """Prompts and completions, of which the completions count: as chats of two turns where the tokeniser has a chat
    template; else joined as they are, each tokenised for itself, with the end-of-text token behind, which counts too.

    Raises:
        DataError: as `chat_documents`.
    """
    given, learnt = rows.texts(prompt), rows.texts(completion)
    if tokenizer.fast.chat_template is not None:
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(given, learnt, strict=True)
        ]
        return _written(rows, completion, chats, tokenizer)
    end = np.asarray([tokenizer.eos_id], dtype=np.int32)
    before = [ids[:-1] if len(ids) and ids[-1] == end[0] else ids for ids in tokenizer.encode(given)]
    pairs = list(zip(before, tokenizer.encode(learnt, special=False), strict=True))
    return Documents.of(
        [np.concatenate([prompt_ids, ids, end]) for prompt_ids, ids in pairs],
        [np.arange(len(prompt_ids) + len(ids) + 1) >= len(prompt_ids) for prompt_ids, ids in pairs],
    )


def _written(rows: TextRows, column: str, chats: list[Chat], tokenizer: Tokenizer) -> Documents:
    writer = _Writer(rows, column, tokenizer)
    written = [writer.write(position, chat) for position, chat in enumerate(chats)]
    ids, counted = tokenizer.encode_marked([text for text, _ in written], [spans for _, spans in written])
    return Documents.of(ids, counted)


def _on_one_day(template: str) -> str:
    """A template whose ``strftime_now`` tells `_TODAY`: transformers' own reads the clock, and takes no other."""
    if "strftime_now" not in template:
        return template
    told = "".join(
        f".replace({f'%{directive}'!r}, {_TODAY.strftime(f'%{directive}')!r})" for directive in _DIRECTIVES
    )
    # The line's end is cut off by the renderer, so that the template still begins a line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n{template}"


class _Writer:
    """A chat template, and the rows that it writes."""

    def __init__(self, rows: TextRows, column: str, tokenizer: Tokenizer) -> None:
        if tokenizer.fast.chat_template is None:
            raise DataError(
                f"the tokeniser {tokenizer.place or 'trained here'} has no chat template; "
                "set data.chat_template to a Jinja file"
            )
        named = tokenizer.fast.chat_template
        if isinstance(named, dict) and "default" not in named:
            raise DataError(
                f"the tokeniser {tokenizer.place or 'trained here'} has several chat templates and none named "
                f"`default` ({', '.join(sorted(named))}); write the one that is meant to a Jinja file, and set "
                "data.chat_template to it"
            )
        self.rows, self.column, self.fast = rows, column, tokenizer.fast
        self.template: str = _on_one_day(tokenizer.fast.get_chat_template())

    def write(self, position: int, chat: Chat) -> tuple[str, Spans]:
        """A chat's text, and where in it the assistant speaks."""
        if _GENERATION.search(self.template):
            text, spans = self._render(position, chat, marked=True)
            return text, spans
        whole, _ = self._render(position, chat)
        spans = []
        for turn in (number for number, one in enumerate(chat) if one["role"] == "assistant"):
            if turn == 0:
                raise self._fault(position, "begins with the assistant, whose words cannot be told apart")
            before, _ = self._render(position, chat[:turn], header=True)
            after, _ = self._render(position, chat[: turn + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise self._fault(
                    position,
                    f"is written so that turn {turn} changes or does not continue the text before it",
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _render(
        self, position: int, chat: Chat, *, header: bool = False, marked: bool = False
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[chat],
                chat_template=self.template,
                add_generation_prompt=header,
                return_assistant_tokens_mask=marked,
                **self.fast.special_tokens_map,
            )
        except Exception as error:  # a template may fail in any way, and says why by an exception of its own
            raise self.rows.fault(
                position, self.column, f"cannot be written by the chat template: {error}"
            ) from error
        return texts[0], [(first, end) for first, end in spans[0]] if marked else []

    def _fault(self, position: int, what: str) -> Any:
        return self.rows.fault(
            position, self.column, f"{what}; mark the assistant's part in the template by {{% generation %}}"
        )
