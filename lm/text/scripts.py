"""Ranges of scripts that put no spaces between words, as the inside of a regular expression's `[...]`.

Each user says which of them it takes for words: what is a word for a filter was measured, what is one for a reader is
not. `lm.text.shingles` has ranges of its own, which may never change: they decide which documents are duplicates.
`lm.text.language` and `lm.text.encoding` tell scripts apart, which is another question.
"""

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Chinese characters."""
KANA = "\u3040-\u30ff"
"""Hiragana and Katakana."""
HANGUL = "\uac00-\ud7af"
"""Korean syllables; Korean has spaces, but what stands between them is more than a word."""
SOUTHEAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Thai, Lao, Myanmar and Khmer."""
