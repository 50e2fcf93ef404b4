"""Masking against a twin in plain Python, its rates over 100,000 tokens, and what is never masked."""

import dataclasses
import pickle

import numpy as np
import pytest

from lm.data.objectives.draws import MASKS, row_keys
from lm.data.objectives.masking import (
    MaskedExamples,
    Masker,
    MaskingConfig,
    check_masking_config,
    mask_tokens,
    most_masked,
)
from lm.data.packing import make_examples
from lm.data.store import MemoryStore
from lm.errors import UserError
from lm.text.tokenizer import TokenizerConfig, train_tokenizer

MASK = 999
VOCABULARY = np.arange(50, 550, dtype=np.int32)


def keys(n: int, seed: int = 0) -> np.ndarray:
    return row_keys(seed, MASKS, np.zeros(n, np.int64), np.arange(n))


def mask(tokens: np.ndarray, eligible: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    options = {"rate": 0.15, "mask_id": MASK, "vocabulary": VOCABULARY} | options
    return mask_tokens(tokens, eligible, keys(len(tokens)), **options)


def rows(n: int = 800, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, 0 among them, and rows that differ in how many of them may be masked."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 600, (n, width)).astype(np.int32)
    return tokens, draw.random((n, width)) < draw.random((n, 1))


def twin(tokens: np.ndarray, eligible: np.ndarray, rate: float, seed: int = 1) -> tuple[list[int], dict[str, int]]:
    """The same law, another way: shuffled candidates, one coin a place. Masked places of each row; what became of them.

    BERT's loop, over eligible places alone.
    """
    draw = np.random.default_rng(seed)
    masked, became = [], {"mask": 0, "random": 0, "kept": 0}
    for may in eligible:
        candidates = [i for i, yes in enumerate(may) if yes]
        draw.shuffle(candidates)
        budget = min(len(candidates), max(1, round(rate * len(candidates)))) if candidates else 0
        masked.append(budget)
        for _ in candidates[:budget]:
            if draw.random() < 0.8:
                became["mask"] += 1
            else:
                became["kept" if draw.random() < 0.5 else "random"] += 1
    return masked, became


def test_masked_places_and_what_becomes_of_them() -> None:
    tokens, eligible = rows(1600)
    inputs, masked = mask(tokens, eligible)
    assert eligible.sum() > 100_000
    expected, became = twin(tokens, eligible, 0.15)
    assert masked.sum(1).tolist() == expected
    assert not (masked & ~eligible).any()
    assert (inputs[~masked] == tokens[~masked]).all()

    n = masked.sum()
    hidden = (inputs == MASK) & masked
    changed = masked & ~hidden & (inputs != tokens)
    known = np.isin(tokens, VOCABULARY)  # elsewhere a random token is always another
    # A random token is the same by chance in one of 500 where the token is one of theirs.
    p_changed = 0.1 * (1 - known[masked].mean() / len(VOCABULARY))
    for share, p, theirs in ((hidden, 0.8, "mask"), (changed, p_changed, "random")):
        assert abs(share.sum() - n * p) < 3 * np.sqrt(n * p * (1 - p))
        assert abs(share.sum() - became[theirs]) < 3 * np.sqrt(2 * n * p * (1 - p))
    assert np.isin(inputs[changed], VOCABULARY).all()
    # Random tokens are even over the vocabulary: chi-square with 4 degrees of freedom, for 5 bins.
    counts = np.histogram(inputs[changed], bins=5, range=(50, 550))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 18.5  # p = 0.001


def test_all_places_are_masked_alike() -> None:
    eligible = np.zeros((20_000, 12), bool)
    eligible[:, 1:9] = True
    _, masked = mask(np.zeros((20_000, 12), np.int32), eligible, rate=0.25)
    assert (masked.sum(1) == 2).all()
    assert not masked[:, [0, 9, 10, 11]].any()
    p = 2 / 8
    assert np.abs(masked[:, 1:9].mean(0) - p).max() < 4 * np.sqrt(p * (1 - p) / 20_000)
    pairs = {tuple(np.flatnonzero(row)) for row in masked}
    assert len(pairs) == 28
    together = (masked[:, 1] & masked[:, 2]).mean()
    assert abs(together - 1 / 28) < 4 * np.sqrt(1 / 28 / 20_000)


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 1), (3, 1), (10, 2), (16, 2), (17, 3)])
def test_how_many(n: int, expected: int) -> None:
    """At least one; halves to even."""
    eligible = (np.arange(20) < n)[None]
    assert mask(np.zeros((1, 20), np.int32), eligible)[1].sum() == expected


def test_shares_at_their_ends() -> None:
    tokens, eligible = rows(40)
    inputs, masked = mask(tokens, eligible, mask_share=1, random_share=0)
    assert (inputs[masked] == MASK).all()
    inputs, masked = mask(tokens, eligible, mask_share=0, random_share=0)
    assert (inputs == tokens).all()
    assert masked.any()
    inputs, masked = mask(tokens, eligible, mask_share=0, random_share=1, vocabulary=np.array([77]))
    assert (inputs[masked] == 77).all()


def test_a_row_is_masked_alike_in_any_batch() -> None:
    tokens, eligible = rows(9)
    whole = mask(tokens, eligible)
    for i in range(9):
        alone = mask_tokens(tokens[[i]], eligible[[i]], keys(9)[[i]], rate=0.15, mask_id=MASK, vocabulary=VOCABULARY)
        assert (alone[0][0] == whole[0][i]).all()
        assert (alone[1][0] == whole[1][i]).all()


def words_of(eligible: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    words: list[list[int]] = []
    for i in np.flatnonzero(eligible):
        if starts[i] or i == 0 or not eligible[i - 1]:
            words.append([])
        words[-1].append(i)
    return words


def test_whole_words_or_none() -> None:
    tokens, eligible = rows(300, 64)
    starts = np.random.default_rng(3).random(eligible.shape) < 0.4
    _, masked = mask(tokens, eligible, word_starts=starts)
    firsts: dict[int, list[int]] = {}
    short = 0
    for row in range(len(tokens)):
        words = words_of(eligible[row], starts[row])
        chosen = [word for word in words if masked[row, word].any()]
        assert all(masked[row, word].all() for word in chosen)
        assert masked[row].sum() == sum(map(len, chosen))
        n = eligible[row].sum()
        budget = max(1, round(0.15 * n)) if n else 0
        left = [len(word) for word in words if word not in chosen]
        if masked[row].sum() > budget:  # only where nothing fits is more masked than asked for
            assert len(chosen) == 1
            assert min(map(len, words)) > budget
        elif left and n:
            assert min(left) > budget - masked[row].sum()  # nothing more would have fitted
        short += budget - int(masked[row].sum())
        for word in chosen:
            firsts.setdefault(len(word), []).append(row)
    assert short < 0.1 * masked.sum()
    assert {1, 2, 3} <= set(firsts)


def test_a_row_of_one_long_word_has_no_more_masked_than_others() -> None:
    eligible = np.ones((3, 40), bool)
    eligible[1, 9:] = False
    starts = np.zeros((3, 40), bool)
    starts[2, ::2] = True
    _, masked = mask(np.zeros((3, 40), np.int32), eligible, word_starts=starts)
    assert most_masked(0.15, 40) == 6
    assert masked.sum(1).tolist() == [6, 6, 6]
    assert masked[:2, :6].all()  # of a word that is longer, the first ones


def test_words_are_drawn_alike() -> None:
    """Four words of two tokens, room for one."""
    starts = np.tile([True, False], (20_000, 4))
    _, masked = mask(np.zeros((20_000, 8), np.int32), np.ones((20_000, 8), bool), rate=0.25, word_starts=starts)
    assert (masked.sum(1) == 2).all()
    assert np.abs(masked.mean(0) - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 20_000)


def tokenizer():
    return train_tokenizer(
        TokenizerConfig(kind="char", vocab_size=40, special_tokens=("<mask>", "<pad>")), ["abcdefgh 北京大学"]
    )


def store() -> MemoryStore:
    t = tokenizer()
    texts = ["abc def", "北京大学 ab", "x?", "hgf" * 9]  # x and ? are unknown
    return MemoryStore([np.array([*t.encode(text), t.eos_id]) for text in texts])


@pytest.mark.parametrize("packing", ["stream", "documents", "pad"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("whole_words", ["off", "jieba"])
def test_masked_examples(packing: str, training: bool, whole_words: str) -> None:
    t = tokenizer()
    base = make_examples(store(), seq_len=10, packing=packing, bos_id=t.bos_id, training=training)
    examples = MaskedExamples(base, Masker(t, MaskingConfig(rate=0.5, whole_words=whole_words), seed=0))
    assert len(examples) == len(base)
    index = np.array([*range(len(base)), -1])
    epoch = np.zeros_like(index)
    plain, rows = base.batch(index, epoch), examples.batch(index, epoch)
    special = [t.eos_id, t.unk_id, t.mask_id, t.pad_id]
    assert (rows["targets"] == plain["tokens"]).all()  # padding is 0 in both
    assert rows["weights"].dtype == np.float32
    assert set(np.unique(rows["weights"])) == {0, 1}
    scored = rows["weights"] > 0
    assert not np.isin(rows["targets"][scored], special).any()
    assert not (scored & (plain.get("segments", np.ones_like(scored)) == 0)).any()
    assert (rows["tokens"][~scored] == plain["tokens"][~scored]).all()
    assert not np.isin(rows["tokens"][scored], [t.eos_id, t.unk_id, t.pad_id]).any()
    assert all((rows[name][-1] == 0).all() for name in ("tokens", "targets", "weights"))
    for i in range(len(base)):
        assert scored[i].any() == (~np.isin(plain["tokens"][i], [*special, 0])).any()
        assert examples.documents(i).tolist() == base.documents(i).tolist()


def test_a_stream_s_last_window_is_masked_up_to_its_last_token() -> None:
    t = train_tokenizer(TokenizerConfig(kind="char", vocab_size=40, special_tokens=("<mask>",)), ["abcdefgh"])
    ids = t.encode("abcdefgh" * 3)
    base = make_examples(MemoryStore([np.array(ids)]), seq_len=10, packing="stream", bos_id=0, training=False)
    rows = MaskedExamples(base, Masker(t, MaskingConfig(rate=1), seed=0)).batch(np.arange(3), np.zeros(3, np.int64))
    assert rows["weights"].sum(1).tolist() == [10, 10, 4]
    assert rows["targets"][2].tolist() == [*ids[20:], *[0] * 6]


def test_dynamic_masks_change_with_the_epoch_and_static_ones_do_not() -> None:
    t = tokenizer()
    base = make_examples(store(), seq_len=10, packing="stream", bos_id=t.bos_id)
    index = np.arange(len(base))
    for dynamic in (True, False):
        examples = MaskedExamples(base, Masker(t, MaskingConfig(rate=0.4, dynamic=dynamic), seed=0))
        copy = pickle.loads(pickle.dumps(examples))
        epochs = [examples.batch(index, np.full_like(index, epoch)) for epoch in range(3)]
        again = copy.batch(index[::-1], np.full_like(index, 1))
        assert all((again[name][::-1] == epochs[1][name]).all() for name in again)
        same = [(epochs[0]["weights"] == other["weights"]).all() for other in epochs[1:]]
        assert same == [not dynamic] * 2
        other = MaskedExamples(base, Masker(t, MaskingConfig(rate=0.4, dynamic=dynamic), seed=1))
        assert (other.batch(index, np.zeros_like(index))["weights"] != epochs[0]["weights"]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "masking.rate is 0.0"),
        ({"rate": 1.5}, "masking.rate is 1.5"),
        ({"mask_share": -0.1}, "masking.mask_share is -0.1"),
        ({"mask_share": 0.9, "random_share": 0.2}, "together they must be at most 1"),
    ],
)
def test_settings_out_of_range(change: dict[str, float], message: str) -> None:
    check_masking_config(MaskingConfig())
    with pytest.raises(UserError, match=message):
        check_masking_config(dataclasses.replace(MaskingConfig(), **change))


def test_a_tokenizer_without_a_mask_token() -> None:
    with pytest.raises(UserError, match="special-tokens '<mask>'"):
        Masker(train_tokenizer(TokenizerConfig(kind="byte"), []), MaskingConfig(), seed=0)
