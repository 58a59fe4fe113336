"""Chats and completions: what the template writes, and that the assistant's tokens alone count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from support import fetched
from tutelage.data import DataError, open_data
from tutelage.data.chats import chat_documents, completion_documents
from tutelage.data.documents import Documents
from tutelage.data.texts import TextRows
from tutelage.data.tokenizer import Tokenizer
from tutelage.recipe.schema import DataConfig

TURNS = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MARKED = """{% for message in messages %}<|{{ message.role }}|>
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ message.content }}{{ eos_token }}
{% endif %}{% endfor %}"""
LAST_ONLY = "{% for message in messages %}{% if loop.last %}{{ message.content }}{% endif %}{% endfor %}"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + TURNS


@pytest.fixture
def talker(tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    from tutelage.data.tokenizer import load_tokenizer

    tokenizer.save(tmp_path / "tokenizer")
    found = load_tokenizer(str(tmp_path / "tokenizer"))
    found.fast.chat_template = TURNS
    return found


def chat(*contents: str, system: bool = False) -> list[dict[str, str]]:
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def rows(*chats: list[dict[str, str]]) -> TextRows:
    return TextRows({"messages": list(chats)}, range(10, 10 + len(chats)), "train")


def parts(documents: Documents, tokenizer: Tokenizer, number: int = 0) -> tuple[str, str]:
    """A document's text, and the text of what counts in it."""
    assert documents.counted is not None
    here = slice(*documents.offsets[number : number + 2])
    ids, counted = documents.tokens[here], documents.counted[here]
    return tokenizer.decode(ids.tolist()), tokenizer.decode(ids[counted].tolist())


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_only_what_the_assistant_says_counts(talker: Tokenizer, template: str) -> None:
    talker.fast.chat_template = template
    found = chat_documents(
        rows(chat("Be kind.", "Who?", "Me.", "Why not?", "So it is.", system=True), chat("Hello", " you")),
        "messages",
        talker,
    )
    end = "<|endoftext|>\n"
    whole, counted = parts(found, talker)
    assert whole == (
        f"<|system|>\nBe kind.{end}<|user|>\nWho?{end}<|assistant|>\nMe.{end}"
        f"<|user|>\nWhy not?{end}<|assistant|>\nSo it is.{end}"
    )
    assert counted == f"Me.{end}So it is.{end}"
    assert parts(found, talker, 1)[1] == f" you{end}"


def test_marks_and_prefixes_find_the_same_tokens(talker: Tokenizer, sentences: list[str]) -> None:
    chats = rows(*[chat(*sentences[start : start + 4]) for start in range(0, 80, 4)])
    by_prefix = chat_documents(chats, "messages", talker)
    talker.fast.chat_template = MARKED
    by_mark = chat_documents(chats, "messages", talker)
    assert np.array_equal(by_prefix.tokens, by_mark.tokens)
    assert by_prefix.counted is not None
    assert by_mark.counted is not None
    assert np.array_equal(by_prefix.counted, by_mark.counted)
    assert 0.3 < by_prefix.counted.mean() < 0.7


def test_a_template_that_rewrites_earlier_turns_is_refused_by_row(talker: Tokenizer) -> None:
    talker.fast.chat_template = LAST_ONLY
    with pytest.raises(
        DataError,
        match=r"row 10 of column 'messages', split 'train', is written so that turn 1 .*generation %\}",
    ):
        chat_documents(rows(chat("a", "b", "c", "d")), "messages", talker)


def test_a_template_that_fails_says_why(talker: Tokenizer) -> None:
    talker.fast.chat_template = STRICT
    with pytest.raises(DataError, match=r"row 11 .* cannot be written by the chat template: the user begins"):
        chat_documents(rows(chat("a", "b"), chat("x", "a", "b", system=True)), "messages", talker)


TOOLS = "{% for turn in messages %}{% if 'tool_calls' in turn %}{{ turn.tool_calls[0].name }}{% endif %}{% endfor %}"


def test_a_field_that_a_turn_does_not_have_is_not_shown_to_the_template(
    talker: Tokenizer, parquet: Any
) -> None:
    """Parquet gives all turns the fields of each."""
    called = {"role": "assistant", "content": "c", "tool_calls": [{"name": "search"}]}
    path = parquet({"messages": [chat("a", "b"), [{"role": "user", "content": "x"}, called]]})
    read = TextRows({"messages": pq.read_table(path)["messages"].to_pylist()}, [0, 1], "train")
    assert read.columns["messages"][0][1]["tool_calls"] is None
    talker.fast.chat_template = TOOLS + MARKED
    found = chat_documents(read, "messages", talker)
    assert parts(found, talker)[0].startswith("<|user|>")
    assert parts(found, talker, 1)[0].startswith("search<|user|>")


CLOCK = """
  {% set today = strftime_now("%Y-%m-%d") %}
{{ today.split("-")[0] }}|{{ strftime_now("%d %b %Y, %A %H:%M") }}|{{ strftime_now is defined }}
"""


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(
    talker: Tokenizer, template: str
) -> None:
    talker.fast.chat_template = template
    plain = parts(chat_documents(rows(chat("a", "b")), "messages", talker), talker)
    talker.fast.chat_template = CLOCK + template
    whole, counted = parts(chat_documents(rows(chat("a", "b")), "messages", talker), talker)
    assert whole == "\n2024|26 Jul 2024, Friday 00:00|True\n" + plain[0]
    assert counted == plain[1]
    assert talker.fast.chat_template == CLOCK + template


@pytest.mark.parametrize(
    "write",
    [
        lambda talker: chat_documents(rows(chat("a", "b")), "messages", talker),
        lambda talker: completion_documents(pair("a", "b"), "q", "a", talker),
    ],
)
def test_several_templates_without_a_default_are_named(talker: Tokenizer, write: Any) -> None:
    talker.fast.chat_template = {"tool_use": TURNS, "rag": MARKED}
    with pytest.raises(
        DataError, match=r"several chat templates .*\(rag, tool_use\).*set data\.chat_template to it"
    ):
        write(talker)
    talker.fast.chat_template = {"rag": MARKED, "default": TURNS}
    assert parts(write(talker), talker)[1] == "b<|endoftext|>\n"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "is missing; allowed: a list of {role, content}"),
        ("hello", "is 'hello'; allowed"),
        ([], r"is '\[\]'; allowed"),
        ([{"role": "user"}], "allowed: a list"),
        (
            [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
            "no turn of the role `assistant`; it has gpt, human",
        ),
    ],
)
def test_rows_that_are_no_chats(talker: Tokenizer, entry: object, said: str) -> None:
    with pytest.raises(DataError, match=f"row 11 of column 'messages', split 'train', .*{said}"):
        chat_documents(TextRows({"messages": [chat("a", "b"), entry]}, [10, 11], "train"), "messages", talker)


def test_a_tokeniser_without_a_template_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"has no chat template; set data\.chat_template"):
        chat_documents(rows(chat("a", "b")), "messages", tokenizer)


def pair(prompt: str, completion: str) -> TextRows:
    return TextRows({"q": [prompt], "a": [completion]}, [0], "train")


def test_completions_without_a_template_are_joined_to_their_prompts(tokenizer: Tokenizer) -> None:
    found = completion_documents(pair("One and one?", " Two."), "q", "a", tokenizer)
    assert parts(found, tokenizer) == ("One and one? Two.<|endoftext|>", " Two.<|endoftext|>")


def test_completions_are_chats_where_there_is_a_template(talker: Tokenizer) -> None:
    found = completion_documents(pair("One and one?", "Two."), "q", "a", talker)
    assert parts(found, talker) == (
        "<|user|>\nOne and one?<|endoftext|>\n<|assistant|>\nTwo.<|endoftext|>\n",
        "Two.<|endoftext|>\n",
    )


def test_chats_of_a_recipe(parquet: Any, sentences: list[str], tmp_path: Path) -> None:
    path = parquet({"talk": [chat(*sentences[start : start + 2]) for start in range(0, 200, 2)]})
    (tmp_path / "turns.jinja").write_text(TURNS)
    config = DataConfig(
        path=str(path),
        messages="talk",
        tokenizer={"train": 400},
        chat_template=str(tmp_path / "turns.jinja"),
        max_length=256,
    )
    data = open_data(config, "language-model")
    assert data.info.tokenizer is not None
    batch = fetched(data.train, [0])
    learnt = data.info.tokenizer.decode(batch["target"][batch["mask"]].tolist(), special=False)
    assert "<|" not in learnt
    assert any(sentence in learnt for sentence in sentences[1::2])
    assert not any(sentence in learnt for sentence in sentences[0:200:2])


def test_gsm8k_learns_the_answers(data_root: Path) -> None:
    config = DataConfig(
        path=str(data_root / "gsm8k"),
        train="test",
        prompt="question",
        completion="answer",
        tokenizer={"train": 2048},
        max_length=512,
        packing="none",
        limit=50,
    )
    data = open_data(config, "language-model")
    batch = fetched(data.train, [3, 4])
    tokenizer = data.info.tokenizer
    assert tokenizer is not None
    for row in range(2):
        learnt = tokenizer.decode(batch["target"][row][batch["mask"][row]].tolist())
        assert "#### " in learnt
        assert learnt.endswith("<|endoftext|>")
        assert "?" not in learnt
