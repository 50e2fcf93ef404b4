"""A mixture is a function of the example's number: shares, epochs and order, from wherever one begins."""

import dataclasses
import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import config as configs
from lm.data.config import DataConfig, MixtureConfig
from lm.data.loader import (
    batch_documents,
    check_loader_config,
    epochs_seen,
    evaluation_batches,
    n_evaluation_batches,
    packed,
    training_batches,
    training_size,
)
from lm.data.mixture import Mixture, MixtureOrder, MixturePart, apportion, check_mixture_config, open_mixture
from lm.data.packing import Batch, make_examples
from lm.data.prepare import prepare
from lm.data.store import DatasetStore, MemoryStore
from lm.data.writer import DatasetWriter
from lm.errors import UserError
from lm.text.tokenizer import TokenizerConfig

EOS = 0
THREE = (Fraction(6, 10), Fraction(3, 10), Fraction(1, 10))
OTHER = (Fraction(0), Fraction(1, 2), Fraction(1, 2))


@pytest.mark.parametrize("batch_size", [7, 16])
def test_shares_are_exact_in_every_block_and_stage(batch_size: int) -> None:
    order = MixtureOrder((500, 70, 9), (THREE, OTHER, THREE), (0, 2500, 4100), seed=3)
    part, _ = order.locate(np.arange(9100))

    def counts(start: int, stop: int) -> list[int]:
        return np.bincount(part[start:stop], minlength=3).tolist()

    assert counts(0, 1000) == counts(1000, 2000) == [600, 300, 100]
    assert counts(2000, 2500) == [300, 150, 50]  # a block cut short by the next stage
    assert counts(2500, 3500) == [0, 500, 500]
    assert counts(3500, 4100) == [0, 300, 300]
    for start in range(4100, 9100, 1000):
        assert counts(start, start + 1000) == [600, 300, 100]
    # No long run of one part: in a window of 100 the shares are about right.
    for start in range(0, 2400, 100):
        assert 40 <= counts(start, start + 100)[0] <= 80
    # Another block, another arrangement.
    assert part[:1000].tolist() != part[1000:2000].tolist()
    assert order.shares(0) == [0.6, 0.3, 0.1]
    assert order.shares(2499) == [0.6, 0.3, 0.1]
    assert order.shares(2500) == [0, 0.5, 0.5]


def test_every_example_of_a_part_comes_once_an_epoch() -> None:
    sizes = (500, 70, 9)
    order = MixtureOrder(sizes, (THREE, OTHER, THREE), (0, 2500, 4100), seed=3)
    n = np.arange(9100)
    part, rank = order.locate(n)
    index, epoch_of = order(n)
    np.testing.assert_array_equal(epoch_of, rank // np.array(sizes)[part])
    first = np.cumsum([0, *sizes])
    epochs = []
    for p, size in enumerate(sizes):
        (where,) = np.nonzero(part == p)
        # Ranks are used up without a gap, so that whole epochs are whole.
        assert sorted(rank[where].tolist()) == list(range(len(where)))
        local = index[where][np.argsort(rank[where])] - first[p]
        assert local.min() >= 0
        assert local.max() < size
        for epoch in range(len(where) // size):
            rows = local[epoch * size : (epoch + 1) * size].tolist()
            assert sorted(rows) == list(range(size))
            epochs.append(tuple(rows))
        # What is taken out of order within a block stays within a block of 1000.
        assert np.abs(rank[where] - np.arange(len(where))).max() < 1000
    assert len(set(epochs)) == len(epochs)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 2500), min_size=3, max_size=3),
    n=st.integers(0, 9000),
    seed=st.integers(0, 5),
)
def test_any_place_can_be_asked_alone(weights: list[list[int]], lengths: list[int], n: int, seed: int) -> None:
    rows = tuple(tuple(map(Fraction, row)) for row in weights)
    starts = (0, *itertools.accumulate(lengths[: len(rows) - 1]))
    order = MixtureOrder((40, 1, 300), rows, starts, seed)
    everything = np.arange(n + 5)
    part, rank = order.locate(everything)
    assert order.locate(np.array([n]))[0][0] == part[n]
    assert order.locate(np.array([n]))[1][0] == rank[n]
    some = np.array([n, 0, n // 2, n + 4])
    np.testing.assert_array_equal(order(some), np.stack(order(everything))[:, some])
    assert order.counts(n) == np.bincount(part[:n], minlength=3).tolist()
    # One to one: no rank of a part twice.
    assert len(set(zip(part.tolist(), rank.tolist()))) == n + 5
    for place, p in enumerate(part.tolist()):
        assert rows[np.searchsorted(starts, place, side="right") - 1][p] > 0


def test_seeds_and_parts_have_orders_of_their_own() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        """The first epoch of each of two parts of one size, and who comes when."""
        order = MixtureOrder((100, 100), ((Fraction(1), Fraction(1)),), (0,), seed)
        n = np.arange(1000)
        part, rank = order.locate(n)
        index, _ = order(n)
        first = [index[(part == p) & (rank < 100)][np.argsort(rank[(part == p) & (rank < 100)])] % 100 for p in (0, 1)]
        return [*(tuple(epoch.tolist()) for epoch in first), tuple(part.tolist())]

    assert len({*orders(0), *orders(1)}) == 6


def test_far_places_cost_no_more() -> None:
    order = MixtureOrder((500, 70, 9), (THREE, OTHER), (0, 10**11), seed=1)
    for n in (10**11 - 1, 10**11, 10**12 + 123):
        counts = order.counts(n)
        assert sum(counts) == n
    assert order.counts(10**11) == [6 * 10**10, 3 * 10**10, 10**10]
    assert order.counts(10**11 + 2000) == [6 * 10**10, 3 * 10**10 + 1000, 10**10 + 1000]
    assert order(np.array([10**12]))[0].shape == (1,)


def test_a_block_is_long_enough_for_the_rarest_and_divides_shares_exactly() -> None:
    rare = MixtureOrder((10, 10), ((Fraction(9999), Fraction(1)),), (0,), seed=0)
    assert rare.counts(10**6) == [999_900, 100]
    thirds = MixtureOrder((10, 10, 10), ((Fraction(1),) * 3,), (0,), seed=0)
    assert thirds.counts(1002 * 7) == [334 * 7] * 3


@given(st.lists(st.fractions(0, 5, max_denominator=50), min_size=1, max_size=6).filter(any), st.integers(0, 3000))
def test_apportion_stays_within_one_of_the_quota(weights: list[Fraction], total: int) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts):
        assert abs(count - weight * total / sum(weights)) < 1


def test_apportion_gives_to_the_largest_remainders() -> None:
    assert apportion([Fraction(47), Fraction(16), Fraction(158), Fraction(120)], 10) == [1, 0, 5, 4]
    assert apportion([Fraction(1)] * 3, 2) == [1, 1, 0]


def test_is_a_fixed_function() -> None:
    # Golden values: another order would change every run that is resumed.
    order = MixtureOrder((50, 20, 8), (THREE, OTHER), (0, 100), seed=0)
    assert order(np.array([0, 1, 2, 99, 100, 101, 5000]))[0].tolist() == [2, 9, 28, 52, 75, 70, 66]


def make_store(n_documents: int, first: int, seed: int) -> MemoryStore:
    """Documents whose tokens are of `[first, first + 100)`, so that every token says which part it is of."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, n_documents)
    return MemoryStore([np.append(rng.integers(first, first + 100, length), EOS) for length in lengths])


STORES = (make_store(60, 100, 0), make_store(25, 200, 1), make_store(6, 300, 2))
CONFIG = DataConfig(
    seq_len=8,
    mixture=MixtureConfig(
        datasets=("a", "b", "c"), weights=(0.6, 0.3, 0.1, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0), from_steps=(0, 20, 40)
    ),
)
MIXTURE = Mixture(tuple(MixturePart(*part) for part in zip("abc", STORES)), CONFIG.mixture)
packings = pytest.mark.parametrize("packing", ["stream", "documents", "pad"])


def take(mixture: Mixture, config: DataConfig, n: int, **settings: int) -> list[Batch]:
    batches = training_batches(mixture, config, **{"make": packed(1), "batch_size": 16, **settings})
    try:
        return list(itertools.islice(batches, n))
    finally:
        batches.close()


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_equal(one, other)


@packings
def test_a_resumed_mixture_is_the_straight_one(packing: str) -> None:
    config = dataclasses.replace(CONFIG, packing=packing, stride=5)
    straight = take(MIXTURE, config, 40)
    for start in (1, 7, 19, 20, 21, 39):  # in the middle of a block, and around the border of the stages
        assert_same(take(MIXTURE, config, 40 - start, start_step=start), straight[start:])


def test_processes_share_one_mixture() -> None:
    whole = take(MIXTURE, CONFIG, 12, start_step=15)
    parts = [take(MIXTURE, CONFIG, 12, start_step=15, rows=range(4 * i, 4 * i + 4)) for i in range(4)]
    assert_same([{k: np.concatenate([row[k] for row in rows]) for k in rows[0]} for rows in zip(*parts)], whole)


def on_disk(folder: Path) -> Mixture:
    parts = []
    for name, store in zip("abc", STORES):
        (folder / name).mkdir()
        with DatasetWriter(folder / name, "corpus", EOS) as writer:
            for i, (start, stop) in enumerate(itertools.pairwise(store.document_offsets)):
                writer.add("train", str(i), store.read(start, stop - 1).tolist(), text_bytes=1, last=True)
            writer.finish()
        parts.append(MixturePart(name, DatasetStore(folder / name, "train")))
    return Mixture(tuple(parts), CONFIG.mixture)


def test_workers_read_the_same_mixture_from_disk(tmp_path: Path) -> None:
    disk = on_disk(tmp_path)
    expected = take(MIXTURE, CONFIG, 7, start_step=17)
    assert_same(take(disk, CONFIG, 7, start_step=17), expected)
    assert_same(take(disk, dataclasses.replace(CONFIG, workers=2), 7, start_step=17), expected)


@packings
def test_batches_hold_the_rows_of_the_parts_in_their_shares(packing: str) -> None:
    config = dataclasses.replace(CONFIG, packing=packing)
    rows: Counter[tuple[int, ...]] = Counter()
    for store in STORES:
        examples = make_examples(store, seq_len=8, packing=packing, bos_id=1)
        rows.update(map(tuple, examples.batch(np.arange(len(examples)))["targets"].tolist()))
    batches = take(MIXTURE, config, 40)
    targets = np.concatenate([batch["targets"] for batch in batches])
    assert set(map(tuple, targets.tolist())) <= set(rows)
    part = targets.max(1) // 100 - 1  # a row that is all end-of-text is of no part
    early, late = part[: 20 * 16], part[20 * 16 :]
    # Both stages are 320 examples long, one block each.
    seen = [np.bincount(stage[stage >= 0], minlength=3).tolist() for stage in (early, late)]
    for found, expected in zip(seen, ([192, 96, 32], [0, 160, 160])):
        assert np.abs(np.subtract(found, expected)).max() <= (part < 0).sum()
    assert batches[0].keys() == take_one(STORES[0], config).keys()


def take_one(store: MemoryStore, config: DataConfig) -> Batch:
    batches = training_batches(
        store, dataclasses.replace(config, mixture=MixtureConfig()), make=packed(1), batch_size=2
    )
    try:
        return next(batches)
    finally:
        batches.close()


def test_epochs_are_counted_for_each_part() -> None:
    sizes = {name: training_size(store, CONFIG, make=packed(1))[0] for name, store in zip("abc", STORES)}
    assert training_size(MIXTURE, CONFIG, make=packed(1))[0] == sum(sizes.values())
    for step in (0, 1, 13, 20, 33):
        seen: Counter[str] = Counter()
        for s in range(step):
            for keys in batch_documents(MIXTURE, CONFIG, make=packed(1), batch_size=16, step=s):
                seen[keys[0].split(":")[0]] += 1
        expected = {name: seen[name] / size for name, size in sizes.items()}
        assert epochs_seen(MIXTURE, CONFIG, make=packed(1), batch_size=16, step=step) == pytest.approx(expected)
    assert epochs_seen(MIXTURE, CONFIG, make=packed(1), batch_size=16, step=33)["c"] > 1


def test_documents_of_a_mixture_are_named() -> None:
    (batch,) = take(MIXTURE, CONFIG, 1, start_step=11)
    names = batch_documents(MIXTURE, CONFIG, make=packed(1), batch_size=16, step=11)
    for keys, tokens, targets in zip(names, batch["tokens"], batch["targets"]):
        inside: set[int] = set()
        for key in keys:
            name, document = key.split(":")
            store = STORES["abc".index(name)]
            inside |= set(store.read(*store.document_offsets[int(document) : int(document) + 2].tolist()).tolist())
        assert {*tokens.tolist(), *targets.tolist()} <= inside


@packings
@pytest.mark.parametrize("eval_stride", [None, 3])
def test_evaluation_goes_through_the_parts_in_order(packing: str, eval_stride: int | None) -> None:
    config = dataclasses.replace(CONFIG, packing=packing, eval_stride=eval_stride)
    batches = list(evaluation_batches(MIXTURE, config, make=packed(1), batch_size=10))
    assert len(batches) == n_evaluation_batches(MIXTURE, config, make=packed(1), batch_size=10)
    scored = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    expected = np.concatenate([store.read(int(packing == "stream"), store.n_tokens) for store in STORES])
    np.testing.assert_array_equal(np.sort(scored), np.sort(expected))
    if packing == "stream":
        np.testing.assert_array_equal(scored, expected)
    alone = [b for store in STORES for b in evaluation_batches(store, config, make=packed(1), batch_size=1)]
    rows = np.concatenate([batch["tokens"] for batch in batches])[: len(alone)]
    np.testing.assert_array_equal(rows, np.concatenate([batch["tokens"] for batch in alone]))


@pytest.mark.parametrize(("temperature", "power"), [(None, 1), (1.0, 1), (2.0, 0.5), (5.0, 0.2)])
def test_without_weights_shares_follow_the_sizes(temperature: float | None, power: float) -> None:
    mixture = Mixture(MIXTURE.parts, MixtureConfig(datasets=("a", "b", "c"), temperature=temperature))
    order = mixture.order([10, 10, 10], batch_size=4, seed=0)
    sizes = np.array([store.n_tokens for store in STORES]) ** power
    np.testing.assert_allclose(order.shares(0), sizes / sizes.sum(), rtol=1e-12)
    length = 10**6
    np.testing.assert_allclose(order.counts(length), length * sizes / sizes.sum(), rtol=0.005)


def test_seeds_give_other_orders() -> None:
    one, other = (take(MIXTURE, dataclasses.replace(CONFIG, seed=seed), 2) for seed in (0, 1))
    assert not np.array_equal(one[0]["tokens"], other[0]["tokens"])


def prepared(folder: Path, name: str, text: str, kind: str = "byte") -> Path:
    source = folder / f"{name}.txt"
    source.write_text(text)
    data = DataConfig(source=f"text:{source}", document="line", name=name, root=str(folder / "datasets"))
    return prepare(data, TokenizerConfig(kind=kind, vocab_size=300))


def test_prepared_datasets_are_opened_together(tmp_path: Path) -> None:
    a = prepared(tmp_path, "a", "the quick brown fox\n" + "".join(f"line number {i}\n" for i in range(60)))
    b = prepared(tmp_path, "b", "".join(f"another text, {i}\n" for i in range(40)))
    config = MixtureConfig(datasets=(str(a), str(b)), temperature=2.0)
    opened = open_mixture(config)
    train = opened.store("train")
    assert [part.name for part in train.parts] == [str(a), str(b)]
    assert train.n_tokens == sum(DatasetStore(folder, "train").n_tokens for folder in (a, b))
    assert set(opened.splits) == {"train", "validation"}
    assert opened.tokenizer.vocab_size == 257
    counts = [manifest.splits["train"] for manifest in opened.manifests]
    assert opened.tokens_per_byte("train") == sum(c.tokens for c in counts) / sum(c.bytes for c in counts)
    data = DataConfig(seq_len=16, mixture=config)
    (batch,) = take(train, data, 1)
    assert batch["tokens"].shape == (16, 16)
    with pytest.raises(UserError, match="no dataset of the mixture has a split 'test'; they have train validation"):
        opened.store("test")
    swapped = open_mixture(dataclasses.replace(config, datasets=(str(b), str(a))))
    assert swapped.fingerprint != opened.fingerprint == open_mixture(config).fingerprint
    # One that is too short for an example is named.
    with pytest.raises(UserError, match=f"^{b}: the corpus has"):
        take(train, dataclasses.replace(data, seq_len=train.parts[1].store.n_tokens), 1)

    other = prepared(tmp_path, "c", "".join(f"text for bpe {i}\n" for i in range(40)), kind="bpe")
    with pytest.raises(UserError) as error:
        open_mixture(MixtureConfig(datasets=(str(a), str(other))))
    for named in (str(a), str(other), *(manifest.tokenizer_fingerprint for manifest in opened.manifests[:1])):
        assert named in str(error.value)
    with pytest.raises(UserError, match="no prepared dataset in"):
        open_mixture(MixtureConfig(datasets=(str(a), str(tmp_path / "nowhere"))))


def test_settings_are_read_back_and_set_on_the_command_line() -> None:
    experiment = configs.Experiment(data=CONFIG)
    assert configs.from_dict(configs.Experiment, configs.to_dict(experiment)) == experiment
    words = ["--data.mixture.datasets", "a", "b", "--data.mixture.from-steps", "0", "100"]
    words += ["--data.mixture.weights", "0.7", "0.3", "1", "0"]
    parsed = configs.parse(configs.Experiment, configs.Experiment(), words, prog="lm train")
    expected = MixtureConfig(datasets=("a", "b"), weights=(0.7, 0.3, 1.0, 0.0), from_steps=(0, 100))
    assert parsed.data.mixture == expected


TWO = {"datasets": ("a", "b")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": (1.0,)}, "data.mixture.weights is set, but data.mixture.datasets names no dataset"),
        ({"temperature": 2.0}, "data.mixture.temperature is set, but"),
        ({"datasets": ("a", "a")}, "data.mixture.datasets names a twice"),
        ({**TWO, "weights": (1.0,)}, "data.mixture.weights has 1 numbers; it must have 2: one for each of 2 datasets"),
        (
            {**TWO, "weights": (1.0, 1.0), "from_steps": (0, 5)},
            "data.mixture.weights has 2 numbers; it must have 4: one for each of 2 datasets, in each of 2 rows",
        ),
        ({**TWO, "weights": (1.0, -1.0)}, "data.mixture.weights is 1.0 -1.0; a weight must be 0 or more"),
        ({**TWO, "weights": (1.0, float("nan"))}, "data.mixture.weights is 1.0 nan"),
        ({**TWO, "weights": (0.0, 0.0)}, "data.mixture.weights has a row of zeros"),
        ({**TWO, "weights": (1.0, 0.0)}, "data.mixture.weights gives b nothing at any time; leave it out"),
        ({**TWO, "weights": (1.0, 1e-6)}, "data.mixture.weights has a share of 1e-06"),
        ({**TWO, "weights": (1.0, 1.0), "from_steps": (1,)}, "data.mixture.from_steps is 1; it must begin with 0"),
        ({**TWO, "weights": (1.0,) * 4, "from_steps": (0, 0)}, "data.mixture.from_steps is 0 0; it must begin"),
        ({**TWO, "from_steps": (0, 5)}, "data.mixture.from_steps says when weights change; give"),
        ({**TWO, "temperature": 0.0}, "data.mixture.temperature is 0.0; it must be above 0"),
        ({**TWO, "temperature": 1.0, "weights": (1.0, 1.0)}, "data.mixture.temperature and data.mixture.weights both"),
    ],
)
def test_mistakes_in_a_mixture(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_mixture_config(MixtureConfig(**values))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_mixture_takes_the_place_of_the_source() -> None:
    check_loader_config(CONFIG)
    with pytest.raises(UserError, match=r"data\.source is 'text:x', but data\.mixture\.datasets names prepared"):
        check_loader_config(dataclasses.replace(CONFIG, source="text:x"))


def test_a_dataset_that_its_size_would_hide_is_told() -> None:
    tiny = Mixture(
        (MixturePart("large", MemoryStore([np.ones(10**6)])), MixturePart("small", MemoryStore([np.ones(3)]))),
        MixtureConfig(datasets=("large", "small")),
    )
    with pytest.raises(UserError, match="by size, small would have a share of 3e-06; leave it out, raise"):
        tiny.order([10, 10], batch_size=4, seed=0)
