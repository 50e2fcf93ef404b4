"""Statistics for the report: what counts as a word, and how n-grams are written."""

import pytest

from lm.data.statistics import Statistics


@pytest.mark.parametrize(
    ("text", "words", "pairs"),
    [
        ("The fox, the fox", ["fox", "the"], ["the fox", "fox the"]),
        ("天气天气", ["天", "气"], ["天气", "气天"]),
        ("かな", ["か", "な"], ["かな"]),
        ("กาก", ["ก", "า"], ["กา", "าก"]),  # Thai
        ("𠀀𠀁", ["𠀀", "𠀁"], ["𠀀𠀁"]),  # beyond the first plane
        ("GPT模型", ["gpt", "型", "模"], ["gpt 模", "模型"]),
        ("우리 집 앞", ["앞", "우리", "집"], ["우리 집", "집 앞"]),  # Korean puts spaces
    ],
)
def test_ngrams_are_of_words_or_of_characters_where_nothing_separates_words(text: str, words: list, pairs: list):
    statistics = Statistics()
    statistics.add(text)
    merged = Statistics.merged([statistics.to_dict()])
    assert sorted(word for word, _ in merged.top(1, 9)) == sorted(words)
    assert sorted(pair for pair, _ in merged.top(2, 9)) == sorted(pairs)
