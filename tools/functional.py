"""Writes docs/functional.md, the page of the flat namespace: a line a name, from its signature and docstring.

The names are those that `tutelage.functional` finds, so a new method's stand on the page without a change here.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import tutelage.functional

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "functional.md"
INTRODUCTION = """\
# `tutelage.functional`

The math of every method as pure functions of tensors, for a loop of your own. All names are in one flat namespace, and
each is imported only when it is asked for:

```python
from tutelage.functional import nkd_loss
```

Teachers' tensors are detached, losses are in float32 or better, and `help(nkd_loss)` gives shapes, ranges and errors.
The [examples](../examples) put them into a PyTorch loop, the Hugging Face `Trainer` and Lightning.

First comes what several methods share, then each paper's own. `make readme` writes this page from signatures and
docstrings.
"""


def page() -> str:
    """The whole page: a section a file, functions before the tuples that they return."""
    members = [getattr(tutelage.functional, name) for name in tutelage.functional.__all__]
    members.sort(key=lambda member: (member.__module__, inspect.isclass(member), member.__name__))
    files = groupby(members, key=lambda member: member.__module__)
    return "\n".join([INTRODUCTION, *(section(home, held) for home, held in files)])


def section(home: str, members: Iterable[Any]) -> str:
    """A file's heading, linked, what its docstring says of it, and its names."""
    path = Path("src", *home.split(".")).with_suffix(".py")
    heading = f"## [`{'/'.join(home.split('.')[1:])}.py`](../{path.as_posix()})"
    about = linked(paragraph(importlib.import_module(home)))
    lines = (line(member, unless=about) for member in members)
    return "\n".join([heading, "", about, "", *lines, ""])


def line(member: Any, unless: str = "") -> str:
    """Signature without annotations, first sentence, and the paper where ``unless`` does not name it."""
    signature = inspect.signature(member)
    bare = signature.replace(
        parameters=[
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    paper = (part for part in source(member) if part not in unless)
    return f"- `{member.__name__}{bare}`: {first_sentence(member)} {', '.join(paper)}".rstrip()


def paragraph(documented: Any) -> str:
    """The first paragraph of a docstring on one line, as Markdown."""
    first = (inspect.getdoc(documented) or "").partition("\n\n")[0]
    return " ".join(first.split()).replace("``", "`")


def first_sentence(documented: Any) -> str:
    return re.split(r"(?<=[.]) (?=[A-Z`])", paragraph(documented), maxsplit=1)[0]


def source(documented: Any) -> Iterator[str]:
    """The first paper of a docstring's ``Source:``: its title where it stands in quotes, and its number on arXiv."""
    found = re.search(r"^Source: (.*)", inspect.getdoc(documented) or "", re.DOTALL | re.MULTILINE)
    if found is None:
        return
    text = " ".join(found[1].partition("\n\n")[0].split())
    if title := re.search(r'"([^"]+)"', text):
        yield f"*{title[1]}*"
    if number := re.search(r"arXiv \d{4}\.\d{4,5}", text):
        yield linked(number[0])


def linked(text: str) -> str:
    """The text with every number of arXiv as a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


if __name__ == "__main__":
    TARGET.write_text(page())
