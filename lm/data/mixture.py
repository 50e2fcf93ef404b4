"""Several datasets as one stream of examples, in shares that may change from step to step.

Which dataset example n of the stream comes from is a formula, as is which of that dataset's examples it is. A stage is
a stretch of the stream with one set of weights. It is cut into blocks that hold a whole number of examples of each
dataset, as near to the weights as whole numbers come; a seeded permutation says which place of a block is whose. So
shares are exact in every block, and nothing needs to be remembered to go on from the middle of one. Each dataset's
own examples come in the same kind of epochs as if it were alone, each in an order of its own.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from lm.data.config import MixtureConfig
from lm.data.manifest import TOKENIZER_FOLDER, Manifest, load_manifest
from lm.data.packing import Batch, Examples
from lm.data.permutation import permute
from lm.data.store import DatasetStore, TokenStore
from lm.errors import check
from lm.text.tokenizer import Tokenizer, load_tokenizer

# Changing any of these changes the order of every mixture ever trained on: don't.
_BLOCK = 1000  # examples; shares in tenths of a percent are exact
_RAREST = 100  # a block is so long that even the rarest dataset has as many examples in it
_LONGEST_BLOCK = 10**7

_COUNTED_AT_ONCE = 1 << 20


def check_mixture_config(config: MixtureConfig) -> None:
    """Raises UserError if settings of a mixture are out of range or contradict each other; reads no file."""
    n, rows = len(config.datasets), max(len(config.from_steps), 1)
    if n == 0:
        for name in ("weights", "from_steps", "temperature"):
            check(
                getattr(config, name) in ((), None),
                f"data.mixture.{name} is set, but data.mixture.datasets names no dataset",
            )
        return
    twice = [name for name in config.datasets if config.datasets.count(name) > 1]
    check(not twice, f"data.mixture.datasets names {twice[0] if twice else ''} twice; give it one larger weight")
    steps = config.from_steps
    check(
        not steps or (steps[0] == 0 and all(a < b for a, b in itertools.pairwise(steps))),
        f"data.mixture.from_steps is {_shown(steps)}; it must begin with 0 and grow",
    )
    if not config.weights:
        check(
            rows == 1,
            "data.mixture.from_steps says when weights change; give data.mixture.weights, a row for each",
        )
        check(
            config.temperature is None or (config.temperature > 0 and math.isfinite(config.temperature)),
            f"data.mixture.temperature is {config.temperature}; it must be above 0",
        )
        return
    check(
        config.temperature is None,
        "data.mixture.temperature and data.mixture.weights both say what the shares are; leave one out",
    )
    check(
        len(config.weights) == n * rows,
        f"data.mixture.weights has {len(config.weights)} numbers; it must have {n * rows}: one for each of {n} datasets"
        + (f", in each of {rows} rows (data.mixture.from_steps)" if config.from_steps else ""),
    )
    check(
        all(weight >= 0 and math.isfinite(weight) for weight in config.weights),
        f"data.mixture.weights is {_shown(config.weights)}; a weight must be 0 or more",
    )
    for start in range(0, n * rows, n):
        row = config.weights[start : start + n]
        check(any(row), "data.mixture.weights has a row of zeros; some dataset must have a weight")
        rarest = min(weight for weight in row if weight) / sum(row)
        check(
            rarest >= _RAREST / _LONGEST_BLOCK,
            f"data.mixture.weights has a share of {rarest:.2g}; leave that dataset out, or give it at least 1e-05",
        )
    unused = [name for i, name in enumerate(config.datasets) if not any(config.weights[i::n])]
    check(not unused, f"data.mixture.weights gives {unused[0] if unused else ''} nothing at any time; leave it out")


def _shown(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    name: str
    """What reports and document keys call it: the dataset's folder."""
    store: TokenStore
    """The tokens of its split."""


@dataclass(frozen=True)
class Mixture:
    """One split of several datasets. The loader takes it where it takes a store."""

    parts: tuple[MixturePart, ...]
    config: MixtureConfig

    @property
    def stores(self) -> list[TokenStore]:
        """The tokens of each part."""
        return [part.store for part in self.parts]

    @property
    def n_tokens(self) -> int:
        """Tokens of all parts together."""
        return sum(store.n_tokens for store in self.stores)

    def document_key(self, document: int) -> str:
        """`PART:KEY` of a document; documents are counted through all parts, as `MixedExamples.documents` does."""
        first = _document_offsets(self.stores)
        at = int(np.searchsorted(first, document, side="right")) - 1
        return f"{self.parts[at].name}:{self.parts[at].store.document_key(document - int(first[at]))}"

    def order(self, sizes: Sequence[int], *, batch_size: int, seed: int) -> MixtureOrder:
        """The order of training: `sizes` are the numbers of examples of the parts.

        Raises:
          UserError: sizes of datasets so unlike that one would hardly be seen.
        """
        n = len(self.parts)
        steps = self.config.from_steps or (0,)
        if self.config.weights:
            weights = [Fraction(repr(float(weight))) for weight in self.config.weights]
        else:
            power = 1 / (1.0 if self.config.temperature is None else self.config.temperature)
            largest = max(store.n_tokens for store in self.stores)
            weights = [Fraction((store.n_tokens / largest) ** power) for store in self.stores]
            rarest = min(range(n), key=weights.__getitem__)
            share = weights[rarest] / sum(weights)
            check(
                share >= Fraction(_RAREST, _LONGEST_BLOCK),
                f"by size, {self.parts[rarest].name} would have a share of {float(share):.2g};"
                " leave it out, raise data.mixture.temperature or set data.mixture.weights",
            )
        rows = [tuple(weights[i : i + n]) for i in range(0, len(weights), n)]
        return MixtureOrder(tuple(sizes), tuple(rows), tuple(step * batch_size for step in steps), seed)


@dataclass(frozen=True)
class MixtureOrder:
    """Which example is the n-th of the stream: a pure function of n.

    Examples of all parts are numbered through: part p has `[sum(sizes[:p]), sum(sizes[:p + 1]))`.
    """

    sizes: tuple[int, ...]
    """Examples in each part."""
    weights: tuple[tuple[Fraction, ...], ...]
    """For each stage a weight of each part, exact, so that shares are the same on every machine."""
    starts: tuple[int, ...]
    """The place in the stream where each stage begins, growing from 0."""
    seed: int
    """Seed of all permutations."""

    def __call__(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples at places `n` of the stream, and in which epoch of their part: int64, shaped like `n`."""
        part, rank = self.locate(n)
        index, epoch = np.empty_like(rank), np.empty_like(rank)
        first = np.cumsum([0, *self.sizes])
        for p in np.unique(part).tolist():
            (where,) = np.nonzero(part == p)
            epoch[where], position = np.divmod(rank[where], self.sizes[p])
            seed = _seed(self.seed, "part", p)
            index[where] = first[p] + permute(position, self.sizes[p], seed=seed, epoch=epoch[where])
        return index, epoch

    def locate(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part and rank of places `n` ([N] integers) of the stream: the rank-th example taken of that part, from 0.

        Ranks of a part are all used, each once, though not in order within a block.
        """
        n = np.asarray(n, np.int64)
        part, rank = np.empty_like(n), np.empty_like(n)
        stage_of = np.searchsorted(self.starts, n, side="right") - 1
        for number in np.unique(stage_of).tolist():
            stage = self._stages[number]
            blocks, places = np.divmod(n - stage.start, sum(stage.counts))
            seed = _seed(self.seed, "block", number)
            for last, counts in ((False, stage.counts), (True, stage.last_counts)):
                (where,) = np.nonzero((stage_of == number) & ((blocks == stage.last_block) == last))
                if not where.size:
                    continue
                block = blocks[where]
                slot = permute(places[where], sum(counts), seed=seed, epoch=block)
                bounds = np.cumsum([0, *counts])
                p = np.searchsorted(bounds, slot, side="right") - 1
                part[where] = p
                rank[where] = np.array(stage.before)[p] + block * np.array(stage.counts)[p] + slot - bounds[p]
        return part, rank

    def counts(self, n: int) -> list[int]:
        """How many of the first n examples of the stream are of each part."""
        stage = self._stages[int(np.searchsorted(self.starts, n, side="right")) - 1]
        block, rest = divmod(n - stage.start, sum(stage.counts))
        total = np.array(stage.before) + block * np.array(stage.counts)
        for start in range(n - rest, n, _COUNTED_AT_ONCE):
            part, _ = self.locate(np.arange(start, min(start + _COUNTED_AT_ONCE, n)))
            total += np.bincount(part, minlength=len(self.sizes))
        return [int(count) for count in total]

    def shares(self, n: int) -> list[float]:
        """The share of each part around place n of the stream, as it is asked for."""
        row = self.weights[int(np.searchsorted(self.starts, n, side="right")) - 1]
        return [float(weight / sum(row)) for weight in row]

    @functools.cached_property
    def _stages(self) -> list[_Stage]:
        stages = []
        before = [0] * len(self.sizes)
        for row, start, stop in itertools.zip_longest(self.weights, self.starts, self.starts[1:]):
            shares = [weight / sum(row) for weight in row]
            length = max(_BLOCK, math.ceil(_RAREST / min(share for share in shares if share)))
            # Shares such as thirds are exact in a block of a length that can be divided so.
            whole = math.lcm(*(share.denominator for share in shares))
            if whole <= _LONGEST_BLOCK:
                length = -(-length // whole) * whole
            blocks, rest = divmod(stop - start, length) if stop is not None else (-1, 0)
            stage = _Stage(start, before, apportion(row, length), blocks, apportion(row, rest))
            stages.append(stage)
            before = [b + blocks * c + r for b, c, r in zip(before, stage.counts, stage.last_counts)]
        return stages


@dataclass(frozen=True)
class _Stage:
    start: int
    """Its first place in the stream."""
    before: list[int]
    """Examples of each part in earlier stages."""
    counts: list[int]
    """Examples of each part in a block."""
    last_block: int
    """Which block the next stage cuts short, if any; -1 in a stage without end."""
    last_counts: list[int]
    """Examples of each part in that one."""


def apportion(weights: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers of that total, as near to the weights as they come: by largest remainder, the first of equals."""
    quotas = [weight * total / sum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


class MixedExamples:
    """Examples of several parts, one part after the other."""

    def __init__(self, mixture: Mixture, parts: Sequence[Examples]):
        self.sizes = [len(examples) for examples in parts]
        self.cut = sum(getattr(examples, "cut", 0) for examples in parts)
        self._parts = list(parts)
        self._first = np.cumsum([0, *self.sizes])
        self._first_document = _document_offsets(mixture.stores)

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples.batch`."""
        index = np.asarray(index, np.int64)
        if index.size and index.max() >= len(self):
            raise IndexError(f"example {index.max()} asked; there are {len(self)}.")
        part = np.searchsorted(self._first, np.maximum(index, 0), side="right") - 1
        batch: Batch = {}
        for p in np.unique(part).tolist():
            (where,) = np.nonzero(part == p)
            own = np.where(index[where] < 0, -1, index[where] - self._first[p])
            rows = self._parts[p].batch(own, np.broadcast_to(epoch, index.shape)[where])
            for name, values in rows.items():
                batch.setdefault(name, np.zeros((len(index), *values.shape[1:]), values.dtype))[where] = values
        return batch

    def documents(self, index: int) -> np.ndarray:
        """See `Examples.documents`; documents are counted through all parts."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} asked; there are {len(self)}.")
        p = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._first_document[p] + self._parts[p].documents(index - int(self._first[p]))


@dataclass(frozen=True)
class MixedDatasets:
    """The prepared datasets of a mixture, opened."""

    config: MixtureConfig
    """What is mixed."""
    folders: tuple[Path, ...]
    """Where each dataset is."""
    manifests: tuple[Manifest, ...]
    """What each dataset says of itself."""
    tokenizer: Tokenizer
    """The tokenizer of all."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits: what the datasets hold, in their order."""
        text = "\n".join(manifest.fingerprint for manifest in self.manifests)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that at least one dataset has."""
        return tuple(dict.fromkeys(split for manifest in self.manifests for split in manifest.splits))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of documents, the same in all datasets; none if they have none."""
        return tuple(self.manifests[0].labels)

    def store(self, split: str) -> Mixture:
        """A split of all datasets that have it.

        Raises:
          UserError: none has.
        """
        check(split in self.splits, f"no dataset of the mixture has a split {split!r}; they have {_shown(self.splits)}")
        parts = tuple(
            MixturePart(name, DatasetStore(folder, split))
            for name, folder, manifest in zip(self.config.datasets, self.folders, self.manifests)
            if split in manifest.splits
        )
        return Mixture(parts, self.config)

    def tokens_per_byte(self, split: str) -> float:
        """Tokens, ends of documents included, for each byte of a split's text."""
        counts = [manifest.splits[split] for manifest in self.manifests if split in manifest.splits]
        return sum(count.tokens for count in counts) / sum(count.bytes for count in counts)


def open_mixture(config: MixtureConfig) -> MixedDatasets:
    """Opens the prepared datasets of a mixture.

    Raises:
      UserError: a setting, a folder without a dataset, or datasets of different tokenizers.
    """
    check_mixture_config(config)
    check(config.datasets, "data.mixture.datasets names no dataset")
    folders = tuple(Path(name) for name in config.datasets)
    manifests = tuple(load_manifest(folder) for folder in folders)
    for folder, manifest in zip(folders, manifests):
        check(
            manifest.tokenizer_fingerprint == manifests[0].tokenizer_fingerprint,
            f"{folder} was prepared with tokenizer {manifest.tokenizer_fingerprint} and {folders[0]} with"
            f" {manifests[0].tokenizer_fingerprint}; a mixture needs one: prepare both with the same tokenizer",
        )
        check(
            manifest.labels == manifests[0].labels,
            f"{folder} has the classes {_shown(manifest.labels)} and {folders[0]} {_shown(manifests[0].labels)};"
            " prepare both with the same data.labels",
        )
    return MixedDatasets(config, folders, manifests, load_tokenizer(folders[0] / TOKENIZER_FOLDER))


def _document_offsets(stores: Sequence[TokenStore]) -> np.ndarray:
    """int64 [parts + 1]: the documents before each part."""
    return np.cumsum([0, *(len(store.document_offsets) - 1 for store in stores)])


def _seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, so that orders that are drawn for different ones have nothing to do with each other."""
    written = "\0".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "little")
