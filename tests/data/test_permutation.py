"""The shuffle is one to one at any size, and each epoch and seed has its own."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.permutation import permute


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_is_one_to_one(n: int, seed: int, epoch: int) -> None:
    shuffled = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert shuffled.dtype == np.int64
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(n))


@pytest.mark.parametrize("n", [2**31 + 11, 2**32, 2**53 + 1, 2**62 + 5, 2**63 - 1])
def test_large_sizes_stay_inside_and_do_not_collide(n: int) -> None:
    ends = np.concatenate([np.arange(2000), np.int64(n - 1) - np.arange(2000)])
    shuffled = permute(ends, n, seed=1)
    assert shuffled.min() >= 0
    assert shuffled.max() < n
    assert len(np.unique(shuffled)) == len(ends)
    assert 0.45 < (shuffled / n).mean() < 0.55


def test_is_a_fixed_function() -> None:
    # Golden values: another order would change every run that is resumed.
    assert permute(np.arange(8), 8, seed=0).tolist() == [3, 0, 1, 7, 4, 6, 5, 2]
    assert permute(np.array([0, 1, 10**12 - 1]), 10**12, seed=5, epoch=3).tolist() == [
        916960694758,
        627787632517,
        505707557789,
    ]


def test_shape_and_order_of_the_question_do_not_matter() -> None:
    whole = permute(np.arange(100), 100, seed=4, epoch=2)
    some = np.array([[7, 3], [99, 0]])
    np.testing.assert_array_equal(permute(some, 100, seed=4, epoch=2), whole[some])
    mixed = permute(np.array([5, 5, 5]), 100, seed=4, epoch=np.array([0, 1, 2]))
    assert mixed.tolist() == [permute(np.array([5]), 100, seed=4, epoch=e)[0] for e in range(3)]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed=seed, epoch=epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64  # seed 1 of epoch 0 is not seed 0 of epoch 1, as with seed + epoch


def test_every_order_of_four_turns_up_and_no_place_is_favoured() -> None:
    epochs = np.arange(24_000)[:, None]
    counts = Counter(map(tuple, permute(np.tile(np.arange(4), (24_000, 1)), 4, seed=1, epoch=epochs)))
    assert len(counts) == 24
    assert max(counts.values()) < 1300
    n = 40
    places = permute(np.tile(np.arange(n), (4000, 1)), n, seed=1, epoch=np.arange(4000)[:, None])
    table = np.zeros((n, n))
    np.add.at(table, (np.tile(np.arange(n), (4000, 1)), places), 1)
    chi_squared = ((table - 100) ** 2 / 100).sum() / (n - 1) ** 2
    assert 0.85 < chi_squared < 1.15


@pytest.mark.parametrize(("index", "n"), [([0], 0), ([0], 2**63), ([5], 5), ([-1], 5)])
def test_refuses_what_it_cannot_shuffle(index: list[int], n: int) -> None:
    with pytest.raises(ValueError, match=r"\[|at least 1"):
        permute(np.array(index), n, seed=0)
