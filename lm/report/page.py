"""The page that every report is: one HTML file which needs nothing but a browser.

Markup is made by functions alone, and whatever is no `Html` is escaped, so that text from a corpus stays text. The
page's own policy (`Content-Security-Policy` in `page.html`) refuses the network besides, and all scripts but the one
that a report was made with.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

Kind = Literal["name", "text", "number", "bar"]


class Html(str):
    """Text that is markup already; any other text is escaped where it enters a page."""

    __slots__ = ()


def markup(child: object) -> Html:
    """`child` as markup: as it stands if it is `Html`, nothing if it is None, escaped text otherwise."""
    if isinstance(child, Html):
        return child
    return Html("" if child is None else html.escape(str(child)))


def join(children: Iterable[object]) -> Html:
    """Children one after another."""
    return Html("".join(markup(child) for child in children))


def element(name: str, *children: object, **attributes: str | bool | None) -> Html:
    """An element.

    Args:
      name: of the element, such as "p".
      children: see `markup`.
      attributes: by name, `_` at the end left out (`class_`) and `_` elsewhere a hyphen. True stands alone; False and
        None are left out.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{html.escape(value)}"')
    return Html(f"<{' '.join(parts)}>{join(children)}</{name}>")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading that the list of contents names."""

    name: str
    """Its place in the page's address: letters, digits and hyphens."""
    title: str
    """The heading."""
    intro: str
    """A sentence or two: what it shows and what to look for."""
    body: Html
    """Its content."""


@dataclass(frozen=True, kw_only=True)
class Moving:
    """What makes a page move, for reports that can't be read from top to bottom alone."""

    script: str
    """JavaScript, run once when the page stands; the page's policy knows it by its hash and lets no other run."""
    style: str
    """CSS beside the template's."""
    data: object
    """What the script reads: JSON, in the element `#data`."""


def page(
    title: str,
    subtitle: Html,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    moving: Moving | None = None,
) -> str:
    """A whole page.

    Args:
      title: what the report is about.
      subtitle: a line below it.
      facts: the numbers that come first, as (what it is, number).
      sections: the rest, in order.
      moving: None for a page without scripts.

    Returns:
      The file's content, the same for the same arguments.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    contents = [element("a", section.title, href=f"#{section.name}") for section in sections]
    tiles = [element("div", element("dt", what), element("dd", value)) for what, value in facts]
    return string.Template(template).substitute(
        policy=_policy(moving),
        style=moving.style if moving else "",
        script=_script(moving) if moving else "",
        title=markup(title),
        subtitle=subtitle,
        facts=element("dl", *tiles, class_="facts"),
        contents=element("nav", *contents, aria_label="Contents"),
        sections=join(
            element(
                "section",
                element("h2", section.title),
                element("p", section.intro, class_="intro"),
                section.body,
                id=section.name,
            )
            for section in sections
        ),
    )


def _policy(moving: Moving | None) -> str:
    if moving is None:
        return ""
    return f" script-src 'sha256-{base64.b64encode(hashlib.sha256(moving.script.encode()).digest()).decode()}';"


def _script(moving: Moving) -> str:
    # No `<` in the data: neither `</script` nor `<!--` can end it or change how the rest of the page is read.
    data = json.dumps(moving.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{data}</script>\n<script>{moving.script}</script>\n'


def number(value: int) -> str:
    """A count with thousands separators."""
    return f"{value:,}"


def percent(part: float, whole: float) -> str:
    """A share; a small one is not called 0.0%, nor nearly all 100.0%."""
    if not whole:
        return "–"
    share = part / whole
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def size(count: float) -> str:
    """Bytes in a unit that leaves at most four digits: 999 B, 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.0f} PB"


def bar(share: float) -> Html:
    """A bar as long as `share`, 0 to 1, of the room it has; for the eye only, the number stands beside it."""
    filled = element("span", style=f"width:{100 * share:.1f}%", class_="some" if share > 0 else "none")
    return element("span", filled, class_="bar", aria_hidden="true")


def table(columns: Sequence[tuple[str, Kind]], rows: Sequence[Sequence[object]], *, caption: str | None = None) -> Html:
    """A table.

    Args:
      columns: (heading, what stands below it); names are never broken, texts anywhere, numbers are aligned to the
        right, bars take the room that is left.
      rows: cells, see `markup`; the first of a row is its heading.
      caption: what the table holds.
    """
    head = [element("th", heading, scope="col", class_=kind) for heading, kind in columns]
    body = []
    for row in rows:
        cells = [
            element("td" if i else "th", cell, scope=None if i else "row", class_=kind)
            for i, ((_, kind), cell) in enumerate(zip(columns, row, strict=True))
        ]
        body.append(element("tr", *cells))
    inner = element(
        "table",
        element("caption", caption) if caption else None,
        element("thead", element("tr", *head)),
        element("tbody", *body),
        class_="wide" if any(kind == "bar" for _, kind in columns) else None,
    )
    return element("div", inner, class_="scroll")


def bars(
    heading: tuple[str, Kind],
    rows: Sequence[tuple[object, int]],
    whole: int = 0,
    *,
    longest: float = 0.0,
    caption: str | None = None,
) -> Html:
    """Counts as a table with bars.

    Args:
      heading: of the labels, and what they are.
      rows: (label, count).
      whole: what counts are shares of; 0 leaves the shares out.
      longest: the share, of `whole`, that has a full bar; the largest here if 0. Equal for charts to be compared.
      caption: what the chart shows.
    """
    most = longest * whole or max((count for _, count in rows), default=0) or 1
    columns: list[tuple[str, Kind]] = [heading, ("", "bar"), ("count", "number")]
    cells: list[list[object]] = [[label, bar(count / most), number(count)] for label, count in rows]
    if whole:
        columns.append(("share", "number"))
        for cell, (_, count) in zip(cells, rows):
            cell.append(percent(count, whole))
    return table(columns, cells, caption=caption)


def beside(left: tuple[object, object], right: tuple[object, object]) -> Html:
    """Two texts side by side (one above the other where there is no room), each as (heading, text)."""
    figures = [element("figure", element("figcaption", heading), text) for heading, text in (left, right)]
    return element("div", *figures, class_="beside")


def fold(title: str, about: str, *children: object, opened: bool = False) -> Html:
    """Something that opens at a click on its title; `about` says beside it what is to be expected."""
    summary = [element("strong", title), element("span", about, class_="aside") if about else None]
    return element("details", element("summary", *summary), *children, open=opened)
