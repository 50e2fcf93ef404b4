"""Deduplication: the tokens, the estimate, the pairs and the clusters against plain Python; planted and real copies."""

import csv
import hashlib
import itertools
import re
import subprocess
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.dedup import (
    DedupConfig,
    band_keys,
    candidate_pairs,
    check_dedup_config,
    exact_hashes,
    first_of_cluster,
    first_of_equal,
    line_hashes,
    near_duplicates,
    repeated_lines,
    signatures,
    similar,
    unique_pairs,
    without_lines,
)
from lm.text.shingles import shingles

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
CONFIG = DedupConfig(near=True)

# Letters that change under NFKC or case folding, that join what stands before them, that stand alone, and no letters.
awkward = st.text(
    alphabet=st.sampled_from(
        "aB1 .\n\0ßﬁ①²ＡＢé\u0301\u0308iİσς…￥\u3000中文，。かがｶﾞ\u3099한\u1112\u1161\u11ab각ก็\ufe0f❤㍿_\ud800"
    ),
    max_size=30,
)
anything = st.text(alphabet=st.characters(), max_size=30)


# As documented: Thai to Tibetan, Myanmar, Khmer, CJK and kana with what belongs to them, and all planes of ideographs.
ALONE = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u31bf\u31f0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def reference_tokens(text: str) -> list[str]:
    """Words, and single characters of scripts without spaces."""
    tokens: list[str] = []
    open_word = False
    text = unicodedata.normalize("NFKC", text.replace("\0", " ")).casefold()
    for character in "".join(unicodedata.normalize("NFKC", c).casefold() for c in text):
        mark = unicodedata.category(character)[0] == "M" and not "\ufe00" <= character <= "\ufe0f"
        if not (
            character.isalnum()
            or mark
            or 0x2FA20 <= ord(character) < 0x40000
            or "\U00020000" <= character < "\U0002f800"
        ):
            open_word = False
        elif ALONE.match(character):
            tokens.append(character)
            open_word = False
        elif open_word:
            tokens[-1] += character
        else:
            tokens.append(character)
            open_word = True
    return tokens


def reference_shingles(text: str, ngram: int) -> list[tuple[str, ...]]:
    tokens = reference_tokens(text)
    return [tuple(tokens[i : i + ngram]) for i in range(max(1, len(tokens) - ngram + 1))]


def jaccard(left: str, right: str, ngram: int) -> float:
    a, b = set(reference_shingles(left, ngram)), set(reference_shingles(right, ngram))
    return len(a & b) / len(a | b)


def made_text(rng: np.random.Generator, words: int, chinese: bool) -> list[str]:
    """Words by Zipf's law, each document with a vocabulary of its own."""
    picks = (np.minimum(rng.zipf(1.3, words), 5000) * 7919 + rng.integers(20_000)) % 20_000
    if chinese:
        return [chr(0x4E00 + i) + (chr(0x4E00 + i * 11 % 20_000) if i % 3 else "") for i in picks.tolist()]
    return [f"w{i}" for i in picks]


def change(words: list[str], share: float, rng: np.random.Generator) -> list[str]:
    changed = list(words)
    for i in rng.choice(len(words), max(1, round(share * len(words))), replace=False):
        changed[i] = chr(0x20000 + int(rng.integers(40_000)))
    return changed


# Equal documents.


def test_exact_compares_without_case_width_forms_and_spaces():
    same = ["Ｔhe ﬁrst  line.\nSecond", "the first line. second", "THE FIRST LINE.SECOND"]
    other = ["the first line, second", "the first line. secund", "", "你好，世界"]
    hashes = exact_hashes([*same, *other, "你好,\n世 界"])
    assert len(set(hashes[:3].tolist())) == 1
    assert len(set(hashes.tolist())) == 1 + len(other)
    assert hashes[6] == hashes[7]
    assert hashes.dtype == np.uint64
    assert exact_hashes([]).shape == (0,)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=30))
@settings(deadline=None)
def test_first_of_equal_is_the_lowest_rank_then_the_lowest_index(entries: list[tuple[int, int]]):
    hashes = np.array([key for key, _ in entries], np.uint64)
    ranks = np.array([rank for _, rank in entries], np.int64)
    expected = [min((r, i) for i, (k, r) in enumerate(entries) if k == key)[1] for key, _ in entries]
    assert first_of_equal(hashes, ranks).tolist() == expected
    assert first_of_equal(hashes).tolist() == [[k for k, _ in entries].index(key) for key, _ in entries]


# Shingles and signatures.


@given(st.lists(awkward | anything, min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_shingles_are_equal_where_their_tokens_are(texts: list[str], ngram: int):
    hashes, counts = shingles(texts, ngram)
    expected = [reference_shingles(text, ngram) for text in texts]
    assert counts.tolist() == [len(of_text) for of_text in expected]
    hash_of: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for shingle, value in zip([s for of_text in expected for s in of_text], hashes.tolist(), strict=True):
        if shingle:  # no token at all: the characters count, see below
            hash_of[shingle].add(value)
    assert all(len(values) == 1 for values in hash_of.values())
    assert len(set.union(set(), *hash_of.values())) == len(hash_of)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The quick-brown FOX, 3 times; naïve.", 7),
        ("我爱北京的Python 3课，特别好！", 11),
        ("ひらがなとカタカナ", 9),
        ("ｶﾞｲﾄﾞ", 3),
        ("한국어 문장", 2),
        ("ภาษาไทย", 7),
        ("हिन्दी भाषा", 2),
        ("❤️ … — ！", 1),
    ],
)
def test_a_token_is_a_word_or_a_character_of_a_script_without_spaces(text: str, tokens: int):
    assert shingles([text], 1)[1].tolist() == [tokens]


def test_documents_shorter_than_a_shingle_are_equal_only_where_their_text_is():
    texts = ["", "!!!", "???", "a", "b", "a b", "b a", "ab", "中", "文", "中文", "c" * 5000, "c" * 5001]
    rows = signatures(texts, DedupConfig(ngram=5))
    shares = (rows[:, None] == rows).mean(axis=2)
    assert np.all(shares[~np.eye(len(texts), dtype=bool)] < 0.1)
    assert (near_duplicates([*texts, *texts], DedupConfig(ngram=5)) == [*[-1] * 13, *range(13)]).all()


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("ngram", [1, 2, 5])
def test_signatures_estimate_the_jaccard_similarity(ngram: int, chinese: bool):
    rng = np.random.default_rng(0)
    space = "" if chinese else " "
    left = [made_text(rng, int(rng.integers(30, 300)), chinese) for _ in range(300)]
    right = [change(words, rng.choice([0.02, 0.1, 0.3]), rng) for words in left]
    texts = [[space.join(words) for words in side] for side in (left, right)]
    config = DedupConfig(ngram=ngram, permutations=256, bands=32)
    exact = np.array([jaccard(a, b, ngram) for a, b in zip(*texts)])
    error = (signatures(texts[0], config) == signatures(texts[1], config)).mean(axis=1) - exact
    theory = np.sqrt(np.mean(exact * (1 - exact)) / config.permutations)
    assert np.sqrt(np.mean(error**2)) < 1.15 * theory
    assert abs(error.mean()) < 4 * theory / np.sqrt(len(error))


def test_a_signature_depends_on_its_text_alone(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    texts = [" ".join(made_text(rng, int(rng.integers(0, 90)), bool(i % 2))) for i in range(40)] + ["", "ﬁ\0x", "\0"]
    together = signatures(texts, CONFIG)
    assert np.array_equal(together, np.concatenate([signatures([text], CONFIG) for text in texts]))
    monkeypatch.setattr("lm.text.dedup._CHUNK", 100)
    assert np.array_equal(together, signatures(texts, CONFIG))
    assert signatures([], CONFIG).shape == (0, CONFIG.permutations)
    assert [len(array) for array in shingles([], 2)] == [0, 0]
    other = signatures(texts, DedupConfig(seed=1))
    assert (other == together).mean() < 0.01


def test_hashes_are_those_of_every_machine_and_release():
    texts = ["The quick brown fox jumps over the lazy dog.", "床前明月光，疑是地上霜。", "Straße ﬁn ①", ""]
    rows = signatures(texts, CONFIG)
    numbers = [rows.astype("<u4"), band_keys(rows, CONFIG).astype("<u8"), exact_hashes(texts).astype("<u8")]
    digests = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in numbers]
    assert digests == ["927e7139a8b9d2b9", "3873974cd8225747", "ebd775d4fd7772ff"]


def test_band_keys_are_equal_where_all_entries_of_the_band_are():
    config = DedupConfig(permutations=12, bands=3)
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 2, (1100, 12), np.uint32)
    keys = band_keys(rows, config)
    assert keys.shape == (1100, 3)
    for band in range(3):
        part = rows[:, 4 * band : 4 * band + 4]
        same = (part[:, None] == part).all(axis=2)
        assert np.array_equal(same, keys[:, band][:, None] == keys[:, band])


# Pairs and clusters.


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 50), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_candidate_pairs_are_all_pairs_of_small_buckets(keys: list[int], window: int, random):
    ordinals = random.sample(range(1000), len(keys))
    pairs = candidate_pairs(np.array(keys, np.uint64), np.array(ordinals, np.int64), window)
    places = dict(zip(ordinals, keys))
    buckets = {key: sorted(o for o in ordinals if places[o] == key) for key in keys}
    expected = {
        (bucket[i], bucket[j])
        for bucket in buckets.values()
        for j in range(len(bucket))
        for i in range(j)
        if j - i <= window or i == 0
    }
    assert pairs.shape == (len(expected), 2)
    assert [tuple(pair) for pair in pairs.tolist()] == sorted(expected)


def test_many_equal_documents_stay_linear_and_one_cluster():
    n = 100_000
    pairs = candidate_pairs(np.full(n, 7, np.uint64), np.arange(n), 4)
    assert len(pairs) <= 5 * n
    assert not first_of_cluster(n, pairs).any()


def test_similar_counts_equal_entries_up_to_the_threshold():
    rows = np.zeros((11, 10), np.uint32)
    for i in range(11):
        rows[i, :i] = i + 1  # row i shares 10 - i entries with row 0
    pairs = np.array([(0, i) for i in range(11)])
    for threshold in (0.1, 0.3, 0.6, 0.7, 1.0):
        found = similar(rows, pairs, DedupConfig(threshold=threshold))
        assert found.tolist() == [10 - i >= round(threshold * 10) for i in range(11)]
    many = np.tile(pairs, (5000, 1))
    assert np.array_equal(similar(rows, many, CONFIG), np.tile(similar(rows, pairs, CONFIG), 5000))


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40),
            st.lists(st.integers(0, 5), min_size=n, max_size=n),
        )
    )
)
@settings(deadline=None)
def test_clusters_are_connected_components_led_by_the_lowest_rank(case: tuple[list[tuple[int, int]], list[int]]):
    links, ranks = case
    cluster = {i: {i} for i in range(len(ranks))}
    for a, b in links:
        merged = cluster[a] | cluster[b]
        cluster |= dict.fromkeys(merged, merged)
    expected = [min(cluster[i], key=lambda j: (ranks[j], j)) for i in range(len(ranks))]
    pairs = np.array(links, np.int64).reshape(-1, 2)
    assert first_of_cluster(len(ranks), pairs, np.array(ranks)).tolist() == expected


def test_a_long_chain_is_one_cluster():
    n = 50_000
    order = np.random.default_rng(3).permutation(n)
    assert not first_of_cluster(n, np.stack([order[:-1], order[1:]], axis=1)).any()


# The whole.


def test_planted_copies_are_found_and_nothing_else():
    rng = np.random.default_rng(4)
    texts: list[str] = []
    family: list[int] = []
    kinds: list[str] = []
    for i in range(400):
        chinese = i % 2 == 0
        space = "" if chinese else " "
        words = made_text(rng, int(rng.integers(30, 200)), chinese)
        sentences = [space.join(words[j : j + 12]) for j in range(0, len(words), 12)]
        copies = {
            "original": space.join(words),
            "punctuation": "。".join(sentences).upper(),
            "5 %": space.join(change(words, 0.05, rng)),
            "10 %": space.join(change(words, 0.1, rng)),
            "shuffled": space.join(sentences[j] for j in rng.permutation(len(sentences))),
        }
        for kind in ("original", *list(copies)[1 + i % 4 : 2 + i % 4]):
            texts.append(copies[kind])
            family.append(i)
            kinds.append(kind)
    order = rng.permutation(len(texts))
    owners = np.array(family)[order]
    first = near_duplicates([texts[i] for i in order], CONFIG)
    removed = np.flatnonzero(first >= 0)
    assert (owners[removed] == owners[first[removed]]).all()
    assert (first[removed] < removed).all()
    gone = set(owners[removed].tolist())
    for offset, kind in enumerate(["punctuation", "5 %", "10 %", "shuffled"]):
        of_kind = [i for i in range(400) if i % 4 == offset]
        share = np.mean([i in gone for i in of_kind])
        assert share >= (1.0 if kind != "10 %" else 0.95), (kind, share)


def test_the_test_split_stays_and_its_copy_in_train_goes():
    copy = "one two three four five six seven eight nine ten"
    texts = [copy, "something else altogether, in train too", copy + " eleven", "nothing like the others at all"]
    ranks = np.array([10, 11, 0, 1])  # the last two are the test split
    assert near_duplicates(texts, CONFIG, ranks).tolist() == [2, -1, -1, -1]
    assert near_duplicates(texts, CONFIG).tolist() == [-1, -1, 0, -1]


def test_units_and_ranges_of_keys_give_what_memory_gives():
    rng = np.random.default_rng(5)
    base = [made_text(rng, 60, bool(i % 2)) for i in range(150)]
    texts = [" ".join(words) for words in base] + [" ".join(change(words, 0.08, rng)) for words in base[:80]]
    ranks = rng.permutation(len(texts))
    units = [range(i, min(i + 37, len(texts))) for i in range(0, len(texts), 37)]
    rows = [signatures([texts[i] for i in unit], CONFIG) for unit in units]
    pairs = []
    for band in range(CONFIG.bands):
        keys = np.concatenate([band_keys(unit_rows, CONFIG)[:, band] for unit_rows in rows])
        ordinals = np.concatenate([np.array(unit) for unit in units])[::-1]
        for part in range(4):  # by the two highest bits
            chosen = (keys[::-1] >> np.uint64(62)) == part
            found = candidate_pairs(keys[::-1][chosen], ordinals[chosen], CONFIG.bucket_window)
            pairs.append(found[similar(np.concatenate(rows), found, CONFIG)])
    first = first_of_cluster(len(texts), unique_pairs(np.concatenate(pairs)), ranks)
    whole = near_duplicates(texts, CONFIG, ranks)
    assert (whole >= 0).sum() >= 75
    assert np.array_equal(np.where(first == np.arange(len(texts)), -1, first), whole)


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_real_reviews_that_are_alike_are_found():
    with (DATA / "zh/ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig", newline="") as file:
        texts = [row["review"] for row in csv.DictReader(file)]
    first = near_duplicates(texts, CONFIG)
    # Compared exactly: all pairs that share one of the shingles that few others have.
    sets = []
    for text in texts:
        tokens = re.findall(r"[\u4e00-\u9fff]|[a-z0-9]+", text.lower())
        sets.append(set(itertools.pairwise(tokens)))
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, of_text in enumerate(sets):
        for shingle in of_text:
            holders[shingle].append(i)
    near = {(group[0], group[1]) for group in holders.values() if len(group) == 2}
    alike = [(a, b) for a, b in near if len(sets[a] & sets[b]) >= 0.65 * len(sets[a] | sets[b])]
    assert len(alike) >= 5
    leaders = np.where(first < 0, np.arange(len(texts)), first)
    assert all(leaders[a] == leaders[b] for a, b in alike)
    assert 10 <= (first >= 0).sum() <= 100


# Lines.


def test_lines_seen_in_an_earlier_document_go_and_refrains_stay():
    config = DedupConfig(lines=True, min_line_characters=20)
    shared = "Sign up for our newsletter now"
    documents = [
        f"A first document of its own\n{shared}\nok\n{shared}",
        f"{shared.upper()}!\nok\nand something new in this one",
        f"  {shared.replace(' ', '  ')}\n\n{shared}\n",
        "欢迎大家订阅我们的通讯\n短句不算",
        "第二篇自己的内容在这里\n欢迎大家订阅我们的通讯\n短句不算",
    ]
    parts = [line_hashes(document, config) for document in documents]
    ranks = np.repeat(np.arange(len(parts)), [len(lines) for lines, _ in parts])
    gone = np.split(
        repeated_lines(np.concatenate([hashes for _, hashes in parts]), ranks),
        np.cumsum([len(lines) for lines, _ in parts])[:-1],
    )
    kept = [without_lines(lines, removed) for (lines, _), removed in zip(parts, gone)]
    assert kept[0] == documents[0]
    assert kept[1] == documents[1]  # "!" makes it another line
    assert kept[2] == ""
    assert kept[3] == documents[3]
    assert kept[4] == "第二篇自己的内容在这里\n短句不算"


def test_line_order_follows_the_ranks_of_documents():
    hashes = np.array([5, 0, 5, 9, 5, 0], np.uint64)
    ranks = np.array([3, 3, 1, 1, 1, 0])
    assert repeated_lines(hashes, ranks).tolist() == [True, False, False, False, False, False]


def test_wide_characters_count_twice_towards_a_line():
    config = DedupConfig(min_line_characters=10)
    lines = ["a b c d e f g h i", "abcdefghij", "一二三四", "一二三四五", "한국어글자", "abcd一二三"]
    assert (line_hashes("\n".join(lines), config)[1] != 0).tolist() == [False, True, False, True, True, True]


# Settings.


@pytest.mark.parametrize(
    "settings",
    [
        {"ngram": 0},
        {"threshold": 0.0},
        {"threshold": 1.5},
        {"permutations": 0},
        {"bands": 0},
        {"bands": 48},
        {"bucket_window": 0},
        {"min_line_characters": 0},
        {"seed": -1},
        {"threshold": 0.7, "exact": True, "lines": True},
        {"seed": 1, "near": False},
        {"min_line_characters": 5, "near": True},
    ],
)
def test_settings_that_make_no_sense_are_answered(settings: dict):
    """The last rows: settings that nobody reads."""
    with pytest.raises(UserError, match=f"dedup.{next(iter(settings))} is .*[^.]$"):
        check_dedup_config(DedupConfig(**settings))


def test_settings_are_taken_where_they_are_read():
    check_dedup_config(DedupConfig(near=True, ngram=3, threshold=0.7, permutations=64, bands=16, seed=1))
    check_dedup_config(DedupConfig(lines=True, min_line_characters=5))
    check_dedup_config(DedupConfig())


def test_the_benchmark_runs():
    pytest.importorskip("datasketch")
    pytest.importorskip("jieba")
    command = ["scripts/bench_dedup.py", "--documents", "240", "--data", "/nowhere", "--rounds", "1", "--scale", "1000"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "| 10 % of words | 10 | 0.0000 | " in run.stdout
    assert "datasketch takes" in run.stdout
