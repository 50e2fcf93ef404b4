"""HTML to the text of its article: menus, adverts, forms and comments go."""

from __future__ import annotations

import re

from lm.errors import require
from lm.text.filters import Dropped, FilterRule

_MARKUP = re.compile(
    r"<(?:!doctype|html|head|body|div|p|article|section|span|table|ul|ol|h[1-6]|a|br|meta|title)\b", re.I
)


def html(*, html_adverts: bool) -> FilterRule:
    """Main text of web pages; text without a tag is left alone."""
    trafilatura = require("trafilatura", extra="text", need="the cleaning rule html")

    def rule(text: str) -> str | Dropped:
        if _MARKUP.search(text) is None:
            return text
        source = text.encode("utf-8", errors="replace").decode("utf-8")
        found = trafilatura.extract(source, include_comments=False)
        return found or Dropped("no main text")

    return rule
