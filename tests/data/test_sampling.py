from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.data.sampling import Draws, Permutation, TaskChoice, key

UL2_RATES = np.array([1, 1, 1, 1, 4]) / 8


def test_permute_is_a_bijection_for_every_size():
    for size in range(1, 301):
        assert sorted(map(Permutation(size, key(size)), range(size))) == list(range(size))


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_permute_stays_in_range_and_keeps_elements_apart(size, seed, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=20))
    images = [Permutation(size, seed)(i) for i in indices]
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("size", [1, 7, 675, 2**33 + 5])
def test_rows_side_by_side_draw_what_each_draws_alone(size, shuffled):
    draws, alone = (Draws(3, size, 64, shuffled) for _ in range(2))
    random = np.random.default_rng(0)
    for rows in (range(40), range(5, 6), range(30, 64)):
        places = random.integers(0, 2**31 - 10_000, 1) + random.integers(0, 40, len(rows))
        for _ in range(300):
            row = int(random.integers(len(rows)))
            found = [
                draws.among(rows, places, rows[row], int(places[row]) + passed) for passed in (0, 1)
            ]
            assert found == [alone(rows[row], int(places[row]) + passed) for passed in (0, 1)]
            # Row 0 is far ahead of the others in the end.
            places[row] += 1 + 9 * (row == 0)


def test_every_epoch_has_its_own_order():
    orders = [tuple(map(Permutation(100, key("order", epoch)), range(100))) for epoch in range(20)]
    assert len(set(orders)) == 20
    # Random permutations agree in one place on average; so do any two of these.
    agreeing = [
        sum(a == b for a, b in zip(x, y, strict=True)) for x in orders for y in orders if x != y
    ]
    assert np.mean(agreeing) == pytest.approx(1, abs=0.35)


def test_permutations_of_three_are_equally_likely():
    seen = Counter(tuple(map(Permutation(3, key(seed)), range(3))) for seed in range(6000))
    assert len(seen) == 6
    chi_square = sum((count - 1000) ** 2 / 1000 for count in seen.values())
    assert chi_square < 20.52  # 99.9% quantile, 5 degrees of freedom


def test_keys_tell_parts_apart():
    parts = [("a", 1), ("a", 11), ("a1", 1), ("a", "1"), (("a", 1),), ("a", 1, 0)]
    assert len({key(*p) for p in parts}) == len(parts)
    assert all(0 <= key(*p) < 2**64 for p in parts)


@pytest.mark.parametrize("rates", [UL2_RATES, np.array([0.7, 0.01, 0.29])], ids=["ul2", "uneven"])
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_follow_the_rates_at_every_moment_and_in_every_row(rates, seed):
    choose = TaskChoice(rates, seed)
    for row in (0, 1, 777):
        drawn = np.eye(len(rates))[[choose(row, j) for j in range(4096)]]
        counts = np.cumsum(drawn, axis=0)
        due = np.arange(1, 4097)[:, None] * rates
        # Independent draws would stray by 4 * sqrt(4096 * 0.25) = 128 examples.
        assert np.abs(counts - due).max() < 8


def test_shares_are_exact_to_a_thousandth_over_many_examples():
    choose = TaskChoice(UL2_RATES, 3)
    counts = np.bincount([choose(5, j) for j in range(100_000)], minlength=5)
    np.testing.assert_allclose(counts / 100_000, UL2_RATES, atol=0.001)


def test_rows_start_with_different_tasks_in_the_mixture_s_shares():
    for seed in range(5):
        choose = TaskChoice(UL2_RATES, seed)
        first = np.bincount([choose(row, 0) for row in range(64)], minlength=5)
        assert np.abs(first - 64 * UL2_RATES).max() <= 2


def test_few_examples_of_many_rows_reach_many_of_many_tasks():
    rates = np.random.default_rng(0).lognormal(0, 1, 230)
    rates /= rates.sum()
    for seed in range(3):
        choose = TaskChoice(rates, seed)
        counts = np.zeros((512, 230))
        for row, j in np.ndindex(512, 64):
            counts[row, choose(row, j)] += 1
        # Of 256 independent draws about 110 tasks are met.
        assert np.count_nonzero(counts[:4].sum(0)) > 90
        errors = counts.sum(0) - 512 * 64 * rates
        # Independent draws would stray by about 3 * sqrt(32768 * 0.03) = 90.
        assert np.abs(errors).max() < 25


def test_another_seed_gives_another_sequence():
    sequences = {tuple(TaskChoice(UL2_RATES, s)(0, j) for j in range(64)) for s in range(10)}
    assert len(sequences) == 10


def test_a_task_of_rate_zero_is_never_drawn():
    choose = TaskChoice(np.array([0.5, 0.0, 0.5]), 0)
    assert {choose(r, j) for r in range(8) for j in range(512)} == {0, 2}
