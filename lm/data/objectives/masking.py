"""Masked language modelling: some tokens are hidden, or replaced, or left as they are, and are to be told.

`Masker` masks rows of tokens; `MaskedExamples` masks the rows of any examples that hold plain tokens. Which places are
scored is in the weights and nowhere else: 0 is a token like others, and a target like others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lm.data.objectives.draws import MASKS, row_keys, uniform, whole
from lm.data.objectives.words import WordStarts
from lm.data.packing import Batch, Examples
from lm.errors import UserError, check
from lm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How many tokens are masked, and what becomes of them."""

    rate: float = 0.15
    """Share of the tokens that are to be told."""
    mask_share: float = 0.8
    """Of these, the share that the mask token hides."""
    random_share: float = 0.1
    """Of these, the share that a random token takes the place of; the rest is left as it is."""
    whole_words: Literal["off", "pieces", "jieba"] = "off"
    """pieces: all pieces of a word or none, and each Chinese character is a word; jieba: so are its Chinese words."""
    dynamic: bool = True
    """Other places in each epoch; off: the same in all."""


def check_masking_config(config: MaskingConfig) -> None:
    """Raises `UserError` for a setting out of range."""
    check(0 < config.rate <= 1, f"task.masking.rate is {config.rate}; it must be above 0 and at most 1")
    for name in ("mask_share", "random_share"):
        value = getattr(config, name)
        check(0 <= value <= 1, f"task.masking.{name} is {value}; it must be from 0 to 1")
    check(
        config.mask_share + config.random_share <= 1 + 1e-9,
        f"task.masking.mask_share {config.mask_share} and task.masking.random_share {config.random_share} are shares of"
        " the same tokens; together they must be at most 1",
    )


def most_masked(rate: float, seq_len: int) -> int:
    """How many places of a row are masked at most, where `rate` of the tokens is to be."""
    return max(int(np.rint(rate * seq_len)), 1)


def mask_tokens(
    tokens: np.ndarray,
    eligible: np.ndarray,
    keys: np.ndarray,
    *,
    rate: float,
    mask_id: int,
    vocabulary: np.ndarray,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    word_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hides tokens of each row.

    A row with n eligible places has `round(rate * n)` of them masked (half to even), at least 1 where n is: places
    drawn without replacement, all sets of them equally likely. What becomes of each is drawn on its own.

    With `word_starts`, words are gone through in random order, and each is masked that still fits into this number;
    longer ones are passed over. Where none fits, because all are longer, the first one is masked, up to the number
    of places that any row of T tokens may have masked (`most_masked`).

    Args:
      tokens: int32 [N, T].
      eligible: bool [N, T], which places may be masked.
      keys: uint64 [N], one a row (`draws.row_keys`); the result is a function of them and the row.
      rate: share of the eligible places that is masked.
      mask_id: the token that hides another.
      vocabulary: the ids that a random token is drawn from, all equally likely.
      mask_share: share of the masked that become `mask_id`.
      random_share: share that become a random token, by chance the same one.
      word_starts: bool [N, T], where a word begins; a place after one that is not eligible begins one, too.

    Returns:
      What the model sees, int32 [N, T], and which places are masked, bool [N, T].
    """
    N, T = tokens.shape
    order, action, replacement = np.moveaxis(uniform(keys, 3 * T).reshape(N, 3, T), 1, 0)
    n = eligible.sum(1)
    budget = np.where(n > 0, np.maximum(np.rint(rate * n), 1), 0).astype(np.int64)
    if word_starts is None:
        ranked = np.argsort(np.where(eligible, order, 2), axis=1, kind="stable")
        masked = np.zeros((N, T), bool)
        np.put_along_axis(masked, ranked, np.arange(T) < budget[:, None], axis=1)
    else:
        masked = _mask_words(order, eligible, word_starts, budget)
        masked &= np.cumsum(masked, axis=1) <= most_masked(rate, T)
    inputs = tokens.copy()
    inputs[masked & (action < mask_share)] = mask_id
    swapped = masked & (action >= mask_share) & (action < mask_share + random_share)
    inputs[swapped] = vocabulary[whole(replacement[swapped], len(vocabulary))]
    return inputs, masked


def _mask_words(order: np.ndarray, eligible: np.ndarray, starts: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """The places that are masked, bool [N, T]; see `mask_tokens`."""
    N, T = eligible.shape
    before = np.zeros_like(eligible)
    before[:, 1:] = eligible[:, :-1]
    word = np.cumsum(eligible & (starts | ~before), axis=1) - 1  # of each eligible place
    row = np.arange(N)[:, None]
    lengths = np.bincount((row * T + word)[eligible], minlength=N * T).reshape(N, T)  # of each word; 0: there is none
    ranked = np.argsort(np.where(lengths > 0, order, 2), axis=1, kind="stable")
    lengths = np.take_along_axis(lengths, ranked, 1)
    room = budget.copy()
    fits = np.zeros((N, T), bool)
    for k in range(int((lengths > 0).sum(1).max(initial=0))):
        fits[:, k] = (lengths[:, k] > 0) & (lengths[:, k] <= room)
        room -= lengths[:, k] * fits[:, k]
    fits[:, 0] |= (budget > 0) & ~fits.any(1)
    chosen = np.zeros((N, T), bool)
    np.put_along_axis(chosen, ranked, fits, axis=1)
    return eligible & chosen[row, np.maximum(word, 0)]


class Masker:
    """Masks rows of one tokenizer's tokens. Special tokens and unknown ones are neither masked nor put in.

    Args:
      tokenizer: whose tokens they are.
      config: how many, and what becomes of them.
      seed: of the draws.

    Raises:
      UserError: a setting out of range, or a tokenizer without a mask token.
    """

    def __init__(self, tokenizer: Tokenizer, config: MaskingConfig, *, seed: int):
        check_masking_config(config)
        if tokenizer.mask_id is None:
            raise UserError(
                "masking needs a token that hides others, and the tokenizer has none; prepare the dataset with "
                "--tokenizer.special-tokens '<mask>', or a tokenizer that has [MASK] or <mask>"
            )
        self.config = config
        self._seed = seed
        self._mask_id = tokenizer.mask_id
        fixed = {*tokenizer.special_tokens.values(), tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id}
        fixed |= {i for i in (tokenizer.unk_id, tokenizer.pad_id) if i is not None}
        self._maskable = np.ones(tokenizer.vocab_size, bool)
        self._maskable[list(fixed)] = False
        self._vocabulary = np.flatnonzero(self._maskable).astype(np.int32)
        self._starts = None if config.whole_words == "off" else WordStarts(tokenizer, words=config.whole_words)

    def __call__(
        self, tokens: np.ndarray, real: np.ndarray, index: np.ndarray, epoch: np.ndarray | int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees, int32 [N, T], and which places are scored, float32 [N, T].

        Args:
          tokens: int32 [N, T].
          real: bool [N, T], where they are tokens and not padding.
          index: int64 [N], which examples they are.
          epoch: int64 [N], or one for all; without `dynamic` it is ignored.
        """
        config = self.config
        eligible = real & self._maskable[tokens]
        inputs, masked = mask_tokens(
            tokens,
            eligible,
            row_keys(self._seed, MASKS, epoch if config.dynamic else 0, index),
            rate=config.rate,
            mask_id=self._mask_id,
            vocabulary=self._vocabulary,
            mask_share=config.mask_share,
            random_share=config.random_share,
            word_starts=None if self._starts is None else self._starts(np.where(eligible, tokens, -1)),
        )
        return inputs, masked.astype(np.float32)


class MaskedExamples:
    """Examples whose tokens are masked: `tokens` as the model sees them, `targets` as they were, `weights` which.

    Args:
      base: examples with rows of plain `tokens`; what else its rows hold stays as it is.
      masker: masks them.
    """

    def __init__(self, base: Examples, masker: Masker):
        self._base = base
        self._masker = masker

    def __len__(self) -> int:
        return len(self._base)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`; a target stands at the place of its token, and the base's weights say nothing here."""
        index = np.asarray(index, np.int64)
        rows = self._base.batch(index, epoch)
        tokens, real = rows["tokens"], real_tokens(rows, index)
        inputs, weights = self._masker(tokens, real, index, epoch)
        return rows | {"tokens": inputs, "targets": np.where(real, tokens, 0), "weights": weights}

    def documents(self, index: int) -> np.ndarray:
        """See `Examples`."""
        return self._base.documents(index)


def real_tokens(rows: Batch, index: np.ndarray) -> np.ndarray:
    """Which places of rows hold tokens, bool [N, T]: those of a segment, or of a stream all up to its last token."""
    if "segments" in rows:
        return rows["segments"] > 0
    scored = rows["weights"] > 0
    T = scored.shape[1]
    # The target of the last scored place is a token of the next one, if the row has a next one.
    length = np.where(scored.any(1), T - np.argmax(scored[:, ::-1], axis=1) + 1, 0)
    return (np.arange(T) < length[:, None]) & (index >= 0)[:, None]
