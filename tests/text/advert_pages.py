"""Web pages made for measuring: an article with something else in its middle, in English and in Chinese.

The articles and what interrupts them are written for this purpose. `pages()` gives each interruption its own page.
`TRAPS` are passages of an article that look like an interruption.
"""

from dataclasses import dataclass

ARTICLES = {
    "en": [
        "The river had been rising for three days before anyone in the village thought of moving the boats. By the "
        "time the ferryman reached the landing, two of them had already drifted past the old mill.",
        "Records kept at the parish since 1741 show only four floods of this height. The last one, in 1954, took the "
        "wooden bridge with it, and for eleven months the children were rowed to school.",
        "“My grandfather marked the water on this door,” says Anna Vogel, pointing to a line at the height of her "
        "shoulder. This year's mark is a hand's breadth below it.",
        "Engineers from the district blame the meadows that were drained upstream. A meadow holds back water like a "
        "sponge, they explain, whereas a field of maize lets it run off within hours.",
        "The council will decide in October whether two of the old meadows are to be flooded again. Farmers have asked "
        "for compensation, and most of the villagers seem to be on their side.",
        "Until then the boats stay on the square in front of the church, tied to the railings, just in case.",
    ],
    "zh": [
        "村里的老人说，这条河已经三十年没有涨过这么高的水了。等到摆渡人赶到码头的时候，有两条小船早已顺着水漂过了旧磨坊。",
        "县志里记载着四次这样的大水，最近的一次是在一九五四年。那一年木桥被冲走，孩子们坐了十一个月的船去上学。",
        "“我爷爷把水位刻在这扇门上。”王秀兰指着齐肩高的一道线说。今年的水位比它只低了一个巴掌。",
        "水利局的工程师认为，原因在于上游的湿地被排干了。湿地像海绵一样蓄水，而玉米地里的雨水几个小时就会流走。",
        "十月份，镇里要决定是否把其中两片湿地恢复原状。农户们要求得到补偿，多数村民看来也站在他们一边。",
        "在那之前，小船都停在祠堂前面的空地上，用绳子拴着栏杆，以防万一。",
    ],
}

# Name: (English, Chinese). Half of them carry a telling class, the others the meaningless ones of generated styles.
INTERRUPTIONS: dict[str, tuple[str, str]] = {
    "advert box": (
        '<div class="ad-slot ad-slot--inline"><span>Advertisement</span><p>Fly to Lisbon from 39 euros. '
        "Book your seat today.</p></div>",
        '<div class="guanggao-box"><span>广告</span><p>双十一大促，全场五折起，满三百减五十，快来抢购吧。</p></div>',
    ),
    "advert box, generated class": (
        '<div class="css-1q2w3e"><span class="css-9x">Advertisement</span><p class="css-0k">The new family van. Seven '
        "seats, one price. Test drive it now.</p></div>",
        '<div class="css-1q2w3e"><span class="css-9x">广告</span><p class="css-0k">全新七座家用车上市，现在预约试驾，'
        "即享万元补贴。</p></div>",
    ),
    "advert marker": (
        "<p>Article continues after advertisement</p>",
        "<p>（广告）</p>",
    ),
    "related list": (
        '<div class="related-articles"><h3>Related articles</h3><ul><li><a href="/a">Ten lakes you must see</a></li>'
        '<li><a href="/b">Why rivers bend to the left</a></li><li><a href="/c">The ferryman\'s last summer</a></li>'
        "</ul></div>",
        '<div class="xiangguan-yuedu"><h3>相关阅读</h3><ul><li><a href="/a">一定要去的十个湖泊</a></li>'
        '<li><a href="/b">河流为什么总是弯弯曲曲</a></li><li><a href="/c">摆渡人的最后一个夏天</a></li></ul></div>',
    ),
    "related list, generated class": (
        '<section class="sc-bdVaJa"><h4>You may also like</h4><ul><li><a href="/a">Ten lakes you must see</a></li>'
        '<li><a href="/b">Why rivers bend to the left</a></li></ul></section>',
        '<section class="sc-bdVaJa"><h4>猜你喜欢</h4><ul><li><a href="/a">一定要去的十个湖泊</a></li>'
        '<li><a href="/b">河流为什么总是弯弯曲曲</a></li></ul></section>',
    ),
    "related, one line": (
        '<p><strong>Read more:</strong> <a href="/a">Ten lakes you must see before you are forty</a></p>',
        '<p><strong>延伸阅读：</strong><a href="/a">四十岁以前一定要去的十个湖泊</a></p>',
    ),
    "newsletter form": (
        '<form action="/subscribe"><h3>Never miss a story</h3><p>Sign up for our newsletter and get the best of the '
        'week in your inbox.</p><input name="email"><button>Subscribe</button></form>',
        '<form action="/subscribe"><h3>不错过任何精彩</h3><p>订阅我们的邮件，每周为您精选好文章。</p>'
        '<input name="email"><button>订阅</button></form>',
    ),
    "newsletter box": (
        '<div class="newsletter-signup"><p>Get our morning briefing delivered to your inbox every weekday.</p></div>',
        '<div class="newsletter-signup"><p>每个工作日早上，我们把要闻送到您的邮箱。</p></div>',
    ),
    "newsletter paragraph": (
        "<p><em>Sign up for our weekly newsletter and get more stories like this one.</em></p>",
        "<p><em>订阅本刊电子报，每周获取更多精彩内容。</em></p>",
    ),
    "sponsored paragraph": (
        "<p>Sponsored: With AquaGuard your cellar stays dry in any weather. Order your pump today and save 30%.</p>",
        "<p>【推广】有了安居牌水泵，地下室再大的雨也不怕，今日下单立减三百元。</p>",
    ),
    "sponsored link": (
        '<p><a rel="sponsored nofollow" href="https://shop.example/x">Save 40% on mattresses this week only</a></p>',
        '<p><a rel="sponsored nofollow" href="https://shop.example/x">本周特价：乳胶床垫六折优惠</a></p>',
    ),
    "product box": (
        '<div class="product-card"><h4>AquaGuard 3000 pump</h4><span>€ 129.00</span><p>Quiet, strong and rustproof.</p>'
        '<a href="https://shop.example/y">Buy at Example Shop</a></div>',
        '<div class="product-card"><h4>安居牌水泵三千型</h4><span>¥ 899</span><p>静音、强劲、不生锈。</p>'
        '<a href="https://shop.example/y">去购买</a></div>',
    ),
    "caption": (
        '<figure><img src="/i.jpg"><figcaption>The landing on Monday morning. Photo: J. Doe/Example Images'
        "</figcaption></figure>",
        '<figure><img src="/i.jpg"><figcaption>周一早晨的码头。张三/摄 视觉示例供图</figcaption></figure>',
    ),
    "cookie banner": (
        '<div class="css-77ab"><p>We use cookies to improve your experience. By continuing you agree to our privacy '
        "policy.</p><button>Accept all</button></div>",
        '<div class="css-77ab"><p>本网站使用Cookie以改善您的体验，继续浏览即表示您同意我们的隐私政策。</p>'
        "<button>全部接受</button></div>",
    ),
    "share bar": (
        '<div class="css-55"><a href="#">Share on Facebook</a> <a href="#">Tweet</a> <a href="#">Email this article</a>'
        "</div>",
        '<div class="css-55"><a href="#">分享到微信</a> <a href="#">分享到微博</a> <a href="#">收藏本文</a></div>',
    ),
    "follow us": (
        "<p>Follow us on Facebook, Instagram and WhatsApp for the latest news.</p>",
        "<p>扫描二维码，关注我们的微信公众号，第一时间获取最新资讯。</p>",
    ),
    "app": (
        '<div class="css-31"><p>Download our app for faster news and fewer interruptions.</p></div>',
        '<div class="css-31"><p>下载我们的客户端，看新闻更快更方便。</p></div>',
    ),
    "video": (
        '<div class="video-player"><p>Now playing: Floods from above</p><span>0:00 / 2:31</span></div>',
        '<div class="video-player"><p>正在播放：航拍洪水</p><span>0:00 / 2:31</span></div>',
    ),
    "paywall": (
        '<div class="css-4"><p>Subscribe to continue reading this article.</p><p>Already a subscriber? Log in</p>'
        "</div>",
        '<div class="css-4"><p>登录后阅读全文，开通会员享更多权益。</p><p>已是会员？立即登录</p></div>',
    ),
    "rights": (
        "<p>© 2024 Example News. All rights reserved. This material may not be published or rewritten.</p>",
        "<p>版权声明：本文版权归示例网所有，未经授权不得转载。</p><p>（责任编辑：李四）</p>",
    ),
    "advert by id": (
        '<div id="div-gpt-ad-15523"><p>The bank that calls you back. Open an account by phone.</p></div>',
        '<div id="div-gpt-ad-15523"><p>存款利率再创新高，电话预约开户。</p></div>',
    ),
    "advert marker, shouting": (
        "<p>ADVERTISEMENT - CONTINUE READING BELOW</p>",
        "<p>广告 · 继续阅读请下滑</p>",
    ),
    "other articles, list": (
        '<div class="c12"><h4>Also on Example News</h4><ul><li><a href="/a">Ten lakes you must see</a></li>'
        '<li><a href="/b">Why rivers bend to the left</a></li></ul></div>',
        '<div class="c12"><h4>热门推荐</h4><ul><li><a href="/a">一定要去的十个湖泊</a></li>'
        '<li><a href="/b">河流为什么总是弯弯曲曲</a></li></ul></div>',
    ),
    "other articles, one line": (
        '<p><b>Don\'t miss:</b> <a href="/a">Ten lakes you must see before you are forty</a></p>',
        '<p>点击进入专题：<a href="/a">四十岁以前一定要去的十个湖泊</a></p>',
    ),
    "newsletter, friendly": (
        "<p>Enjoying this story? Get more like it with our daily digest.</p>",
        "<p>喜欢这篇文章？欢迎订阅我们的每日简报。</p>",
    ),
    "partner": (
        "<p>Partner content: How AquaGuard keeps ten thousand cellars dry.</p>",
        "<p>合作推广：安居牌水泵守护一万个地下室。</p>",
    ),
    "affiliate notice": (
        "<p>This article contains affiliate links; we may earn a commission when you buy through them.</p>",
        "<p>本文含有返利链接，您购买后我们可能获得佣金。</p>",
    ),
    "donations": (
        "<p>Support our journalism from as little as one euro a week.</p>",
        "<p>您的打赏是我们继续写作的动力。</p>",
    ),
    "tips": (
        "<p>Do you know more about this? Write to tips@example.com.</p>",
        "<p>新闻线索请发至邮箱，一经采用即有奖励。</p>",
    ),
    "channel": (
        "<p>Click here to subscribe to our YouTube channel.</p>",
        "<p>更多精彩内容，请关注示例网视频号。</p>",
    ),
    "app, short": (
        '<div class="c9"><p>Open in the app</p></div>',
        '<div class="c9"><p>打开APP阅读全文</p></div>',
    ),
    "audio": (
        '<div class="c7"><span>Listen to this article</span> <span>4 min</span></div>',
        '<div class="c7"><span>听全文</span> <span>4分钟</span></div>',
    ),
    "credit": (
        "<p>Image: J. Doe / Example Images</p>",
        "<p>来源：示例网 作者：张三 编辑：李四</p>",
    ),
}

# Written after the rules were, which have not been changed since: how far they reach beyond what they were made with.
UNSEEN: dict[str, tuple[str, str]] = {
    "advert by class": (
        '<div class="sponsoredLink-wrapper"><p>A roof over your head in nine days, guaranteed.</p></div>',
        '<div class="m-advert-wrap"><p>九天搭好屋顶，质量有保证。</p></div>',
    ),
    "advert by text": (
        "<p>From our partners: A roof over your head in nine days, guaranteed.</p>",
        "<p>【广告】九天搭好屋顶，质量有保证，详情请来电咨询。</p>",
    ),
    "other article": (
        '<p>In pictures: <a href="/a">Floods of the century, from 1784 until today</a></p>',
        '<p>往期回顾：<a href="/a">百年洪水纪实，从一七八四年到今天</a></p>',
    ),
    "other articles": (
        '<div class="k3"><h3>Trending now</h3><ol><li><a href="/a">The bridge that swims</a></li>'
        '<li><a href="/b">A winter without ice</a></li></ol></div>',
        '<div class="k3"><h3>大家还在看</h3><ol><li><a href="/a">会漂的桥</a></li>'
        '<li><a href="/b">一个没有冰的冬天</a></li></ol></div>',
    ),
    "newsletter": (
        "<p>Sign up here to receive our weekly dispatch on the environment.</p>",
        "<p>欢迎订阅《示例周刊》电子版，每周五准时送达。</p>",
    ),
    "channel": (
        "<p>Join our Telegram group to discuss this story.</p>",
        "<p>想看更多内容，请搜索并关注微信公众号“示例河流”。</p>",
    ),
    "reuse": (
        "<p>To republish this article, please contact the editors.</p>",
        "<p>如需转载，请联系本站获得授权。</p>",
    ),
    "comments": (
        "<p>What do you think? Tell us in the comments below.</p>",
        "<p>对此你怎么看？欢迎在评论区留言。</p>",
    ),
}

TRAPS: dict[str, tuple[str, str]] = {
    "about adverts": (
        "<p>Advertisement revenue at the local paper fell by a third last year, which is why nobody was sent to the "
        "river.</p>",
        "<p>广告收入去年下降了三分之一，所以县报没有派人到河边去采访。</p>",
    ),
    "innocent class": (
        '<div class="adaptive gradient header-shadow download-ready"><p>The sandbags came on Tuesday, four hundred of '
        "them, on a truck borrowed from the brewery.</p></div>",
        '<div class="adaptive gradient header-shadow download-ready"><p>'
        "沙袋是星期二运来的，一共四百个，卡车是向酒厂借的。</p></div>",
    ),
    "linked words": (
        '<p>The <a href="/w">ministry of water</a> and the <a href="/u">university of the district</a> are to report '
        "on the dikes, in spring at the latest.</p>",
        '<p><a href="/w">水利部门</a>和<a href="/u">省里的大学</a>最迟在明年春天要拿出关于堤坝的报告。</p>',
    ),
    "quoted call": (
        "<p>On the board beside the church somebody had written: follow us to the hill when the bell rings, and bring "
        "blankets. Everybody did so, and nobody was hurt.</p>",
        "<p>祠堂旁边的黑板上不知是谁写着：钟响以后跟我们上山，带好被子。大家都照办了，没有一个人受伤。</p>",
    ),
    "short line": (
        "<p>It was over.</p>",
        "<p>水退了。</p>",
    ),
    "list of facts": (
        "<ul><li>Height of the water: 4.12 metres</li><li>Houses evacuated: 37</li><li>Volunteers: 210</li></ul>",
        "<ul><li>水位高度：四点一二米</li><li>疏散住户：三十七户</li><li>志愿者：二百一十人</li></ul>",
    ),
    "related in a sentence": (
        "<p>Related damage further down the valley, to the railway above all, is put at two million.</p>",
        "<p>相关损失还包括下游的铁路，估计在两百万元左右。</p>",
    ),
    "instructions": (
        "<p>Download the map, open it in a browser and look for the blue line.</p>",
        "<p>下载客户端地图，点击查看按钮，就能找到那条蓝线。</p>",
    ),
    "subscribed": (
        "<p>Subscribe to that opinion or not, the meadows have to come back, says the engineer.</p>",
        "<p>订阅报纸的人不多，消息大都是靠广播传开的。</p>",
    ),
}

GROUPS = {"interruptions": (INTERRUPTIONS, True), "unseen": (UNSEEN, True), "traps": (TRAPS, False)}
_FRAME = """<!DOCTYPE html><html lang="{language}"><head><meta charset="utf-8"><title>{title}</title></head><body>
<header><nav><ul><li><a href="/">{home}</a></li><li><a href="/n">{news}</a></li><li><a href="/s">{sport}</a></li></ul>
</nav></header><main><article><h1>{title}</h1>
{body}
</article></main>
<footer><p><a href="/about">{about}</a></p></footer></body></html>"""
_WORDS = {
    "en": {
        "title": "The river above the village",
        "home": "Home",
        "news": "News",
        "sport": "Sport",
        "about": "About us",
    },
    "zh": {"title": "村子上游的那条河", "home": "首页", "news": "新闻", "sport": "体育", "about": "关于我们"},
}


@dataclass(frozen=True)
class Page:
    """A page and what belongs to its article."""

    kind: str
    language: str
    html: str
    article: str
    foreign: str
    """The markup that does not belong; empty on a trap."""


def pages(*groups: str) -> list[Page]:
    """A page for everything in these of `GROUPS`, in both languages."""
    return [
        _page(kind, language, snippet, foreign)
        for kinds, foreign in map(GROUPS.__getitem__, groups)
        for kind, snippets in kinds.items()
        for language, snippet in zip(("en", "zh"), snippets)
    ]


def _page(kind: str, language: str, snippet: str, foreign: bool) -> Page:
    paragraphs = [f"<p>{paragraph}</p>" for paragraph in ARTICLES[language]]
    middle = len(paragraphs) // 2
    body = "\n".join([*paragraphs[:middle], snippet, *paragraphs[middle:]])
    article = paragraphs if foreign else [*paragraphs[:middle], snippet, *paragraphs[middle:]]
    return Page(
        kind=kind,
        language=language,
        html=_FRAME.format(language=language, body=body, **_WORDS[language]),
        article="\n".join([f"<h1>{_WORDS[language]['title']}</h1>", *article]),
        foreign=snippet if foreign else "",
    )
