"""Draws are a formula of (seed, purpose, epoch, index), even, and independent of who else is asked for."""

import numpy as np
import pytest

from lm.data.objectives.draws import MASKS, PAIRS, row_keys, uniform, whole


def splitmix64(state: int, n: int) -> list[int]:
    """Steele, Lea and Flood's generator in Python integers."""
    numbers = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_numbers_are_splitmix64s() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # known from Rosetta Code
    keys = np.array([1234567, 2**64 - 1], np.uint64)
    for key, row in zip(keys, uniform(keys, 5)):
        assert row.tolist() == [x / 2**64 for x in (n >> 11 << 11 for n in splitmix64(int(key), 5))]


def test_a_row_does_not_depend_on_its_batch() -> None:
    index, epoch = np.array([5, 0, 7, 5]), np.array([0, 0, 3, 1])
    together = row_keys(3, MASKS, epoch, index)
    assert len(set(together.tolist())) == 4
    for i in range(4):
        assert row_keys(3, MASKS, epoch[i : i + 1], index[i : i + 1])[0] == together[i]
    assert (uniform(together, 3) == uniform(together, 9)[:, :3]).all()


def test_seeds_purposes_epochs_and_indices_draw_apart() -> None:
    index, epoch = np.meshgrid(np.arange(50), np.arange(50))
    keys = [row_keys(seed, purpose, epoch, index) for seed in (-1, 0, 1) for purpose in (MASKS, PAIRS)]
    assert len(np.unique(keys)) == 6 * 2500


def test_numbers_are_even_along_rows_and_columns() -> None:
    draws = uniform(row_keys(0, MASKS, np.zeros(1000, np.int64), np.arange(1000)), 100)
    # Means of n uniform numbers have a standard deviation of sqrt(1 / 12 n).
    assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12e5)
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12e3)
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 4 / np.sqrt(1e5)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_whole_numbers_reach_all_and_no_more(n: int) -> None:
    drawn = whole(np.linspace(0, 1, 1000, endpoint=False), n)
    assert set(drawn.tolist()) == set(range(max(n, 1)))
