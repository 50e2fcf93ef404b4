"""HTML to the text of its article.

trafilatura finds the article and leaves out menus, side columns and comments. What stands inside the article without
belonging to it often passes: adverts, pointers to other articles, newsletter calls, cookie notices. Those lines are
taken out of what it found, by what their elements are called and by what they say. Both must be plain: a class that has
the word "ad" among its words, not "shadow"; a short paragraph that begins like a notice, not one that tells of adverts.
Nothing that holds a fourth of the page's text counts as foreign, and lines are only ever removed: what trafilatura left
out stays out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lm.errors import require
from lm.text.filters import Dropped, FilterRule

_MARKUP = re.compile(
    r"<(?:!doctype|html|head|body|div|p|article|section|span|table|ul|ol|h[1-6]|a|br|meta|title)(?=[\s/>])", re.I
)
_MOST = 0.25  # share of the page's text above which an element is not foreign
_BOX = 300  # characters: what a box with a notice holds at most
_LABEL_SIZE = 80
_WHOLE = frozenset(("html", "head", "body", "main", "article", "h1"))
_BLOCKS = frozenset(("div", "section", "aside", "p", "li", "ul", "ol", "figure", "blockquote", "td", "table"))
_HEADINGS = frozenset(("h2", "h3", "h4", "h5", "h6"))
_INLINE = frozenset(("span", "em", "strong", "b", "i", "a"))
_NO_ARTICLE = frozenset(("figcaption", "dialog", "button", "nav", "form", "ins"))

# Words that classes and ids are made of, between spaces, hyphens, underscores and capitals.
_NAME_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_NAMES = re.compile(
    r"(?:ad|ads|adv|adbox|adverts?|advertisement|advertising|adsbygoogle|adslot|dfp|outbrain|taboola|guanggao"
    r"|sponsor|sponsored|promo|promoted|newsletters?|recirc|related|recommended|recommendations|xiangguan|tuijian"
    r"|cookies?|gdpr|share|sharing)",
    re.I,
)


def _one_of(*patterns: str) -> str:
    return rf"[\W_]*(?:{'|'.join(patterns)})"


# A line that is one of these announces what follows in the same box or list.
_LABEL = re.compile(
    _one_of(
        r"advertis(?:ement|ing|ment)|AD|paid (?:post|content)",
        r"(?:sponsored|promoted)(?: (?:content|post|stor(?:y|ies)|links))?",
        r"(?:related|recommended|more|popular|trending) (?:articles?|stor(?:y|ies)|posts?|news|reading|topics|links)",
        r"(?:related|recommended|trending)(?: (?:coverage|for you|now))?|more (?:for you|coverage)",
        r"(?:more|also) (?:from|on) .{1,40}|read (?:more|next|also)|see also|what to read next",
        r"you (?:may|might)(?: also)? (?:like|enjoy|be interested in)|most (?:read|popular|viewed)",
        r"(?:推广|广告|赞助|商业|廣告|推廣)(?:内容|信息|链接)?",
        r"(?:相关|延伸|推荐|扩展|热门|精彩|更多|最新)(?:阅读|文章|新闻|链接|推荐|报道|资讯|内容|专题){1,2}",
        r"猜你喜欢|为您推荐|大家都在看|热门排行|猜你喜歡",
        r"(?:相關|延伸|推薦)(?:閱讀|新聞|文章|報導)",
    )
    + r"[\W_]*",
    re.I,
)
_PLATFORM = r"(?:facebook|twitter|instagram|whatsapp|x|telegram|linkedin|youtube|tiktok|google|threads|weibo|wechat)"
_LEAD_IN = re.compile(r"[^:：.。]{1,25}[:：]\s*")
# A short paragraph that begins so is a notice as a whole.
_NOTICE = re.compile(
    _one_of(
        r"(?:sponsored|promoted|advertisement|related|read (?:more|next|also)|see also|also read|recommended|watch)"
        r"(?: (?:by|from|on|this|articles?|stor(?:y|ies)|content|post)){0,2}\s*[:：|]",
        r"(?:article|story|content) continues (?:below|after)|(?:scroll (?:down )?to )?continue (?:reading )?below",
        r"advertisement\W+(?:continue|scroll)|广告\W+继续阅读",
        r"(?:partner|paid|branded) content\s*[:：|]|合作推广\s*[:：|]",
        r"this (?:article|page|post|story) (?:may )?contains? affiliate links|本文含有?.{0,4}(?:返利|推广|广告)链接",
        r"support our (?:journalism|work|reporting)|(?:您|你)的(?:打赏|赞赏|支持)是我们",
        r"(?:have|got) a (?:news )?tip\b|do you (?:know more|have information) about|(?:新闻|爆料)线索请?|欢迎投稿",
        r"(?:click|tap) here to (?:subscribe|join|follow|sign up|download)",
        r"open in (?:the )?app\b|listen to this (?:article|story)",
        r"(?:image|photo|photograph|picture)s?(?: credit| by)?\s?[:：]|(?:图片?|图源|供图)\s?[:：]",
        r"(?:enjoying|like|liked|love) this (?:article|story|post)\?",
        r"喜欢(?:这篇|本)文章|打开(?:APP|客户端)(?:阅读|查看|看)|听全文|来源\s?[:：].{1,20}(?:作者|编辑)\s?[:：]|点击(?:进入专题|(?:查看|阅读)(?:原文|全文|更多))",
        r"更多(?:精彩)?(?:内容|资讯|信息|新闻|文章).{0,4}(?:请|尽在|欢迎)",
        r"(?:sign up|subscribe|register)(?: now| here| today)? (?:for|to) (?:our|the|this)\b"
        r"[^.]{0,60}\b(?:newsletters?|mailing list|bulletin|briefing|updates|channel|alerts|podcast)",
        r"get (?:our|the)\b[^.]{0,80}\b(?:in|to) your inbox",
        r"(?:we|this (?:web)?site) uses? cookies",
        rf"(?:please )?(?:follow|like|join|find) us on {_PLATFORM}\b",
        rf"share (?:this )?(?:article|story|post|on {_PLATFORM})\b",
        r"(?:download|get|install) our (?:\w+ ){0,2}app\b",
        r"now playing\b|\d{1,2}:\d\d ?/ ?\d{1,2}:\d\d[\W_]*$",
        r"(?:subscribe|log ?in|sign in|register)(?: now)? to (?:continue|keep) reading",
        r"already a (?:subscriber|member)\b",
        r"(?:©|\(c\)|copyright)\W{0,3}(?:19|20)\d\d|all rights reserved",
        r"[【\[［（(](?:推广|广告|赞助|廣告|推廣)[】\]］）)]",
        r"(?:推广|广告|赞助|(?:相关|延伸|推荐|扩展|更多)阅读|相关报道|延伸閱讀|相關閱讀)\s*[:：|]",
        r"(?:请|欢迎)?(?:订阅|訂閱)(?:我们|我們|本刊|本报|本站|本网).{0,12}(?:邮件|郵件|电子报|電子報|周刊|通讯|频道|公众号|简报)",
        r".{0,8}(?:使用|采用|利用)\s?cookies?|.{0,12}送到您的(?:邮箱|信箱)",
        r"(?:请|欢迎)?(?:扫描|扫码|长按|识别|掃描).{0,8}(?:二维码|二維碼|关注|加入|下载)",
        r"(?:请|欢迎)?(?:关注|搜索).{0,8}(?:公众号|官方微博)",
        r"(?:分享到|分享至|转发到)(?:微信|微博|朋友圈|QQ)",
        r"(?:请|欢迎|立即|点击)?下载(?:我们|本站|本报|本网)的?.{0,6}(?:客户端|APP\b)|正在播放",
        r"(?:登录|登陆|注册|订阅|开通会员|付费)(?:后|即可|以)(?:阅读|查看|继续)|已是(?:会员|用户)",
        r"版权(?:声明|所有)|未经(?:授权|许可|允许).{0,8}(?:不得|禁止|严禁)",
        r"(?:责任编辑|责编|編輯|编辑|免责声明)\s?[:：]",
    ),
    re.I,
)


def html(*, html_adverts: bool) -> FilterRule:
    """Main text of web pages, without menus, adverts, forms and comments; text without a tag is left alone."""
    trafilatura = require("trafilatura", extra="text", need="the cleaning rule html")

    def rule(text: str) -> str | Dropped:
        if _MARKUP.search(text) is None:
            return text
        # Halves of surrogate pairs cannot be handed to the parser.
        tree = trafilatura.load_html(text.encode("utf-8", errors="replace").decode("utf-8"))
        if tree is None:
            return Dropped("no main text")
        foreign = frozenset() if html_adverts else _foreign_lines(tree)  # extraction changes the tree
        found = trafilatura.extract(tree, include_comments=False)
        if found and not html_adverts:
            lines = found.split("\n")
            found = "\n".join(line for line in lines if _squeezed(line) not in foreign and not _is_notice(line))
        return found or Dropped("no main text")

    return rule


def _foreign_lines(tree: Any) -> frozenset[str]:
    """Every line, without its spaces, that elements foreign to the article can come out as."""
    sizes = _sizes(tree)
    most = _MOST * sizes[tree]
    lines = set()
    for element in tree.iter():
        if 0 < sizes.get(element, 0) < most and _is_foreign(element, sizes[element]):
            for box in _whole_box(element, sizes, most):
                for part in box.iter():
                    if part in sizes:
                        lines.add(_squeezed("".join(part.itertext())))
                        lines.update(_squeezed(own) for own in (part.text, part is not box and part.tail) if own)
    return frozenset(lines - {""})


def _sizes(tree: Any) -> dict[Any, int]:
    """Characters of text in every element, those inside it included; scripts and styles have none."""
    sizes: dict[Any, int] = {}
    for element in reversed(list(tree.iter())):
        if isinstance(element.tag, str) and element.tag not in ("script", "style", "noscript", "template"):
            own = len(element.text or "")
            sizes[element] = own + sum(sizes.get(child, 0) + len(child.tail or "") for child in element)
    return sizes


def _is_foreign(element: Any, size: int) -> bool:
    """Whether an element, of `size` characters, announces that it is not the article's."""
    if element.tag in _NO_ARTICLE:
        return True
    if element.tag == "a" and "sponsored" in element.get("rel", "").split():
        return True
    if element.tag in _INLINE:
        if element.getparent().tag not in ("div", "section", "aside"):
            return False  # part of a sentence
    elif element.tag not in _BLOCKS and element.tag not in _HEADINGS:
        return False
    elif any(map(_NAMES.fullmatch, _NAME_WORD.findall(f"{element.get('class', '')} {element.get('id', '')}"))):
        return True
    return size < _BOX and (_is_notice(_text(element)) or _is_pointer(element))


def _is_notice(text: str) -> bool:
    """Whether a line is a label of what is not the article, or a notice."""
    return len(text) < _BOX and (_is_label(text) or _NOTICE.match(text) is not None)


def _is_pointer(element: Any) -> bool:
    """Whether a paragraph is a few words, a colon and a link: the way to another article."""
    if element.tag != "p" or len(links := list(element.iter("a"))) != 1:
        return False
    text, target = _text(element), _text(links[0])
    return len(target) > 8 and text.endswith(target) and _LEAD_IN.fullmatch(text[: -len(target)]) is not None


def _is_label(text: str) -> bool:
    return len(text) <= _LABEL_SIZE and _LABEL.fullmatch(text) is not None


def _whole_box(element: Any, sizes: dict[Any, int], most: float) -> Iterator[Any]:
    """The small box around `element` that begins with it, and the list that follows if it is a heading."""
    text = _text(element)
    parent = element.getparent()
    while (
        parent is not None
        and parent.tag not in _WHOLE
        and sizes[parent] < min(most, _BOX)
        and _text(parent).startswith(text)
    ):
        element, parent = parent, parent.getparent()
    yield element
    following = element.getnext()
    if following is not None and following.tag in ("ul", "ol") and _is_label(text) and sizes[following] < most:
        yield following


def _text(element: Any) -> str:
    return " ".join("".join(element.itertext()).split())


def _squeezed(line: str) -> str:
    """A line without its spaces and the hyphen that trafilatura sets before items of lists."""
    return "".join(line.removeprefix("- ").split())
