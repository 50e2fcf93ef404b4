"""Chinese words: textbook cuts, jieba's own, a slow twin of longest matching, and no traces left behind."""

import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.segment import (
    JiebaSegmenter,
    MaxMatch,
    agreement,
    make_segmenter,
    read_user_words,
    read_word_list,
)

WORDS = read_word_list(Path(__file__).with_name("word_list.txt"))
DATA = Path(__file__).parents[3] / "shared" / "data" / "zh"


def cut(text: str, direction: str, words: list[str] = WORDS) -> str:
    return "|".join(MaxMatch(words, direction=direction).words(text))


def test_textbook_cuts():
    assert cut("研究生命的起源", "forward") == "研究生|命|的|起源"
    assert cut("研究生命的起源", "backward") == "研究|生命|的|起源"
    assert cut("研究生命的起源", "bidirectional") == "研究|生命|的|起源", "as many words, fewer single characters"
    assert cut("北京清华大学", "bidirectional") == "北京|清华大学"
    assert cut("我 go2 C++,T恤quickly。\r\n", "forward") == "我| |go2| |C++|,|T恤|quick|ly|。|\r|\n"
    # Equal words and equal single characters: the one from the right.
    assert cut("甲乙丙", "bidirectional", ["甲乙", "乙丙"]) == "甲|乙丙"
    # Fewer words win, whichever way they were found.
    assert cut("甲乙丙丁", "bidirectional", ["甲乙", "丙丁", "乙丙丁"]) == "甲乙|丙丁"
    assert cut("", "bidirectional") == ""


def slow_forward(block: str, words: set[str]) -> list[str]:
    found = []
    while block:
        word = next((block[:n] for n in range(len(block), 1, -1) if block[:n] in words), None)
        if word is None:
            run = len(block) - len(block.lstrip("ab"))
            word = block[:run] or block[0]
        found.append(word)
        block = block[len(word) :]
    return found


def slow_backward(block: str, words: set[str]) -> list[str]:
    return [word[::-1] for word in reversed(slow_forward(block[::-1], {word[::-1] for word in words}))]


@given(
    text=st.text(alphabet="甲乙丙丁ab", max_size=14),
    words=st.sets(st.text(alphabet="甲乙丙丁ab", min_size=1, max_size=4), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_longest_matching_is_what_its_definition_says(text: str, words: set[str]):
    forward, backward = slow_forward(text, words), slow_backward(text, words)
    assert MaxMatch(words, direction="forward").words(text) == forward
    assert MaxMatch(words, direction="backward").words(text) == backward
    both = MaxMatch(words, direction="bidirectional").words(text)
    assert both in (forward, backward)
    assert len(both) == min(len(forward), len(backward))


mixed = st.text(alphabet=st.sampled_from("北京清华大学研究生命的起源abC+-._%12 \r\n\u3000，。！🙂é"), max_size=60)


@given(text=mixed | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), size=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_words_join_to_the_text_and_blocks_are_cut_apart_exactly(text: str, size: int):
    segmenters = [MaxMatch(WORDS, direction=way) for way in ("forward", "backward", "bidirectional")]
    if JIEBA is not None:
        segmenters.append(JIEBA)
    for segmenter in segmenters:
        assert "".join(segmenter.words(text)) == text
        pieces = list(segmenter.pieces(text, size))
        assert "".join(pieces) == text
        assert list(itertools.chain(*map(segmenter.words, pieces))) == segmenter.words(text)


try:
    JIEBA: JiebaSegmenter | None = JiebaSegmenter()
except UserError:
    JIEBA = None
with_jieba = pytest.mark.skipif(JIEBA is None, reason="jieba is an extra")


@with_jieba
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hmm", [True, False])
def test_jieba_cuts_as_the_library_does(hmm: bool, tmp_path: Path):
    import jieba

    theirs = jieba.Tokenizer()
    theirs.tmp_dir = str(tmp_path)
    texts = ["我来到北京清华大学。他来到了网易杭研大厦\r\n", "小明硕士毕业于中国科学院计算所，hello-world 3.14%"]
    if DATA.is_dir():
        texts.append((DATA / "CLUECorpusSmall_sampled.txt").read_text(encoding="utf-8")[:20_000])
    for text in texts:
        assert JiebaSegmenter(hmm=hmm).words(text) == theirs.lcut(text, HMM=hmm)


@with_jieba
def test_user_words_stay_with_their_segmenter(tmp_path: Path):
    text = "李小福是创新办主任也是云计算方面的专家"
    assert "云计算" not in JIEBA.words(text)
    path = tmp_path / "words.txt"
    path.write_text("云计算 5\n李小福 2 nr\n创新办\n", encoding="utf-8")
    mine = JiebaSegmenter(user_words=read_user_words(path))
    assert mine.words(text)[:3] == ["李小福", "是", "创新办"]
    assert "云计算" in mine.words(text)
    assert "云计算" not in JIEBA.words(text)
    assert "云计算" not in JiebaSegmenter().words(text)
    assert make_segmenter(mine.settings()).words(text) == mine.words(text)


@with_jieba
def test_a_block_without_end_takes_linear_time():
    text = "龘靐齉" * 4000  # unknown to the dictionary: all of it goes to the model that guesses words
    words = JIEBA.words(text)
    assert "".join(words) == text
    # Of no more than a block does jieba ever see at once.
    calls: list[int] = []
    watched = JiebaSegmenter()
    watched._cut = lambda block, HMM: calls.append(len(block)) or [block]
    watched.words(text)
    assert max(calls) <= 4096


def _words(text: str) -> list[str]:
    return JiebaSegmenter().words(text)


@with_jieba
@pytest.mark.parametrize("way", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_other_processes_find_the_same_words(way: str):
    text = "小明硕士毕业于中国科学院计算所，后在日本京都大学深造"
    sent = pickle.loads(pickle.dumps(JIEBA))
    assert sent.words(text) == JIEBA.words(text)
    with multiprocessing.get_context(way).Pool(1) as pool:
        assert pool.apply(_words, (text,)) == JIEBA.words(text)


@with_jieba
def test_jieba_says_nothing_and_leaves_nothing_behind(tmp_path: Path):
    program = "from lm.text.segment import JiebaSegmenter; print(JiebaSegmenter().words('清华大学'))"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("['清华大学']\n", "")
    assert list(tmp_path.iterdir()) == []


@with_jieba
def test_another_version_of_jieba_is_refused():
    settings = JIEBA.settings() | {"version": "0.1"}
    with pytest.raises(UserError, match=r"as jieba 0\.1 does, .*pip install jieba==0\.1"):
        make_segmenter(settings)


class Given(MaxMatch):
    """Says what it is told."""

    def __init__(self, said: list[str]):
        self.said = said

    def words(self, text: str) -> list[str]:
        return self.said


def test_agreement_counts_words_at_their_places():
    ours, theirs = Given(["研究生", "命", "，", "起源"]), Given(["研究", "生命", "，", "起", "源"])
    found = agreement(ours, theirs, ["研究生命，起源"])
    assert (found.precision, found.recall, found.f1) == (0, 0, 0)
    theirs = Given(["研究", "生命", "，", "起源"])
    found = agreement(ours, theirs, ["研究生命，起源"])
    assert (found.precision, found.recall) == (1 / 3, 1 / 3)
    found = agreement(Given(["起源", "a"]), Given(["起", "源", "a"]), ["起源a"])
    assert (found.precision, found.recall) == (1 / 2, 1 / 3)
    assert found.f1 == pytest.approx(2 / 5)


@with_jieba
@pytest.mark.skipif(not DATA.is_dir(), reason="no Chinese text here")
def test_jiebas_words_matched_longest_first_mostly_agree_with_jieba():
    text = (DATA / "CLUECorpusSmall_sampled.txt").read_text(encoding="utf-8")[:20_000]
    assert agreement(MaxMatch(read_word_list(None)), JIEBA, [text]).f1 > 0.85


@with_jieba
def test_the_default_list_is_what_jieba_knows():
    import jieba

    with (Path(jieba.__file__).parent / jieba.DEFAULT_DICT_NAME).open("rb") as file:
        known, _ = jieba.Tokenizer.gen_pfdict(file)
    assert read_word_list(None) == sorted(word for word, count in known.items() if count)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no word"),
        (b" \n\t\n", "holds no word"),
        (b"\xb1\xb1\xbe\xa9\n", "is not UTF-8 at byte 0"),
        (None, "cannot read"),
    ],
)
@pytest.mark.parametrize("read", [read_user_words, read_word_list])
def test_lists_that_cannot_be_read(content: bytes | None, message: str, read, tmp_path: Path):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_user_word_that_never_occurs_is_refused(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeff云计算 0\n", encoding="utf-8")
    with pytest.raises(UserError, match="gives '云计算' the count 0"):
        read_user_words(path)
