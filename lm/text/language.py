"""Which language a text is in: by its script where that tells, by py3langid's model where it does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from lm.errors import require

_PART = 500  # characters
_PARTS = 4
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")
_HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff]")
_OTHER_WORD = re.compile(
    "[^\\W\\d_\u3041-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\u1100-\u11ff\U00020000-\U0003ffff]+"
)


def identify(text: str) -> tuple[str, float]:
    """The language of `text`, judged by at most 2,000 characters of it, from four places.

    Args:
      text: any text.

    Returns:
      An ISO 639-1 code ("zh" for Chinese of any kind), or "und" where there are no letters; and how sure that is,
      from 0 to 1.
    """
    sample = _sample(text)
    han, kana, hangul = (len(pattern.findall(sample)) for pattern in (_HAN, _KANA, _HANGUL))
    others = len(_OTHER_WORD.findall(sample))
    # About one and a half characters make a Chinese word, two to three a Korean one.
    east = (han + kana) / 1.5 + hangul / 2.5
    if east + others == 0:
        return "und", 0.0
    if east >= others:
        share = east / (east + others)
        if hangul > han + kana:
            return "ko", share
        return ("ja" if kana > 0.1 * (han + kana) else "zh"), share
    return _model()(sample)


def languages() -> frozenset[str]:
    """The codes that `identify` knows."""
    return frozenset(_identifier().labels) - _CHINESE


_CHINESE = frozenset(("yue", "wuu"))


@cache
def _identifier():
    module = require("py3langid.langid", extra="text", need="the cleaning rule language")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


@cache
def _model() -> Callable[[str], tuple[str, float]]:
    identifier = _identifier()

    def classify(sample: str) -> tuple[str, float]:
        code, confidence = identifier.classify(sample)
        return ("zh" if code in _CHINESE else code), confidence

    return classify


def _sample(text: str) -> str:
    if len(text) <= _PART * _PARTS:
        return text
    starts = (i * (len(text) - _PART) // (_PARTS - 1) for i in range(_PARTS))
    return "\n".join(text[start : start + _PART] for start in starts)
