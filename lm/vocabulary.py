"""A model's tables carried to another tokenizer: rows of the pieces that both have, and new rows from the old ones.

Two pieces are the same if they stand for the same bytes of text, where a piece that begins a word begins with a space.
GPT-2's `Ġthe`, SentencePiece's `▁the`, and `the` of WordPiece and of whole words, which stand behind a space, are all
` the`; GPT-2's `ing` and WordPiece's `##ing` are `ing`. Marks, Chinese characters and kana are without a space in kinds
that drop spaces, as text mostly has them. Capitals count. Special tokens are the same if they have the same role (the
end or beginning of a text, what is unknown, hidden or padding), and failing that the same name.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm import tree
from lm.errors import check
from lm.models.config import ModelConfig
from lm.text.base import UNKNOWN
from lm.text.ids import IdsTokenizer
from lm.text.sentences import is_unspaced
from lm.text.spelling import spelling_of, surface
from lm.text.tokenizer import SentencePieceTokenizer, Tokenizer

Array = jax.Array
How = Literal["mean", "pieces"]

NOISE = 1e-5**0.5
"""Noise on the mean, in standard deviations of the old rows: John Hewitt, Initializing New Word Embeddings for
Pretrained Language Models (2021), draws from a normal distribution with their mean and 1e-5 of their covariance, of
which the diagonal is taken here."""
# Parameters with a row for each token, and on which axis.
_TABLES = {"embed/embedding": 0, "encoder_embed/embedding": 0, "head/kernel": 1, "head_bias/bias": 0}
_ROLES = ("eos_id", "bos_id", "unk_id", "mask_id", "pad_id")


@dataclass(frozen=True)
class Carried:
    """Where the rows of a new vocabulary are from."""

    kept: int
    """Of pieces that both have."""
    composed: int
    """Mean of the rows of the old tokenizer's pieces."""
    drawn: int
    """Mean of all rows, with noise."""
    padding: int
    """Rows that no token has, which make the table's size a multiple."""

    def __str__(self) -> str:
        """For people."""
        told = [f"{self.kept} rows kept", f"{self.composed} made of pieces", f"{self.drawn} drawn around the mean"]
        return f"{', '.join(told)}, {self.padding} of padding"


@dataclass(frozen=True)
class _Plan:
    """Where each new row is from: int32 indices, of old rows (`from`) and new ones."""

    kept_from: np.ndarray
    kept: np.ndarray
    parts_from: np.ndarray
    part_of: np.ndarray
    """For each of `parts_from`, which of `composed` it belongs to."""
    composed: np.ndarray
    drawn: np.ndarray
    rows: int
    """Of the new table."""


def resized(
    config: ModelConfig, params: Any, old: Tokenizer, new: Tokenizer, *, how: How, seed: int
) -> tuple[ModelConfig, Any, Carried]:
    """A model for another tokenizer.

    Rows of pieces that both tokenizers have stay as they are, bit for bit. With `mean`, every other piece gets the mean
    of the old tokenizer's rows and a little noise; with `pieces`, the mean of the rows of the pieces that the old
    tokenizer cuts it into, where it knows all of them, and else the same as with `mean`. So does a special token that
    the old tokenizer lacks. Of the same tokenizer all rows stay, and padding alone changes.

    Args:
      config: the model's settings; the new vocabulary is rounded up to a multiple of its `vocab_multiple`.
      params: its parameters, a tree of arrays; those without a row for each token are passed through.
      old: the model's tokenizer.
      new: the tokenizer that it shall have.
      how: see above.
      seed: of the noise; the same gives the same rows.

    Returns:
      The settings with the new `vocab_size`, the parameters, their dtypes kept, and where their rows are from.

    Raises:
      UserError: a tokenizer of ids alone, or a table with fewer rows than `old` has ids.
    """
    check(how in ("mean", "pieces"), f"rows of new pieces are made by {how!r}; choose mean or pieces")
    settled = dataclasses.replace(config, vocab_size=None).with_vocabulary(new.vocab_size)
    assert settled.vocab_size is not None
    leaves = dict(tree.path_leaves(params))
    found = {path: axis for path, axis in _TABLES.items() if path in leaves}
    rows = leaves["embed/embedding"].shape[0]
    check(
        rows >= old.vocab_size,
        f"the model has rows for {rows} ids and its tokenizer {old.vocab_size} ids; they don't belong together",
    )
    plan = _plan(old, new, rows, settled.vocab_size, how)
    key = jax.random.key(seed)
    for number, (path, axis) in enumerate(_TABLES.items()):
        if path in found:
            made = jax.random.fold_in(key, number)
            leaves[path] = _carried(leaves[path], plan, axis=axis, known=old.vocab_size, key=made)
    carried = Carried(
        kept=int(np.sum(plan.kept < new.vocab_size)),
        composed=len(plan.composed),
        drawn=len(plan.drawn),
        padding=plan.rows - new.vocab_size,
    )
    return settled, jax.tree.unflatten(jax.tree.structure(params), list(leaves.values())), carried


def _carried(table: Any, plan: _Plan, *, axis: int, known: int, key: Array) -> Array:
    parts = {name: jnp.asarray(value, jnp.int32) for name, value in vars(plan).items() if name != "rows"}
    return _carry(table, key, parts, axis=axis, known=known, rows=plan.rows)


@functools.partial(jax.jit, static_argnames=("axis", "known", "rows"))
def _carry(table: Array, key: Array, plan: Mapping[str, Array], *, axis: int, known: int, rows: int) -> Array:
    """A table of `rows` rows on `axis`, its old rows' statistics those of the first `known`."""
    old = jnp.moveaxis(table, axis, 0)
    values = old[:known].astype(jnp.float32)
    mean, spread = jnp.mean(values, axis=0), jnp.std(values, axis=0)
    made = jnp.broadcast_to(mean.astype(old.dtype), (rows, *old.shape[1:]))
    noise = jax.random.normal(key, (*plan["drawn"].shape, *old.shape[1:]), jnp.float32)
    made = made.at[plan["drawn"]].set((mean + NOISE * spread * noise).astype(old.dtype))
    count = plan["composed"].shape[0]
    if count:
        sums = jax.ops.segment_sum(values[plan["parts_from"]], plan["part_of"], count)
        sizes = jax.ops.segment_sum(jnp.ones(plan["part_of"].shape, jnp.float32), plan["part_of"], count)
        composed = sums / sizes.reshape(count, *(1,) * (old.ndim - 1))
        made = made.at[plan["composed"]].set(composed.astype(old.dtype))
    made = made.at[plan["kept"]].set(old[plan["kept_from"]])
    return jnp.moveaxis(made, 0, axis)


def _plan(old: Tokenizer, new: Tokenizer, old_rows: int, rows: int, how: How) -> _Plan:
    if old.fingerprint() == new.fingerprint():
        stay = np.arange(min(old_rows, rows))
        none = np.zeros(0, np.int64)
        return _Plan(stay, stay, none, none, none, none, rows)
    for tokenizer, whose in ((old, "the model's"), (new, "the new")):
        check(
            not isinstance(tokenizer, IdsTokenizer),
            f"{whose} tokenizer is of ids alone, which don't say what pieces they are of; rows can be carried only"
            " between tokenizers that spell their pieces",
        )
    theirs, ours = _Vocabulary(old), _Vocabulary(new)
    kept: dict[int, int] = {}
    for token in range(new.vocab_size):
        match = theirs.special_like(ours, token) if token in ours.special else theirs.piece_like(ours, token)
        if match is not None:
            kept[token] = match
    rest = [token for token in range(new.vocab_size) if token not in kept]
    cut: dict[int, list[int]] = {}
    if how == "pieces":
        plain = [token for token in rest if token not in ours.special]
        ids = theirs.cut([ours.texts[token] for token in plain])
        cut = {token: parts for token, parts in zip(plain, ids) if parts}
    return _Plan(
        kept_from=np.array(list(kept.values()), np.int64),
        kept=np.array(list(kept), np.int64),
        parts_from=np.array([part for parts in cut.values() for part in parts], np.int64),
        part_of=np.repeat(np.arange(len(cut)), [len(parts) for parts in cut.values()]),
        composed=np.array(list(cut), np.int64),
        drawn=np.array([token for token in rest if token not in cut], np.int64),
        rows=rows,
    )


class _Vocabulary:
    """The pieces of a tokenizer by what they stand for."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        self.spelling = spelling_of(tokenizer, self.pieces)
        self.roles = {name: getattr(tokenizer, name) for name in _ROLES}
        if isinstance(tokenizer, SentencePieceTokenizer) and UNKNOWN in self.pieces:
            self.roles["unk_id"] = self.pieces.index(UNKNOWN)  # also where there are bytes instead
        there = {token for token in self.roles.values() if token is not None}
        holes = {i for i, piece in enumerate(self.pieces) if piece == f"<unused {i}>"}
        self.special = {*tokenizer.special_tokens.values(), *there, *holes}
        self.texts = [self._text(piece) for piece in self.pieces]
        """What each stands for; of special tokens, nothing that counts."""
        plain = [token for token in range(tokenizer.vocab_size) if token not in self.special]
        self._by_spelling = {self.pieces[token]: token for token in reversed(plain)}
        # Several may stand for the same text: first what text becomes, a piece before a byte and `中` before `##中`.
        self._by_text: dict[bytes, int] = {}
        for token in sorted(plain, key=lambda token: self._is_spare(self.pieces[token])):
            self._by_text.setdefault(self.texts[token], token)
        # Whether a word at the beginning of a text is spelled as one behind a space.
        first = tokenizer.encode("a")
        spaced = bool(first) and self.texts[first[0]].startswith(b" ")
        self._begins = spaced or self.spelling in ("wordpiece", "words")

    def _text(self, piece: str) -> bytes:
        text = surface(piece, self.spelling)
        inside = self.spelling == "wordpiece" and piece.startswith("##") and piece != "##"
        whole = self.spelling in ("wordpiece", "words") and not inside
        first = text.decode("utf-8", errors="replace")[:1]
        return b" " + text if whole and re.match(r"\w", first) and not is_unspaced(first) else text

    def _is_spare(self, piece: str) -> bool:
        if self.spelling == "text":
            return len(piece) == 6 and piece.startswith("<0x")
        return self.spelling == "wordpiece" and piece.startswith("##")

    def special_like(self, other: _Vocabulary, token: int) -> int | None:
        """Our special token like another vocabulary's."""
        for name in _ROLES:
            if other.roles[name] == token and self.roles[name] is not None:
                return self.roles[name]
        return self._tokenizer.special_tokens.get(other.pieces[token])

    def piece_like(self, other: _Vocabulary, token: int) -> int | None:
        """Our piece like another vocabulary's."""
        text, piece = other.texts[token], other.pieces[token]
        if other._by_text[text] != token and self.spelling == other.spelling and piece in self._by_spelling:
            return self._by_spelling[piece]  # the other of two that stand for this text
        return self._by_text.get(text)

    def cut(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Our pieces of texts; none where one of them is unknown."""
        whole = [self._spoken(text) for text in texts]
        encoded = iter(self._tokenizer.encode_batch([spoken for spoken in whole if spoken is not None]))
        found = []
        for text, spoken in zip(texts, whole):
            if spoken is None:
                ids = [self._by_text.get(bytes([byte]), -1) for byte in text]
            else:
                ids = next(encoded)
                if self._begins and not text.startswith(b" "):
                    ids = self._inside(ids)
            known = all(i >= 0 and i not in self.special for i in ids)
            found.append(ids if known else [])
        return found

    def _spoken(self, text: bytes) -> str | None:
        """What the tokenizer is given of a piece's text; None for bytes within a character."""
        try:
            spoken = text.decode("utf-8")
        except UnicodeDecodeError:
            return None
        return spoken[1:] if self._begins and spoken[:1] == " " and spoken.strip() else spoken

    def _inside(self, ids: list[int]) -> list[int]:
        """Pieces of a text that was taken for a word's beginning, as they are within a word where there are such."""
        if not ids or not self.texts[ids[0]].startswith(b" "):
            return ids
        text = self.texts[ids[0]][1:]
        if not text:
            return ids[1:]
        return [self._by_text.get(text, ids[0]), *ids[1:]]
