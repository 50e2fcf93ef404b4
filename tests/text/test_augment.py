"""What each operation does to words and sentences, how often, and that nothing but its name decides it."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import config as configs
from lm.errors import UserError
from lm.text.augment import AugmentConfig, Augmenter, augment_fingerprint, check_augment_config, read_table

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WORDLESS = ("delete", "swap", "splice", "split", "typos")
TEXT = (
    "The quick brown fox jumps over the lazy dog. Meanwhile seven wizards boxed with five vexing goblins!\n"
    "Is there anybody who packed my box with liquor jugs? 今天天气非常好。我们一起去北京旅游吧！"
)


def augmenter(*operations: str, copies: int = 1, rate: float = 0.3, **settings: object) -> Augmenter:
    return Augmenter(AugmentConfig(copies=copies, operations=operations, rate=rate, **settings))


def words(text: str) -> list[str]:
    return re.findall(r"[一-鿿]|[A-Za-z']+", text)


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "table.tsv"
    path.write_text(
        "quick\tfast\tspeedy\nin front of\tbefore\nfox\tdog\nParis\tLondon\nC++\tRust\n"
        "高兴\t开心\n高\t矮\n北京\t上海\t广州\n",
        encoding="utf-8",
    )
    return str(path)


def test_no_copies_by_default() -> None:
    check_augment_config(AugmentConfig())
    assert Augmenter(AugmentConfig())(TEXT, "k") == []
    assert augment_fingerprint(AugmentConfig()) == {}


def test_a_copy_depends_on_seed_key_and_number_alone() -> None:
    make = augmenter("delete", "swap", "typos", copies=3)
    first = make(TEXT, "a:1")
    assert len(set(first)) == 3
    make("something else before", "b")
    assert make(TEXT, "a:1") == first
    assert augmenter("delete", "swap", "typos", copies=5)(TEXT, "a:1")[:3] == first
    assert not set(make(TEXT, "a:2")) & set(first)
    assert not set(augmenter("delete", "swap", "typos", copies=3, seed=1)(TEXT, "a:1")) & set(first)


def test_copies_are_fixed() -> None:
    # Golden values, in whatever order Python hashes: another copy would be another dataset.
    make = augmenter("delete", "swap", "splice", "split", "typos", rate=0.2)
    assert make("The cat sat on the mat. A dog barked at the moon. 我们今天去北京。", "key") == [
        "mat sat cat the The. A barked at the moon. 我们今天京北去。"
    ]


def test_what_repeats_the_document_is_left_out() -> None:
    assert augmenter("swap", copies=3, rate=1.0)("word", "k") == []
    assert augmenter("swap", copies=3, rate=1.0)("two words", "k") == []  # swapped and swapped back
    assert augmenter("delete", copies=9, rate=0.5)("two words", "k") in (["two", "words"], ["words", "two"])
    assert augmenter("typos", copies=2)("没有字母。", "k") == []
    assert augmenter("delete", copies=2)("", "k") == []


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.one_of(st.characters(), st.sampled_from(" .。，\n高兴ab")), max_size=50),
    operation=st.sampled_from(WORDLESS),
    rate=st.sampled_from([0.1, 1.0]),
)
def test_any_text_can_be_altered(text: str, operation: str, rate: float) -> None:
    copies = augmenter(operation, copies=3, rate=rate)(text, "k")
    assert len({text, *copies}) == len(copies) + 1


def subsequence(short: list[str], long: list[str]) -> bool:
    remaining = iter(long)
    return all(word in remaining for word in short)


def test_delete_leaves_out_words_and_their_space() -> None:
    for copy in augmenter("delete", copies=50, rate=0.5)(TEXT, "k"):
        assert subsequence(words(copy), words(TEXT))
        assert re.sub(r"[\w ]", "", copy) == re.sub(r"[\w ]", "", TEXT)  # all full stops and lines stay
        assert "  " not in copy
        assert not re.search(r"^ | $| [.!?]", copy, re.MULTILINE)
        for sentence in re.split(r"[.!?。！]", copy)[:-1]:
            assert words(sentence)
    (copy,) = augmenter("delete", rate=1.0)("One two, three four. 五六七", "k")
    assert re.fullmatch(r"four\. 七|\w+,?\. .", copy) or len(words(copy)) == 2


def test_delete_keeps_the_spacing_of_commas_and_of_tokenised_text() -> None:
    found = set(augmenter("delete", copies=200, rate=0.3)("so we ran to Paris, then home", "k"))
    assert "so we ran to, then home" in found
    assert not any(" ," in copy or copy.endswith(" ") for copy in found)
    for copy in augmenter("delete", copies=50)("a b , c d .", "k"):
        assert re.fullmatch(r"(\w )*, (\w )*\.|(\w )+\.", copy), copy


def rate_of(kind: str, text: str, changed: object, rate: float, **settings: object) -> float:
    copies = augmenter(kind, copies=1, rate=rate, **settings)
    total = sum(changed(copy) for i in range(60) for copy in copies(text, str(i)))  # type: ignore[operator]
    return total / 60


def test_the_rate_is_the_share_of_words_altered(table: str) -> None:
    text = " ".join(f"w{i}x quick" for i in range(100)) + "."

    def removed(copy: str) -> int:
        return 200 - len(copy.split())

    def differing(copy: str) -> int:
        return sum(a != b for a, b in zip(copy.split(), text.split(), strict=True))

    assert rate_of("delete", text, removed, 0.1) == pytest.approx(20, rel=0.1)
    assert rate_of("replace", text, differing, 0.2, table=table) == pytest.approx(20, rel=0.1)  # of the 100 quick
    assert rate_of("typos", text, differing, 0.1) == pytest.approx(20, rel=0.1)
    # A swap moves two words, where it does not meet a word of its kind or one that was moved.
    assert 25 < rate_of("swap", text, differing, 0.1) < 40


def test_the_rate_is_the_share_of_sentences_altered() -> None:
    text = " ".join(f"This is sentence number {i} of them all." for i in range(100))

    def more(copy: str) -> int:
        return copy.count(".") - 100

    def differing(copy: str) -> int:
        return len(set(copy.split(".")) - set(text.split(".")))

    assert rate_of("split", text, more, 0.2) == pytest.approx(20, rel=0.1)
    assert rate_of("splice", text, differing, 0.2) == pytest.approx(20, rel=0.2)


def test_swap_moves_words_within_their_sentence() -> None:
    for copy in augmenter("swap", copies=30)(TEXT, "k"):
        before, after = (re.split(r"(?<=[.!?。！])", text) for text in (TEXT, copy))
        assert [Counter(words(s)) for s in before] == [Counter(words(s)) for s in after]
        assert re.sub(r"\w+", "w", copy) == re.sub(r"\w+", "w", TEXT)


def test_splice_joins_a_beginning_with_an_end() -> None:
    sentences = ["a1 a2 a3 a4", "b1 b2 b3", "c1 c2 c3 c4 c5"]
    text = ". ".join(sentences) + "."
    ends = Counter()
    for copy in augmenter("splice", copies=60, rate=0.5)(text, "k"):
        for own, found in zip(sentences, copy[:-1].split(". "), strict=True):
            if found != own:
                made = found.split()
                heads = [n for n in range(1, len(made)) if own.split()[:n] == made[:n] and len(own.split()) > n]
                others = [other.split() for other in sentences if other != own]
                fits = [
                    other[0][0]
                    for n, other in itertools.product(heads, others)
                    if len(made) - n < len(other) and other[n - len(made) :] == made[n:]
                ]
                assert fits, copy
                ends[own[0] + fits[0]] += 1
    assert set(ends) == {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_split_makes_two_sentences_of_one() -> None:
    text = "The fox ran, over the dog. we walk (slowly) home"
    found = set(augmenter("split", copies=40, rate=0.5)(text, "k"))
    for copy in found:
        assert [word.lower() for word in words(copy)] == [word.lower() for word in words(text)]
    # A comma goes; the new sentence has a capital where the old one has; brackets are not cut open.
    assert "The fox ran. Over the dog. we walk (slowly) home" in found
    assert "The fox ran, over the dog. we. walk (slowly) home" in found
    assert not any(re.search(r"walk\.|slowly\.|,\.", copy) for copy in found)
    assert "今天天气。很好！" in augmenter("split", copies=20, rate=1.0)("今天天气，很好！", "k")
    for copy in augmenter("split", copies=5, rate=1.0)("the fox ran .\n", "k"):
        assert re.fullmatch(r"(\w+ )+\. (\w+ )+\.\n", copy)


KEYS = {"q": "wa", "a": "qwsz", "g": "fhtyvb", "m": "njk", "p": "ol"}


def test_typos_are_slips_of_the_keyboard() -> None:
    kinds: Counter[str] = Counter()
    for word in ("Quagmp", "MAGPQ"):
        for copy in augmenter("typos", copies=200, rate=1.0)(word, "k"):
            pairs = list(itertools.zip_longest(copy, word, fillvalue=""))
            if len(copy) == len(word):
                (where, *more) = [i for i, (a, b) in enumerate(pairs) if a != b]
                if more:
                    assert more == [where + 1]
                    assert copy[where : where + 2] == word[where + 1] + word[where]
                    kinds["transposed"] += 1
                else:
                    assert copy[where].isupper() == word[where].isupper()
                    kinds["neighbour"] += 1
                    if word[where].lower() in KEYS:
                        assert copy[where].lower() in KEYS[word[where].lower()]
            elif len(copy) < len(word):
                assert copy in {word[:i] + word[i + 1 :] for i in range(len(word))}
                kinds["missing"] += 1
            else:
                assert copy in {word[: i + 1] + word[i:] for i in range(len(word))}
                kinds["doubled"] += 1
    assert set(kinds) == {"transposed", "neighbour", "missing", "doubled"}
    for copy in augmenter("typos", copies=20, rate=1.0)(TEXT, "k"):
        assert re.sub(r"[^一-鿿。！]", "", copy) == re.sub(r"[^一-鿿。！]", "", TEXT)
        assert len(copy.split()) == len(TEXT.split())


def test_replace_takes_whole_words_and_the_longest(table: str) -> None:
    def all_copies(text: str, **settings: object) -> set[str]:
        return set(augmenter("replace", copies=20, rate=1.0, table=table, **settings)(text, "k"))

    assert all_copies("a quick one") == {"a fast one", "a speedy one"}
    assert all_copies("Quick!") == {"Fast!", "Speedy!"}
    assert all_copies("QUICK") == {"FAST", "SPEEDY"}
    assert all_copies("he stood in front of it") == {"he stood before it"}
    assert all_copies("before it") == {"in front of it"}
    assert all_copies("quickly foxes quick-fix") == set()
    assert all_copies("the fox") == {"the dog"}
    assert all_copies("Paris by night") == {"London by night"}
    assert all_copies("write C++, not C") == {"write Rust, not C"}
    assert all_copies("很高兴") == {"很开心"}  # and not 很矮兴
    assert all_copies("去北京。") == {"去上海。", "去广州。"}
    assert all_copies("İ quick") == {"İ fast", "İ speedy"}  # whose small form has two characters


def test_replace_of_jieba_words_spares_other_words(tmp_path: Path) -> None:
    pytest.importorskip("jieba")
    path = tmp_path / "table.tsv"
    path.write_text("和\t与\n清华大学\t北京大学\n", encoding="utf-8")
    text = "和平与清华大学和他"
    characters = augmenter("replace", copies=1, rate=1.0, table=str(path))(text, "k")
    by_words = augmenter("replace", copies=1, rate=1.0, table=str(path), chinese="words")(text, "k")
    assert characters == ["与平和北京大学与他"]
    assert by_words == ["和平和北京大学与他"]


def test_chinese_is_never_one_word() -> None:
    text = "今天天气非常好我们一起去北京旅游"
    (copy,) = augmenter("delete", rate=0.2)(text, "k")
    assert 1 < len(copy) < len(text)
    pytest.importorskip("jieba")
    for copy in augmenter("delete", copies=10, rate=0.2, chinese="words")(text, "k"):
        assert "北京" in copy or ("北" not in copy and "京" not in copy)


def test_operations_follow_their_order(table: str) -> None:
    replaced_first = augmenter("replace", "typos", rate=1.0, copies=30, table=table)("quick", "k")
    typos_first = augmenter("typos", "replace", rate=1.0, copies=30, table=table)("quick", "k")
    assert not {"fast", "speedy"} & set(replaced_first)
    assert all(abs(len(copy) - 5) <= 1 for copy in typos_first)
    assert any(len(copy) < 5 and copy[0] == "f" for copy in replaced_first)


def test_tables_may_be_json(tmp_path: Path) -> None:
    lists, classes = tmp_path / "lists.json", tmp_path / "classes.json"
    lists.write_text(json.dumps([["a", "b"], ["c", "d e"]]))
    classes.write_text(json.dumps({"city": ["Paris", "London"], "颜色": ["红", "绿"]}, ensure_ascii=False), "utf-8")
    assert read_table(lists) == [["a", "b"], ["c", "d e"]]
    assert read_table(classes) == [["Paris", "London"], ["红", "绿"]]
    assert augmenter("replace", rate=1.0, table=str(classes))("Paris 红", "k") == ["London 绿"]


def test_the_fingerprint_follows_all_that_decides(table: str, tmp_path: Path) -> None:
    config = AugmentConfig(copies=2, operations=("replace", "swap"), table=table)
    first = augment_fingerprint(config)
    assert json.loads(json.dumps(first)) == first
    moved = tmp_path / "moved.tsv"
    moved.write_bytes(Path(table).read_bytes())
    assert augment_fingerprint(dataclasses.replace(config, table=str(moved))) == first
    pytest.importorskip("jieba")
    changes = ({"copies": 3}, {"operations": ("swap", "replace")}, {"rate": 0.2}, {"seed": 1}, {"chinese": "words"})
    others = [augment_fingerprint(dataclasses.replace(config, **change)) for change in changes]
    moved.write_text("x\ty\n")
    others.append(augment_fingerprint(dataclasses.replace(config, table=str(moved))))
    assert len({json.dumps(value) for value in [first, *others]}) == 7


def test_settings_are_read_back() -> None:
    config = AugmentConfig(copies=2, operations=("swap", "typos"))
    assert configs.from_dict(AugmentConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    parsed = configs.parse(AugmentConfig, AugmentConfig(), ["--copies", "2", "--operations", "swap", "typos"], prog="x")
    assert parsed == config


ON = {"copies": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"copies": -1}, "augment.copies is -1; it must be 0 (no augmentation) or more"),
        ({"rate": 0.5}, "augment.rate is set, but augment.copies is 0; set augment.copies to 1 or more"),
        ({**ON, "operations": ()}, "augment.operations is empty; list some of replace, delete, swap, splice"),
        ({**ON, "operations": ("shuffle",)}, "augment.operations has 'shuffle'; allowed are replace, delete"),
        ({**ON, "operations": ("swap", "swap")}, "augment.operations lists swap more than once"),
        ({**ON, "rate": 0.0}, "augment.rate is 0.0; it must be above 0 and at most 1"),
        ({**ON, "rate": float("nan")}, "augment.rate is nan; it must be above 0 and at most 1"),
        ({**ON, "chinese": "sentences"}, "augment.chinese is 'sentences'; it must be characters or words"),
        ({**ON, "operations": ("replace",)}, "augment.operations has replace; give it augment.table"),
        ({**ON, "table": "x.tsv"}, "augment.table is 'x.tsv', which only replace uses; add replace to"),
    ],
)
def test_mistakes_in_settings(values: dict[str, object], message: str) -> None:
    config = AugmentConfig(**values)
    for use in (check_augment_config, Augmenter):
        with pytest.raises(UserError) as error:
            use(config)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", None, "cannot read augment.table"),
        ("t.tsv", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("t.tsv", b"\n \n", "is empty; write a set of interchangeable words on each line, separated by tabs"),
        ("t.tsv", b"a\tb\nalone\n", "line 2: 'alone' stands alone; a set has two or more words, separated by tabs"),
        ("t.tsv", b"a\tA\n", "line 1: 'a' stands alone"),
        ("t.tsv", b"a\t\tb\n", "line 1: an empty word; remove it"),
        ("t.tsv", b".NET\tJava\n", "line 1: '.NET' begins with a mark; an entry begins with a letter, a"),
        ("t.json", b"[[1, 2]]", "set 1: a set must be a list of words"),
        ("t.json", b'{"x": "ab"}', "x: a set must be a list of words"),
        ("t.json", b'"ab"', "must hold a list of lists of words, or names with lists"),
        ("t.json", b"[[", "is not JSON: "),
        ("t.json", b"[" * 100_000, "is not JSON: "),
        ("t.json", b"[]", "is empty"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        augmenter("replace", table=str(path))
    assert message in str(error.value)
    assert "augment.table" in str(error.value)
    assert "\n" not in str(error.value)


def test_real_reviews_get_copies() -> None:
    path = DATA / "zh" / "ChnSentiCorp_htl_all.csv"
    if not path.exists():
        pytest.skip(f"needs {path}")
    pytest.importorskip("jieba")
    reviews = path.read_text(encoding="utf-8-sig").splitlines()[1:60]
    make = augmenter("delete", "swap", copies=2, rate=0.1, chinese="words")
    for review in reviews:
        copies = make(review, "k")
        assert len(copies) == 2 or len(review) < 10
        for copy in copies:
            assert 0.5 * len(review) < len(copy) <= len(review)
