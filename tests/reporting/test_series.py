import random

import pytest

from t5g2.reporting.series import curve, decimate, smooth, view_top


@pytest.mark.parametrize("count", [1, 2, 99, 1000, 12345])
@pytest.mark.parametrize("buckets", [10, 400])
def test_thinning_keeps_the_ends_and_every_spike(count, buckets):
    generator = random.Random(count)
    points = [(float(x), generator.random()) for x in range(count)]
    points[count // 3] = (float(count // 3), 50.0)
    points[count // 2] = (float(count // 2), -50.0)
    thin = decimate(points, buckets)
    assert len(thin) <= 2 * buckets + 2
    assert thin == sorted(set(thin))
    assert set(thin) <= set(points)
    assert {points[0], points[-1], points[count // 3], points[count // 2]} <= set(thin)


def test_every_group_keeps_its_own_extremes():
    points = [(float(x), float((x * 7919) % 1000)) for x in range(10_000)]
    thin = set(decimate(points, 100))
    for begin in range(0, 10_000, 100):
        group = points[begin : begin + 100]
        assert min(group, key=lambda point: point[1]) in thin
        assert max(group, key=lambda point: point[1]) in thin


def test_smoothing_follows_a_straight_line_without_lag():
    points = [(float(x), 1000.0 - x) for x in range(500)]
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert [y for _, y in smoothed[:-5]] == pytest.approx([y for _, y in points[:-5]])


def test_one_enormous_value_leaves_the_rest_of_a_smoothed_curve_alone():
    points = [(float(x), 2.0) for x in range(1000)]
    points[100] = (100.0, 1e300)
    smoothed = smooth(points)
    assert [y for _, y in smoothed[200:]] == [2.0] * 800
    assert [y for _, y in smoothed[:90]] == [2.0] * 90


def test_smoothing_averages_noise_away():
    points = [(float(x), float(x % 2)) for x in range(5000)]
    assert all(abs(y - 0.5) < 0.01 for _, y in smooth(points)[100:-100])


def test_values_that_are_not_finite_are_set_apart_and_gaps_are_not_values():
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3},
        {"step": 4, "loss": None},
        {"step": 5, "loss": float("inf")},
    ]
    found = curve(rows, "loss")
    assert found.points == [(1, 1.0)]
    assert found.bad == [2, 5]


def test_a_rare_spike_does_not_set_the_axis_but_the_rest_does():
    steady = [2.0 + 0.01 * (i % 7) for i in range(1000)]
    assert view_top(steady) == max(steady)
    assert view_top([*steady, 1e6]) < 3
    assert view_top([*steady, 1e6], keep=[10.0]) == pytest.approx(11.0)
