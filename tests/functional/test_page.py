"""docs/functional.md: a line for every name, made from docstrings, and not out of date."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tutelage.functional


@pytest.fixture(scope="module")
def generator(repository: Path) -> ModuleType:
    sys.path.insert(0, str(repository))
    try:
        import tools.functional
    finally:
        sys.path.remove(str(repository))
    return tools.functional


def test_the_page_is_what_the_docstrings_say(generator: ModuleType) -> None:
    assert generator.TARGET.read_text() == generator.page(), "run `make readme`"


def test_every_name_has_one_line_that_says_something(generator: ModuleType) -> None:
    lines = [line for line in generator.page().splitlines() if line.startswith("- ")]
    found = [re.match(r"- `(\w+)\(.+\)`: \S.{20}", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    assert sorted(match[1] for match in found if match) == tutelage.functional.__all__


def documented(student: object, *, temperature: float | int = 2.0) -> None:
    """Ends with ``one`` sentence,
    which goes on. A second is left out.

    Source: Anyone, "A Title
    in Two Lines" (arXiv 2001.00001), section 3; also arXiv 2001.00002.

    Not from here: arXiv 2001.00003.
    """


def test_a_line_is_signature_first_sentence_and_paper(generator: ModuleType) -> None:
    start = "- `documented(student, *, temperature=2.0)`: Ends with `one` sentence, which goes on."
    link = "[arXiv 2001.00001](https://arxiv.org/abs/2001.00001)"
    assert generator.line(documented) == f"{start} *A Title in Two Lines*, {link}"
    assert (
        generator.line(documented, unless=f"All of this is from {link}.") == f"{start} *A Title in Two Lines*"
    )


def test_what_names_no_paper_has_none(generator: ModuleType) -> None:
    assert generator.line(tutelage.functional.entropy).endswith("from 0 to log classes.")
