"""Reads reports in a real browser: one page, what may be done on it, and what goes wrong there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from playwright.sync_api import ConsoleMessage, Dialog, Locator, Page, Route

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = (1280, 900), (390, 844)
Scheme = Literal["light", "dark"]


class Reader:
    """One page for all the tests, since compiling Plotly anew takes most of the time, and what went wrong on it."""

    def __init__(self, page: Page, reports: dict[str, Path]) -> None:
        self.page, self.reports = page, reports
        self.problems: list[str] = []
        page.set_default_timeout(10_000)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", self._dialog)
        page.route("**/*", self._route)

    def open(self, name: str, *, size: tuple[int, int] = DESKTOP, scheme: Scheme = "light") -> Page:
        """The report as one opens it first: at its top, all as it was written, no theme chosen."""
        self.page.mouse.move(0, 0)
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.emulate_media(color_scheme=scheme)
        self.page.goto(self.reports[name].as_uri())
        return self.page

    def _console(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.problems.append(said.text)

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _route(self, route: Route) -> None:
        if route.request.url.startswith(("file://", "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"request to {route.request.url}")
            route.abort()


def figure_titled(page: Page, title: str) -> Locator:
    return page.locator("figure.chart", has=page.get_by_role("heading", name=title, exact=True)).first


def unfold(page: Page) -> None:
    """Opens whatever is folded, so that all of its figures are drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.wait_for_function(
        "[...document.querySelectorAll('figure.chart')].every((f) => f.querySelector('.js-line, .point, .hm image'))"
    )


def hover(page: Page, point: Locator) -> None:
    point.scroll_into_view_if_needed()
    place = point.bounding_box()
    assert place is not None
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    page.mouse.move(x - 3, y - 3)
    page.mouse.move(x, y)


def use(button: Locator, way: str) -> None:
    if way == "click":
        button.click()
    else:
        button.focus()
        button.press(way)


CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colors) => {  // the colour that is seen where these lie over each other, the last on top
    context.clearRect(0, 0, 1, 1);
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return context.getImageData(0, 0, 1, 1).data;
  };
  const luminance = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = rgb[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ground = (element) => getComputedStyle(element).backgroundColor;
  const grounds = (element) => element ? [...grounds(element.parentElement), ground(element)] : [];
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const seen = element.getClientRects().length && !element.matches("script, .hidden, .skip");
    if (!seen || !walker.currentNode.data.trim()) continue;
    const style = getComputedStyle(element);
    const below = grounds(element);
    const color = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(paint([...below, color])), luminance(paint(below))].sort((x, y) => x - y);
    found.push({ text: walker.currentNode.data.trim().slice(0, 40), contrast: (b + 0.05) / (a + 0.05) });
  }
  return found;
}"""
"""Of each visible text: its beginning, and the contrast of its colour to what lies below it."""
