"""Tables carried to another tokenizer: what stays stays to the bit, what is new is what the old rows say."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.errors import UserError
from lm.models.transformer import ModelConfig
from lm.sharding import MeshConfig, make_mesh
from lm.text.files import open_file
from lm.text.ids import IdsTokenizer
from lm.text.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, TokenizerConfig, train_tokenizer
from lm.vocabulary import NOISE, Carried, resized

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tokenizers"
ENGLISH = "The king is singing the song of the thing, and the ring is ringing. " * 20
CHINESE = "明天天气怎么样？晴朗。我来到北京清华大学，研究生命的起源。" * 20


@cache
def trained(kind: str, size: int = 400, *special: str) -> Tokenizer:
    sizes = {"sentencepiece-bpe": 380, "sentencepiece-unigram": 306, "wordpiece": 160}
    config = TokenizerConfig(kind=kind, vocab_size=sizes.get(kind, size), special_tokens=special)
    return train_tokenizer(config, [ENGLISH, CHINESE])


def real(name: str) -> Tokenizer:
    if not DATA.exists():
        pytest.skip("needs the vocabularies in ../shared/data")
    return open_file(str(DATA / name), lowercase=name.endswith(".txt"))


def make(tokenizer: Tokenizer, seed: int = 0, **changes: Any) -> tuple[ModelConfig, Any]:
    config = tiny.config(vocab_size=None, vocab_multiple=8, **changes).with_vocabulary(tokenizer.vocab_size)
    return config, tiny.perturbed(tiny.build(config)[1], seed)


def table(params: Any) -> np.ndarray:
    return np.asarray(params["embed"]["embedding"])


def where(old_rows: np.ndarray, row: np.ndarray) -> list[int]:
    """Which old rows a row is, to the bit."""
    return np.flatnonzero((old_rows == row).all(axis=1)).tolist()


def ids_of(tokenizer: Tokenizer, piece: str) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i) == piece)


def origin(old: Tokenizer, new: Tokenizer, *pieces: str) -> list[str | None]:
    """The old piece whose row each new piece has; None for a row that no old piece had."""
    config, params = make(old)
    _, after, _ = resized(config, params, old, new, how="mean", seed=0)
    found = [where(table(params)[: old.vocab_size], table(after)[ids_of(new, piece)]) for piece in pieces]
    assert all(len(rows) <= 1 for rows in found)
    return [old.id_to_piece(rows[0]) if rows else None for rows in found]


def test_a_piece_is_the_same_by_the_text_it_stands_for_in_every_kind():
    bpe, wordpiece, spm = trained("bpe"), trained("wordpiece"), trained("sentencepiece-bpe")
    assert origin(bpe, wordpiece, "the", "##ing", ",", "of") == ["Ġthe", "ing", ",", "Ġof"]
    assert origin(wordpiece, bpe, "Ġthe", "ing", ",", "Ġof") == ["the", "##ing", ",", "of"]
    assert origin(bpe, spm, "▁the", "ing", "▁") == ["Ġthe", "ing", "Ġ"]
    assert origin(spm, bpe, "Ġthe", "ing", "Ċ") == ["▁the", "ing", "<0x0A>"]
    assert origin(trained("word"), spm, "▁the") == ["the"]
    assert origin(bpe, trained("word"), "the", ".", "song") == ["Ġthe", ".", "Ġsong"]
    assert origin(bpe, trained("char"), "t", " ", "，") == ["t", "Ġ", "ï¼Į"]
    assert origin(ByteTokenizer(), trained("char"), "t", " ", "天") == ["t", "<0x20>", None]


def test_chinese_characters_begin_nothing_with_a_space():
    wordpiece, character = trained("wordpiece"), trained("char")
    assert origin(character, wordpiece, "天", "？") == ["天", "？"]
    assert origin(trained("sentencepiece-unigram"), character, "天", "。") == ["天", "。"]
    # Inside a word of BERT's there is no Chinese character, so its own piece is the one that text has.
    chinese = real("bert-base-chinese-vocab.txt")
    assert origin(chinese, character, "天") == ["天"]


def test_of_two_pieces_for_a_chinese_character_the_one_that_text_becomes_counts(tmp_path):
    """`##天` is in BERT's vocabularies and in no text, as Chinese characters are words of their own there."""
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n##天\n天\n##s\n", encoding="utf-8")
    wordpiece = open_file(str(tmp_path / "vocab.txt"))
    assert wordpiece.encode("明天天") == [0, 4, 4]
    assert origin(wordpiece, trained("char"), "天") == ["天"]
    other = open_file(str(tmp_path / "vocab.txt"), lowercase=True)
    assert other.fingerprint() != wordpiece.fingerprint()
    assert origin(wordpiece, other, "天", "##天", "##s") == ["天", "##天", "##s"]


def test_where_a_vocabulary_has_a_byte_and_a_piece_of_one_text_the_piece_counts():
    spm = trained("sentencepiece-bpe")
    assert origin(spm, ByteTokenizer(), "a", "<0x20>", "<0x0A>") == ["a", "▁", "<0x0A>"]
    more = train_tokenizer(TokenizerConfig(kind="sentencepiece-bpe", vocab_size=370), [ENGLISH, CHINESE])
    assert origin(spm, more, "a", "<0x61>", "▁", "<0x20>") == ["a", "<0x61>", "▁", "<0x20>"]


def test_special_tokens_are_the_same_by_role_and_then_by_name():
    bpe, wordpiece = trained("bpe", 400, "<|user|>", "<mask>"), trained("wordpiece", 400, "<|user|>")
    assert origin(bpe, wordpiece, "[CLS]", "[SEP]", "[MASK]", "<|user|>", "[UNK]", "[PAD]") == [
        END_OF_TEXT,
        END_OF_TEXT,
        "<mask>",
        "<|user|>",
        None,
        None,
    ]
    assert origin(wordpiece, bpe, END_OF_TEXT, "<mask>", "<|user|>") == ["[SEP]", "[MASK]", "<|user|>"]
    assert origin(wordpiece, trained("sentencepiece-bpe"), "<unk>", END_OF_TEXT) == ["[UNK]", "[SEP]"]
    # A word that is spelled like the old tokenizer's special token is a word.
    assert origin(trained("char"), trained("word", 60, "<|user|>"), "<|user|>") == [None]


def test_rows_in_numbers():
    """Against float64, each kind of row in every table, and what is counted."""
    old, new = trained("bpe", 300), trained("wordpiece", 400, "<|user|>")
    config, params = make(old, tie_embeddings=False, head_bias=True, encoder_layers=1, share_embeddings=False)
    settled, after, carried = resized(config, params, old, new, how="pieces", seed=3)
    drawn = ["[PAD]", "[UNK]", "[MASK]", "<|user|>"]
    assert (settled.vocab_size, carried.padding) == (-(-new.vocab_size // 8) * 8, -new.vocab_size % 8)
    assert carried.kept + carried.composed + carried.drawn == new.vocab_size
    assert carried.drawn == len(drawn)
    assert carried.kept > 20
    assert carried.composed > 20
    tables = [
        (params["embed"]["embedding"], after["embed"]["embedding"]),
        (params["encoder_embed"]["embedding"], after["encoder_embed"]["embedding"]),
        (params["head"]["kernel"].T, after["head"]["kernel"].T),
        (params["head_bias"]["bias"][:, None], after["head_bias"]["bias"][:, None]),
    ]
    noise = []
    for before, made in tables:
        before, made = np.asarray(before, np.float64), np.asarray(made, np.float64)
        real = before[: old.vocab_size]
        mean, spread = real.mean(axis=0), real.std(axis=0)
        assert made.shape == (settled.vocab_size, before.shape[1])
        np.testing.assert_allclose(made[new.vocab_size :], mean[None].repeat(carried.padding, 0), atol=1e-6)
        kept = [where(real, row) for row in made[: new.vocab_size]]
        assert sum(bool(rows) for rows in kept) == carried.kept
        for piece in drawn:
            noise.append((made[ids_of(new, piece)] - mean) / spread)
        for piece, text in (("ringing", " ringing"), ("天", "天"), ("##g", "g"), ("thing", " thing")):
            parts = old.encode(text)
            np.testing.assert_allclose(made[ids_of(new, piece)], real[parts].mean(axis=0), atol=1e-6)
    noise = np.concatenate(noise)
    assert 0.8 * NOISE < noise.std() < 1.2 * NOISE
    assert abs(noise.mean()) < 0.2 * NOISE
    assert len(np.unique(noise.round(6))) > 0.9 * len(noise), "no two rows, and no two tables, have the same noise"


def test_without_pieces_every_new_row_is_drawn_and_a_seed_decides():
    old, new = trained("bpe", 300), trained("wordpiece")
    config, params = make(old)
    _, first, carried = resized(config, params, old, new, how="mean", seed=3)
    _, again, _ = resized(config, params, old, new, how="mean", seed=3)
    _, other, _ = resized(config, params, old, new, how="mean", seed=4)
    _, _, pieces = resized(config, params, old, new, how="pieces", seed=3)
    tiny.assert_trees_equal(first, again)
    changed = (table(first) != table(other)).all(axis=1)
    assert changed.sum() == carried.drawn
    assert carried == dataclasses.replace(pieces, composed=0, drawn=pieces.composed + pieces.drawn)
    mean = table(params)[: old.vocab_size].astype(np.float64).mean(axis=0)
    assert np.abs(table(first)[: new.vocab_size][changed[: new.vocab_size]] - mean).max() < 10 * NOISE * 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_a_text_of_shared_pieces_has_the_same_scores_there(tied):
    old, new = trained("bpe"), trained("sentencepiece-bpe")
    config, params = make(old, tie_embeddings=tied, head_bias=not tied)
    settled, after, _ = resized(config, params, old, new, how="mean", seed=0)
    assert ("head" in after) == (not tied)
    assert set(after) == set(params)
    pieces = {"Ġthe": "▁the", "ing": "ing", "Ġring": "▁ring", ".": ".", END_OF_TEXT: END_OF_TEXT}
    theirs = [ids_of(old, piece) for piece in pieces]
    ours = [ids_of(new, piece) for piece in pieces.values()]
    before = tiny.Transformer(config).apply({"params": params}, jnp.array([theirs]))
    now = tiny.Transformer(settled).apply({"params": after}, jnp.array([ours]))
    assert now.shape[-1] == settled.vocab_size != config.vocab_size
    np.testing.assert_allclose(now[..., jnp.array(ours)], before[..., jnp.array(theirs)], atol=1e-6)


def test_nothing_else_changes_and_precision_is_kept():
    old, new = trained("bpe"), trained("char")
    config, params = make(old, param_dtype="bfloat16")
    settled, after, _ = resized(config, params, old, new, how="pieces", seed=0)
    assert dataclasses.replace(settled, vocab_size=config.vocab_size) == config
    rest = [{name: part for name, part in tree.items() if name != "embed"} for tree in (params, after)]
    tiny.assert_trees_equal(*rest)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, params)
    assert table(after).dtype == jnp.bfloat16
    assert where(table(params), table(after)[ids_of(new, "t")]) == [ids_of(old, "t")]


def test_of_the_same_tokenizer_only_the_padding_changes():
    tokenizer = trained("bpe", 300)
    config, params = make(tokenizer)
    assert config.vocab_size == 304
    wider, after, carried = resized(
        dataclasses.replace(config, vocab_multiple=128), params, tokenizer, tokenizer, how="mean", seed=0
    )
    assert (wider.vocab_size, carried) == (384, Carried(kept=300, composed=0, drawn=0, padding=84))
    np.testing.assert_array_equal(table(after)[:304], table(params))
    mean = table(params)[:300].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(table(after)[304:], np.tile(mean, (80, 1)), atol=1e-6)
    back, again, _ = resized(
        dataclasses.replace(wider, vocab_multiple=1), after, tokenizer, tokenizer, how="mean", seed=0
    )
    assert back.vocab_size == 300
    np.testing.assert_array_equal(table(again), table(params)[:300])


def test_tables_that_are_split_over_devices():
    old, new = trained("bpe"), trained("char")
    config, params = make(old)
    mesh = make_mesh(MeshConfig(fsdp=4, devices=4))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    spread = params | {"embed": {"embedding": jax.device_put(params["embed"]["embedding"], split)}}
    expected = resized(config, params, old, new, how="pieces", seed=0)[1]
    found = resized(config, spread, old, new, how="pieces", seed=0)[1]
    np.testing.assert_allclose(table(found), table(expected), atol=1e-6)


def test_real_vocabularies():
    gpt2, bert = real("gpt2-encoder.json"), real("bert-base-uncased-vocab.txt")
    pieces = ("Ġthe", "ence", ".", "Ġking", "king", "ĠThe", END_OF_TEXT)
    assert origin(bert, gpt2, *pieces) == ["the", "##ence", ".", "king", "##king", None, "[SEP]"]
    assert origin(gpt2, bert, "the", "##ing", "[CLS]", "中") == ["Ġthe", "ing", END_OF_TEXT, "ä¸Ń"]
    chinese = real("bert-base-chinese-vocab.txt")
    assert origin(bert, chinese, "[CLS]", "[MASK]", "##s", "the", "中") == ["[CLS]", "[MASK]", "##s", "the", "中"]
    config, params = make(gpt2, d_model=8, n_heads=1)
    _, after, carried = resized(config, params, gpt2, bert, how="pieces", seed=0)
    assert carried.composed + carried.kept == bert.vocab_size - 3, "bytes spell all but [PAD], [UNK] and [MASK]"
    rows = table(params).astype(np.float64)
    found = table(after)[ids_of(bert, "unaffected")]
    np.testing.assert_allclose(found, rows[gpt2.encode(" unaffected")].mean(axis=0), atol=1e-6)


def test_pieces_inside_words_are_made_of_such():
    """`##` pieces, and SentencePiece's without a space, where the old tokenizer cuts only whole words."""
    bert, gpt2 = real("bert-base-uncased-vocab.txt"), real("gpt2-encoder.json")
    config, params = make(bert, d_model=8, n_heads=1)
    rows = table(params).astype(np.float64)
    after = table(resized(config, params, bert, gpt2, how="pieces", seed=0)[1])
    for piece, parts in {
        "endium": ["##end", "##ium"],
        "Ġtragically": ["tragic", "##ally"],
        "castle": ["##castle"],
        "ĠThe": ["the"],
        "Ġ(": ["("],
    }.items():
        expected = rows[[ids_of(bert, part) for part in parts]].mean(axis=0)
        np.testing.assert_allclose(after[ids_of(gpt2, piece)], expected, atol=1e-6, err_msg=piece)
    # A piece of bytes within a character is none that words can spell.
    mean = rows[: bert.vocab_size].mean(axis=0)
    assert np.abs(after[ids_of(gpt2, "æĹ")] - mean).max() < 0.1


def test_what_cannot_be_carried_is_told_in_a_line():
    old, new = trained("bpe"), trained("char")
    config, params = make(old)
    for pair in ((IdsTokenizer(100), new), (old, IdsTokenizer(100))):
        with pytest.raises(UserError, match=r"ids alone.*spell their pieces$"):
            resized(config, params, *pair, how="mean", seed=0)
    ids = IdsTokenizer(300)
    wider, _, carried = resized(dataclasses.replace(config, vocab_multiple=128), params, ids, ids, how="mean", seed=0)
    assert (wider.vocab_size, carried.kept) == (384, 300), "padding alone needs no pieces"
    with pytest.raises(UserError, match=f"rows for 64 ids and its tokenizer {old.vocab_size} ids"):
        resized(tiny.config(), tiny.build(tiny.config())[1], old, new, how="mean", seed=0)
    with pytest.raises(UserError, match="choose mean or pieces"):
        resized(config, params, old, new, how="zeros", seed=0)
