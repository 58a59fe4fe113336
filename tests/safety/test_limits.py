"""A recipe from elsewhere takes neither memory nor time, and builds nothing but plain values."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from tutelage.recipe import RecipeError, load_recipe, parse_recipe
from tutelage.recipe.text import DEEPEST, LARGEST, MOST_VALUES, read_yaml
from tutelage.report.load import load_run
from tutelage.untrusted import LARGEST_JSON, FileError, read_object

LETTERS = "abcdefghi"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{before}'] * 9)}]\n" for before, this in itertools.pairwise(LETTERS)
)
"""Nine lines that stand for 9⁹ values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 20000 values"),
        ("- x\n" * (MOST_VALUES + 1), "more than 20000 values"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "more than 40 mappings and lists inside one another"),
        ("[" * 100_000, "more than 40 mappings and lists inside one another"),
        ("{a: " * 10_000, "more than 40 mappings and lists inside one another"),
        ("a: &a [1, *a]", "stands inside what it repeats"),
        ("a: &a {b: {c: *a}}", "stands inside what it repeats"),
        ("a: " + "x" * LARGEST, "more than 256 KiB"),
        ("a: " + "ä" * (LARGEST // 2), "more than 256 KiB"),
        ("a: " + "9" * 101, "a number of more than 100 digits"),
        ("a: 0x" + "f" * 101, "a number of more than 100 digits"),
        ("a: 1\na: 2", "the key 'a' comes twice"),
        ("a: {b: 1, b: 2}", "the key 'b' comes twice"),
        ("? [a]\n: 1", "is no text"),
        ("1: a", "the key '1' is no text"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !own x", "could not determine a constructor"),
        ("a: b\n---\na: c", "but found another document"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_yaml(text)
    assert time.perf_counter() - started < 20


def test_what_is_just_within_the_limits() -> None:
    assert len(read_yaml("- x\n" * (MOST_VALUES - 1))) == MOST_VALUES - 1
    assert read_yaml("[" * DEEPEST + "]" * DEEPEST) is not None
    assert read_yaml("a: &a {b: 1}\nc: *a\nd: *a") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", LAUGHS.encode(), b"x" * (LARGEST + 10), "ä".encode() * LARGEST]
)
def test_a_file_is_refused_as_a_recipe_is(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "recipe.yaml")


def test_an_override_has_the_same_limits() -> None:
    with pytest.raises(RecipeError, match="more than 20000 values"):
        parse_recipe("data: {path: digits}", [f"data={{{LAUGHS.replace(chr(10), ', ')}}}"])


def test_a_report_reads_no_aliases(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(LAUGHS)
    run = load_run(tmp_path)
    assert run.recipe == {}
    assert "recipe.yaml is not valid YAML; it is shown as it stands." in run.notes


def test_a_report_leaves_out_what_is_too_large(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "result.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**28 + 1)
    (tmp_path / "environment.json").mkdir()
    notes = " ".join(load_run(tmp_path).notes)
    assert "metrics.jsonl is larger than 256 MiB" in notes
    assert "result.json is larger than 256 MiB" in notes
    assert "environment.json is no file" in notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_a_small_json_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_object(tmp_path / "result.json")


def test_a_large_json_file(tmp_path: Path) -> None:
    with (tmp_path / "result.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(FileError, match="larger than 64 MiB"):
        read_object(tmp_path / "result.json")
