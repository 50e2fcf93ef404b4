"""HTML to main text: real pages against their articles, and made pages with something else in the article's middle."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import advert_pages
import lxml.html
import pytest
from advert_pages import Page

from lm.text.filters import Dropped
from lm.text.html import html

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "noisy_html"
RULE = html(html_adverts=False)
WITH_ADVERTS = html(html_adverts=True)
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def tokens(text: str) -> Counter[str]:
    """Words, and single Chinese characters, with how often each occurs."""
    return Counter(_TOKEN.findall(text))


def f1(found: str, truth: str) -> float:
    a, b = tokens(found), tokens(truth)
    return 2 * (a & b).total() / (a.total() + b.total())


def visible(markup: str) -> Counter[str]:
    return tokens(" ".join(lxml.html.fromstring(f"<div>{markup}</div>").itertext())) if markup else Counter()


def left_over(rule: Callable[[str], str | Dropped], page: Page) -> float:
    """The share of the foreign words that is there beyond what the article has of them."""
    foreign = visible(page.foreign)
    return ((tokens(str(rule(page.html))) - visible(page.article)) & foreign).total() / foreign.total()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_articles_of_real_pages():
    truth = json.loads((DATA / "ground-truth.json").read_text("utf-8"))
    scores = {}
    for name, page in truth.items():
        content = (DATA / "html" / f"{name}.html").read_bytes().decode("utf-8", errors="replace")
        scores[name] = [f1(str(rule(content)), page["articleBody"]) for rule in (RULE, WITH_ADVERTS)]
    means = [sum(score[i] for score in scores.values()) / len(scores) for i in (0, 1)]
    assert means[0] >= 0.975
    assert means[0] >= means[1]
    assert all(with_rules >= without - 0.005 for with_rules, without in scores.values())


@pytest.mark.parametrize("page", advert_pages.pages("interruptions"), ids=lambda page: f"{page.kind}-{page.language}")
def test_what_interrupts_the_article_goes(page: Page):
    assert left_over(RULE, page) == 0
    assert not visible(page.article) - tokens(str(RULE(page.html)))


@pytest.mark.parametrize("page", advert_pages.pages("traps"), ids=lambda page: f"{page.kind}-{page.language}")
def test_what_only_looks_like_it_stays(page: Page):
    assert RULE(page.html) == WITH_ADVERTS(page.html)


def test_pages_are_hard_enough():
    # Otherwise the tests above would show nothing that trafilatura doesn't do.
    left = [left_over(WITH_ADVERTS, page) for page in advert_pages.pages("interruptions")]
    assert sum(share > 0.5 for share in left) > len(left) / 3


def test_menus_footers_and_scripts_go():
    for page in advert_pages.pages("traps"):
        text = str(RULE(page.html))
        assert not {"Home", "Sport", "About", "首页"} & set(re.findall(r"\w+", text))
        assert "<" not in text


def test_an_article_that_is_mostly_one_box_is_kept():
    body = "".join(f"<p>{paragraph}</p>" for paragraph in advert_pages.ARTICLES["en"])
    page = f"<html><body><div class='sponsored ad'><h1>Title</h1>{body}</div></body></html>"
    assert "ferryman" in str(RULE(page))


def test_notices_between_line_breaks_go():
    first, second, third, *_ = advert_pages.ARTICLES["zh"]
    page = (
        f"<html><body><article><div>{first}<br>（责任编辑：李四）<br>{second}<br>{third}</div></article></body></html>"
    )
    text = str(RULE(page))
    assert "责任编辑" not in text
    assert first in text
    assert third in text


@pytest.mark.parametrize("text", ["no markup", "a < b and b > c", "x <= y", "Vec<T>", "<EMAIL>", "", "\ud800 <3"])
def test_text_without_tags_is_left_alone(text: str):
    assert RULE(text) == text


@pytest.mark.parametrize(
    "page", ["<html></html>", "<p>", "<!doctype html>", "<div><br>", "<p>\ud800</p>", "<html><p>\0"]
)
def test_pages_without_text_are_dropped(page: str):
    result = RULE(page)
    assert result == Dropped("no main text") or (isinstance(result, str) and len(result) <= 1)
