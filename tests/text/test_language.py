"""Languages: told apart on text nobody here wrote."""

import json
from pathlib import Path

import pytest

from lm.text import filters
from lm.text.filters import Dropped
from lm.text.language import identify, languages

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The river had been rising for three days before anyone thought of the boats.", "en"),
        ("Der Fluss stieg schon seit drei Tagen, bevor jemand an die Boote dachte.", "de"),
        ("La rivière montait depuis trois jours avant que quelqu'un ne pense aux bateaux.", "fr"),
        ("Вода в реке поднималась уже третий день.", "ru"),
        ("村里的老人说，这条河已经三十年没有涨过这么高的水了。", "zh"),
        ("村裡的老人說，這條河已經三十年沒有漲過這麼高的水了。", "zh"),
        ("用 JAX 训练一个 Transformer 模型，需要先安装 Python 和 CUDA。", "zh"),
        ("川の水は三日前から上がり続けていました。", "ja"),
        ("마을 사람들은 올해 비가 많이 왔다고 말했다.", "ko"),
        ("The Chinese word for river is 河, and for water 水, as every pupil knows.", "en"),
        ("", "und"),
        ("12345 --- 67.8", "und"),
    ],
)
def test_languages_are_told_apart(text: str, code: str):
    found, confidence = identify(text)
    assert found == code
    assert 0 <= confidence <= 1


def test_long_documents_are_judged_by_samples_from_everywhere():
    english = "The river had been rising for three days before anyone thought of the boats. " * 200
    assert identify(english)[0] == "en"
    assert identify(english[:1000] + "村里的老人说，这条河已经三十年没有涨过这么高的水了。" * 1000)[0] == "zh"


def test_codes():
    assert {"en", "zh", "de", "ja", "ko", "fr", "ru"} <= languages()
    assert "yue" not in languages()


def test_the_filter_names_what_it_found():
    rule = filters.language(languages=("en", "zh"), min_language_confidence=0.0)
    assert rule("Der Fluss stieg schon seit drei Tagen.") == Dropped("language de")
    assert rule("村里的老人说话。") == "村里的老人说话。"
    english = "The Danish word for bread is brød."
    confidence = identify(english)[1]
    assert 0 < confidence < 1
    assert filters.language(languages=("en",), min_language_confidence=confidence)(english) == english
    unsure = filters.language(languages=("en",), min_language_confidence=confidence + 0.01)(english)
    assert unsure == Dropped("language uncertain")


@pytest.mark.skipif(not (DATA / "zh").is_dir(), reason="needs ../shared/data")
def test_accuracy_on_real_text():
    german, english = ((DATA / f"multi30k/val.{code}").read_text("utf-8").splitlines()[:300] for code in ("de", "en"))
    titles = [
        line.split("\t")[0] for line in (DATA / "zh/thucnews_short_dev.txt").read_text("utf-8").splitlines()[::20]
    ]
    articles = json.loads((DATA / "qa/xquad.en.json").read_text("utf-8"))["data"]
    paragraphs = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]][:100]
    for code, texts, at_least in (
        ("de", german, 0.95),
        ("en", english, 0.9),
        ("zh", titles, 0.97),
        ("en", paragraphs, 0.98),
    ):
        right = sum(identify(text)[0] == code for text in texts)
        assert right >= at_least * len(texts), (code, right, len(texts))
