"""From parts to HTML. Everything is inlined; the page allows itself no network and no script but its own two."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from datetime import datetime
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from tutelage.report.blocks import Part, Section
from tutelage.report.styles import MARKERS, STROKES


def render(parts: Sequence[Part]) -> str:
    """The page of the parts, in order. One part is the page's subject; of several each is a chapter."""
    scripts = [_script(_plotly()), _script(_file("report.js"))]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tutelage.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.globals.update(markers=MARKERS, strokes=STROKES)
    environment.filters["prose"] = _prose
    return environment.get_template("page.html.j2").render(
        parts=[
            (part, [(section, _anchor(section, i, j)) for j, section in enumerate(part.sections)])
            for i, part in enumerate(parts)
        ],
        title=" · ".join(part.title for part in parts[:3]),
        policy=_policy(scripts),
        style=Markup(_file("report.css")),
        scripts=[Markup(script) for script in scripts],
        version=importlib.metadata.version("tutelage"),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip(),
    )


def _prose(text: str) -> Markup:
    """Text with what stands between backticks as code; all of it is escaped."""
    parts = [escape(part) for part in re.split(r"`([^`]+)`", text)]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def _anchor(section: Section, part: int, position: int) -> str:
    slug = (
        re.sub(r"[^a-z0-9]+", "-", (section.short or section.title).lower()).strip("-")
        or f"section-{position}"
    )
    return f"{slug}-{part + 1}-{position + 1}"


def _file(name: str) -> str:
    return (resources.files("tutelage.report") / "templates" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _script(source: str) -> str:
    """A script as it may stand in a script element: newlines as a parser leaves them, nothing that ends it early."""
    unix = source.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"</(?=script)", r"<\\/", unix, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: no request to anywhere, and of scripts those of this page alone, by their hash."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
